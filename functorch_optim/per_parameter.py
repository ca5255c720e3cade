"""Numbers that differ between parameters, and that a rule's scalars compute with as if they were one."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim.stand_in import StandIn
from functorch_optim.tree import Tree


class Place(NamedTuple):
    """Where a parameter stands, for what differs between parameters.

    Attributes:
        of: finds in a tree of values, a prefix of the parameters, the one for this parameter.
        path: names the parameter.
        shape: its shape.
    """

    of: Callable[[Tree], Any]
    path: Callable[[], str]
    shape: torch.Size


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
    return tree.map(lambda scalar: scalar.at_place(place) if isinstance(scalar, PerParameter) else scalar, scalars)


def check_fits(value: Tensor, place: Place) -> None:
    """Raise unless a tensor of numbers, one for each element, is shaped like the parameter or broadcasts to it.

    Raises:
        ValueError: it is not.
    """
    shape, wanted = tuple(value.shape), tuple(place.shape)
    fits = len(shape) <= len(wanted) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(
            f"The value of a hyperparameter for {place.path() or 'the root'!r} has shape {shape}, but the parameter "
            f"has {wanted}; give one number, or a tensor that broadcasts to the parameter"
        )


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
