"""In blocks: tensors are cut and put together, so that the working set of a program fits into the cache.

A large tensor is run over piece by piece, and small ones are copied together into one piece. So a step takes a few
buffers of the size of a block besides its inputs and outputs, whatever the size of the largest tensor.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._execution.kernel import Kernel, kernel
from functorch_optim._execution.program import Program, overwritten

BLOCK = 1 << 18
"""Elements of a block: some buffers of a MiB each stay in the cache, and the calls for each do not weigh."""
SMALL = 1 << 15
"""Elements below which it is cheaper to copy a tensor than to make the calls for it alone."""


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
        dtype: the precision of the computation.
        columns: lists of tensors, an entry for each; those of one entry have the same shape. One of another dtype is
            copied, and so is run over in packs.
        layouts: for each entry, a tensor in whose order of memory elements are taken. One that lies otherwise is
            copied; so tensors that are to be written must not.
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
            if self.length is None or elements.numel() <= self.length:
                alone.append(elements)
            else:
                alone += torch.split(elements, self.length)
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

    def joined(
        self, inputs: Sequence[Cut], outputs: Sequence[tuple[Cut, int]], scratch: "Scratch"
    ) -> Iterator[list[Tensor]]:
        """Yield copies of packs, each in one tensor for each input; then copy the results back.

        Args:
            inputs: for each input, its tensors.
            outputs: tensors to write, and the index of the input whose copy holds their values.
            scratch: where the copies are.
        """
        for k, sizes in enumerate(self.sizes):
            copies = [scratch.part(f"pack {j}", self.dtype, sum(sizes)) for j in range(len(inputs))]
            for copy, cut in zip(copies, inputs, strict=True):
                torch.cat(cut.packs[k], out=copy)
            yield copies
            for cut, index in outputs:
                torch._foreach_copy_(cut.packs[k], scratch.parts(f"pack {index}", self.dtype, sizes))

    def reserve(self, count: int, scratch: "Scratch") -> None:
        """Take the memory for copies of packs, of so many inputs."""
        for j in range(count):
            scratch.part(f"pack {j}", self.dtype, max(map(sum, self.sizes), default=0))


class Scratch(threading.local):
    """Memory to work in, for one block after the other; each thread has its own, and all programs share it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self.views: dict[tuple[str, torch.dtype, int], Tensor] = {}
        self.splits: dict[tuple[str, torch.dtype, tuple[int, ...]], list[Tensor]] = {}

    @staticmethod
    @functools.lru_cache
    def of(device: torch.device) -> "Scratch":
        """Return the memory on a device."""
        return Scratch(device)

    def part(self, name: str, dtype: torch.dtype, size: int) -> Tensor:
        """Return a tensor of a size; for one name and dtype it is always in the same memory."""
        key = (name, dtype)
        if key not in self.memory or self.memory[key].numel() < size:
            with torch.inference_mode(False):  # the next step may be made outside of it
                self.memory[key] = torch.empty(size, dtype=dtype, device=self.device)
            self.views, self.splits = {}, {}
        view = self.views.get((name, dtype, size))
        if view is None:
            self.views[name, dtype, size] = view = self.memory[key][:size]
        return view

    def parts(self, name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> list[Tensor]:
        """Return the same in parts."""
        whole = self.part(name, dtype, sum(sizes))
        parts = self.splits.get((name, dtype, sizes))
        if parts is None:
            if len(self.splits) >= _MANY:
                self.splits = {}
            parts = self.splits[name, dtype, sizes] = list(torch.split(whole, list(sizes)))
        return parts


_MANY = 64
"""Lists of parts that are kept."""


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
    indices = [program.inputs.index(name) for name in in_place]
    donated = all(cut is inputs[k] for cut, k in zip(outputs, indices, strict=True))
    over_inputs = kernel(program, in_place)
    apart = over_inputs if donated else kernel(program, None)
    scratch = Scratch.of(program.device)

    for row in zip(*[cut.alone for cut in (inputs if donated else (*inputs, *outputs))], strict=True):
        call(apart, row, numbers, scratch)
    for copies in blocks.joined(inputs, list(zip(outputs, indices, strict=True)), scratch):
        call(over_inputs, copies, numbers, scratch)


def call(of: Kernel, row: Sequence[Tensor], numbers: Sequence[Any], scratch: Scratch) -> None:
    """Call a kernel on tensors of one size: inputs, and outputs where it has some."""
    size = row[0].numel()
    of.function(*row, *numbers, *[scratch.part(f"{i} {dtype}", dtype, size) for i, dtype in enumerate(of.buffers)])


class InBlocks:
    """Runs a program in blocks."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.overwritten = overwritten(program)

    def new(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> list[list[Tensor]]:
        """Run into new tensors."""
        column = inputs[0]
        layouts = [layout_of(tensor) for tensor in column]
        blocks = Blocks(self.program.dtype, inputs, layouts)
        outputs = [
            [empty_like(t, layout) for t, layout in zip(inputs[self.program.inputs.index(name)], layouts, strict=True)]
            for name in self.overwritten
        ]
        cuts = [blocks.cut(some) for some in inputs], [blocks.cut(some) for some in outputs]
        run(self.program, blocks, *cuts, self.overwritten, numbers)
        return outputs

    def over(self, columns: Sequence[list[Tensor]]) -> "OverBlocks":
        """Get ready to overwrite parameters and states; see `Overwriting`."""
        return OverBlocks(self.program, self.overwritten, columns)


class OverBlocks:
    """Parameters and states, cut into blocks that are overwritten."""

    length: int | None = BLOCK
    small: int = SMALL

    def __init__(self, program: Program, overwritten: tuple[str, ...], columns: Sequence[list[Tensor]]) -> None:
        self.program, self.overwritten = program, overwritten
        columns = [[tensor.detach() for tensor in column] for column in columns]
        layouts = [layout_of(tensor) for tensor in columns[0]]
        self.mirrors: list[tuple[Tensor, Tensor]] = []  # tensors that lie otherwise, and copies that lie right
        lying = [self._lying(column, layouts) for column in columns]
        self.blocks = Blocks(program.dtype, lying, layouts, self.length, self.small)
        self.cuts = [self.blocks.cut(column) for column in lying]
        self.written = [self.cuts[program.inputs.index(name) - 1] for name in overwritten]

    def __call__(self, updates: list[Tensor], numbers: Sequence[Any]) -> Callable[[], None]:
        """Take the memory for a step, and return the step."""
        inputs = [self.blocks.cut(updates, to_read=True), *self.cuts]
        self.reserve()
        return functools.partial(self.step, inputs, numbers)

    def reserve(self) -> None:
        """Take the memory that a step works in, so that it does not run out when something has been written."""
        scratch = Scratch.of(self.program.device)
        self.blocks.reserve(len(self.program.inputs), scratch)
        longest = max([*map(Tensor.numel, self.cuts[0].alone), *map(sum, self.blocks.sizes)], default=0)
        for i, dtype in enumerate(kernel(self.program, self.overwritten).buffers):
            scratch.part(f"{i} {dtype}", dtype, longest)

    def step(self, inputs: Sequence[Cut], numbers: Sequence[Any]) -> None:
        """Overwrite, also tensors that lie otherwise."""
        for tensor, mirror in self.mirrors:
            mirror.copy_(tensor)
        self.run(inputs, numbers)
        for tensor, mirror in self.mirrors:
            tensor.copy_(mirror)

    def run(self, inputs: Sequence[Cut], numbers: Sequence[Any]) -> None:
        """Overwrite."""
        run(self.program, self.blocks, inputs, self.written, self.overwritten, numbers)

    def _lying(self, column: list[Tensor], layouts: list[Tensor]) -> list[Tensor]:
        """Replace tensors that do not lie in memory as their parameter does by copies."""
        lying = []
        for tensor, layout in zip(column, layouts, strict=True):
            if lies(tensor, layout):
                lying.append(tensor)
            else:
                lying.append(empty_like(tensor, layout))
                self.mirrors.append((tensor, lying[-1]))
        return lying


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
