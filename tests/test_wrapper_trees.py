"""fo.Optimizer around a transformation: all parameters are one tree, with the numbers of the functional loop."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_wrapper_interface import assert_copy_trains_on_by_itself, each_copy
from test_wrapper_numbers import Model, assert_close, assert_same, backward, train
from torch import nn, optim
from torch.optim import lr_scheduler

import functorch_optim as fo

MATRICES = ("weight", "empty", "strided")


def is_matrix(params):
    """Mask for lists and dicts."""
    return fo.tree.map(lambda p: p.ndim > 1, params)


def is_matrix_by_name(params):
    """Mask for dicts by name."""
    return {name: name in MATRICES for name in params}


def is_matrix_in_list(params):
    """Mask for lists."""
    return [p.ndim > 1 for p in params]


def in_two_groups(params):
    params = list(params)
    return [{"params": params[::2]}, {"params": params[1::2]}]


def parameters(model):
    return list(model.parameters())


@pytest.mark.parametrize(
    ("schedule", "missing"), [(fo.schedules.cosine(0.1, 15), False), (fo.schedules.constant(0.05), True)]
)
def test_clipping_and_adamw_and_a_schedule_as_in_torch(schedule, missing, device):
    model, reference_model = Model(device), Model(device)
    tx = fo.chain(fo.clip_by_global_norm(0.6, eps=1e-6), fo.adamw(schedule))
    optimizer = fo.Optimizer(in_two_groups(model.parameters()), tx)
    reference = optim.AdamW(in_two_groups(reference_model.parameters()), lr=1.0)
    scheduler = lr_scheduler.LambdaLR(reference, lambda t: float(schedule(t)))
    clipped = set()
    for t in range(20):
        backward(model, t, missing)
        optimizer.step()
        backward(reference_model, t, missing)
        norm = nn.utils.clip_grad_norm_(reference_model.parameters(), 0.6)
        clipped.add(bool(norm > 0.6))
        reference.step()
        scheduler.step()
        assert_same((model, optimizer), (reference_model, reference))
    assert clipped == {True, False}  # else there was nothing to see


def decayed(mask):
    return fo.chain(fo.masked(fo.add_decayed_weights(0.3), mask), fo.sgd(0.1, 0.9))


def decayed_in_torch(matrices, others):
    return [optim.SGD([{"params": matrices, "weight_decay": 0.3}, {"params": others}], lr=0.1, momentum=0.9)]


def parted(mask):
    return fo.partition({True: fo.adam(0.05), False: fo.sgd(0.1, 0.9)}, mask)


def parted_in_torch(matrices, others):
    return [optim.Adam(matrices, lr=0.05), optim.SGD(others, lr=0.1, momentum=0.9)]


def frozen(mask):
    return fo.chain(fo.adam(0.05), fo.freeze(mask))


def frozen_in_torch(matrices, others):
    return [optim.Adam(others, lr=0.05)]


@pytest.mark.parametrize(
    ("make", "make_references"),
    [(decayed, decayed_in_torch), (parted, parted_in_torch), (frozen, frozen_in_torch)],
    ids=["masked", "partition", "freeze"],
)
@pytest.mark.parametrize(("named", "mask"), [(True, is_matrix_by_name), (False, is_matrix_in_list)])
def test_masks_and_labels_see_all_groups_as_one_tree(named, mask, make, make_references, device):
    model, reference_model = Model(device), Model(device)
    optimizer = fo.Optimizer(in_two_groups(model.named_parameters() if named else model.parameters()), make(mask))
    by_name = dict(reference_model.named_parameters())
    matrices = [by_name.pop(name) for name in MATRICES]
    references = make_references(matrices, list(by_name.values()))
    for t in range(20):
        train([(model, optimizer)], [t])
        backward(reference_model, t)
        for reference in references:
            reference.step()
        assert_close(parameters(model), parameters(reference_model))


# Functions of whole trees. --------------------------------------------------------------------------------------------


class PeakState(NamedTuple):
    peak: torch.Tensor
    mean: fo.tree.Tree


def init_peak(params):
    return PeakState(torch.zeros((), dtype=torch.float64), fo.tree.map(torch.zeros_like, params))


def update_peak(updates, state, params=None):
    """Return the running mean of updates over the largest sum of all their magnitudes so far."""
    mean = fo.tree.map(lambda m, g: m if g is None else (m + g) / 2, state.mean, updates)
    peak = torch.stack([state.peak, sum(m.abs().sum().cpu() for m in fo.tree.flatten(mean)[0])]).max()
    return fo.tree.map(lambda g, m: m / peak.to(m.device), updates, mean), PeakState(peak, mean)


BY_PEAK = fo.GradientTransformation(init_peak, update_peak)


@each_copy
@pytest.mark.parametrize("named", [True, False], ids=["named", "list"])
def test_copies_of_a_transformation_with_a_tree_for_a_state_train_on(named, make_copy, device):
    def make():
        model = Model(device)
        params = model.named_parameters() if named else model.parameters()
        tx = fo.chain(fo.masked(BY_PEAK, is_matrix), fo.clip_by_global_norm(1.0), BY_PEAK, fo.adam(0.05))
        return model, fo.Optimizer(in_two_groups(params), tx)

    assert_copy_trains_on_by_itself(make, make_copy)


LINKS = [
    fo.identity(),
    fo.trace(0.9, nesterov=True),
    fo.scale_by_adam(amsgrad=True),
    fo.adadelta(),
    fo.clip(0.5),
    fo.clip_by_norm(0.3),
    fo.clip_by_global_norm(0.5),
    fo.clip_by_global_norm(0.5, float("inf"), nonfinite="skip"),
    fo.add_decayed_weights(0.1, is_matrix),
    fo.scale_by_schedule(fo.schedules.linear(1.0, -1.0, 6)),
    fo.zero_nans(),
    fo.maximize(),
    fo.freeze(is_matrix),
    fo.masked(fo.chain(fo.clip_by_global_norm(0.2), fo.trace(0.5)), is_matrix),
    fo.partition({True: fo.adamw(0.3), False: fo.chain(BY_PEAK, fo.sgd(0.3, 0.9))}, is_matrix),
    fo.named_chain(peak=BY_PEAK, momentum=fo.trace(0.5)),
    fo.stateless(lambda updates, params: fo.tree.map(lambda g, p: g - p.sin() / 9, updates, params)),
]


def train_functionally(model, tx, steps):
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = tx.init(params)
    for t in steps:
        backward(model, t, missing=False)
        updates, state = tx.update({name: p.grad for name, p in model.named_parameters()}, state, params)
        params = fo.apply_updates(params, updates)
        model.load_state_dict(params)


@given(links=st.lists(st.sampled_from(LINKS), max_size=5), named=st.booleans())
def test_any_chain_trains_as_in_the_functional_loop(links, named):
    tx = fo.chain(*links, fo.scale_by_learning_rate(0.05))
    models = [Model(), Model()]
    optimizer = fo.Optimizer(models[0].named_parameters() if named else models[0].parameters(), tx)
    for t in range(8):
        backward(models[0], t, missing=False)
        optimizer.step()
    train_functionally(models[1], tx, range(8))
    assert_close(*map(parameters, models))


class LastState(NamedTuple):
    last: torch.Tensor


class StartState(NamedTuple):
    start: torch.Tensor


# Their states are the very tensors that they were given, which torch modifies in place: gradients and parameters.
KEEPERS = {
    "gradients, leafwise": fo.leafwise(LastState, lambda g, state, p, s: (2 * g - state.last, LastState(g))),
    "gradients, tree": fo.GradientTransformation(
        lambda params: fo.tree.map(torch.zeros_like, params),
        lambda updates, state, params=None: (fo.tree.map(lambda g, last: 2 * g - last, updates, state), updates),
    ),
    "parameters, leafwise": fo.leafwise(
        lambda p: StartState(p), lambda g, state, p, s: (g + p - state.start, state), needs_params=True
    ),
    "parameters, tree": fo.GradientTransformation(
        lambda params: params,
        lambda updates, state, params=None: (
            fo.tree.map(lambda g, p, start: g + p - start, updates, params, state),
            state,
        ),
    ),
}


@pytest.mark.parametrize("tx", KEEPERS.values(), ids=KEEPERS)
def test_states_may_be_the_tensors_that_were_given(tx, device):
    tx = fo.chain(tx, fo.sgd(0.05))
    model, reference_model = Model(device), Model(device)
    optimizer = fo.Optimizer(model.named_parameters(), tx)
    for t in range(8):
        old = [p.grad for p in model.parameters()]
        backward(model, t, missing=False)
        for p, grad in zip(model.parameters(), old, strict=True):
            if grad is not None:
                p.grad = grad.copy_(p.grad)  # as after zero_grad(set_to_none=False)
        optimizer.step()
    train_functionally(reference_model, tx, range(8))
    assert_close(parameters(model), parameters(reference_model))


def make_vectors(device, *values):
    """Make parameters whose gradients are ones."""
    params = [nn.Parameter(torch.tensor(value, dtype=torch.float64, device=device)) for value in values]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def test_an_update_may_be_none_as_in_the_functional_loop(device):
    params = make_vectors(device, [1.0, 2.0], [3.0])
    skip_last = fo.stateless(lambda updates, params: [updates[0], None])
    fo.Optimizer(params, fo.chain(skip_last, fo.sgd(0.5))).step()
    assert [p.tolist() for p in params] == [[0.5, 1.5], [3.0]]


def test_names_need_not_be_unique_where_no_function_sees_them(device):
    params = make_vectors(device, [1.0], [3.0])
    fo.Optimizer([{"params": [("p", p)]} for p in params], fo.sgd(0.5)).step()
    assert [p.tolist() for p in params] == [[0.5], [2.5]]


def test_names_must_be_unique_where_functions_see_them(device):
    params = make_vectors(device, [1.0], [3.0])
    with pytest.raises(ValueError, match="'p'"):
        fo.Optimizer([{"params": [("p", p)]} for p in params], fo.chain(BY_PEAK, fo.sgd(0.5)))


def test_groups_added_later_join_the_tree(device):
    first, second = make_vectors(device, [3.0], [4.0])
    optimizer = fo.Optimizer([first], fo.chain(fo.clip_by_global_norm(1.0), fo.trace(0.5), fo.scale(-1.0)))
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    first.grad, second.grad = first.detach() * 1.5, second.detach()  # 3 and 4
    optimizer.step()
    assert_close([first.item(), second.item()], [3.0 - 1.0 - (0.5 + 0.6), 4.0 - 0.8])


# Extras. --------------------------------------------------------------------------------------------------------------


def scaled_by_value(lr, on=True):
    """Make SGD whose gradients are multiplied by the extra `value`, or plain SGD."""

    def update(updates, state, params=None, *, value):
        return fo.tree.map(lambda g: g * value, updates), state

    return fo.chain(fo.GradientTransformation(lambda params: (), update), fo.sgd(lr)) if on else fo.sgd(lr)


def test_the_loss_of_the_closure_is_the_extra_value(device):
    (p,) = make_vectors(device, [1.0])
    optimizer = fo.Optimizer([p], scaled_by_value(0.5))
    assert optimizer.step(lambda: 2.0) == 2.0
    assert p.item() == 0.0
    optimizer.step(value=4.0)
    assert p.item() == -2.0
    optimizer.step(lambda: 2.0, value=-4.0)  # what is given by name counts
    assert p.item() == 0.0


def test_extras_go_to_those_groups_that_want_them(device):
    first, second = make_vectors(device, [1.0], [1.0])
    groups = [{"params": [first]}, {"params": [second], "on": False}]
    optimizer = fo.Optimizer(groups, scaled_by_value, lr=0.5)
    optimizer.step(lambda: 2.0)
    assert [first.item(), second.item()] == [0.0, 0.5]
    optimizer.step(value=4.0)
    assert [first.item(), second.item()] == [-2.0, 0.0]


def test_updates_may_be_the_parameters_themselves():
    a, b = [torch.nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0)]
    a.grad = b.grad = torch.ones(1)
    fo.Optimizer([a, b], fo.stateless(lambda updates, params: [params[1], params[0]])).step()
    assert (a.item(), b.item()) == (3.0, 3.0)


def test_masks_by_name_need_names():
    model = torch.nn.Linear(2, 2)
    tx = fo.masked(fo.sgd(0.1), {"weight": True, "bias": False})
    fo.Optimizer(model.named_parameters(), tx)
    with pytest.raises(ValueError, match=r"parameters have no names here: give model.named_parameters\(\)"):
        fo.Optimizer(model.parameters(), tx)


def test_differentiable_is_for_all_groups():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "differentiable": True}]
    with pytest.raises(ValueError, match="differentiable is for all groups: write Optimizer"):
        fo.Optimizer(groups, fo.sgd, lr=0.1)


def test_edits_are_noticed_by_type_too():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    opt = fo.Optimizer([p], fo.sgd, lr=0.1)
    opt.step()
    opt.param_groups[0]["lr"] = False
    with pytest.raises(TypeError, match="Invalid learning rate: False is a bool"):
        opt.step()


def test_masks_and_labels_span_the_groups():
    a, b = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    tx = fo.partition({"x": fo.sgd(0.1), "y": fo.sgd(1.0)}, {"a": "x", "b": "y"})
    opt = fo.Optimizer([{"params": [("a", a)]}, {"params": [("b", b)]}], tx)
    a.grad = b.grad = torch.ones(1)
    opt.step()
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([0.9, 0.0]))


def two_traces(lr=1.0, maximize=False):
    return fo.chain(*([fo.maximize()] if maximize else []), fo.trace(0.9), fo.trace(0.5), fo.scale(lr))


def test_states_keep_their_names_when_links_come_and_go():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = fo.Optimizer([p], two_traces)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    assert sorted(opt.state[p]) == ["momentum_buffer", "momentum_buffer.1", "step"]
    before = opt.state[p]["momentum_buffer"].item()
    opt.param_groups[0]["maximize"] = True
    opt.step()
    assert opt.state[p]["momentum_buffer"].item() == pytest.approx(0.9 * before - 1)


def summing():
    def update(updates, state, params):
        state = fo.tree.map(lambda m, g: m if g is None else m + g, state, updates)
        return fo.tree.map(lambda g, m: m, updates, state), state

    return fo.GradientTransformation(lambda params: fo.tree.map(torch.zeros_like, params), update)


def test_states_of_the_tree_keep_their_names_when_links_come_and_go():
    def factory(lr=0.1, momentum=0.0):
        return fo.chain(fo.sgd(1.0, momentum), summing(), fo.scale(lr))

    p = torch.nn.Parameter(torch.zeros(1))
    opt = fo.Optimizer([p], factory)
    p.grad = torch.ones(1)
    opt.step()
    opt.param_groups[0]["momentum"] = 0.9
    opt.step()
    assert opt.state["transformation"]["0.0"][0].item() == -2.0
    opt.load_state_dict(opt.state_dict())
    assert opt.state["transformation"]["0.0"][0].item() == -2.0


def test_missing_gradients_and_functions_of_some_of_the_tree():
    tx = fo.masked(summing(), {"a": True, "b": True, "c": False})
    params = {name: torch.ones(1) for name in "abc"}
    grads = {**params, "b": None}
    for with_params in (params, None):
        updates, state = tx.update(grads, tx.init(params), with_params)
        assert updates == grads
        assert state["b"] == 0


class Slice(NamedTuple):
    part: torch.Tensor


def test_states_may_be_parts_of_parameters():
    p = torch.nn.Parameter(torch.ones(2))
    opt = fo.Optimizer([p], fo.leafwise(lambda p: Slice(p.detach()[1:]), lambda g, state, p, s: (-g, state)))
    p.grad = torch.ones(2)
    opt.step()
    assert opt.state[p]["part"].item() == 1


def test_extras_are_checked_before_the_closure_runs():
    p = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="extra 'bogus'"):
        fo.Optimizer([p], fo.sgd, lr=0.1).step(lambda: pytest.fail("the closure ran"), bogus=1)


def test_steps_are_loaded_as_they_are_counted():
    p = torch.nn.Parameter(torch.ones(1))
    opt = fo.Optimizer([p], fo.adam)
    p.grad = torch.ones(1)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0]["step"] = 1001  # a number, as torch once saved it
    torch.set_default_dtype(torch.bfloat16)
    try:
        opt.load_state_dict(saved)
    finally:
        torch.set_default_dtype(torch.float32)
    assert opt.state[p]["step"] == 1001
    saved["state"][0]["step"] = torch.ones(3)
    with pytest.raises(ValueError, match="saved step of parameter '0' has shape"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
@pytest.mark.parametrize("transformation", [fo.adam, fo.adam()], ids=["factory", "transformation"])
def test_parameters_are_added_to_copies(copied, transformation):
    opt = copied(fo.Optimizer([torch.ones(1)], transformation))
    opt.add_param_group({"params": [torch.ones(2)]})
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    opt.step()
    assert len(opt.state) == 2
