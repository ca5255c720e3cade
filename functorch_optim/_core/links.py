"""Links: a transformation is a flat sequence of them, each a rule, the leaves that it is for, and the steps.

How the states of links nest for users is a layout: an index for a link, a tuple for a chain, a dict for named parts.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import SINGLE
from functorch_optim._core.rule import Rule, TreeRule
from functorch_optim.tree import Tree


class Selection(NamedTuple):
    """The leaves that bear a label.

    Attributes:
        labels: tree of labels, a prefix of the parameters; or a function of the parameters that returns one.
        label: the label that selects.
        known: all labels that may occur.
    """

    labels: Any
    label: Any
    known: tuple[Any, ...]


class Link(NamedTuple):
    """One link of a chain.

    Attributes:
        rule: the algorithm.
        where: selections that a leaf must pass, all of them; none means every leaf.
        when: gates that a step must pass: for each, how many links before this one its rule stands.
        inside: how many links after this one the wrapper stands whose state holds the parameters of this link; 0 for
            the parameters of the user.
        reads: how many links before this one the keepers stand whose numbers are hyperparameters of this link.
        recalls: how many links before this one the link stands whose updates, as it was given them, this one takes for
            the parameters; None for the parameters.
        widens: how many links before this one updates in half precision become float32; None for nowhere.
        dtypes: the dtype of a state by its name, for parameters of at most single precision; None for the rule's own.
    """

    rule: Rule | TreeRule
    where: tuple[Selection, ...] = ()
    when: tuple[int, ...] = ()
    inside: int = 0
    reads: tuple[int, ...] = ()
    recalls: int | None = None
    widens: int | None = None
    dtypes: Callable[[str], torch.dtype] | None = None

    @property
    def needs_params(self) -> bool:
        """Tell whether the rule uses the parameters."""
        return self.rule.needs_params and self.recalls is None

    def init_leaf(self, p: Tensor) -> Any:
        """Make the state for one parameter."""
        rule: Any = self.rule
        if self.dtypes is None or p.dtype not in SINGLE:
            return rule.init_leaf(p)
        state = rule.init_leaf(p.to(torch.float32))
        fields = zip(getattr(state, "_fields", ()), state, strict=True)
        kept = [t.to(self.dtypes(name)) if t.dtype in SINGLE else t for name, t in fields]
        return type(state)(*kept) if state else state


def select(links: Sequence[Link], params: Tree) -> list[list[bool]]:
    """Tell for each link which leaves of `params` it is for. A leaf that is None may have any label.

    Raises:
        ValueError: labels do not fit the parameters, or one is unknown.
        TypeError: a label is a tensor.
    """
    leaves = tree.flatten(params)[0]
    everywhere = [True] * len(leaves)
    prefixes = tree.Prefixes(params, "the mask or labels")  # links often share labels: each is looked at once
    made: list[tuple[Any, Tree]] = []

    def labels_of(selection: Selection) -> list[Any]:
        if not tree.is_leaf(selection.labels) or not callable(selection.labels):
            return prefixes.of(selection.labels)
        for function, labels in made:
            if function is selection.labels:
                return prefixes.of(labels)
        made.append((selection.labels, selection.labels(params)))
        return prefixes.of(made[-1][1])

    chosen = []
    for link in links:
        flags = everywhere
        for selection in link.where:
            labels = labels_of(selection)
            for i, label in enumerate(labels):
                if leaves[i] is not None:
                    _check_label(label, selection.known, params, i)
            flags = [on and label == selection.label for on, label in zip(flags, labels, strict=True)]
        chosen.append(flags)
    return chosen


def _check_label(label: Any, known: tuple[Any, ...], params: Tree, i: int) -> None:
    if isinstance(label, Tensor):
        raise TypeError(
            f"The label at {tree.paths(params)[i]!r} is a tensor; masks and labels are python values, such as True"
        )
    if label not in known:
        raise ValueError(
            f"The label {label!r} at {tree.paths(params)[i]!r} is unknown; known are {', '.join(map(repr, known))}"
        )


def with_rates(links: Sequence[Link]) -> list[Link]:
    """Tell rules that depend on it the learning rate of their chain: the next one after them, or else the last before.

    It is that of a link that is for all of their leaves.
    """
    told = list(links)
    for k, link in enumerate(links):
        if link.rule.of_rate is not None:
            rates = [j for j, other in enumerate(links) if other.rule.lr is not None and _covers(other, link)]
            if rates:
                j = next((j for j in rates if j > k), rates[-1])
                told[k] = link._replace(rule=link.rule.of_rate(links[j].rule.lr, j < k))
    return told


def _covers(one: Link, other: Link) -> bool:
    """Tell whether a link is for all leaves of another."""
    shared = zip(one.where, other.where, strict=False)
    return len(one.where) <= len(other.where) and all(mine is theirs for mine, theirs in shared)


def nest(layout: Any, states: Sequence[Any]) -> Any:
    """Arrange the states of links as users see them."""
    if isinstance(layout, int):
        return states[layout]
    if isinstance(layout, tuple):
        return tuple([nest(part, states) for part in layout])
    return {name: nest(part, states) for name, part in layout.items()}


def unnest(layout: Any, state: Any, path: tuple[Any, ...] = ()) -> list[Any]:
    """List the states of links in order.

    Raises:
        ValueError: the state is arranged differently.
    """
    if isinstance(layout, int):
        return [state]
    names = range(len(layout)) if isinstance(layout, tuple) else list(layout)
    if (
        type(state) is not type(layout)
        or len(state) != len(layout)
        or not (type(state) is tuple or state.keys() == layout.keys())
    ):
        expected = f"a tuple of {len(names)}" if isinstance(layout, tuple) else f"a dict with the keys {names}"
        where = "".join([f"[{name!r}]" for name in path])
        raise ValueError(
            f"state{where} should be {expected}, but it is {_describe(state)}: it belongs to another transformation. "
            "Make it with the init of the transformation whose update is called: state = tx.init(params)"
        )
    found: list[Any] = []
    for name in names:
        found += unnest(layout[name], state[name], (*path, name))
    return found


def _describe(state: Any) -> str:
    if type(state) is tuple:
        return f"a tuple of {len(state)}"
    return f"a dict with the keys {list(state)}" if type(state) is dict else f"a {type(state).__name__}"


def shift(layout: Any, by: int) -> Any:
    """Renumber the links in a layout."""
    if isinstance(layout, int):
        return layout + by
    if isinstance(layout, tuple):
        return tuple([shift(part, by) for part in layout])
    return {name: shift(part, by) for name, part in layout.items()}


def numbered(field: str, counts: Counter[str]) -> str:
    """Name a field of one parameter's state: the second momentum_buffer is momentum_buffer.1.

    Args:
        field: the name in the state of its rule.
        counts: how often it has come already.
    """
    counts[field] += 1
    return field if counts[field] == 1 else f"{field}.{counts[field] - 1}"
