"""In blocks: tensors are cut and put together, so that what a program computes with fits into the cache.

A large tensor is run over piece by piece, and small ones are copied together into one piece. So a step takes a few
buffers of the size of a block besides what it reads and writes, whatever the size of the largest tensor.
"""

from collections.abc import Callable, Iterator, Sequence
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
    run(Blocks(program, [*inputs, *outputs]), inputs, outputs, in_place, tree.flatten(list(scalars))[0])
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

    def of(self, tensor: Tensor) -> Tensor:
        """Return this piece of a tensor."""
        return tensor if self.whole else flat(tensor)[self.start : self.stop]


class Blocks:
    """How tensors are cut and put together.

    Args:
        program: what will run over them.
        columns: lists of tensors, an entry for each; those of one entry have the same shape. By them it is decided how.
        cut: whether to cut large tensors of the program's dtype.
    """

    def __init__(self, program: Program, columns: Sequence[Sequence[Tensor]], *, cut: bool = True) -> None:
        self.program = program
        self.cut = cut
        self.alone: list[int] = []  # tensors that are run over where they are
        self.packs: list[list[Piece]] = [[]]  # pieces that are copied together
        filled = 0
        for i, row in enumerate(zip(*columns, strict=True)):
            size = row[0].numel()
            dense = is_dense(row[0]) and all(tensor.stride() == row[0].stride() for tensor in row)
            if dense and size >= SMALL and all(tensor.dtype == program.dtype for tensor in row):
                self.alone.append(i)
                continue
            length = BLOCK if dense else max(size, 1)
            for start in range(0, size, length):
                piece = Piece(i, start, min(start + length, size), size <= length)
                if filled + piece.stop - start > BLOCK and self.packs[-1]:
                    self.packs.append([])
                    filled = 0
                self.packs[-1].append(piece)
                filled += piece.stop - start
        self.packs = [pack for pack in self.packs if pack]

    def ranges(self, columns: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
        """Yield the pieces, of all columns, of tensors that are run over where they are."""
        for i in self.alone:
            row = [flat(column[i]) for column in columns]
            if not self.cut or row[0].numel() <= BLOCK:
                yield row
            else:
                yield from map(list, zip(*[tensor.split(BLOCK) for tensor in row], strict=True))

    def packed(
        self, inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Sequence[Tensor]], overwritten: Sequence[int]
    ) -> Iterator[list[Tensor]]:
        """Yield copies of small pieces in one tensor for each input; then copy back what was made of them.

        Args:
            inputs: for each input, its tensors.
            outputs: for each output, its tensors.
            overwritten: for each output, the input in whose copy it will be found.
        """
        for pack in self.packs:
            size = sum([piece.stop - piece.start for piece in pack])
            room = [torch.empty(size, dtype=self.program.dtype, device=inputs[0][0].device) for _ in inputs]
            views = [_views(tensor, pack, inputs[0]) for tensor in room]
            for column, some in zip(inputs, views, strict=True):
                torch._foreach_copy_(some, [piece.of(column[piece.index]) for piece in pack])
            yield room
            for column, k in zip(outputs, overwritten, strict=True):
                torch._foreach_copy_([piece.of(column[piece.index]) for piece in pack], views[k])


def run(
    blocks: Blocks,
    inputs: Sequence[Sequence[Tensor]],
    outputs: Sequence[Sequence[Tensor]],
    in_place: tuple[str, ...],
    numbers: Sequence[Any],
    compiled: Callable[..., None] | None = None,
) -> None:
    """Run a program over tensors, block by block.

    Args:
        blocks: how they are cut.
        inputs: for each of the program's inputs, a list of tensors.
        outputs: for each output, a list of tensors to write; it may be that of an input.
        in_place: for each output, the input that it overwrites, or would if that were given up.
        numbers: the program's scalars.
        compiled: the program as a function that overwrites its inputs; None to run it by torch's own functions.
    """
    program = blocks.program
    overwritten = [program.inputs.index(name) for name in in_place]
    donated = all(outputs[j] is inputs[k] for j, k in enumerate(overwritten))
    if compiled is not None:
        for row in _all(blocks.ranges(inputs), blocks.packed(inputs, outputs, overwritten)):
            compiled(*row, *numbers)
        return
    here = kernel(program, in_place)
    there = here if donated else kernel(program, None)
    room = _Room()
    with torch.no_grad():
        for row in blocks.ranges(inputs if donated else [*inputs, *outputs]):
            there.function(*row, *numbers, *room.of(there.buffers, row[0]))
        for row in blocks.packed(inputs, outputs, overwritten):
            here.function(*row, *numbers, *room.of(here.buffers, row[0]))


def _all(*several: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    for some in several:
        yield from some


class _Room:
    """Buffers that are used again for the next block."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def of(self, dtypes: Sequence[torch.dtype], like: Tensor) -> list[Tensor]:
        size = like.numel()
        if [b.dtype for b in self.made] != list(dtypes) or any(b.numel() < size for b in self.made):
            self.made = [torch.empty(size, dtype=dtype, device=like.device) for dtype in dtypes]
        return [b if b.numel() == size else b[:size] for b in self.made]


def _views(tensor: Tensor, pack: Sequence[Piece], like: Sequence[Tensor]) -> list[Tensor]:
    parts = tensor.split([piece.stop - piece.start for piece in pack])
    return [part.view(like[piece.index].shape) if piece.whole else part for piece, part in zip(pack, parts, strict=True)]


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
