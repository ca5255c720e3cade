"""Projections: the nearest point of a set, as functions of trees of tensors.

Each function treats a tree, such as the parameters, as one vector of all elements, and returns a tree like it. None
stays None. Tensors must be of floating-point or complex numbers, and others are a TypeError. Numbers may be 0-dim
tensors. Derivatives with respect to the tree and the numbers are exact where they exist: those of the identity inside
of the set and on its boundary, and those of the projection outside. The functions work under `torch.vmap` and
`torch.compile`.

Example:
    Projected gradient descent:

    >>> import functorch_optim as fo, torch
    >>> tx, params = fo.sgd(1.0), torch.tensor([0.5, 0.5])
    >>> params, state = fo.step(tx, torch.tensor([-3.0, 0.25]), tx.init(params), params)
    >>> fo.projections.simplex(params)
    tensor([1., 0.])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree as trees
from functorch_optim._core.hyperparameters import check_fixed
from functorch_optim._numerics import at_least, real_dot, where
from functorch_optim.transforms.clipping import global_norm, shrink
from functorch_optim.tree import Tree

__all__ = ["box", "halfspace", "l1_ball", "l2_ball", "linf_ball", "nonnegative", "simplex", "sphere"]

Number = float | Tensor


def nonnegative(tree: Tree) -> Tree:
    """Project to the numbers >= 0: `max(x, 0)`.

    Args:
        tree: tree of real tensors.

    Raises:
        TypeError: a tensor is complex.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.nonnegative(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    return _each(tree, lambda x: torch.clamp(x, min=0))


def box(tree: Tree, lower: Tree, upper: Tree) -> Tree:
    """Project to a box: `min(max(x, lower), upper)`.

    Args:
        tree: tree of real tensors.
        lower: number, tensor, or tree of these like `tree`, or a prefix of such a tree.
        upper: like `lower`; where it is less than `lower`, the result is `upper`.

    Raises:
        TypeError: a tensor is complex.
        ValueError: a tree of bounds does not fit.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.box({"a": torch.tensor([-5.0, 0.5]), "b": torch.tensor(3.0)}, -1.0, {"a": 1.0, "b": 2.0})
        {'a': tensor([-1.0000,  0.5000]), 'b': tensor(2.)}
    """
    bounds = [trees.broadcast_prefix(bound, tree, name) for bound, name in ((lower, "lower"), (upper, "upper"))]
    leaves, structure = trees.flatten(tree)
    inside = [
        None if x is None else -at_least(-at_least(_real(x), _like(low, x)), -_like(high, x))
        for x, low, high in zip(leaves, *bounds, strict=True)
    ]
    return trees.unflatten(structure, inside)


def linf_ball(tree: Tree, scale: Number = 1.0) -> Tree:
    """Project to the numbers of size at most s: `min(max(x, -s), s)`.

    Args:
        tree: tree of real tensors.
        scale: s >= 0.

    Raises:
        TypeError: a tensor is complex.
        ValueError: the number is negative or NaN.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.linf_ball(torch.tensor([-3.0, 0.5]))
        tensor([-1.0000,  0.5000])
    """
    scale = _fixed("scale", scale)

    def inside(x: Tensor) -> Tensor:
        wide = _wide(x)  # half precision has no number for a large s
        bound = _like(scale, wide)
        return torch.clamp(wide, -bound, bound).to(x.dtype)

    return _each(tree, inside)


def l2_ball(tree: Tree, scale: Number = 1.0) -> Tree:
    """Project to the ball of the 2-norm: `x min(1, s / |x|)`.

    Args:
        tree: tree of real or complex tensors.
        scale: s >= 0, the radius.

    Raises:
        ValueError: the number is negative or NaN.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.l2_ball({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    scale = _fixed("scale", scale)
    tree = trees.map(_inexact, tree)
    factor = shrink(_norm(tree), scale)
    return trees.map(lambda x: (factor.to(x.device) * _wide(x)).to(x.dtype), tree)


def sphere(tree: Tree, scale: Number = 1.0) -> Tree:
    """Project to the sphere of the 2-norm: `x s / |x|`.

    All points of the sphere are equally near to zero. Zero goes to the one whose elements are all equal, with
    derivative zero with respect to x.

    Args:
        tree: tree of real or complex tensors.
        scale: s >= 0, the radius.

    Raises:
        ValueError: the number is negative or NaN.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.sphere(torch.tensor([0.3, 0.4]))
        tensor([0.6000, 0.8000])
    """
    scale = _fixed("scale", scale)
    tree = trees.map(_inexact, tree)
    norm = _norm(tree)
    factor, equal = scale / torch.where(norm == 0, 1.0, norm), scale / max(_size(tree), 1) ** 0.5
    return trees.map(
        lambda x: torch.where(norm == 0, _like(equal, x), (factor.to(x.device) * _wide(x)).to(x.dtype)), tree
    )


def simplex(tree: Tree, scale: Number = 1.0) -> Tree:
    """Project to the simplex, numbers >= 0 whose sum is s: `max(x - tau, 0)` with the tau that makes the sum s.

    Args:
        tree: tree of real tensors with at least one element.
        scale: s > 0, the sum.

    Raises:
        TypeError: a tensor is complex.
        ValueError: the number is not > 0; or there are no elements.

    Source: Duchi et al., Efficient Projections onto the l1-Ball for Learning in High Dimensions, ICML 2008, figure 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.simplex({"a": torch.tensor([0.9, 0.5]), "b": torch.tensor([-1.0])})
        {'a': tensor([0.7000, 0.3000]), 'b': tensor([0.])}
    """
    scale = _fixed("scale", scale, "value > 0")
    tree = trees.map(_real, tree)
    if not _size(tree):
        raise ValueError("A tree without elements has no sum but 0, so there is no simplex; give at least one number")
    threshold = _threshold(tree, scale)
    return _each(tree, lambda x: _above(x, threshold))


def l1_ball(tree: Tree, scale: Number = 1.0) -> Tree:
    """Project to the ball of the 1-norm: `sign(x) max(|x| - tau, 0)`. Outside of it, tau makes the norm s.

    Args:
        tree: tree of real tensors.
        scale: s >= 0, the radius.

    Raises:
        TypeError: a tensor is complex.
        ValueError: the number is negative or NaN.

    Source: Duchi et al., as for `simplex`, section 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.l1_ball(torch.tensor([2.0, -1.5, 0.1]))
        tensor([ 0.7500, -0.2500,  0.0000])
    """
    scale = _fixed("scale", scale)
    sizes = _each(tree, torch.abs)
    fits = _sum([_wide(x).sum() for x in _tensors(sizes)]) <= scale
    # Inside of the ball tau is not used, and must have no derivative.
    threshold = torch.where(fits, 0.0, _threshold(sizes, where(fits, 1.0, scale)))
    return _each(tree, lambda x: torch.where(fits, x, torch.sign(x) * _above(x.abs(), threshold)))


def halfspace(tree: Tree, normal: Tree, offset: Number) -> Tree:
    """Project to a half-space, the points with <a, x> <= b: `x - a max(<a, x> - b, 0) / |a|^2`.

    Args:
        tree: tree of real or complex tensors.
        normal: a, tree of tensors like `tree`. The product of complex tensors is Re(conj(a) x).
        offset: b, any number.

    Raises:
        ValueError: the trees or their shapes are different, or the number is NaN.
        TypeError: the normal is complex where x is real.

    If a is zero, the result is x.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.projections.halfspace(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]), 1.0)
        tensor([1., 3.])
    """
    offset = _fixed("offset", offset, "a number")
    normal = trees.map(_normal, trees.map(_inexact, tree), normal)
    above = _dot(tree, normal) - offset
    square = _dot(normal, normal)
    factor = torch.where(above > 0, above, 0.0) / torch.where(square == 0, 1.0, square)
    return trees.map(lambda x, a: (_wide(x) - factor.to(x.device) * _wide(a)).to(x.dtype), tree, normal)


# Numbers of trees. ----------------------------------------------------------------------------------------------------


def _threshold(tree: Tree, total: Number) -> Tensor:
    """Find the tau with which the sum of max(x - tau, 0) is `total`; 0 for no elements."""
    if not _size(tree):
        return torch.zeros((), dtype=torch.float64, device="cpu")
    x = torch.cat([_wide(_real(leaf)).flatten() for leaf in _tensors(tree)])
    ordered = x.sort(descending=True).values
    counts = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device)
    candidates = (ordered.cumsum(0) - total) / counts
    # The elements above the threshold are constants to derivatives, and so is their number.
    last = (ordered > candidates).sum().clamp(min=1) - 1
    positive = x >= ordered.gather(0, last[None])
    return (torch.where(positive, x, 0.0).sum() - total) / positive.sum()


def _above(x: Tensor, threshold: Tensor) -> Tensor:
    """Return max(x - tau, 0). In the dtype of large numbers tau would be rounded by more than their differences."""
    return torch.clamp(_wide(x) - threshold.to(x.device), min=0).to(x.dtype)


def _norm(tree: Tree) -> Tensor:
    norm: Tensor = global_norm(
        [_wide(x) for x in _tensors(tree)], 2.0, torch.zeros((), dtype=torch.float64, device="cpu")
    )
    return norm


def _dot(one: Tree, other: Tree) -> Tensor:
    return _sum(_tensors(trees.map(lambda x, y: real_dot(_wide(x), _wide(y)), one, other)))


def _sum(numbers: list[Tensor]) -> Tensor:
    return sum([number.to(torch.float64) for number in numbers], torch.zeros((), dtype=torch.float64, device="cpu"))


def _size(tree: Tree) -> int:
    return sum([x.numel() for x in _tensors(tree)])


def _tensors(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in trees.flatten(tree)[0] if leaf is not None]


def _each(tree: Tree, function: Callable[[Tensor], Tensor]) -> Tree:
    return trees.map(lambda x: function(_real(x)), tree)


def _fixed(name: str, number: Number, allowed: str = "value >= 0") -> Number:
    """Check a number, and return it; a tensor without dimensions."""
    check_fixed(name, number, allowed)
    return number.reshape(()) if isinstance(number, Tensor) else number


def _normal(x: Tensor, a: Any) -> Tensor:
    """Return a part of a normal in the dtype of the point."""
    if not isinstance(a, Tensor):
        raise TypeError(f"The normal has a {type(a).__name__} where the point has a tensor; give a tree like it")
    if a.shape != x.shape:
        raise ValueError(
            f"The normal has shape {tuple(a.shape)} where the point has shape {tuple(x.shape)}; give a tree like it"
        )
    if a.is_complex() and not x.is_complex():
        raise TypeError(f"The normal is {a.dtype} where the point is {x.dtype}; give a tree like it")
    return a.to(x)


def _inexact(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"A projection needs a tree of tensors, got a {type(x).__name__} in it")
    if not x.is_floating_point() and not x.is_complex():
        raise TypeError(f"A tensor of {x.dtype} has no nearest point in a set of real numbers; give it tensor.float()")
    return x


def _real(x: Any) -> Tensor:
    tensor = _inexact(x)
    if tensor.is_complex():
        raise TypeError("This projection does not support complex tensors; give it torch.view_as_real(tensor)")
    return tensor


def _wide(x: Tensor) -> Tensor:
    """Return numbers in float64, in which their squares and differences keep their digits."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def _like(number: Any, x: Tensor) -> Any:
    return number.to(x.device, x.real.dtype) if isinstance(number, Tensor) else number
