"""Schedules: values, derivatives, and everything torch can do to a function."""

import math
import operator
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import functorch_optim as fo
from functorch_optim import schedules


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def inverse_sqrt(step):
    return (step + 1) ** -0.5


def fall_then_rise(value, gamma, top, milestone, total_iters):
    """Let the second piece of a join be differentiable in where it begins."""
    return schedules.join([schedules.exponential(value, gamma), schedules.linear(0.0, top, total_iters)], [milestone])


# What each schedule should be. ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A schedule, what it computes in plain python, and the steps at which it is worth looking."""

    make: Callable[..., Callable[[Any], Any]]
    arguments: dict[str, float]
    expected: Callable[..., float]
    exact: dict[float, float]  # values at the ends and boundaries, to the last bit
    inside: tuple[float, ...]  # steps away from every boundary, where the schedule is smooth in all its arguments


def linear(step, start_value, end_value, total_iters):
    return end_value if step >= total_iters else start_value + (end_value - start_value) * step / total_iters


def cosine(step, value, total_iters, end_value=0.0):
    if step >= total_iters:
        return end_value
    return end_value + (value - end_value) * (1 + math.cos(math.pi * step / total_iters)) / 2


def exponential(step, value, gamma):
    return value * gamma**step


def staircase(step, value, step_size, gamma=0.1):
    return value * gamma ** (step // step_size)


def polynomial(step, value, total_iters, power=1.0, end_value=0.0):
    return end_value if step >= total_iters else end_value + (value - end_value) * (1 - step / total_iters) ** power


def warmup_cosine(step, peak_value, warmup_iters, total_iters, start_value=0.0, end_value=0.0):
    if step < warmup_iters:
        return linear(step, start_value, peak_value, warmup_iters)
    return cosine(step - warmup_iters, peak_value, total_iters - warmup_iters, end_value)


def joined(step, value, gamma, top, milestone, total_iters):
    if step < milestone:
        return exponential(step, value, gamma)
    return linear(step - milestone, 0.0, top, total_iters)


CASES = {
    "constant": Case(
        schedules.constant,
        {"value": 0.3},
        lambda step, value: value,
        {0: 0.3, 1: 0.3, 10**9: 0.3},
        (0, 5),
    ),
    "linear": Case(
        schedules.linear,
        {"start_value": 0.3, "end_value": 0.7, "total_iters": 7.0},
        linear,
        {0: 0.3, 7: 0.7, 8: 0.7, 10**9: 0.7},
        (0.5, 2, 6.5),
    ),
    "cosine": Case(
        schedules.cosine,
        {"value": 0.3, "total_iters": 7.0, "end_value": 0.1},
        cosine,
        {0: 0.3, 7: 0.1, 8: 0.1, 10**9: 0.1},
        (0.5, 2, 6.5),
    ),
    "exponential": Case(
        schedules.exponential,
        {"value": 0.3, "gamma": 0.9},
        exponential,
        {0: 0.3, 1: 0.3 * 0.9},
        (0.5, 2, 9),
    ),
    "step": Case(
        schedules.step,
        {"value": 0.3, "step_size": 3.0, "gamma": 0.5},
        staircase,
        {0: 0.3, 2: 0.3, 3: 0.15, 5: 0.15, 6: 0.075, 8: 0.075, 9: 0.0375},
        (0.5, 2, 4, 10),
    ),
    "polynomial": Case(
        schedules.polynomial,
        {"value": 0.3, "total_iters": 7.0, "power": 1.7, "end_value": 0.1},
        polynomial,
        {0: 0.3, 7: 0.1, 8: 0.1, 10**9: 0.1},
        (0.5, 2, 6.5),
    ),
    "polynomial root": Case(
        schedules.polynomial,
        {"value": 0.3, "total_iters": 7.0, "power": 0.5, "end_value": 0.1},
        polynomial,
        {0: 0.3, 7: 0.1, 8: 0.1},
        (0.5, 2, 6.5),
    ),
    "warmup_cosine": Case(
        schedules.warmup_cosine,
        {"peak_value": 0.9, "warmup_iters": 4.0, "total_iters": 11.0, "start_value": 0.1, "end_value": 0.2},
        warmup_cosine,
        {0: 0.1, 4: 0.9, 11: 0.2, 12: 0.2, 10**9: 0.2},
        (0.5, 2, 5, 10),
    ),
    "join": Case(
        fall_then_rise,
        {"value": 0.3, "gamma": 0.5, "top": 0.7, "milestone": 2.0, "total_iters": 3.0},
        joined,
        {0: 0.3, 1: 0.15, 2: 0.0, 5: 0.7, 6: 0.7},
        (0.5, 1, 3, 4.5),
    ),
}
BOUNDARIES = (0, 2, 3, 4, 5, 6, 7, 9, 11)  # of all of them

of_each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
of_each_argument = pytest.mark.parametrize(
    ("case", "name"),
    [pytest.param(case, name, id=f"{key}-{name}") for key, case in CASES.items() for name in case.arguments],
)


def tensor_arguments(case):
    return {name: double(value) for name, value in case.arguments.items()}


def as_function_of(case, name, step):
    """Return the value at a step as a function of one argument."""
    return lambda x: case.make(**{**tensor_arguments(case), name: x})(double(step))


# Values. --------------------------------------------------------------------------------------------------------------


@of_each
def test_ends_and_boundaries_are_exact(case):
    schedule = case.make(**case.arguments)
    assert {step: schedule(step).item() for step in case.exact} == case.exact
    assert schedule(double(list(case.exact))).tolist() == list(case.exact.values())


@of_each
def test_values_at_and_around_every_boundary(case):
    schedule = case.make(**case.arguments)
    around = [
        step
        for boundary in BOUNDARIES
        for step in (
            math.nextafter(boundary, 0),
            boundary,
            math.nextafter(boundary, math.inf),
            boundary + 0.5,
        )
    ]
    expected = [case.expected(step, **case.arguments) for step in around]
    torch.testing.assert_close(schedule(double(around)), double(expected), rtol=1e-14, atol=1e-15)


@of_each
def test_numbers_and_tensors_as_arguments_give_the_same(case):
    steps = torch.arange(14)
    values = case.make(**tensor_arguments(case))(steps)
    assert values.tolist() == case.make(**case.arguments)(steps).tolist()
    narrow = {name: torch.tensor(value, dtype=torch.float32) for name, value in case.arguments.items()}
    wide = {name: value.double() for name, value in narrow.items()}
    assert case.make(**narrow)(steps).tolist() == case.make(**wide)(steps).tolist()


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if "total_iters" in case.arguments],
    ids=[key for key, case in CASES.items() if "total_iters" in case.arguments],
)
def test_total_iters_need_not_be_whole_nor_fit_in_float32(case):
    arguments = case.arguments | {"total_iters": 8.1}
    steps = double([0.0, 1.0, 4.3, 8.0, 8.1, 9.0])
    expected = [case.expected(step, **arguments) for step in steps.tolist()]
    torch.testing.assert_close(case.make(**arguments)(steps), double(expected), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (schedules.linear(0.3, 0.7, 0), [0.7, 0.7]),
        (schedules.cosine(0.3, 0, 0.1), [0.1, 0.1]),
        (schedules.polynomial(0.3, 0, 2.0, 0.1), [0.1, 0.1]),
        (schedules.warmup_cosine(0.3, 0, 0, end_value=0.1), [0.1, 0.1]),
        (schedules.warmup_cosine(0.3, 0, 2, end_value=0.1), [0.3, 0.2]),
        (schedules.warmup_cosine(0.3, 1, 1, start_value=0.2, end_value=0.1), [0.2, 0.1]),
        (schedules.polynomial(0.3, 2, 0.0, 0.1), [0.3, 0.3, 0.1]),
        (schedules.exponential(0.3, 0.0), [0.3, 0.0]),
        (schedules.exponential(1.0, -0.5), [1.0, -0.5, 0.25]),
        (schedules.linear(0.3, 0.7, math.inf), [0.3, 0.3]),
        (schedules.join([schedules.constant(0.3)], []), [0.3, 0.3]),
        (schedules.join([schedules.constant(i) for i in (1, 2, 3)], [1, 1]), [1, 3]),  # the second never holds
        (schedules.join([schedules.constant(0.3), lambda step: 0.1], [1]), [0.3, 0.1]),
    ],
)
def test_borderline_arguments(schedule, values):
    torch.testing.assert_close(schedule(torch.arange(len(values))), double(values), rtol=1e-15, atol=0)


@of_each
@pytest.mark.parametrize(
    "step",
    [
        3,
        3.0,
        torch.tensor(3),
        torch.tensor(3.0),
        torch.arange(14),
        torch.arange(14.0).reshape(2, 7),
        torch.zeros(0),
    ],
    ids=["int", "float", "int64", "float32", "vector", "matrix", "empty"],
)
def test_any_step_gives_float64_of_its_shape(case, step):
    schedule = case.make(**case.arguments)
    values = schedule(step)
    assert values.dtype == torch.float64
    assert values.shape == torch.as_tensor(step).shape
    one_by_one = [schedule(one).item() for one in torch.as_tensor(step).flatten().tolist()]
    torch.testing.assert_close(values.flatten(), double(one_by_one), rtol=1e-15, atol=1e-16)


@of_each
def test_arguments_and_step_are_not_modified(case):
    arguments, step = tensor_arguments(case), torch.arange(14.0)
    schedule = case.make(**arguments)
    assert schedule(step).tolist() == schedule(step).tolist()
    assert arguments == case.arguments
    assert step.tolist() == list(range(14))


# torch's schedulers. --------------------------------------------------------------------------------------------------


LR = 0.1


def sequential(optimizer, first, second, milestone):
    return lr_scheduler.SequentialLR(optimizer, [first(optimizer), second(optimizer)], [milestone])


TORCH = {
    "LinearLR": (
        schedules.linear(LR * 0.2, LR * 0.9, 60),
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, 0.9, 60),
    ),
    "ExponentialLR": (
        schedules.exponential(LR, 0.97),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.97),
    ),
    "StepLR": (
        schedules.step(LR, 30, 0.3),
        lambda optimizer: lr_scheduler.StepLR(optimizer, 30, 0.3),
    ),
    "PolynomialLR": (
        schedules.polynomial(LR, 80, 2.5),
        lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 80, 2.5),
    ),
    "CosineAnnealingLR": (  # which rises again after T_max
        schedules.cosine(LR, 99, 0.01),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 99, 0.01),
    ),
    "SequentialLR": (
        schedules.join([schedules.linear(LR * 0.2, LR, 20), schedules.exponential(LR, 0.95)], [30]),
        lambda optimizer: sequential(
            optimizer,
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 20),
            lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.95),
            30,
        ),
    ),
    "warm-up and CosineAnnealingLR": (
        schedules.warmup_cosine(LR, 20, 99, LR * 0.05, 0.01),
        lambda optimizer: sequential(
            optimizer,
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.05, 1.0, 20),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 79, 0.01),
            20,
        ),
    ),
}


@pytest.mark.parametrize(("schedule", "make_scheduler"), TORCH.values(), ids=TORCH)
def test_equals_torch(schedule, make_scheduler):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = make_scheduler(optimizer)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    steps = torch.arange(100)
    torch.testing.assert_close(schedule(steps), double(expected), rtol=0, atol=1e-12)
    # Negative control: the comparison would notice a schedule that is one step ahead.
    with pytest.raises(AssertionError):
        torch.testing.assert_close(schedule(steps + 1), double(expected), rtol=0, atol=1e-12)


# Derivatives. ---------------------------------------------------------------------------------------------------------


def derivatives(function, x):
    """Return the derivative by reverse and by forward mode."""
    return torch.func.grad(function)(x), torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


@of_each_argument
def test_derivatives_are_right_inside(case, name):
    x, h = double(case.arguments[name]), 1e-5
    for step in case.inside:
        function = as_function_of(case, name, step)
        reverse, forward = derivatives(function, x)
        difference = (function(x + h) - function(x - h)) / (2 * h)
        torch.testing.assert_close(reverse, difference, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-15)


@of_each
def test_derivative_by_the_step_is_right_inside(case):
    schedule, h = case.make(**case.arguments), 1e-5
    for step in map(double, case.inside):
        reverse, forward = derivatives(schedule, step)
        torch.testing.assert_close(reverse, (schedule(step + h) - schedule(step - h)) / (2 * h), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-15)


@of_each_argument
def test_derivatives_are_finite_at_and_past_the_ends(case, name):
    for step in (*BOUNDARIES, 12, 10**6):
        reverse, forward = derivatives(as_function_of(case, name, step), double(case.arguments[name]))
        assert math.isfinite(reverse)
        torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (lambda x: schedules.linear(1.0, 0.0, x), 0.0),
        (lambda x: schedules.cosine(1.0, x), 0.0),
        (lambda x: schedules.polynomial(1.0, x, 0.5), 0.0),
        (lambda x: schedules.polynomial(1.0, 2, x), 0.0),
        (lambda x: schedules.warmup_cosine(1.0, x, 2), 0.0),
        (lambda x: schedules.warmup_cosine(1.0, 2, x), 2.0),
        (lambda x: schedules.exponential(1.0, x), 0.0),
        (lambda x: schedules.step(1.0, 2, x), 0.0),
        # The second piece has no derivative at its step 0, but does not hold until step 2.
        (lambda x: x * schedules.join([schedules.constant(1.0), lambda step: (step + 1e-300).sqrt()], [2]), 1.0),
    ],
)
def test_derivatives_are_finite_for_borderline_arguments(function, x):
    for step in (0, 1, 2, 3):
        reverse, forward = derivatives(lambda x, step=step: function(x)(step), double(x))
        assert math.isfinite(reverse)
        assert forward == reverse


def test_join_is_differentiable_where_a_piece_that_does_not_hold_is_not():
    schedule = schedules.join([lambda step: 3 * step, torch.sqrt], [4])
    assert derivatives(schedule, double(1.0)) == (3, 3)
    assert derivatives(schedule, double(5.0)) == (0.5, 0.5)


@of_each
def test_second_derivatives(case):
    values = [value.requires_grad_() for value in tensor_arguments(case).values()]
    for step in case.inside:

        def function(*values, step=step):
            return case.make(**dict(zip(case.arguments, values, strict=True)))(step)

        assert torch.autograd.gradgradcheck(function, values)


@of_each_argument
def test_derivative_of_the_whole_course_is_the_sum_over_its_steps(case, name):
    x = double(case.arguments[name]).requires_grad_()
    values = case.make(**{**case.arguments, name: x})(torch.arange(14))
    (derivative,) = torch.autograd.grad(values.sum(), x)
    one_by_one = [torch.func.grad(as_function_of(case, name, step))(x) for step in range(14)]
    torch.testing.assert_close(derivative, sum(one_by_one).detach(), rtol=1e-12, atol=1e-14)


# Transformed functions. -----------------------------------------------------------------------------------------------


@of_each_argument
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vmap_over_an_argument_equals_a_loop(case, name, dtype):
    batch = torch.tensor([0.8, 1.0, 1.1], dtype=dtype) * case.arguments[name]

    def course(x):
        schedule = case.make(**{**case.arguments, name: x})
        return torch.stack([schedule(step) for step in range(14)])

    batched = torch.vmap(course)(batch)
    assert batched.dtype == torch.float64
    torch.testing.assert_close(batched, torch.stack([course(x) for x in batch]), rtol=1e-14, atol=1e-15)


@of_each
def test_vmap_over_the_step_equals_a_vector_of_steps(case):
    schedule, steps = case.make(**case.arguments), torch.arange(14)
    torch.testing.assert_close(torch.vmap(schedule)(steps), schedule(steps), rtol=1e-14, atol=1e-15)


@of_each
@pytest.mark.parametrize("made", ["outside", "inside"])
def test_compiles_once_for_all_steps(case, made):
    graphs = []
    arguments = tensor_arguments(case)
    schedule = case.make(**case.arguments)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(step, arguments):
        return schedule(step) if made == "outside" else case.make(**arguments)(step)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    assert [compiled(torch.tensor(step), arguments) for step in range(14)] == [schedule(step) for step in range(14)]
    assert len(graphs) == 1


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
    "function": inverse_sqrt,
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
    assert schedules.Schedule(inverse_sqrt)(3) == 0.5
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
    "join([constant(1.0), inverse_sqrt], [3])": schedules.join([schedules.constant(1.0), inverse_sqrt], [3]),
    "Schedule(inverse_sqrt)": schedules.Schedule(inverse_sqrt),
    "add(mul(2, constant(0.1)), neg(constant(0.2)))": 2 * schedules.constant(0.1) + -schedules.constant(0.2),
    "truediv(sub(inverse_sqrt, constant(0.1)), tensor(4.))": (
        (inverse_sqrt - schedules.constant(0.1)) / torch.tensor(4.0)
    ),
}


@pytest.mark.parametrize(("text", "schedule"), REPRS.items(), ids=REPRS)
def test_prints_as_the_call_that_made_it_and_pickles(text, schedule):
    assert repr(schedule) == text
    steps = torch.arange(14)
    unpickled = pickle.loads(pickle.dumps(schedule))
    assert repr(unpickled) == text
    assert unpickled(steps).tolist() == schedule(steps).tolist()
    names = {**vars(operator), **vars(schedules), "tensor": torch.tensor, "inverse_sqrt": inverse_sqrt}
    assert eval(text, names)(steps).tolist() == schedule(steps).tolist()


def test_factories_keep_their_names_and_docstrings():
    for make in (schedules.linear, schedules.join, schedules.warmup_cosine):
        assert getattr(schedules, make.__name__) is make
        assert "Args:" in make.__doc__


# Errors. --------------------------------------------------------------------------------------------------------------


NAN = math.nan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(NAN), "Invalid value: nan; it needs a number"),
        (lambda: schedules.linear(NAN, 0.0, 1), "Invalid start_value: nan"),
        (lambda: schedules.linear(0.0, NAN, 1), "Invalid end_value: nan"),
        (lambda: schedules.linear(0.0, 0.0, -1), "Invalid total_iters: -1; it needs value >= 0"),
        (lambda: schedules.cosine(NAN, 1), "Invalid value: nan"),
        (lambda: schedules.cosine(1.0, NAN), "Invalid total_iters: nan"),
        (lambda: schedules.cosine(1.0, 1, NAN), "Invalid end_value: nan"),
        (lambda: schedules.exponential(NAN, 0.9), "Invalid value: nan"),
        (lambda: schedules.exponential(1.0, NAN), "Invalid gamma: nan"),
        (lambda: schedules.step(NAN, 1), "Invalid value: nan"),
        (lambda: schedules.step(1.0, 0), "Invalid step_size: 0; it needs value > 0"),
        (lambda: schedules.step(1.0, 1, NAN), "Invalid gamma: nan"),
        (lambda: schedules.polynomial(NAN, 1), "Invalid value: nan"),
        (lambda: schedules.polynomial(1.0, -1), "Invalid total_iters: -1"),
        (lambda: schedules.polynomial(1.0, 1, NAN), "Invalid power: nan"),
        (lambda: schedules.polynomial(1.0, 1, 1.0, NAN), "Invalid end_value: nan"),
        (lambda: schedules.warmup_cosine(NAN, 1, 2), "nan"),
        (lambda: schedules.warmup_cosine(1.0, -1, 2), "Invalid warmup_iters: -1; it needs value >= 0"),
        (lambda: schedules.warmup_cosine(1.0, 1, -2), "Invalid total_iters: -2"),
        (lambda: schedules.warmup_cosine(1.0, 3, 2), "warm-up of 3 steps is longer than the whole schedule of 2"),
        (lambda: schedules.warmup_cosine(1.0, 1, 2, NAN), "Invalid start_value: nan"),
        (lambda: schedules.warmup_cosine(1.0, 1, 2, 0.0, NAN), "Invalid end_value: nan"),
        (lambda: schedules.join([schedules.constant(1.0)] * 3, [1]), "3 schedules need 2 milestones, got 1"),
        (lambda: schedules.join([schedules.constant(1.0)] * 3, [2, 1]), r"milestones \[2, 1\] are not in order"),
        (lambda: schedules.join([], []), "0 schedules"),
    ],
)
def test_value_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.Schedule(0.1), r"function of the step, got 0.1; write constant\(0.1\)"),
        (lambda: schedules.constant("0.1"), "Invalid value: '0.1' is a str"),
        (lambda: schedules.linear(1.0, None, 1), "Invalid end_value: None is a NoneType"),
        (lambda: schedules.step(1.0, True), "Invalid step_size: True is a bool"),
    ],
)
def test_type_errors(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_polynomial_with_a_negative_power_is_refused():
    with pytest.raises(ValueError, match="Invalid power: -1.0"):
        schedules.polynomial(1.0, 4, power=-1.0)


def test_join_refuses_a_milestone_that_is_not_a_number():
    with pytest.raises(ValueError, match="nan"):
        schedules.join([schedules.constant(1.0)] * 2, [NAN])


# Any arguments. -------------------------------------------------------------------------------------------------------


VALUES = st.floats(-1e3, 1e3, allow_subnormal=False)
LENGTHS = st.one_of(st.integers(0, 50), st.floats(0, 50, exclude_min=True, allow_subnormal=False))
MONOTONE = st.one_of(
    st.builds(schedules.linear, VALUES, VALUES, LENGTHS),
    st.builds(schedules.cosine, VALUES, LENGTHS, VALUES),
    st.builds(schedules.polynomial, VALUES, LENGTHS, st.floats(0, 4), VALUES),
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
        (schedules.linear, (start, end, length)),
        (schedules.cosine, (start, length, end)),
        (schedules.polynomial, (start, length, power, end)),
    ):
        assert make(*numbers)(step) == make(*map(double, numbers))(step)


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


def test_what_schedules_cannot_be_computed_with():
    with pytest.raises(TypeError, match="Schedule"):
        schedules.constant(1.0) * "a"
    with pytest.raises(TypeError, match="Invalid end_value: .* is a function; the arguments of a schedule are numbers"):
        schedules.linear(1.0, lambda step: 3.0, 10)
    with pytest.raises(TypeError, match="A schedule is a function of the step, got 0.1; write constant"):
        schedules.Schedule(0.1)
