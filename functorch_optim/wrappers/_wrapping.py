"""What all wrappers share: they take factories as well as transformations."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from functorch_optim._core.links import Link, shift
from functorch_optim._core.transformation import GradientTransformation, check_transformation


def wrapped(tx: Any, wrap: Callable[[GradientTransformation], GradientTransformation], example: str) -> Any:
    """Wrap a transformation; or a factory, as a factory of the same hyperparameters.

    Args:
        tx: transformation, or function that makes one.
        wrap: wraps a transformation.
        example: a call that would be right.
    """
    if isinstance(tx, GradientTransformation):
        return wrap(tx)
    if not callable(tx) or inspect.isclass(tx):
        check_transformation(tx, example)

    @functools.wraps(tx)
    def factory(*args: Any, **kwargs: Any) -> GradientTransformation:
        made = tx(*args, **kwargs)
        check_transformation(made, example)
        return wrap(made)

    return factory


def around(
    tx: GradientTransformation, before: GradientTransformation | None, after: GradientTransformation | None
) -> GradientTransformation:
    """Put the rule of a wrapper before a transformation, as a gate, or after it, as the holder of its parameters.

    Returns:
        Transformation whose state is a tuple of those of its parts, in their order.
    """
    links: list[Link] = list(before._links if before is not None else ())
    count = len(tx._links)
    for k, link in enumerate(tx._links):
        when = link.when if before is None else (*link.when, k + 1)
        inside = link.inside if after is None or link.inside else count - k
        links.append(link._replace(when=when, inside=inside))
    # The learning rate of what is wrapped may be a number that it keeps.
    keepers = tuple([count - k for k, link in enumerate(tx._links) if link.rule.keeps is not None])
    links += [link._replace(reads=keepers) for link in after._links] if after is not None else []
    layout = (tx._layout, count) if before is None else (0, shift(tx._layout, 1))
    return GradientTransformation._of(links, layout)
