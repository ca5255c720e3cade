"""Parts of a tree by name and path: to read, and to exchange."""

from collections.abc import Iterator
from numbers import Integral, Number, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim.tree._structure import Tree, children, dotted, flatten, flatten_up_to, paths, unflatten


class _Found(NamedTuple):
    """A node that bears a name: its dotted path, and why it cannot be set, where that is so."""

    path: str
    node: Any
    computed: str


def get(tree: Tree, name: str, path: str = "") -> Any:
    """Find the part of a tree that bears a name: the averaged parameters in a state, or a hyperparameter.

    Args:
        tree: any tree, such as a state.
        name: field of a NamedTuple, key of a dict, or index of a list; or a dotted path that ends in one, such as
            `"body.exp_avg"`. A node whose whole path is the name comes before all others.
        path: dotted path of the part of the tree to look in; all of it by default.

    Returns:
        The one node of that name: a tensor or a tree. It is not searched for further nodes of the name.

    Raises:
        KeyError: no node bears the name, or more than one; the message has the paths of all of them.

    optax.tree.get returns None where there is no such node; here that is an error.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.zeros(2)}
        >>> fo.tree.get(fo.adam().init(params), "exp_avg")
        {'w': tensor([0., 0.])}
        >>> state = fo.chain(fo.trace(0.9), fo.trace(0.99)).init(params)
        >>> fo.tree.get(state, "momentum_buffer", path="1")
        {'w': tensor([0., 0.])}
    """
    return _find(tree, name, path).node


def set(tree: Tree, name: str, value: Any, path: str = "") -> Tree:  # noqa: A001 - optax's name for it
    """Exchange the part of a tree that bears a name for another value; the tree itself is not modified.

    So a hyperparameter in a state is set, a state rewound, a buffer exchanged.

    Args:
        tree: any tree, such as a state.
        name: see `fo.tree.get`.
        value: a tensor, or a tree built like the one there, of the same shapes. A number for a tensor fills it. Values
            are copied, in the dtype and on the device of those that they replace; derivatives flow through the copy.
        path: see `fo.tree.get`.

    Returns:
        Tree like `tree`, with the value in its place. All other tensors are the same as in `tree`.

    Raises:
        KeyError: no node bears the name, or more than one.
        ValueError: the value is built differently, or a shape differs; or the number there is computed at every step,
            as a scheduled hyperparameter is.
        TypeError: a leaf is no tensor where there is one, or has fractions or an imaginary part that are lost there.

    optax.tree.set exchanges all nodes of the name, and checks no shapes.

    Example:
        >>> import functorch_optim as fo, torch
        >>> state = fo.trace(0.9).init(torch.zeros(2))
        >>> fo.tree.set(state, "momentum_buffer", torch.ones(2)).momentum_buffer
        tensor([1., 1.])
    """
    leaves, structure = flatten(tree)
    found = _find(tree, name, path)
    if found.computed:
        raise ValueError(f"{found.path!r} cannot be set: {found.computed}")
    inner = flatten(found.node)[1]
    new = flatten_up_to(inner, value, "the value", found.node, f"the node at {found.path!r}")
    # The same node in the tree of the leaves' numbers says which leaves are there.
    numbered = unflatten(structure, range(len(leaves)))
    places = flatten(_find(numbered, found.path, "").node)[0]
    names = paths(found.node)
    for place, leaf, inside in zip(places, new, names, strict=True):
        leaves[place] = _fitted(leaf, leaves[place], dotted(found.path, inside) if inside else found.path)
    return unflatten(structure, leaves)


def _find(tree: Tree, name: str, path: str) -> _Found:
    part = _find(tree, path, "") if path else _Found("", tree, "")
    found = [one._replace(path=dotted(part.path, one.path)) for one in _named(part.node, name)]
    if len(found) > 1:
        places = ", ".join([one.path for one in found])
        raise KeyError(
            f"{len(found)} nodes bear the name {name!r}: {places}. Give the path of one, {found[0].path!r}; or "
            "the part of the tree to look in, path=..."
        )
    return found[0]


def _named(tree: Tree, name: str) -> list[_Found]:
    """List the nodes of a name; that whose whole path it is, alone.

    Raises:
        KeyError: there are none.
    """
    found: list[_Found] = []
    names: list[str] = []

    def walk(node: Tree, keys: tuple[str, ...]) -> None:
        computed = getattr(getattr(type(node), "_leaf_type", None), "_computed", "")
        for key, child in children(node).items():
            here = (*keys, str(key))
            names.append(here[-1])
            if name in _endings(here):
                found.append(_Found(".".join(here), child, computed))
            else:
                walk(child, here)

    walk(tree, ())
    if not found:
        known = ", ".join(dict.fromkeys(names)) or "none"
        raise KeyError(f"Nothing in the tree bears the name {name!r}; names in it are {known}")
    return [one for one in found if one.path == name] or found


def _endings(keys: tuple[str, ...]) -> Iterator[str]:
    return (".".join(keys[start:]) for start in range(len(keys)))


def _fitted(new: Any, old: Any, path: str) -> Any:
    """Return a copy of a leaf, fit for the place of another."""
    if not isinstance(old, Tensor):
        return new
    if not isinstance(new, Tensor | Number):
        raise TypeError(f"The value for {path!r} is a {type(new).__name__}, where a tensor or a number belongs")
    if not isinstance(new, Tensor):
        whole = isinstance(new, Integral) or (isinstance(new, Real) and float(new).is_integer())
        dtype = torch.int64 if whole and not old.is_floating_point() else torch.float64
        dtype = dtype if isinstance(new, Real) else torch.complex128
        new = torch.tensor(new, dtype=dtype, device=old.device).expand(old.shape)
    if new.shape != old.shape:
        raise ValueError(
            f"The value for {path!r} has shape {tuple(new.shape)}, but the present one has {tuple(old.shape)}. To "
            "train with several values at once, batch them: torch.vmap(lambda lr: ...)(lrs)"
        )
    if new.is_complex() > old.is_complex() or _has_fractions(new) > _has_fractions(old):
        raise TypeError(f"The value for {path!r} is {new.dtype}, but the present one is {old.dtype}")
    return new.to(old.device, old.dtype, copy=True)


def _has_fractions(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
