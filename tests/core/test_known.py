"""Numbers of a step that is known are computed with floats, and are those of 0-dim tensors to the last bits."""

import math

import pytest
import torch
from catalogue import CATALOGUE
from hypothesis import example, given
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim import _numerics as numerics

UNARY = {
    "sqrt": (numerics.sqrt, torch.sqrt),
    "safe_sqrt": (fo.safe_sqrt, torch.sqrt),
    "cos": (numerics.cos, torch.cos),
    "floor": (numerics.floor, torch.floor),
    "isfinite": (numerics.isfinite, torch.isfinite),
    "double": (numerics.double, lambda x: x),
}
numbers = st.one_of(
    st.floats(-1e3, 1e3), st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e300, 5e-324, 1.0])
)
NOT_OF_FLOATS = (ArithmeticError, ValueError)
"""What python raises where torch knows an answer; the numbers are then computed with tensors."""


def assert_same(known, tensor):
    known = torch.as_tensor(known, dtype=None if isinstance(known, bool | torch.Tensor) else torch.float64)
    assert known.dtype == tensor.dtype
    torch.testing.assert_close(known, tensor, rtol=1e-14, atol=0, equal_nan=True)


def tensor(number):
    return torch.tensor(number, dtype=torch.float64)


# Functions of numbers: of floats, of tensors, and of both. ------------------------------------------------------------


@given(name=st.sampled_from(sorted(UNARY)), number=numbers)
def test_functions_of_one_number(name, number):
    function, expected = UNARY[name]
    assert_same(function(tensor(number)), expected(tensor(number)))
    try:
        found = function(number)
    except NOT_OF_FLOATS:
        return
    assert_same(found, expected(tensor(number)))


KINDS = {
    "floats": (float, float),
    "float_first": (float, tensor),
    "tensor_first": (tensor, float),
    "tensors": (tensor, tensor),
}
kinds = st.sampled_from(sorted(KINDS))


@given(one=numbers, other=numbers, kind=kinds)
@example(one=math.nan, other=1.0, kind="floats")
@example(one=1.0, other=math.nan, kind="floats")
def test_minimum(one, other, kind):
    arguments = [make(number) for make, number in zip(KINDS[kind], (one, other), strict=True)]
    assert_same(numerics.minimum(*arguments), torch.minimum(tensor(one), tensor(other)))


@given(number=numbers, least=st.floats(-10, 10), make=st.sampled_from([float, tensor]))
@example(number=math.nan, least=1.0, make=float)
def test_at_least(number, least, make):
    assert_same(numerics.at_least(make(number), least), torch.clamp(tensor(number), min=least))


@given(condition=st.booleans(), one=numbers, other=numbers, kind=kinds, known=st.booleans())
def test_where(condition, one, other, kind, known):
    arguments = [make(number) for make, number in zip(KINDS[kind], (one, other), strict=True)]
    found = numerics.where(condition if known else torch.tensor(condition), *arguments)
    assert_same(found, torch.where(torch.tensor(condition), tensor(one), tensor(other)))


@given(beta=st.floats(0, 1, exclude_max=True), t=st.integers(1, 10**6))
def test_debias(beta, t):
    assert_same(numerics.debias(beta, float(t)), numerics.debias(beta, tensor(float(t))))


# Schedules. -----------------------------------------------------------------------------------------------------------


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
    "shorter_than_a_step": fo.schedules.polynomial(1.0, 1, 0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name):
    for step in range(1, 11):
        expected = fo.at(SCHEDULES[name], tensor(float(step)))
        assert_same(fo.at(SCHEDULES[name], float(step)), torch.as_tensor(expected, dtype=torch.float64))


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


@pytest.mark.parametrize("of_tensors", [False, True])
def test_rules_of_the_user_are_given_what_they_take(of_tensors):
    """Floats; and tensors where floats do not do, which is tried once."""
    seen = []

    def scalars(step):
        seen.append(type(step))
        return 1 / (step.square().sqrt() if of_tensors else step)

    def update(g, state, p, s):
        return -s * g, state

    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = fo.Optimizer([p], fo.chain(fo.scale(0.5), fo.leafwise(None, update, scalars, elementwise=True)))
    for _ in range(4):
        opt.step()
    assert seen.count(torch.Tensor) == 4 * of_tensors
    assert seen[-1] is (torch.Tensor if of_tensors else float)
    torch.testing.assert_close(p.detach(), torch.full((2,), 1 - 0.5 * (1 + 1 / 2 + 1 / 3 + 1 / 4)))


@pytest.mark.parametrize("scalars", [lambda step: 1 / (step - 1), lambda step: 10.0 ** (step * 200)])
def test_what_python_refuses_is_computed_by_torch(scalars):
    """A division by zero, and a number that is too large, are infinite."""
    tx = fo.leafwise(None, lambda g, state, p, s: (s * g, state), scalars, elementwise=True)
    params, state = {"w": torch.ones(2)}, tx.init({"w": torch.ones(2)})
    for step in (1.0, 2.0, 3.0):
        updates, state = tx.update(params, state, params)
        torch.testing.assert_close(updates["w"], params["w"] * scalars(tensor(step)).float())


@pytest.mark.parametrize(
    "row", [row for row in CATALOGUE if any(link.rule.scalars for link in row()._links)], ids=lambda row: row.name
)
def test_scalars(row):
    for link in row()._links:
        rule = link.rule
        if rule.scalars is None:
            continue
        seen = [torch.full((2,), 0.3, dtype=torch.float64), torch.ones(3)]
        own = [rule.init_leaf(p) for p in seen] if "states" in rule.extras.names else []
        states = type(own[0])(*[list(column) for column in zip(*own, strict=True)]) if own else ()
        known_extras = {"updates": seen, "params": seen, "states": states, "value": tensor(0.5)}
        extras = {name: given for name, given in known_extras.items() if name in rule.extras.names}
        carried = [float(number) for number in rule.carried()]
        for step in (1.0, 2.0, 10.0, 1e4):
            of_floats = [rule.carried_type(*carried)] if rule.carry else []
            of_tensors = [rule.carried_type(*map(tensor, carried))] if rule.carry else []
            expected = fo.tree.flatten(rule.scalars(tensor(step), *of_tensors, **extras))[0]
            known = fo.tree.flatten(rule.scalars(step, *of_floats, **extras))[0]
            for one, other in zip(known, expected, strict=True):
                if isinstance(other, torch.Tensor):
                    assert_same(one, other)
                else:
                    assert one == other or callable(other)
