"""Numbers that differ between parameters, and that a rule's scalars compute with as if they were one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.known import settled
from functorch_optim._core.stand_in import StandIn
from functorch_optim.tree import Tree


class Place(NamedTuple):
    """Where a parameter stands, for what differs between parameters.

    Attributes:
        of: finds in a tree of values, a prefix of the parameters, the one for this parameter.
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


class PerParameter(StandIn):
    """A number that differs between parameters: a function of the place.

    What is computed from it is such a function again, so that nothing is evaluated before the parameters are known.
    """

    def __init__(self, at_place: Callable[[Place], Any]) -> None:
        """Hold the function."""
        self.at_place = at_place

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> "PerParameter":
        """Answer a torch function with the function of a place that calls it there."""
        return cls(lambda place: function(*resolved(args, place), **resolved(kwargs or {}, place)))

    def __bool__(self) -> bool:
        raise TypeError("Scalars must not branch on values: use torch.where(condition, a, b)")


def differs(scalars: Any) -> bool:
    """Tell whether some of the scalars differ between parameters."""
    return any(isinstance(scalar, PerParameter) for scalar in tree.flatten(scalars)[0])


def resolved(scalars: Any, place: Place) -> Any:
    """Evaluate what differs between parameters for one of them."""
    return tree.map(
        lambda scalar: settled(scalar.at_place(place)) if isinstance(scalar, PerParameter) else scalar, scalars
    )


def entry_of(values: Tree, place: Place) -> Any:
    """Find the value of a hyperparameter for one parameter.

    Raises:
        ValueError: there is none, or the values are those of one tensor and there are several.
    """
    if isinstance(values, Tensor) and not place.alone:
        raise ValueError(
            f"A hyperparameter is one number, got a tensor of shape {tuple(values.shape)}. To train with several "
            "values at once, batch them: torch.vmap(lambda lr: ...)(lrs). For a value for each parameter, or for "
            "each of its elements, give a tree like the parameters"
        )
    value = place.of(values)
    if value is None:
        raise ValueError(f"The tree of a hyperparameter has no value for the parameter {place.path()!r}")
    return value


def fitting(value: Any, place: Place) -> Any:
    """Return the value of a hyperparameter for one parameter.

    Raises:
        ValueError: it is a tensor, one value for each element, and not shaped like the parameter, nor broadcasts to it.
    """
    shape, wanted = tuple(getattr(value, "shape", ())), tuple(place.shape)
    fits = len(shape) <= len(wanted) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(
            f"The value of a hyperparameter for {place.path() or 'the root'!r} has shape {shape}, but the parameter "
            f"has {wanted}; give one number, or a tensor that broadcasts to the parameter"
        )
    if shape and not place.elementwise:
        raise ValueError(
            f"The value of a hyperparameter for {place.path() or 'the root'!r} has shape {shape}, but this one cannot "
            "differ between elements of a parameter; give one number"
        )
    return value


def check_shared(name: str, fields: Sequence[str], numbers: Sequence[Any]) -> None:
    """Raise when a number that is kept once for all parameters differs between them.

    Raises:
        TypeError: it does.
    """
    for field, number in zip(fields, numbers, strict=True):
        if isinstance(number, PerParameter):
            raise TypeError(
                f"{name} keeps {field} once for all parameters, so the hyperparameters that it depends on cannot be "
                "trees. Give each part of the parameters a transformation of its own, with partition"
            )
