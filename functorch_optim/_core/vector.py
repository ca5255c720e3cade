"""Leaves of a tree as one vector of real numbers."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from functorch_optim._core.checks import HALF


def common_dtype(leaves: Sequence[Tensor | None]) -> torch.dtype:
    """Find the real dtype that holds the numbers of all leaves, float32 at least."""
    dtypes = [_real_dtype(leaf) for leaf in leaves if leaf is not None]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
    return torch.float32 if dtype in HALF else dtype


def flattened(leaves: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Make one vector of all leaves; a complex number is two."""
    pieces = [_as_reals(leaf).reshape(-1).to(dtype) for leaf in leaves if leaf is not None]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=dtype, device="cpu")


def unflattened(x: Tensor, leaves: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Give each leaf its piece, in its shape and dtype; None stays None."""
    sizes = [leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in leaves if leaf is not None]
    pieces = iter(torch.split(x, sizes) if sizes else ())
    return [None if leaf is None else _like(next(pieces), leaf) for leaf in leaves]


def _like(piece: Tensor, leaf: Tensor) -> Tensor:
    piece = piece.to(_real_dtype(leaf))
    if not leaf.is_complex():
        return piece.reshape(leaf.shape)
    pairs = piece.reshape(*leaf.shape, 2)
    return torch.complex(pairs[..., 0], pairs[..., 1])  # view_as_complex refuses a piece that begins at an odd place


def _real_dtype(leaf: Tensor) -> torch.dtype:
    return leaf.real.dtype if leaf.is_complex() else leaf.dtype


def _as_reals(leaf: Tensor) -> Tensor:
    # The derivative of view_as_real fails where a complex leaf begins at an odd place of the vector.
    return torch.stack((leaf.real, leaf.imag), -1) if leaf.is_complex() else leaf
