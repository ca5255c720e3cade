"""Schedules: hyperparameters as functions of the step.

A schedule takes the number of updates already done, 0 at the first update, and returns the value for the next one. A
number or a tensor of any shape in, a float64 tensor of that shape out. Schedules are pure; they are differentiable in
their arguments and may be vmapped over them. They can be added, subtracted, multiplied, divided and negated, with each
other, with numbers and tensors, and with any other function of the step. (Inside a function that torch.compile traces,
write `Schedule(lambda step: ...)` instead where a tensor takes part.)

Every argument that is not said to be a list may be a number or a 0-dim tensor.

Example:
    >>> from functorch_optim import schedules
    >>> schedule = schedules.linear(0.0, 1.0, 10) * schedules.exponential(0.1, 0.5)
    >>> schedule(0), schedule(1)
    (tensor(0., dtype=torch.float64), tensor(0.0050, dtype=torch.float64))
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeAlias

import torch
from torch import Tensor

from functorch_optim.hyperparameters import check
from functorch_optim.recorded import Recorded

_P = ParamSpec("_P")
Number: TypeAlias = float | Tensor


class Schedule(Recorded):
    """A function of the step that knows arithmetic.

    Args:
        function: takes the step as a float64 tensor, returns a number or tensor.

    Example:
        Any function of the step is a schedule already; this one can be computed with. To drive a torch scheduler with
        one, make numbers of its tensors: `LambdaLR(optimizer, lambda step: schedule(step).item())`.

        >>> from functorch_optim import schedules
        >>> inverse_sqrt = schedules.Schedule(lambda step: (step + 1) ** -0.5)
        >>> (0.1 * inverse_sqrt)(3)
        tensor(0.0500, dtype=torch.float64)
    """

    # Not in __dict__, which torch's LambdaLR would put into its state_dict.
    __slots__ = ("_call", "_function")

    def __init__(self, function: Callable[[Tensor], Number]) -> None:
        if not callable(function):
            raise TypeError(f"A schedule is a function of the step, got {function!r}; write constant({function!r})")
        self._function = function
        self._call = (Schedule, (function,), {})

    def __call__(self, step: Number) -> Tensor:
        """Return the value at this step.

        Args:
            step: number of updates already done: number or tensor.
        """
        step = step.to(torch.float64) if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64)
        return self._function(step) + torch.zeros_like(step)

    def __add__(self, other: Any) -> Any:
        return _combined(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return _combined(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return _combined(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return _combined(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return _combined(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return _combined(operator.mul, other, self)

    def __truediv__(self, other: Any) -> Any:
        return _combined(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _combined(operator.truediv, other, self)

    def __neg__(self) -> Any:
        return _combined(operator.neg, self)


def _combined(operation: Callable[..., Any], *operands: Any) -> Any:
    if not all(callable(operand) or isinstance(operand, Tensor | Real) for operand in operands):
        return NotImplemented

    def function(step: Tensor) -> Number:
        values: Number = operation(*[operand(step) if callable(operand) else operand for operand in operands])
        return values

    schedule = Schedule(function)
    schedule._call = (operation, operands, {})
    return schedule


def _schedule(make: Callable[_P, Callable[[Tensor], Number]]) -> Callable[_P, Schedule]:
    """Let a function that returns a function of the step return a Schedule."""

    @functools.wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        schedule = Schedule(make(*args, **kwargs))
        schedule._call = (made, args, kwargs)
        return schedule

    return made


def _progress(step: Tensor, total_iters: Number) -> Tensor:
    """Return step / total_iters until the end, and 1, with derivative zero, from there on."""
    under_way = step < total_iters
    length = torch.where(under_way, total_iters, torch.ones_like(step))
    return torch.where(under_way, step / length, 1)


def _mix(start: Number, end: Number, weight: Tensor) -> Tensor:
    """Return `start` where the weight is 0 and `end` where it is 1, exactly."""
    return start * (1 - weight) + end * weight


_ALLOWED = {"total_iters": "value >= 0", "warmup_iters": "value >= 0", "power": "value >= 0", "step_size": "value > 0"}


def _check(**numbers: Number) -> None:
    for name, number in numbers.items():
        if callable(number):
            raise TypeError(
                f"Invalid {name}: {number!r} is a function; the arguments of a schedule are numbers or tensors. "
                "To compose functions of the step use arithmetic or join"
            )
        check(name, number, _ALLOWED.get(name, "a number"))


@_schedule
def constant(value: Number) -> Callable[[Tensor], Number]:
    """Stay at a value.

    Args:
        value: the value.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.constant(0.1)(5)
        tensor(0.1000, dtype=torch.float64)
    """
    _check(value=value)
    return lambda step: value


@_schedule
def linear(start_value: Number, end_value: Number, total_iters: Number) -> Callable[[Tensor], Number]:
    """Go in a straight line from one value to another, and stay.

    With `start_value = lr * start_factor` and `end_value = lr * end_factor` it is torch's LinearLR.

    Args:
        start_value: value at step 0.
        end_value: value from step `total_iters` on.
        total_iters: number of steps >= 0.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.linear(1.0, 0.0, 4)(torch.arange(6))
        tensor([1.0000, 0.7500, 0.5000, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    _check(start_value=start_value, end_value=end_value, total_iters=total_iters)
    return lambda step: _mix(start_value, end_value, _progress(step, total_iters))


@_schedule
def cosine(value: Number, total_iters: Number, end_value: Number = 0.0) -> Callable[[Tensor], Number]:
    """Go down half a cosine wave, and stay.

        end_value + (value - end_value) (1 + cos(pi step / total_iters)) / 2

    As torch's CosineAnnealingLR until `total_iters`, where torch's rises again. Source: Loshchilov & Hutter,
    arXiv:1608.03983, equation 5.

    Args:
        value: value at step 0.
        total_iters: number of steps >= 0.
        end_value: value from step `total_iters` on.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.cosine(1.0, 4)(torch.arange(6))
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000, 0.0000], dtype=torch.float64)
    """
    _check(value=value, total_iters=total_iters, end_value=end_value)
    return lambda step: _mix(end_value, value, (1 + torch.cos(math.pi * _progress(step, total_iters))) / 2)


@_schedule
def exponential(value: Number, gamma: Number) -> Callable[[Tensor], Number]:
    """Multiply by gamma at every step: value gamma^step; torch's ExponentialLR.

    Args:
        value: value at step 0.
        gamma: factor.

    Raises:
        ValueError: a number is NaN.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.exponential(1.0, 0.5)(torch.arange(4))
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    _check(value=value, gamma=gamma)
    return lambda step: value * gamma**step


@_schedule
def step(value: Number, step_size: Number, gamma: Number = 0.1) -> Callable[[Tensor], Number]:
    """Multiply by gamma every `step_size` steps: value gamma^floor(step / step_size); torch's StepLR.

    Args:
        value: value at step 0.
        step_size: number of steps > 0.
        gamma: factor.

    Raises:
        ValueError: a number is NaN, or `step_size` is not > 0.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.step(1.0, 2)(torch.arange(5))
        tensor([1.0000, 1.0000, 0.1000, 0.1000, 0.0100], dtype=torch.float64)
    """
    _check(value=value, step_size=step_size, gamma=gamma)
    return lambda step: value * gamma ** torch.floor(step / step_size)


@_schedule
def polynomial(
    value: Number, total_iters: Number, power: Number = 1.0, end_value: Number = 0.0
) -> Callable[[Tensor], Number]:
    """Go down as a power of the way that is left, and stay; torch's PolynomialLR.

        end_value + (value - end_value) (1 - step / total_iters)^power

    Args:
        value: value at step 0.
        total_iters: number of steps >= 0.
        power: exponent >= 0.
        end_value: value from step `total_iters` on.

    Raises:
        ValueError: a number is NaN, or `total_iters` or `power` is negative.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.polynomial(1.0, 4, power=2.0)(torch.arange(6))
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000, 0.0000], dtype=torch.float64)
    """
    _check(value=value, total_iters=total_iters, power=power, end_value=end_value)

    def function(step: Tensor) -> Tensor:
        left = 1 - _progress(step, total_iters)
        over = left == 0  # where the derivative of a root is infinite
        return _mix(end_value, value, torch.where(over, 0, torch.where(over, 1, left) ** power))

    return function


@_schedule
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
        >>> from functorch_optim import schedules
        >>> schedules.warmup_cosine(1.0, 2, 6)(torch.arange(8))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000, 0.0000],
               dtype=torch.float64)
    """
    _check(warmup_iters=warmup_iters, total_iters=total_iters)
    if not isinstance(total_iters, Tensor) and not isinstance(warmup_iters, Tensor) and total_iters < warmup_iters:
        raise ValueError(
            f"The warm-up of {warmup_iters} steps is longer than the whole schedule of {total_iters}; "
            "total_iters counts the warm-up too"
        )
    rise = linear(start_value, peak_value, warmup_iters)
    return join([rise, cosine(peak_value, total_iters - warmup_iters, end_value)], [warmup_iters])


@_schedule
def join(schedules: Sequence[Callable[[Tensor], Number]], milestones: Sequence[Number]) -> Callable[[Tensor], Number]:
    """Follow one schedule after the other; each begins at its own step 0, as in torch's SequentialLR.

    Args:
        schedules: list of at least one schedule.
        milestones: list of the steps, in order, from which the second, the third, ... schedule holds.

    Raises:
        ValueError: there is not one milestone fewer than schedules, or they are not in order.

    Example:
        >>> from functorch_optim import schedules
        >>> schedules.join([schedules.constant(1.0), schedules.linear(0.5, 0.0, 2)], [2])(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    if len(milestones) != len(schedules) - 1:
        raise ValueError(
            f"{len(schedules)} schedules need {len(schedules) - 1} milestones, got {len(milestones)}; "
            "as in join([warmup, decay], [100])"
        )
    schedules, milestones = tuple(schedules), tuple(milestones)
    for index, milestone in enumerate(milestones):
        _check(**{f"milestone at index {index}": milestone})
    numbers = [milestone for milestone in milestones if not isinstance(milestone, Tensor)]
    if sorted(numbers) != numbers:
        raise ValueError(f"The milestones {list(milestones)} are not in order")

    def function(step: Tensor) -> Number:
        value: Number = torch.zeros_like(step)
        for i, (schedule, begin) in enumerate(zip(schedules, [0, *milestones], strict=True)):
            holds = step >= begin
            if i < len(milestones):
                holds = holds & (step < milestones[i])
            # A schedule is not asked for steps at which it does not hold: it need not be finite there.
            value = torch.where(holds, schedule(torch.where(holds, step - begin, 0)), value)
        return value

    return function
