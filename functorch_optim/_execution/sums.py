"""Sums over all elements of lists of tensors, of terms that are computed element by element."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution import fused
from functorch_optim._execution.blocks import BLOCK, SMALL, Blocks, Scratch, layout_of
from functorch_optim._execution.mode import Plain
from functorch_optim._execution.program import record_terms
from functorch_optim._execution.reduced import Inputs, Level, Norm
from functorch_optim._execution.representation import as_reals, widened


def can_run(columns: Sequence[Sequence[Tensor]], numbers: Sequence[Any]) -> bool:
    """Tell whether sums of these may be taken in blocks: tensors on the CPU of which no derivative is wanted."""
    return (
        all([isinstance(column, Plain) for column in columns])  # noqa: C419
        and all([type(number) is float for number in numbers])  # noqa: C419
        and columns[0][0].device.type == "cpu"
    )


def sums(terms: Callable[..., Any], columns: Sequence[Sequence[Tensor]], numbers: Sequence[float]) -> list[float]:
    """Add terms over all elements in float64, block by block; by a compiled function where the step is fused.

    Args:
        terms: elementwise function of a tensor of each column, and of the numbers; it returns a tensor, or several.
        columns: lists of tensors of the same shapes, for which `can_run` holds.
        numbers: the numbers.
    """
    rows = [[as_reals(tensor) for tensor in row] for row in zip(*columns, strict=True) if row[0].numel()]
    dtype = widened(columns[0][0].new_empty(0)).real.dtype
    fuses = columns[0].fuses and any([row[0].numel() >= SMALL for row in rows])  # type: ignore[attr-defined]  # noqa: C419
    level = _level(terms, len(columns), len(numbers), dtype, fuses)
    if not rows:
        return [0.0] * len(level.norms)
    length = None if level.compiled else BLOCK
    tensors = list(map(list, zip(*rows, strict=True)))
    blocks = Blocks(dtype, tensors, list(map(layout_of, tensors[0])), length)
    inputs = Inputs(blocks, [blocks.cut(column, to_read=True) for column in tensors])
    found: list[float] = level.contributions(inputs, numbers, Scratch.of(level.program.device)).tolist()
    return found


@functools.lru_cache(maxsize=64)
def _level(terms: Callable[..., Any], count: int, numbers: int, dtype: torch.dtype, fuses: bool) -> Level:
    """Record terms; compile what adds them up."""
    program = record_terms(terms, count, [1.0] * numbers, torch.empty(0, dtype=dtype, device="cpu"))
    level = Level([], program, [Norm(name, name, None, mean=False) for name in program.outputs])
    if fuses:
        level.compiled = fused.tried(program, level.source())
    return level
