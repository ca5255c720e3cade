"""Errors of schedules, and the calls that they recommend."""

import math

import pytest
import torch

import functorch_optim as fo
from functorch_optim import schedules

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
        (lambda: schedules.constant_factor(1.0, total_iters=-1), "Invalid total_iters: -1; it needs value >= 0"),
        (lambda: schedules.linear_factor(1.0, total_iters=-1), "Invalid total_iters: -1; it needs value >= 0"),
        (lambda: schedules.multi_step(1.0, [1, NAN]), "Invalid milestone at index 1: nan; it needs a number"),
        (lambda: schedules.table(torch.zeros(0)), r"table needs a value for each step, got a tensor of shape \(0,\)"),
        (lambda: schedules.piecewise_constant([1.0, NAN], [1]), "Invalid value at index 1: nan; it needs a number"),
        (
            lambda: schedules.piecewise_constant([1.0], [1]),
            "1 values need 0 milestones, got 1; as in piecewise_constant",
        ),
        (lambda: schedules.piecewise_constant([1.0] * 3, [2, 1]), r"milestones \[2, 1\] are not in order"),
        (lambda: schedules.piecewise_constant([], []), "0 values"),
        (lambda: schedules.piecewise_interpolate([1.0] * 2, []), "2 values need 1 .* as in piecewise_interpolate"),
        (lambda: schedules.piecewise_interpolate([1.0] * 3, [2, 1]), r"milestones \[2, 1\] are not in order"),
        (
            lambda: schedules.piecewise_interpolate([1.0] * 2, [1], "cubic"),
            "Invalid interpolation: 'cubic'; choose 'linear' or 'cosine'",
        ),
        (lambda: schedules.cosine_annealing(1.0, 0), "Invalid T_max: 0; it needs value > 0"),
        (lambda: schedules.cosine_warm_restarts(1.0, 0), "Invalid T_0: 0; it needs value > 0"),
        (lambda: schedules.cosine_warm_restarts(1.0, 1, 0), "Invalid T_mult: 0; it needs an integer >= 1"),
        (lambda: schedules.cyclic(0.1, 1.0, 0), "Invalid step_size_up: 0; it needs value > 0"),
        (lambda: schedules.cyclic(0.1, 1.0, 1, -1), "Invalid step_size_down: -1; it needs value >= 0"),
        (
            lambda: schedules.cyclic(0.1, 1.0, mode="square"),
            "Invalid mode: 'square'; choose 'triangular', 'triangular2' or 'exp_range'",
        ),
        (
            lambda: schedules.cyclic_momentum(scale_mode="steps"),
            "Invalid scale_mode: 'steps'; choose 'cycle' or 'iterations'",
        ),
        (lambda: schedules.one_cycle(1.0, 0), "Invalid total_steps: 0; it needs value > 0"),
        (lambda: schedules.one_cycle(1.0, 10, 1.1), "Invalid pct_start: 1.1; it needs 0 <= value <= 1"),
        (lambda: schedules.one_cycle(1.0, 10, div_factor=0), "Invalid div_factor: 0; it needs value > 0"),
        (lambda: schedules.one_cycle(1.0, 10, final_div_factor=-1), "Invalid final_div_factor: -1; it needs value > 0"),
        (
            lambda: schedules.one_cycle(1.0, 10, anneal_strategy="cosine"),
            "Invalid anneal_strategy: 'cosine'; choose 'cos' or 'linear'",
        ),
        (lambda: schedules.one_cycle_momentum(-1), "Invalid total_steps: -1; it needs value > 0"),
        (lambda: schedules.one_cycle_momentum(10, anneal_strategy="sqrt"), "Invalid anneal_strategy: 'sqrt'"),
        (lambda: schedules.swa(1.0, 0.1, -1), "Invalid anneal_epochs: -1; it needs value >= 0"),
        (lambda: schedules.swa(1.0, 0.1, anneal_strategy="sqrt"), "Invalid anneal_strategy: 'sqrt'"),
        (lambda: schedules.inverse_sqrt(1.0, 0), "Invalid timescale: 0; it needs value > 0"),
        (lambda: schedules.inverse_sqrt(1.0, -1, timescale=1), "Invalid warmup_iters: -1; it needs value >= 0"),
        (lambda: schedules.warmup_stable_decay(1.0, -1, 1, 1), "Invalid warmup_iters: -1; it needs value >= 0"),
        (lambda: schedules.warmup_stable_decay(1.0, 1, -1, 1), "Invalid stable_iters: -1; it needs value >= 0"),
        (lambda: schedules.warmup_stable_decay(1.0, 1, 1, -1), "Invalid decay_iters: -1; it needs value >= 0"),
        (
            lambda: schedules.warmup_stable_decay(1.0, 1, 1, 1, decay="cos"),
            "Invalid decay: 'cos'; choose 'linear', 'cosine', 'sqrt', '1-sqrt' or 'power'",
        ),
        (lambda: schedules.product(), "product got no schedule"),
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
        (lambda: schedules.step(torch.tensor(1.0j), 1), "Invalid value: a tensor of dtype torch.complex64"),
        (lambda: schedules.product(schedules.constant(1.0), 0.1), "function of the step, got 0.1; write constant"),
        (lambda: schedules.cosine_warm_restarts(1.0, 1, 1.5), "Invalid T_mult: 1.5 is a float; give an integer >= 1"),
        (lambda: schedules.cosine_warm_restarts(1.0, 1, True), "Invalid T_mult: True is a bool; give an integer >= 1"),
        (lambda: schedules.cosine_warm_restarts(1.0, 1, torch.tensor(2)), "Invalid T_mult: .* is a Tensor"),
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


def test_what_schedules_cannot_be_computed_with():
    with pytest.raises(TypeError, match="Schedule"):
        schedules.constant(1.0) * "a"
    with pytest.raises(TypeError, match="Invalid end_value: .* is a function; the arguments of a schedule are numbers"):
        schedules.linear(1.0, lambda step: 3.0, 10)
    with pytest.raises(TypeError, match=r"table needs a floating-point tensor, a value for each step, got \[1.0\]"):
        schedules.table([1.0])
    with pytest.raises(TypeError, match="A schedule is a function of the step, got 0.1; write constant"):
        schedules.Schedule(0.1)


# Orders of arguments. -------------------------------------------------------------------------------------------------


MISTAKEN = [
    # optax's
    (
        lambda: schedules.warmup_cosine(0.0, 1e-3, 10, 100),
        r"0.001 in the place of warmup_iters.*\(0.001, 10, 100, 0.0\)$",
    ),
    (
        lambda: schedules.warmup_cosine(0.0, 1.0, 10, 100, 0.1),
        r"1.0 in the place of .*write .*\(1.0, 10, 100, 0.0, 0.1\)$",
    ),
    (lambda: schedules.warmup_cosine(0, 1, 10, 100), r"100 in the place of start_value.*write .*\(1, 10, 100, 0\)$"),
    (lambda: schedules.polynomial(0.1, 0.0, 2, 100), r"0.0 in the place of total_iters.*write .*\(0.1, 100, 2, 0.0\)$"),
    (lambda: schedules.one_cycle(1000, 1e-3), r"0.001 in the place of total_steps.*write one_cycle\(0.001, 1000\)$"),
    (lambda: schedules.inverse_sqrt(0.0, 1e-3, 100), "0.001 in the place of warmup_iters.*inverse_sqrt.value, warmup"),
    # of each other
    (lambda: schedules.linear(0.1, 100, 0.0), r"0.0 in the place of total_iters.*write linear\(0.1, 0.0, 100\)$"),
    (lambda: schedules.cosine(0.1, 0.0, 100), r"0.0 in the place of total_iters.*write cosine\(0.1, 100, 0.0\)$"),
    (lambda: schedules.step(0.1, 0.5, 30), r"0.5 in the place of step_size.*write step\(0.1, 30, 0.5\)$"),
    # torch's, whose schedulers know the value from their optimizer
    (
        lambda: schedules.step(30, 0.1),
        r"0.1 in the place of step_size.* step\(value, step_size, gamma\); the value comes first",
    ),
    (lambda: schedules.polynomial(100, 1.0), "1.0 in the place of total_iters.*the value comes first, which torch's"),
    (
        lambda: schedules.cosine_annealing(100, 1e-3),
        "0.001 in the place of T_max.*the value comes first, which torch's",
    ),
    (lambda: schedules.constant_factor(0.5, 4), "4 in the place of factor.*the value comes first, which torch's"),
    (
        lambda: schedules.linear_factor(0.5, 1.0, 4),
        "4 in the place of end_factor.*the value comes first, which torch's",
    ),
    (lambda: schedules.swa(0.05, 10), "10 in the place of swa_lr.*the value comes first, which torch's"),
    (lambda: schedules.exponential(0.1, 1000), "1000 in the place of gamma"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKEN)
def test_another_order_of_arguments_is_an_error_that_names_the_right_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_lists_are_asked_for():
    with pytest.raises(TypeError, match=r"Invalid milestones: 0.1; give a list, as in multi_step\(0.1, \[30, 80\]\)"):
        schedules.multi_step(0.1, 0.1, [30])
    with pytest.raises(TypeError, match=r"Invalid values: 0.1; give a list, as in piecewise_constant\("):
        schedules.piecewise_constant(0.1, {100: 0.5})
    with pytest.raises(
        TypeError, match=r"Invalid milestones: \{100: 0.5\}; give a list, as in piecewise_interpolate\("
    ):
        schedules.piecewise_interpolate([0.1, 0.2], {100: 0.5})


def test_what_numbers_cannot_tell_is_taken_as_it_is():
    schedules.linear(0.0, 10.0, 0)
    schedules.warmup_cosine(1.0, 0, 10, 2.0)
    schedules.polynomial(1.0, 1.0, 2)
    schedules.warmup_cosine(torch.tensor(0.0), torch.tensor(1e-3), 10, 100)
    schedules.linear(start_value=1.0, end_value=0.0, total_iters=0.5)  # by name nothing can be in another's place


@pytest.mark.parametrize("value", [None, "0.1", b"0.1", object()])
def test_a_schedule_returns_a_number(value):
    message = f"returned .*, a {type(value).__name__}; let it return a number, or a 0-dim tensor"
    with pytest.raises(TypeError, match=message):
        schedules.Schedule(lambda step: value)(3)
    params = torch.ones(2)
    tx = fo.sgd(lambda step: value)
    with pytest.raises(TypeError, match=message):
        tx.update(params, tx.init(params))
