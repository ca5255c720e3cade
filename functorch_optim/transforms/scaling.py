"""Scaling updates: by a number, by a schedule, by the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._execution.representation import widened


@factory
def scale(factor: Hyperparameter) -> GradientTransformation:
    """Multiply updates by a factor: `g <- s g`.

    Args:
        factor: s: number of any sign, 0-dim tensor, or schedule.

    Raises:
        ValueError: the number is NaN.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale(-0.5)
        >>> tx.update(torch.ones(2), tx.init(torch.ones(2)))[0]
        tensor([-0.5000, -0.5000])
    """
    check("factor", factor, "a number")

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        return s * g, state

    turns = isinstance(factor, Real) and factor < 0
    return of_rule(None, update, lambda step: at(factor, step), elementwise=True, sparse="touched", turns=turns)


@factory
def scale_by_schedule(schedule: Callable[[Tensor], Tensor | float]) -> GradientTransformation:
    """Multiply updates by a schedule's value: `g <- s_t g`.

    Args:
        schedule: function of the number of updates already done, 0 at the first update; see `fo.schedules`.

    Raises:
        TypeError: `schedule` is no function.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_schedule(fo.schedules.linear(1.0, 0.0, 4))
        >>> updates, state = tx.update(torch.ones(1), tx.init(torch.ones(1)))
        >>> tx.update(torch.ones(1), state)[0]
        tensor([0.7500])
    """
    if not callable(schedule):
        raise TypeError(f"scale_by_schedule needs a function of the step, got {schedule!r}; write scale({schedule!r})")
    return scale(schedule)


@factory
def scale_by_learning_rate(lr: Hyperparameter) -> GradientTransformation:
    """Multiply updates by minus the learning rate: `g <- -lr g`. The last link of most chains.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.

    Raises:
        ValueError: the number is negative or NaN.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_learning_rate(0.1)
        >>> tx.update(torch.ones(2), tx.init(torch.ones(2)))[0]
        tensor([-0.1000, -0.1000])
    """
    check("learning rate", lr)

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        return s * g, state

    return of_rule(None, update, lambda step: -at(lr, step), elementwise=True, sparse="touched", lr=lr, turns=True)


@factory
def maximize() -> GradientTransformation:
    """Turn descent into ascent: `g <- -g`. The first link of a chain, before weight decay, as in torch.optim.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.chain(fo.maximize(), fo.sgd(0.1))
        >>> tx.update(torch.ones(1), tx.init(torch.ones(1)))[0]
        tensor([0.1000])
    """
    return of_rule(None, lambda g, state, p, s: (-g, state), elementwise=True, sparse="touched", turns=True)


def scaled(g: Tensor, scale: Tensor) -> Tensor:
    """Multiply a tensor by a number; half precision is computed in float32."""
    return (scale.to(g.device) * widened(g)).to(g.dtype)
