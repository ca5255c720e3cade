"""States before the first update."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_params
from functorch_optim._core.links import Link, select
from functorch_optim._core.rule import TreeRule, tree_state_type
from functorch_optim._numerics import wide_device
from functorch_optim.tree import MaskedNode, Tree


def init(links: Sequence[Link], params: Tree) -> list[Any]:
    """Make the state of each link."""
    leaves, structure = tree.flatten(params)
    check_params(leaves, lambda i: tree.paths(params)[i])
    tensors = [leaf for leaf in leaves if leaf is not None]
    step = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    states = []
    for link, active in zip(links, select(links, params), strict=True):
        rule = link.rule
        if isinstance(rule, TreeRule):
            masked = [leaf if on else MaskedNode() for leaf, on in zip(leaves, active, strict=True)]
            states.append(rule.init(tree.unflatten(structure, masked) if link.where else params))
            continue
        leaf_states = [
            init_leaf(link, p, functools.partial(_path, params, i)) if on and p is not None else None
            for i, (p, on) in enumerate(zip(leaves, active, strict=True))
        ]
        state_type = next((type(state) for state in leaf_states if state is not None), rule.state_type or tuple)
        fields = [
            tree.unflatten(structure, [MaskedNode() if state is None else state[field] for state in leaf_states])
            for field in range(len(getattr(state_type, "_fields", ())))
        ]
        carried = [_own(value, step.device) for value in rule.carried()]
        states.append(tree_state_type(state_type, rule.counters)(*([step] if rule.counts else []), *carried, *fields))
    return states


def _own(number: Tensor | float, device: torch.device) -> Tensor:
    """Make a number of the state, which is no hyperparameter that the user may change in place."""
    device = wide_device(device)
    if isinstance(number, Tensor):
        return number.to(device, torch.float64).clone()
    return torch.tensor(number, dtype=torch.float64, device=device)


def _path(params: Tree, i: int) -> str:
    return tree.paths(params)[i]


def init_leaf(link: Link, p: Tensor, path: Callable[[], str]) -> Any:
    """Make the state of a link for one parameter; let errors name it."""
    try:
        return link.init_leaf(p)
    except (TypeError, ValueError) as error:
        raise type(error)(f"At {path()!r}: {error}") from error
