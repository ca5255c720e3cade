"""Which links of a transformation are for which parameters, and under which names their states are kept."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import lift, tree
from functorch_optim.base import GradientTransformation
from functorch_optim.lift import Link
from functorch_optim.rule import Rule, TreeRule


class Part(NamedTuple):
    """What happens to one kind of parameter: the same for all to which the same links apply.

    Attributes:
        links: indices of the rules that apply.
        counted: whether any of them needs the step.
        keys: for each of them, the keys of its state in `state[p]`.
    """

    links: tuple[int, ...]
    counted: bool
    keys: tuple[tuple[str, ...], ...]


class Plan:
    """How a transformation applies to a list of parameters.

    Args:
        transformation: the transformation.
        params: the parameters.
        names: their names, where they have some. Masks and labels then see a dict of parameters by name; else the list.
    """

    def __init__(
        self, transformation: GradientTransformation, params: Sequence[Tensor], names: Sequence[str] | None
    ) -> None:
        self.links = transformation._links
        self.params = params
        self.names = names
        self.active = [self._active(link) for link in self.links]
        self._state_types: dict[int, Any] = {}
        parts: dict[tuple[int, ...], Part] = {}
        self.parts: list[Part] = []
        rules = [k for k, link in enumerate(self.links) if isinstance(link.rule, Rule)]
        for i, p in enumerate(params):
            links = tuple([k for k in rules if self.active[k] is None or self.active[k][i]])
            if links not in parts:
                parts[links] = self._part(links, p)
            self.parts.append(parts[links])

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Arrange leaves, one for each parameter, as masks and functions of the whole tree see them."""
        return list(leaves) if self.names is None else dict(zip(self.names, leaves, strict=True))

    def leaves(self, arranged: Any) -> list[Any]:
        """Undo `tree`."""
        return list(arranged) if self.names is None else [arranged[name] for name in self.names]

    def path(self, i: int) -> str:
        """Name a parameter for messages."""
        return str(i) if self.names is None else self.names[i]

    def state_type(self, k: int, p: Tensor) -> Any:
        """Return the NamedTuple in which a rule keeps its state for one parameter."""
        if k not in self._state_types:
            rule: Any = self.links[k].rule
            # Asked of a tensor without data when it was not declared.
            self._state_types[k] = rule.state_type or type(rule.init_leaf(torch.empty_like(p, device="meta")))
        return self._state_types[k]

    def _active(self, link: Link) -> Any:
        if not link.where:
            return None
        flags = link.active(self.tree(self.params), len(self.params))
        arranged = tree.unflatten(tree.flatten(self.tree(self.params))[1], flags)
        return self.leaves(arranged)

    def _part(self, links: tuple[int, ...], p: Tensor) -> Part:
        fields = [getattr(self.state_type(k, p), "_fields", ()) for k in links]
        counts = Counter(field for some in fields for field in some)
        keys = [
            tuple([field if counts[field] == 1 else f"{k}.{field}" for field in some])
            for k, some in zip(links, fields, strict=True)
        ]
        return Part(links, any(self.links[k].rule.scalars is not None for k in links), tuple(keys))

    def initial_tree_state(self, k: int) -> Any:
        """Make the state of a function of the whole tree."""
        return lift.init([self.links[k]], self.tree(self.params))[0]

    def run_tree_rule(self, k: int, updates: list[Any], state: Any, extras: dict[str, Any]) -> tuple[list[Any], Any]:
        """Run a function of the whole tree."""
        leaves, structure = tree.flatten(self.tree(updates))
        active = tree.flatten(self.tree(self.active[k] or [True] * len(updates)))[0]
        arranged, new_state = lift.run_tree_rule(
            self.links[k], leaves, state, self.tree(self.params), extras, structure, active
        )
        return self.leaves(tree.unflatten(structure, arranged)), new_state

    def is_tree_rule(self, k: int) -> bool:
        """Tell whether a link is a function of the whole tree."""
        return isinstance(self.links[k].rule, TreeRule)
