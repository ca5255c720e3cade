"""Trees: every kind of node, and what is said about trees that do not match."""

import re
from collections import OrderedDict, defaultdict, deque
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Layer, Pair, trees

import functorch_optim as fo
from functorch_optim.testing import gradients
from functorch_optim.tree import (
    MaskedNode,
    broadcast_prefix,
    first_difference,
    flatten,
    insertion_order,
    paths,
    unflatten,
)
from functorch_optim.tree._structure import _TracedStructure as TracedStructure


@optree.dataclasses.dataclass(namespace=optree.registry.__GLOBAL_NAMESPACE)
class Everywhere:
    """A dataclass that is a node in every namespace."""

    weight: Any
    bias: Any


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Named:
    """A dataclass with a field that is no child."""

    weight: Any
    name: str = optree.dataclasses.field(pytree_node=False, default="")


class Bag:
    """A node whose children have no names."""

    def __init__(self, *children):
        self.children = children

    def __eq__(self, other):
        return self.children == other.children

    __hash__ = None


optree.register_pytree_node(Bag, lambda bag: (bag.children, None), lambda _, c: Bag(*c), namespace="functorch_optim")


class Registered(dict):
    """A dict that is registered, and matches its like only."""


optree.register_pytree_node(
    Registered,
    lambda node: (list(node.values()), list(node), list(node)),
    lambda keys, children: Registered(zip(keys, children, strict=True)),
    namespace="functorch_optim",
)

# Name -> tree, its leaves in order, and their paths. Dicts are sorted; the others have an order of their own.
TREES = {
    "leaf": (1, [1], [""]),
    "None": (None, [None], [""]),
    "dict": ({"b": 1, "a": 2}, [2, 1], ["a", "b"]),
    "dict of ints": ({10: 1, 9: 2}, [2, 1], ["9", "10"]),
    "OrderedDict": (OrderedDict(b=1, a=2), [1, 2], ["b", "a"]),
    "defaultdict": (defaultdict(int, b=1, a=2), [2, 1], ["a", "b"]),
    "list": ([1, [2, None]], [1, 2, None], ["0", "1.0", "1.1"]),
    "tuple": ((1, (2, 3)), [1, 2, 3], ["0", "1.0", "1.1"]),
    "deque": (deque([1, 2]), [1, 2], ["0", "1"]),
    "NamedTuple": (Pair(1, {"w": 2}), [1, 2], ["left", "right.w"]),
    "dataclass": (Layer({"w": 1}, 2), [1, 2], ["weight.w", "bias"]),
    "global dataclass": (Everywhere({"w": 1}, 2), [1, 2], ["weight.w", "bias"]),
    "dataclass with metadata": (Named([1, 2], "first"), [1, 2], ["weight.0", "weight.1"]),
    "custom node": (Bag(1, {"w": 2}), [1, 2], ["0", "1.w"]),
    "empty dict": ({}, [], []),
    "empty list": ([], [], []),
    "empty tuple": ((), [], []),
    "empty inside": ({"a": [], "b": 1, "c": {}}, [1], ["b"]),
    "dict of None": ({"a": {"w": None}, "b": 1}, [None, 1], ["a.w", "b"]),
    "MaskedNode": ({"a": MaskedNode(), "b": 1}, [1], ["b"]),
    "nested": (
        {"x": [Pair(1, (2,)), Layer(None, 3)]},
        [1, 2, None, 3],
        ["x.0.left", "x.0.right.0", "x.1.weight", "x.1.bias"],
    ),
}
of_each = pytest.mark.parametrize(("tree", "leaves", "names"), TREES.values(), ids=TREES)


# Every kind of node. --------------------------------------------------------------------------------------------------


@of_each
def test_flatten_and_paths(tree, leaves, names):
    found, structure = flatten(tree)
    assert found == leaves
    assert paths(tree) == names
    rebuilt = unflatten(structure, found)
    assert type(rebuilt) is type(tree)
    assert rebuilt == tree


@of_each
def test_map(tree, leaves, names):
    tens = fo.tree.map(lambda leaf: 10 * leaf, tree)
    assert type(tens) is type(tree)
    sums = fo.tree.map(lambda x, y, z: x + y + z, tree, tens, tree)
    assert flatten(sums)[0] == [leaf if leaf is None else 12 * leaf for leaf in leaves]
    assert flatten(sums)[1] == flatten(tree)[1]
    assert flatten(tree)[0] == leaves


@of_each
def test_what_torch_compile_traces_does_what_optree_does(tree, leaves, names):
    structure = TracedStructure(tree)
    assert structure.flatten_up_to(tree) == leaves
    rebuilt = structure.unflatten(leaves)
    assert type(rebuilt) is type(tree)
    assert rebuilt == tree
    assert insertion_order(rebuilt) == insertion_order(tree)


@pytest.mark.sampled(size=4)
@of_each
def test_map_in_a_compiled_function(tree, leaves, names):
    def function(tree):
        mask = fo.tree.map(lambda x: x.ndim == 0, tree)  # has no tensors, which dynamo makes a constant
        assert all(flag is not False for flag in broadcast_prefix(mask, tree, "mask"))
        return fo.tree.map(lambda x, scalar: x + scalar, tree, mask)

    mapped = torch.compile(function, backend="eager", fullgraph=True)
    tensor_tree = fo.tree.map(torch.tensor, tree)
    found, structure = flatten(mapped(tensor_tree))
    assert structure == flatten(tree)[1]
    assert found == [leaf if leaf is None else leaf + 1 for leaf in leaves]


@of_each
def test_a_prefix_is_a_leaf_or_the_tree_itself_or_between(tree, leaves, names):
    assert broadcast_prefix("x", tree, "labels") == ["x"] * len(leaves)
    assert broadcast_prefix(tree, tree, "labels") == leaves
    nested = fo.tree.map(lambda leaf: [leaf, {"a": leaf}], tree)
    doubled = [leaf for leaf in leaves for _ in range(1 if leaf is None else 2)]
    assert broadcast_prefix(tree, nested, "labels") == doubled


def test_map_keeps_the_order_and_kind_of_dicts():
    assert list(fo.tree.map(abs, {"b": 1, "a": 2})) == ["b", "a"]
    mapped = fo.tree.map(abs, defaultdict(list, a=1))
    assert mapped.default_factory is list
    assert fo.tree.map(abs, Named(-1, "first")) == Named(1, "first")


def test_dicts_match_whatever_their_order_and_kind():
    for other in ({"b": 1, "a": 2}, OrderedDict(b=1, a=2), defaultdict(int, b=1, a=2)):
        mapped = fo.tree.map(lambda x, y: (x, y), {"a": 10, "b": 20}, other)
        assert mapped == {"a": (10, 2), "b": (20, 1)}


def test_map_passes_over_none_in_the_first_tree_only():
    assert fo.tree.map(lambda x, y: (x, y), [None, 1], [2, None]) == [None, (1, None)]


def test_masked_nodes_are_passed_over():
    tree = {"a": MaskedNode(), "b": 1}
    assert fo.tree.map(lambda x: -x, tree) == {"a": MaskedNode(), "b": -1}
    assert repr(MaskedNode()) == "MaskedNode()"


def test_a_dataclass_of_another_namespace_is_a_leaf():
    @optree.dataclasses.dataclass(namespace="elsewhere")
    class Unknown:
        weight: Any

    leaf = Unknown(1)
    assert flatten({"a": leaf})[0] == [leaf]


# Random trees. --------------------------------------------------------------------------------------------------------


def child(node, name):
    """Follow one name of a dotted path."""
    if isinstance(node, Pair | Layer):
        return getattr(node, name)
    return node[name] if isinstance(node, dict) else node[int(name)]


@given(trees())
def test_paths_lead_to_the_leaves(tree):
    leaves, structure = flatten(tree)
    assert all(ours is theirs for ours, theirs in zip(flatten(unflatten(structure, leaves))[0], leaves, strict=True))
    for path, leaf in zip(paths(tree), leaves, strict=True):
        node = tree
        for name in filter(None, path.split(".")):
            node = child(node, name)
        assert node is leaf


@given(st.data())
def test_map_works_leaf_by_leaf(data):
    tree = data.draw(trees())
    other = data.draw(gradients(tree))
    mapped, structure = flatten(fo.tree.map(torch.add, tree, other))
    leaves, expected_structure = flatten(tree)
    assert structure == expected_structure
    for ours, x, y in zip(mapped, leaves, flatten(other)[0], strict=True):
        assert torch.equal(ours, x + y)
        assert (ours.dtype, ours.shape) == (x.dtype, x.shape)


@given(st.data())
def test_prefixes_agree_with_optree(data):
    tree = data.draw(trees(leaves=st.integers()))
    options = {"none_is_leaf": True, "namespace": "functorch_optim"}
    cut = optree.tree_map(
        lambda node: data.draw(st.integers()), tree, is_leaf=lambda node: data.draw(st.booleans()), **options
    )
    assert broadcast_prefix(cut, tree, "labels") == optree.broadcast_prefix(cut, tree, **options)


def error_of(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return None


@given(trees(leaves=st.integers()), trees(leaves=st.integers()))
def test_either_trees_match_or_the_error_says_where_they_do_not(tree, other):
    message = error_of(fo.tree.map, lambda x, y: x, tree, other)
    if message is not None:
        difference = first_difference(tree, other, "the first tree", "tree 2")
        assert difference in message
        assert re.match("at the root|at '|'.*' is missing from", difference)


@given(trees(leaves=st.integers()), trees(leaves=st.integers()))
def test_either_a_prefix_fits_or_the_error_says_where_it_does_not(prefix, tree):
    message = error_of(broadcast_prefix, prefix, tree, "labels")
    if message is None:
        assert len(broadcast_prefix(prefix, tree, "labels")) == len(flatten(tree)[0])
    else:
        assert re.match("labels do not fit the parameters: at (the root|'.*') they have", message)


# Trees that do not match. ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, "'b' is missing from right"),
        ({"a": 1}, {"a": 1, "b": 2}, "'b' is missing from left"),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1]}}, "'a.b.1' is missing from right"),
        ({"a": {"b": [1]}}, {"a": {"b": [1, 2]}}, "'a.b.1' is missing from left"),
        ({1: 2}, {3: 2}, "'1' is missing from right"),
        ({"a": 1}, defaultdict(int, b=1), "'a' is missing from right"),
        ([1], (1,), "at the root, left has a list and right has a tuple"),
        ([1], 1, "at the root, left has a list and right has a int"),
        ({"a": (1, [2])}, {"a": (1, {"b": 2})}, "at 'a.1', left has a list and right has a dict"),
        ({"a": {}}, {"a": None}, "at 'a', left has a dict and right has a NoneType"),
        ({"a": MaskedNode()}, {"a": 1}, "at 'a', left has a MaskedNode and right has a int"),
        ({"a": Pair(1, 2)}, {"a": (1, 2)}, "at 'a', left has a Pair and right has a tuple"),
        ({"a": Layer(1, 2)}, {"a": Everywhere(1, 2)}, "at 'a', left has a Layer and right has a Everywhere"),
        (Layer({"w": 1}, 2), Layer({"v": 1}, 2), "'weight.w' is missing from right"),
        (Layer(1, [2]), Layer(1, 2), "at 'bias', left has a list and right has a int"),
        (Bag(1, 2), Bag(1), "'1' is missing from right"),
        # Named as `paths` names them.
        (Pair(1, {"w": 2}), Pair(1, {"v": 2}), "'right.w' is missing from right"),
        ({"a": Pair([1], 2)}, {"a": Pair(1, 2)}, "at 'a.left', left has a list and right has a int"),
        # What differs, not that one dict is an ordered one: those match.
        ({"a": 1, "b": {"c": 2}}, OrderedDict(a=1, b={}), "'b.c' is missing from right"),
        ({"a": 1}, Registered(a=1), "at the root, left has a dict and right has a Registered"),
        (OrderedDict(a=[1]), defaultdict(list, a=(1,)), "at 'a', left has a list and right has a tuple"),
        ({"a": Named(1, "first")}, {"a": Named(1, "second")}, "at 'a'"),
    ],
)
def test_mismatches(left, right, message):
    assert message in first_difference(left, right, "left", "right")
    message = message.replace("left has", "the first tree has").replace("right has", "tree 3 has")
    message = message.replace("from right", "from tree 3").replace("from left", "from the first tree")
    with pytest.raises(ValueError, match=f"tree 3 and the first tree do not match: .*{re.escape(message)}"):
        fo.tree.map(lambda *leaves: leaves, left, left, right)
    with pytest.raises(ValueError, match="the structures differ"):
        TracedStructure(left).flatten_up_to(right)


PARAMS = {"a": {"w": 1, "b": 2}, "c": [3]}


@pytest.mark.parametrize(
    ("prefix", "tree", "message"),
    [
        ({"a": 0}, PARAMS, r"at the root they have ['a'] where the parameters have ['a', 'c']"),
        ({"a": 0, "c": 0, "d": 0}, PARAMS, r"have ['a', 'c', 'd'] where the parameters have ['a', 'c']"),
        ({"a": {"w": 0}, "c": 0}, PARAMS, r"at 'a' they have ['w'] where the parameters have ['b', 'w']"),
        ({"a": {"w": [0], "b": 0}, "c": 0}, PARAMS, r"at 'a.w' they have [0] where the parameters have a leaf"),
        ({"a": 0, "c": [0, 0]}, PARAMS, r"at 'c' they have [0, 1] where the parameters have [0]"),
        ([0, 0], PARAMS, r"at the root they have [0, 1]"),
        (Layer(0, {"x": 0}), Layer(1, {"y": 2}), r"at 'bias' they have ['x'] where the parameters have ['y']"),
        # Containers without children are not leaves either.
        ({}, 1, "at the root they have [] where the parameters have a leaf"),
        ({"a": 0, "c": [()]}, PARAMS, "at 'c.0' they have [] where the parameters have a leaf"),
        ({"a": 0, "c": [MaskedNode()]}, PARAMS, "at 'c.0' they have [] where the parameters have a leaf"),
        (Layer(0, 0), PARAMS, "at the root they have ['weight', 'bias']"),
        (Layer(0, 0), Named(1, "first"), "at the root they have ['weight', 'bias']"),
        (Bag(0, 0), PARAMS, "at the root they have [0, 1]"),
        # Named as `paths` names them.
        (Pair(0, {"x": 0}), Pair(1, {"y": 2}), r"at 'right' they have ['x'] where the parameters have ['y']"),
    ],
)
def test_prefixes_that_do_not_fit(prefix, tree, message):
    with pytest.raises(ValueError, match=f"^labels do not fit the parameters: .*{re.escape(message)}"):
        broadcast_prefix(prefix, tree, "labels")
