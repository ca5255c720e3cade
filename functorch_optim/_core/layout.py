"""How the states of links nest for users: an index for a link, a tuple for a chain, a dict for named parts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any


def nest(layout: Any, states: Sequence[Any]) -> Any:
    """Arrange the states of links as users see them."""
    if isinstance(layout, int):
        return states[layout]
    if isinstance(layout, tuple):
        return tuple([nest(part, states) for part in layout])
    return {name: nest(part, states) for name, part in layout.items()}


def unnest(layout: Any, state: Any, path: str = "state") -> list[Any]:
    """List the states of links in order.

    Raises:
        ValueError: the state is arranged differently.
    """
    if isinstance(layout, int):
        return [state]
    names = list(range(len(layout))) if isinstance(layout, tuple) else list(layout)
    if type(state) is not type(layout) or set(range(len(state)) if isinstance(state, tuple) else state) != set(names):
        expected = f"a tuple of {len(names)}" if isinstance(layout, tuple) else f"a dict with the keys {names}"
        raise ValueError(
            f"{path} should be {expected}, but it is {_describe(state)}: it belongs to another transformation. "
            "Make it with the init of the transformation whose update is called: state = tx.init(params)"
        )
    return [found for name in names for found in unnest(layout[name], state[name], f"{path}[{name!r}]")]


def _describe(state: Any) -> str:
    if type(state) is tuple:
        return f"a tuple of {len(state)}"
    return f"a dict with the keys {list(state)}" if type(state) is dict else f"a {type(state).__name__}"


def shift(layout: Any, by: int) -> Any:
    """Renumber the links in a layout."""
    if isinstance(layout, int):
        return layout + by
    if isinstance(layout, tuple):
        return tuple([shift(part, by) for part in layout])
    return {name: shift(part, by) for name, part in layout.items()}


def numbered(field: str, counts: Counter[str]) -> str:
    """Name a field of one parameter's state: the second momentum_buffer is momentum_buffer.1.

    Args:
        field: the name in the state of its rule.
        counts: how often it has come already.
    """
    counts[field] += 1
    return field if counts[field] == 1 else f"{field}.{counts[field] - 1}"
