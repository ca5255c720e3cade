"""Numbers of the whole tree: sums over all elements of all tensors, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.checks import check_loss
from functorch_optim._execution.blocks import BLOCK
from functorch_optim._execution.representation import as_reals, widened
from functorch_optim._execution.sharded import over_ranks, some_sharded
from functorch_optim._numerics import double, known, minimum, safe_sqrt, where, wide_device


def like(number: Any, tensor: Tensor) -> Any:
    """Return a number as it is multiplied with a tensor."""
    return number.to(tensor.device, tensor.dtype) if isinstance(number, Tensor) else number


def total(term: Callable[..., Tensor], columns: Sequence[Sequence[Tensor]], step: Any) -> Any:
    """Add a term over all elements: a float where the step is one and nothing is differentiated.

    Args:
        term: elementwise function of a tensor of each column. It is given them as rules are: real, and in float32 at
            least.
        columns: lists of tensors of the same shapes.
        step: of the scalars. Where it is known, large tensors are added piece by piece, so that terms stay in the
            cache.
    """
    if not columns[0]:
        return 0.0 * step
    rows: Iterable[tuple[Tensor, ...]] = zip(*columns, strict=True)
    if any(map(some_sharded, columns)):
        return known(over_ranks([_at_row(term, row) for row in rows], _sum_of, Tensor.sum), step)
    if isinstance(step, float):
        rows = (piece for row in rows for piece in _pieces(row))
    return known(_sum_of(_at_row(term, row) for row in rows), step)


def _at_row(term: Callable[..., Tensor], row: Sequence[Tensor]) -> Tensor:
    return term(*[as_reals(widened(tensor)) for tensor in row])


def _pieces(row: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape along their first dimension."""
    size = row[0].numel()
    if size <= BLOCK:
        return iter([tuple(row)])
    length = max(1, BLOCK * row[0].shape[0] // size)
    return zip(*[torch.split(tensor, length) for tensor in row], strict=True)


def _sum_of(terms: Iterable[Tensor]) -> Tensor:
    sums = [_sum(term) for term in terms]
    return torch.stack([one.to(sums[0].device) for one in sums]).sum()


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor], step: Any) -> Any:
    """Take the inner product of two lists of tensors."""
    return total(torch.mul, [xs, ys], step)


def squares(xs: Sequence[Tensor], step: Any) -> Any:
    """Add the squares of all elements of tensors."""
    return total(torch.square, [xs], step)


def norm(xs: Sequence[Tensor], step: Any) -> Any:
    """Take the 2-norm of all elements of tensors, with derivative zero at zero."""
    return safe_sqrt(squares(xs, step))


def squared_distance(xs: Sequence[Tensor], ys: Sequence[Tensor], step: Any) -> Any:
    """Add the squares of the differences of two lists of tensors."""
    return total(lambda x, y: (x - y).square(), [xs, ys], step)


def or_first(carried: Any, first: Callable[[], Any]) -> Any:
    """Return a number that is carried on, or its first value where it is still 0."""
    if isinstance(carried, float) and carried != 0:
        return carried
    return where(carried == 0, first(), carried)


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
