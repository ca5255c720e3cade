"""Flat: elementwise rules run once, on all tensors end to end.

A derivative then has a node for each operation, and not one for each operation and tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim.execution.reference import tensor_by_tensor
from functorch_optim.execution.representation import Columns, make
from functorch_optim.rule import Rule


def flat(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, on all tensors at once."""
    ends = _Ends(updates)
    new_updates, new_states = tensor_by_tensor(
        rules,
        [ends.joined(updates)],
        [make(type(state), [[ends.joined(column)] for column in state]) for state in states],
        [ends.joined(params)] if params is not None and any(rule.needs_params for rule in rules) else None,
        scalars,
    )
    parted = ends.parted
    return parted(new_updates[0]), [make(type(state), [parted(c[0]) for c in state]) for state in new_states]


class _Ends:
    """Where tensors begin and end in one that has them all: those of one shape lie next to each other.

    So there is a view for each shape, and not for each tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        members: dict[torch.Size, list[int]] = {}
        for i, tensor in enumerate(tensors):
            members.setdefault(tensor.shape, []).append(i)
        self.members = list(members.items())
        self.sizes = [shape.numel() * len(indices) for shape, indices in self.members]

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        stacks = [
            tensors[indices[0]] if len(indices) == 1 else torch.stack([tensors[i] for i in indices])
            for _, indices in self.members
        ]
        if len(stacks) == 1:
            return stacks[0]
        return torch.cat([stack if stack.ndim == 1 else stack.reshape(-1) for stack in stacks])

    def parted(self, joined: Tensor) -> list[Tensor]:
        parts = torch.split(joined, self.sizes) if len(self.members) > 1 else [joined]
        found: dict[int, Tensor] = {}
        for (shape, indices), part in zip(self.members, parts, strict=True):
            if len(indices) > 1:
                found.update(zip(indices, part.view(-1, *shape).unbind(), strict=True))
            else:
                found[indices[0]] = part if len(shape) == 1 else part.view(shape)
        return [found[i] for i in range(len(found))]
