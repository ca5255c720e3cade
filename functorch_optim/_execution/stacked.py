"""Stacked: small tensors of one shape end to end in a new dimension, for rules that need their tensor whole."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.mode import PLAIN_TYPES, Mode
from functorch_optim._execution.reference import Stage, tensor_by_tensor
from functorch_optim._execution.representation import Columns, make

LARGEST = {"cpu": 1 << 10}
"""Elements of a tensor up to which a stack is faster than one tensor after the other; elsewhere:"""
_ELSEWHERE = 1 << 20
_TOGETHER = 1 << 24
"""Elements of a stack."""


def can_stack(
    mode: Mode, stages: Sequence[Stage], updates: list[Tensor], states: Sequence[Columns], params: list[Tensor] | None
) -> bool:
    """Tell whether some tensors can be stacked, and whether that is of use."""
    if mode in ("compiled", "transformed", "watched") or not all([stage.rule.stacks for stage in stages]):  # noqa: C419
        return False
    columns = [updates, *([] if params is None else [params]), *[column for state in states for column in state]]
    if not PLAIN_TYPES.issuperset([type(tensor) for column in columns for tensor in column]):
        return False
    return any(len(some) > 1 for some in _alike(updates))


def stacked(
    stages: Sequence[Stage],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules, one after the other, on all tensors of one shape at once."""
    new_updates: list[Any] = [None] * len(updates)
    new_states = [make(type(state), [[None] * len(updates) for _ in state]) for state in states]

    def of_one(g: Tensor, p: list[Tensor], rows: list[Columns]) -> Any:
        return tensor_by_tensor(stages, [g], rows, p or None, scalars)

    for some in _alike(updates):

        def together(column: list[Tensor], some: list[int] = some) -> Tensor:
            return torch.stack([column[i] for i in some]) if len(some) > 1 else column[some[0]]

        def apart(tensor: Tensor, some: list[int] = some) -> list[Tensor]:
            return [one.clone() for one in tensor.unbind()] if len(some) > 1 else [tensor]

        run = torch.vmap(of_one) if len(some) > 1 else of_one
        rows = [make(type(state), [[together(column)] for column in state]) for state in states]
        [new], new_rows = run(together(updates), [] if params is None else [together(params)], rows)
        for i, tensor in zip(some, apart(new), strict=True):
            new_updates[i] = tensor
        for columns, row in zip(new_states, new_rows, strict=True):
            for column, [made] in zip(columns, row, strict=True):
                for i, tensor in zip(some, apart(made), strict=True):
                    column[i] = tensor
    return new_updates, new_states


def _alike(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Part tensors into lists of those that are stacked."""
    shapes: dict[torch.Size, list[int]] = {}
    for i, tensor in enumerate(tensors):
        shapes.setdefault(tensor.shape, []).append(i)
    for shape, some in shapes.items():
        size = shape.numel()
        small = 0 < size <= LARGEST.get(tensors[0].device.type, _ELSEWHERE)
        count = _TOGETHER // size if small else 1
        yield from [some[k : k + count] for k in range(0, len(some), count)]
