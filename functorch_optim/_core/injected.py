"""Numbers that a link keeps in its state for other links, which read them at every step."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


class _Current(threading.local):
    """The numbers that links read while theirs are computed, by keeper."""

    def __init__(self) -> None:
        # Of the thread's object: torch.compile would see the attribute appear, and compile again.
        self.numbers: Mapping[Any, Sequence[Any]] | None = None


_CURRENT = _Current()


@contextmanager
def reading(numbers: Mapping[Any, Sequence[Any]]) -> Iterator[None]:
    """Let injected hyperparameters be these numbers.

    Args:
        numbers: those of keepers, by the `keeps` of their rules.
    """
    outer, _CURRENT.numbers = _CURRENT.numbers, numbers
    try:
        yield
    finally:
        _CURRENT.numbers = outer


def number_of(keeper: Any, index: int, initial: Any) -> Any:
    """Read a number of a keeper; the initial one where no step is made, as when a state begins."""
    numbers = _CURRENT.numbers
    return initial if numbers is None or keeper not in numbers else numbers[keeper][index]
