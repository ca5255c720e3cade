"""Trees of tensors: the pytrees of this library, and arithmetic with them.

A tree is a tensor, or any nesting of dicts, lists, tuples, NamedTuples, dataclasses of tensors. None is a leaf: a
parameter that is missing, or a gradient. `MaskedNode` has no leaves.

Example:
    >>> import functorch_optim as fo, torch
    >>> params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([3.0, 4.0])}
    >>> fo.tree.norm(grads), fo.tree.add(params, fo.tree.scale(-0.1, grads))
    (tensor(5.), {'w': tensor([0.7000, 0.6000])})
"""

from functorch_optim.tree._access import get, set  # noqa: A004
from functorch_optim.tree._arithmetic import add, cast, norm, ravel, scale, sub, vdot, where, zeros_like
from functorch_optim.tree._prefixes import Prefixes, broadcast_prefix
from functorch_optim.tree._structure import (
    MaskedNode,
    Tree,
    device_of,
    first_difference,
    flatten,
    flatten_up_to,
    insertion_order,
    is_leaf,
    map,  # noqa: A004
    paths,
    present,
    stop_gradient,
    unflatten,
)

__all__ = [
    "MaskedNode",
    "Prefixes",
    "Tree",
    "add",
    "broadcast_prefix",
    "cast",
    "device_of",
    "first_difference",
    "flatten",
    "flatten_up_to",
    "get",
    "insertion_order",
    "is_leaf",
    "map",
    "norm",
    "paths",
    "present",
    "ravel",
    "scale",
    "set",
    "stop_gradient",
    "sub",
    "unflatten",
    "vdot",
    "where",
    "zeros_like",
]
