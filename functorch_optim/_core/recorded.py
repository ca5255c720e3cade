"""Things that print and pickle as the call that made them."""

import inspect
from collections.abc import Callable
from typing import Any


class Recorded:
    """Remembers the call that made it.

    Closures cannot be pickled and do not print well; the call that made them can and does.
    """

    _call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

    def __repr__(self) -> str:
        return written_call(*self._call)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recorded":
        return self  # it never changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, self._call


def _make(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def written_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Write a call as users do, who know no private names."""
    named = [f"{name}={_written(value)}" for name, value in kwargs.items()]
    return f"{function.__name__.removeprefix('_')}({', '.join([_written(value) for value in args] + named)})"


def _written(value: Any) -> str:
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(value.__name__)
    if type(value) in (list, tuple):
        return repr(type(value)([_Written(item) for item in value]))
    if type(value) is dict:
        return repr({key: _Written(item) for key, item in value.items()})
    return repr(value)


class _Written:
    """Prints as `_written` says, inside of containers."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        return _written(self._value)
