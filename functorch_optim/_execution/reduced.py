"""Rules that take norms of their tensor: programs that are run in blocks, once for the norms and once for the results.

A norm splits a program. The first part computes its argument block by block, and adds up; the argument is not kept. The
norms of all tensors make a vector. Numbers that depend on them are computed for all tensors at once. With these numbers
the program is run again.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._execution import fused
from functorch_optim._execution.blocks import SMALL, Blocks, Cut, OverBlocks, Scratch, call, empty_like, layout_of, run
from functorch_optim._execution.calls import is_tensor
from functorch_optim._execution.kernel import kernel, pure, summing
from functorch_optim._execution.program import NORMS, Instruction, Name, Program, needed, overwritten
from functorch_optim._execution.representation import widened
from functorch_optim._execution.wholes import Wholes
from functorch_optim._numerics import mean_norm, safe_norm


class Inputs(NamedTuple):
    """The inputs of a program for one tensor, in blocks."""

    blocks: Blocks
    cuts: Sequence[Cut]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return self.blocks.layouts[0].numel()

    def rows(self, scratch: Scratch) -> Iterator[Sequence[Tensor]]:
        """Yield the blocks, one at least: a tensor for each input."""
        if not self.size:
            yield [scratch.part("nothing", self.blocks.dtype, 0)] * len(self.cuts)
            return
        yield from zip(*[cut.alone for cut in self.cuts], strict=True)
        yield from self.blocks.joined(self.cuts, [], scratch)


class Norm(NamedTuple):
    """A norm that a program takes.

    Attributes:
        of: the value that it is of.
        result: its name.
        p: its order; None for a sum.
        mean: whether it is that of a mean.
    """

    of: Name
    result: Name
    p: float | None
    mean: bool

    @classmethod
    def taken(cls, instruction: Instruction) -> "Norm":
        """Read a norm off the instruction that takes it."""
        order: Any = (*instruction.args[1:], *dict(instruction.kwargs).values(), 2.0)[0]
        p = 1.0 if instruction.function is mean_norm else float(order)
        return cls(instruction.args[0], instruction.result, p, instruction.function is not safe_norm)

    def joined(self, parts: Tensor) -> Tensor:
        """Join the contributions of blocks, or ranks: the first dimension."""
        return parts.amax(0) if self.p == math.inf else parts.sum(0)

    def of_total(self, total: Tensor, sizes: list[int]) -> Tensor:
        """Return the norms of tensors of some sizes, given the contributions of all their elements."""
        if self.p == math.inf:
            return total
        if self.mean:
            total = total / torch.tensor(sizes, dtype=torch.float64, device=total.device).clamp_(min=1)
        return total if self.p in (None, 1) else total.sqrt() if self.p == 2 else total.pow(1 / self.p)


@functools.cache
def _contribution(p: float | None) -> Callable[[Tensor], Tensor]:
    """Return the function of a float64 block that computes its contribution to a norm, and overwrites it."""

    def contribution(block: Tensor) -> Tensor:
        if p is None:
            return block.sum()
        if p == math.inf:
            return block.abs_().amax() if block.numel() else block.sum()
        if p == 2:
            return block.square_().sum() if torch.compiler.is_compiling() else block.dot(block)
        return block.abs_().sum() if p == 1 else block.abs_().pow_(p).sum()

    return contribution


@functools.cache
def _summed(p: float | None) -> Callable[[Tensor], Tensor]:
    """Return the same function of a block of any dtype, which stays as it is."""
    contribution = _contribution(p)
    return lambda values: contribution(values.to(torch.float64, copy=True))


class Level:
    """Norms that depend on no others but those of the levels before.

    Args:
        before: instructions that compute numbers which `program` reads.
        program: computes the values that the norms are of, where these are no inputs.
        norms: the norms.

    Attributes:
        compiled: the compiled function of a block that returns its contributions; None where there is none.
    """

    def __init__(self, before: Sequence[Instruction], program: Program, norms: Sequence[Norm]) -> None:
        self.before, self.program, self.norms = before, program, norms
        self.compiled: Callable[..., Tensor] | None = None
        inputs, outputs = program.inputs, program.outputs
        self.places = [inputs.index(n.of) if n.of in inputs else len(inputs) + outputs.index(n.of) for n in norms]

    def take(self, tensors: Sequence[Inputs], values: "_Values", shards: Wholes | None) -> None:
        """Take the norms of all tensors; of all their shards where these are some."""
        values.compute(self.before)
        scratch = Scratch.of(self.program.device)
        found = []
        for one, numbers in zip(tensors, values.rows(self.program.numbers), strict=True):
            found.append(self.contributions(one, numbers, scratch))
        totals = torch.stack(found, 1)
        sizes = [one.size for one in tensors]
        if shards is not None:
            ranks, sizes = shards.of_ranks(totals), shards.sizes
            totals = torch.stack([norm.joined(ranks[:, k]) for k, norm in enumerate(self.norms)])
        for norm, total in zip(self.norms, totals, strict=True):
            values.known[norm.result] = norm.of_total(total, sizes).to(values.dtype)

    def source(self) -> Callable[..., Tensor]:
        """Write the function that computes the contributions of a block, for a compiler."""
        return summing(self.program, tuple([(norm.of, _summed(norm.p)) for norm in self.norms]))

    def contributions(self, tensors: Inputs, numbers: Sequence[Any], scratch: Scratch) -> Tensor:
        """Return the contributions of tensors to all norms."""
        parts = torch.stack([self._of_block(row, numbers, scratch) for row in tensors.rows(scratch)])
        return torch.stack([norm.joined(parts[:, k]) for k, norm in enumerate(self.norms)])

    def _of_block(self, row: Sequence[Tensor], numbers: Sequence[Any], scratch: Scratch) -> Tensor:
        """Return the contributions of a block to all norms."""
        size = row[0].numel()
        if self.compiled is not None and size >= SMALL:
            return self.compiled(*row, fused.together(self.program, numbers))
        outputs = [scratch.part(f"norm {j}", self.program.dtype, size) for j in range(len(self.program.outputs))]
        columns = (*row, *outputs)
        if outputs:
            call(kernel(self.program, None), columns, numbers, scratch)
        parts = []
        for norm, place in zip(self.norms, self.places, strict=True):
            block = scratch.part("norm", torch.float64, size).copy_(columns[place].view(-1))
            parts.append(_contribution(norm.p)(block))
        return torch.stack(parts)


class _Values:
    """Numbers of a step: one for all tensors, or a vector that has one for each.

    Args:
        known: those that are known.
        count: of the tensors.
        dtype: that of vectors.
    """

    def __init__(self, known: dict[Any, Any], count: int, dtype: torch.dtype) -> None:
        self.known, self.count, self.dtype = known, count, dtype

    def compute(self, instructions: Sequence[Instruction]) -> None:
        """Compute numbers from numbers."""
        for instruction in instructions:
            differs = any([self._differs(name) for name in instruction.names])  # noqa: C419

            def given(value: Any, differs: bool = differs) -> Any:
                number = self.known[value] if isinstance(value, Name) else value
                # Functions such as torch.maximum take tensors alone.
                is_number = differs and isinstance(value, Name) and not isinstance(number, Tensor)
                return torch.tensor(number, dtype=self.dtype, device="cpu") if is_number else number

            kwargs = {key: given(value) for key, value in instruction.kwargs}
            self.known[instruction.result] = instruction.function(*map(given, instruction.args), **kwargs)

    def rows(self, names: Sequence[Name]) -> Iterator[tuple[Any, ...]]:
        """Yield the values of numbers for one tensor after the other."""
        columns = [self._column(name) for name in names]
        return zip(*columns, strict=True) if columns else iter([()] * self.count)

    def vector(self, name: Name) -> Tensor:
        """Return a number for each tensor."""
        number: Tensor = self.known[name]
        if self._differs(name):
            return number
        return torch.full((self.count,), float(number), dtype=torch.float64, device="cpu")

    def _column(self, name: Name) -> Sequence[Any]:
        number = self.known[name]
        if not self._differs(name):
            return [number] * self.count
        return number.unbind() if number.dtype == torch.bool else number.tolist()  # type: ignore[no-any-return]

    def _differs(self, name: Name) -> bool:
        number = self.known[name]
        return isinstance(number, Tensor) and number.ndim > 0


class Reduced:
    """Runs a program that takes norms.

    Args:
        program: the program.
        shards: how tensors are sharded, where these are shards: the norms are those of the whole tensors.
        compiles: whether a compiler makes one function of the norms, and one of the results. Small tensors, and new
            ones, are run without.
    """

    def __init__(self, program: Program, shards: Wholes | None = None, compiles: bool = False) -> None:
        self.shards = shards
        self.given = program.numbers
        self.inputs = program.inputs
        pairs = zip(overwritten(program), program.outputs, strict=True)
        self.held: dict[str, Name] = {name: made for name, made in pairs if not is_tensor(Name(name))}
        elementwise = replace(
            program,
            inputs=tuple(filter(is_tensor, program.inputs)),
            outputs=tuple(filter(is_tensor, program.outputs)),
        )
        self.overwritten = overwritten(elementwise)
        self.levels, self.last, self.program = _parted(
            elementwise, [Name(name) for name in self.held], tuple(self.held.values())
        )
        self.compiled: Callable[..., None] | None = None
        if compiles:
            self._compile()

    def _compile(self) -> None:
        """Compile all functions or none, so that there is one warning where that fails."""
        sources = [(level.program, level.source()) for level in self.levels]
        kernels = []
        results: Callable[..., Any] = pure(self.program, self.overwritten)
        for program, source in (*sources, (self.program, results)):
            compiled = fused.tried(program, source)
            if compiled is None:
                return
            kernels.append(compiled)
        *of_levels, self.compiled = kernels
        for level, of_level in zip(self.levels, of_levels, strict=True):
            level.compiled = of_level

    def parted(self, columns: Sequence[list[Tensor]]) -> tuple[list[list[Tensor]], dict[Any, list[Tensor]]]:
        """Part the last inputs, or all: those that differ between elements, and those that are numbers, by name."""
        named = list(zip(self.inputs[-len(columns) :], columns, strict=True))
        return [some for name, some in named if is_tensor(name)], {n: some for n, some in named if not is_tensor(n)}

    def new(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> list[list[Tensor]]:
        """Run into new tensors."""
        inputs, held = self.parted(inputs)
        layouts = list(map(layout_of, inputs[0]))
        tensors = []
        for layout, *row in zip(layouts, *inputs, strict=True):
            blocks = Blocks(self.program.dtype, [[tensor] for tensor in row], [layout], small=0)
            tensors.append(Inputs(blocks, [blocks.cut([tensor]) for tensor in row]))
        own, kept = self.numbers(tensors, held, numbers)
        columns = [inputs[self.program.inputs.index(name)] for name in self.overwritten]
        made = [[empty_like(t, layout) for t, layout in zip(some, layouts, strict=True)] for some in columns]
        for one, some, *row in zip(tensors, own, *made, strict=True):
            written = [one.blocks.cut([tensor]) for tensor in row]
            run(self.program, one.blocks, one.cuts, written, self.overwritten, some)
        outputs = iter(made)
        states = [name for name in self.inputs if name.startswith(("x", "n_x"))]
        first = [next(outputs)] if self.program.updates else []
        return [*first, *[kept[name] if name in kept else next(outputs) for name in states]]

    def over(self, columns: Sequence[list[Tensor]]) -> "_OverReduced":
        """Get ready to overwrite parameters and states; see `Overwriting`."""
        return _OverReduced(self, columns)

    def numbers(
        self, tensors: Sequence[Inputs], held: dict[Any, list[Tensor]], numbers: Sequence[Any]
    ) -> tuple[list[tuple[Any, ...]], dict[Any, list[Tensor]]]:
        """Take the norms.

        Args:
            tensors: that are given, in blocks.
            held: the numbers of states, by name.
            numbers: those of the step.

        Returns:
            The numbers of `program`, for one tensor after the other; and the new numbers of states.
        """
        values = _Values(dict(zip(self.given, numbers, strict=True)), len(tensors), self.program.dtype)
        values.known.update({name: widened(torch.stack(column)) for name, column in held.items()})
        for level in self.levels:
            level.take(tensors, values, self.shards)
        values.compute(self.last)
        new = {name: values.vector(made).to(held[name][0].dtype).unbind() for name, made in self.held.items()}
        return list(values.rows(self.program.numbers)), {name: list(some) for name, some in new.items()}


class _OverReduced:
    """Parameters and states that are overwritten, each tensor by itself."""

    def __init__(self, machine: Reduced, columns: Sequence[list[Tensor]]) -> None:
        self.machine = machine
        columns, self.held = machine.parted(columns)
        rows = zip(*columns, strict=True)
        self.tensors = [
            _OverOne(machine.program, machine.overwritten, [[tensor] for tensor in row], machine.compiled)
            for row in rows
        ]
        sizes = {bool(one.blocks.packs): one for one in sorted(self.tensors, key=_size)}
        self.largest = list(sizes.values())

    def __call__(self, updates: list[Tensor], numbers: Sequence[Any]) -> Callable[[], None]:
        """Take the norms, and the memory for a step, and return the step."""
        inputs = [one.inputs(update) for one, update in zip(self.tensors, updates, strict=True)]
        own, kept = self.machine.numbers(inputs, self.held, numbers)
        for one in self.largest:
            one.reserve()

        def step() -> None:
            for tensor, given, some in zip(self.tensors, inputs, own, strict=True):
                tensor.step(given.cuts, some)
            for name, column in self.held.items():
                torch._foreach_copy_(column, kept[name])

        return step


class _OverOne(OverBlocks):
    """A parameter and its states."""

    small = 0

    def __init__(
        self,
        program: Program,
        overwritten: tuple[str, ...],
        columns: Sequence[list[Tensor]],
        compiled: Callable[..., None] | None,
    ) -> None:
        self.compiled = compiled if columns[0][0].numel() >= SMALL else None
        if self.compiled is not None:
            self.length = None  # compiled functions need no buffers, and a call of one takes long
        super().__init__(program, overwritten, columns)

    def run(self, inputs: Sequence[Cut], numbers: Sequence[Any]) -> None:
        """Overwrite."""
        if self.compiled is None:
            super().run(inputs, numbers)
        else:
            fused.run(self.compiled, self.program, self.blocks, inputs, self.written, self.overwritten, numbers)

    def inputs(self, update: Tensor) -> Inputs:
        """Return them and an update, as they are now."""
        for tensor, mirror in self.mirrors:
            mirror.copy_(tensor)
        return Inputs(self.blocks, [self.blocks.cut([update], to_read=True), *self.cuts])


def _size(one: _OverOne) -> int:
    return one.blocks.layouts[0].numel()


def _parted(
    program: Program, given: Sequence[Name], held: tuple[Name, ...]
) -> tuple[list[Level], list[Instruction], Program]:
    """Part a program by its norms.

    Args:
        program: the program.
        given: numbers of states.
        held: those that they become.

    Returns:
        The levels; the instructions that compute numbers when all norms are known; and the program that is left.
    """
    others = [i for i in program.instructions if i.function not in NORMS]
    depths: dict[Any, int] = {}
    for instruction in program.instructions:
        reached = max([depths.get(name, 0) for name in instruction.names], default=0)
        depths[instruction.result] = reached + (instruction.function in NORMS)
    numbers = [*program.numbers, *given]

    def rest(outputs: tuple[Name, ...], held: tuple[Name, ...] = ()) -> tuple[list[Instruction], Program]:
        """Find the instructions that compute numbers for some outputs, and the program that computes these."""
        computing = needed(others, (*outputs, *held))
        before = [i for i in computing if i.dtype is None and i.result not in numbers]
        numbers.extend([i.result for i in before])
        elementwise = tuple([i for i in computing if i.dtype is not None])
        read = {name for i in elementwise for name in i.names}
        own = tuple([name for name in numbers if name in read])
        return before, replace(program, numbers=own, instructions=elementwise, outputs=outputs)

    levels = []
    for depth in range(max(depths.values(), default=0)):
        taken = [i for i in program.instructions if i.function in NORMS and depths[i.result] == depth + 1]
        norms = [Norm.taken(i) for i in taken]
        before, computing = rest(tuple(dict.fromkeys([n.of for n in norms if n.of not in program.inputs])))
        levels.append(Level(before, computing, norms))
        numbers.extend([norm.result for norm in norms])
    return levels, *rest(program.outputs, held)
