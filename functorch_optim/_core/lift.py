"""The lift: transformations of whole trees, from links.

Missing gradients, masked leaves, trees that do not match and states of others are dealt with here, once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core import passes
from functorch_optim._core.checks import check_params, check_updates
from functorch_optim._core.links import Link, select
from functorch_optim._core.passes import Bucket, Donations, Leaves
from functorch_optim._core.rule import Rule, TreeRule, tree_state_type
from functorch_optim.tree import MaskedNode, Tree


def init(links: Sequence[Link], params: Tree) -> list[Any]:
    """Make the state of each link."""
    leaves, structure = tree.flatten(params)
    check_params(leaves, lambda i: tree.paths(params)[i])
    tensors = [leaf for leaf in leaves if leaf is not None]
    step = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    states = []
    for link, active in zip(links, select(links, params), strict=True):
        if isinstance(link.rule, TreeRule):
            masked = [leaf if on else MaskedNode() for leaf, on in zip(leaves, active, strict=True)]
            states.append(link.rule.init(tree.unflatten(structure, masked) if link.where else params))
            continue
        present = [on and leaf is not None for leaf, on in zip(leaves, active, strict=True)]
        leaf_states = [
            init_leaf(link.rule, p, functools.partial(_path, params, i)) if present[i] else None
            for i, p in enumerate(leaves)
        ]
        state_type = next((type(state) for state in leaf_states if state is not None), link.rule.state_type or tuple)
        trees = [
            tree.unflatten(structure, [MaskedNode() if state is None else state[field] for state in leaf_states])
            for field in range(len(getattr(state_type, "_fields", ())))
        ]
        carried = [_own(value, step.device) for value in link.rule.carried()]
        counters = [step, *carried] if link.rule.counters else []
        states.append(tree_state_type(state_type, link.rule.counters)(*counters, *trees))
    return states


def _own(number: Tensor | float, device: torch.device) -> Tensor:
    """Make a number of the state, which is no hyperparameter that the user may change in place."""
    if isinstance(number, Tensor):
        return number.to(device, torch.float64).clone()
    return torch.tensor(number, dtype=torch.float64, device=device)


def _path(params: Tree, i: int) -> str:
    return tree.paths(params)[i]


def init_leaf(rule: Rule, p: Tensor, path: Callable[[], str]) -> Any:
    """Make a rule's state for one parameter; let errors name it."""
    try:
        return rule.init_leaf(p)
    except (TypeError, ValueError) as error:
        raise type(error)(f"At {path()!r}: {error}") from error


def update(
    links: Sequence[Link],
    updates: Tree,
    states: Sequence[Any],
    params: Tree,
    extras: dict[str, Any],
    donations: Donations | None = None,
) -> tuple[Tree, list[Any]]:
    """Run every link; no argument is modified.

    Args:
        links: of the transformation.
        updates: tree of tensors.
        states: of each link.
        params: tree of tensors, or None.
        extras: what was given to `update` by keyword.
        donations: see `passes.run`; a leaf that is found there has None for its update, and its old states.

    Returns:
        Updates, and states.
    """
    like = updates if params is None else params
    like_leaves, structure = tree.flatten(like)
    update_leaves, param_leaves = like_leaves, None
    if params is not None:
        param_leaves = like_leaves
        update_leaves = tree.flatten_up_to(structure, updates, "updates", params, "params")

    def path(i: int) -> str:
        return tree.paths(like)[i]

    check_updates(update_leaves, param_leaves, path)
    columns = [_columns(link, state, structure, like) for link, state in zip(links, states, strict=True)]
    counters: list[tuple[Tensor, Tensor]] = []
    steps = [
        None if link.rule.scalars is None else _count(state.step, counters)
        for link, state in zip(links, states, strict=True)
    ]
    leaves = Leaves(structure, path, param_leaves, select(links, like))
    carried = [
        tuple(state[1 : len(link.rule.counters)]) if link.rule.carry else ()
        for link, state in zip(links, states, strict=True)
    ]
    buckets = [Bucket(range(len(update_leaves)), steps, carried)]
    if donations is not None:
        donations.buckets = [(list(range(len(update_leaves))), 0.0)]
    new_updates, new_columns, [new_carried] = passes.run(
        links, leaves, buckets, update_leaves, columns, extras, donations
    )
    new_states = [
        column
        if isinstance(link.rule, TreeRule)
        else type(old)(
            *([] if step is None else [step]), *numbers, *[tree.unflatten(structure, field) for field in column]
        )
        for link, step, numbers, old, column in zip(links, steps, new_carried, states, new_columns, strict=True)
    ]
    return tree.unflatten(structure, new_updates), new_states


def _count(step: Tensor, counters: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Add one to a counter; links that share theirs share it afterwards too."""
    for old, new in counters:
        if old is step:
            return new
    counters.append((step, step + 1))
    return counters[-1][1]


def _columns(link: Link, state: Any, structure: Any, like: Tree) -> Any:
    """Turn the state of a link, trees in a NamedTuple, into lists in the NamedTuple that the rule knows."""
    rule: Any = link.rule
    if isinstance(rule, TreeRule):
        return state
    fields = getattr(state, "_fields", ())
    leaf_type = getattr(type(state), "_leaf_type", None)
    count = len(rule.counters)
    if (
        not isinstance(state, tuple)
        or fields[:count] != rule.counters
        or fields[count:] != getattr(leaf_type, "_fields", ())
        or (rule.state_type is not None and rule.state_type is not leaf_type)
        or (rule.init is None and len(fields) > count)
    ):
        raise ValueError(
            f"The state of {link.rule.name} is a {type(state).__name__}: it belongs to another transformation. "
            "Make it with the init of the transformation whose update is called: state = tx.init(params)"
        )
    if count and state[0].ndim != 0:
        raise ValueError(
            f"The step in the state of {link.rule.name} has shape {tuple(state[0].shape)}: a state that torch.vmap "
            "has batched is for an update inside of torch.vmap"
        )
    columns = [
        tree.flatten_up_to(structure, field, f"the state's {name}", like, "params")
        for name, field in zip(fields[count:], state[count:], strict=True)
    ]
    return leaf_type(*columns) if leaf_type is not None and columns else ()
