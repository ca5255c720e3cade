"""Our steps raise the errors of torch.optim's steps, except those that come from limits of its kernels."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch_like_cases import (
    MODULES,
    NAMES,
    WITH_DIFFERENTIABLE,
    WITH_FUSED,
    assert_same,
    each,
    give_gradients,
    make_pair,
    make_params,
    muon,
    outcome,
    outcomes,
    parameters,
    train,
)

import functorch_optim as fo

# Steps. ---------------------------------------------------------------------------------------------------------------


def sparse(p):
    return torch.sparse_coo_tensor([[0]], torch.ones(1, *p.shape[1:], dtype=p.dtype), p.shape, check_invariants=False)


def dense(p):
    return torch.ones_like(p.detach())


@each
@pytest.mark.parametrize("kind", [sparse, dense])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"foreach": True}], ids=str)
def test_kinds_of_gradients(name, kind, options):
    if not options.keys() <= inspect.signature(getattr(torch.optim, name)).parameters.keys():
        pytest.skip("torch.optim does not take this")
    params = [
        nn.Parameter(torch.randn(3, 2, dtype=torch.float64)),
        nn.Parameter(torch.randn(2, 2, dtype=torch.float64)),
    ]
    results, moved = [], []
    for module in MODULES:
        optimizer = getattr(module, name)(copy.deepcopy(params), **options)
        for p in parameters(optimizer):
            p.grad = kind(p)
        results.append(outcome(optimizer.step))
        moved.append([p.detach() for p in parameters(optimizer)])
    ours, theirs = results
    if (name, kind, *options) == ("SGD", sparse, "weight_decay"):  # torch's words here are about a kernel of its own
        assert (ours[0], theirs[0]) == (RuntimeError, RuntimeError)
        assert "weight_decay option is not compatible with sparse gradients" in ours[1]
        return
    assert ours == theirs
    if theirs is None:
        torch.testing.assert_close(*moved, rtol=1e-12, atol=1e-12)


def test_which_gradients_are_refused():
    """A control of the test above."""

    def refused(name, kind):
        optimizer = getattr(fo.optim, name)([nn.Parameter(torch.ones(2, 2))])
        for p in parameters(optimizer):
            p.grad = kind(p)
        return outcome(optimizer.step) is not None

    assert [name for name in NAMES if not refused(name, sparse)] == ["SGD", "Adagrad", "SparseAdam"]
    assert [name for name in NAMES if refused(name, dense)] == ["SparseAdam"]


@each
def test_complex_parameters(name):
    params = [nn.Parameter(torch.ones(2, 2, dtype=torch.complex128))]

    def run(module):
        optimizer = getattr(module, name)(copy.deepcopy(params))
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p.detach())
        optimizer.step()

    ours, theirs = outcomes(run)
    assert ours == theirs
    assert (theirs is not None) == (name in ("Adafactor", "Muon", "SparseAdam"))


MUON = [{"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)}]


@muon
@pytest.mark.parametrize("options", MUON, ids=str)
def test_options_that_muon_checks_in_its_step(options):
    def run(module):
        optimizer = module.Muon(make_params("Muon"), **options)
        give_gradients(optimizer)
        optimizer.step()

    ours, theirs = outcomes(run)
    assert theirs[0] is ValueError
    assert ours == theirs


@muon
def test_muon_is_for_matrices_in_groups_that_are_added_too():
    def run(module):
        optimizer = module.Muon(make_params("Muon"))
        optimizer.add_param_group({"params": [torch.ones(3)]})
        optimizer.param_groups[1]["params"][0].grad = torch.ones(3)
        optimizer.step()

    ours, theirs = outcomes(run)
    assert theirs[0] is ValueError
    assert ours == theirs


@each
def test_an_error_changes_nothing(name):
    """torch.optim leaves those parameters changed that come before the one that it refuses."""
    params = make_params(name)
    optimizer = getattr(fo.optim, name)(copy.deepcopy(params))
    train([optimizer])
    before, state = copy.deepcopy((parameters(optimizer), optimizer.state_dict()["state"]))
    give_gradients(optimizer)
    last = parameters(optimizer)[-1]
    wrong = dense(last) if name == "SparseAdam" else sparse(last)
    last.grad = wrong if name not in ("SGD", "Adagrad") else None
    if last.grad is None:
        optimizer.param_groups[0]["weight_decay"] = 0.1
        last.grad = wrong
    with pytest.raises(RuntimeError):
        optimizer.step()
    torch.testing.assert_close(parameters(optimizer), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


@each
def test_arguments_of_the_step(name):
    optimizer = getattr(fo.optim, name)(make_params(name))
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        optimizer.step(value=1.0)
    ours, theirs = outcomes(lambda module: getattr(module, name)(make_params(name)).step(3))
    assert theirs[0] is TypeError
    assert ours == theirs


@pytest.mark.parametrize("name", WITH_DIFFERENTIABLE)
def test_differentiable_steps_do_not_write_to_leaves(name):
    """The same kind of error; ours names the parameter, and says what to do."""

    def run(module):
        optimizer = getattr(module, name)(make_params(name), differentiable=True)
        give_gradients(optimizer)
        optimizer.step()

    ours, theirs = outcomes(run)
    assert ours[0] is theirs[0] is RuntimeError
    assert "give a copy that autograd knows" in ours[1].lower()


# What torch.optim refuses and we do not: limits of its kernels. -------------------------------------------------------


@each
def test_flags_that_change_no_number(name):
    known = inspect.signature(getattr(torch.optim, name)).parameters
    flags = [flag for flag in ("foreach", "fused", "capturable") if flag in known]
    reference = make_pair(name)[1]
    for flag in flags:
        optimizer = getattr(fo.optim, name)(
            copy.deepcopy(parameters(reference)), **options_of(reference), **{flag: True}
        )
        twin = copy.deepcopy(reference)
        train((optimizer, twin))
        assert_same(optimizer, twin)


def options_of(optimizer):
    known = inspect.signature(type(optimizer)).parameters.keys() - {"foreach", "fused", "capturable"}
    return {key: value for key, value in optimizer.defaults.items() if key in known}


@pytest.mark.parametrize("name", WITH_FUSED)
def test_fused_with_complex_parameters(name):
    params = [nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))]
    ours, theirs = getattr(fo.optim, name)(copy.deepcopy(params), fused=True), getattr(torch.optim, name)(params)
    train((ours, theirs))
    assert_same(ours, theirs)


def test_differentiable_with_foreach(double):
    pair = []
    for module, foreach in ((fo.optim, True), (torch.optim, None)):
        torch.manual_seed(0)
        p = torch.randn(3, dtype=torch.float64)
        pair.append(module.Adam([p], differentiable=True, foreach=foreach))
    for p, q in zip(*map(parameters, pair), strict=True):
        p.grad = q.grad = torch.randn_like(p)
    for optimizer in pair:
        optimizer.step()
    assert_same(*pair)


# What is not refused. -------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    "edit",
    [
        {"lr": -1},
        {"lr": 1},
        {"lr": 0},
        {"lr": -0.1},
        {"lr": np.float64(0.1)},
        {"weight_decay": -1},
        {"weight_decay": 1},
    ],
    ids=str,
)
def test_edits_are_not_checked(name, edit):
    pair = make_pair(name)
    train(pair)
    for optimizer in pair:
        optimizer.param_groups[0].update({key: value for key, value in edit.items() if key in optimizer.defaults})
    train(pair)
    assert_same(*pair)


@each
@pytest.mark.parametrize("value", [False, 0, np.float64(0.1), np.float64(0), 1])
def test_kinds_of_numbers(name, value):
    options = {
        key: value
        for key in ("momentum", "weight_decay")
        if key in inspect.signature(getattr(torch.optim, name)).parameters
    }
    pair = make_pair(name, **options, **({"lr": value} if value and name != "SGD" else {}))
    train(pair)
    assert_same(*pair)


@each
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensors_of_one_element_as_learning_rate(name, shape):
    pair = make_pair(name, lr=torch.full(shape, 0.1, dtype=torch.float64))
    train(pair)
    assert_same(*pair)
