"""Loaded states are checked before anything changes: errors name the parameter and its mistake."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
from checkpoint_cases import assert_same_dicts, make
from torch_like_cases import NAMES, OPTIONS, each, parameters, run_sparse
from wrapper_cases import summing

import functorch_optim as fo

NAN, INF = float("nan"), float("inf")


def make_params():
    return [torch.randn(4, 3), torch.randn(2, 3), torch.randn(3, 2)]


def trained(name, module=fo.optim, **options):
    optimizer = make(module, name, make_params(), **options)
    train(optimizer)
    return optimizer


def trained_wrapper(transformation, **hyperparameters):
    params = [("a", make_params()[0].requires_grad_()), ("b", make_params()[1].requires_grad_())]
    optimizer = fo.Optimizer(params, transformation, **hyperparameters)
    train(optimizer)
    return optimizer


def train(optimizer):
    if isinstance(optimizer, torch.optim.SparseAdam):
        run_sparse(optimizer, optimizer, steps=3)
        return
    for _ in range(3):
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()


HOOKS = [f"_optimizer_{when}_hooks" for when in ("load_state_dict_pre", "load_state_dict_post", "state_dict_post")]


@contextmanager
def nothing_changes(optimizer):
    def observe():
        tensors = {p: dict(state) for p, state in optimizer.state.items()}
        groups = [{**group, "params": [*group["params"]]} for group in optimizer.param_groups]
        plans = [optimizer._plan(i) for i in range(optimizer._number_of_trees)]
        return tensors, groups, plans, [dict(getattr(optimizer, name)) for name in HOOKS]

    def identities(observed):
        return fo.tree.map(id, [*observed[0].values()]), observed[2], observed[3]

    optimizer.register_load_state_dict_post_hook(lambda optimizer: pytest.fail("called though it was not loaded"))
    before, numbers, params = observe(), copy.deepcopy(optimizer.state_dict()), copy.deepcopy(parameters(optimizer))
    groups = [id(group) for group in optimizer.param_groups]
    yield
    now = observe()
    assert identities(now) == identities(before)
    assert groups == [id(group) for group in optimizer.param_groups]
    assert [list(group) for group in now[1]] == [list(group) for group in before[1]]
    assert_same_dicts([optimizer.state_dict(), *parameters(optimizer)], [numbers, *params], tolerance=0)
    train(optimizer)


def assert_refused(optimizer, saved, message, error=ValueError):
    with nothing_changes(optimizer), pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)


def with_state(saved, change, i=2):
    """Change what is saved for a parameter: by updates, or to something else."""
    state = {**saved["state"][i], **change} if isinstance(change, dict) else change
    return {**saved, "state": {**saved["state"], i: state}}


def without(saved, key, i=2):
    state = {name: value for name, value in saved["state"][i].items() if name != key}
    return {**saved, "state": {**saved["state"], i: state}}


def with_groups(saved, change):
    return {**saved, "param_groups": [*saved["param_groups"][:-1], *change(saved["param_groups"][-1])]}


# Group 1 has one parameter, number 2 of the state dict; with another number of groups, or of parameters, it is torch's
# own error.
STATES = {
    "foreign": ({"sum": torch.ones(2, 3)}, "state of parameter '0' has 'sum', which this transformation does not keep"),
    "foreign number": ({"mu_product": 1.0}, "parameter '0' has 'mu_product', which this transformation does not keep"),
    "shape": ({"exp_avg": torch.ones(3)}, r"saved exp_avg of parameter '0' has shape \(3,\), but it is \(2, 3\) here"),
    "0-dim": ({"exp_avg": torch.ones(())}, r"saved exp_avg of parameter '0' has shape \(\), but it is \(2, 3\)"),
    "complex": ({"exp_avg": torch.ones(2, 3) * 1j}, "exp_avg of parameter '0' is torch.complex64, but it is torch.flo"),
    "number": ({"exp_avg": 0.5}, "The saved exp_avg of parameter '0' is 0.5, where a tensor belongs"),
    "text": ({"exp_avg": "0.5"}, "The saved exp_avg of parameter '0' is '0.5', where a tensor belongs"),
    "list": ({"exp_avg_sq": [0.5]}, r"The saved exp_avg_sq of parameter '0' is \[0.5\], where a tensor belongs"),
    "dict": ({"exp_avg_sq": {}}, "The saved exp_avg_sq of parameter '0' is {}, where a tensor belongs"),
    "none": ({"exp_avg_sq": None}, "state of parameter '0' lacks 'exp_avg_sq'; it has only step, exp_avg"),
    "no step": ({"step": None}, "state of parameter '0' lacks 'step'; it has only exp_avg, exp_avg_sq"),
    "nan": ({"step": NAN}, "The saved step of parameter '0' is nan, but it is a count of updates"),
    "nan tensor": ({"step": torch.tensor(NAN)}, "The saved step of parameter '0' is nan, but it is a count of updates"),
    "infinite": ({"step": torch.tensor(INF)}, "The saved step of parameter '0' is inf, but it is a count"),
    "negative": ({"step": torch.tensor(-1)}, "The saved step of parameter '0' is -1, but it is a count"),
    "half": ({"step": 2.5}, "The saved step of parameter '0' is 2.5, but it is a count"),
    "steps": ({"step": torch.ones(3)}, r"The saved step of parameter '0' has shape \(3,\), but it is one number"),
    "no steps": ({"step": torch.ones(0)}, r"The saved step of parameter '0' has shape \(0,\), but it is one number"),
    "bool": ({"step": True}, "The saved step of parameter '0' is True, where a number belongs"),
    "complex step": ({"step": torch.tensor(1j)}, r"saved step of parameter '0' is tensor\(.*j\), where a number"),
    "text step": ({"step": "3"}, "The saved step of parameter '0' is '3', where a number belongs"),
    "state is list": ([1.0], "The saved state of parameter '0' is of type list, where a dict belongs"),
    "state is tensor": (torch.ones(2), "The saved state of parameter '0' is of type Tensor, where a dict belongs"),
    "state is none": (None, "The saved state of parameter '0' is of type NoneType, where a dict belongs"),
}


@pytest.mark.parametrize(("change", "message"), STATES.values(), ids=STATES)
def test_states(change, message):
    optimizer = trained("Adam")
    assert_refused(optimizer, with_state(optimizer.state_dict(), change), message)


@each
def test_states_that_lack_something(name):
    options = OPTIONS.get(name, [{}])[-1]
    optimizer = trained(name, **options)
    saved = optimizer.state_dict()
    for key in saved["state"][2]:
        if len(saved["state"][2]) > 1:  # else nothing is left, as before the first step
            assert_refused(optimizer, without(saved, key), f"state of parameter '0' lacks '{key}'; it has only")


WHOLE = {
    "groups": (lambda saved: with_groups(saved, lambda group: []), ValueError, "different number of parameter groups"),
    "more groups": (lambda saved: with_groups(saved, lambda g: [g, g]), ValueError, "number of parameter groups"),
    "sizes": (
        lambda saved: with_groups(saved, lambda group: [{**group, "params": []}]),
        ValueError,
        "doesn't match the size of optimizer's group",
    ),
    "stray": (
        lambda saved: {**saved, "state": {**saved["state"], 7: saved["state"][2]}},
        ValueError,
        "The saved state has one for parameter 7, but no saved param group has that",
    ),
    "a list for state": (lambda saved: {**saved, "state": []}, ValueError, "saved state is of type list, where a dict"),
    "no groups": (lambda saved: {"state": saved["state"]}, KeyError, "param_groups"),
    "no state": (lambda saved: {"param_groups": saved["param_groups"]}, KeyError, "state"),
    "no params": (lambda saved: with_groups(saved, lambda group: [{"lr": 0.1}]), KeyError, "params"),
    "hyperparameters": (
        lambda saved: with_groups(saved, lambda group: [{**group, "betas": 0.9}]),
        ValueError,
        "Invalid betas: 0.9",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), WHOLE.values(), ids=WHOLE)
def test_state_dicts(change, error, message):
    optimizer = trained("Adam")
    assert_refused(optimizer, change(optimizer.state_dict()), message, error)


def test_parameters_are_named():
    optimizer = make(fo.optim, "Adam", make_params(), named=True)
    train(optimizer)
    assert_refused(optimizer, with_state(optimizer.state_dict(), {"step": NAN}), "saved step of parameter 'p1' is nan")


ALIKE = [{"Adam", "AdamW", "RAdam", "SparseAdam"}, {"SGD", "Muon"}]  # torch's own checkpoints are the same there


@pytest.mark.sampled(size=48)
@pytest.mark.parametrize(("saver", "loader"), list(itertools.permutations(NAMES, 2)))
def test_states_of_another_class(saver, loader):
    options = {"momentum": 0.9} if saver == "SGD" else {}
    saved = trained(saver, torch.optim, **options).state_dict()
    optimizer = trained(loader)
    saved["param_groups"] = optimizer.state_dict()["param_groups"]
    if {saver, loader} <= ALIKE[0] or {saver, loader} <= ALIKE[1]:
        return
    if loader == "SGD":
        optimizer.param_groups[0]["momentum"] = 0.9
    assert_refused(optimizer, saved, "of parameter '0' (has '.*', which this transformation does not keep|lacks '.*';)")


# fo.Optimizer. --------------------------------------------------------------------------------------------------------


CLIPPED = fo.chain(fo.clip_by_global_norm(1.0), fo.trace(0.9), summing(), fo.trace(0.5), fo.nadam(0.1))
CHAINS = {
    "second momentum": (
        lambda saved: without(saved, "momentum_buffer.1", 0),
        "parameter 'a' lacks 'momentum_buffer.1'; it has only",
    ),
    "number": (lambda saved: without(saved, "mu_product", 0), "parameter 'a' lacks 'mu_product'; it has only"),
    "text": (lambda saved: with_state(saved, {"mu_product": "1"}, 0), "saved mu_product of parameter 'a' is '1', wh"),
    "third momentum": (
        lambda saved: with_state(saved, {"momentum_buffer.2": torch.ones(4, 3)}, 0),
        "parameter 'a' has 'momentum_buffer.2', which this transformation does not keep; it keeps exp_avg, exp_avg_sq, "
        "momentum_buffer, momentum_buffer.1, mu_product, step",
    ),
    "tree of others": (
        lambda saved: with_state(saved, {"0.5": {}}, "transformation"),
        "state has one for the function of the whole tree 0.5, which is not here",
    ),
    "tree is list": (
        lambda saved: with_state(saved, [], "transformation"),
        "whole tree, 'transformation', is of type list, where a dict belongs",
    ),
    "cut tree": (
        lambda saved: with_state(saved, {"0.0": {"a": torch.zeros(4, 3)}}, "transformation"),
        "state has 'b', which the saved one lacks",
    ),
    "shapes in the tree": (
        lambda saved: with_state(saved, {"0.0": {"a": torch.zeros(3), "b": torch.zeros(2, 3)}}, "transformation"),
        r"saved 'a' has shape \(3,\), but the state's has \(4, 3\)",
    ),
    "tensors of the tree": (
        lambda saved: with_state(saved, {"0.0": {"a": None, "b": 1}}, "transformation"),
        "saved 'a' is None, where a tensor belongs",
    ),
    "function of the tree": (
        lambda saved: with_state(saved, {"0.0": 3}, "transformation"),
        "whole tree, '0.0', is of type int, where a dict belongs",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHAINS.values(), ids=CHAINS)
def test_chains(change, message):
    optimizer = trained_wrapper(CLIPPED)
    assert_refused(optimizer, change(optimizer.state_dict()), message)


def test_states_of_the_tree_that_are_missing():
    optimizer = trained_wrapper(CLIPPED)
    saved = optimizer.state_dict()
    del saved["state"]["transformation"]
    assert_refused(optimizer, saved, "the state has 'a', which the saved one lacks")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fo.chain(fo.trace(0.9), fo.nadam(0.1)), "lacks 'momentum_buffer.1'"),
        (fo.chain(CLIPPED, fo.trace(0.1)), "has 'momentum_buffer.2'"),
        (fo.adam(), "lacks 'momentum_buffer'"),
        (fo.partition({"x": CLIPPED, "y": fo.sgd(0.1)}, {"a": "x", "b": "y"}), "lacks 'exp_avg'"),
        (fo.masked(CLIPPED, {"a": True, "b": False}), "which the saved one lacks"),
    ],
    ids=["shorter", "longer", "adam", "partition", "masked"],
)
def test_other_chains(other, message):
    assert_refused(trained_wrapper(CLIPPED), trained_wrapper(other).state_dict(), message)
