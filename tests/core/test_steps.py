"""Steps: fo.step against update and apply_updates, fo.step_ against fo.step, in all ways of running."""

import functools
from typing import NamedTuple

import pytest
import torch
from catalogue import assert_close, make_params, rows
from step_cases import (
    WAYS,
    assert_untouched,
    by_update,
    clone,
    extras_of,
    histories,
    negated,
    not_vectors,
    run,
    snapshot,
    tensors,
    ways,
)

import functorch_optim as fo
from functorch_optim._core.links import select
from functorch_optim._core.rule import TreeRule

# Every transformation. ------------------------------------------------------------------------------------------------


def has_a_program(tx, params):
    """Tell whether the last pass over some leaf is elementwise; of an addition alone there is nothing to fuse."""
    links = [(link.rule, on) for link, on in zip(tx._links, select(tx._links, params), strict=True)]
    each = [[rule for rule, on in links if on[i]] for i in range(len(fo.tree.flatten(params)[0]))]
    of_tree = [[isinstance(rule, TreeRule) for rule in rules] for rules in each]
    return any(
        not last[-1] and all(rule.elementwise or whole for rule, whole in zip(rules, last, strict=True))
        for rules, last in zip(each, of_tree, strict=True)
        if rules
    )


@pytest.mark.sampled(size=64)
@rows
def test_a_step_in_single_precision_is_an_update_and_its_application(row):
    """In double precision it is a property of test_properties.py, and so is that nothing is modified."""
    tx, params = row(), make_params(torch.float32)
    history = list(histories(params, 4, missing=(2,)))
    assert_close(run(fo.step, tx, params, history), run(by_update, tx, params, history), rtol=1e-5, atol=1e-5)


@pytest.mark.sampled
@rows
@ways
def test_a_step_in_place_writes_into_the_tensors_given(row, way, compiled):
    tx, params = row(), make_params()
    history = list(histories(params, 4, missing=(2,)))
    expected = run(fo.step, tx, params, history)
    params = clone(params)
    state = tx.init(params)
    for grads in history:
        before, old_params, old_state = snapshot(grads), tensors(params), tensors(state)
        params, state = fo.step_(tx, grads, state, params, **WAYS[way], **extras_of(tx, params))
        assert_untouched(before)
        assert list(map(id, tensors(params))) == list(map(id, old_params))
        if row.elementwise:
            assert list(map(id, tensors(state))) == list(map(id, old_state))
    assert_close((params, state), expected, rtol=max(1e-12, row.tolerance), atol=max(1e-12, row.tolerance))
    in_one = row.elementwise and has_a_program(tx, params) and row.name != "identity"
    assert bool(compiled[1]) == (way == "fused" and in_one)


@rows
def test_a_missing_gradient_leaves_parameter_and_state_alone(row):
    tx, params = row(), make_params()
    state = tx.init(params)
    params, state = fo.step_(tx, next(histories(params, 1)), state, params, **extras_of(tx, params))
    grads = fo.tree.map(torch.randn_like, params)
    grads["layer"]["bias"] = grads["rest"][0] = None
    saved = fo.state_dict(state)
    before = snapshot([params["layer"]["bias"], params["rest"][0]])
    before += snapshot([leaf for path, leaf in saved.items() if path.endswith(("layer.bias", "rest.0"))])
    params, state = fo.step_(tx, grads, state, params, **extras_of(tx, params))
    for leaf, value, _ in before:
        assert torch.equal(leaf, value)
    nothing = fo.tree.map(lambda p: None, params)
    before = snapshot(params)
    fo.step_(tx, nothing, state, params, **extras_of(tx, params))
    assert_untouched(before)


DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.complex128: 1e-13}


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ways_agree_for_every_dtype(way, dtype, compiled):
    tx = fo.chain(fo.clip_by_global_norm(3.0), fo.adamw(0.1, eps=1e-3, weight_decay=0.1), fo.trace(0.5))
    params = make_params(dtype)
    params["rest"].append(torch.randn(5, 4, dtype=dtype).t())
    params["rest"].append(torch.randn(12, dtype=dtype)[::3])
    history = list(histories(params, 3, missing=(1,)))
    expected = run(fo.step, tx, params, history)
    step_ = functools.partial(fo.step_, **WAYS[way])
    assert_close(run(step_, tx, params, history), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


# Chains. --------------------------------------------------------------------------------------------------------------


CHAINS = {
    "tree_rule_first": lambda: fo.chain(fo.stateless(negated), fo.adam(0.1)),
    "tree_rule_last": lambda: fo.chain(fo.adam(0.1), fo.stateless(negated)),
    "tree_rule_between": lambda: fo.chain(fo.trace(0.9), fo.stateless(negated), fo.adam(0.1)),
    "whole_tensors_last": lambda: fo.chain(fo.adam(0.1), fo.clip_by_norm(0.05)),
    "whole_tensors_first": lambda: fo.chain(fo.clip_by_norm(0.5), fo.trace(0.9), fo.adam(0.1)),
    "norm_between": lambda: fo.chain(fo.trace(0.9), fo.clip_by_global_norm(0.5), fo.adam(0.1)),
    "schedule": lambda: fo.adamw(fo.schedules.cosine(0.1, 5)),
    "partition": lambda: fo.partition(
        {True: fo.adam(0.1), False: fo.chain(fo.clip_by_norm(0.1), fo.sgd(0.1, momentum=0.9))}, not_vectors
    ),
    "masked": lambda: fo.chain(fo.masked(fo.trace(0.9), not_vectors), fo.masked(fo.sgd(0.1), not_vectors)),
    "a_number_for_each": lambda: fo.sgd({"layer": 0.1, "rest": [0.2]}, momentum=0.9),
    "a_number_for_each_element": lambda: fo.adam({"layer": 0.1, "rest": [torch.tensor([0.1, 0.2, 0.3])]}),
    "tensor": lambda: fo.adam(torch.tensor(0.1)),
    "empty": lambda: fo.chain(),
    "carried": lambda: fo.chain(fo.nadam(0.1), fo.asgd(0.1)),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", CHAINS)
@ways
def test_chains(name, way, compiled):
    tx, params = CHAINS[name](), make_params()
    history = list(histories(params, 4, missing=(2,)))
    expected = run(by_update, tx, params, history)
    assert_close(run(fo.step, tx, params, history), expected, rtol=1e-12, atol=1e-12)
    step_ = functools.partial(fo.step_, **WAYS[way])
    assert_close(run(step_, tx, params, history), expected, rtol=1e-12, atol=1e-12)


class Two(NamedTuple):
    """A state of two tensors."""

    a: torch.Tensor
    b: torch.Tensor


def shared(p):
    zeros = torch.zeros_like(p)
    return Two(zeros, zeros)


MOVING = {
    "swap": (Two, lambda g, state, p, s: (state.a - g, Two(state.b + g, state.a))),
    "shift": (Two, lambda g, state, p, s: (g - state.b, Two(g, state.a))),
    "state_is_parameter": (lambda p: Two(p, 2 * p), lambda g, state, p, s: (-0.1 * g, Two(state.b, state.a))),
    "parameter_before": (Two, lambda g, state, p, s: (-0.1 * g + state.a, Two(p, state.a))),
    "parameter_after": (Two, lambda g, state, p, s: (-0.1 * g + state.a, Two(state.b, p - g))),
    "view": (Two, lambda g, state, p, s: (state.a.detach() - g, Two(2 * state.a + g, state.a.detach()))),
    "one_for_two_fields": (shared, lambda g, state, p, s: (g, Two(state.a + g, state.b - 1))),
    "the_parameter_itself": (lambda p: Two(p, p), lambda g, state, p, s: (g - state.a, Two(state.a + g, state.b - 1))),
}


@pytest.mark.parametrize("name", MOVING)
@ways
def test_states_that_move_and_share(name, way, compiled):
    """What is read must not have been overwritten."""
    init, update = MOVING[name]
    tx = fo.leafwise(init, update, elementwise=True, needs_params=True)
    params = make_params()
    history = list(histories(params, 4))
    expected = run(by_update, tx, params, history)
    assert_close(run(fo.step, tx, params, history), expected, rtol=1e-12, atol=1e-12)
    step_ = functools.partial(fo.step_, **WAYS[way])
    assert_close(run(step_, tx, params, history), expected, rtol=1e-12, atol=1e-12)


@ways
def test_what_shares_memory(way, compiled):
    """Parameters that are parts of one tensor, and gradients that are parameters or states."""
    tx = fo.chain(fo.scale_by_adam(), fo.scale(-0.1))

    def train(step):
        buffer = torch.linspace(-1, 1, 24, dtype=torch.float64)
        params = {"a": buffer[:6].view(2, 3), "b": buffer[6:10], "c": buffer[10:20:2], "d": buffer[11:20:2]}
        state = tx.init(params)
        params, state = step(tx, fo.tree.map(torch.ones_like, params), state, params)
        params, state = step(tx, params, state, params)
        params, state = step(tx, fo.tree.map(torch.Tensor.detach, params), state, params)
        return step(tx, state[0].exp_avg, state, params)

    assert_close(train(functools.partial(fo.step_, **WAYS[way])), train(fo.step), rtol=1e-12, atol=1e-12)


@ways
def test_trees_that_share_memory(way, compiled):
    """A function of whole trees may return parameters, and keep them."""

    def exchanged(updates, state, params):
        return {"a": params["b"], "b": params["a"], "c": state["c"]}, params

    tx = fo.chain(
        fo.GradientTransformation(lambda params: fo.tree.map(torch.ones_like, params), exchanged), fo.clip_by_norm(1e9)
    )
    params = {name: torch.randn(3, dtype=torch.float64) for name in "abc"}
    history = [fo.tree.map(torch.randn_like, params) for _ in range(3)]
    expected = run(by_update, tx, params, history)
    assert_close(run(functools.partial(fo.step_, **WAYS[way]), tx, params, history), expected)
    tx = fo.chain(*[fo.GradientTransformation(lambda params: fo.tree.map(torch.ones_like, params), exchanged)] * 2)
    expected = run(by_update, tx, params, history)
    assert_close(run(functools.partial(fo.step_, **WAYS[way]), tx, params, history), expected)


def test_trees_of_any_kind():
    tx = fo.adam(0.1)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    for params in (draw(3), [draw(3), (draw(2), None)], {}, (draw(),)):
        grads = fo.tree.map(torch.ones_like, params)
        expected = by_update(tx, grads, tx.init(params), params)
        assert_close(fo.step(tx, grads, tx.init(params), params), expected)
        assert_close(fo.step_(tx=tx, grads=grads, state=tx.init(params), params=params), expected)


def test_inference_mode():
    tx, ones = fo.adam(0.1), torch.ones(3, dtype=torch.float64)
    expected = by_update(tx, {"w": ones}, tx.init({"w": ones}), {"w": ones})
    for step in (fo.step, fo.step_):
        with torch.inference_mode():
            params = {"w": torch.ones(3, dtype=torch.float64)}
            params, state = step(tx, {"w": ones}, tx.init(params), params)
            assert_close((params, state), expected)


def test_parameters_of_a_module():
    """Leaves that require grad are written to, and nothing is recorded."""
    model = torch.nn.Linear(3, 2).double()
    params = dict(model.named_parameters())
    tx = fo.adam(0.1)
    grads = fo.tree.map(torch.ones_like, params)
    expected = by_update(tx, grads, tx.init(params), fo.tree.map(torch.Tensor.detach, params))
    expected = fo.tree.map(torch.clone, expected)
    state = tx.init(params)
    params, state = fo.step_(tx, grads, state, params)
    assert params["weight"] is model.weight
    assert model.weight.is_leaf
    assert model.weight.requires_grad
    assert not any(leaf.requires_grad for leaf in tensors(state))
    assert_close((fo.tree.map(torch.Tensor.detach, params), state), expected)


# Inside of transformations. -------------------------------------------------------------------------------------------


@pytest.mark.sampled(pool="compiled")
def test_steps_are_differentiated_and_batched():
    def trained(step, lr):
        tx, params = fo.sgd(lr, momentum=0.9), {"w": torch.linspace(-1, 1, 3, dtype=torch.float64)}
        state = tx.init(params)
        for _ in range(2):
            params, state = step(tx, fo.tree.map(lambda p: p * p + p, params), state, params)
        return params["w"].square().sum()

    lrs = torch.tensor([0.1, 0.01], dtype=torch.float64)
    for transform in (torch.func.grad, lambda f: lambda lr: torch.func.jvp(f, (lr,), (lr,))[1]):
        batched = [torch.vmap(transform(functools.partial(trained, step)))(lrs) for step in (fo.step, by_update)]
        torch.testing.assert_close(*batched, rtol=1e-12, atol=0)
        assert batched[0].abs().min() > 0
    compiled = torch.compile(functools.partial(trained, fo.step), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(lrs[0]), trained(by_update, lrs[0]), rtol=1e-12, atol=0)


def in_place_step(p):
    tx = fo.sgd(0.1)
    return fo.step_(tx, p.detach(), tx.init(p), p)[0].sum()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, lambda f: lambda p: torch.func.jvp(f, (p,), (p,))])
def test_steps_in_place_are_refused_in_transforms(transform):
    p = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="step_ writes in place, which torch.func .* params, state = step\\(tx, gr"):
        transform(in_place_step)(p)
    assert torch.equal(p, torch.ones(3, 2))


def test_steps_in_place_are_refused_in_what_is_compiled():
    p = torch.ones(3, 2)
    with pytest.raises(Exception, match="step_ writes in place"):
        torch.compile(in_place_step, fullgraph=True, backend="eager")(p)
    assert torch.equal(p, torch.ones(3, 2))
