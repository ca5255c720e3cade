"""Factories whose param groups are parted: each part has a learning rate of its own, under the name `lr`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


class Parts(NamedTuple):
    """How the param groups of a factory are parted.

    Attributes:
        of: (group, defaults) -> groups; the group itself where there is nothing to part.
        rates: the hyperparameters that are learning rates.
    """

    of: Callable[[dict[str, Any], Mapping[str, Any]], list[dict[str, Any]]]
    rates: tuple[str, ...]


def in_parts(parts: Parts) -> Callable[[_F], _F]:
    """Let `Optimizer` part the groups of a factory."""

    def marked(function: _F) -> _F:
        function._parts = parts  # type: ignore[attr-defined]
        return function

    return marked


def parts_of(factory: Any) -> Parts | None:
    """Return how the groups of a factory are parted, if they are."""
    return parts_of(factory.func) if isinstance(factory, functools.partial) else getattr(factory, "_parts", None)
