"""Leaves that are sharded: links are run over their local shards, and their results are sharded tensors again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from functorch_optim._core.leaves import Leaves, Outcome
from functorch_optim._core.links import Link
from functorch_optim._core.rule import TreeRule
from functorch_optim._execution.representation import make
from functorch_optim._execution.sharded import Layout, is_of, is_sharded, layout_of, some_sharded
from functorch_optim._execution.wholes import Wholes


class Shards:
    """The layouts of leaves of one form.

    Args:
        links: that are run.
        leaves: some of this form.
        keeps: whether parameters and states are always the same tensors.

    Attributes:
        layouts: for each leaf, that of its parameter; None where it is not sharded. Gradients are brought into it.
    """

    def __init__(self, links: Sequence[Link], leaves: Leaves, keeps: bool) -> None:
        self.layouts = [layout_of(leaf) for leaf in leaves.params or leaves.updates]
        self.ranks = max([layout.mesh.size() for layout in self.layouts if layout is not None], default=1)
        self.keeps = keeps
        self.kept: tuple[Leaves, Leaves] | None = None
        self.own: list[Any] = []  # for each link, the layouts of its states
        self.inside: list[Any] = []  # for each link, the layouts in which it is given them
        for link, state in zip(links, leaves.columns, strict=True):
            if isinstance(link.rule, TreeRule) or not state:
                self.own.append(())
                self.inside.append(())
                continue
            own = [list(map(layout_of, column)) for column in state]
            fields = [
                self.layouts if link.rule.elementwise or (link.rule.norms and _have_elements(column)) else layouts
                for column, layouts in zip(state, own, strict=True)
            ]
            self.own.append(make(type(state), own))
            self.inside.append(make(type(state), fields))

    def local(self, leaves: Leaves) -> Leaves:
        """Return the local shards of leaves."""
        if self.kept is not None and self.kept[0].columns is leaves.columns and self.kept[0].params is leaves.params:
            return self.kept[1]._replace(updates=_each(_shard, self.layouts, leaves.updates))
        shards = type(leaves)(
            _each(_shard, self.layouts, leaves.updates),
            None if leaves.params is None else _each(_shard, self.layouts, leaves.params),
            [
                make(type(state), list(map(functools.partial(_each, _shard), inside, state))) if inside else state
                for inside, state in zip(self.inside, leaves.columns, strict=True)
            ],
        )
        if self.keeps:  # no gradients
            self.kept = leaves._replace(updates=[]), shards._replace(updates=[])
        return shards

    def restored(self, outcome: Outcome, given: Leaves, shards: Leaves) -> Outcome:
        """Make sharded tensors of results; those that did not change are the given ones."""
        columns = [
            old if new is shard else self._restored(k, new, old, shard)
            for k, (new, old, shard) in enumerate(zip(outcome.columns, given.columns, shards.columns, strict=True))
        ]
        ready = list(outcome.ready)
        if ready:
            ready.append(functools.partial(torch.autograd.graph.increment_version, self._overwritten(outcome, given)))
        return outcome._replace(updates=_each(_joined, self.layouts, outcome.updates), columns=columns, ready=ready)

    def _restored(self, k: int, new: Any, old: Any, shard: Any) -> Any:
        if not self.own[k]:
            return new
        fields = []
        for own, inside, *columns in zip(self.own[k], self.inside[k], new, old, shard, strict=True):
            rows = zip(own, inside, *columns, strict=True)
            fields.append([before if n is s else _moved(n, layout, home) for home, layout, n, before, s in rows])
        return make(type(new), fields)

    def _overwritten(self, outcome: Outcome, given: Leaves) -> list[Any]:
        """List the sharded tensors whose shards are overwritten: autograd looks at their own versions."""
        here = [
            i
            for i, (u, new) in enumerate(zip(given.updates, outcome.updates, strict=True))
            if u is not None and new is None and self.layouts[i] is not None
        ]
        columns = [column for k, state in enumerate(given.columns) if self.own[k] for column in state]
        written = [column[i] for column in [given.params or [], *columns] for i in here]
        return list(filter(is_sharded, written))

    def joined(self, tensors: Sequence[Any], here: Sequence[int], given: Sequence[Any] | None = None) -> list[Any]:
        """Return the sharded tensors of shards: the given ones where these have them, else new ones."""
        return [
            given[i] if given and is_of(tensor, given[i]) else _joined(self.layouts[i], tensor)
            for i, tensor in zip(here, tensors, strict=True)
        ]

    def cut(self, tensors: Sequence[Any], here: Sequence[int]) -> list[Any]:
        """Return the local shards of updates of these leaves."""
        return [_shard(self.layouts[i], tensor) for i, tensor in zip(here, tensors, strict=True)]

    def kind(self, i: int) -> Any:
        """Return a key that leaves share which are sharded alike."""
        layout = self.layouts[i]
        return None if layout is None else (layout.mesh, layout.placements)

    def wholes(self, applying: Sequence[int], indices: Sequence[int]) -> Wholes:
        """Return how whole tensors are made of the shards of some leaves, and of their states for some links."""
        states = [
            make(type(self.inside[k]), [[column[i] for i in indices] for column in self.inside[k]]) for k in applying
        ]
        return Wholes([self.layouts[i] for i in indices], states, self.ranks)


def shards_of(links: Sequence[Link], leaves: Leaves, keeps: bool) -> Shards | None:
    """Return the layouts of leaves; None where none is sharded."""
    return Shards(links, leaves, keeps) if some_sharded(leaves.params or leaves.updates) else None


def _have_elements(column: Sequence[Any]) -> bool:
    """Tell whether some tensor of a column is more than one number."""
    return any(isinstance(tensor, torch.Tensor) and tensor.ndim > 0 for tensor in column)


def _each(function: Any, layouts: Sequence[Layout | None], tensors: Sequence[Any]) -> list[Any]:
    return [function(layout, tensor) for layout, tensor in zip(layouts, tensors, strict=True)]


def _shard(layout: Layout | None, tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor if layout is None else layout.shard(tensor)


def _joined(layout: Layout | None, tensor: Any) -> Any:
    return tensor if layout is None or tensor is None else layout.joined(tensor)


def _moved(shard: Any, layout: Layout | None, home: Layout | None) -> Any:
    """Bring a new state from the layout in which a link has made it to the one of the old."""
    if layout is None:
        return shard
    if home is None:
        return layout.whole(shard)
    return home.joined(shard if home == layout else home.shard(layout.joined(shard)))
