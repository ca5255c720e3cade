"""Random trees of tensors, for hypothesis to draw: `from strategies import like, trees`."""

from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import optree
import torch
from hypothesis import strategies as st

import functorch_optim as fo

DTYPES = (torch.float32, torch.float64)
SHAPES = ((), (0,), (1,), (3,), (2, 3), (3, 0, 2))


class Pair(NamedTuple):
    """A NamedTuple that is a node."""

    left: Any
    right: Any


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Layer:
    """A dataclass that is a node."""

    weight: Any
    bias: Any


@st.composite
def tensors(draw, dtypes=DTYPES, shapes=SHAPES):
    """Draw normal numbers, in order in memory or transposed or with gaps."""
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return torch.randn(shape[::-1], dtype=dtype, generator=generator).permute(tuple(range(len(shape)))[::-1])
    if layout == "strided":
        return torch.randn((*shape, 2), dtype=dtype, generator=generator)[..., 0]
    return torch.randn(shape, dtype=dtype, generator=generator)


def trees(leaves=None, max_leaves=6):
    """Draw a leaf or any nesting of containers of leaves, empty containers included."""
    keys = st.sampled_from(["a", "b", "c", "weight"])

    def containers(children):
        dicts = st.dictionaries(keys, children, max_size=3)
        lists = st.lists(children, max_size=3)
        return st.one_of(
            dicts,
            dicts.map(OrderedDict),
            dicts.map(lambda items: defaultdict(list, items)),
            lists,
            lists.map(tuple),
            st.builds(Pair, children, children),
            st.builds(Layer, children, children),
        )

    return st.recursive(tensors() if leaves is None else leaves, containers, max_leaves=max_leaves)


@st.composite
def like(draw, tree):
    """Draw a tree with the structure, shapes and dtypes of this one; numbers and memory layouts are new."""
    return fo.tree.map(lambda leaf: draw(tensors([leaf.dtype], [tuple(leaf.shape)])), tree)
