"""Schedules as objects with arithmetic, and the checks of their arguments."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, ParamSpec, TypeAlias

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import check, check_returned
from functorch_optim._core.recorded import Recorded

_P = ParamSpec("_P")
Number: TypeAlias = float | Tensor


class Schedule(Recorded):
    """A function of the step that supports arithmetic.

    Args:
        function: takes the step as a float64 tensor, returns a number or tensor.

    Example:
        Any function of the step is a schedule already; a `Schedule` can also be added and multiplied. To drive a torch
        scheduler with it, turn its tensors into numbers: `LambdaLR(optimizer, lambda step: schedule(step).item())`.

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

    @classmethod
    def of(cls, function: Callable[[Tensor], Number]) -> Schedule:
        """Turn a function into a `Schedule`, unless it is one already."""
        return function if isinstance(function, Schedule) else cls(function)

    def __call__(self, step: Number) -> Tensor:
        """Return the value at this step.

        Args:
            step: number of updates already done: number or tensor.
        """
        given = step if isinstance(step, Tensor) else torch.tensor(step, device="cpu")
        given = given.to(torch.float64)
        value = self.at_number(given)
        check_returned(self._function, value)
        return value + torch.zeros_like(given)

    def at_number(self, step: Number) -> Number:
        """Return the value at this step, as a float if the step is a float and the schedule can compute with floats.

        Args:
            step: number of updates already done: float, or float64 tensor.
        """
        if isinstance(step, float) and self._call[0] is Schedule:  # a function of the user takes tensors
            step = torch.tensor(step, dtype=torch.float64, device="cpu")
        return self._function(step)  # type: ignore[arg-type]  # ours take floats too

    def _compared(self, other: Any) -> bool:
        raise TypeError(
            f"The schedule {self!r} was compared with {other!r}, as if it were a number: the classes of torch.optim "
            "take numbers only. Write fo.Optimizer(params, fo.adam, lr=schedule), or drive the class by a scheduler of "
            "torch.optim.lr_scheduler. Its value is schedule(step)"
        )

    __lt__ = __le__ = __gt__ = __ge__ = _compared

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

    functions = [Schedule.of(operand) if callable(operand) else operand for operand in operands]

    def function(step: Tensor) -> Number:
        values: Number = operation(
            *[operand.at_number(step) if isinstance(operand, Schedule) else operand for operand in functions]
        )
        return values

    schedule = Schedule(function)
    schedule._call = (operation, operands, {})
    return schedule


def factory(make: Callable[_P, Callable[[Tensor], Number]]) -> Callable[_P, Schedule]:
    """Let a function that returns a function of the step return a Schedule.

    Tensors among its arguments are converted to float64 anew at every step. So every step has a graph of its own, and
    sees in-place changes of these tensors.
    """
    remake: Any = make
    names = remake.__code__.co_varnames[: remake.__code__.co_argcount]

    @functools.wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> Schedule:
        _check_order(make.__name__, names, args)
        function = make(*args, **kwargs)
        if _has_tensor(args) or _has_tensor(tuple(kwargs.values())):

            def function(step: Tensor) -> Number:
                named = {name: _wide(argument) for name, argument in kwargs.items()}
                value: Number = remake(*_wide(args), **named)(step)
                return value

        schedule = Schedule(function)
        schedule._call = (made, args, kwargs)
        return schedule

    return made


def _has_tensor(argument: Any) -> bool:
    return isinstance(argument, Tensor) or (isinstance(argument, list | tuple) and any(map(_has_tensor, argument)))


def _wide(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return [_wide(entry) for entry in argument]
    return argument.to(torch.float64) if isinstance(argument, Tensor) else argument


_COUNT, _LENGTH = "value >= 0", "value > 0"  # a number of steps, and one that cannot be 0
_STEPS = {
    "T_0": _LENGTH,
    "T_max": _LENGTH,
    "anneal_epochs": _COUNT,
    "decay_iters": _COUNT,
    "stable_iters": _COUNT,
    "step_size": _LENGTH,
    "step_size_down": _COUNT,
    "step_size_up": _LENGTH,
    "total_iters": _COUNT,
    "total_steps": _LENGTH,
    "warmup_iters": _COUNT,
}
_ALLOWED = {
    **_STEPS,
    "div_factor": "value > 0",
    "final_div_factor": "value > 0",
    "pct_start": "0 <= value <= 1",
    "power": "value >= 0",
    "timescale": "value > 0",
}


def check_numbers(**numbers: Number) -> None:
    """Raise unless every number is a tensor, or a Python number that is allowed for an argument of this name."""
    for name, number in numbers.items():
        if callable(number):
            raise TypeError(
                f"Invalid {name}: {number!r} is a function; the arguments of a schedule are numbers or tensors. "
                "To compose functions of the step use arithmetic or join"
            )
        check(name, number, _ALLOWED.get(name, "a number"), trees=False)


_VALUES = ("value", "start_value", "end_value", "peak_value", "eta_min", "base_lr", "max_lr")
_FACTORS = ("gamma", "factor", "start_factor", "end_factor", "swa_lr")
_OTHER_ORDERS = {
    # The orders of optax, of `linear` and `cosine` in place of each other, and of a factor before its step size.
    "warmup_cosine": (1, 2, 3, 0, 4),
    "polynomial": (0, 3, 2, 1),
    "one_cycle": (1, 0),
    "linear": (0, 2, 1),
    "cosine": (0, 2, 1),
    "step": (0, 2, 1),
}


def _check_order(name: str, names: Sequence[str], args: Sequence[Any]) -> None:
    """Raise when the numbers of positional arguments show that they are in the order of another function.

    Raises:
        ValueError: a number of steps is between 0 and 1, or 0.0 or 1.0 while a value is an integer above 1; a factor is
            an integer above 1; or a warm-up would come down from more than the number of all steps.
    """
    given = {name: arg for name, arg in zip(names, args, strict=False) if type(arg) in (int, float)}
    counts = [count for count in given if count in _STEPS and count not in ("step_size_up", "step_size_down")]
    has_count = any(type(given.get(value)) is int and given[value] > 1 for value in _VALUES)
    wrong = [
        *[count for count in counts if 0 < given[count] < 1],
        *[count for count in counts if has_count and type(given[count]) is float and given[count] <= 1],
        *[factor for factor in _FACTORS if type(given.get(factor)) is int and given[factor] > 1],
    ]
    if {"peak_value", "total_iters", "start_value"} <= given.keys():
        wrong += ["start_value"] * (given["start_value"] > max(given["peak_value"], given["total_iters"]))
    if wrong:
        order = [place for place in _OTHER_ORDERS.get(name, ()) if place < len(args)]
        ordered = [args[place] for place in order] if len(order) == len(args) else list(args)
        right = "the value comes first, which torch's schedulers take from their optimizer"
        if ordered != list(args):
            right = f"write {name}({', '.join(map(repr, ordered))})"
        raise ValueError(
            f"{name}({', '.join(map(repr, args))}) has {given[wrong[0]]} in the place of {wrong[0]}. Its arguments are "
            f"{name}({', '.join(names)}); {right}"
        )


def check_each(name: str, numbers: Sequence[Number], example: str) -> None:
    """Raise unless this is a list, and each of its entries a tensor, or a Python number that is not NaN."""
    if isinstance(numbers, Real | Mapping):
        raise TypeError(f"Invalid {name}s: {numbers!r}; give a list, as in {example}")
    for index, number in enumerate(numbers):
        check_numbers(**{f"{name} at index {index}": number})


def check_milestones(milestones: Sequence[Number], what: str, pieces: Sequence[Any], example: str) -> None:
    """Raise unless there is a milestone between any two pieces, and they are in order."""
    check_each("milestone", milestones, example)
    if len(milestones) != len(pieces) - 1:
        raise ValueError(
            f"{len(pieces)} {what} need {len(pieces) - 1} milestones, got {len(milestones)}; as in {example}"
        )
    numbers = [milestone for milestone in milestones if not isinstance(milestone, Tensor)]
    if sorted(numbers) != numbers:
        raise ValueError(f"The milestones {list(milestones)} are not in order")
