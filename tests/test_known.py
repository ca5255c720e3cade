"""Known numbers answer as 0-dim tensors do, to the last bits, whatever is computed of them."""

import math
import operator

import pytest
import torch
from catalogue import CATALOGUE
from hypothesis import example, given
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim._core.known import _FUNCTIONS, Known, as_tensor, where

BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge", "eq", "ne"]
UNARY = ["neg", "abs", "sqrt", "exp", "log", "cos", "floor", "isfinite", "ones_like", "zeros_like"]
numbers = st.one_of(
    st.floats(-1e3, 1e3), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, 5e-324, 1.0])
)


def assert_same(known, tensor):
    known = as_tensor(known)
    assert known.dtype == tensor.dtype
    torch.testing.assert_close(known, tensor, rtol=1e-14, atol=0, equal_nan=True)


def tensor(number):
    return torch.tensor(number, dtype=torch.float64)


@given(name=st.sampled_from(BINARY), one=numbers, other=numbers, kind=st.sampled_from(["known", "number", "reflected"]))
@example(name="pow", one=-8.0, other=1 / 3, kind="known")
@example(name="truediv", one=1.0, other=0.0, kind="reflected")
@example(name="pow", one=1e300, other=2.0, kind="number")
def test_operators(name, one, other, kind):
    function = getattr(operator, name)
    known = {"known": (Known(one), Known(other)), "number": (Known(one), other), "reflected": (one, Known(other))}[kind]
    tensors = {"known": (tensor(one), tensor(other)), "number": (tensor(one), other), "reflected": (one, tensor(other))}
    assert_same(function(*known), function(*tensors[kind]))


@given(name=st.sampled_from(UNARY), number=numbers)
def test_functions(name, number):
    function = getattr(torch, name)
    assert_same(function(Known(number)), function(tensor(number)))
    if hasattr(torch.Tensor, name):
        assert_same(getattr(Known(number), name)(), getattr(tensor(number), name)())


@given(condition=st.booleans(), one=numbers, other=numbers, kind=st.sampled_from([0, 1, 2, 3]))
@pytest.mark.parametrize("function", [torch.where, where])
def test_where(function, condition, one, other, kind):
    choices = [
        (Known(one), Known(other)),
        (Known(one), other),
        (one, Known(other)),
        (0.1, 0.2),  # float32, as torch makes it
    ][kind]
    assert_same(function(Known(condition), *choices), torch.where(torch.tensor(condition), *map(as_tensor, choices)))


@given(one=st.booleans(), other=st.booleans())
def test_logic(one, other):
    for function in (operator.and_, operator.or_, operator.add, operator.mul, operator.eq):
        assert_same(function(Known(one), Known(other)), function(torch.tensor(one), torch.tensor(other)))
    assert_same(~Known(one), ~torch.tensor(one))
    assert_same(Known(0.5) + Known(one), tensor(0.5) + torch.tensor(one))
    assert_same(Known(one) * 2, torch.tensor(one) * 2)


def test_what_python_cannot_compute_is_a_tensor():
    step = Known(3.0)
    assert_same(torch.sin(step), torch.sin(tensor(3.0)))
    assert_same(step.clamp(0, 2), tensor(2.0))
    assert_same(torch.stack([step, tensor(1.0)]), tensor([3.0, 1.0]))
    assert_same(torch.ones(2) * step, torch.ones(2) * tensor(3.0))
    assert_same(step * torch.ones(2), tensor(3.0) * torch.ones(2))
    assert_same(torch.where(torch.tensor([True, False]), step, 0), tensor([3.0, 0.0]))
    assert_same(step[None], tensor([3.0]))
    assert_same(step.to(torch.float32), torch.tensor(3.0))
    assert step.to(torch.float64) is step
    assert step.dtype == torch.float64
    assert step.shape == torch.Size([])
    assert step.device.type == "cpu"


def test_is_a_python_number_where_one_is_wanted():
    step = Known(3.0)
    assert float(step) == int(step) == step.item() == 3
    assert f"{step:.1f}" == "3.0"
    assert repr(step) == repr(tensor(3.0))
    assert math.cos(step) == math.cos(3.0)
    assert bool(Known(False)) is False
    assert len({step, step}) == 1
    with pytest.raises(AttributeError, match="no attribute 'typo'"):
        step.typo  # noqa: B018


def test_every_function_is_tested_here():
    tested = {getattr(operator, name) for name in (*BINARY, "neg", "abs", "and_", "or_", "invert")}
    tested |= {getattr(place, n) for n in UNARY for place in (torch, torch.Tensor) if hasattr(place, n)} | {torch.where}
    assert set(_FUNCTIONS) <= tested


# What it is for. ------------------------------------------------------------------------------------------------------


SCHEDULES = {
    "warmup_cosine": fo.schedules.warmup_cosine(1.0, 3, 7, 0.1, 0.2),
    "cosine_warm_restarts": fo.schedules.cosine_warm_restarts(1.0, 2, T_mult=2),
    "cyclic": fo.schedules.cyclic(0.1, 1.0, 2, mode="triangular2"),
    "cyclic_own": fo.schedules.cyclic(0.1, 1.0, 2, scale_fn=lambda cycle: torch.as_tensor(1.0) / cycle),
    "one_cycle": fo.schedules.one_cycle(1.0, 8),
    "polynomial": fo.schedules.polynomial(1.0, 5, 2.0),
    "table": fo.schedules.table(torch.tensor([0.3, 0.2])),
    "join": fo.schedules.join([lambda step: torch.exp(-step), fo.schedules.constant(0.1)], [4]),
    "sum": 0.1 * fo.schedules.exponential(1.0, 0.9) + (lambda step: torch.as_tensor(step) / 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    for step in range(10):
        assert_same(SCHEDULES[name](Known(float(step))), SCHEDULES[name](step))


def test_functions_of_the_user_are_given_tensors():
    kinds = []

    def schedule(step):
        kinds.append(type(step))
        return 0.1

    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    lrs = schedule, fo.schedules.Schedule(schedule), 2 * fo.schedules.Schedule(schedule)
    for lr in (*lrs, fo.schedules.join([schedule, schedule], [2]), fo.schedules.product(schedule)):
        opt = fo.Optimizer([p], fo.adam(lr))
        for _ in range(4):
            opt.step()
    assert set(kinds) == {torch.Tensor}


def test_rules_of_the_user_are_given_tensors():
    seen = []

    def scalars(step):
        seen.append(type(step))
        return 1 / torch.as_tensor(step, dtype=torch.float32)

    def update(g, state, p, s):
        return -s * g, state

    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = fo.Optimizer([p], fo.chain(fo.scale(0.5), fo.leafwise(None, update, scalars, elementwise=True)))
    for _ in range(4):
        opt.step()
    assert seen == [torch.Tensor] * 4
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - 0.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4)))


@pytest.mark.parametrize(
    "row", [row for row in CATALOGUE if any(link.rule.scalars for link in row()._links)], ids=lambda row: row.name
)
def test_scalars(row):
    for link in row()._links:
        rule = link.rule
        if rule.scalars is None:
            continue
        extras = {"updates": [torch.full((2,), 0.3, dtype=torch.float64), torch.ones(3)]} if rule.sees_tree else {}
        carried = [rule.carried_type(*map(tensor, rule.carried()))] if rule.counters[1:] else []
        for step in (1.0, 2.0, 10.0, 1e4):
            known = fo.tree.flatten(rule.scalars(Known(step), *carried, **extras))[0]
            expected = fo.tree.flatten(rule.scalars(tensor(step), *carried, **extras))[0]
            for one, other in zip(known, expected, strict=True):
                if isinstance(other, torch.Tensor):
                    assert_same(one, other)
                else:
                    assert one == other or callable(other)
