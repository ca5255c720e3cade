"""Every schedule, and its formula: a row each.

A new schedule is one more row here, and every property in test_schedules_each.py is tested of it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from schedule_formulas import (
    constant_factor,
    cosine,
    cosine_annealing,
    cyclic,
    cyclic_momentum,
    exponential,
    half_wave,
    interpolated,
    inverse_sqrt,
    joined,
    linear,
    linear_factor,
    multi_step,
    one_cycle,
    one_cycle_momentum,
    polynomial,
    power_decay,
    rewarmed,
    rex,
    staircase,
    straight,
    three_phases,
    warm_restarts,
    warmup_cosine,
    warmup_stable_decay,
)

from functorch_optim import schedules


class Case(NamedTuple):
    """A schedule, what it computes in plain python, and the steps at which it is worth looking."""

    make: Callable[..., Callable[[Any], Any]]
    arguments: dict[str, float]
    expected: Callable[..., float]  # takes the step and the values of the arguments
    exact: dict[float, float]  # values at the ends and boundaries, to the last bit
    inside: tuple[float, ...]  # steps away from every boundary, where the schedule is smooth in all its arguments
    numbers: bool = True  # whether it takes the arguments as they are, and no tensor made of them


def fall_then_rise(value, gamma, top, milestone, total_iters):
    """Let the second piece of a join be differentiable in where it begins."""
    return schedules.join([schedules.exponential(value, gamma), schedules.linear(0.0, top, total_iters)], [milestone])


# Schedules that take lists, as functions of the entries. --------------------------------------------------------------


def make_multi_step(value, first, second, gamma):
    return schedules.multi_step(value, [second, first, second], gamma)


def make_stairs(first, second, third, to_second, to_third):
    return schedules.piecewise_constant([first, second, third], [to_second, to_third])


def make_table(first, second, third):
    values = [torch.as_tensor(value, dtype=torch.float64) for value in (first, second, third)]
    return schedules.table(torch.stack(values))


def make_legs(first, second, third, to_second, to_third, interpolation="linear"):
    return schedules.piecewise_interpolate([first, second, third], [to_second, to_third], interpolation)


def make_product(value, gamma, factor, total_iters):
    exponential, factor = schedules.exponential(value, gamma), schedules.constant_factor(1.0, factor, total_iters)
    return schedules.product(exponential, factor, lambda step: 1 + step)


def make_rewarmed(value, gamma, milestone, warmup_iters):
    return schedules.rewarm(schedules.exponential(value, gamma), [milestone], warmup_iters)


def fraction(cycle):
    return 1 / cycle


# The rows. ------------------------------------------------------------------------------------------------------------


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
    "linear_factor": Case(
        schedules.linear_factor,
        {"value": 0.5, "start_factor": 0.4, "end_factor": 1.5, "total_iters": 7.0},
        linear_factor,
        {0: 0.2, 7: 0.75, 8: 0.75, 10**9: 0.75},
        (0.5, 2, 6.5, 9),
    ),
    "constant_factor": Case(
        schedules.constant_factor,
        {"value": 0.5, "factor": 0.3, "total_iters": 4.0},
        constant_factor,
        {0: 0.15, 3: 0.15, 4: 0.5, 10**9: 0.5},
        (0.5, 3, 6),
    ),
    "multi_step": Case(
        make_multi_step,
        {"value": 0.3, "first": 2.0, "second": 5.0, "gamma": 0.5},
        multi_step,
        {0: 0.3, 1: 0.3, 2: 0.15, 4: 0.15, 5: 0.0375, 10**9: 0.0375},
        (0.5, 3, 6),
    ),
    "piecewise_constant": Case(
        make_stairs,
        {"first": 0.3, "second": 0.7, "third": 0.1, "to_second": 2.0, "to_third": 5.0},
        lambda step, a, b, c, first, second: a if step < first else b if step < second else c,
        {0: 0.3, 1: 0.3, 2: 0.7, 4: 0.7, 5: 0.1, 10**9: 0.1},
        (0.5, 3, 6),
    ),
    "table": Case(
        make_table,
        {"first": 0.3, "second": 0.7, "third": 0.1},
        lambda step, a, b, c: a if step < 1 else b if step < 2 else c,
        {0: 0.3, 1: 0.7, 2: 0.1, 10**9: 0.1},
        (0.5, 1.5, 3),
        numbers=False,
    ),
    "piecewise_interpolate": Case(
        make_legs,
        {"first": 0.3, "second": 0.7, "third": 0.1, "to_second": 2.0, "to_third": 5.0},
        lambda step, a, b, c, *milestones: interpolated(step, [a, b, c], milestones, straight),
        {0: 0.3, 2: 0.7, 5: 0.1, 10**9: 0.1},
        (0.5, 3, 6),
    ),
    "piecewise_interpolate cosine": Case(
        partial(make_legs, interpolation="cosine"),
        {"first": 0.3, "second": 0.7, "third": 0.1, "to_second": 2.0, "to_third": 5.0},
        lambda step, a, b, c, *milestones: interpolated(step, [a, b, c], milestones, half_wave),
        {0: 0.3, 2: 0.7, 5: 0.1, 10**9: 0.1},
        (0.5, 3, 6),
    ),
    "cosine_annealing": Case(
        schedules.cosine_annealing,
        {"value": 0.3, "T_max": 4.0, "eta_min": 0.1},
        cosine_annealing,
        {0: 0.3, 4: 0.1, 8: 0.3, 12: 0.1},
        (0.5, 3, 5, 7, 9),
    ),
    "cosine_warm_restarts": Case(
        schedules.cosine_warm_restarts,
        {"value": 0.3, "T_0": 3.0, "eta_min": 0.1},
        warm_restarts,
        {0: 0.3, 3: 0.3, 6: 0.3, 3 * 10**9: 0.3},
        (0.5, 2, 4, 8),
    ),
    "cosine_warm_restarts twice as long": Case(
        partial(schedules.cosine_warm_restarts, T_mult=2),
        {"value": 0.3, "T_0": 3.0, "eta_min": 0.1},
        partial(warm_restarts, T_mult=2),
        {0: 0.3, 3: 0.3, 9: 0.3, 21: 0.3, 3 * (2**40 - 1): 0.3},
        (0.5, 2, 4, 8, 13),
    ),
    "cyclic": Case(
        schedules.cyclic,
        {"base_lr": 0.3, "max_lr": 0.7, "step_size_up": 3.0, "step_size_down": 2.0},
        cyclic,
        {0: 0.3, 3: 0.7, 5: 0.3, 8: 0.7, 5 * 10**9: 0.3},
        (0.5, 2, 4, 6, 9),
    ),
    "cyclic triangular2": Case(
        partial(schedules.cyclic, mode="triangular2"),
        {"base_lr": 0.0, "max_lr": 0.7, "step_size_up": 3.0},
        partial(cyclic, k=lambda step, cycle: 0.5 ** (cycle - 1)),
        {0: 0.0, 3: 0.7, 6: 0.0, 9: 0.35, 12: 0.0, 15: 0.175},
        (0.5, 2, 4, 8, 10),
    ),
    "cyclic exp_range": Case(
        lambda gamma, **arguments: schedules.cyclic(mode="exp_range", gamma=gamma, **arguments),
        {"base_lr": 0.3, "max_lr": 0.7, "step_size_up": 3.0, "step_size_down": 2.0, "gamma": 0.9},
        lambda step, *arguments: cyclic(step, *arguments[:-1], k=lambda step, cycle: arguments[-1] ** step),
        {0: 0.3, 5: 0.3, 10: 0.3},
        (0.5, 2, 4, 6, 9),
    ),
    "cyclic scale_fn": Case(
        partial(schedules.cyclic, scale_fn=fraction),
        {"base_lr": 0.0, "max_lr": 0.7, "step_size_up": 3.0, "step_size_down": 2.0},
        partial(cyclic, k=lambda step, cycle: 1 / cycle),
        {0: 0.0, 3: 0.7, 5: 0.0, 8: 0.35, 10: 0.0},
        (0.5, 2, 4, 6, 9),
    ),
    "cyclic scale_fn of steps": Case(
        partial(schedules.cyclic, scale_fn=lambda step: 1 / (1 + step), scale_mode="iterations"),
        {"base_lr": 0.0, "max_lr": 0.7, "step_size_up": 3.0, "step_size_down": 2.0},
        partial(cyclic, k=lambda step, cycle: 1 / (1 + step)),
        {0: 0.0, 3: 0.175, 5: 0.0, 10: 0.0},
        (0.5, 2, 4, 6, 9),
    ),
    "cyclic_momentum": Case(
        schedules.cyclic_momentum,
        {"base_momentum": 0.8, "max_momentum": 0.9, "step_size_up": 3.0, "step_size_down": 2.0},
        cyclic_momentum,
        {0: 0.9, 3: 0.8, 5: 0.9, 8: 0.8},
        (0.5, 2, 4, 6, 9),
    ),
    "one_cycle": Case(
        schedules.one_cycle,
        {"max_lr": 0.9, "total_steps": 10.0, "pct_start": 0.4, "div_factor": 3.0, "final_div_factor": 7.0},
        partial(one_cycle, weight=half_wave),
        {0: 0.9 / 3, 3: 0.9, 9: 0.9 / 3 / 7, 10: 0.9 / 3 / 7, 10**9: 0.9 / 3 / 7},
        (0.5, 2, 4, 8, 12),
    ),
    "one_cycle linear": Case(
        partial(schedules.one_cycle, anneal_strategy="linear"),
        {"max_lr": 0.9, "total_steps": 10.0, "pct_start": 0.4, "div_factor": 3.0, "final_div_factor": 7.0},
        partial(one_cycle, weight=straight),
        {0: 0.9 / 3, 3: 0.9, 9: 0.9 / 3 / 7, 10: 0.9 / 3 / 7, 10**9: 0.9 / 3 / 7},
        (0.5, 2, 4, 8, 12),
    ),
    "one_cycle three_phase": Case(
        partial(schedules.one_cycle, three_phase=True),
        {"max_lr": 0.9, "total_steps": 10.0, "pct_start": 0.4, "div_factor": 3.0, "final_div_factor": 7.0},
        three_phases,
        {0: 0.9 / 3, 3: 0.9, 6: 0.9 / 3, 9: 0.9 / 3 / 7, 10: 0.9 / 3 / 7, 10**9: 0.9 / 3 / 7},
        (0.5, 2, 4, 8, 12),
    ),
    "one_cycle_momentum": Case(
        schedules.one_cycle_momentum,
        {"total_steps": 10.0, "pct_start": 0.4, "base_momentum": 0.8, "max_momentum": 0.9},
        one_cycle_momentum,
        {0: 0.9, 3: 0.8, 9: 0.9, 10: 0.9, 10**9: 0.9},
        (0.5, 2, 4, 8, 12),
    ),
    "swa": Case(
        schedules.swa,
        {"value": 0.3, "swa_lr": 0.1, "anneal_epochs": 7.0},
        lambda step, value, swa_lr, anneal_epochs: cosine(step, value, anneal_epochs, swa_lr),
        {0: 0.3, 7: 0.1, 8: 0.1, 10**9: 0.1},
        (0.5, 2, 6.5),
    ),
    "swa linear": Case(
        partial(schedules.swa, anneal_strategy="linear"),
        {"value": 0.3, "swa_lr": 0.1, "anneal_epochs": 7.0},
        linear,
        {0: 0.3, 7: 0.1, 8: 0.1, 10**9: 0.1},
        (0.5, 2, 6.5),
    ),
    "inverse_sqrt": Case(
        schedules.inverse_sqrt,
        {"value": 0.3, "warmup_iters": 4.0, "start_value": 0.1},
        inverse_sqrt,
        {0: 0.1, 4: 0.3, 16: 0.15},
        (0.5, 2, 6.5),
    ),
    "inverse_sqrt timescale": Case(
        schedules.inverse_sqrt,
        {"value": 0.3, "warmup_iters": 4.0, "start_value": 0.1, "timescale": 3.0},
        inverse_sqrt,
        {0: 0.1, 4: 0.3, 13: 0.15},
        (0.5, 2, 6.5),
    ),
    "warmup_stable_decay": Case(
        schedules.warmup_stable_decay,
        {
            "peak_value": 0.9,
            "warmup_iters": 4.0,
            "stable_iters": 3.0,
            "decay_iters": 2.0,
            "start_value": 0.1,
            "end_value": 0.2,
        },
        warmup_stable_decay,
        {0: 0.1, 4: 0.9, 5: 0.9, 7: 0.9, 9: 0.2, 10**9: 0.2},
        (0.5, 2, 5, 8),
    ),
    "rex": Case(
        schedules.rex,
        {"value": 0.3, "total_iters": 7.0, "end_value": 0.1},
        rex,
        {0: 0.3, 7: 0.1, 8: 0.1, 10**9: 0.1},
        (0.5, 2, 6.5),
    ),
    "rewarm": Case(
        make_rewarmed,
        {"value": 0.3, "gamma": 0.9, "milestone": 3.0, "warmup_iters": 4.0},
        rewarmed,
        {0: 0.3, 3: 0.0, 7: 0.3 * 0.9**7},
        (0.5, 2, 4, 8),
    ),
    "momentum_warmup": Case(
        schedules.momentum_warmup,
        {"start_value": 0.85, "end_value": 0.95, "total_iters": 7.0},
        linear,
        {0: 0.85, 7: 0.95, 8: 0.95, 10**9: 0.95},
        (0.5, 2, 6.5),
    ),
    "product": Case(
        make_product,
        {"value": 0.3, "gamma": 0.9, "factor": 0.5, "total_iters": 4.0},
        lambda step, value, gamma, *factor: (
            exponential(step, value, gamma) * constant_factor(step, 1, *factor) * (1 + step)
        ),
        {0: 0.15},
        (0.5, 2, 6),
    ),
}
for name, weight in {"cosine": half_wave, "sqrt": math.sqrt, "1-sqrt": math.sqrt}.items():
    CASES[f"warmup_stable_decay {name}"] = CASES["warmup_stable_decay"]._replace(
        make=partial(schedules.warmup_stable_decay, decay=name), expected=partial(warmup_stable_decay, weight=weight)
    )

CASES["warmup_stable_decay power"] = CASES["warmup_stable_decay"]._replace(
    make=lambda power, **numbers: schedules.warmup_stable_decay(decay="power", power=power, **numbers),
    arguments={"power": 1.7, **CASES["warmup_stable_decay"].arguments},
    expected=power_decay,
)

BOUNDARIES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)  # of all of them
