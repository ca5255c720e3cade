"""Properties that hold of every transformation, tested of every row of the catalogue: those of the test kit.

Those of derivatives and compilation are tested at length in test_derivatives.py, test_finite_derivatives.py and
test_meta_transforms.py; test_testing_transformations.py has what the properties notice.
"""

import pytest
import torch
from catalogue import assert_close, hyperparameters, make_params, make_problem, rows, step, train

import functorch_optim as fo
from functorch_optim._execution import choose
from functorch_optim.testing._copies import through_pickle
from functorch_optim.testing._properties import COMPLETE, INCOMPLETE
from functorch_optim.testing._properties.numbers import used_hyperparameters

# The cheaper half is checked of every row.
EXPENSIVE = {"double_precision", "kept", "schedules", "steps", "tensors", "ways"}
EXPENSIVE |= {"vmap_hyperparameters", "vmap_parameters"}
MARKS = dict.fromkeys(EXPENSIVE, pytest.mark.sampled(size=64))
MARKS["stateful"] = pytest.mark.smoke
properties = pytest.mark.parametrize(
    "check",
    [pytest.param(check, id=check.__name__, marks=MARKS.get(check.__name__, ())) for check in (*COMPLETE, *INCOMPLETE)],
)


def holds(row, check, device):
    if check.__name__ in row.without:
        with pytest.raises(AssertionError):  # it really has not
            check(row.subject, make_problem(device, missing=check in INCOMPLETE))
        return
    # Inside of accumulate and skip a schedule is a function of the steps, which are fewer; tests/wrappers has it. Those
    # that are injected have a state of their own; test_injection.py has them.
    apart = row.name.startswith(("accumulate", "inject_hyperparams", "skip"))
    if check.__name__ != "schedules" or (row.scheduled and not apart):
        check(row.subject, make_problem(device, missing=check in INCOMPLETE))


@rows
@properties
def test_property(row, check):
    holds(row, check, "cpu")


@pytest.mark.sampled
@rows
def test_no_hyperparameter_is_forgotten(row):
    if row.name != "muon":  # whose eps is for matrices smaller than it; muon_large_eps has them
        used_hyperparameters(row.subject, make_problem(missing=False))


@rows
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_properties_on_a_gpu(row):
    for check in (*COMPLETE, *INCOMPLETE):
        holds(row, check, "cuda")


@hyperparameters
def test_schedules_are_refused_where_there_can_be_none(row, name):
    if not row.scheduled:
        with pytest.raises(TypeError, match=f"Invalid {name}: .* is a function"):
            row(**{name: fo.schedules.constant(0.5)})


@rows
def test_complex_parameters_are_refused_where_there_can_be_none(row):
    if not row.complex:
        with pytest.raises(TypeError, match="does not support complex parameters"):
            row().init(make_params(torch.complex128))


@rows
def test_programs_are_run_where_they_may_be(row, device, monkeypatch):
    calls, machine = [], choose.machine
    monkeypatch.setattr(choose, "machine", lambda *args: calls.append(1) or machine(*args))
    tx, params = row(), make_params(device=device)
    step(tx, fo.tree.map(torch.randn_like, params), tx.init(params), params)
    assert bool(calls) == row.elementwise


@rows
def test_transformations_print_as_a_call(row):
    assert repr(row()).endswith(")")


@pytest.mark.parametrize(
    "tx",
    [
        fo.chain(
            fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10), mask={"layer": True, "rest": False})
        ),
        fo.partition({"a": fo.sgd(0.1), "b": fo.adadelta()}, {"layer": "a", "rest": "b"}),
        fo.named_chain(("clip", fo.clip(0.1)), ("lr", fo.scale(torch.tensor(2.0)))),
    ],
)
def test_transformation_pickles(tx):
    again = through_pickle(tx)
    assert repr(again) == repr(tx)
    params, x = make_params(), torch.ones(3, dtype=torch.float64)
    assert_close(train(again, params, x), train(tx, params, x), rtol=0, atol=0)
