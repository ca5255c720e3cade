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
        function, args, kwargs = self._call
        named = [f"{name}={_written(value)}" for name, value in kwargs.items()]
        return f"{function.__name__}({', '.join([_written(value) for value in args] + named)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, self._call


def _make(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def _written(value: Any) -> str:
    by_name = inspect.isroutine(value) or inspect.isclass(value)
    return str(value.__qualname__) if by_name else repr(value)
