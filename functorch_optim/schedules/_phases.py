"""Schedules of several phases."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from functorch_optim._core.hyperparameters import check_choice
from functorch_optim._numerics import sqrt, where
from functorch_optim.schedules._decay import polynomial
from functorch_optim.schedules._pieces import between, follow, legs
from functorch_optim.schedules._schedule import (
    Number,
    Schedule,
    check_each,
    check_milestones,
    check_numbers,
    factory,
)
from functorch_optim.schedules._stairs import constant


@factory
def warmup_cosine(
    peak_value: Number,
    warmup_iters: Number,
    total_iters: Number,
    start_value: Number = 0.0,
    end_value: Number = 0.0,
) -> Callable[[Tensor], Number]:
    """Rise in a straight line, go down half a cosine wave, and stay.

    Args:
        peak_value: value at step `warmup_iters`, unless the schedule ends there.
        warmup_iters: number of steps of the rise >= 0.
        total_iters: number of all steps >= `warmup_iters`.
        start_value: value at step 0. With 0 the first update does nothing.
        end_value: value from step `total_iters` on.

    Raises:
        ValueError: a number is NaN, or `warmup_iters` is negative or greater than `total_iters`.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.warmup_cosine(1.0, 2, 6)(torch.arange(8))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000, 0.0000],
               dtype=torch.float64)
    """
    check_numbers(peak_value=peak_value, warmup_iters=warmup_iters, total_iters=total_iters)
    check_numbers(start_value=start_value, end_value=end_value)
    if not isinstance(total_iters, Tensor) and not isinstance(warmup_iters, Tensor) and total_iters < warmup_iters:
        raise ValueError(
            f"The warm-up of {warmup_iters} steps is longer than the whole schedule of {total_iters}; "
            "total_iters counts the warm-up too"
        )
    rise = between(start_value, peak_value, warmup_iters)
    return follow([rise, between(peak_value, end_value, total_iters - warmup_iters, "cosine")], [warmup_iters])


@factory
def warmup_stable_decay(
    peak_value: Number,
    warmup_iters: Number,
    stable_iters: Number,
    decay_iters: Number,
    start_value: Number = 0.0,
    end_value: Number = 0.0,
    decay: Literal["linear", "cosine", "sqrt", "1-sqrt", "power"] = "linear",
    power: Number = 1.0,
) -> Callable[[Tensor], Number]:
    """Rise in a straight line, stay for a while, go down, and stay: a trapezoid.

    On the way down the value is

        peak_value + (end_value - peak_value) w

    with w = x ("linear"), (1 - cos(pi x)) / 2 ("cosine"), sqrt(x) ("sqrt", also called "1-sqrt" for the factor 1 - w)
    or 1 - (1 - x)^power ("power"), x going from 0 to 1. The root has derivative zero at x = 0 in place of an infinite
    one, and so has a power below 1 at x = 1.

    Args:
        peak_value: value from step `warmup_iters` until the decay begins.
        warmup_iters: number of steps of the rise >= 0.
        stable_iters: number of steps at `peak_value` >= 0.
        decay_iters: number of steps of the decay >= 0.
        start_value: value at step 0. With 0 the first update does nothing.
        end_value: value from step `warmup_iters + stable_iters + decay_iters` on.
        decay: "linear", "cosine", "sqrt", "1-sqrt", which is the same, or "power".
        power: exponent >= 0 of the remaining part 1 - x, with "power"; see `polynomial`.

    Raises:
        ValueError: a number is NaN, a number of steps or `power` is negative, or `decay` is none of those.

    Source: Hu et al., MiniCPM, arXiv:2404.06395, section 4; "sqrt" is the best in Hägele et al., Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations, arXiv:2405.18392.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.warmup_stable_decay(1.0, 2, 3, 2)(torch.arange(8))
        tensor([0.0000, 0.5000, 1.0000, 1.0000, 1.0000, 1.0000, 0.5000, 0.0000],
               dtype=torch.float64)
    """
    check_numbers(peak_value=peak_value, start_value=start_value, end_value=end_value)
    check_numbers(warmup_iters=warmup_iters, stable_iters=stable_iters, decay_iters=decay_iters)
    check_numbers(power=power)
    check_choice("decay", decay, "linear", "cosine", "sqrt", "1-sqrt", "power")
    rise = between(start_value, peak_value, warmup_iters)  # and stay at the peak
    if decay == "power":
        fall: Any = polynomial(peak_value, decay_iters, power, end_value)
    else:
        fall = between(peak_value, end_value, decay_iters, decay)
    return follow([rise, fall], [warmup_iters + stable_iters])


@factory
def rewarm(
    schedule: Callable[[Tensor], Number], milestones: Sequence[Number], warmup_iters: Number
) -> Callable[[Tensor], Number]:
    """Follow a schedule, and warm up again where training has been interrupted: on new data, or with a new state.

        schedule(step) min(1, (step - m) / warmup_iters),  m the last milestone <= step

    Before the first milestone it equals the schedule.

    Args:
        schedule: function of the step.
        milestones: list of the steps, in order, at which the value falls to zero and begins to rise.
        warmup_iters: number of steps >= 0 of a rise.

    Raises:
        ValueError: a number is NaN, `warmup_iters` is negative, or the milestones are not in order.
        TypeError: `schedule` is no function.

    Source: Lialin et al., ReLoRA, arXiv:2307.05695, its jagged schedule; Gupta et al., Continual Pre-Training of Large
    Language Models: How to (re)warm your model?, arXiv:2308.04014.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.rewarm(schedules.linear(1.0, 0.0, 10), [4], 2)(torch.arange(8))
        tensor([1.0000, 0.9000, 0.8000, 0.7000, 0.0000, 0.2500, 0.4000, 0.3000],
               dtype=torch.float64)
    """
    check_numbers(warmup_iters=warmup_iters)
    check_milestones(milestones, "pieces", [None, *milestones], "rewarm(cosine(0.1, 1000), [500], 50)")
    rise = between(0.0, 1.0, warmup_iters)
    factor = follow([constant(1.0), *[rise for _ in milestones]], tuple(milestones))
    followed = Schedule.of(schedule)
    return lambda step: followed.at_number(step) * factor(step)


@factory
def inverse_sqrt(
    value: Number, warmup_iters: Number, start_value: Number = 0.0, timescale: Number | None = None
) -> Callable[[Tensor], Number]:
    """Rise in a straight line, then fall with the inverse square root of the step.

        value / sqrt(1 + (step - warmup_iters) / timescale)

    With the default timescale it is value sqrt(warmup_iters / step): the schedule of the Transformer, whose `value` is
    (d_model warmup_iters)^(-1/2).

    Args:
        value: value at step `warmup_iters`.
        warmup_iters: number of steps of the rise: > 0, or >= 0 when there is a `timescale`.
        start_value: value at step 0. With 0 the first update does nothing.
        timescale: number > 0 of steps after the peak in which the value falls by sqrt(2); None means `warmup_iters`.

    Raises:
        ValueError: a number is NaN or out of range.

    Source: Vaswani et al., Attention Is All You Need, arXiv:1706.03762, equation 3.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.inverse_sqrt(1.0, 2)(torch.tensor([0, 1, 2, 4, 8]))
        tensor([0.0000, 0.5000, 1.0000, 0.7071, 0.5000], dtype=torch.float64)
    """
    timescale = warmup_iters if timescale is None else timescale
    check_numbers(value=value, warmup_iters=warmup_iters, start_value=start_value, timescale=timescale)
    rise = between(start_value, value, warmup_iters)
    return follow([rise, lambda step: value * (1 / sqrt(1 + step / timescale))], [warmup_iters])


@factory
def piecewise_interpolate(
    values: Sequence[Number], milestones: Sequence[Number], interpolation: Literal["linear", "cosine"] = "linear"
) -> Callable[[Tensor], Number]:
    """Go from one value to the next, and stay at the last.

    Args:
        values: list of at least one value; the first is that of step 0.
        milestones: list of the steps, in order, at which the second, the third, ... value is reached.
        interpolation: "linear", in straight lines, or "cosine", along half waves.

    Raises:
        ValueError: a number is NaN, there is not one milestone fewer than values, they are not in order, or
            `interpolation` is neither.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.piecewise_interpolate([0.0, 1.0, 0.5], [2, 4])(torch.arange(6))
        tensor([0.0000, 0.5000, 1.0000, 0.7500, 0.5000, 0.5000], dtype=torch.float64)
    """
    example = "piecewise_interpolate([0.0, 0.1, 0.0], [10, 100])"
    check_each("value", values, example)
    check_milestones(milestones, "values", values, example)
    check_choice("interpolation", interpolation, "linear", "cosine")
    milestones = tuple(milestones)
    return follow([*legs(values, milestones, interpolation), constant(values[-1])], milestones)


@factory
def one_cycle(
    max_lr: Number,
    total_steps: Number,
    pct_start: Number = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
    three_phase: bool = False,
) -> Callable[[Tensor], Number]:
    """Rise to a peak and go down to almost nothing; the learning rate of torch's OneCycleLR.

    It goes from max_lr / div_factor at step 0 to max_lr at pct_start total_steps - 1, and then to
    max_lr / (div_factor final_div_factor) at total_steps - 1. With three phases it is max_lr / div_factor again at
    2 pct_start total_steps - 2 in between. After the last step it stays; torch goes one step further and then raises
    an error. `one_cycle_momentum` is the matching momentum.

    Args:
        max_lr: value at the peak.
        total_steps: number of steps > 0.
        pct_start: part of the steps that the rise takes, in [0, 1].
        anneal_strategy: "cos", along half cosine waves, or "linear".
        div_factor: number > 0: the peak divided by the value at step 0.
        final_div_factor: number > 0: the value at step 0 divided by the last value.
        three_phase: whether the fall is as long as the rise and a third phase goes on to the last value.

    Raises:
        ValueError: a number is NaN or out of range, or `anneal_strategy` is neither.

    Source: Smith & Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates,
    arXiv:1708.07120.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.one_cycle(1.0, 10, div_factor=10.0, anneal_strategy="linear")(torch.arange(5))
        tensor([0.1000, 0.5500, 1.0000, 0.8571, 0.7143], dtype=torch.float64)
    """
    check_numbers(max_lr=max_lr, div_factor=div_factor, final_div_factor=final_div_factor)
    initial_lr = max_lr / div_factor
    return _one_cycle(
        [initial_lr, max_lr, initial_lr, initial_lr / final_div_factor],
        total_steps,
        pct_start,
        anneal_strategy,
        three_phase,
    )


@factory
def one_cycle_momentum(
    total_steps: Number,
    pct_start: Number = 0.3,
    anneal_strategy: Literal["cos", "linear"] = "cos",
    base_momentum: Number = 0.85,
    max_momentum: Number = 0.95,
    three_phase: bool = False,
) -> Callable[[Tensor], Number]:
    """Go down while `one_cycle` goes up, and up while it goes down; the momentum of torch's OneCycleLR.

    Args:
        total_steps: number of steps > 0.
        pct_start: part of the steps that the learning rate's rise takes, in [0, 1].
        anneal_strategy: "cos", along half cosine waves, or "linear".
        base_momentum: value at the peak of the learning rate.
        max_momentum: value at step 0 and at the end; with three phases from 2 pct_start total_steps - 2 on.
        three_phase: whether the learning rate has a third phase.

    Raises:
        ValueError: a number is NaN or out of range, or `anneal_strategy` is neither.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.one_cycle_momentum(10, anneal_strategy="linear")(torch.arange(5))
        tensor([0.9500, 0.9000, 0.8500, 0.8643, 0.8786], dtype=torch.float64)
    """
    check_numbers(base_momentum=base_momentum, max_momentum=max_momentum)
    values = [max_momentum, base_momentum, max_momentum, max_momentum]
    return _one_cycle(values, total_steps, pct_start, anneal_strategy, three_phase)


def _one_cycle(
    values: list[Number], total_steps: Number, pct_start: Number, anneal_strategy: str, three_phase: bool
) -> Callable[[Tensor], Number]:
    check_numbers(total_steps=total_steps, pct_start=pct_start)
    check_choice("anneal_strategy", anneal_strategy, "cos", "linear")
    peak, end = pct_start * total_steps - 1, total_steps - 1
    if three_phase:
        milestones = [peak, 2 * pct_start * total_steps - 2, end]
    else:
        values, milestones = [values[0], values[1], values[3]], [peak, end]
    # As in torch, a boundary belongs to the phase that ends there: the next phase may have no length.
    course = follow(legs(values, milestones, anneal_strategy), milestones[:-1], operator.gt)
    # The last phase stays at its end by itself. In three phases, a rise of more than half leaves no time for it.
    return lambda step: course(where(step < end, step, end))
