"""Whole tensors made of shards, for rules that need their tensor whole.

Each tensor is computed by one rank, its owner: it receives all shards, puts them together, runs the rules, and sends
shards of the results back. Where derivatives are wanted, every rank has all whole tensors instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import Path
from functorch_optim._execution.representation import Columns, make
from functorch_optim._execution.sharded import Layout, everywhere, gathered, is_sharded, local, summed_gradient

Layouts: TypeAlias = Sequence[Layout | None]
"""Those of a column of tensors; None where a tensor is the same on all ranks."""


class Wholes:
    """How rules are run over whole tensors that are made of shards.

    Args:
        layouts: of the tensors: of one mesh, and sharded alike; or None for all.
        states: for each rule, those of its states: columns of layouts.
        ranks: the number of ranks of the largest mesh.
    """

    def __init__(self, layouts: Layouts, states: Sequence[Any], ranks: int) -> None:
        self.layouts, self.states, self.ranks = layouts, states, ranks
        self.once = _owners(layouts, [layout for state in states for column in state for layout in column])

    def run(
        self,
        rules: Callable[..., tuple[list[Tensor], list[Columns]]],
        members: Sequence[int],
        updates: list[Tensor],
        states: Sequence[Columns],
        params: list[Tensor] | None,
        path: Path,
        derivatives: bool,
    ) -> tuple[list[Tensor], list[Columns]]:
        """Run rules.

        Args:
            rules: (updates, states, params, path) of whole tensors -> updates, states.
            members: which rules these are.
            updates: shards.
            states: shards.
            params: shards.
            path: names a tensor.
            derivatives: whether some are wanted.

        Returns:
            Shards of updates and states.
        """
        results = 1 + sum([len(state) for state in states])
        layouts = [self.layouts, *[column for k in members for column in self.states[k]], self.layouts]
        shards = [updates, *[column for state in states for column in state], *([] if params is None else [params])]
        place = self.once if self.once is not None and not derivatives else _Everywhere()
        whole = iter(place.gathered(layouts[: len(shards)], shards))
        given = next(whole), _arranged(whole, states)
        new, new_states = rules(*given, None if params is None else next(whole), place.path(path))
        columns = [new, *[column for state in new_states for column in state]]
        cut = iter(place.cut(layouts[:results], columns, shards[:results]))
        return next(cut), _arranged(cut, states)

    @property
    def adds(self) -> bool:
        """Tell whether all ranks take part, with shards that are cut alike; numbers of states are on all of them."""
        here = self.layouts[0] is None or self.layouts[0].mesh.get_coordinate() is not None
        own = [column for state in self.states for column in state if list(column) != list(self.layouts)]
        return here and not any(layout and layout.chunked != [] for column in own for layout in column)

    @property
    def sizes(self) -> list[int]:
        """Return the numbers of elements of whole tensors, which are sharded."""
        return [layout.shape.numel() for layout in self.layouts if layout is not None]

    def of_ranks(self, numbers: Tensor) -> Tensor:
        """Collect numbers of the shards of each tensor, which is the last dimension, from all ranks: the first one.

        Where several ranks have the same shard, it counts once; the others have zeros.
        """
        layouts = [layout for layout in self.layouts if layout is not None]
        counts = torch.tensor([layout.counts for layout in layouts], device=numbers.device)
        return gathered(numbers.where(counts, torch.zeros_like(numbers)).unsqueeze(0), layouts[0].mesh)

    def numbers(self, scalars: Any, elementwise: bool) -> Any:
        """Return numbers of a rule as it is run: those that differ between elements as shards, or whole.

        The derivative with respect to a number is the sum over all ranks. Where several of them have the same shard,
        each has a part of its derivative.
        """
        layout = self.layouts[0]
        times = self.ranks if layout is None or not elementwise else self.ranks // layout.shards

        def here(scalar: Any) -> Any:
            if not isinstance(scalar, Tensor):
                return scalar
            if scalar.ndim > 0:
                if layout is not None and elementwise:
                    return layout.shard(scalar.expand(layout.shape))
                return local(scalar.full_tensor()) if is_sharded(scalar) else scalar  # type: ignore[attr-defined]
            if is_sharded(scalar):
                scalar = summed_gradient(local(scalar), scalar.device_mesh)  # type: ignore[attr-defined]
            if times == 1 or not (scalar.requires_grad and torch.is_grad_enabled()):
                return scalar
            return scalar / times + (scalar - scalar / times).detach()

        return tree.map(here, scalars)


def _arranged(columns: Iterator[list[Tensor]], states: Sequence[Columns]) -> list[Columns]:
    return [make(type(state), [next(columns) for _ in state]) for state in states]


class _Everywhere:
    """All tensors on every rank: a collective for each tensor."""

    def gathered(self, layouts: Sequence[Layouts], columns: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        """Return those whole tensors that this rank has, of shards."""
        pairs = [zip(*column, strict=True) for column in zip(layouts, columns, strict=True)]
        return [[tensor if layout is None else layout.whole(tensor) for layout, tensor in column] for column in pairs]

    def cut(
        self, layouts: Sequence[Layouts], columns: Sequence[list[Tensor]], shards: Sequence[list[Tensor]]
    ) -> list[list[Tensor]]:
        """Return shards of whole tensors; `shards` are those of which such tensors were made."""
        pairs = [zip(*column, strict=True) for column in zip(layouts, columns, strict=True)]
        return [[tensor if layout is None else layout.cut(tensor) for layout, tensor in column] for column in pairs]

    def path(self, path: Path) -> Path:
        """Return the function that names the tensors of this rank, given that for all."""
        return path


class _Piece(NamedTuple):
    """A tensor on its way to its owner, or back: cut along some dimensions of the mesh, and whole along later ones.

    Attributes:
        owner: the coordinates of the rank.
        layout: of the shards.
        tensor: the shard of this rank.
    """

    owner: tuple[int, ...]
    layout: Layout
    tensor: Tensor

    def shape(self, cuts: Mapping[int, int]) -> list[int]:
        """Return the shape of a part, given the dimensions of the mesh along which it is cut, and which part it is."""
        shape = list(self.layout.shape)
        for d, c in cuts.items():
            placement = self.layout.placements[d]
            if not placement.is_replicate():
                part = _part(shape[placement.dim], self.layout.mesh.shape[d], c)
                shape[placement.dim] = part.stop - part.start
        return shape

    def cut(self, d: int, c: int) -> Tensor:
        """Return the part of a rank along dimension d of the mesh."""
        placement = self.layout.placements[d]
        if placement.is_replicate():
            return self.tensor
        part = _part(self.tensor.shape[placement.dim], self.layout.mesh.shape[d], c)
        return self.tensor[(slice(None),) * placement.dim + (part,)]

    def joined(self, d: int, parts: list[Tensor]) -> _Piece:
        """Return the tensor that parts along dimension d of the mesh are of."""
        placement = self.layout.placements[d]
        return self._replace(tensor=parts[0] if placement.is_replicate() else torch.cat(parts, placement.dim))


class _Owners:
    """Each tensor on one rank: two collectives for each dimension of the mesh, for all tensors together.

    Args:
        layouts: of the tensors.
        dims: the dimensions of the mesh along which they are cut, in this order. Along the others ranks do the same.
    """

    def __init__(self, layouts: Sequence[Layout], dims: list[int]) -> None:
        self.mesh, self.dims = layouts[0].mesh, dims
        self.here: tuple[int, ...] = tuple(self.mesh.get_coordinate())
        along = [range(n) if d in dims else (self.here[d],) for d, n in enumerate(self.mesh.shape)]
        ranks = list(itertools.product(*along))
        self.owners = [ranks[k] for k in spread([_work(layout.shape) for layout in layouts], len(ranks))]
        self.own = [i for i, owner in enumerate(self.owners) if owner == self.here]

    def gathered(self, layouts: Sequence[Layouts], columns: Sequence[list[Tensor]]) -> list[list[Tensor]]:
        pieces = self._pieces(layouts, columns)
        for d in reversed(self.dims):
            ranks = self._by_owner(pieces, d)
            mine = ranks[self.here[d]]
            expected = [[(p.shape(self._cuts(d, c)), p.tensor.dtype) for p in mine] for c in range(len(ranks))]
            received = self._exchanged([[p.tensor for p in some] for some in ranks], expected, d)
            pieces = [p.joined(d, parts) for p, *parts in zip(mine, *received, strict=True)]
        return _in_rows([p.tensor for p in pieces], len(self.own), len(columns))

    def cut(
        self, layouts: Sequence[Layouts], columns: Sequence[list[Tensor]], shards: Sequence[list[Tensor]]
    ) -> list[list[Tensor]]:
        given = self._pieces(layouts, shards)
        own = [p for p in given if p.owner == self.here]
        results = [tensor for column in columns for tensor in column]
        pieces = [p._replace(tensor=new.to(p.tensor.dtype)) for p, new in zip(own, results, strict=True)]
        for k, d in enumerate(self.dims):
            arriving = [p for p in given if all(p.owner[e] == self.here[e] for e in self.dims[k + 1 :])]
            ranks = self._by_owner(arriving, d)
            cuts = self._cuts(d, self.here[d])
            expected = [[(p.shape(cuts), p.tensor.dtype) for p in some] for some in ranks]
            received = self._exchanged([[p.cut(d, c) for p in pieces] for c in range(len(ranks))], expected, d)
            parts = list(map(iter, received))
            pieces = [p._replace(tensor=next(parts[p.owner[d]])) for p in arriving]
        return _in_rows([p.tensor for p in pieces], len(self.owners), len(columns))

    def path(self, path: Path) -> Path:
        return lambda n: path(self.own[n])

    def _pieces(self, layouts: Sequence[Layouts], columns: Sequence[list[Tensor]]) -> list[_Piece]:
        return [
            _Piece(owner, layout or everywhere(tensor, self.mesh), tensor)
            for column in zip(layouts, columns, strict=True)
            for owner, layout, tensor in zip(self.owners, *column, strict=True)
        ]

    def _cuts(self, d: int, c: int) -> dict[int, int]:
        """Return the cuts of part c along dimension d of the mesh; along those before, of the part of this rank."""
        return {e: c if e == d else self.here[e] for e in self.dims[: self.dims.index(d) + 1]}

    def _by_owner(self, pieces: Sequence[_Piece], d: int) -> list[list[_Piece]]:
        return [[p for p in pieces if p.owner[d] == c] for c in range(self.mesh.shape[d])]

    def _exchanged(
        self, sent: list[list[Tensor]], expected: list[list[tuple[list[int], torch.dtype]]], d: int
    ) -> list[list[Tensor]]:
        """Send tensors to each rank along a dimension of the mesh, and return those that each has sent: as bytes."""
        outgoing = [[_bytes(tensor) for tensor in some] for some in sent]
        sizes = [[math.prod(shape) * dtype.itemsize for shape, dtype in some] for some in expected]
        buffer = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8, device=self.mesh.device_type)
        torch.distributed.all_to_all_single(
            buffer,
            torch.cat([buffer[:0], *[t for some in outgoing for t in some]]),
            list(map(sum, sizes)),
            [sum([t.numel() for t in some]) for some in outgoing],
            group=self.mesh.get_group(d),
        )
        arrived = iter(torch.split(buffer, [size for some in sizes for size in some]))
        return [[next(arrived).clone().view(dtype).view(shape) for shape, dtype in some] for some in expected]


def _owners(layouts: Layouts, states: Layouts) -> _Owners | None:
    """Find owners of tensors; None where they are not cut, or not in chunks, or their states in another way."""
    first = layouts[0]
    dims = None if first is None else first.chunked
    if first is None or not dims or first.mesh.get_coordinate() is None:
        return None
    for layout in states:
        own = [] if layout is None else layout.chunked
        if own is None or own != [d for d in dims if d in own] or (layout is not None and layout.mesh != first.mesh):
            return None
    return _Owners([layout for layout in layouts if layout is not None], dims)


def spread(work: Sequence[int], ranks: int) -> list[int]:
    """Choose a rank for each piece of work, so that all have about the same: the largest first, to the least busy."""
    busy, chosen = [0] * ranks, [0] * len(work)
    for i in sorted(range(len(work)), key=work.__getitem__, reverse=True):
        chosen[i] = min(range(ranks), key=busy.__getitem__)
        busy[chosen[i]] += work[i]
    return chosen


def _work(shape: torch.Size) -> int:
    """Return the multiplications of a product of the tensor with a square matrix, to a factor."""
    return shape.numel() * (sorted(shape)[-2] if len(shape) > 1 else 1)


def _part(length: int, ranks: int, c: int) -> slice:
    """Return which part of a dimension a rank has."""
    size = -(-length // ranks)
    return slice(min(c * size, length), min((c + 1) * size, length))


def _bytes(tensor: Tensor) -> Tensor:
    """View the numbers of a tensor as bytes; a stride of one number in a row, which matters to views, may be any."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _in_rows(tensors: list[Tensor], length: int, count: int) -> list[list[Tensor]]:
    return [tensors[k * length : (k + 1) * length] for k in range(count)]
