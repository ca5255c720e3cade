"""Flat: elementwise rules run once, on all tensors end to end."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim.execution.reference import tensor_by_tensor
from functorch_optim.execution.representation import Columns, make
from functorch_optim.execution.ways import PLAIN
from functorch_optim.rule import Rule

SMALL = 1 << 14


def flat(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, on all tensors at once."""
    shapes = [update.shape for update in updates]
    sizes = [shape.numel() for shape in shapes]

    def joined(tensors):
        return [torch.cat([tensor.reshape(-1) for tensor in tensors])]

    def parted(tensors):
        return [part.view(shape) for part, shape in zip(tensors[0].split(sizes), shapes, strict=True)]

    new_updates, new_states = tensor_by_tensor(
        rules,
        joined(updates),
        [make(type(state), [joined(column) for column in state]) for state in states],
        joined(params) if params is not None else None,
        scalars,
    )
    return parted(new_updates), [make(type(state), [parted(column) for column in state]) for state in new_states]
