"""Fused: a program compiled to one kernel, of flat tensors of any length and one tensor that has all numbers."""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.blocks import SMALL, Blocks, Cut, InBlocks, OverBlocks, Scratch
from functorch_optim._execution.kernel import pure
from functorch_optim._execution.program import Program, overwritten


def compiled(program: Program) -> "Fused | None":
    """Compile a program and try it; None, with a warning, when that fails."""
    kernel = tried(program, pure(program, overwritten(program)))
    return None if kernel is None else Fused(program, kernel)


def tried(program: Program, source: Callable[..., Any]) -> Callable[..., Any] | None:
    """Compile a function of inputs and numbers of a program, and try it; None, with a warning, when that fails."""
    if source in _not_compiled:
        return None
    samples = [torch.zeros(2 * SMALL, dtype=program.dtype, device=program.device) for _ in program.inputs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            kernel = _compiled(source)
            kernel(*samples, together(program, [1.0] * len(program.numbers)))
    except Exception as error:
        _not_compiled.add(source)
        cause = getattr(error, "inner_exception", error)
        reason = (str(cause).strip().splitlines() or [""])[0]
        warnings.warn(
            f"fused=True needs torch.compile and a compiler that works here, but there was a {type(cause).__name__}"
            f": {reason}. Steps are made without; leave fused=True out, or install a compiler (g++ on Linux)",
            stacklevel=2,
        )
        return None
    return kernel


class Fused(InBlocks):
    """Runs a compiled program; into new tensors it is run in blocks."""

    def __init__(self, program: Program, kernel: Callable[..., None]) -> None:
        super().__init__(program)
        self.kernel = kernel

    def over(self, columns: Sequence[list[Tensor]]) -> "OverBlocks":
        """Get ready to overwrite parameters and states."""
        return _OverFused(self.program, self.overwritten, columns, self.kernel)


class _OverFused(OverBlocks):
    """Parameters and states of any length, that a compiled kernel overwrites; small ones are copied together."""

    length = None

    def __init__(
        self,
        program: Program,
        overwritten: tuple[str, ...],
        columns: Sequence[list[Tensor]],
        kernel: Callable[..., None],
    ) -> None:
        super().__init__(program, overwritten, columns)
        self.kernel = kernel

    def reserve(self) -> None:
        """Take the memory for packs; a compiled kernel needs no other."""
        self.blocks.reserve(len(self.program.inputs), Scratch.of(self.program.device))

    def run(self, inputs: Sequence[Cut], numbers: Sequence[Any]) -> None:
        """Overwrite."""
        run(self.kernel, self.program, self.blocks, inputs, self.written, self.overwritten, numbers)


def run(
    kernel: Callable[..., None],
    program: Program,
    blocks: Blocks,
    inputs: Sequence[Cut],
    outputs: Sequence[Cut],
    overwritten: tuple[str, ...],
    numbers: Sequence[Any],
) -> None:
    """Overwrite tensors by a compiled program; for the arguments see `blocks.run`."""
    given = together(program, numbers)
    for row in zip(*[cut.alone for cut in inputs], strict=True):
        kernel(*row, given)
    ends = list(zip(outputs, [program.inputs.index(name) for name in overwritten], strict=True))
    for copies in blocks.joined(inputs, ends, Scratch.of(program.device)):
        kernel(*copies, given)


def together(program: Program, numbers: Sequence[Any]) -> Tensor:
    """Put the numbers of a program into one tensor."""
    dtype, device = program.dtype, program.device
    if not any(isinstance(number, Tensor) and number.device.type != "cpu" for number in numbers):
        return torch.tensor([float(n) for n in numbers], dtype=dtype, device="cpu").to(device, non_blocking=True)
    there = [
        n.to(device, dtype) if isinstance(n, Tensor) else torch.full((), n, dtype=dtype, device=device) for n in numbers
    ]
    return torch.stack(there)


_not_compiled: "weakref.WeakSet[Callable[..., Any]]" = weakref.WeakSet()
"""Where that failed; nobody wants to be told so at every step."""


@functools.lru_cache(maxsize=256)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)
