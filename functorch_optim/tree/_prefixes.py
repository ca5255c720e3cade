"""Prefixes of trees: trees that have one value for a leaf, or for all leaves of a subtree."""

from typing import Any

from functorch_optim.tree._structure import Tree, children, dotted, flatten, is_leaf


def broadcast_prefix(prefix: Tree, tree: Tree, name: str) -> list[Any]:
    """Give every leaf of `tree` the leaf of `prefix` that stands at it or above it, in the order of `flatten`.

    Raises:
        ValueError: `prefix` is no prefix of `tree`; the message names the path.
    """

    def walk(prefix: Tree, tree: Tree, path: str) -> list[Any]:
        if is_leaf(prefix):
            return [prefix] * len(flatten(tree)[0])
        given, wanted = children(prefix), children(tree)
        if is_leaf(tree) or set(given) != set(wanted):
            here, have = repr(path) if path else "the root", "a leaf" if is_leaf(tree) else list(wanted)
            raise ValueError(
                f"{name} do not fit the parameters: at {here} they have {list(given)} where the parameters have "
                f"{have}. Give one value for each parameter, or one for a whole subtree"
            )
        return [leaf for key, child in wanted.items() for leaf in walk(given[key], child, dotted(path, key))]

    return walk(prefix, tree, "")


class Prefixes:
    """Prefixes of one tree, each of which is broadcast to it once."""

    def __init__(self, tree: Tree, name: str) -> None:
        """Hold the tree, and the name of the prefixes in messages."""
        self._tree, self._name = tree, name
        self._known: list[tuple[Tree, list[Any]]] = []

    def of(self, prefix: Tree) -> list[Any]:
        """Give every leaf of the tree the prefix's value for it; see `broadcast_prefix`."""
        for known, found in self._known:
            if known is prefix:
                return found
        self._known.append((prefix, broadcast_prefix(prefix, self._tree, self._name)))
        return self._known[-1][1]
