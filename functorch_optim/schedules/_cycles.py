"""Schedules that return to their first value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import check_choice, check_integer
from functorch_optim.schedules._pieces import between, follow, half_wave, mix
from functorch_optim.schedules._schedule import Number, Schedule, check_numbers, factory

_COUNTABLE = 2**53  # the largest number up to which float64 has every whole number


@factory
def cosine_annealing(
    value: Number,
    T_max: Number,  # noqa: N803 - torch's name
    eta_min: Number = 0.0,
) -> Callable[[Tensor], Number]:
    """Go down and up along a cosine wave, again and again; torch's CosineAnnealingLR.

        eta_min + (value - eta_min) (1 + cos(pi step / T_max)) / 2

    `cosine` goes down once and stays. Source: Loshchilov & Hutter, arXiv:1608.03983, equation 5.

    Args:
        value: value at step 0 and every 2 T_max steps.
        T_max: number of steps > 0 of half a wave.
        eta_min: value at step T_max and every 2 T_max steps from there.

    Raises:
        ValueError: a number is NaN, or `T_max` is not > 0.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.cosine_annealing(1.0, 4)(torch.arange(6))
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000, 0.1464], dtype=torch.float64)
    """
    check_numbers(value=value, T_max=T_max, eta_min=eta_min)
    return lambda step: mix(value, eta_min, half_wave(step / T_max))


@factory
def cosine_warm_restarts(
    value: Number,
    T_0: Number,  # noqa: N803 - torch's name
    T_mult: int = 1,  # noqa: N803
    eta_min: Number = 0.0,
) -> Callable[[Tensor], Number]:
    """Go down half a cosine wave, jump back up, and take longer each time; torch's CosineAnnealingWarmRestarts.

        eta_min + (value - eta_min) (1 + cos(pi T_cur / T_i)) / 2

    where T_cur is the number of steps since the last restart, and T_i = T_0 T_mult^i the number of steps from the i-th
    restart to the next one. At a restart the value is exactly `value`.

    Args:
        value: value at step 0 and at every restart.
        T_0: number of steps > 0 until the first restart; a whole number in torch.
        T_mult: how many times longer each period is than the one before; a python int >= 1.
        eta_min: value that every period goes down to.

    Raises:
        ValueError: a number is NaN, `T_0` is not > 0, or `T_mult` is not >= 1.
        TypeError: `T_mult` is no int.

    Source: Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, arXiv:1608.03983, equation 5.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.cosine_warm_restarts(1.0, 2, T_mult=2)(torch.arange(7))
        tensor([1.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 1.0000],
               dtype=torch.float64)
    """
    check_numbers(value=value, T_0=T_0, eta_min=eta_min)
    check_integer("T_mult", T_mult, 1)
    # All possible restarts, in units of T_0. These numbers are exact. A rounded logarithm could put a step into the
    # wrong period.
    restarts = [1]
    while T_mult > 1 and restarts[-1] < _COUNTABLE:
        restarts.append(1 + T_mult * restarts[-1])

    def function(step: Tensor) -> Tensor:
        if T_mult == 1:
            last = torch.div(step, T_0, rounding_mode="floor")
        else:
            all_restarts = torch.tensor(restarts, dtype=step.dtype, device=step.device)
            last = torch.where(step[..., None] >= T_0 * all_restarts, all_restarts, 0).amax(-1)
        period = 1 + (T_mult - 1) * last  # T_mult^i, as last = (T_mult^i - 1) / (T_mult - 1)
        return mix(value, eta_min, half_wave((step - T_0 * last) / (T_0 * period)))

    return function


@factory
def cyclic(
    base_lr: Number,
    max_lr: Number,
    step_size_up: Number = 2000,
    step_size_down: Number | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Tensor], Number] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
) -> Callable[[Tensor], Number]:
    """Go up and down in straight lines, again and again; the learning rate of torch's CyclicLR.

        base_lr + (max_lr - base_lr) x k

    where x goes from 0 to 1 in `step_size_up` steps and back in `step_size_down`, and k is 1 ("triangular"), a half to
    the power of the number of completed cycles ("triangular2"), or gamma^step ("exp_range"). `cyclic_momentum` is the
    matching momentum.

    Args:
        base_lr: value at the ends of all cycles, step 0 among them.
        max_lr: value at the peak of the first cycle, when k is 1 there.
        step_size_up: number of steps > 0 of the rise.
        step_size_down: number of steps >= 0 of the fall; None means as many as of the rise.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: factor for "exp_range".
        scale_fn: function that returns k, to use in place of a mode. Its argument is a float64 tensor; torch's is an
            int.
        scale_mode: argument of `scale_fn`: "cycle", the number of the cycle, 1 for the first; or "iterations", the
            step.

    Raises:
        ValueError: a number is NaN or out of range, or a word is none of those above.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.cyclic(0.0, 1.0, 2, mode="triangular2")(torch.arange(8))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.0000, 0.2500, 0.5000, 0.2500],
               dtype=torch.float64)
    """
    step_size_down = step_size_up if step_size_down is None else step_size_down
    check_numbers(base_lr=base_lr, max_lr=max_lr, step_size_up=step_size_up, step_size_down=step_size_down, gamma=gamma)
    if scale_fn is None:
        check_choice("mode", mode, "triangular", "triangular2", "exp_range")
    check_choice("scale_mode", scale_mode, "cycle", "iterations")
    total_size = step_size_up + step_size_down
    triangle = follow([between(0.0, 1.0, step_size_up), between(1.0, 0.0, step_size_down)], [step_size_up])

    def scale(step: Tensor, completed: Tensor) -> Number:
        if scale_fn is not None:
            return Schedule.of(scale_fn)(1 + completed if scale_mode == "cycle" else step)
        if mode == "triangular":
            return 1.0
        return 0.5**completed if mode == "triangular2" else gamma**step

    def function(step: Tensor) -> Tensor:
        # Both functions put a step into the same cycle: they agree to the last bit.
        completed, position = torch.div(step, total_size, rounding_mode="floor"), torch.remainder(step, total_size)
        return mix(base_lr, max_lr, triangle(position) * scale(step, completed))

    return function


@factory
def cyclic_momentum(
    base_momentum: Number = 0.8,
    max_momentum: Number = 0.9,
    step_size_up: Number = 2000,
    step_size_down: Number | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: Number = 1.0,
    scale_fn: Callable[[Tensor], Number] | None = None,
    scale_mode: Literal["cycle", "iterations"] = "cycle",
) -> Callable[[Tensor], Number]:
    """Go down while `cyclic` goes up, and up while it goes down; the momentum of torch's CyclicLR.

        max_momentum - (max_momentum - base_momentum) x k

    Args:
        base_momentum: value at the bottom of the first cycle, when k is 1 there.
        max_momentum: value at the ends of all cycles, step 0 among them.
        step_size_up: number of steps > 0 of the learning rate's rise.
        step_size_down: number of steps >= 0 of its fall; None means as many as of its rise.
        mode: "triangular", "triangular2" or "exp_range"; `cyclic` explains them, and x and k.
        gamma: factor for "exp_range".
        scale_fn: function that returns k, to use in place of a mode.
        scale_mode: argument of `scale_fn`: "cycle" or "iterations".

    Raises:
        ValueError: a number is NaN or out of range, or a word is none of those above.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.cyclic_momentum(0.8, 0.9, 2)(torch.arange(5))
        tensor([0.9000, 0.8500, 0.8000, 0.8500, 0.9000], dtype=torch.float64)
    """
    check_numbers(base_momentum=base_momentum, max_momentum=max_momentum)
    return cyclic(max_momentum, base_momentum, step_size_up, step_size_down, mode, gamma, scale_fn, scale_mode)
