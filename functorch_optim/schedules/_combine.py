"""Schedules of schedules."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

from torch import Tensor

from functorch_optim.schedules._pieces import follow
from functorch_optim.schedules._schedule import Number, Schedule, check_milestones, factory


@factory
def join(schedules: Sequence[Callable[[Tensor], Number]], milestones: Sequence[Number]) -> Callable[[Tensor], Number]:
    """Follow one schedule after the other; each begins at its own step 0, as in torch's SequentialLR.

    Args:
        schedules: list of at least one schedule.
        milestones: list of the steps, in order, from which the second, the third, ... schedule holds.

    Raises:
        ValueError: there is not one milestone fewer than schedules, or they are not in order.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.join([schedules.constant(1.0), schedules.linear(0.5, 0.0, 2)], [2])(torch.arange(5))
        tensor([1.0000, 1.0000, 0.5000, 0.2500, 0.0000], dtype=torch.float64)
    """
    check_milestones(milestones, "schedules", schedules, "join([warmup, decay], [100])")
    return follow([Schedule.of(schedule) for schedule in schedules], tuple(milestones))


@factory
def product(*schedules: Callable[[Tensor], Number]) -> Callable[[Tensor], Number]:
    """Multiply schedules, as torch's ChainedScheduler does with schedulers that multiply the learning rate.

    Give the learning rate to one of them and 1 to the others. A chain in torch is no product when one of its schedulers
    adds. An example is CosineAnnealingLR with an `eta_min` that is not 0: it moves the rate of the other schedulers
    towards `eta_min`, by a share that depends on the step. The result has no closed form.

    Args:
        *schedules: at least one schedule.

    Raises:
        ValueError: there is no schedule.
        TypeError: a schedule is no function of the step.

    Example:
        >>> import torch
        >>> from functorch_optim import schedules
        >>> schedules.product(schedules.exponential(1.0, 0.5), schedules.constant_factor(1.0, 0.1, 2))(torch.arange(4))
        tensor([0.1000, 0.0500, 0.2500, 0.1250], dtype=torch.float64)
    """
    if not schedules:
        raise ValueError("product got no schedule; as in product(warmup, decay)")
    factors = [Schedule.of(schedule) for schedule in schedules]
    return lambda step: functools.reduce(operator.mul, [factor(step) for factor in factors])
