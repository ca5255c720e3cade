"""Rules that take norms of their tensor: programs that are run in blocks, once for the norms and once for the results.

A norm splits a program. The first part computes its argument block by block, and adds up; the argument is not kept. The
norms of all tensors make a vector. Numbers that depend on them are computed for all tensors at once. With these numbers
the program is run again.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution import fused
from functorch_optim._execution.blocks import SMALL, Blocks, Cut, OverBlocks, empty_like, layout_of, run
from functorch_optim._execution.calls import is_tensor
from functorch_optim._execution.kernel import pure
from functorch_optim._execution.norms import Inputs, Level, Norm, Values
from functorch_optim._execution.program import NORMS, Instruction, Name, Program, needed, overwritten
from functorch_optim._execution.representation import widened
from functorch_optim._execution.wholes import Wholes


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
        values = Values(dict(zip(self.given, numbers, strict=True)), len(tensors), self.program.dtype)
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
