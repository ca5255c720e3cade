"""Sums over all elements of lists of tensors, of terms that are computed element by element."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution import fused
from functorch_optim._execution.blocks import BLOCK, Blocks, Scratch, layout_of
from functorch_optim._execution.norms import Inputs, Level, Norm
from functorch_optim._execution.recording import record_terms
from functorch_optim._execution.representation import as_reals, widened


def in_blocks(
    terms: Callable[..., Any], columns: Sequence[Sequence[Tensor]], numbers: Sequence[float], compiles: bool
) -> list[float]:
    """Add terms over all elements in float64, block by block.

    Args:
        terms: elementwise function of a tensor of each column, and of the numbers; it returns a tensor, or several.
        columns: lists of plain tensors of the same shapes.
        numbers: the numbers.
        compiles: whether a compiler makes one function of the terms and their sums. Small tensors are run without.
    """
    rows = [[as_reals(tensor) for tensor in row] for row in zip(*columns, strict=True) if row[0].numel()]
    dtype = widened(columns[0][0].new_empty(0)).real.dtype
    level = _level(terms, len(columns), len(numbers), dtype, compiles)
    if not rows:
        return [0.0] * len(level.norms)
    length = None if level.compiled else BLOCK
    tensors = list(map(list, zip(*rows, strict=True)))
    blocks = Blocks(dtype, tensors, list(map(layout_of, tensors[0])), length)
    inputs = Inputs(blocks, [blocks.cut(column, to_read=True) for column in tensors])
    found: list[float] = level.contributions(inputs, numbers, Scratch.of(level.program.device)).tolist()
    return found


@functools.lru_cache(maxsize=64)
def _level(terms: Callable[..., Any], count: int, numbers: int, dtype: torch.dtype, compiles: bool) -> Level:
    """Record terms, and sums of them as norms are; compile both if that is wanted."""
    program = record_terms(terms, count, [1.0] * numbers, torch.empty(0, dtype=dtype, device="cpu"))
    level = Level([], program, [Norm(name, name, None, mean=False) for name in program.outputs])
    if compiles:
        level.compiled = fused.tried(program, level.source())
    return level
