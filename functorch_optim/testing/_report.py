"""Running properties, and reporting the problems that break them."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

On = TypeVar("On")


class PropertyError(AssertionError):
    """A property does not hold.

    Attributes:
        name: name of the property.
        on: the smallest problem that was found to break it.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from functorch_optim import testing
        >>> negated = fo.stateless(lambda updates, params: fo.tree.map(torch.neg_, updates))
        >>> try:
        ...     testing.check_transformation(negated)
        ... except testing.PropertyError as error:
        ...     print(error.name, error.on.params)
        pure tensor(1.5410, dtype=torch.float64)
    """

    def __init__(self, check: Callable[..., None], problem: Any, why: str) -> None:
        self.name = check.__name__
        self.on = problem
        claim = (check.__doc__ or "").partition("\n")[0]
        super().__init__(f"{self.name} does not hold: {claim}\nBut {why}\nThis was found with\n{problem}")


def first_line(error: BaseException) -> str:
    """Return the first line of the message of an error."""
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def reported(check: Callable[..., None], problem: On) -> Iterator[On]:
    """Let errors within the `with` name the property, and the problem that it was run on.

    Raises:
        PropertyError: in place of the error.
    """
    try:
        yield problem
    except Exception as error:
        why = str(error) if isinstance(error, AssertionError) else f"it raises {type(error).__name__}: {error}"
        raise PropertyError(check, problem, why) from error


def falsify(
    check: Callable[..., None], subject: Any, drawn: st.SearchStrategy[Any], examples: int, first: Any = None
) -> None:
    """Look for a problem that breaks a property, and for the smallest one.

    Args:
        check: property.
        subject: its first argument.
        drawn: strategy for its second argument, a problem.
        examples: number of problems to try; if `first` breaks the property, more are tried, to find a smaller one.
        first: the problem to try first.

    Raises:
        PropertyError: the property does not hold.
    """
    found: list[PropertyError] = []
    if first is not None:
        try:
            with reported(check, first):
                check(subject, first)
        except PropertyError:
            falsify(check, subject, drawn, max(examples, 50))
            raise

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def run(problem: Any) -> None:
        try:
            with reported(check, problem):
                check(subject, problem)
        except PropertyError as error:
            found.append(error)
            raise

    try:
        run()
    except Flaky as flaky:
        raise PropertyError(
            check, found[0].on, f"it depends on what was called before, outside of the state: {found[0]}"
        ) from flaky


def to_check(properties: Iterable[str], skip: Collection[str]) -> list[str]:
    """Name the properties that are not skipped.

    Raises:
        ValueError: a name is no property.
    """
    known = list(properties)
    if isinstance(skip, str):
        raise ValueError(f"skip is {skip!r}; give a set of names: skip={{{skip!r}}}")
    for name in skip:
        if name not in known:
            raise ValueError(f"There is no property {name!r} to skip; known are {', '.join(known)}")
    return [name for name in known if name not in skip]
