"""Running links over leaves, in passes: what the functional and the stateful form share.

Neighbouring rules are one pass over the leaves. A function of the whole tree, or a rule whose scalars depend on the
whole tree, begins a new one.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from functorch_optim import _execution as execution
from functorch_optim import tree
from functorch_optim._core.checks import Path, check_kept, check_pair, check_present, check_state, check_updates
from functorch_optim._core.known import Known, settled
from functorch_optim._core.links import Link
from functorch_optim._core.per_parameter import Place, check_shared, differs, resolved
from functorch_optim._core.rule import TreeRule
from functorch_optim._execution.in_place import can_donate
from functorch_optim.tree import MaskedNode, Tree


class Leaves(NamedTuple):
    """The leaves that a transformation runs over.

    Attributes:
        structure: of the tree whose leaves they are.
        path: names a leaf, for messages.
        params: the parameters; None when they were not given.
        active: for each link, whether it is for each leaf.
    """

    structure: Any
    path: Path
    params: list[Any] | None
    active: list[list[bool]]


class Bucket(NamedTuple):
    """Leaves that have had the same number of updates.

    Attributes:
        members: their indices.
        steps: for each link, the number of this update, 1 at the first: 0-dim tensor; None for a link without scalars.
        carried: for each link, the numbers that its scalars carry on: 0-dim tensors.
    """

    members: Sequence[int]
    steps: Sequence[Tensor | None]
    carried: Sequence[tuple[Tensor, ...]]


class Work(Protocol):
    """What overwrites some parameters and their states.

    Attributes:
        needs_scalars: whether it needs the numbers of the rules.
    """

    needs_scalars: ClassVar[bool]

    def ready(self, updates: list[Tensor], scalars: Sequence[Any], step: float) -> Callable[[], None]:
        """Get ready for a step; change nothing.

        Args:
            updates: one for each parameter.
            scalars: the numbers of the rules.
            step: its number.

        Returns:
            What makes the step.
        """


class Donated(NamedTuple):
    """Rules that are ready to overwrite parameters and states.

    Attributes:
        bucket: index of the bucket whose leaves they are for.
        links: indices of the links that apply.
        members: indices of the leaves.
        work: what overwrites them.
        updates: what it is to be run with.
        scalars: for each link, the numbers of the step.
    """

    bucket: int
    links: Sequence[int]
    members: list[int]
    work: Work
    updates: list[Tensor]
    scalars: Sequence[Any]


class Donations(list[Donated]):
    """Where `run` puts what is ready to overwrite parameters and states, instead of computing new ones.

    Attributes:
        make: makes the work of rules, for updates, states and parameters that can be overwritten, and scalars.
        buckets: members of each, and the number of their step.
        complete: whether this is all of the step, so that it may be done again with other gradients.
    """

    def __init__(self, make: Callable[..., Work]) -> None:
        super().__init__()
        self.make = make
        self.buckets: list[tuple[list[int], float]] = []
        self.complete = True

    def ready(self) -> list[Callable[[], None]]:
        """Get ready to overwrite them; return what does."""
        return [work.ready(updates, scalars, self.buckets[bucket][1]) for bucket, _, _, work, updates, scalars in self]


def run(
    links: Sequence[Link],
    leaves: Leaves,
    buckets: Sequence[Bucket],
    updates: Sequence[Any],
    states: Sequence[Any],
    extras: dict[str, Any],
    donations: Donations | None = None,
) -> tuple[list[Any], list[Any], list[list[tuple[Tensor, ...]]]]:
    """Run links one after the other; no argument is modified.

    Args:
        links: of the transformation.
        leaves: what they run over.
        buckets: all leaves that have an update, each in one bucket.
        updates: for each leaf, a tensor or None.
        states: for each link, its state: the NamedTuple of its rule with a list, an entry a leaf, in each field; or
            what the `init` of a function of the whole tree made.
        extras: what was given to `update` by keyword.
        donations: where to put what the last pass would do, for those leaves whose parameters and states it can
            overwrite: nothing that can fail for the rules' sake comes after it. Their updates are then None.

    Returns:
        New updates; new states; and for each bucket and link the numbers to carry on.
    """
    updates = [u.coalesce() if isinstance(u, Tensor) and u.layout == torch.sparse_coo else u for u in updates]
    carried = [list(bucket.carried) for bucket in buckets]
    states = [
        state if isinstance(link.rule, TreeRule) else _mapped(list, state)
        for link, state in zip(links, states, strict=True)
    ]
    passes = _passes(links)
    for members in passes:
        first = members[0]
        offered = donations if members is passes[-1] else None
        if isinstance(links[first].rule, TreeRule):
            updates, states[first] = _run_tree_rule(links[first], leaves, first, updates, states[first], extras)
            continue
        chosen = [u for u, on in zip(updates, leaves.active[first], strict=True) if on and u is not None]
        seen = [u.values() if u.layout == torch.sparse_coo else u for u in chosen]
        for number, bucket in enumerate(buckets):
            groups: dict[tuple[Any, ...], list[int]] = {}
            for i in bucket.members:
                if updates[i] is not None:
                    applying = tuple([k for k in members if leaves.active[k][i]])
                    u = updates[i]
                    if u.layout != torch.strided and applying:
                        updates[i] = u = _as_rules_take_it(u, [links[k].rule for k in applying], leaves.path, i)
                    alone = i if u.layout == torch.sparse_coo else None
                    groups.setdefault((applying, u.device, u.dtype, alone), []).append(i)
            used = {k for applying, *_ in groups for k in applying}
            evaluated = scalars_of(links, [k for k in members if k in used or bucket.carried[k]], bucket, extras, seen)
            scalars = {k: s for k, (s, _) in evaluated.items()}
            carried[number] = [evaluated[k][1] if k in evaluated else old for k, old in enumerate(carried[number])]
            for (applying, *_), indices in groups.items():
                parts = _parted(indices, [links[k] for k in applying], [scalars[k] for k in applying], leaves, updates)
                for some, numbers in parts:
                    ready = _run_rules(links, leaves, applying, some, updates, states, numbers, offered)
                    if offered is not None and ready is not None:
                        offered.append(Donated(number, applying, some, *ready))
                if donations is not None:
                    one = len(passes) == len(parts) == 1 and not differs([scalars[k] for k in applying])
                    donations.complete &= one and updates[indices[0]] is None
    return updates, states, carried


def _passes(links: Sequence[Link]) -> list[list[int]]:
    """Split links into passes, by index."""
    groups: list[list[int]] = []
    for k, link in enumerate(links):
        if not groups or link.rule.sees_tree or isinstance(links[groups[-1][0]].rule, TreeRule):
            groups.append([])
        groups[-1].append(k)
    return groups


def _as_rules_take_it(update: Tensor, rules: Sequence[Any], path: Path, i: int) -> Tensor:
    """Make a sparse update dense when a rule wants it so.

    Raises:
        RuntimeError: a rule refuses it.
    """
    if update.layout != torch.sparse_coo:
        raise RuntimeError(
            f"The gradient of {path(i)!r} has layout {update.layout}; of sparse ones only torch.sparse_coo is supported"
        )
    for rule in rules:
        if rule.sparse is None:
            raise RuntimeError(
                f"{rule.name} does not support sparse gradients, but that of {path(i)!r} has layout {update.layout}; "
                "give update.to_dense(), or use sparse_adam, adagrad or sgd with gradients of layout torch.sparse_coo"
            )
    return update.to_dense() if any(rule.sparse == "dense" for rule in rules) else update


def _parted(
    indices: list[int], links: Sequence[Link], scalars: list[Any], leaves: Leaves, updates: Sequence[Any]
) -> list[tuple[list[int], list[Any]]]:
    """Part leaves, with the scalars of links, where numbers differ between them: then each is alone."""
    if not links or not differs(scalars):
        return [(indices, scalars)] if links else []
    numbered = tree.unflatten(leaves.structure, range(len(updates)))
    prefixes = tree.Prefixes(numbered, "the values of a hyperparameter")

    def here(i: int, link: Link, s: Any) -> Any:
        def of(values: Tree) -> Any:
            return prefixes.of(values)[i]

        shape, alone = updates[i].shape, tree.is_leaf(numbered)
        return resolved(s, Place(of, lambda: leaves.path(i), shape, alone, link.rule.elementwise))

    return [([i], [here(i, link, s) for link, s in zip(links, scalars, strict=True)]) for i in indices]


def _run_rules(
    links: Sequence[Link],
    leaves: Leaves,
    applying: Sequence[int],
    indices: list[int],
    updates: list[Any],
    states: list[Any],
    scalars: Sequence[Any],
    donations: Donations | None,
) -> tuple[Work, list[Tensor], Sequence[Any]] | None:
    """Run rules, whose links and scalars these are, on some of the leaves; write into `updates` and `states`.

    Returns:
        Where they can overwrite states and parameters, and are to: what will do that, and what it is to be given.
    """
    some_updates = [updates[i] for i in indices]
    some_states = [_picked(states[k], indices) for k in applying]

    def path(position: int) -> str:
        return leaves.path(indices[position])

    for k, state in zip(applying, some_states, strict=True):
        rule = links[k].rule
        if leaves.params is None and rule.needs_params:
            raise ValueError(
                f"{rule.name} needs the parameters, but update was called without them; "
                "call tx.update(updates, state, params)"
            )
        for field, column in _fields(state):
            check_present(rule.name, field, column, path)
            if rule.elementwise:
                check_state(rule.name, field, column, some_updates, path)
    rules: list[Any] = [links[k].rule for k in applying]
    params = [leaves.params[i] for i in indices] if leaves.params is not None else None
    if donations is not None and params is not None and can_donate(rules, some_updates, some_states, params, scalars):
        for i in indices:
            updates[i] = None
        return donations.make(rules, params, some_states, scalars), some_updates, scalars
    new_updates, new_states = execution.run(rules, some_updates, some_states, params, scalars)
    check_kept("The update after " + ", ".join([links[k].rule.name for k in applying]), new_updates, some_updates, path)
    for k, old, new in zip(applying, some_states, new_states, strict=True):
        for (field, before), (_, after), column in zip(_fields(old), _fields(new), states[k], strict=True):
            check_kept(f"The state's {field} after {links[k].rule.name}", after, before, path)
            for i, tensor in zip(indices, after, strict=True):
                column[i] = tensor
    for i, update in zip(indices, new_updates, strict=True):
        updates[i] = update
    return None


def _run_tree_rule(
    link: Link, leaves: Leaves, k: int, updates: list[Any], state: Any, extras: dict[str, Any]
) -> tuple[list[Any], Any]:
    """Run a function of the whole tree on those leaves that it is for."""

    def arranged(some: Sequence[Any]) -> Tree:
        active = leaves.active[k] if link.where else [True] * len(some)
        kept = [leaf if on else MaskedNode() for leaf, on in zip(some, active, strict=True)]
        return tree.unflatten(leaves.structure, kept)

    rule: Any = link.rule
    given = arranged(updates)
    params = None if leaves.params is None else arranged(leaves.params)
    pair = rule.update(given, state, params, **rule.extras.wanted(extras))
    check_pair(f"The update of {rule.name}", "updates", pair)
    returned, new_state = pair
    old_leaves, structure = tree.flatten(given)
    name = f"the updates from {link.rule.name}"
    new_leaves = tree.flatten_up_to(structure, returned, name, given, "updates")
    check_updates(new_leaves, old_leaves, lambda i: tree.paths(given)[i], name, "the one it was given")
    remaining = iter(new_leaves)
    return [
        next(remaining) if on or not link.where else u for on, u in zip(leaves.active[k], updates, strict=True)
    ], new_state


def scalars_of(
    links: Sequence[Link], indices: Sequence[int], bucket: Bucket, extras: dict[str, Any], updates: list[Tensor]
) -> dict[int, tuple[Any, tuple[Tensor, ...]]]:
    """Compute for links, by index, the numbers that the rule needs at this step, and those that it carries on.

    Args:
        links: of the transformation.
        indices: of those that are asked for.
        bucket: of leaves that are at the same step.
        extras: everything that was given to `update` by keyword.
        updates: what is about to be transformed, for a rule that sees the tree.
    """
    return {k: _scalars_of(links[k], bucket, k, extras, updates) for k in indices}


def _scalars_of(
    link: Link, bucket: Bucket, k: int, extras: dict[str, Any], updates: list[Tensor]
) -> tuple[Any, tuple[Tensor, ...]]:
    rule: Any = link.rule
    step, carried = bucket.steps[k], bucket.carried[k]
    if step is None:
        return (), carried
    asked = rule.extras
    wanted = asked.wanted(extras)
    if "updates" in asked.names:
        wanted["updates"] = updates
    if isinstance(step, Known) and not str(getattr(rule.scalars, "__module__", "")).startswith("functorch_optim."):
        step = step.tensor  # for a rule of the user's, which may do with it whatever can be done with a tensor
    step = step.to(torch.float64)
    if rule.carry is None:
        return tree.map(settled, rule.scalars(step, **wanted)), carried
    scalars, new = rule.scalars(step, rule.carried_type(*carried), **wanted)
    check_shared(rule.name, rule.counters[1:], new)
    # The numbers are float64, but torch.optim keeps float32: what comes out of its checkpoints stays so.
    return tree.map(settled, scalars), tuple([n.to(old) for n, old in zip(new, carried, strict=True)])


# States of many leaves: a NamedTuple of lists. ------------------------------------------------------------------------


def _fields(state: Any) -> list[tuple[str, Any]]:
    return list(zip(getattr(state, "_fields", ()), state, strict=True))


def _mapped(function: Callable[[Any], Any], state: Any) -> Any:
    return type(state)(*[function(column) for column in state]) if state else ()


def _picked(state: Any, indices: list[int]) -> Any:
    return _mapped(lambda column: [column[i] for i in indices], state)
