"""Prepare, then run: links over leaves.

Everything that depends on the form of the leaves alone is found out once: which of them each pass takes together, the
program of a group, the machine that runs it. The functional and the stateful forms both call `Prepared.run`. At each
step `numbers.py` computes the numbers, and `groups.py` finds the leaves that share them.
"""

import functools
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from functorch_optim import tree
from functorch_optim._core import checks
from functorch_optim._core.checks import Path
from functorch_optim._core.groups import LeafGroups, wants_dense
from functorch_optim._core.leaves import Leaves, Outcome, Ready
from functorch_optim._core.links import Link
from functorch_optim._core.numbers import Bucket, Condition, Numbers
from functorch_optim._core.rule import OF_TREE, Rule, TreeRule
from functorch_optim._core.shards import shards_of
from functorch_optim._execution.choose import Way
from functorch_optim._execution.group import Group
from functorch_optim._execution.mode import Mode, Plain, is_plain
from functorch_optim._execution.representation import make, row, widened
from functorch_optim.tree import MaskedNode, Tree


class Prepared:
    """Links, made ready for leaves of one form.

    Args:
        links: of the transformation.
        structure: of the tree whose leaves they are run over.
        path: names a leaf, for messages.
        leaves: some of this form; none of their tensors is kept.
        active: for each link, whether it is for each leaf.
        mode: how torch treats tensors.
        way: the user's choice of how to run.
        overwrites: whether parameters and states are given up.
        keeps: whether these are always the same tensors, so that views of them may be kept.
    """

    def __init__(
        self,
        links: Sequence[Link],
        structure: Any,
        path: Path,
        leaves: Leaves,
        active: list[list[bool]],
        mode: Mode,
        way: Way = None,
        overwrites: bool = False,
        keeps: bool = False,
    ) -> None:
        self.links, self.structure, self.path, self.active = links, structure, path, active
        self.mode, self.overwrites, self.fuses = mode, overwrites, way == "fused"
        self.widening: dict[int, list[int]] = {}  # for each place, the links that make updates float32 from there on
        for k, link in enumerate(links):
            if link.widens is not None:
                self.widening.setdefault(k - link.widens, []).append(k)
        self.passes, self.recalled = _passes(links, self.widening.keys())
        self.shards = None if mode == "compiled" else shards_of(links, leaves, keeps)
        local = leaves if self.shards is None else self.shards.local(leaves)
        self.plain = mode in ("plain", "recorded") and is_plain(mode, _tensors(local))
        # All ranks choose the same way, also where one of them alone is watched, or they wait for each other.
        seen: Mode = "recorded" if torch.is_grad_enabled() else "plain"
        together = mode == "watched" and self.shards is not None and is_plain(seen, _tensors(local))
        self.extras = [link.rule.extras for link in links]
        self.asks = any(extras.any or extras.names - OF_TREE for extras in self.extras)
        shapes = [None if u is None else u.shape for u in leaves.updates]
        self.numbers = Numbers(links, active, shapes, structure, path)
        make_group = functools.partial(Group, mode=mode, plain=self.plain, together=together, way=way, keeps=keeps)
        dtypes = [p.dtype if isinstance(p, Tensor) else None for p in leaves.params or leaves.updates]
        # A link that is alone in its pass is given the updates that it recalls as if they were the parameters.
        own = [link._replace(recalls=None) for link in links] if self.recalled else links
        self.groups = LeafGroups(own, active, self.numbers, dtypes, path, make_group, self.shards)
        for p in leaves.params or () if way == "fused" else ():
            if isinstance(p, Tensor) and p.is_meta:
                _device_dtype_check_for_fused(p)  # raises torch.optim's error
        self._check(leaves)

    def _check(self, leaves: Leaves) -> None:
        """Raise unless states are those of the links, for these leaves."""
        for link, active, columns in zip(self.links, self.active, leaves.columns, strict=True):
            rule = link.rule
            here = [i for i, u in enumerate(leaves.updates) if u is not None and active[i]]
            if not here or isinstance(rule, TreeRule):
                continue
            if link.needs_params:
                checks.check_has_params(rule.name, leaves.params)

            def path(k: int, here: list[int] = here) -> str:
                return self.path(here[k])

            for field, column in zip(getattr(columns, "_fields", ()), columns, strict=True):
                tensors = [column[i] for i in here]
                checks.check_present(rule.name, field, tensors, path)
                if rule.elementwise:
                    updates = [leaves.updates[i] for i in here]
                    checks.check_state(rule.name, field, tensors, updates, path, link.dtypes is not None)

    def run(self, leaves: Leaves, buckets: Sequence[Bucket], extras: dict[str, Any]) -> Outcome:
        """Run links one after the other; no argument is modified.

        Args:
            leaves: of the form that this was made for.
            buckets: all leaves that have an update, each in one bucket.
            extras: the keyword arguments of `update`.
        """
        if self.shards is None:
            return self._run(leaves, leaves, buckets, extras)
        local = self.shards.local(leaves)
        return self.shards.restored(self._run(local, leaves, buckets, extras), leaves, local)

    def _run(self, leaves: Leaves, given: Leaves, buckets: Sequence[Bucket], extras: dict[str, Any]) -> Outcome:
        updates, columns = list(leaves.updates), list(leaves.columns)
        carried = [list(bucket.carried) for bucket in buckets]
        due: list[list[Condition]] = [[True] * len(self.links) for _ in buckets]
        ready: list[Ready] = []
        computed = False
        recalled: dict[int, list[Any]] = {}
        for members in self.passes:
            first, last = self.links[members[0]].rule, members is self.passes[-1]
            for k in self.widening.get(members[0], ()):
                updates = [
                    u if u is None or not on else widened(u) for u, on in zip(updates, self.active[k], strict=True)
                ]
            if members[0] in self.recalled:
                recalled[members[0]] = list(updates)
            if isinstance(first, TreeRule):
                is_open = self.numbers.is_open_for_some(members[0], due)
                if is_open is not False:
                    with self.numbers.reading(members[0], carried[0] if carried else []):
                        new = self._run_tree_rule(members[0], leaves, updates, columns, extras)
                    old = updates, columns[members[0]]
                    updates, columns[members[0]] = new if is_open is True else _where_open(is_open, new, old)
                    computed = True
                continue
            params, holder = leaves.params, _holder(self.links, members[0], members[-1])
            recalls = self.links[members[0]].recalls if self.recalled else None
            if recalls is not None:
                params = recalled[members[0] - recalls]
            elif holder is not None:
                params = self._handed(holder, leaves.params, columns)
            seen = self._seen(members[0], given, updates, leaves.params, columns) if first.sees_tree else {}
            for number, bucket in enumerate(buckets):
                scalars = self.numbers.compute(members, number, bucket, extras, seen, carried[number], due[number])
                for group, numbers in self.groups.find(members, number, bucket, updates, scalars):
                    overwrite = group.ready(updates, params, columns, numbers) if self.overwrites and last else None
                    if overwrite is not None:
                        ready.append(overwrite)
                    elif last or not group.idle:
                        computed = True
                        group.compute(updates, params, columns, numbers)
        return Outcome(updates, columns, carried, due, ready, computed)

    def _seen(
        self, k: int, given: Leaves, updates: list[Any], params: list[Any] | None, columns: list[Any]
    ) -> dict[str, Any]:
        """Collect the tensors that a link which sees the tree asks for, of the leaves that it is about to transform."""
        link, names = self.links[k], self.extras[k].names
        here = [i for i, (u, on) in enumerate(zip(updates, self.active[k], strict=True)) if on and u is not None]
        beside = not names.isdisjoint(("params", "states"))  # then gradients are to have their shape

        def entries(i: int) -> Tensor:
            u: Tensor = updates[i]
            if u.layout == torch.strided:
                return u
            if beside:
                wants_dense([link.rule], u, functools.partial(self.path, i))
            return u.to_dense() if beside else u.coalesce().values()

        def listed(some: list[Tensor], before: Sequence[Any] | None) -> list[Tensor]:
            if self.shards is not None:
                return self.shards.joined(some, here, before)
            if not (self.plain and len({(x.dtype, x.device) for x in some}) == 1):
                return some
            plain = Plain(some)
            plain.fuses = self.fuses
            return plain

        seen: dict[str, Any] = {}
        if "updates" in names:
            seen["updates"] = listed([entries(i) for i in here], given.updates)
        if "params" in names:
            params = self._params_of(k, params, columns)
            seen["params"] = listed([params[i] for i in here], given.params) if params else []
        if "states" in names:
            pairs = zip(columns[k], given.columns[k], strict=True)
            seen["states"] = make(type(columns[k]), [listed([c[i] for i in here], before) for c, before in pairs])
        return seen

    def _params_of(self, k: int, params: list[Any] | None, columns: list[Any]) -> list[Any] | None:
        """Return the parameters of a link: those of the user, or of the wrapper that it is inside of."""
        inside = self.links[k].inside
        return self._handed(k + inside, params, columns) if inside else params

    def _handed(self, holder: int, params: list[Any] | None, columns: list[Any]) -> list[Any] | None:
        """Return the parameters that a wrapper hands inside; where it is not for a leaf, those of the user."""
        state, rule = columns[holder], cast(Rule, self.links[holder].rule)
        if params is None or not state:
            return params
        held = [isinstance(entry, Tensor) for entry in state[0]]
        return [
            rule.of(p.dtype).hands(p, row(state, i)) if on else p
            for i, (p, on) in enumerate(zip(params, held, strict=True))
        ]

    def _run_tree_rule(
        self,
        k: int,
        leaves: Leaves,
        updates: list[Any],
        columns: list[Any],
        extras: dict[str, Any],
    ) -> tuple[list[Any], Any]:
        """Run a function of the whole tree on those leaves that it is for."""
        link, active = self.links[k], self.active[k]
        rule: Any = link.rule

        def arranged(some: Sequence[Any]) -> Tree:
            on_all = not link.where
            if self.shards is not None:
                some = self.shards.joined(some, range(len(some)))
            return tree.unflatten(
                self.structure, [leaf if on or on_all else MaskedNode() for leaf, on in zip(some, active, strict=True)]
            )

        params, some = self._params_of(k, leaves.params, columns), updates
        if params is not None and link.widens is None:  # a wrapper that rounds must see the dtypes of the parameters
            params, some = _beside(params, updates), _beside(updates, params)
        given = arranged(some)
        pair = rule.update(
            given, columns[k], None if params is None else arranged(params), **self.extras[k].wanted(extras)
        )
        checks.check_pair(f"The update of {rule.name}", "updates", pair)
        returned, new_state = pair
        old_leaves, structure = tree.flatten(given)
        name = f"the updates from {rule.name}"
        new_leaves = tree.flatten_up_to(structure, returned, name, given, "updates")
        checks.check_updates(new_leaves, old_leaves, lambda i: tree.paths(given)[i], name, "the one it was given", True)
        if self.shards is not None:
            new_leaves = self.shards.cut(new_leaves, [i for i, on in enumerate(active) if on or not link.where])
        if not link.where:
            return list(new_leaves), new_state
        remaining = iter(new_leaves)
        return [next(remaining) if on else u for on, u in zip(active, updates, strict=True)], new_state


def _beside(tensors: list[Any], others: list[Any]) -> list[Any]:
    """Widen tensors in half precision where the others are float32."""
    return [
        t if t is None or other is None or t.dtype == other.dtype else widened(t)
        for t, other in zip(tensors, others, strict=True)
    ]


def _where_open(is_open: Tensor, new: tuple[list[Any], Any], old: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
    """Choose between the results of a function of the whole tree and the former ones; left-out updates are zero."""
    updates = [
        u if u is before or u is None else torch.where(is_open, u, torch.zeros_like(u))
        for u, before in zip(new[0], old[0], strict=True)
    ]
    return updates, tree.map(lambda after, before: torch.where(is_open, after, before), new[1], old[1])


def _passes(links: Sequence[Link], widening: Collection[int]) -> tuple[list[list[int]], set[int]]:
    """Split links into passes, by index; one that sees the whole tree begins a new one.

    Args:
        links: of the transformation.
        widening: the places where updates are made wide, where passes begin too.

    Returns:
        The passes; and the links whose updates are kept for those that recall them, which are then alone in their pass.
    """
    begins = {
        k
        for k, link in enumerate(links)
        if k in widening or link.rule.sees_tree or (k > 0 and isinstance(links[k - 1].rule, TreeRule))
    }
    passes = _split(links, begins)
    recalls = [(k - link.recalls, k) for k, link in enumerate(links) if link.recalls is not None]
    if all([any(first in some and k in some for some in passes) for first, k in recalls]):  # noqa: C419
        return passes, set()
    return _split(links, begins.union(*[(first, k, k + 1) for first, k in recalls])), {first for first, _ in recalls}


def _split(links: Sequence[Link], begins: set[int]) -> list[list[int]]:
    """Split links where passes begin."""
    last = [next((j - 1 for j in range(k + 1, len(links)) if j in begins), len(links)) for k in range(len(links))]
    groups: list[list[int]] = []
    for k in range(len(links)):
        # Links whose parameters a wrapper in a later pass holds are given those for the parameters.
        if not groups or k in begins or _holder(links, k, last[k]) != _holder(links, k - 1, last[k - 1]):
            groups.append([])
        groups[-1].append(k)
    return groups


def _holder(links: Sequence[Link], k: int, last: int) -> int | None:
    """Find the wrapper whose state holds the parameters of a link, if it is behind the last link of the same pass."""
    holder = k + links[k].inside
    return holder if holder > last else None


def _tensors(leaves: Leaves) -> list[Any]:
    columns = [
        column for state in leaves.columns if isinstance(state, tuple) for column in state if isinstance(column, list)
    ]
    return [*leaves.updates, *(leaves.params or ()), *[tensor for column in columns for tensor in column]]
