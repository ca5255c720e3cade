"""In blocks: tensors are cut and put together, so that what a program computes with fits into the cache.

A large tensor is run over piece by piece, and small ones are copied together into one piece. So a step takes a few
buffers of the size of a block besides what it reads and writes, whatever the size of the largest tensor.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.rule import Rule
from functorch_optim._execution.foreach import foreach
from functorch_optim._execution.kernel import Kernel, kernel
from functorch_optim._execution.program import Program, record
from functorch_optim._execution.representation import Columns, make, widened

BLOCK = 1 << 18
"""Elements of a block: some buffers of a MiB each stay in the cache, and the calls for each do not weigh."""
SMALL = 1 << 15
"""Elements below which it is cheaper to copy a tensor than to make the calls for it alone."""


def in_blocks(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, into new tensors: block by block, and on small ones with foreach ops.

    To put small tensors together and to take the results apart again costs more than a few calls for each.
    """
    program = record(rules, states, params is not None, scalars, widened(updates[0].new_empty(0)))
    is_small = [update.numel() < SMALL for update in updates]
    if any(is_small):
        return _parted(is_small, rules, updates, states, params, scalars)
    kept = [column for state in states for column in state]
    inputs = [updates, *([params] if params is not None else []), *kept]
    layouts = [layout_of(update) for update in updates]
    outputs = [[empty_like(t, at) for t, at in zip(column, layouts, strict=True)] for column in (updates, *kept)]
    in_place = ("g", *program.inputs[len(inputs) - len(kept) :])
    blocks = Blocks(program.dtype, inputs, layouts)
    with torch.no_grad():
        cuts = [blocks.cut(column) for column in inputs], [blocks.cut(column) for column in outputs]
        run(program, blocks, *cuts, in_place, tree.flatten(list(scalars))[0], Room(updates[0].device))
    new_columns = iter(outputs[1:])
    return outputs[0], [make(type(state), [next(new_columns) for _ in state]) for state in states]


def _parted(
    is_small: list[bool],
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules on small tensors with foreach ops, and on others block by block."""

    def of(column: list[Tensor], which: bool) -> list[Tensor]:
        chosen = [tensor for tensor, small in zip(column, is_small, strict=True) if small == which]
        return [widened(tensor) for tensor in chosen] if which else chosen

    def run_on(which: bool) -> tuple[list[Tensor], list[Columns]]:
        some = [make(type(state), [of(column, which) for column in state]) for state in states]
        way = foreach if which else in_blocks
        return way(rules, of(updates, which), some, None if params is None else of(params, which), scalars)

    small = run_on(True)
    if all(is_small):
        return small
    large = run_on(False)

    def merged(some: list[Tensor], others: list[Tensor]) -> list[Tensor]:
        of_small, of_large = iter(some), iter(others)
        return [next(of_small if small else of_large) for small in is_small]

    columns = [
        make(type(state), [merged(*fields) for fields in zip(*both, strict=True)])
        for state, *both in zip(states, small[1], large[1], strict=True)
    ]
    return merged(small[0], large[0]), columns


class Piece(NamedTuple):
    """A part of a tensor: all of it, or a range of its elements as they lie in memory.

    Attributes:
        i: index of the tensor.
        start: first element.
        stop: first element that is not in it any more.
        whole: whether it is all.
    """

    i: int
    start: int
    stop: int
    whole: bool

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.stop - self.start


class Cut(NamedTuple):
    """A list of tensors, cut into pieces of one dimension.

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
        columns: lists of tensors, an entry for each; those of one entry have the same shape. What has another dtype is
            copied, and so is run over in packs.
        layouts: for each entry, a tensor in whose order of memory elements are taken. What lies otherwise is copied; so
            tensors that are to be written must not.
        length: elements of the longest piece that is run over where it is; None for tensors of any length.
        small: elements below which a tensor is copied.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        columns: Sequence[Sequence[Tensor]],
        layouts: Sequence[Tensor],
        length: int | None = BLOCK,
        small: int = SMALL,
    ) -> None:
        self.dtype, self.layouts, self.length = dtype, layouts, length
        self.alone: list[int] = []
        self.packs: list[list[Piece]] = []
        filled = BLOCK
        for i, row in enumerate(zip(*columns, strict=True)):
            size = row[0].numel()
            if size >= small and all(tensor.dtype == dtype for tensor in row):
                self.alone.append(i)
                continue
            for start in range(0, size, BLOCK):
                piece = Piece(i, start, min(start + BLOCK, size), size <= BLOCK)
                if filled + piece.size > BLOCK:
                    self.packs.append([])
                    filled = 0
                self.packs[-1].append(piece)
                filled += piece.size
        self.sizes = [tuple([piece.size for piece in pack]) for pack in self.packs]
        self.in_order = [all(piece.whole and layouts[piece.i].is_contiguous() for piece in pack) for pack in self.packs]

    def cut(self, column: Sequence[Tensor], *, to_read: bool = False) -> Cut:
        """Cut a list of tensors into views of them, or of copies where they lie otherwise in memory.

        Args:
            column: the tensors.
            to_read: whether the packs may be put together at once, since they are not to be written.
        """
        alone: list[Tensor] = []
        for i in self.alone:
            elements = flat(column[i], self.layouts[i])
            alone += [elements] if self.length is None else torch.split(elements, self.length)
        packs = [
            self._pieces(column, pack)
            if not (to_read and in_order)
            # One call, and no view of each.
            else [torch._C._nn.flatten_dense_tensors([column[piece.i] for piece in pack])]
            for pack, in_order in zip(self.packs, self.in_order, strict=True)
        ]
        return Cut(alone, packs)

    def _pieces(self, column: Sequence[Tensor], pack: Sequence[Piece]) -> list[Tensor]:
        elements = [flat(column[piece.i], self.layouts[piece.i]) for piece in pack]
        return [e if piece.whole else e[piece.start : piece.stop] for e, piece in zip(elements, pack, strict=True)]

    def joined(self, inputs: Sequence[Cut], outputs: Sequence[tuple[Cut, int]], room: "Room") -> Iterator[list[Tensor]]:
        """Yield copies of packs, each in one tensor for each input; then copy back what was made of them.

        Args:
            inputs: for each input, its tensors.
            outputs: tensors to write, and the index of the input in whose copy is what belongs into them.
            room: where the copies are.
        """
        for k, sizes in enumerate(self.sizes):
            copies = [room.of(f"pack {j}", self.dtype, sum(sizes)) for j in range(len(inputs))]
            for copy, cut in zip(copies, inputs, strict=True):
                torch.cat(cut.packs[k], out=copy)
            yield copies
            for cut, index in outputs:
                torch._foreach_copy_(cut.packs[k], room.parts(f"pack {index}", self.dtype, sizes))

    def reserve(self, count: int, room: "Room") -> None:
        """Take the memory for copies of packs, of so many inputs."""
        for j in range(count):
            room.of(f"pack {j}", self.dtype, max(map(sum, self.sizes), default=0))


class Room:
    """Memory to work in, for one block after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: dict[str, Tensor] = {}
        self.views: dict[tuple[str, int], Tensor] = {}
        self.splits: dict[tuple[str, tuple[int, ...]], list[Tensor]] = {}

    def of(self, name: str, dtype: torch.dtype, size: int) -> Tensor:
        """Return a tensor of a size; for one name it is always in the same memory."""
        view = self.views.get((name, size))
        if view is None:
            if name not in self.memory or self.memory[name].numel() < size:
                self.memory[name] = torch.empty(size, dtype=dtype, device=self.device)
                self.views = {key: old for key, old in self.views.items() if key[0] != name}
                self.splits = {key: old for key, old in self.splits.items() if key[0] != name}
            view = self.views[name, size] = self.memory[name][:size]
        return view

    def parts(self, name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Tensor]:
        """Return the same in parts."""
        parts = self.splits.get((name, sizes))
        if parts is None:
            parts = self.splits[name, sizes] = list(torch.split(self.of(name, dtype, sum(sizes)), list(sizes)))
        return parts


def run(
    program: Program,
    blocks: Blocks,
    inputs: Sequence[Cut],
    outputs: Sequence[Cut],
    in_place: tuple[str, ...],
    numbers: Sequence[Any],
    room: Room,
) -> None:
    """Run a program over tensors, block by block.

    Args:
        program: the program.
        blocks: how tensors are cut.
        inputs: for each of the program's inputs, its tensors.
        outputs: for each output, tensors to write; they may be those of an input.
        in_place: for each output, the input that it overwrites, or would if that were given up.
        numbers: the program's scalars.
        room: memory to work in.
    """
    overwritten = [program.inputs.index(name) for name in in_place]
    donated = all(cut is inputs[k] for cut, k in zip(outputs, overwritten, strict=True))
    over_inputs = kernel(program, in_place)
    apart = over_inputs if donated else kernel(program, None)

    def call(of: Kernel, row: Sequence[Tensor]) -> None:
        size = row[0].numel()
        of.function(*row, *numbers, *[room.of(f"{i} {dtype}", dtype, size) for i, dtype in enumerate(of.buffers)])

    for row in zip(*[cut.alone for cut in (inputs if donated else (*inputs, *outputs))], strict=True):
        call(apart, row)
    for copies in blocks.joined(inputs, list(zip(outputs, overwritten, strict=True)), room):
        call(over_inputs, copies)


def reserve(program: Program, blocks: Blocks, cut: Cut, in_place: tuple[str, ...], room: Room) -> None:
    """Take the memory that `run` works in, so that it does not run out when something has been written."""
    longest = max([*map(Tensor.numel, cut.alone), *map(sum, blocks.sizes)], default=0)
    for i, dtype in enumerate(kernel(program, in_place).buffers):
        room.of(f"{i} {dtype}", dtype, longest)


def flat(tensor: Tensor, layout: Tensor) -> Tensor:
    """Return the elements of a tensor in the order of a layout: a view if the tensor lies so."""
    if layout.is_contiguous():
        return tensor.reshape(-1)
    if not lies(tensor, layout):
        tensor = empty_like(tensor, layout).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def lies(tensor: Tensor, layout: Tensor) -> bool:
    """Tell whether a tensor lies in memory as a layout does."""
    return tensor.is_contiguous() if layout.is_contiguous() else tensor.stride() == layout.stride()


def layout_of(tensor: Tensor) -> Tensor:
    """Return a tensor that lies in memory as this one does, or without gaps if this has some."""
    if tensor.is_contiguous():
        return tensor
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return torch.empty(tensor.shape, device="meta")
        expected *= size
    return tensor


def empty_like(tensor: Tensor, layout: Tensor) -> Tensor:
    """Make a tensor like this one that lies in memory as a layout does."""
    return torch.empty_strided(layout.shape, layout.stride(), dtype=tensor.dtype, device=tensor.device)
