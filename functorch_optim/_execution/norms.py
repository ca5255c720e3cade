"""Norms and sums of values that a program computes: block by block, in float64, and of all tensors."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._execution import fused
from functorch_optim._execution.blocks import SMALL, Blocks, Cut, Scratch, call
from functorch_optim._execution.kernel import kernel, summing
from functorch_optim._execution.program import Instruction, Name, Program
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

    def take(self, tensors: Sequence[Inputs], values: "Values", shards: Wholes | None) -> None:
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


class Values:
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
