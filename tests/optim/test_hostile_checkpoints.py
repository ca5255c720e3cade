"""Checkpoints that are truncated, foreign, malicious or wrong: what is refused, and that nothing changes."""

import copy
import io
import math
import os
import pickle
import re
from functools import partial

import numpy
import pytest
import torch
from fault_cases import OPTIMIZERS, each_optimizer, nothing_changes, trained
from torch import nn
from torch_like_cases import parameters

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

NAN, INF = math.nan, math.inf


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("malicious",)


def saved_bytes(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def load(data):
    return torch.load(io.BytesIO(data), weights_only=True)


@each_optimizer
def test_what_is_saved_is_plain(make):
    optimizer = trained(make, 2)
    saved = through_a_file(optimizer.state_dict(), weights_only=True)
    other = make()
    other.load_state_dict(saved)
    for p, q in zip(*map(parameters, (optimizer, other)), strict=True):
        torch.testing.assert_close(other.state[q], optimizer.state[p], rtol=0, atol=0, check_dtype=False)


def clipped_sgd(lr, inner):
    return fo.chain(inner, fo.sgd(lr))


@pytest.mark.parametrize(
    ("factory", "given"),
    [(fo.dion, {"generator": torch.Generator()}), (clipped_sgd, {"inner": fo.clip(1.0)}), (fo.adopt, {"clip": abs})],
    ids=["generator", "transformation", "function"],
)
def test_what_is_no_data_stays_with_the_program(factory, given):
    optimizer = fo.Optimizer([nn.Parameter(torch.ones(2, 2))], factory, lr=0.1, **given)
    saved = through_a_file(optimizer.state_dict(), weights_only=True)
    optimizer.load_state_dict(saved)
    (name,) = given
    assert name not in saved["param_groups"][0]
    assert optimizer.param_groups[0][name] is given[name]


@pytest.mark.parametrize("make", [fo.optim.Adam, partial(fo.Optimizer, transformation=fo.adam)])
def test_numbers_of_numpy_are_saved_as_numbers(make):
    optimizer = make([nn.Parameter(torch.ones(2))], lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: numpy.cos(epoch))
    optimizer.param_groups[0]["betas"] = (numpy.float32(0.5), 0.75)
    saved = through_a_file(optimizer.state_dict(), weights_only=True)["param_groups"][0]
    assert saved["lr"] == 0.5
    assert saved["betas"] == (0.5, 0.75)


def test_code_in_checkpoints_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = trained(OPTIMIZERS["carried"], 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = Malicious()
    with nothing_changes(optimizer):
        with pytest.raises(Exception, match="Weights only load failed"):
            optimizer.load_state_dict(load(saved_bytes(saved)))
        with pytest.raises(ValueError, match="The saved exp_avg of parameter '0' is <.*Malicious.*, where a tensor"):
            optimizer.load_state_dict(saved)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_cut_off():
    optimizer = trained(OPTIMIZERS["carried"], 2)
    data = saved_bytes(optimizer.state_dict())
    with nothing_changes(optimizer):
        for end in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
            with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)):
                optimizer.load_state_dict(load(data[:end]))


@pytest.mark.parametrize("foreign", [None, 3, [], "text", torch.ones(2)], ids=str)
@pytest.mark.parametrize("name", ["native", "whole tensors"])
def test_checkpoints_that_are_no_dicts(name, foreign):
    optimizer = trained(OPTIMIZERS[name], 2)
    kind = type(foreign).__name__
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=f"saved state dict is of type {kind}, where a dict"),
    ):
        optimizer.load_state_dict(foreign)


@pytest.mark.parametrize("name", ["native", "whole tensors"])
def test_checkpoints_of_models(name):
    optimizer = trained(OPTIMIZERS[name], 2)
    message = "this one has 'weight', 'bias'. Give a result of opt.state_dict()"
    with nothing_changes(optimizer), pytest.raises(KeyError, match=re.escape(message)):
        optimizer.load_state_dict(nn.Linear(2, 2).state_dict())


NUMBERS = {
    "nan": (torch.tensor(NAN), "The saved '1.step' is nan, but it is a count of updates"),
    "infinite": (torch.tensor(INF), "The saved '1.step' is inf, but it is a count of updates"),
    "negative": (torch.tensor(-3), "The saved '1.step' is -3, but it is a count of updates"),
    "half": (torch.tensor(2.5), "The saved '1.step' is 2.5, but it is a count of updates"),
    "complex": (torch.tensor(1j), "The saved '1.step' is torch.complex64, but the state's is torch.int64"),
    "shape": (torch.ones(2), r"The saved '1.step' has shape \(2,\), but the state's has \(\)"),
    "none": (None, "The saved '1.step' is None, where a tensor belongs"),
    "text": ("3", "The saved '1.step' is '3', where a tensor belongs"),
}


@pytest.fixture
def functional():
    """A functional state, and the parameters."""
    tx, params = fo.chain(fo.trace(0.9), fo.scale_by_nadam()), {"w": torch.ones(2), "b": torch.ones(())}
    return tx.update(params, tx.init(params), params)[1], params


@pytest.mark.parametrize(("value", "message"), NUMBERS.values(), ids=NUMBERS)
def test_steps_of_functional_states(functional, value, message):
    state, _ = functional
    with pytest.raises(ValueError, match=message):
        fo.load_state_dict(state, {**fo.state_dict(state), "1.step": value})


@pytest.mark.parametrize("step", [numpy.int64(3), numpy.float32(3.0), 3])
def test_steps_may_be_numbers_of_numpy(step):
    optimizer = fo.optim.Adam([torch.ones(1)])
    saved = optimizer.state_dict()
    saved["state"][0] = {"step": step, "exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    optimizer.load_state_dict(saved)
    [own] = optimizer.state.values()
    assert torch.equal(own["step"], torch.tensor(3.0))


@pytest.mark.parametrize("step", [INF, -1.0, 0.5])
def test_steps_of_functional_states_by_parameter(functional, step):
    state, params = functional
    saved = fo.state_dict(state, params)
    for own in saved["state"].values():
        own["step"] = torch.tensor(step)
    with pytest.raises(ValueError, match=f"The saved '0.step' is {step}, but it is a count of updates"):
        fo.load_state_dict(state, {**saved, "transformation": {}}, params)


def test_integers_that_are_no_counts():
    state = {"number": torch.tensor(-3)}
    assert fo.load_state_dict(state, {"number": torch.tensor(-4.0)})["number"] == -4
    with pytest.raises(ValueError, match="The saved 'number' is 0.5, but the state's is torch.int64"):
        fo.load_state_dict(state, {"number": torch.tensor(0.5)})


def test_complex_numbers_in_real_states(functional):
    state, _ = functional
    with pytest.raises(
        ValueError, match="The saved '1.exp_avg.w' is torch.complex64, but the state's is torch.float32"
    ):
        fo.load_state_dict(state, {**fo.state_dict(state), "1.exp_avg.w": torch.ones(2) * 1j})


NO_DICTS = {
    "all": (lambda saved: None, "The saved state is of type NoneType, where a dict belongs"),
    "states": (lambda saved: {**saved, "state": []}, "The saved state is of type list, where a dict belongs"),
    "one": (lambda saved: {**saved, "state": {"w": 3}}, "state of parameter 'w' is of type int, where a dict belongs"),
    "rest": (
        lambda saved: {**saved, "transformation": 3},
        "The saved state of functions of the whole tree, 'transformation', is of type int, where a dict belongs",
    ),
}


@pytest.mark.parametrize(("change", "message"), NO_DICTS.values(), ids=NO_DICTS)
def test_functional_states_that_are_no_dicts(functional, change, message):
    state, params = functional
    with pytest.raises(ValueError, match=message):
        fo.load_state_dict(state, change(fo.state_dict(state, params)), params)


def test_functional_states_that_are_no_dicts_by_path(functional):
    with pytest.raises(ValueError, match="The saved state is of type Tensor, where a dict belongs"):
        fo.load_state_dict(functional[0], torch.ones(2))
