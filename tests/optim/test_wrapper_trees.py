"""fo.Optimizer around a transformation: all parameters are one tree, with the numbers of the functional loop."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler
from wrapper_cases import (
    Model,
    assert_close,
    assert_copy_trains_on_by_itself,
    assert_same,
    backward,
    each_copy,
    make_vectors,
    train,
)

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
