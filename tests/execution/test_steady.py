"""Steps like the one before: that they are taken, and never where something has been changed in between."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steady_cases import (
    CHANGES,
    DRAWS,
    OPTIONS,
    assert_same,
    changed,
    changes,
    compare,
    data_swapped,
    each,
    each_state,
    forget,
    give_gradients,
    hooked,
    like,
    make_params,
    of_another_parameter,
    ours,
    parameter_taken_out,
    parameters,
    the_parameter,
    the_parameter_detached,
    torchs,
    wrapper,
)

import functorch_optim as fo
from functorch_optim.optim._step import PreparedStep

pytestmark = pytest.mark.usefixtures("double")


@pytest.fixture
def taken(monkeypatch):
    """List what was prepared for an earlier step, each time that it is taken for another one."""
    steps = []
    fits = PreparedStep.fits
    monkeypatch.setattr(PreparedStep, "fits", lambda self, *given: fits(self, *given) and not steps.append(self))
    return steps


# That it is taken. ----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("make", [ours, wrapper])
def test_plain_training_is_steady(name, make, taken):
    compare(make(name), torchs(name), steps=10)
    assert len(taken) == 9
    assert len(set(taken)) == 1  # what the first step prepared


CHAINS = {
    "clipped": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adam(fo.schedules.cosine(0.1, 10))),
    "extra": lambda: fo.chain(
        fo.leafwise(None, lambda g, state, p, s: (s * g, state), lambda step, *, value: 1 / value, elementwise=True),
        fo.adam(0.1),
    ),
    "carried": lambda: fo.chain(fo.nadam(0.1), fo.asgd(0.1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_it_is_the_functional_form(name, taken):
    optimizer = fo.Optimizer(make_params(), CHAINS[name]())
    tx, params = CHAINS[name](), [p.detach() for p in make_params()]
    state = tx.init(params)
    for step in range(8):
        give_gradients(optimizer, step)
        extra = {"value": 1.0 + step} if name == "extra" else {}
        optimizer.step(**extra)
        updates, state = tx.update([p.grad for p in parameters(optimizer)], state, params, **extra)
        params = fo.apply_updates(params, updates)
        for p, q in zip(parameters(optimizer), params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)
    assert len(taken) == 7


def test_numbers_that_are_read_at_every_step_keep_it_steady(taken):
    pair = ours("Adam"), torchs("Adam")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in pair]
    for step in range(8):
        for optimizer in pair:
            give_gradients(optimizer, step)
            optimizer.param_groups[0]["betas"] = (0.5 + 0.01 * step, 0.9)
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_same(*pair)
    assert len(taken) == 7


def assert_functional(tx, same, steps):
    """Train by an optimizer around one transformation, and by the functional form of the same."""
    optimizer, params = fo.Optimizer(make_params(), tx), [p.detach() for p in make_params()]
    state = same.init(params)
    for step in range(steps):
        give_gradients(optimizer, step)
        optimizer.step()
        params, state = fo.step(same, [p.grad for p in parameters(optimizer)], state, params)
        for p, q in zip(parameters(optimizer), params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


OTHERS = {
    "tree_rule": lambda: fo.chain(fo.adam(0.1), fo.stateless(lambda updates, params: updates)),
    "tree_state": lambda: fo.monitor(fo.cautious(fo.adam(0.1))),
    "whole_tensors": lambda: fo.chain(fo.adam(0.1), fo.clip_by_norm(0.1)),
    "a_number_for_each": lambda: fo.sgd([0.1, 0.2, 0.3, 0.4, 0.5], momentum=0.9),
    "norm_in_the_middle": lambda: fo.chain(fo.trace(0.9), fo.clip_by_global_norm(0.1), fo.sgd(0.1)),
    "masked": lambda: fo.masked(fo.sgd(0.1), lambda params: [p.ndim > 1 for p in params]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_chains_are_the_functional_form(name, taken):
    assert_functional(OTHERS[name](), OTHERS[name](), steps=5)
    assert len(taken) == 4


def test_a_function_of_the_whole_tree_may_return_anything(taken):
    """Parameters, gradients, and None, at some steps."""
    returned = iter(range(12))

    def update(updates, state, params):
        kind = next(returned) // 2  # of both forms
        return [updates, params, [None] * 5, fo.tree.map(torch.neg, params), updates, params][kind], state

    tx = fo.chain(fo.GradientTransformation(lambda params: (), update), fo.identity())
    assert_functional(tx, tx, steps=6)
    assert len(taken) == 5


def test_a_state_of_the_whole_tree_that_is_loaded_is_used(taken):
    def momentum(updates, state, params):
        new = fo.tree.map(lambda m, g: 0.9 * m + g, state, updates)
        return fo.tree.map(lambda m: -0.1 * m, new), new

    optimizer = fo.Optimizer(make_params(), fo.GradientTransformation(fo.tree.zeros_like, momentum))

    def trained(*steps):
        for step in steps:
            give_gradients(optimizer, step)
            optimizer.step()
        return [p.detach().clone() for p in parameters(optimizer)]

    trained(0, 1)
    saved, params = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in parameters(optimizer)]
    expected = trained(2, 3, 4)
    assert len(taken) == 4
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, old in zip(parameters(optimizer), params, strict=True):
            p.copy_(old)
    for p, q in zip(trained(2, 3, 4), expected, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("lr", [[0.1], {"w": 0.1}])
def test_a_number_for_each_of_one_parameter(lr):
    """With one parameter, a tree of numbers is one pass over all."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fo.Optimizer([("w", p)] if isinstance(lr, dict) else [p], fo.sgd, lr=lr)
    for step in range(6):
        p.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * (step + 1)))


# Changes and gradients. -----------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=24)
@each
@changes
def test_changes_between_steps(name, change, taken):
    compare(ours(name), torchs(name), change)
    assert len(taken) >= 3


@pytest.mark.sampled(size=12)
@pytest.mark.parametrize("name", ["Adam", "ASGD"])
@changes
def test_changes_between_steps_of_the_wrapper(name, change, taken):
    """Against steps that are all prepared anew."""
    compare(wrapper(name), wrapper(name), change, slow=True)
    assert len(taken) >= 3


@pytest.mark.sampled(size=12)
@each
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_gradients_of_other_kinds(name, draw, taken):
    if draw in (of_another_parameter, the_parameter, the_parameter_detached):  # which torch overwrites meanwhile
        compare(ours(name), ours(name), draw=draw, slow=True)
    else:
        compare(ours(name), torchs(name), draw=draw)
    assert len(taken) >= 3


@each
@pytest.mark.parametrize("make", [ours, wrapper])
def test_a_gradient_that_is_a_state(name, make, taken):
    def draw(optimizer, p):
        kept = [value for key, value in optimizer.state[p].items() if key != "step" and value.shape == p.shape]
        return kept[0] if kept and p.ndim else like(p)

    compare(make(name), make(name), draw=draw, slow=True)
    assert len(taken) >= 3


def test_sparse_gradients(taken):
    def draw(optimizer, p):
        return like(p).to_sparse() if p.ndim == 2 else like(p)

    for make in (ours, wrapper):
        compare(make("SGD"), make("SGD"), lambda o: o.param_groups[0].update(weight_decay=0), draw=draw, slow=True)
    optimizer = ours("Adam")
    for step in range(5):
        give_gradients(optimizer, step)
        optimizer.step()
    give_gradients(optimizer, 5, draw)
    before = [p.detach().clone() for p in parameters(optimizer)]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, parameters(optimizer), before))


@pytest.mark.sampled(size=12)
@each
@pytest.mark.parametrize("make", [ours, wrapper])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_modules_that_are_converted(name, make, dtype, taken):
    def change(optimizer):
        for p in parameters(optimizer):
            p.grad = None
        torch.nn.ParameterList(parameters(optimizer)).to(dtype)

    if dtype != torch.float16:
        compare(make(name), make(name), change, slow=True)
        assert len(taken) >= 3
    pair = make(name), make(name)
    for optimizer in pair:
        torch.nn.ParameterList(parameters(optimizer)).float()
    compare(*pair, change, slow=True)
    assert len(taken) >= 3


def test_gradients_of_another_dtype():
    """A parameter may say that its gradients have another dtype."""
    optimizer = fo.Optimizer([torch.nn.Parameter(torch.ones(3))], fo.adam)
    [p] = parameters(optimizer)
    for _ in range(5):
        p.grad = torch.ones(3)
        optimizer.step()
    before = p.detach().clone()
    p.grad = None
    p.grad_dtype = torch.float32
    p.grad = torch.ones(3, dtype=torch.float32)
    with pytest.raises(ValueError, match="have shape \\(3,\\) and dtype torch.float32 at '0', but the parameter"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


# Numbers in groups of the wrapper. ------------------------------------------------------------------------------------


def with_lists(lr, betas, decays=(0.1, 0.2)):
    return fo.chain(fo.add_decayed_weights(decays[1]), fo.adam(lr, betas))


@pytest.mark.sampled(size=8)
@pytest.mark.parametrize(
    "edit",
    [
        lambda group: group["betas"].__setitem__(0, 0.1),
        lambda group: group["decays"].__setitem__(1, 0.9),
        lambda group: group.update(lr=0.5),
        lambda group: group["lr"].fill_(0.5) if isinstance(group["lr"], torch.Tensor) else group.update(lr=0.4),
        lambda group: group.update(foreach=True),
        lambda group: group.update(decays=(0.1, torch.tensor(0.5))),
    ],
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_numbers_of_the_wrapper_are_read(edit, lr, taken):
    def make():
        given = {"lr": copy.deepcopy(lr), "betas": [0.9, 0.99], "decays": [0.1, 0.2]}
        return fo.Optimizer(make_params(), with_lists, **given)

    pair = compare(make(), make(), lambda optimizer: edit(optimizer.param_groups[0]), slow=True)
    assert taken
    unchanged = compare(make(), make(), slow=True)[0]
    if "foreach" not in edit.__code__.co_names and pair[0].param_groups[0].get("foreach") is None:
        assert not torch.equal(parameters(pair[0])[0], parameters(unchanged)[0])


def test_errors_leave_everything_as_it_was(taken):
    def failing(step):
        if step >= 5:
            raise ValueError("too late")
        return 0.1

    optimizer = fo.Optimizer(make_params(), fo.chain(fo.nadam(0.1), fo.scale_by_schedule(failing)))
    for step in range(5):
        give_gradients(optimizer, step)
        optimizer.step()
    assert taken
    tensors = [*parameters(optimizer), *[value for *_, value in each_state(optimizer)]]
    before = [(tensor, tensor.detach().clone(), tensor._version) for tensor in tensors]
    with pytest.raises(ValueError, match="too late"):
        optimizer.step()
    for tensor, value, version in before:
        assert tensor._version == version
        assert torch.equal(tensor, value)


# Anything, in any order. ----------------------------------------------------------------------------------------------

EDITS = [change for change in CHANGES if change not in (parameter_taken_out, hooked, data_swapped)]
ACTIONS = st.lists(st.sampled_from([None, None, None, None, *EDITS, *DRAWS]), min_size=4, max_size=14)


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("make", [ours, wrapper])
@settings(max_examples=2 * settings().max_examples)
@given(ACTIONS, st.sampled_from(sorted(OPTIONS)))
def test_anything_in_any_order(make, actions, name):
    pair = [make(name) for _ in range(2)]
    for step, action in enumerate(actions):
        draw = action if action in DRAWS else lambda optimizer, p: like(p)
        if action in EDITS:
            pair = [changed(optimizer, action) for optimizer in pair]
        for optimizer in pair:
            give_gradients(optimizer, step, draw)
        forget(pair[1])
        for optimizer in pair:
            optimizer.step()
        assert_same(*pair, tolerance=1e-9)
