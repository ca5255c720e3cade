"""Leaves that are run together: by the same links, with the same numbers, of one dtype and device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.checks import Path
from functorch_optim._core.leaves import Ready
from functorch_optim._core.links import Link
from functorch_optim._core.numbers import Bucket, Numbers, Shares
from functorch_optim._core.rule import ADD, Rule, TreeRule, unchanged
from functorch_optim._core.shards import Shards
from functorch_optim._execution.group import Group
from functorch_optim._execution.reference import Held, Stage
from functorch_optim._execution.representation import make


class LeafGroups:
    """Finds the groups of leaves for the links that run at a step.

    Args:
        links: of the transformation.
        active: for each link, whether it is for each leaf.
        numbers: computes their numbers.
        dtypes: of the parameters; None where there is none.
        path: names a leaf, for messages.
        make_group: makes a group of stages, a sample, its path, whether nothing moves, and how tensors are sharded.
        shards: the layouts of leaves; None where none is sharded.
    """

    def __init__(
        self,
        links: Sequence[Link],
        active: list[list[bool]],
        numbers: Numbers,
        dtypes: Sequence[torch.dtype | None],
        path: Path,
        make_group: Callable[..., Group],
        shards: Shards | None,
    ) -> None:
        self.links, self.active, self.dtypes, self.path, self.make_group = links, active, dtypes, path, make_group
        self.shards = shards
        self.differs = numbers.differs
        self.last = [_is_last(links, k) for k in range(len(links))]
        self.vanishing = any(isinstance(link.rule, TreeRule) or link.rule.hold is not None for link in links)
        self.found: dict[Any, list[LeafGroup]] = {}

    def find(
        self, members: Sequence[int], number: int, bucket: Bucket, updates: list[Any], scalars: dict[int, Any]
    ) -> list[tuple["LeafGroup", list[Any]]]:
        """Find the groups of leaves that are run together, and the numbers for each."""
        static = None if self.vanishing or self.differs else (members[0], number)
        if static in self.found:
            return [(group, [scalars[k] for k in group.applying]) for group in self.found[static]]
        running = tuple([(k, isinstance(s, Held)) for k, s in scalars.items()])
        key: Any = (number, running)
        if self.vanishing:
            key = (*key, tuple([u is None for u in updates]))
        if not self.differs.isdisjoint(members):
            return self._shared_groups(key, running, bucket.members, updates, scalars)
        if key not in self.found:
            self.found[key] = self._parted(running, bucket.members, updates)
        if static is not None:
            self.found[static] = self.found[key]
        return [(group, [scalars[k] for k in group.applying]) for group in self.found[key]]

    def _shared_groups(
        self, key: Any, running: Any, members: Sequence[int], updates: list[Any], scalars: dict[int, Any]
    ) -> list[tuple["LeafGroup", list[Any]]]:
        """Find groups of leaves whose numbers are the same."""
        place: dict[int, dict[int, int]] = {
            k: {i: n for n, (some, _) in enumerate(s.shares) for i in some}
            for k, s in scalars.items()
            if isinstance(s, Shares)
        }
        parts: dict[Any, list[int]] = {}
        for i in members:
            parts.setdefault(tuple([where.get(i) for where in place.values()]), []).append(i)
        found = []
        for indices in parts.values():
            own = (*key, tuple(indices))
            if own not in self.found:
                self.found[own] = self._parted(running, indices, updates)
            for group in self.found[own]:
                first = group.indices[0]
                numbers = [scalars[k].shares[place[k][first]][1] if k in place else scalars[k] for k in group.applying]
                found.append((group, numbers))
        return found

    def _parted(
        self, running: Sequence[tuple[int, bool]], members: Sequence[int], updates: list[Any]
    ) -> list["LeafGroup"]:
        """Part leaves by the links that apply to them, and by dtypes and device."""
        parts: dict[Any, list[int]] = {}
        for i in members:
            u = updates[i]
            if u is not None:
                applying = tuple([one for one in running if self.active[one[0]][i]])
                still = any(holds and self.last[k] for k, holds in applying)
                if still:  # nothing moves, so that there is nothing to add
                    applying = tuple([one for one in applying if self.links[one[0]].rule is not ADD])
                alone = i if u.layout != torch.strided else None
                kind = None if self.shards is None else self.shards.kind(i)
                if applying:
                    key = (applying, still, self.dtypes[i], u.device, u.dtype, alone, kind)
                    parts.setdefault(key, []).append(i)
        own = (self.path, self.make_group, self.shards)
        return [
            LeafGroup(self.links, [k for k, _ in applying], dtype, indices, updates, still, *own)
            for (applying, still, dtype, *_), indices in parts.items()
        ]


class LeafGroup:
    """Leaves that are run together, by the same links.

    Args:
        links: of the transformation.
        applying: those that are run, by index.
        dtype: of the parameters.
        indices: of the leaves.
        updates: of all leaves.
        still: whether nothing moves.
        path: names a leaf, for messages.
        make_group, shards: as `LeafGroups` is given them.
    """

    def __init__(
        self,
        links: Sequence[Link],
        applying: list[int],
        dtype: torch.dtype | None,
        indices: list[int],
        updates: list[Any],
        still: bool,
        path: Path,
        make_group: Callable[..., Group],
        shards: Shards | None,
    ) -> None:
        self.applying, self.indices = applying, indices
        self.whole = indices == list(range(len(updates)))
        own = [links[k] for k in applying]
        rules = [link.rule.of(dtype) for link in own]  # type: ignore[union-attr]
        self.idle = all(rule.update is unchanged for rule in rules)
        stages = [
            Stage(rule, _source(own, rules, applying, n), _recalled(own, applying, n)) for n, rule in enumerate(rules)
        ]
        first = updates[indices[0]]
        self.is_sparse = first.layout != torch.strided
        self.to_dense = self.is_sparse and wants_dense(
            [stage.rule for stage in stages], first, lambda: path(indices[0])
        )
        sample = first.to_dense() if self.to_dense else first
        wholes = None if shards is None else shards.wholes(applying, indices)
        self.group = make_group(stages, sample, lambda k: path(indices[k]), still=still, wholes=wholes)

    def ready(
        self, updates: list[Any], params: list[Any] | None, columns: list[Any], scalars: list[Any]
    ) -> Ready | None:
        """Get ready to overwrite parameters and states; None where that cannot be done. Their updates are then None."""
        if params is None:
            return None
        some = self._picked(updates)
        if self.group.kept is not None:  # parameters and states
            overwrite = self.group.overwrite(some, [], [], scalars)
        else:
            overwrite = self.group.overwrite(some, self._picked(params), self._states(columns), scalars)
        if overwrite is not None:
            for i in self.indices:
                updates[i] = None
        return overwrite

    def compute(self, updates: list[Any], params: list[Any] | None, columns: list[Any], scalars: list[Any]) -> None:
        """Run the links on these leaves; write into `updates`, and replace lists of `columns`."""
        states = self._states(columns)
        mine = None if params is None else self._picked(params)
        new, new_states = self.group.compute(self._picked(updates), mine, states, scalars)
        for k, state in zip(self.applying, new_states, strict=True):
            if state:
                columns[k] = state if self.whole else self._placed(columns[k], state)
        for n, i in enumerate(self.indices):
            updates[i] = None if new is None else new[n]

    def _picked(self, column: list[Any]) -> list[Any]:
        picked = list(column) if self.whole else [column[i] for i in self.indices]
        return [u.to_dense() if u.layout == torch.sparse_coo else u for u in picked] if self.to_dense else picked

    def _states(self, columns: list[Any]) -> list[Any]:
        if self.whole:
            return [columns[k] for k in self.applying]
        return [make(type(columns[k]), [self._picked(column) for column in columns[k]]) for k in self.applying]

    def _placed(self, columns: Any, state: Any) -> Any:
        """Return columns with the states of these leaves in their places."""
        placed = make(type(columns), [list(column) for column in columns])
        for column, new in zip(placed, state, strict=True):
            for i, tensor in zip(self.indices, new, strict=True):
                column[i] = tensor
        return placed


def _source(links: Sequence[Link], rules: Sequence[Rule], applying: list[int], n: int) -> tuple[int, Any] | None:
    """Find the wrapper that hands a link its parameters, where it is among these links; and how it makes them."""
    holder = applying[n] + links[n].inside
    if not links[n].inside or links[n].recalls is not None or holder not in applying:
        return None
    place = applying.index(holder)
    return place, rules[place].hands


def _recalled(links: Sequence[Link], applying: list[int], n: int) -> int | None:
    """Find the link whose update another one recalls; if it is for other leaves, the next one has the same update."""
    recalls = links[n].recalls
    if recalls is None:
        return None
    return next(place for place, k in enumerate(applying) if k >= applying[n] - recalls)


def wants_dense(rules: Sequence[Any], update: Tensor, path: Callable[[], str]) -> bool:
    """Tell whether a rule wants a sparse update to be dense.

    Raises:
        RuntimeError: a rule refuses it.
    """
    if update.layout != torch.sparse_coo:
        raise RuntimeError(
            f"The gradient of {path()!r} has layout {update.layout}; of sparse ones only torch.sparse_coo is supported"
        )
    for rule in rules:
        if rule.sparse is None:
            raise RuntimeError(
                f"{rule.name} does not support sparse gradients, but that of {path()!r} has layout {update.layout}; "
                "give update.to_dense(), or use sparse_adam, adagrad or sgd with gradients of layout torch.sparse_coo"
            )
    return any(rule.sparse == "dense" for rule in rules)


def _is_last(links: Sequence[Link], k: int) -> bool:
    """Tell whether only the addition to the parameters comes after a gate and the links inside."""
    return all(k in [j - back for back in links[j].when] or links[j].rule is ADD for j in range(k + 1, len(links)))
