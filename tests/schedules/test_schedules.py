"""Schedules: arithmetic, composition, printing, pickling."""

import math
import operator
import pickle

import pytest
import schedule_cases
import torch
from hypothesis import given
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim import schedules

pytestmark = pytest.mark.smoke


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def early(step):
    return (step + 1) ** -0.5


# Arithmetic. ----------------------------------------------------------------------------------------------------------


OPERATIONS = [operator.add, operator.sub, operator.mul, operator.truediv]
OPERANDS = {
    "int": 2,
    "float": 0.3,
    "float64": double(0.3),
    "float32": torch.tensor(0.3),
    "int64": torch.tensor(2),
    "schedule": schedules.exponential(0.5, 0.9),
    "combination": 2 * schedules.exponential(0.5, 0.9) + 1,
    "function": early,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("other", OPERANDS.values(), ids=OPERANDS)
def test_arithmetic(operation, other):
    schedule, steps = schedules.linear(0.3, 0.7, 5), torch.arange(8, dtype=torch.float64)
    values, others = schedule(steps), other(steps) if callable(other) else other
    for combined, expected in (
        (operation(schedule, other), operation(values, others)),
        (operation(other, schedule), operation(others, values)),
    ):
        assert isinstance(combined, schedules.Schedule)
        assert combined(steps).dtype == torch.float64
        assert combined(steps).tolist() == expected.tolist()
        one_by_one = torch.stack([combined(step) for step in range(8)])
        torch.testing.assert_close(one_by_one, expected, rtol=1e-14, atol=1e-15)


def test_negation():
    steps = torch.arange(8)
    assert (-schedules.linear(0.3, 0.7, 5))(steps).tolist() == (-schedules.linear(0.3, 0.7, 5)(steps)).tolist()


def test_arithmetic_is_differentiable_and_may_be_batched():
    def function(x):
        return (x * schedules.constant(2.0) - schedules.linear(x, 0.0, 4) / x)(2)

    assert torch.func.grad(function)(double(3.0)) == 2.0
    assert torch.vmap(function)(double([1.0, 2.0])).tolist() == [1.5, 3.5]


def test_a_schedule_of_a_plain_function():
    assert schedules.Schedule(early)(3) == 0.5
    assert schedules.Schedule(lambda step: 2)(torch.zeros(3)).tolist() == [2.0, 2.0, 2.0]


# Printing and pickling. -----------------------------------------------------------------------------------------------


REPRS = {
    "constant(0.1)": schedules.constant(0.1),
    "linear(1.0, 0.0, total_iters=10)": schedules.linear(1.0, 0.0, total_iters=10),
    "cosine(1.0, 10, 0.1)": schedules.cosine(1.0, 10, 0.1),
    "exponential(1.0, gamma=0.9)": schedules.exponential(1.0, gamma=0.9),
    "step(1.0, 10)": schedules.step(1.0, 10),
    "polynomial(tensor(0.5000), 10, power=2.0)": schedules.polynomial(torch.tensor(0.5), 10, power=2.0),
    "warmup_cosine(1.0, 2, 10)": schedules.warmup_cosine(1.0, 2, 10),
    "join([constant(1.0), step(0.5, 2)], [3])": schedules.join([schedules.constant(1.0), schedules.step(0.5, 2)], [3]),
    "join([constant(1.0), early], [3])": schedules.join([schedules.constant(1.0), early], [3]),
    "constant_factor(1.0)": schedules.constant_factor(1.0),
    "linear_factor(1.0, end_factor=0.5)": schedules.linear_factor(1.0, end_factor=0.5),
    "multi_step(1.0, [3, 5], gamma=tensor(0.5000))": schedules.multi_step(1.0, [3, 5], gamma=torch.tensor(0.5)),
    "piecewise_constant([1.0, 0.5], [3])": schedules.piecewise_constant([1.0, 0.5], [3]),
    "piecewise_interpolate([1.0, tensor(0.5000)], [3], 'cosine')": schedules.piecewise_interpolate(
        [1.0, torch.tensor(0.5)], [3], "cosine"
    ),
    "cosine_annealing(1.0, T_max=4)": schedules.cosine_annealing(1.0, T_max=4),
    "cosine_warm_restarts(1.0, 2, T_mult=2)": schedules.cosine_warm_restarts(1.0, 2, T_mult=2),
    "cyclic(0.1, 1.0, 3, scale_fn=early)": schedules.cyclic(0.1, 1.0, 3, scale_fn=early),
    "cyclic_momentum(step_size_up=3, mode='triangular2')": schedules.cyclic_momentum(
        step_size_up=3, mode="triangular2"
    ),
    "one_cycle(1.0, 10, three_phase=True)": schedules.one_cycle(1.0, 10, three_phase=True),
    "one_cycle_momentum(10)": schedules.one_cycle_momentum(10),
    "swa(1.0, 0.5)": schedules.swa(1.0, 0.5),
    "inverse_sqrt(1.0, 4)": schedules.inverse_sqrt(1.0, 4),
    "warmup_stable_decay(1.0, 2, 3, 4, decay='sqrt')": schedules.warmup_stable_decay(1.0, 2, 3, 4, decay="sqrt"),
    "product(constant(1.0), step(0.5, 2))": schedules.product(schedules.constant(1.0), schedules.step(0.5, 2)),
    "Schedule(early)": schedules.Schedule(early),
    "add(mul(2, constant(0.1)), neg(constant(0.2)))": 2 * schedules.constant(0.1) + -schedules.constant(0.2),
    "truediv(sub(early, constant(0.1)), tensor(4.))": ((early - schedules.constant(0.1)) / torch.tensor(4.0)),
}


@pytest.mark.parametrize(("text", "schedule"), REPRS.items(), ids=REPRS)
def test_prints_as_the_call_that_made_it_and_pickles(text, schedule):
    assert repr(schedule) == text
    steps = torch.arange(14)
    unpickled = pickle.loads(pickle.dumps(schedule))
    assert repr(unpickled) == text
    assert unpickled(steps).tolist() == schedule(steps).tolist()
    names = {**vars(operator), **vars(schedules), "tensor": torch.tensor, "early": early}
    assert eval(text, names)(steps).tolist() == schedule(steps).tolist()


def test_factories_keep_their_names_and_docstrings():
    for name in schedules.__all__:
        make = getattr(schedules, name)
        assert make.__name__ == name
        assert "Args:" in make.__doc__
        assert ">>>" in make.__doc__


def test_every_schedule_has_a_row():
    tested = {row.split()[0] for row in schedule_cases.CASES}
    assert tested == set(schedules.__all__) - {"Schedule"}


# Any arguments. -------------------------------------------------------------------------------------------------------


VALUES = st.floats(-1e3, 1e3, allow_subnormal=False)
LENGTHS = st.one_of(st.integers(0, 50), st.floats(0, 50, exclude_min=True, allow_subnormal=False))
MONOTONE = st.one_of(
    st.builds(schedules.linear, VALUES, VALUES, total_iters=LENGTHS),
    st.builds(schedules.cosine, VALUES, total_iters=LENGTHS, end_value=VALUES),
    st.builds(schedules.polynomial, VALUES, total_iters=LENGTHS, power=st.floats(0, 4), end_value=VALUES),
)


@given(MONOTONE)
def test_goes_one_way_from_end_to_end(schedule):
    values = schedule(torch.linspace(0, 51, 200, dtype=torch.float64))
    rounding = 4e-16 * values.abs().max()
    first, last = values[0], values[-1]
    assert (values >= torch.minimum(first, last) - rounding).all()
    assert (values <= torch.maximum(first, last) + rounding).all()
    assert (values.diff() * torch.sign(last - first) >= -rounding).all()


@given(
    st.lists(st.tuples(MONOTONE, st.integers(0, 20)), min_size=1, max_size=4),
    st.lists(st.integers(0, 100), min_size=1, max_size=10),
)
def test_join_is_piecewise(pieces, steps):
    *begun, (final, _) = pieces
    milestones = [sum(length for _, length in begun[: i + 1]) for i in range(len(begun))]
    schedule = schedules.join([piece for piece, _ in pieces], milestones)

    def expected(step):
        for piece, length in begun:
            if step < length:
                return piece(step)
            step -= length
        return final(step)

    assert [schedule(step) for step in steps] == [expected(step) for step in steps]


@given(VALUES, VALUES, LENGTHS, st.floats(0, 60), st.floats(0.125, 4))
def test_tensors_as_arguments_change_nothing(start, end, length, step, power):
    for make, numbers in (
        (schedules.linear, {"start_value": start, "end_value": end, "total_iters": length}),
        (schedules.cosine, {"value": start, "total_iters": length, "end_value": end}),
        (schedules.polynomial, {"value": start, "total_iters": length, "power": power, "end_value": end}),
    ):
        tensors = {name: double(number) for name, number in numbers.items()}
        assert make(**numbers)(step) == make(**tensors)(step)


def test_reachable_from_the_package():
    assert fo.schedules is schedules


def test_torchs_schedulers_can_save_what_they_drive():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules.linear(1.0, 0.0, 10))
    assert pickle.loads(pickle.dumps(scheduler.state_dict()))["lr_lambdas"] == [{}]


def test_a_schedule_is_not_asked_for_steps_at_which_it_does_not_hold():
    """Ten steps of it are finite, a thousand are not; the derivative at a thousand must be."""

    def value(gamma):
        return schedules.join([schedules.exponential(1.0, gamma), schedules.constant(2.0)], [10])(1000)

    assert value(10.0) == 2
    assert torch.func.grad(value)(torch.tensor(10.0, dtype=torch.float64)) == 0


@given(st.lists(MONOTONE, min_size=1, max_size=4), st.integers(0, 60))
def test_product_is_the_product(factors, step):
    expected = math.prod([factor(step) for factor in factors])
    assert schedules.product(*factors)(step) == expected


@given(st.lists(st.tuples(VALUES, st.integers(0, 20)), min_size=1, max_size=5), st.integers(0, 100))
def test_piecewise_schedules_agree(pieces, step):
    """Held or interpolated, the values at milestones are the same; in between an interpolation is between them."""
    values, lengths = zip(*pieces, strict=True)
    milestones = [sum(lengths[: i + 1]) for i in range(len(values) - 1)]
    held = schedules.piecewise_constant(values, milestones)
    for interpolation in ("linear", "cosine"):
        interpolated = schedules.piecewise_interpolate(values, milestones, interpolation)
        for milestone in [0, *milestones]:
            assert held(milestone) == interpolated(milestone)
        before, after = held(step), held(min([m for m in milestones if m > step], default=step))
        rounding = 1e-12
        assert min(before, after) - rounding <= interpolated(step) <= max(before, after) + rounding
