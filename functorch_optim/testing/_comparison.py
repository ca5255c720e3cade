"""Comparisons of trees of tensors, whose errors name the path and the values."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim.tree import Tree

ROUNDING = {
    torch.float32: 1e-6,
    torch.complex64: 1e-6,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}
"""Largest rounding difference that is allowed, relative to the largest number of a tensor."""


def assert_same(actual: Tree, expected: Tree, what: str, tolerance: float = 1e-12, scale: float = 1.0) -> None:
    """Raise unless two trees have the same structure, shapes, dtypes and numbers.

    Args:
        actual: any tree.
        expected: the tree that it should equal.
        what: name of `actual` in messages.
        tolerance: largest difference of numbers in float64, relative to the largest of their tensor; numbers of lower
            precision may differ by their rounding, see `ROUNDING`.
        scale: size of the inputs; differences that are small relative to it are rounding errors too.

    Raises:
        AssertionError: with the path and the two values.

    Example:
        >>> import torch
        >>> from functorch_optim.testing import assert_same
        >>> assert_same({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.5])}, "the parameter")
        Traceback (most recent call last):
        ...
        AssertionError: the parameter at 'w' is 2.0 at index (1,), and should be 2.5
    """
    leaves, structure = tree.flatten(actual)
    expected_leaves, expected_structure = tree.flatten(expected)
    if structure != expected_structure:
        raise AssertionError(
            f"{what} is built differently than it should be: "
            f"{tree.first_difference(expected, actual, 'what it should be', what)}"
        )
    for path, a, e in zip(tree.paths(expected), leaves, expected_leaves, strict=True):
        here = f"{what} at {path!r}" if path else what
        if not (isinstance(a, Tensor) and isinstance(e, Tensor)):
            if type(a) is not type(e) or a != e:
                raise AssertionError(f"{here} is {a!r}, and should be {e!r}")
            continue
        if kind(a) != kind(e):
            raise AssertionError(f"{here} is a tensor of {kind(a)}, and should be one of {kind(e)}")
        index = _first_that_differs(a.detach(), e.detach(), tolerance, scale)
        if index is not None:
            raise AssertionError(
                f"{here} is {a[index].item()!r}{f' at index {index}' if index else ''}, "
                f"and should be {e[index].item()!r}"
            )


def _first_that_differs(a: Tensor, e: Tensor, tolerance: float, scale: float) -> tuple[int, ...] | None:
    """Find the element that differs most; None if all are the same."""
    if not a.numel():
        return None
    same = (a == e) | (a.isnan() & e.isnan())
    distance = (~same).double()
    if e.is_floating_point() or e.is_complex():
        wide = torch.complex128 if e.is_complex() else torch.float64
        largest = torch.where(e.isfinite(), e, 0).abs().max().item()
        allowed = max(tolerance, ROUNDING.get(e.dtype, 0.0)) * max(scale, largest)
        off = torch.nan_to_num((a.to(wide) - e.to(wide)).abs(), torch.inf)
        distance = torch.where(same | (off <= allowed), 0.0, off)
    worst = int(distance.argmax())
    if not distance.reshape(-1)[worst]:
        return None
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), a.shape))


def kind(tensor: Tensor) -> str:
    """Describe a tensor without its numbers."""
    return f"shape {tuple(tensor.shape)}, dtype {tensor.dtype}, on {tensor.device}"


def tensors_of(some: Tree) -> dict[str, Tensor]:
    """Return all tensors of a tree by path."""
    leaves = zip(tree.paths(some), tree.flatten(some)[0], strict=True)
    return {path: leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


@contextlib.contextmanager
def unmodified(**trees: Tree) -> Iterator[None]:
    """Raise if code within the `with` writes to a tensor of these trees.

    Raises:
        AssertionError: the values of a tensor have changed, or its version, which counts in-place operations.

    Example:
        >>> import torch
        >>> from functorch_optim.testing import unmodified
        >>> with unmodified(state={"m": (m := torch.ones(()))}):
        ...     m += 1
        Traceback (most recent call last):
        ...
        AssertionError: the state at 'm' was modified in place: it was 1.0, and is 2.0
    """
    before = [
        (name, path, leaf, leaf.clone(), leaf._version)
        for name, some in trees.items()
        for path, leaf in tensors_of(some).items()
    ]
    yield
    for name, path, leaf, value, version in before:
        changed = _first_that_differs(leaf.detach(), value.detach(), 0.0, 0.0) is not None
        if changed or leaf._version != version:
            at = f" at {path!r}" if path else ""
            was = f": it was {value}, and is {leaf}" if changed else ", though its values are the same again"
            raise AssertionError(f"the {name}{at} was modified in place{was}")
