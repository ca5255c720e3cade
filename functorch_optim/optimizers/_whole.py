"""Numbers of the whole tree: sums over all elements of all tensors, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.checks import check_loss
from functorch_optim._execution.representation import as_reals, widened
from functorch_optim._execution.sharded import over_ranks, some_sharded
from functorch_optim._numerics import double, known, minimum, safe_sqrt, where, wide_device


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors as rules are given them: real, and in float32 at least."""
    return [as_reals(widened(tensor)) for tensor in tensors]


def like(number: Any, tensor: Tensor) -> Any:
    """Return a number as it is multiplied with a tensor."""
    return number.to(tensor.device, tensor.dtype) if isinstance(number, Tensor) else number


def total(terms: Sequence[Tensor], step: Any) -> Any:
    """Add all elements of real tensors: a float where the step is one and nothing is differentiated."""
    if not terms:
        return 0.0 * step
    return known(over_ranks(terms, _sum_of, Tensor.sum) if some_sharded(terms) else _sum_of(terms), step)


def _sum_of(terms: Sequence[Tensor]) -> Tensor:
    sums = [_sum(term) for term in terms]
    return torch.stack([one.to(sums[0].device) for one in sums]).sum()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor], step: Any) -> Any:
    """Take the inner product of two lists of real tensors."""
    return total([x * y for x, y in zip(xs, ys, strict=True)], step)


def squares(xs: Sequence[Tensor], step: Any) -> Any:
    """Add the squares of all elements of real tensors."""
    return total([x.square() for x in xs], step)


def norm(xs: Sequence[Tensor], step: Any) -> Any:
    """Take the 2-norm of all elements of real tensors, with derivative zero at zero."""
    return safe_sqrt(squares(xs, step))


def differences(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[Tensor]:
    """Subtract lists of tensors, real and in float32 at least."""
    return [x - y for x, y in zip(wide(xs), wide(ys), strict=True)]


def bounded(bound: Any, x: Any, y: Any) -> Any:
    """Return min(bound, x / y) for numbers; the bound where y is 0, which is its limit for x > 0."""
    zero = y == 0
    return where(zero, bound, minimum(bound, x / where(zero, 1.0, y)))


def loss_at(value: Any, step: Any) -> Any:
    """Return the loss that a step was given as a number.

    Raises:
        TypeError: it is no number.
        ValueError: it is a tensor of several.
    """
    if isinstance(value, Real):
        return float(value)
    check_loss("value must be", value)
    return known(double(value), step)


def _sum(x: Tensor) -> Tensor:
    if wide_device(x.device) != x.device:
        return double(x.sum())  # type: ignore[no-any-return]
    return x.sum(dtype=torch.float64)
