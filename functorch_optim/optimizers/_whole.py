"""Numbers of the whole tree: sums over all elements of all tensors, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.checks import check_loss
from functorch_optim._execution import choose
from functorch_optim._execution.representation import as_reals, widened
from functorch_optim._execution.sharded import over_ranks, some_sharded
from functorch_optim._numerics import double, known, minimum, where, wide_device


def like(number: Any, tensor: Tensor) -> Any:
    """Return a number as it is multiplied with a tensor."""
    return number.to(tensor.device, tensor.dtype) if isinstance(number, Tensor) else number


def total(terms: Callable[..., Any], columns: Sequence[Sequence[Tensor]], step: Any, *numbers: Any) -> Any:
    """Add terms over all elements: floats where the step is one and nothing is differentiated.

    Args:
        terms: elementwise function of a tensor of each column, and of the numbers. Tensors are real, and in float32 at
            least. It returns a tensor, or several. One at the top level of a file is recorded once.
        columns: lists of tensors of the same shapes.
        step: of the scalars.
        numbers: the numbers.

    Returns:
        The sum, or a list of the sums of several terms.
    """
    found: Any = choose.sums(terms, columns, numbers) if isinstance(step, float) else None
    if found is None:
        rows = zip(*columns, strict=True) if columns[0] else [[torch.zeros(0, device="cpu")] * len(columns)]
        sharded = any(map(some_sharded, columns))
        each = [[term if sharded else _sum(term) for term in _of_row(terms, row, numbers)] for row in rows]
        add = _over_ranks if sharded else _joined
        found = [known(add(parts), step) for parts in zip(*each, strict=True)]
    return found[0] if len(found) == 1 else found


def _of_row(terms: Callable[..., Any], row: Sequence[Tensor], numbers: Sequence[Any]) -> tuple[Tensor, ...]:
    reals = [as_reals(widened(tensor)) for tensor in row]
    found = terms(*reals, *[like(number, reals[0]) for number in numbers])
    return found if isinstance(found, tuple) else (found,)


def _over_ranks(terms: Sequence[Tensor]) -> Tensor:
    return over_ranks(terms, lambda some: _joined(list(map(_sum, some))), Tensor.sum)


def _joined(sums: Sequence[Tensor]) -> Tensor:
    return torch.stack([one.to(sums[0].device) for one in sums]).sum()


def _sum(x: Tensor) -> Tensor:
    if wide_device(x.device) != x.device:
        return double(x.sum())  # type: ignore[no-any-return]
    return x.sum(dtype=torch.float64)


def averaged(g: Tensor, m: Tensor, beta: Any, weight: Any) -> Tensor:
    """Return a running mean with one more value."""
    new: Tensor = beta * m + weight * g
    return new


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
