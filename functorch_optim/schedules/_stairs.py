"""Schedules that are constant, or constant between jumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from functorch_optim._numerics import floor
from functorch_optim.schedules._pieces import follow
from functorch_optim.schedules._schedule import Number, check_each, check_milestones, check_numbers, factory


@factory
def constant(value: Number) -> Callable[[Tensor], Number]:
    """Stay at a value.

    Args:
        value: the value.

    Raises:
        ValueError: it is NaN.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.constant(0.1)(5)
        tensor(0.1000, dtype=torch.float64)
    """
    check_numbers(value=value)
    return lambda step: value


@factory
def constant_factor(value: Number, factor: Number = 1 / 3, total_iters: Number = 5) -> Callable[[Tensor], Number]:
    """Hold a part of a value for some steps, then all of it: value factor, then value; torch's ConstantLR.

    Args:
        value: value from step `total_iters` on.
        factor: factor before step `total_iters`; torch allows only factors between 0 and 1.
        total_iters: number of steps >= 0.

    Raises:
        ValueError: a number is NaN, or `total_iters` is negative.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.constant_factor(1.0, 0.1, 2)(torch.arange(4))
        tensor([0.1000, 0.1000, 1.0000, 1.0000], dtype=torch.float64)
    """
    check_numbers(value=value, factor=factor, total_iters=total_iters)
    return follow([constant(value * factor), constant(value)], [total_iters])


@factory
def step(value: Number, step_size: Number, gamma: Number = 0.1) -> Callable[[Tensor], Number]:
    """Multiply by gamma every `step_size` steps: value gamma^floor(step / step_size); torch's StepLR.

    Args:
        value: value at step 0.
        step_size: number of steps > 0.
        gamma: factor.

    Raises:
        ValueError: a number is NaN, or `step_size` is not > 0.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.step(1.0, 2)(torch.arange(5))
        tensor([1.0000, 1.0000, 0.1000, 0.1000, 0.0100], dtype=torch.float64)
    """
    check_numbers(value=value, step_size=step_size, gamma=gamma)
    return lambda step: value * gamma ** floor(step / step_size)


@factory
def multi_step(value: Number, milestones: Sequence[Number], gamma: Number = 0.1) -> Callable[[Tensor], Number]:
    """Multiply by gamma at every milestone: value gamma^(number of milestones <= step); torch's MultiStepLR.

    Args:
        value: value before the first milestone.
        milestones: list of steps, in any order; a step that is in the list twice counts twice.
        gamma: factor.

    Raises:
        ValueError: a number is NaN.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.multi_step(1.0, [2, 4])(torch.arange(5))
        tensor([1.0000, 1.0000, 0.1000, 0.1000, 0.0100], dtype=torch.float64)
    """
    check_each("milestone", milestones, "multi_step(0.1, [30, 80])")
    check_numbers(value=value, gamma=gamma)
    milestones = tuple(milestones)

    def function(step: Tensor) -> Tensor:
        passed = 0.0 * step
        for milestone in milestones:
            passed = passed + (step >= milestone)
        return value * gamma**passed

    return function


@factory
def piecewise_constant(values: Sequence[Number], milestones: Sequence[Number]) -> Callable[[Tensor], Number]:
    """Hold one value after the other.

    Args:
        values: list of at least one value.
        milestones: list of the steps, in order, from which the second, the third, ... value holds.

    Raises:
        ValueError: a number is NaN, there is not one milestone fewer than values, or they are not in order.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.piecewise_constant([1.0, 0.5, 2.0], [2, 3])(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 2.0000, 2.0000], dtype=torch.float64)
    """
    example = "piecewise_constant([0.1, 0.01], [100])"
    check_each("value", values, example)
    check_milestones(milestones, "values", values, example)
    return follow([constant(value) for value in values], tuple(milestones))


@factory
def table(values: Tensor) -> Callable[[Tensor], Tensor]:
    """Take the value for each step from a tensor: values[step]; the last one after the end. The tensor can be learned.

    Args:
        values: floating-point tensor whose first dimension is the step. In a tree of learning rates, with a value for
            each parameter, further dimensions may be those of the parameter.

    Raises:
        TypeError: `values` is no floating-point tensor.
        ValueError: there is no value.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.table(torch.tensor([0.3, 0.2, 0.1]))(torch.arange(5))
        tensor([0.3000, 0.2000, 0.1000, 0.1000, 0.1000], dtype=torch.float64)
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise TypeError(f"table needs a floating-point tensor, a value for each step, got {values!r}")
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"table needs a value for each step, got a tensor of shape {tuple(values.shape)}")

    def function(step: Tensor) -> Tensor:
        # Indexing by a 0-dim tensor would read its value.
        index = step.long().clamp(0, len(values) - 1).to(values.device)
        return values.index_select(0, index.reshape(-1)).reshape((*index.shape, *values.shape[1:]))

    return function
