"""Trees of tensors: what this library needs of pytrees, over optree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import optree
import torch

Tree: TypeAlias = Any
"""A tensor, or any nesting of dicts, lists, tuples, NamedTuples, ... of tensors."""

# Dataclasses and other nodes registered globally with optree, or in this namespace, are trees.
NAMESPACE = "functorch_optim"


class MaskedNode(NamedTuple):
    """Stands where a leaf has been masked out; a node without leaves, so that tree functions pass over it.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> fo.masked(fo.trace(0.9), {"w": True, "b": False}).init(params).momentum_buffer["b"]
        MaskedNode()
    """


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Split a tree into its leaves and its structure; None is a leaf, MaskedNode is none."""
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)


def unflatten(structure: Any, leaves: list[Any]) -> Tree:
    """Build the tree of this structure with these leaves."""
    return optree.tree_unflatten(structure, leaves)


def flatten_up_to(structure: Any, other: Tree, name: str, reference: Tree, reference_name: str) -> list[Any]:
    """Flatten `other` only as deep as `structure`, the structure of `reference`.

    Raises:
        ValueError: `other` is built differently; the message names the path of the first difference.
    """
    try:
        leaves: list[Any] = structure.flatten_up_to(other)
        return leaves
    except ValueError as error:
        raise ValueError(
            f"{name} and {reference_name} do not match: {first_difference(reference, other, reference_name, name)}. "
            f"{name} must be built like {reference_name}."
        ) from error


def first_difference(left: Tree, right: Tree, left_name: str, right_name: str) -> str:
    """Say where and how the structure of `right` first differs from that of `left`."""

    def walk(left: Tree, right: Tree, path: str) -> str | None:
        here = f"at {path!r}" if path else "at the root"
        if _is_leaf(left):
            return None
        if _is_leaf(right) or type(left) is not type(right):
            return f"{here}, {left_name} has a {type(left).__name__} and {right_name} has a {type(right).__name__}"
        left_children = dict(zip(*_children(left), strict=True))
        right_children = dict(zip(*_children(right), strict=True))
        for missing_from, those, others in (
            (right_name, left_children, right_children),
            (left_name, right_children, left_children),
        ):
            missing = [key for key in those if key not in others]
            if missing:
                return f"{dotted(path, missing[0])!r} is missing from {missing_from}"
        for key, child in left_children.items():
            found = walk(child, right_children[key], dotted(path, key))
            if found is not None:
                return found
        return None

    return walk(left, right, "") or f"{left_name} and {right_name} have different node types"


def dotted(path: str, key: Any) -> str:
    """Append a key to a dotted path."""
    return f"{path}.{key}" if path else str(key)


def paths(tree: Tree) -> list[str]:
    """Name every leaf by its dotted path, in the order of `flatten`.

    Example:
        >>> paths({"layer": {"weight": 1, "bias": 2}, "scale": (3, 4)})
        ['layer.bias', 'layer.weight', 'scale.0', 'scale.1']
    """
    accessors = optree.tree_accessors(tree, none_is_leaf=True, namespace=NAMESPACE)
    return [".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor) for accessor in accessors]


def broadcast_prefix(prefix: Tree, tree: Tree, name: str) -> list[Any]:
    """Give every leaf of `tree` the leaf of `prefix` that stands at it or above it, in the order of `flatten`.

    Raises:
        ValueError: `prefix` is no prefix of `tree`; the message names the path.
    """

    def walk(prefix: Tree, tree: Tree, path: str) -> list[Any]:
        if _is_leaf(prefix):
            return [prefix] * len(flatten(tree)[0])
        keys, children = _children(tree)
        # Not by flattening the prefix: torch.compile cannot trace that for a dict of constants.
        by_key = isinstance(prefix, Mapping | Sequence)
        present = list(range(len(prefix)) if isinstance(prefix, Sequence) else prefix) if by_key else keys
        if set(present) != set(keys):
            raise ValueError(
                f"{name} do not fit the parameters: at {path or 'the root'!r} they have {present} where the parameters "
                f"have {keys or 'a leaf'}. Give one value for each parameter, or one for a whole subtree"
            )
        return [
            leaf
            for key, child in zip(keys, children, strict=True)
            for leaf in walk(prefix[key] if by_key else getattr(prefix, key), child, dotted(path, key))
        ]

    return walk(prefix, tree, "")


def _is_leaf(node: Tree) -> bool:
    return optree.tree_is_leaf(node, none_is_leaf=True, namespace=NAMESPACE)


def _children(node: Tree) -> tuple[list[Any], list[Any]]:
    """List the keys and the children of a node; none for a leaf."""
    if _is_leaf(node):
        return [], []
    children, _, keys, _ = optree.tree_flatten_one_level(node, none_is_leaf=True, namespace=NAMESPACE)
    return list(keys), list(children)


def map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:  # noqa: A001 - it is what the field calls it
    """Apply `function` to every leaf of `tree` and to the leaves of `rest` at the same places; None stays None.

    Args:
        function: takes one leaf of each tree.
        tree: any tree.
        *rest: trees built like `tree`.

    Returns:
        A tree built like `tree`.

    Raises:
        ValueError: a tree of `rest` is built differently.

    Example:
        >>> import functorch_optim as fo
        >>> fo.tree.map(lambda x, y: x + y, {"a": 1, "b": None}, {"a": 10, "b": None})
        {'a': 11, 'b': None}
    """
    leaves, structure = flatten(tree)
    others = [flatten_up_to(structure, other, f"tree {i + 2}", tree, "the first tree") for i, other in enumerate(rest)]
    columns = zip(leaves, *others, strict=True)
    results = [None if column[0] is None else function(*column) for column in columns]
    if torch.compiler.is_compiling():
        return _rebuild(tree, iter(results))
    return unflatten(structure, results)


def _rebuild(node: Tree, leaves: Iterator[Any]) -> Tree:
    """Do what `unflatten` does, for what torch.compile cannot trace of it: dicts of constants, as masks are."""
    if _is_leaf(node):
        return next(leaves)
    children, metadata, keys, unflatten_node = optree.tree_flatten_one_level(
        node, none_is_leaf=True, namespace=NAMESPACE
    )
    rebuilt = [_rebuild(child, leaves) for child in children]
    if type(node) is dict:
        by_key = dict(zip(keys, rebuilt, strict=True))
        return {key: by_key[key] for key in node}
    return unflatten_node(metadata, rebuilt)
