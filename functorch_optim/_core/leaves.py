"""Leaves that links are run over, and the results."""

from collections.abc import Callable
from typing import Any, NamedTuple

from functorch_optim._core.numbers import Condition, Step

Ready = Callable[[], None]
"""Overwrites parameters and states that were given up."""


class Leaves(NamedTuple):
    """The leaves that links are run over.

    Attributes:
        updates: for each leaf, a tensor or None.
        params: the parameters; None when they were not given.
        columns: for each link, its state: the NamedTuple of its rule with a list, an entry a leaf, in each field. For a
            function of the whole tree, its state as it is.
    """

    updates: list[Any]
    params: list[Any] | None
    columns: list[Any]


class Outcome(NamedTuple):
    """The results of a run.

    Attributes:
        updates: for each leaf an update, or the new parameter if the last link adds; None where nothing moves, or where
            it is left to `ready`.
        columns: new states, as in `Leaves`.
        carried: for each bucket and link, the numbers to carry on.
        due: for each bucket and link, whether it was run: True, False, or a condition that is not known.
        ready: functions that overwrite the parameters and states that were given up.
        computed: whether there is more than that: updates, or new states.
    """

    updates: list[Any]
    columns: list[Any]
    carried: list[list[tuple[Step, ...]]]
    due: list[list[Condition]]
    ready: list[Ready]
    computed: bool
