"""Links: what a transformation is made of; a rule each, and the leaves that it is for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim import tree
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
        rule: what is done.
        where: selections that a leaf must pass, all of them; none means every leaf.
    """

    rule: Rule | TreeRule
    where: tuple[Selection, ...] = ()


def select(links: Sequence[Link], params: Tree) -> list[list[bool]]:
    """Tell for each link which leaves of `params` it is for. A leaf that is None may have any label.

    Raises:
        ValueError: labels do not fit the parameters, or one is unknown.
        TypeError: a label is a tensor.
    """
    leaves = tree.flatten(params)[0]
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
        flags = [True] * len(leaves)
        for selection in link.where:
            for i, label in enumerate(labels_of(selection)):
                if leaves[i] is not None:
                    _check_label(label, selection.known, params, i)
                flags[i] = flags[i] and label == selection.label
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
