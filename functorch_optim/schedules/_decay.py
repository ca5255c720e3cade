"""Schedules that go one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from functorch_optim._core.hyperparameters import check_choice
from functorch_optim._numerics import where
from functorch_optim.schedules._pieces import between, mix, progress
from functorch_optim.schedules._schedule import Number, check_numbers, factory


@factory
def linear(start_value: Number, end_value: Number, total_iters: Number) -> Callable[[Tensor], Number]:
    """Go in a straight line from one value to another, and stay.

    `linear_factor` is the same in the words of torch's LinearLR.

    Args:
        start_value: value at step 0.
        end_value: value from step `total_iters` on.
        total_iters: number of steps >= 0.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.linear(1.0, 0.0, 4)(torch.arange(6))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_numbers(start_value=start_value, end_value=end_value, total_iters=total_iters)
    return between(start_value, end_value, total_iters)


@factory
def linear_factor(
    value: Number, start_factor: Number = 1 / 3, end_factor: Number = 1.0, total_iters: Number = 5
) -> Callable[[Tensor], Number]:
    """Go in a straight line from one multiple of a value to another, and stay; torch's LinearLR.

    Args:
        value: the value.
        start_factor: factor at step 0; torch allows only factors in (0, 1].
        end_factor: factor from step `total_iters` on; torch allows only factors in [0, 1].
        total_iters: number of steps >= 0.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.linear_factor(0.1, 0.5, total_iters=2)(torch.arange(4))
        tensor([0.0500, 0.0750, 0.1000, 0.1000], dtype=torch.float64)
    """
    check_numbers(value=value, start_factor=start_factor, end_factor=end_factor, total_iters=total_iters)
    return between(value * start_factor, value * end_factor, total_iters)


@factory
def cosine(value: Number, total_iters: Number, end_value: Number = 0.0) -> Callable[[Tensor], Number]:
    """Go down half a cosine wave, and stay.

        end_value + (value - end_value) (1 + cos(pi step / total_iters)) / 2

    It equals torch's CosineAnnealingLR until `total_iters`. After that torch's rises again, and `cosine_annealing` does
    too. Source: Loshchilov & Hutter, arXiv:1608.03983, equation 5.

    Args:
        value: value at step 0.
        total_iters: number of steps >= 0.
        end_value: value from step `total_iters` on.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.cosine(1.0, 4)(torch.arange(6))
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_numbers(value=value, total_iters=total_iters, end_value=end_value)
    return between(value, end_value, total_iters, "cosine")


@factory
def exponential(value: Number, gamma: Number) -> Callable[[Tensor], Number]:
    """Multiply by gamma at every step: value gamma^step; torch's ExponentialLR.

    Args:
        value: value at step 0.
        gamma: factor.

    Raises:
        ValueError: a number is NaN.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.exponential(1.0, 0.5)(torch.arange(4))
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    check_numbers(value=value, gamma=gamma)
    return lambda step: value * gamma**step


@factory
def polynomial(
    value: Number, total_iters: Number, power: Number = 1.0, end_value: Number = 0.0
) -> Callable[[Tensor], Number]:
    """Go down as a power of the remaining steps, and stay; torch's PolynomialLR.

        end_value + (value - end_value) (1 - step / total_iters)^power

    Args:
        value: value at step 0.
        total_iters: number of steps >= 0.
        power: exponent >= 0.
        end_value: value from step `total_iters` on.

    Raises:
        ValueError: a number is NaN, or `total_iters` or `power` is negative.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.polynomial(1.0, 4, power=2.0)(torch.arange(6))
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_numbers(value=value, total_iters=total_iters, power=power, end_value=end_value)

    def function(step: Tensor) -> Tensor:
        left = 1 - progress(step, total_iters)
        over = left == 0  # there the derivative of a root is infinite
        last = where(power == 0, 1.0, 0.0)  # 0^0 = 1
        return mix(end_value, value, where(over, last, where(over, 1.0, left) ** power))

    return function


@factory
def rex(value: Number, total_iters: Number, end_value: Number = 0.0) -> Callable[[Tensor], Number]:
    """Go down slowly at first and ever faster, and stay: the reflected exponential, REX.

        end_value + (value - end_value) (1 - x) / (1 - x / 2),  x = step / total_iters

    Args:
        value: value at step 0.
        total_iters: number of steps >= 0.
        end_value: value from step `total_iters` on.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Source: Chen et al., REX: Revisiting Budgeted Training with an Improved Schedule, arXiv:2107.04197.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.rex(1.0, 4)(torch.arange(6))
        tensor([1.0000, 0.8571, 0.6667, 0.4000, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_numbers(value=value, total_iters=total_iters, end_value=end_value)

    def function(step: Tensor) -> Tensor:
        x = progress(step, total_iters)
        return mix(end_value, value, (1 - x) / (1 - x / 2))

    return function


@factory
def momentum_warmup(
    start_value: Number = 0.85, end_value: Number = 0.95, total_iters: Number = 300
) -> Callable[[Tensor], Number]:
    """Raise a momentum in a straight line, and stay; the defaults are those of Muon's training runs.

    `fo.muon(lr, momentum=schedules.momentum_warmup())`

    Args:
        start_value: value at step 0.
        end_value: value from step `total_iters` on.
        total_iters: number of steps >= 0.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Source: Jordan et al., modded-nanogpt, 2024.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.momentum_warmup()(torch.tensor([0, 150, 300, 1000]))
        tensor([0.8500, 0.9000, 0.9500, 0.9500], dtype=torch.float64)
    """
    return linear(start_value, end_value, total_iters)


@factory
def swa(
    value: Number, swa_lr: Number, anneal_epochs: Number = 10, anneal_strategy: Literal["cos", "linear"] = "cos"
) -> Callable[[Tensor], Number]:
    """Go to the learning rate of stochastic weight averaging, and stay; torch.optim.swa_utils.SWALR.

    Step 0 is the construction of torch's scheduler. To begin later, `join` it to the schedule before it.

    Args:
        value: value at step 0.
        swa_lr: value from step `anneal_epochs` on.
        anneal_epochs: number of steps >= 0.
        anneal_strategy: "cos", along half a cosine wave, or "linear".

    Raises:
        ValueError: a number is NaN, `anneal_epochs` is negative, or `anneal_strategy` is neither.

    Source: Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, arXiv:1803.05407.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.swa(1.0, 0.5, 4)(torch.arange(6))
        tensor([1.0000, 0.9268, 0.7500, 0.5732, 0.5000, 0.5000], dtype=torch.float64)
    """
    check_numbers(value=value, swa_lr=swa_lr, anneal_epochs=anneal_epochs)
    check_choice("anneal_strategy", anneal_strategy, "cos", "linear")
    return between(value, swa_lr, anneal_epochs, anneal_strategy)
