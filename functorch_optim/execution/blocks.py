"""In blocks: tensors are cut and put together, so that what a program computes with fits into the cache.

A large tensor is run over piece by piece, and small ones are copied together into one piece. So a step takes a few
buffers of the size of a block besides what it reads and writes, whatever the size of the largest tensor.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim.execution.kernel import kernel
from functorch_optim.execution.program import Program, record
from functorch_optim.execution.representation import Columns, map_columns, widened
from functorch_optim.rule import Rule

BLOCK = 1 << 17
"""Elements of a block: some buffers of half a MiB each stay in the cache, and the calls for each do not weigh."""
SMALL = 1 << 12
"""Elements below which it is cheaper to copy a tensor than to make the calls for it alone."""


def in_blocks(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, block by block, into new tensors."""
    program = record(rules, states, params is not None, scalars, widened(updates[0].new_empty(0)))
    new_updates = [torch.empty_like(update) for update in updates]
    new_states = [map_columns(torch.empty_like, state) for state in states]
    kept = [column for state in states for column in state]
    inputs = [updates, *([params] if params is not None else []), *kept]
    outputs = [new_updates, *[column for state in new_states for column in state]]
    in_place = ("g", *program.inputs[len(inputs) - len(kept) :])
    blocks = Blocks(program.dtype, [*inputs, *outputs])
    with torch.no_grad():
        cuts = [blocks.cut(column) for column in inputs], [blocks.cut(column) for column in outputs]
        run(program, blocks, *cuts, in_place, tree.flatten(list(scalars))[0])
    return new_updates, new_states


class Piece(NamedTuple):
    """A part of a tensor: all of it, or a range of its elements as they lie in memory.

    Attributes:
        index: of the tensor.
        start: first element.
        stop: first element that is not in it any more.
        whole: whether it is all.
    """

    index: int
    start: int
    stop: int
    whole: bool

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.stop - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Return this piece of a tensor, as a view."""
        return tensor if self.whole else flat(tensor)[self.start : self.stop]


class Cut(NamedTuple):
    """A list of tensors, cut.

    Attributes:
        alone: pieces of large tensors, to be run over where they are.
        packs: small pieces, in lists that are to be copied together.
    """

    alone: list[Tensor]
    packs: list[list[Tensor]]


class Blocks:
    """How lists of tensors are cut and put together.

    Args:
        dtype: what is computed in.
        columns: lists of tensors, an entry for each; those of one entry have the same shape. By them it is decided how.
        length: elements of the longest piece that is run over where it is; None for tensors of any length.
    """

    def __init__(self, dtype: torch.dtype, columns: Sequence[Sequence[Tensor]], length: int | None = BLOCK) -> None:
        self.dtype = dtype
        self.length = length
        self.alone: list[int] = []
        self.packs: list[list[Piece]] = []
        self.layouts = columns[0]
        filled = BLOCK
        for i, row in enumerate(zip(*columns, strict=True)):
            size = row[0].numel()
            dense = is_dense(row[0]) and all(tensor.stride() == row[0].stride() for tensor in row)
            if dense and size >= SMALL and all(tensor.dtype == dtype for tensor in row):
                self.alone.append(i)
                continue
            longest = BLOCK if dense else max(size, 1)
            for start in range(0, size, longest):
                piece = Piece(i, start, min(start + longest, size), size <= longest)
                if filled + piece.size > BLOCK:
                    self.packs.append([])
                    filled = 0
                self.packs[-1].append(piece)
                filled += piece.size

    def cut(self, column: Sequence[Tensor]) -> Cut:
        """Cut a list of tensors, into views of them."""
        alone: list[Tensor] = []
        for i in self.alone:
            tensor, layout = column[i], self.layouts[i]
            if tensor.stride() != layout.stride():
                tensor = torch.empty_like(layout).copy_(tensor)
            tensor = flat(tensor)
            alone += [tensor] if self.length is None else tensor.split(self.length)
        return Cut(alone, [[piece.of(column[piece.index]) for piece in pack] for pack in self.packs])

    def joined(self, inputs: Sequence[Cut], outputs: Sequence[tuple[Cut, int]]) -> Iterator[list[Tensor]]:
        """Yield copies of packs, each in one tensor for each input; then copy back what was made of them.

        Args:
            inputs: for each input, its tensors.
            outputs: tensors to write, and the index of the input in whose copy is what belongs into them.
        """
        for k, pack in enumerate(self.packs):
            sizes = [piece.size for piece in pack]
            # Two at least: compilers take one element for a special case.
            room = [torch.empty(max(2, sum(sizes)), dtype=self.dtype, device=cut.packs[k][0].device) for cut in inputs]
            views = []
            for tensor, cut in zip(room, inputs, strict=True):
                parts = tensor[: sum(sizes)].split(sizes)
                views.append([part.view(piece.shape) for part, piece in zip(parts, cut.packs[k], strict=True)])
                torch._foreach_copy_(views[-1], cut.packs[k])
            yield room
            for cut, index in outputs:
                torch._foreach_copy_(cut.packs[k], views[index])


def run(
    program: Program,
    blocks: Blocks,
    inputs: Sequence[Cut],
    outputs: Sequence[Cut],
    in_place: tuple[str, ...],
    numbers: Sequence[Any],
) -> None:
    """Run a program over tensors, block by block.

    Args:
        program: the program.
        blocks: how tensors are cut.
        inputs: for each of the program's inputs, its tensors.
        outputs: for each output, tensors to write; they may be those of an input.
        in_place: for each output, the input that it overwrites, or would if that were given up.
        numbers: the program's scalars.
    """
    overwritten = [program.inputs.index(name) for name in in_place]
    donated = all(cut is inputs[k] for cut, k in zip(outputs, overwritten, strict=True))
    over_inputs = kernel(program, in_place)
    apart = over_inputs if donated else kernel(program, None)
    room = _Room()
    for row in zip(*[cut.alone for cut in (inputs if donated else (*inputs, *outputs))], strict=True):
        apart.function(*row, *numbers, *room.of(apart.buffers, row[0]))
    for row in blocks.joined(inputs, list(zip(outputs, overwritten, strict=True))):
        over_inputs.function(*row, *numbers, *room.of(over_inputs.buffers, row[0]))


class _Room:
    """Buffers that are used again for the next block."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def of(self, dtypes: Sequence[torch.dtype], like: Tensor) -> list[Tensor]:
        size = like.numel()
        if [b.dtype for b in self.made] != list(dtypes) or any(b.numel() < size for b in self.made):
            self.made = [torch.empty(size, dtype=dtype, device=like.device) for dtype in dtypes]
        return [b if b.numel() == size else b[:size] for b in self.made]


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor as they lie in memory, as a view."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1)
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Tell whether the elements of a tensor fill a range of memory, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
