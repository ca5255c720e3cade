"""Tensor by tensor: right everywhere, and the reference of all other ways."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.checks import check_pair
from functorch_optim._core.rule import Rule
from functorch_optim._execution.representation import Columns, map_columns, row


class Stage(NamedTuple):
    """One rule of several that are run one after the other.

    Attributes:
        rule: the rule.
        source: the stage that hands this one its parameters, and the function of parameter and state that makes them;
            None for the parameters.
        recalls: the stage whose update, as it was given, this one takes for the parameter; None for the parameter.
    """

    rule: Rule
    source: tuple[int, Callable[[Any, Any], Any]] | None = None
    recalls: int | None = None

    def shifted(self, by: int) -> "Stage":
        """Count other stages from a later one."""
        source = None if self.source is None else (self.source[0] - by, self.source[1])
        return Stage(self.rule, source, None if self.recalls is None else self.recalls - by)


class Held(NamedTuple):
    """The numbers of a gate at a step that it leaves out."""

    scalars: Any


class Masked(NamedTuple):
    """The numbers of a rule that is run at some steps, where it is not known at which.

    Attributes:
        scalars: the numbers.
        is_open: whether the rule is run.
        due: whether its update is used: of a gate, whether the links inside are run.
    """

    scalars: Any
    is_open: Any
    due: Any


def tensor_by_tensor(
    stages: Sequence[Stage],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules, one after the other, on one tensor after the other."""
    new_updates: list[Tensor] = []
    new_states: list[Columns] = [map_columns(None, state) for state in states]
    for i, update in enumerate(updates):
        rows = [row(state, i) for state in states]
        p = params[i] if params is not None else None
        given = [update]
        for k, stage in enumerate(stages):
            new, new_state = applied(stage, given, rows, p, scalars[k])
            for column, tensor in zip(new_states[k], new_state, strict=True):
                column.append(tensor)
            given.append(new)
        new_updates.append(given[-1])
    return new_updates, new_states


def applied(stage: Stage, given: Sequence[Any], states: Sequence[Any], p: Any, s: Any) -> tuple[Any, Any]:
    """Run the rule of a stage, and check its result.

    Args:
        stage: the stage.
        given: the updates that the stages before it were given, and its own.
        states: of all stages.
        p: the parameter.
        s: the numbers of the rule.

    Raises:
        TypeError: the rule does not return a pair of an update and a state like the one it was given.
    """
    rule, g, state = stage.rule, given[-1], states[len(given) - 1]
    if stage.source is not None:
        holder, hands = stage.source
        p = hands(p, states[holder])
    if stage.recalls is not None:
        p = given[stage.recalls]
    scalars = s.scalars if isinstance(s, Masked) else s
    if isinstance(scalars, Held):
        returned = torch.zeros_like(g), rule.hold(g, state, p, scalars.scalars)  # type: ignore[misc]
    else:
        returned = rule.update(g, state, p, scalars)
    check_pair(f"The rule of {rule.name}", "update", returned)
    if not isinstance(returned[1], tuple) or len(returned[1]) != len(state):
        raise TypeError(
            f"The rule of {rule.name} must return a state like the one it was given, with "
            f"{', '.join(getattr(state, '_fields', ())) or 'no fields'}, but it returned {returned[1]!r}"
        )
    if not isinstance(s, Masked):
        return returned
    update, new = returned
    if rule.hold is not None and not isinstance(scalars, Held):
        new = _where(s.due, new, rule.hold(g, state, p, scalars))
    return torch.where(s.due, update, torch.zeros_like(update)), _where(s.is_open, new, state)


def _where(condition: Any, new: Any, old: Any) -> Any:
    if isinstance(condition, bool):
        return new if condition else old
    kept = [torch.where(condition, one, other) for one, other in zip(new, old, strict=True)]
    return type(new)(*kept) if kept else ()
