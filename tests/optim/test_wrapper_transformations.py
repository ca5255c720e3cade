"""What reaches the transformation inside of fo.Optimizer: extras, edits, names; and what it keeps."""

import copy
from typing import NamedTuple

import pytest
import torch
from wrapper_cases import make_vectors, summing

import functorch_optim as fo
from functorch_optim.testing._copies import through_pickle


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


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle], ids=["copy", "pickle"])
@pytest.mark.parametrize("transformation", [fo.adam, fo.adam()], ids=["factory", "transformation"])
def test_parameters_are_added_to_copies(copied, transformation):
    opt = copied(fo.Optimizer([torch.ones(1)], transformation))
    opt.add_param_group({"params": [torch.ones(2)]})
    for group in opt.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    opt.step()
    assert len(opt.state) == 2


class HistoryState(NamedTuple):
    last: torch.Tensor
    before: torch.Tensor
    view: torch.Tensor


@pytest.mark.parametrize("elementwise", [True, False])
def test_states_that_move_from_one_place_to_another(elementwise):
    """New states are written into the tensors of the old ones, which must not change what is still to be written."""

    def update(g, state, p, s):
        copied = state.last if elementwise else state.last.flip(0).flip(0)[:]
        return g + state.before, HistoryState(g, state.last, copied)

    tx = fo.leafwise(HistoryState, update, elementwise=elementwise)
    p = torch.zeros(2)
    opt, state, moved = fo.Optimizer([p.clone()], tx), tx.init([p]), [p]
    for grad in (1.0, 10.0, 100.0, 1000.0):
        grads = [torch.full((2,), grad)]
        opt.param_groups[0]["params"][0].grad = grads[0].clone()
        opt.step()
        updates, state = tx.update(grads, state, moved)
        moved = fo.apply_updates(moved, updates)
        assert torch.equal(opt.param_groups[0]["params"][0], moved[0])
        [kept] = opt.state.values()
        for field, [expected] in zip(HistoryState._fields, state, strict=True):
            assert torch.equal(kept[field], expected)


def test_the_norm_is_that_of_all_groups_of_a_transformation_and_of_each_group_of_a_factory():
    def moved(transformation, **hyperparameters):
        params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        opt = fo.Optimizer([{"params": [p]} for p in params], transformation, **hyperparameters)
        for p, g in zip(params, (-3.0, -4.0), strict=True):
            p.grad = torch.tensor([g])
        opt.step()
        return [p.item() for p in params]

    assert moved(fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(1.0))) == pytest.approx([0.6, 0.8])
    assert moved(lambda lr: fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(lr)), lr=1.0) == pytest.approx([1.0, 1.0])
