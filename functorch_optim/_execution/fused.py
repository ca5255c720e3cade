"""Fused: a program compiled to one kernel, of flat tensors of any length and one tensor that has all numbers."""

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.blocks import SMALL, Cut, InBlocks, OverBlocks, Scratch
from functorch_optim._execution.kernel import pure
from functorch_optim._execution.program import Program, overwritten


def compiled(program: Program) -> "Fused | None":
    """Compile a program and try it; None, with a warning, when that fails."""
    source = pure(program, overwritten(program))
    if source in _not_compiled:
        return None
    samples = [torch.zeros(2 * SMALL, dtype=program.dtype, device=program.device) for _ in program.inputs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            kernel = _compiled(source)
            kernel(*samples, _together(program, [1.0] * len(program.numbers)))
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
    return Fused(program, kernel)


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
        together = _together(self.program, numbers)
        overwritten = [self.program.inputs.index(name) for name in self.overwritten]
        for row in zip(*[cut.alone for cut in inputs], strict=True):
            self.kernel(*row, together)
        ends = list(zip(self.written, overwritten, strict=True))
        for copies in self.blocks.joined(inputs, ends, Scratch.of(self.program.device)):
            self.kernel(*copies, together)


def _together(program: Program, numbers: Sequence[Any]) -> Tensor:
    dtype, device = program.dtype, program.device
    if not any(isinstance(number, Tensor) and number.device.type != "cpu" for number in numbers):
        return torch.tensor([float(number) for number in numbers], dtype=dtype).to(device, non_blocking=True)
    there = [
        n.to(device, dtype) if isinstance(n, Tensor) else torch.full((), n, dtype=dtype, device=device) for n in numbers
    ]
    return torch.stack(there)


_not_compiled: "weakref.WeakSet[Callable[..., None]]" = weakref.WeakSet()
"""Where that failed; nobody wants to be told so at every step."""


@functools.lru_cache(maxsize=256)
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function, dynamic=True, fullgraph=True)
