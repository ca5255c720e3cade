"""The parts of schedules: functions of the step whose derivatives are finite everywhere."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functorch_optim._numerics import cos, safe_sqrt, where
from functorch_optim.schedules._schedule import Number, Schedule


def progress(step: Tensor, total_iters: Number) -> Any:
    """Return step / total_iters until the end, and 1, with derivative zero, from there on."""
    under_way = step < total_iters
    length = where(under_way, total_iters, 1.0)
    return where(under_way, step / length, 1.0)


def mix(start: Number, end: Number, weight: Tensor) -> Tensor:
    """Return `start` where the weight is 0 and `end` where it is 1, exactly."""
    return start * (1 - weight) + end * weight


def half_wave(x: Tensor) -> Any:
    """Rise from 0 at 0 to 1 at 1 as half a cosine wave."""
    return (1 - cos(math.pi * x)) / 2


def _straight(x: Tensor) -> Tensor:
    return x


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _straight,
    "cosine": half_wave,
    "cos": half_wave,  # torch's name for it
    "sqrt": safe_sqrt,
    "1-sqrt": safe_sqrt,  # the field's name for a decay to zero of this shape
}


def between(start: Number, end: Number, total_iters: Number, shape: str = "linear") -> Callable[[Tensor], Tensor]:
    """Go from one value to another, and stay."""
    return lambda step: mix(start, end, SHAPES[shape](progress(step, total_iters)))


def legs(values: Sequence[Number], milestones: Sequence[Number], shape: str) -> list[Callable[[Tensor], Tensor]]:
    """Go from each value to the next. The first is reached at step 0, and each other one at its milestone."""
    begins = [0, *milestones][:-1]
    return [
        between(start, end, milestone - begin, shape)
        for start, end, begin, milestone in zip(values[:-1], values[1:], begins, milestones, strict=True)
    ]


def follow(
    pieces: Sequence[Callable[[Tensor], Number]],
    milestones: Sequence[Number],
    past: Callable[[Tensor, Number], Any] = operator.ge,
) -> Callable[[Tensor], Tensor]:
    """Follow one function of the step after the other, each from its own step 0.

    Args:
        pieces: the functions.
        milestones: first steps of all pieces but the first.
        past: says whether a step is past a milestone: operator.ge or operator.gt.
    """

    def function(step: Tensor) -> Tensor:
        value: Any = 0.0
        for i, (piece, begin) in enumerate(zip(pieces, [0, *milestones], strict=True)):
            holds = past(step, begin) if i > 0 else step >= 0
            if i < len(milestones):
                holds = holds & (past(step, milestones[i]) ^ True)
            # A piece is evaluated only at its own steps. It need not be finite at others.
            own = where(holds, step - begin, 0.0)
            value = where(holds, piece.at_number(own) if isinstance(piece, Schedule) else piece(own), value)
        return value  # type: ignore[no-any-return]

    return function
