"""Leaves, structures and paths of trees, over optree."""

import dataclasses
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import optree
import torch

Tree: TypeAlias = Any
"""A tensor, or any nesting of dicts, lists, tuples, NamedTuples, dataclasses, ... of tensors."""

# Nodes registered globally with optree, or in this namespace, are trees. Dataclasses are registered when they are met.
NAMESPACE = "functorch_optim"

_DICTS = (dict, OrderedDict, defaultdict)  # a derived class is a leaf, or a node of its own
# Known at once: torch.compile would spend most of its time on optree's code for these.
_LEAVES = (torch.Tensor, torch.nn.Parameter, type(None), float, int, bool)
_LEAF_TYPES = frozenset(_LEAVES)
_SORTED = (dict, defaultdict)
_LISTS = (list, tuple)


_NODE = TypeVar("_NODE", bound=type)


def exported(kind: _NODE) -> _NODE:
    """Let `torch.export.save` write trees with nodes of this NamedTuple class, by its name and those of its fields."""
    name = f"{kind.__module__}.{kind.__qualname__}({', '.join(kind._fields)})"  # type: ignore[attr-defined]
    torch.utils._pytree._register_namedtuple(kind, serialized_type_name=name)
    return kind


def saved(kind: _NODE) -> _NODE:
    """Let `torch.export.save` write nodes of this NamedTuple class, and `torch.load` read them as weights."""
    torch.serialization.add_safe_globals([kind])
    return exported(kind)


def constant(function: Callable[..., Any]) -> Any:
    """Let torch.compile call a function as it is, and take its result for a constant.

    `torch.compiler.assume_constant_result` does the same, but imports the compiler at once, which takes two seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@saved
class MaskedNode(NamedTuple):
    """Stands where a leaf has been masked out; a node without leaves, so that tree functions pass over it.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> fo.masked(fo.trace(0.9), {"w": True, "b": False}).init(params).momentum_buffer["b"]
        MaskedNode()
    """


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Split a tree into its leaves and its structure; None is a leaf, MaskedNode is none.

    Args:
        tree: any tree.

    Returns:
        The list of leaves, those of dicts sorted by key; and the structure, for `unflatten`.

    Example:
        >>> import functorch_optim as fo
        >>> leaves, structure = fo.tree.flatten({"w": 1, "b": (2, None)})
        >>> leaves
        [2, None, 1]
    """
    if torch.compiler.is_compiling():
        structure = _TracedStructure(tree)
        return structure.flatten_up_to(tree), structure
    flat = optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
    others = {type(leaf) for leaf in flat[0]} - _LEAF_TYPES
    if others and any([_adopted(kind) for kind in others]):  # noqa: C419
        return flatten(tree)  # the fields of dataclasses may be dataclasses, too
    return flat


_ADOPTING = threading.Lock()


@constant  # it cannot trace a registration
def _adopted(kind: type) -> bool:
    """Register the type of a leaf, if it is a dataclass, as a node; tell whether it is one now.

    A dataclass that can be called is a function to this library: a schedule, say. One that is derived from a tensor or
    a container is treated as that. One that optree knows in another namespace is a leaf.
    """
    if not dataclasses.is_dataclass(kind) or issubclass(kind, torch.Tensor | dict | list | tuple):
        return False
    if any("__call__" in vars(base) for base in kind.__mro__) or hasattr(kind, "__optree_dataclass_fields__"):
        return False
    fields = dataclasses.fields(kind)
    children = tuple([field.name for field in fields if field.metadata.get("pytree_node", True)])
    constants = tuple([field.name for field in fields if field.name not in children])

    def split(node: Any) -> tuple[Any, ...]:
        return [getattr(node, name) for name in children], tuple([getattr(node, name) for name in constants]), children

    def build(values: Any, leaves: Any) -> Any:
        node = object.__new__(kind)  # not by its constructor, which may check values that are no tensors now
        for name, value in (*zip(children, leaves, strict=True), *zip(constants, values, strict=True)):
            object.__setattr__(node, name, value)
        return node

    with _ADOPTING:
        instance: Any = object.__new__(kind)
        if optree.tree_is_leaf(instance, none_is_leaf=True, namespace=NAMESPACE):
            register: Any = optree.register_pytree_node
            register(kind, split, build, path_entry_type=optree.DataclassEntry, namespace=NAMESPACE)
    return True


def unflatten(structure: Any, leaves: Sequence[Any]) -> Tree:
    """Build the tree of this structure with these leaves: the inverse of `flatten`.

    Args:
        structure: the second result of `flatten`.
        leaves: as many as the structure has, in the order of `flatten`.

    Raises:
        ValueError: there are more or fewer leaves.

    Example:
        >>> import functorch_optim as fo
        >>> leaves, structure = fo.tree.flatten({"w": 1, "b": (2, None)})
        >>> fo.tree.unflatten(structure, [10 * leaf if leaf else leaf for leaf in leaves])
        {'w': 10, 'b': (20, None)}
    """
    return structure.unflatten(leaves)


def flatten_up_to(structure: Any, other: Tree, name: str, reference: Tree, reference_name: str) -> list[Any]:
    """Flatten `other` only as deep as `structure`, the structure of `reference`.

    Raises:
        ValueError: `other` is built differently; the message names the path of the first difference.
    """
    try:
        leaves: list[Any] = structure.flatten_up_to(other)
    except ValueError as error:
        raise ValueError(
            f"{name} and {reference_name} do not match: {first_difference(reference, other, reference_name, name)}. "
            f"{name} must be built like {reference_name}."
        ) from error
    return leaves


def present(tree: Tree) -> tuple[list[Any], Callable[[list[Any]], Tree]]:
    """List the leaves of a tree that are not None, and return a function that puts such a list in their places."""
    leaves, structure = flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]

    def arranged(some: list[Any]) -> Tree:
        given = dict(zip(places, some, strict=True))
        return unflatten(structure, [given.get(i) for i in range(len(leaves))])

    return [leaves[i] for i in places], arranged


def map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:  # noqa: A001 - the field's name
    """Apply `function` to every leaf of `tree` and to the parts at the same places in `rest`; None stays None.

    Args:
        function: takes a leaf of `tree`, and a leaf or subtree of each of `rest`.
        tree: any tree.
        *rest: trees built like `tree`, or deeper.

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
    return unflatten(structure, [None if column[0] is None else function(*column) for column in columns])


def device_of(tree: Tree) -> torch.device | None:
    """Return the device of the first tensor, None where there is none."""
    return next((leaf.device for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)), None)


def stop_gradient(tree: Tree) -> Tree:
    """Cut a tree off from its history: every tensor is detached, in reverse and in forward mode.

    Args:
        tree: any tree: parameters, a state, a result of `fo.meta.unroll`. Leaves that are no tensors stay as they are.

    Returns:
        Tree like it. Its tensors share memory with those of `tree`: a function that writes to them in place, as
        `fo.step_` does, writes to both. For the parameters of a module there is `fo.params_of`, which copies.

    Raises:
        TypeError: a leaf is a module, which is no tree of tensors.

    Example:
        >>> import functorch_optim as fo, torch
        >>> w = torch.ones(2, requires_grad=True)
        >>> fo.stop_gradient({"w": 2 * w, "name": "w"})
        {'w': tensor([2., 2.]), 'name': 'w'}
    """

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.nn.Module):
            raise TypeError(
                f"stop_gradient takes a tree of tensors, got a {type(leaf).__name__}, which is a module; "
                "write params_of(module) for its parameters"
            )
        return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf

    return map(cut, tree)


def paths(tree: Tree) -> list[str]:
    """Name every leaf by its dotted path, in the order of `flatten`.

    Example:
        >>> import functorch_optim as fo
        >>> fo.tree.paths({"layer": {"weight": 1, "bias": 2}, "scale": (3, 4)})
        ['layer.bias', 'layer.weight', 'scale.0', 'scale.1']
    """
    flatten(tree)  # which makes nodes of dataclasses
    accessors = optree.tree_accessors(tree, none_is_leaf=True, namespace=NAMESPACE)
    return [".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor) for accessor in accessors]


def insertion_order(tree: Tree) -> list[int]:
    """Number the leaves, listed in the order of `flatten`, in the order in which dicts were filled.

    Example:
        >>> import functorch_optim as fo
        >>> fo.tree.insertion_order({"c": 1, "a": 2, "b": 3})
        [1, 2, 0]
    """
    leaves, structure = flatten(tree)
    order: list[int] = []

    def walk(node: Tree) -> None:
        if is_leaf(node):
            order.append(node)
        else:
            for child in node.values() if isinstance(node, dict) else children(node).values():
                walk(child)

    walk(unflatten(structure, range(len(leaves))))
    positions = {leaf: position for position, leaf in enumerate(order)}
    return [positions[i] for i in range(len(leaves))]


def first_difference(left: Tree, right: Tree, left_name: str, right_name: str) -> str:
    """Say where and how the structure of `right` first differs from that of `left`."""

    def walk(left: Tree, right: Tree, path: str) -> str | None:
        here = f"at {path!r}" if path else "at the root"
        if is_leaf(left):
            return None
        dicts = type(left) in _DICTS and type(right) in _DICTS  # any kind of dict matches any other
        if is_leaf(right) or not (dicts or type(left) is type(right)):
            return f"{here}, {left_name} has a {type(left).__name__} and {right_name} has a {type(right).__name__}"
        lefts, rights = children(left), children(right)
        for missing_from, those, others in ((right_name, lefts, rights), (left_name, rights, lefts)):
            missing = [key for key in those if key not in others]
            if missing:
                return f"{dotted(path, missing[0])!r} is missing from {missing_from}"
        if not dicts and _one_level(left)[1] != _one_level(right)[1]:
            return (
                f"{here}, the {type(left).__name__} of {left_name} and that of {right_name} differ in their constants"
            )
        found = (walk(child, rights[key], dotted(path, key)) for key, child in lefts.items())
        return next((difference for difference in found if difference is not None), None)

    return walk(left, right, "") or f"{left_name} and {right_name} have different node types"


def dotted(path: str, key: Any) -> str:
    """Return the path of a child."""
    return f"{path}.{key}" if path else str(key)


def is_leaf(node: Tree) -> bool:
    """Tell whether this is no container, but a leaf; None is one."""
    if type(node) in _LEAVES:
        return True
    if type(node) in _SORTED or type(node) in _LISTS or _is_record(node):
        return False
    return optree.tree_is_leaf(node, none_is_leaf=True, namespace=NAMESPACE) and not _adopted(type(node))


def _is_record(node: Tree) -> bool:
    """Tell whether this is a NamedTuple: by hand, for torch.compile guards optree's code at every call."""
    return isinstance(node, tuple) and hasattr(type(node), "_fields")


def _one_level(node: Tree) -> Any:
    return optree.tree_flatten_one_level(node, none_is_leaf=True, namespace=NAMESPACE)


def children(node: Tree) -> dict[Any, Tree]:
    """Return the children of a node by key, in the order of `flatten`; none for a leaf."""
    if type(node) in _SORTED:
        # By hand: torch.compile cannot trace optree's way for a dict without tensors, which is a constant to it.
        return {key: node[key] for key in optree.utils.total_order_sorted(node)}
    if type(node) in _LISTS:
        return {i: node[i] for i in range(len(node))}
    if _is_record(node):
        return dict(zip(type(node)._fields, node, strict=True))
    if is_leaf(node):
        return {}
    children, _, keys, _ = _one_level(node)
    names = optree.namedtuple_fields(type(node)) if optree.is_namedtuple(node) else keys
    return dict(zip(names, children, strict=True))


class _TracedStructure:
    """optree's PyTreeSpec, for the trees in which torch.compile cannot trace it: dicts without tensors, as masks are.

    The keys are sorted once, and leaves are met without a call for each, for every instruction takes time to trace.
    """

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._children = {
            key: None if is_leaf(child) else _TracedStructure(child) for key, child in children(tree).items()
        }

    def flatten_up_to(self, other: Tree) -> list[Any]:
        if is_leaf(self._tree):
            return [other]
        leaves: list[Any] = []
        self._collect(other, leaves)
        return leaves

    def unflatten(self, leaves: Sequence[Any]) -> Tree:
        remaining = iter(leaves)
        return next(remaining) if is_leaf(self._tree) else self._build(remaining)

    def _collect(self, other: Tree, leaves: list[Any]) -> None:
        dicts = type(self._tree) in _DICTS and type(other) in _DICTS
        others = other if dicts else children(other)
        if len(others) != len(self._children) or not (dicts or type(self._tree) is type(other)):
            raise ValueError("the structures differ")
        by_hand = dicts or type(other) in _LISTS or _is_record(other)
        if not by_hand and _one_level(self._tree)[1] != _one_level(other)[1]:
            raise ValueError("the structures differ")
        for key, child in self._children.items():
            if key not in others:
                raise ValueError("the structures differ")
            if child is None:
                leaves.append(others[key])
            else:
                child._collect(others[key], leaves)

    def _build(self, remaining: Iterator[Any]) -> Tree:
        rebuilt = {
            key: next(remaining) if child is None else child._build(remaining) for key, child in self._children.items()
        }
        if type(self._tree) in _SORTED:
            filled = {key: rebuilt[key] for key in self._tree}
            return filled if type(self._tree) is dict else defaultdict(self._tree.default_factory, filled)
        if type(self._tree) in _LISTS:
            return type(self._tree)(rebuilt.values())
        if _is_record(self._tree):
            return type(self._tree)(*rebuilt.values())
        _, metadata, _, unflatten_node = _one_level(self._tree)
        return unflatten_node(metadata, list(rebuilt.values()))
