"""Each schedule: its values, its derivatives, and its behaviour under all transforms of torch."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedule_cases import BOUNDARIES, CASES, cosine

from functorch_optim import schedules


def double(x):
    return torch.tensor(x, dtype=torch.float64)


of_each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ARGUMENTS = [pytest.param(case, name, id=f"{key}-{name}") for key, case in CASES.items() for name in case.arguments]
of_each_argument = pytest.mark.parametrize(("case", "name"), ARGUMENTS)
of_each_number = pytest.mark.parametrize(("case", "name"), [each for each in ARGUMENTS if each.values[0].numbers])


def tensor_arguments(case):
    return {name: double(value) for name, value in case.arguments.items()}


def as_function_of(case, name, step):
    """Return the value at a step, or the values at several, as a function of one argument."""
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
    expected = [case.expected(step, *case.arguments.values()) for step in around]
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
    expected = [case.expected(step, *arguments.values()) for step in steps.tolist()]
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
        (schedules.polynomial(0.3, 2, 0.0, 0.1), [0.3, 0.3, 0.3]),
        (schedules.exponential(0.3, 0.0), [0.3, 0.0]),
        (schedules.exponential(1.0, -0.5), [1.0, -0.5, 0.25]),
        (schedules.linear(0.3, 0.7, math.inf), [0.3, 0.3]),
        (schedules.multi_step(0.3, [], 0.5), [0.3, 0.3]),
        (schedules.multi_step(0.3, [0, 0, 1], 0.5), [0.075, 0.0375]),
        (schedules.multi_step(0.3, torch.tensor([2, 1]), 0.5), [0.3, 0.15, 0.075]),
        (schedules.multi_step(0.3, [1], 0.0), [0.3, 0.0]),
        (schedules.constant_factor(0.3, total_iters=0), [0.3, 0.3]),
        (schedules.linear_factor(0.3, total_iters=0), [0.3, 0.3]),
        (schedules.piecewise_constant([0.3], []), [0.3, 0.3]),
        (schedules.piecewise_constant((0.3, 0.2, 0.1), (1, 1)), [0.3, 0.1]),
        (schedules.piecewise_interpolate([0.3], []), [0.3, 0.3]),
        (schedules.piecewise_interpolate([0.3, 0.2, 0.1], [1, 1]), [0.3, 0.1]),
        (schedules.piecewise_interpolate([0.3, 0.1], [0]), [0.1, 0.1]),
        (schedules.cosine_annealing(0.3, 1, 0.1), [0.3, 0.1, 0.3, 0.1]),
        (schedules.cosine_warm_restarts(0.3, 1), [0.3, 0.3, 0.3]),
        (schedules.cosine_warm_restarts(0.3, 1, 2, 0.1), [0.3, 0.3, 0.2, 0.3]),
        (schedules.cyclic(0.3, 0.1, 2, 0), [0.3, 0.2, 0.3, 0.2]),
        (schedules.cyclic(0.3, 0.1, 1), [0.3, 0.1, 0.3, 0.1]),
        (schedules.cyclic(0.3, 0.1, 1, mode="exp_range", gamma=0.0), [0.3, 0.3, 0.3]),
        (schedules.cyclic(0.3, 0.1, 1, mode="none", scale_fn=lambda cycle: 0.5), [0.3, 0.2, 0.3]),
        (schedules.one_cycle(0.3, 1), [0.3 / 25e4, 0.3 / 25e4]),
        (schedules.one_cycle(0.3, 3, 1.0, div_factor=3), [0.1, 0.2, 0.3, 0.3]),  # nothing but the rise
        (schedules.one_cycle(0.3, 3, 0.0, "linear", 3, 2), [0.3 - 0.25 / 3, 0.3 - 0.5 / 3, 0.05]),
        (schedules.one_cycle(0.3, 3, 2 / 3, "linear", 3, 2, three_phase=True), [0.1, 0.3, 0.1, 0.1]),
        (schedules.swa(0.3, 0.1, 0), [0.1, 0.1]),
        (schedules.inverse_sqrt(0.3, 0, timescale=1), [0.3, 0.3 / 2**0.5, 0.3 / 3**0.5, 0.15]),
        (schedules.warmup_stable_decay(0.3, 0, 0, 0, end_value=0.1), [0.1, 0.1]),
        (schedules.warmup_stable_decay(0.3, 0, 1, 1, end_value=0.1), [0.3, 0.3, 0.1]),
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


@given(st.integers(1, 1000), st.integers(1, 6), st.integers(0, 30), st.integers(-2, 2))
def test_no_restart_is_missed(T_0, T_mult, number, around):  # noqa: N803
    """Near any restart, up to where float64 runs out of whole numbers."""
    restarts, period = [0], T_0
    while len(restarts) < number + 4:
        restarts.append(restarts[-1] + period)
        period *= T_mult
    step = min(max(restarts[number] + around, 0), 2**52)
    last = max(index for index, restart in enumerate(restarts) if restart <= step)
    begin, period = restarts[last], T_0 * T_mult**last
    value = schedules.cosine_warm_restarts(0.3, T_0, T_mult, 0.1)(step)
    torch.testing.assert_close(value.item(), cosine(step - begin, 0.3, period, 0.1), rtol=1e-14, atol=0)
    assert step != begin or value == 0.3


@given(st.floats(0.01, 10), st.floats(0, 10), st.integers(0, 2**40))
def test_every_step_is_somewhere_in_a_cycle(up, down, step):
    """Also when the lengths of cycles are not whole: how many are completed and how far the next is must agree."""
    completed = []
    schedule = schedules.cyclic(0.0, 1.0, up, down, scale_fn=lambda cycle: completed.append(cycle - 1) or 1.0)
    value = schedule(step)
    position = Fraction(step) - int(completed[0]) * Fraction(up + down)
    assert 0 <= position < Fraction(up + down)
    x = position / Fraction(up) if position < up else 1 - (position - Fraction(up)) / Fraction(down)
    torch.testing.assert_close(value, double(float(x)), rtol=0, atol=1e-12)


@given(st.integers(0, 2**16), st.sampled_from([(), (0,), (1,), (5,), (17,), (2, 3), (3, 0, 2), (2, 1, 4)]))
def test_steps_of_any_shape_and_order(seed, shape):
    steps = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(seed))
    for case in CASES.values():
        schedule = case.make(**case.arguments)
        torch.testing.assert_close(schedule(steps), schedule(torch.arange(40))[steps], rtol=1e-14, atol=1e-15)


@of_each_number
def test_what_is_no_number_is_refused(case, name):
    for value, error, message in (
        (math.nan, ValueError, r"Invalid \w+( at index \d)?: nan; it needs"),
        ("1", TypeError, r"Invalid \w+( at index \d)?: '1' is a str; give a number, a 0-dim tensor, or"),
        (lambda step: 1.0, TypeError, r"Invalid \w+( at index \d)?: .* is a function; the arguments of a schedule are"),
    ):
        with pytest.raises(error, match=message):
            case.make(**{**case.arguments, name: value})


# Derivatives. ---------------------------------------------------------------------------------------------------------


def derivatives(function, x):
    """Return the derivative by reverse and by forward mode."""
    return torch.func.grad(function)(x), torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


@pytest.mark.sampled(size=48)
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
    function, x = as_function_of(case, name, [*BOUNDARIES, 10**6]), double(case.arguments[name])
    reverse, forward = torch.func.jacrev(function)(x), torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
    assert reverse.isfinite().all()
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
        (lambda x: schedules.linear_factor(1.0, 0.5, 1.0, x), 0.0),
        (lambda x: schedules.constant_factor(1.0, 0.5, x), 0.0),
        (lambda x: schedules.multi_step(1.0, [0, 1, 1], x), 0.0),
        (lambda x: schedules.piecewise_interpolate([1.0, 0.0, 1.0], [x, x]), 0.0),
        (lambda x: schedules.cosine_warm_restarts(1.0, x), 1.0),
        (lambda x: schedules.cosine_warm_restarts(1.0, x, 2), 1.0),
        (lambda x: schedules.cyclic(0.0, 1.0, x), 1.0),
        (lambda x: schedules.cyclic(0.0, 1.0, 2, x), 0.0),
        (lambda x: schedules.cyclic(0.0, 1.0, 2, mode="exp_range", gamma=x), 0.0),
        (lambda x: schedules.one_cycle(1.0, x), 1.0),
        (lambda x: schedules.one_cycle(1.0, 3, x), 0.0),
        (lambda x: schedules.one_cycle(1.0, 3, x), 1 / 3),  # the rise has no length
        (lambda x: schedules.one_cycle(1.0, 3, x), 1.0),  # the fall has none
        (lambda x: schedules.one_cycle(1.0, 3, x, three_phase=True), 0.0),
        (lambda x: schedules.one_cycle(1.0, 3, x, three_phase=True), 1.0),
        (lambda x: schedules.swa(1.0, 0.0, x), 0.0),
        (lambda x: schedules.inverse_sqrt(1.0, x, timescale=2), 0.0),
        (lambda x: schedules.warmup_stable_decay(1.0, x, 1, 1), 0.0),
        (lambda x: schedules.warmup_stable_decay(1.0, 1, x, 1, decay="sqrt"), 0.0),
        (lambda x: schedules.warmup_stable_decay(1.0, 0, 1, x, decay="sqrt"), 0.0),
        # The second piece has no derivative at its step 0, but does not hold until step 2.
        (lambda x: x * schedules.join([schedules.constant(1.0), lambda step: (step + 1e-300).sqrt()], [2]), 1.0),
    ],
)
def test_derivatives_are_finite_for_borderline_arguments(function, x):
    for step in (0, 1, 2, 3):
        reverse, forward = derivatives(lambda x, step=step: function(x)(step), double(x))
        assert math.isfinite(reverse)
        torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-15)


def test_join_is_differentiable_where_a_piece_that_does_not_hold_is_not():
    schedule = schedules.join([lambda step: 3 * step, torch.sqrt], [4])
    assert derivatives(schedule, double(1.0)) == (3, 3)
    assert derivatives(schedule, double(5.0)) == (0.5, 0.5)


@pytest.mark.sampled
@of_each
def test_second_derivatives(case):
    values = [value.requires_grad_() for value in tensor_arguments(case).values()]
    for step in case.inside:

        def function(*values, step=step):
            return case.make(**dict(zip(case.arguments, values, strict=True)))(step)

        assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.sampled(size=64)
@of_each_argument
def test_derivative_of_the_whole_course_is_the_sum_over_its_steps(case, name):
    x = double(case.arguments[name]).requires_grad_()
    values = case.make(**{**case.arguments, name: x})(torch.arange(14))
    # Some depend on it only through comparisons, of which autograd knows nothing.
    (derivative,) = torch.autograd.grad(values.sum() + 0 * x, x)
    one_by_one = [torch.func.grad(as_function_of(case, name, step))(x) for step in range(14)]
    torch.testing.assert_close(derivative, sum(one_by_one).detach(), rtol=1e-12, atol=1e-14)


@of_each_number
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameter_may_be_trained_in_place(case, name, dtype):
    """One schedule serves a whole run: several backward passes, and changes of the parameter in between."""
    x = torch.tensor(case.arguments[name], dtype=dtype, requires_grad=True)
    schedule = case.make(**{**case.arguments, name: x})
    for _ in range(2):
        anew = case.make(**{**case.arguments, name: x.detach()})
        value = schedule(1) + 0 * x
        assert value == anew(1)
        value.backward()
        with torch.no_grad():
            x.mul_(1.01)


# Transformed functions. -----------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=64)
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


@pytest.mark.sampled(size=4)
@of_each
def test_compiles_once_for_all_steps(case):
    """A schedule that is there before, and one that is made inside."""
    graphs = []
    arguments = tensor_arguments(case)
    schedule = case.make(**case.arguments)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def function(step, arguments):
        return schedule(step), case.make(**arguments)(step)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    expected = [(schedule(step),) * 2 for step in range(14)]
    assert [compiled(torch.tensor(step), arguments) for step in range(14)] == expected
    assert len(graphs) == 1
