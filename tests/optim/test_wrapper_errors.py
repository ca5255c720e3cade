"""Mistakes with fo.Optimizer raise errors that explain them, and change nothing."""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import functorch_optim as fo

pytestmark = pytest.mark.smoke

NAN = float("nan")


def make_params(device, *shapes):
    params = [nn.Parameter(torch.ones(shape, dtype=torch.float64, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def make_trained(device, transformation, *overrides, **hyperparameters):
    """Make an optimizer with a group for each override, two parameters in each, and train it a little."""
    groups = [{"params": make_params(device, (2, 3), ()), **override} for override in overrides or ({}, {})]
    optimizer = fo.Optimizer(groups, transformation, **hyperparameters)
    optimizer.step()
    optimizer.step()
    return optimizer


@contextmanager
def nothing_changes(optimizer):
    def observe():
        params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
        return groups, (params, copy.deepcopy(optimizer.state_dict()["state"]))

    groups, tensors = observe()
    yield
    groups_now, tensors_now = observe()
    assert groups_now == groups
    torch.testing.assert_close(tensors_now, tensors, rtol=0, atol=0)


# Constructors and groups. ---------------------------------------------------------------------------------------------


def construct(optimizer, group):
    fo.Optimizer([{"params": optimizer.param_groups[0]["params"]}, group], fo.adam)


def add(optimizer, group):
    optimizer.add_param_group(group)


@pytest.mark.parametrize("way", [construct, add])
@pytest.mark.parametrize(
    ("make_group", "error", "message"),
    [
        (lambda p, used: {"params": [p, p]}, ValueError, "more than once in a group"),
        (lambda p, used: {"params": [p, used]}, ValueError, "more than one parameter group"),
        (lambda p, used: {"params": [p * 2]}, ValueError, "non-leaf"),
        (lambda p, used: {"params": [p, torch.tensor([1])]}, TypeError, "torch.int64, which cannot be optimized"),
        (lambda p, used: {"params": [p, 1.0]}, TypeError, "can only optimize Tensors"),
        (lambda p, used: {"params": {p}}, TypeError, "ordered collections"),
        (lambda p, used: {"params": [("p", p)]}, ValueError, "with/without names"),
        (lambda p, used: {"params": [("p", p), used]}, ValueError, "Some param names are missing"),
        (lambda p, used: {"lr": 0.1}, KeyError, "params"),
        (lambda p, used: [p], TypeError, "param_group must be a dict"),
        (lambda p, used: {"params": [p], "lr": -0.1}, ValueError, "Invalid learning rate: -0.1"),
        (lambda p, used: {"params": [p], "lr": NAN}, ValueError, "Invalid learning rate: nan"),
        (lambda p, used: {"params": [p], "lr": "0.1"}, TypeError, "Invalid learning rate: '0.1' is a str"),
        (lambda p, used: {"params": [p], "betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
        (lambda p, used: {"params": [p], "betas": 0.9}, ValueError, "Invalid betas: 0.9"),
        (lambda p, used: {"params": [p], "eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
    ],
)
def test_bad_groups(make_group, error, message, way, device):
    optimizer = make_trained(device, fo.adam)
    (p,) = make_params(device, (2,))
    group = make_group(p, optimizer.param_groups[0]["params"][0])
    with nothing_changes(optimizer), pytest.raises(error, match=message):
        way(optimizer, group)
    optimizer.step()


@pytest.mark.parametrize("value", [-0.5, NAN])
@pytest.mark.parametrize(
    ("factory", "name", "called"),
    [
        (fo.sgd, "lr", "learning rate"),
        (fo.sgd, "momentum", "momentum value"),
        (fo.sgd, "weight_decay", "weight_decay value"),
        (fo.adam, "lr", "learning rate"),
        (fo.adam, "eps", "epsilon value"),
        (fo.adam, "weight_decay", "weight_decay value"),
        (fo.adamw, "lr", "learning rate"),
        (fo.adamw, "eps", "epsilon value"),
        (fo.adamw, "weight_decay", "weight_decay value"),
        (fo.adadelta, "lr", "learning rate"),
        (fo.adadelta, "rho", "rho value"),
        (fo.adadelta, "eps", "epsilon value"),
        (fo.adadelta, "weight_decay", "weight_decay value"),
    ],
)
def test_bad_hyperparameters(factory, name, called, value, device):
    message = f"Invalid {called}: {value}"
    with pytest.raises(ValueError, match=message):
        fo.Optimizer(make_params(device, (2,)), factory, **{name: value})
    optimizer = make_trained(device, factory)
    right = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value  # takes effect at the next step, so that is where it is refused
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()
    optimizer.param_groups[1][name] = right
    optimizer.step()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: fo.Optimizer([], fo.adam), ValueError, "empty parameter list"),
        (lambda p: fo.Optimizer([], fo.adam()), ValueError, "empty parameter list"),
        (lambda p: fo.Optimizer(p, fo.adam), TypeError, "iterable of Tensors"),
        (
            lambda p: fo.Optimizer([p], fo.adam, lrr=0.1),
            TypeError,
            "adam has no hyperparameter 'lrr'; it has lr,",
        ),
        (
            lambda p: fo.Optimizer([p], functools.partial(fo.adam, eps=1e-6), lrr=0.1),
            TypeError,
            "has no hyperparameter 'lrr'",
        ),
        (lambda p: fo.Optimizer([p], lambda lr: fo.sgd(lr)), TypeError, "param group lacks the hyperparameter 'lr'"),
        (
            lambda p: fo.Optimizer([{"params": [p], "lr": 0.1}, {"params": []}], lambda lr: fo.sgd(lr)),
            TypeError,
            "param group lacks the hyperparameter 'lr'",
        ),
        (lambda p: fo.Optimizer([p], fo.adam(), lr=0.1), TypeError, "hyperparameters already; lr would not be used"),
        (
            lambda p: fo.Optimizer([{"params": [p], "lr": 0.1}], fo.adam()),
            ValueError,
            "group gives lr, but the transformation",
        ),
        (lambda p: fo.Optimizer([p], None), TypeError, "a transformation or a factory of one, got None"),
        (lambda p: fo.Optimizer([p], 0.1), TypeError, "a transformation or a factory of one, got 0.1"),
        (lambda p: fo.Optimizer([p], fo.GradientTransformation), TypeError, "lacks the hyperparameter 'init'"),
        (lambda p: fo.Optimizer([p], torch.optim.Adam), TypeError, "not a GradientTransformation"),
        (lambda p: fo.Optimizer([p], fo.chain), TypeError, r"\*transformations.*, which has no name"),
        (lambda p: fo.Optimizer([p], lambda lr: lr, lr=0.1), TypeError, "returned a float, not a Gradient"),
    ],
)
def test_bad_constructors(make, error, message, device):
    (p,) = make_params(device, (2,))
    with pytest.raises(error, match=message):
        make(p)


def test_required_hyperparameters_may_come_from_the_groups(device):
    (p,) = make_params(device, ())
    fo.Optimizer([{"params": [p], "lr": 0.5}], lambda lr: fo.sgd(lr)).step()
    assert p.item() == 0.5


def test_differentiable_takes_parameters_that_are_no_leaves(device):
    (p,) = make_params(device, ())
    fo.Optimizer([p * 2], fo.sgd, differentiable=True)


# Steps. ---------------------------------------------------------------------------------------------------------------


def count(broken=False):
    """Make a transformation of the whole tree that only counts, or is broken."""

    def update(updates, state, params=None):
        if broken:
            raise ArithmeticError("broken")
        return updates, {"count": state["count"] + 1}

    return fo.GradientTransformation(lambda params: {"count": torch.zeros(())}, update)


def brittle(lr=0.1, broken=False):
    return fo.chain(fo.sgd(lr, 0.9), count(broken))


def test_a_transformation_that_raises_in_the_second_group(device):
    optimizer = make_trained(device, brittle)
    optimizer.param_groups[1]["broken"] = True
    with nothing_changes(optimizer), pytest.raises(ArithmeticError, match="broken"):
        optimizer.step()


def test_sparse_gradients(device):
    optimizer = make_trained(device, fo.adam)
    p = optimizer.param_groups[1]["params"][0]
    p.grad = p.grad.to_sparse()
    with (
        nothing_changes(optimizer),
        pytest.raises(RuntimeError, match="scale_by_adam does not support sparse gradients"),
    ):
        optimizer.step()


def test_infinite_norms(device):
    optimizer = make_trained(device, fo.chain(fo.clip_by_global_norm(1.0, nonfinite="raise"), fo.adam(0.1)))
    optimizer.param_groups[1]["params"][1].grad.fill_(float("inf"))
    with nothing_changes(optimizer), pytest.raises(RuntimeError, match="The total norm of order 2.0 is inf"):
        optimizer.step()


def test_extras_that_nothing_declares(device):
    optimizer = make_trained(device, fo.adam)
    with (
        nothing_changes(optimizer),
        pytest.raises(TypeError, match="extra 'valu', which nothing"),
    ):
        optimizer.step(valu=1.0)


def test_extras_that_are_missing(device):
    def scalars(step, *, value):
        return value

    scale_by_value = fo.leafwise(None, lambda g, state, p, s: (s * g, state), scalars)
    optimizer = fo.Optimizer(make_params(device, (2,)), fo.chain(fo.adam(0.1), scale_by_value))
    optimizer.step(value=1.0)
    with nothing_changes(optimizer), pytest.raises(TypeError, match="needs the extra 'value'"):
        optimizer.step()


def test_closures_that_raise(device):
    optimizer = make_trained(device, fo.adam)

    def closure():
        raise ArithmeticError("in the closure")

    with nothing_changes(optimizer), pytest.raises(ArithmeticError, match="in the closure"):
        optimizer.step(closure)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda g: g.sum(), "shape"),
        (lambda g: torch.ones(7, dtype=g.dtype, device=g.device), "shape"),
        (lambda g: g.float(), "dtype"),
    ],
    ids=["smaller", "larger", "dtype"],
)
def test_functions_of_the_tree_that_return_something_else(function, message, device):
    def update(updates, params):
        return [*updates[:2], function(updates[2]), updates[3]]

    optimizer = fo.Optimizer(make_params(device, (2, 3), (), (2, 3), ()), fo.chain(fo.adam(0.1), fo.stateless(update)))
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


def test_functions_of_the_tree_that_return_another_tree(device):
    optimizer = fo.Optimizer(make_params(device, (2, 3), ()), fo.stateless(lambda updates, params: updates[:1]))
    with nothing_changes(optimizer), pytest.raises(ValueError, match="do not match"):
        optimizer.step()


def test_parameters_cannot_join_a_tree_that_has_a_state(device):
    optimizer = make_trained(device, brittle())
    with nothing_changes(optimizer), pytest.raises(ValueError, match="cannot be added once"):
        optimizer.add_param_group({"params": make_params(device, (2,))})
    optimizer.step()


# Checkpoints. ---------------------------------------------------------------------------------------------------------


def with_changed_group(saved, **changed):
    return {**saved, "param_groups": [saved["param_groups"][0], {**saved["param_groups"][1], **changed}]}


def with_changed_state(saved, **changed):
    return {**saved, "state": {**saved["state"], 2: {**saved["state"][2], **changed}}}


def saved_by(*arguments, **hyperparameters):
    return lambda device, saved: make_trained(device, *arguments, **hyperparameters).state_dict()


@pytest.mark.parametrize(
    ("transformation", "make_saved", "message"),
    [
        (fo.sgd, saved_by(fo.adam), "'exp_avg', which this transformation does not keep"),
        (fo.adam, saved_by(fo.sgd, momentum=0.9), "'momentum_buffer', which this transformation does not keep"),
        (fo.adam, saved_by(fo.adam, {}), "number of parameter groups"),
        (fo.adam, lambda device, saved: with_changed_group(saved, params=[2]), "match the size of"),
        (fo.adam, lambda device, saved: with_changed_group(saved, lr=-1.0), "Invalid learning rate: -1.0"),
        (fo.adam, lambda device, saved: with_changed_state(saved, exp_avg=torch.ones(3)), r"shape \(3,\)"),
        (fo.sgd(0.1), saved_by(count()), "saved"),
        (count(), saved_by(fo.chain(count(), count())), "saved state has one for the function of the whole tree 0.1"),
        (brittle(), saved_by(brittle), "saved"),
    ],
    ids=["adam in sgd", "sgd in adam", "groups", "sizes", "lr", "shapes", "tree in sgd", "two for one", "other form"],
)
def test_loading_what_another_optimizer_saved(transformation, make_saved, message, device):
    optimizer = make_trained(device, transformation)
    saved = make_saved(device, optimizer.state_dict())
    with nothing_changes(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    optimizer.step()


def test_parameters_that_cannot_be_written_to_are_found_before_others_are():
    first, shared = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(1).expand(3))
    first.grad, shared.grad = torch.ones(3), torch.ones(3)
    opt = fo.Optimizer([{"params": [first]}, {"params": [shared]}], fo.sgd, lr=0.1)
    with pytest.raises(RuntimeError, match="Elements of the parameter '0' share memory, as after expand"):
        opt.step()
    assert torch.equal(first, torch.ones(3))
    assert not opt.state

    moving = torch.ones(3, requires_grad=True) * 1
    moving.grad = torch.ones(3)
    piece = (torch.ones(6, requires_grad=True) * 1).split(3)[0]
    piece.grad = torch.ones(3)
    opt = fo.Optimizer([moving, piece], fo.sgd, lr=0.1, differentiable=True)
    with pytest.raises(RuntimeError, match="parameter '1' is a view that autograd forbids to write to.*give p.clone"):
        opt.step()
    assert torch.equal(moving, torch.ones(3))

    opt = fo.Optimizer([moving, first], fo.sgd, lr=0.1, differentiable=True)
    with pytest.raises(RuntimeError, match="parameter '1' is a leaf that requires grad: with differentiable=True"):
        opt.step()
    assert torch.equal(moving, torch.ones(3))
