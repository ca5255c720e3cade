"""Means of squares in factored form: a row and a column in the place of a matrix."""

from typing import Any

import torch
from torch import Tensor

from functorch_optim._numerics import at_least, clamped_from_below, or_one, rms

LAST = (-2, -1)
"""The dimensions of a matrix, its rows and its columns; a tensor with further ones is a stack of matrices."""


def running_means(r: Tensor, c: Tensor, x: Tensor, weight: Any, dims: tuple[int, int] = LAST) -> tuple[Tensor, Tensor]:
    """Update the running means of x over its columns, R, and over its rows, C.

    Args:
        r: R so far: like x, and of one column.
        c: C so far: like x, and of one row.
        x: matrix, or a stack of them.
        weight: of x in the new means.
        dims: those of the rows and of the columns.
    """
    of_rows, of_columns = dims
    return torch.lerp(r, _mean(x, of_columns), weight), torch.lerp(c, _mean(x, of_rows), weight)


def estimate(r: Tensor, c: Tensor, least: Any = 0.0, dims: tuple[int, int] = LAST) -> Tensor:
    """Return R C / max(mean(R), least), the matrix of rank one with these means; 0 where they are."""
    mean = torch.clamp_min(_mean(r, dims[0]), least)
    return r / or_one(mean) * c  # in this order nothing overflows


def inverse_root(v: Tensor, least: Any = 0.0) -> Tensor:
    """Return 1 / sqrt(max(v, least)), finite where there has been no gradient."""
    return torch.rsqrt(torch.clamp_min(v, at_least(least, torch.finfo(v.dtype).tiny)))


def normalized(g: Tensor, v: Tensor, d: Any) -> Tensor:
    """Return g / sqrt(v), scaled down to a root mean square of d."""
    w = g * inverse_root(v)
    return w / excess(w, d)


def excess(w: Tensor, d: Any) -> Tensor:
    """Return max(1, RMS(w) / d): divided by it, w has a root mean square of at most d."""
    return clamped_from_below(rms(w) / d, 1)


def _mean(x: Tensor, dim: int) -> Tensor:
    return x.mean(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)  # of nothing: 0
