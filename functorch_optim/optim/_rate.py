"""The learning rate of a chain: found in the calls that made it, shown in param groups, and driven from there."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim._core.parts import parts_of
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.wrappers.injection import InjectingFactory

_IN_STATE = object()
"""Stands for a learning rate that the state keeps."""


class Rate(NamedTuple):
    """The learning rate of a transformation.

    Attributes:
        value: the number or tensor; None where param groups cannot drive it.
        error: why they cannot, and what to do.
    """

    value: Any
    error: str

    def driven(
        self, transformation: GradientTransformation, groups: Sequence[Mapping[str, Any]], names: Sequence[str] | None
    ) -> GradientTransformation:
        """Return the transformation with the learning rates of param groups.

        Args:
            transformation: whose rate this is.
            groups: the groups.
            names: of all parameters, where the tree of parameters is a dict by name; else it is a list.

        Raises:
            ValueError: groups have a rate, and the transformation has none that they can drive.
        """
        given = [group.get("lr", self.value) for group in groups]
        if self.value is None:
            if any(lr is not None for lr in given):
                raise ValueError(self.error)
            return transformation
        if all(_same(lr, self.value) for lr in given):
            return transformation
        new = given[0]
        if not all(_same(lr, new) for lr in given):
            each = [lr for group, lr in zip(groups, given, strict=True) for _ in group["params"]]
            new = each if names is None else dict(zip(names, each, strict=True))
        return _mapped(transformation, lambda lr: new)


class Group(dict[str, Any]):
    """A param group without a learning rate, which says why there is none."""

    error = ""

    def __missing__(self, key: str) -> Any:
        """Raise; torch's schedulers ask for `lr`."""
        raise KeyError(self.error if key == "lr" else key)


def rate_of(transformation: GradientTransformation) -> Rate:
    """Find the learning rate of a transformation: the only argument called `lr` in the calls that made it."""
    found: list[Any] = []

    def note(lr: Any) -> Any:
        found.append(lr)
        return lr

    _mapped(transformation, note)
    if len(found) != 1:
        has = f"{len(found)} learning rates" if found else "no argument called lr"
    elif found[0] is _IN_STATE:
        has = "its hyperparameters in its state, where opt.set_hyperparams(lr=1e-4) sets them"
    elif callable(found[0]):
        has = f"a schedule for its learning rate, {found[0]!r}, which alone drives it"
    elif isinstance(found[0], Real) or (isinstance(found[0], Tensor) and not found[0].requires_grad):
        return Rate(found[0], "")
    else:
        has = "a learning rate that is learned, or differs between parameters"
    return Rate(
        None,
        f"{transformation!r} has {has}, so param_groups have no 'lr', and neither edits nor schedulers of torch drive "
        "it. Give a factory, Optimizer(params, adamw, lr=1e-3), or a schedule in the transformation, adamw(schedule)",
    )


def _mapped(transformation: GradientTransformation, change: Callable[[Any], Any]) -> GradientTransformation:
    """Make a transformation again, with other learning rates."""
    make, args, kwargs = transformation._call
    if isinstance(make, InjectingFactory):  # the numbers are in the state
        change(_IN_STATE)
        return transformation
    function = getattr(make, "__wrapped__", None)
    if function is None:  # made of links or of two functions: nothing is known of its numbers
        return transformation
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    inside: list[Any] = []
    parts = parts_of(function)
    rates = [name for name in (parts.rates if parts else ()) if bound.arguments[name] is not None]
    new = {
        name: change(value)
        if name == "lr" or name in rates
        else value
        if "lr" in bound.arguments
        else _within(value, change, inside)
        for name, value in bound.arguments.items()
    }
    if "lr" not in bound.arguments and not inside:  # a factory under another name: look at its result
        made = function(*args, **kwargs)
        mapped = _mapped(made, change)
        return transformation if mapped is made else mapped
    if all(new[name] is value for name, value in bound.arguments.items()):
        return transformation
    bound.arguments.update(new)
    made_anew: GradientTransformation = make(*bound.args, **bound.kwargs)
    return made_anew


def _within(value: Any, change: Callable[[Any], Any], inside: list[Any]) -> Any:
    """Change the transformations in an argument, and list them."""
    if isinstance(value, GradientTransformation):
        inside.append(value)
        return _mapped(value, change)
    within = functools.partial(_within, change=change, inside=inside)
    if type(value) is tuple:
        items = tuple(map(within, value))
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if type(value) is dict:
        named = {key: within(item) for key, item in value.items()}
        return value if all(named[key] is item for key, item in value.items()) else named
    return value


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Real) and isinstance(other, Real) and one == other)
