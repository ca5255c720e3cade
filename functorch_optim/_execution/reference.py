"""Tensor by tensor: right everywhere, and what all other ways are tested against."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from functorch_optim._core.checks import check_pair
from functorch_optim._core.rule import Rule
from functorch_optim._execution.representation import Columns, map_columns, row


def tensor_by_tensor(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules, one after the other, on one tensor after the other."""
    new_updates: list[Tensor] = []
    new_states: list[Columns] = [map_columns(None, state) for state in states]
    for i, update in enumerate(updates):
        p = params[i] if params is not None else None
        for k, rule in enumerate(rules):
            update, new_state = applied(rule, update, row(states[k], i), p, scalars[k])  # noqa: PLW2901
            for column, tensor in zip(new_states[k], new_state, strict=True):
                column.append(tensor)
        new_updates.append(update)
    return new_updates, new_states


def applied(rule: Rule, g: Any, state: Any, p: Any, s: Any) -> tuple[Any, Any]:
    """Run a rule, and check what it returns.

    Raises:
        TypeError: it does not return a pair of an update and a state like the one it was given.
    """
    returned = rule.update(g, state, p, s)
    check_pair(f"The rule of {rule.name}", "update", returned)
    if not isinstance(returned[1], tuple) or len(returned[1]) != len(state):
        raise TypeError(
            f"The rule of {rule.name} must return a state like the one it was given, with "
            f"{', '.join(getattr(state, '_fields', ())) or 'no fields'}, but it returned {returned[1]!r}"
        )
    return returned
