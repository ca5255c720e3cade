"""The leaf whose numbers are being computed, where a hyperparameter is a tree of values."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.stand_in import StandIn
from functorch_optim.tree import Tree


class Leaf(NamedTuple):
    """A parameter, for hyperparameters that differ between parameters.

    Attributes:
        of: finds the value for this parameter in a tree of values, a prefix of the parameters.
        path: names the parameter.
        shape: its shape.
        alone: whether it is the whole tree.
        elementwise: whether there may be a value for each element.
    """

    of: Callable[[Tree], Any]
    path: Callable[[], str]
    shape: torch.Size
    alone: bool
    elementwise: bool


class DiffersError(TypeError):
    """A hyperparameter is a tree, and was read where there is one number for all parameters."""

    def __str__(self) -> str:
        return (
            f"The hyperparameter {self.args[0]!r} is a tree, and here one number is needed for all parameters. Give "
            "each part of the parameters a transformation of its own, with partition"
        )


class _Current(threading.local):
    """The leaf that `at` looks values up for, and the trees that were read for it."""

    def __init__(self) -> None:
        # Of the thread's object: torch.compile would see the attributes appear, and compile again.
        self.leaf: Leaf | None = None
        self.read: list[Tree] | None = None
        self.shared = False


_CURRENT = _Current()


@contextmanager
def numbers_for(leaf: Leaf, read: list[Tree]) -> Iterator[None]:
    """Let hyperparameters that are trees be the values for one leaf; collect these trees in `read`."""
    _CURRENT.leaf, _CURRENT.read = leaf, read
    try:
        yield
    finally:
        _CURRENT.leaf = _CURRENT.read = None


@contextmanager
def marked() -> Iterator[None]:
    """Let hyperparameters that are trees be marks, which every number that depends on one becomes."""
    _CURRENT.shared = True
    try:
        yield
    finally:
        _CURRENT.shared = False


class Mark(StandIn):
    """Stands for a number that differs between parameters, and for all that is computed from it."""

    device = torch.device("cpu")
    dtype = torch.float64

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> "Mark":
        """Answer any torch function with a mark."""
        return cls()

    def __bool__(self) -> bool:
        """Refuse to choose: `max`, say, would lose the mark.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "A number that is kept once for all parameters is chosen by a hyperparameter that is a tree. Give each "
            "part of the parameters a transformation of its own, with partition"
        )


def value_here(values: Tree) -> Any:
    """Find the value of a hyperparameter for the current leaf.

    Raises:
        DiffersError: there is no current leaf.
        ValueError: there is no value, or the values are those of one tensor and there are several.
    """
    leaf = _CURRENT.leaf
    if _CURRENT.shared:
        return Mark()
    if leaf is None or _CURRENT.read is None:
        raise DiffersError(values)
    if isinstance(values, Tensor) and not leaf.alone:
        raise ValueError(
            f"A hyperparameter is one number, got a tensor of shape {tuple(values.shape)}. To train with several "
            "values at once, batch them: torch.vmap(lambda lr: ...)(lrs). For a value for each parameter, or for "
            "each of its elements, give a tree like the parameters"
        )
    _CURRENT.read.append(values)
    value = leaf.of(values)
    if value is None:
        raise ValueError(f"The tree of a hyperparameter has no value for the parameter {leaf.path()!r}")
    return value


def fitting(value: Any) -> Any:
    """Return the value of a hyperparameter for the current leaf.

    Raises:
        ValueError: it is a tensor, one value for each element, and not shaped like the parameter, nor broadcasts to it.
    """
    leaf = _CURRENT.leaf
    if leaf is None or not isinstance(value, Tensor):
        return value
    shape, wanted = tuple(value.shape), tuple(leaf.shape)
    fits = len(shape) <= len(wanted) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(
            f"The value of a hyperparameter for {leaf.path() or 'the root'!r} has shape {shape}, but the parameter "
            f"has {wanted}; give one number, or a tensor that broadcasts to the parameter"
        )
    if shape and not leaf.elementwise:
        raise ValueError(
            f"The value of a hyperparameter for {leaf.path() or 'the root'!r} has shape {shape}, but this one cannot "
            "differ between elements of a parameter; give one number"
        )
    return value
