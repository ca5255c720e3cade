"""Arithmetic with trees of tensors."""

import functools
from collections.abc import Callable
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from functorch_optim._numerics import safe_norm
from functorch_optim.tree._structure import Tree, flatten, flatten_up_to, is_leaf, paths, unflatten

_HALF = (torch.float16, torch.bfloat16)


def add(tree: Tree, *others: Tree) -> Tree:
    """Add trees: `a + b + ...`, leaf by leaf.

    Args:
        tree: tree of tensors. None adds nothing, as a gradient that is missing; the sum of Nones is None.
        *others: trees built like it, of the same shapes.

    Returns:
        Tree like `tree`; dtypes are promoted as by torch.

    Raises:
        ValueError: trees or shapes differ; the message names the path.
        TypeError: a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.tree.add({"w": torch.ones(1), "b": None}, {"w": torch.ones(1), "b": torch.ones(1)})
        {'w': tensor([2.]), 'b': tensor([1.])}
    """
    rows, structure = _rows("add", tree, *others)
    return unflatten(structure, [_sum([leaf for leaf in row if leaf is not None]) for row in rows])


def sub(tree: Tree, other: Tree) -> Tree:
    """Subtract a tree from another: `a - b`, leaf by leaf.

    Args:
        tree: a: tree of tensors. None is a zero; the difference of Nones is None.
        other: b: tree built like it, of the same shapes.

    Returns:
        Tree like `tree`; dtypes are promoted as by torch.

    Raises:
        ValueError: trees or shapes differ; the message names the path.
        TypeError: a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.tree.sub({"w": torch.ones(1)}, {"w": torch.tensor([3.0])})
        {'w': tensor([-2.])}
    """
    rows, structure = _rows("sub", tree, other)
    return unflatten(structure, [_sum([*_present(a), *[-leaf for leaf in _present(b)]]) for a, b in rows])


def scale(scalar: complex | Tensor, tree: Tree) -> Tree:
    """Multiply a tree by a number: `s a`, leaf by leaf. The number comes first, as in optax.tree.scale.

    Args:
        scalar: s: number, or 0-dim tensor.
        tree: a: tree of tensors; None stays None.

    Returns:
        Tree like `tree`. Floating-point leaves keep their dtype, unless the number is complex; integers become floats
        where the number is one.

    Raises:
        TypeError: `scalar` is no number, or a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.tree.scale(0.5, {"w": torch.ones(1)})
        {'w': tensor([0.5000])}
    """
    if not isinstance(scalar, Number) and not (isinstance(scalar, Tensor) and scalar.ndim == 0):
        given = (
            f"a tensor of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else f"a {type(scalar).__name__}"
        )
        raise TypeError(f"scale takes a number first, got {given}; write fo.tree.scale(0.5, tree)")
    rows, structure = _rows("scale", tree)
    return unflatten(structure, [None if leaf is None else _scaled(scalar, leaf) for (leaf,) in rows])


def vdot(tree: Tree, other: Tree) -> Tensor:
    """Take the inner product of two trees: the sum of `conj(a) b` over all elements of all leaves, as torch.vdot.

    Args:
        tree: a: tree of tensors; where one of the two leaves is None, it adds nothing.
        other: b: tree built like it, of the same shapes.

    Returns:
        0-dim tensor in the promoted dtype of all leaves, on the device of the first; float32 for float16 and bfloat16.

    Raises:
        ValueError: trees or shapes differ; the message names the path.
        TypeError: a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> a = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> fo.tree.vdot(a, a)
        tensor(14.)
    """
    rows, _ = _rows("vdot", tree, other)
    return _total([_dot(a, b) for a, b in rows if a is not None and b is not None])


def norm(tree: Tree, ord: float = 2.0) -> Tensor:  # noqa: A002 - torch.linalg's and optax's name for it
    """Take the norm of all elements of all leaves: `(sum |a|^ord)^(1/ord)`, with derivative zero where it is zero.

    Args:
        tree: tree of tensors, real or complex; None adds nothing.
        ord: order, a number > 0 or inf.

    Returns:
        0-dim real tensor in the promoted dtype of all leaves, float32 at least, on the device of the first.

    Raises:
        ValueError: `ord` is not > 0.
        TypeError: a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> grads = {"w": torch.tensor([3.0]), "b": torch.tensor(4.0), "unused": None}
        >>> fo.tree.norm(grads), fo.tree.norm(grads, ord=float("inf"))
        (tensor(5.), tensor(4.))
    """
    if not ord > 0:
        raise ValueError(f"Invalid norm order: {ord}; a norm needs ord > 0, as in fo.tree.norm(tree, ord=2.0)")
    rows, _ = _rows("norm", tree)
    norms = [safe_norm(_inexact(leaf), ord) for (leaf,) in rows if leaf is not None]
    dtype = _promoted([one.dtype for one in norms])
    if not norms:
        return torch.zeros((), device="cpu")
    return safe_norm(torch.stack([one.to(norms[0].device, dtype) for one in norms]), ord)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Convert a tree to a dtype, as `torch.nn.Module.to` does: integers and bools stay as they are.

    Args:
        tree: tree of tensors; None and other objects stay.
        dtype: floating-point dtype, which makes of complex leaves those of its precision; or a complex one.

    Returns:
        Tree like `tree`; leaves of that dtype already are the same tensors.

    Raises:
        TypeError: `dtype` is no floating-point or complex dtype.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.tree.cast({"w": torch.ones(1), "step": torch.tensor(3)}, torch.bfloat16)
        {'w': tensor([1.], dtype=torch.bfloat16), 'step': tensor(3)}
    """
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(
            f"cast takes a floating-point or complex dtype, got {dtype}; as in fo.tree.cast(tree, torch.float64)"
        )
    leaves, structure = flatten(tree)
    return unflatten(structure, [_cast(leaf, dtype) for leaf in leaves])


def zeros_like(tree: Tree, dtype: torch.dtype | None = None) -> Tree:
    """Make a tree of zeros; None stays None.

    Args:
        tree: tree of tensors.
        dtype: of the zeros; that of each leaf by default.

    Returns:
        Tree like `tree`, of new tensors.

    Raises:
        TypeError: a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.tree.zeros_like({"w": torch.ones(2), "b": None})
        {'w': tensor([0., 0.]), 'b': None}
    """
    rows, structure = _rows("zeros_like", tree)
    zeros = [leaf if leaf is None else torch.zeros_like(_tensor(leaf), dtype=dtype) for (leaf,) in rows]
    return unflatten(structure, zeros)


def where(condition: Any, tree: Tree, other: Tree) -> Tree:
    """Choose between two trees: `a` where the condition holds and `b` elsewhere, leaf by leaf, as torch.where.

    NaN and inf do not come through where they are not chosen. As in torch, zero times an infinite derivative is NaN.

    Args:
        condition: bool, or bool tensor that broadcasts to every leaf; or a tree of these, built like the two.
        tree: a: tree of tensors.
        other: b: tree built like it, of the same shapes, with None where it has None.

    Returns:
        Tree like `tree`; dtypes are promoted as by torch.

    Raises:
        ValueError: trees or shapes differ; the message names the path.
        TypeError: a condition is no bool, or a leaf is neither tensor nor number nor None.

    Example:
        >>> import functorch_optim as fo, torch
        >>> old, new = {"w": torch.ones(2)}, {"w": torch.full((2,), torch.nan)}
        >>> fo.tree.where(torch.isfinite(fo.tree.norm(new)), new, old)
        {'w': tensor([1., 1.])}
    """
    rows, structure = _rows("where", tree, other)
    chosen = [condition] * len(rows)
    if not is_leaf(condition):
        chosen = flatten_up_to(structure, condition, "the conditions of where", tree, "the first tree")
    picked = []
    for i, (one, (a, b)) in enumerate(zip(chosen, rows, strict=True)):
        picked.append(_chosen(one, a, b, functools.partial(_path, tree, i)))
    return unflatten(structure, picked)


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Make one vector of a tree, as jax.flatten_util.ravel_pytree; and a function that makes such trees of vectors.

    Args:
        tree: tree of tensors; None has no elements.

    Returns:
        The vector of all elements, in the order of `fo.tree.flatten`, in the promoted dtype of all leaves and on the
        device of the first; and `unravel(vector) -> tree`, whose leaves have the shapes, dtypes and devices of those of
        `tree`. A leaf that is not complex takes the real parts. Both may be differentiated and vmapped.

    Raises:
        TypeError: a leaf is neither tensor nor None.
        ValueError: `unravel` is given a vector of another length.

    Example:
        >>> import functorch_optim as fo, torch
        >>> vector, unravel = fo.tree.ravel({"w": torch.ones(2), "b": torch.zeros(1)})
        >>> vector, unravel(2 * vector)
        (tensor([0., 1., 1.]), {'w': tensor([2., 2.]), 'b': tensor([0.])})
    """
    rows, structure = _rows("ravel", tree, numbers=False)
    leaves = [leaf for (leaf,) in rows]
    given = [leaf for leaf in leaves if leaf is not None]
    dtype = _promoted([leaf.dtype for leaf in given])
    pieces = [leaf.reshape(-1).to(given[0].device, dtype) for leaf in given]
    kinds = [None if leaf is None else (leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
    sizes = [leaf.numel() for leaf in given]

    def unravel(vector: Tensor) -> Tree:
        """Make a tree of a vector."""
        if not isinstance(vector, Tensor) or vector.shape != (sum(sizes),):
            found = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else f"type {type(vector).__name__}"
            raise ValueError(f"unravel takes a vector of shape ({sum(sizes)},), got one of {found}")
        parts = iter(torch.split(vector, sizes) if sizes else ())
        return unflatten(structure, [None if kind is None else _unraveled(next(parts), *kind) for kind in kinds])

    return torch.cat(pieces) if pieces else torch.zeros(0, device="cpu"), unravel


# Leaves. --------------------------------------------------------------------------------------------------------------


def _rows(function: str, tree: Tree, *others: Tree, numbers: bool = True) -> tuple[list[tuple[Any, ...]], Any]:
    """List the parts at each place of trees, and return their structure.

    Raises:
        ValueError: trees or shapes differ.
        TypeError: a leaf is no tensor.
    """
    leaves, structure = flatten(tree)
    columns = [leaves]
    for n, other in enumerate(others):
        columns.append(flatten_up_to(structure, other, f"tree {n + 2} of {function}", tree, "the first tree"))
    rows = list(zip(*columns, strict=True))
    for i, row in enumerate(rows):
        shapes = [leaf.shape for leaf in row if isinstance(leaf, Tensor)]
        for leaf in row:
            if not isinstance(leaf, Tensor) and not (leaf is None or (numbers and isinstance(leaf, Number))):
                what = "tensors and numbers" if numbers else "tensors"
                raise TypeError(f"{function} takes {what}, but there is a {type(leaf).__name__} at {_path(tree, i)!r}")
        if any(shape != shapes[0] for shape in shapes):
            listed = " and ".join([str(tuple(shape)) for shape in shapes])
            raise ValueError(
                f"The leaves that {function} is given at {_path(tree, i)!r} have shapes {listed}; they must agree"
            )
    return rows, structure


def _path(tree: Tree, i: int) -> str:
    return paths(tree)[i]


def _present(leaf: Any) -> list[Any]:
    return [] if leaf is None else [leaf]


def _sum(leaves: list[Any]) -> Any:
    if not leaves:
        return None
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    return total


def _scaled(scalar: Any, leaf: Any) -> Any:
    product = scalar * leaf
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return product.to(leaf.dtype) if product.is_complex() == leaf.is_complex() else product
    return product


def _dot(a: Any, b: Any) -> Tensor:
    a, b = _tensor(a), _tensor(b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.float32 if dtype in _HALF else dtype
    product: Tensor = torch.vdot(a.to(dtype).reshape(-1), b.to(dtype).reshape(-1))
    return product


def _total(numbers: list[Tensor]) -> Tensor:
    """Add numbers in their promoted dtype, on the device of the first."""
    dtype = _promoted([number.dtype for number in numbers])
    if not numbers:
        return torch.zeros((), device="cpu")
    return torch.stack([n.to(numbers[0].device, dtype) for n in numbers]).sum(0)


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    promoted = dtypes[0] if dtypes else torch.get_default_dtype()
    for dtype in dtypes:
        promoted = torch.promote_types(promoted, dtype)
    return promoted


def _tensor(leaf: Any) -> Tensor:
    """Make a tensor of a number; `torch.as_tensor` would move a tensor to the default device."""
    return leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf)


def _inexact(leaf: Any) -> Tensor:
    tensor = _tensor(leaf)
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.to(torch.get_default_dtype())


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf
    return leaf.to(dtype.to_complex() if leaf.is_complex() else dtype)


def _chosen(condition: Any, a: Any, b: Any, path: Callable[[], str]) -> Any:
    if not isinstance(condition, bool) and not (isinstance(condition, Tensor) and condition.dtype == torch.bool):
        given = f"{condition.dtype} tensor" if isinstance(condition, Tensor) else type(condition).__name__
        raise TypeError(f"The condition of where for {path()!r} is a {given}; give a bool, or a tensor of bools")
    if (a is None) != (b is None):
        raise ValueError(f"At {path()!r} one tree of where has None and the other has not; None cannot be chosen")
    if a is None or isinstance(condition, bool):
        return a if condition is not False else b
    shape = next((leaf.shape for leaf in (a, b) if isinstance(leaf, Tensor)), condition.shape)
    try:
        condition = condition.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"The condition of where for {path()!r} has shape {tuple(condition.shape)}, which does not broadcast to "
            f"that of the leaf, {tuple(shape)}"
        ) from None
    return torch.where(condition, a, b)


def _unraveled(piece: Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if piece.is_complex() and not dtype.is_complex:
        piece = piece.real
    return piece.reshape(shape).to(device, dtype)
