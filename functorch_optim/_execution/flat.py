"""Flat: elementwise rules run once, on many small tensors end to end.

A derivative then has a node for each operation, and not one for each operation and tensor.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._control import is_masked
from functorch_optim._execution.mode import PLAIN, Mode
from functorch_optim._execution.recomputed import can_recompute, recomputed
from functorch_optim._execution.reference import Stage, tensor_by_tensor
from functorch_optim._execution.representation import Columns, make

SMALL = 1 << 14
"""Elements up to which an operation costs less than the copies that save it."""
MANY = 4
"""Tensors from which on it pays."""


def can_join(
    mode: Mode, updates: list[Tensor], states: Sequence[Columns], params: list[Tensor] | None, scalars: Any
) -> bool:
    """Tell whether it pays to join tensors: many small ones, for rules with a state, which do enough with them.

    In each column all must need derivatives, or none, and all be batched by the same `torch.vmap`, or none: a tensor
    that is joined to others becomes like them. Where torch.compile traces, its compiler joins tensors.
    """
    small = [i for i, update in enumerate(updates) if update.numel() <= SMALL]
    if mode == "compiled" or not any(states) or len(small) < MANY:
        return False
    numbers = [leaf for leaf in tree.flatten(list(scalars))[0] if isinstance(leaf, Tensor)]
    if any(number.ndim > 0 or type(number) not in PLAIN for number in numbers):
        return False
    columns = [updates, *(column for state in states for column in state), *([params] if params is not None else [])]
    kind = _kind if is_masked() else _kind_unbatched
    return all(_alike([kind(column[i]) for i in small]) for column in columns)


def _alike(kinds: Sequence[Any]) -> bool:
    return kinds[0] is not None and kinds.count(kinds[0]) == len(kinds)


def _kind_unbatched(tensor: Tensor) -> bool | None:
    """Say whether a tensor needs derivatives; None for a subclass."""
    return tensor.requires_grad if type(tensor) in PLAIN else None


def _kind(tensor: Tensor) -> Any:
    """Say besides at which levels it is batched."""
    functorch: Any = torch._C._functorch
    kind, levels = _kind_unbatched(tensor), 0
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            levels |= 1 << functorch.maybe_get_level(tensor)
        tensor = functorch.get_unwrapped(tensor)
    return kind if kind is None else (kind, levels)


def flat(
    mode: Mode,
    stages: Sequence[Stage],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, on all small tensors at once, and on each other one."""
    if not any(stage.rule.needs_params for stage in stages):
        params = None
    ends = _Ends(updates)
    joined = (
        ends.joined(updates),
        [make(type(state), [ends.joined(column) for column in state]) for state in states],
        ends.joined(params) if params is not None else None,
        scalars,
    )
    way = recomputed if can_recompute(mode, *joined) else tensor_by_tensor
    new_updates, new_states = way(stages, *joined)
    return ends.parted(new_updates), [make(type(state), [ends.parted(c) for c in state]) for state in new_states]


class _Ends:
    """Where small tensors begin and end in the one that has them all.

    Those of one shape lie next to each other, so that there is a view for each shape and not for each tensor; for
    vectors there is none.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        groups: dict[Any, list[int]] = {}
        self.large = [i for i, tensor in enumerate(tensors) if tensor.numel() > SMALL]
        for i, tensor in enumerate(tensors):
            if tensor.numel() <= SMALL:
                groups.setdefault(i if tensor.ndim == 1 else tensor.shape, []).append(i)
        self.groups = [(tensors[members[0]].shape, members) for members in groups.values()]
        self.sizes = [shape.numel() * len(members) for shape, members in self.groups]

    def joined(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return one tensor, and the large ones."""
        parts = [
            torch.stack([tensors[i] for i in members]) if len(members) > 1 else tensors[members[0]]
            for _, members in self.groups
        ]
        if len(parts) > 1:
            parts = [torch.cat([part if part.ndim == 1 else part.reshape(-1) for part in parts])]
        return [*parts, *[tensors[i] for i in self.large]]

    def parted(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return all tensors in the order in which they came."""
        found = dict(zip(self.large, tensors[1:], strict=True))
        # Copies, which are no views of one tensor: autograd lets nobody write to those.
        split: Any = torch.split_with_sizes_copy
        unbind: Any = torch.unbind_copy
        parts = split(tensors[0], self.sizes) if len(self.sizes) > 1 else tensors[:1]
        for (shape, members), part in zip(self.groups, parts, strict=True):
            if len(members) > 1:
                found.update(zip(members, unbind(part.view(len(members), *shape)), strict=True))
            else:
                found[members[0]] = part if len(shape) == 1 else torch.view_copy(part, shape)
        return [found[i] for i in range(len(found))]
