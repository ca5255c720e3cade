"""The sides of a tensor: products along a dimension, and a matrix for each of them, kept in one vector."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from functorch_optim._core.vector import common_dtype


def as_sides(x: Tensor, flatten: bool) -> Tensor:
    """View a number as a vector, and, if asked to, the dimensions after the first as one."""
    if x.ndim == 0:
        return x.reshape(1)
    return x.flatten(1) if flatten and x.ndim > 2 else x


def gram(x: Tensor, dim: int) -> Tensor:
    """Sum the outer products of all fibres along a dimension: g g^T for a matrix and its rows."""
    unfolded = x.movedim(dim, 0).flatten(1) if x.ndim > 1 else x.unsqueeze(1)
    return unfolded @ unfolded.mT


def times(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiply all fibres along a dimension by the transpose of a matrix."""
    return (x.movedim(dim, -1) @ matrix).movedim(-1, dim)


def joined(matrices: Sequence[Tensor], p: Tensor) -> Tensor:
    """Put matrices end to end in one vector, which is empty for none, as of the parameter p."""
    if not matrices:
        return p.new_zeros(0, dtype=common_dtype([p]))
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def parted(vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Take square matrices of these sizes out of a vector."""
    pieces = torch.split(vector, [n * n for n in sizes]) if sizes else ()
    return [piece.reshape(n, n) for piece, n in zip(pieces, sizes, strict=True)]


def initial(sizes: Sequence[int], p: Tensor, value: float) -> Tensor:
    """Make the vector of multiples of the identity of these sizes, float32 at least."""
    ones = [p.new_full((n,), value, dtype=common_dtype([p])) for n in sizes]
    return joined([torch.diag_embed(diagonal) for diagonal in ones], p)


def by_size(function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """Apply a function of stacks of matrices, to all of one size at once."""
    made: dict[int, Tensor] = {}
    sizes = sorted({matrix.shape[-1] for matrix in matrices})
    for size in sizes:
        some = [i for i, matrix in enumerate(matrices) if matrix.shape[-1] == size]
        made.update(zip(some, function(torch.stack([matrices[i] for i in some])).unbind(), strict=True))
    return [made[i] for i in range(len(matrices))]


# Blocks. --------------------------------------------------------------------------------------------------------------


def cut(x: Tensor, largest: int) -> list[Tensor]:
    """Cut a tensor into blocks whose sides have a largest length; those at the ends are shorter."""
    pieces = [x]
    for dim in range(x.ndim):
        pieces = [piece for whole in pieces for piece in torch.split(whole, largest, dim)]
    return pieces


def glued(pieces: Sequence[Tensor], shape: Sequence[int], largest: int) -> Tensor:
    """Put the blocks of a tensor of this shape together again."""
    for dim in reversed(range(len(shape))):
        count = len(_lengths(shape[dim], largest))
        pieces = [torch.cat(pieces[i : i + count], dim) for i in range(0, len(pieces), count)]  # type: ignore[arg-type]
    return pieces[0]


def block_shapes(shape: Sequence[int], largest: int) -> list[tuple[int, ...]]:
    """List the shapes of the blocks of a tensor, in the order of `cut`."""
    return list(itertools.product(*[_lengths(n, largest) for n in shape]))


def _lengths(n: int, largest: int) -> list[int]:
    whole, rest = divmod(n, largest)
    return [largest] * whole + ([rest] if rest or not whole else [])
