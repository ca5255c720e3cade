"""The base of all wrappers: they take factories as well as transformations."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import HALF
from functorch_optim._core.links import Link, shift
from functorch_optim._core.recorded import written_call
from functorch_optim._core.rule import TreeRule
from functorch_optim._core.transformation import GradientTransformation, check_transformation, factory
from functorch_optim._execution.representation import widened


def wrapper(function: Callable[..., GradientTransformation]) -> Callable[..., GradientTransformation]:
    """Make a factory of a function that wraps a transformation; the rules that it adds bear its name in messages."""
    name = function.__name__.removeprefix("_")

    @factory
    @functools.wraps(function)
    def wrap(tx: GradientTransformation, *args: Any, **options: Any) -> GradientTransformation:
        made, inside = function(tx, *args, **options), [link.rule.update for link in tx._links]
        links = [
            link if any([link.rule.update is one for one in inside]) else _named(link, name)  # noqa: C419
            for link in made._links
        ]
        return GradientTransformation._of(links, made._layout)

    return wrap


def _named(link: Link, name: str) -> Link:
    return link._replace(rule=replace(link.rule, wrapper=name))


def wrapped(tx: Any, wrap: Callable[..., GradientTransformation], example: str, **options: Any) -> Any:
    """Wrap a transformation; or a factory, as a factory of the same hyperparameters.

    Args:
        tx: transformation, or function that makes one.
        wrap: function of a transformation and the options, made by `wrapper`.
        example: a call that would be right.
        **options: of the wrapper, under the names that users give them.
    """
    if isinstance(tx, GradientTransformation):
        return wrap(tx, **options)
    if not callable(tx) or inspect.isclass(tx):
        check_transformation(tx, example)
    return WrappedFactory(tx, wrap, example, options)


class WrappedFactory:
    """A factory whose transformations are wrapped; its name and signature are those of the factory inside."""

    def __init__(
        self,
        function: Callable[..., GradientTransformation],
        wrap: Callable[..., GradientTransformation],
        example: str,
        options: dict[str, Any],
    ) -> None:
        functools.update_wrapper(self, function)
        self._arguments = function, wrap, example, options

    def __repr__(self) -> str:
        function, wrap, _, options = self._arguments
        return written_call(wrap, (function,), options)

    def __reduce__(self) -> tuple[Any, ...]:
        return WrappedFactory, self._arguments

    def __call__(self, *args: Any, **kwargs: Any) -> GradientTransformation:
        """Make a transformation and wrap it."""
        function, wrap, example, options = self._arguments
        made = function(*args, **kwargs)
        check_transformation(made, example)
        return wrap(made, **options)


def around(
    tx: GradientTransformation,
    before: GradientTransformation | None,
    after: GradientTransformation | None,
    *,
    widens: bool = False,
) -> GradientTransformation:
    """Put the rule of a wrapper before a transformation, as a gate, or after it, where it sees the update.

    Args:
        tx: transformation.
        before: the gate.
        after: the rule that sees the update.
        widens: whether updates in half precision are float32 inside, and after it.

    Returns:
        Transformation whose state is a tuple of those of its parts, in their order.

    Raises:
        ValueError: `after` hands parameters inside, to a wrapper that rounds.
    """
    links: list[Link] = list(before._links if before is not None else ())
    count = len(tx._links)
    hands = after is not None and after._links[0].rule.hands is not None
    gates = _gates(tx, hands) if after is not None else frozenset()
    for k, link in enumerate(tx._links):
        if hands and link.rule.of_dtype is not None:
            raise ValueError(f"{link.rule.name} rounds the parameters, so it goes around other wrappers, not inside")
        when = link.when if before is None else (*link.when, k + 1)
        handed = hands and not link.inside and _passes(link, k, gates)
        rule = _wide(link.rule) if (widens or handed) and isinstance(link.rule, TreeRule) else link.rule
        links.append(link._replace(rule=rule, when=when, inside=count - k if handed else link.inside))
    # The learning rate of the wrapped transformation may be a number that it keeps.
    keepers = tuple([count - k for k, link in enumerate(tx._links) if link.rule.keeps is not None])
    when = tuple([count - gate for gate in sorted(gates)])
    back = count if widens else None
    if after is not None:
        links += [link._replace(when=when, reads=keepers, widens=back) for link in after._links]
    layout = (tx._layout, count) if before is None else (0, shift(tx._layout, 1))
    return GradientTransformation._of(links, layout)


def _wide(rule: TreeRule) -> TreeRule:
    """Let a function of the whole tree begin with float32, as the updates and parameters that it is given are."""
    return replace(rule, init=lambda params: rule.init(tree.map(widened, params)))


def _gates(tx: GradientTransformation, hands: bool) -> frozenset[int]:
    """Find the gates that leave out all that moves the parameters: later links then stand still too.

    A wrapper that hands parameters inside must run where they are needed.
    """
    last = len(tx._links) - 1
    whole = [back for link in tx._links[-1:] for back in link.when if not tx._links[last - back].where]
    gates = frozenset([last - back for back in whole])
    outside = [link for k, link in enumerate(tx._links) if not _passes(link, k, gates)]
    return frozenset() if hands and any(link.needs_params for link in outside) else gates


def _passes(link: Link, k: int, gates: frozenset[int]) -> bool:
    return gates.issubset([k - back for back in link.when])


def copied(p: Tensor) -> Tensor:
    """Copy a parameter for a state: in float32 where it is in half precision, for that forgets small changes."""
    return p.to(torch.float32) if p.dtype in HALF else p.clone()


def inserted(tx: GradientTransformation, at: int, link: Link) -> GradientTransformation:
    """Put a link without a state of its own before link `at` of a transformation, or after the last one.

    Returns:
        Transformation in whose state that of the link before, or the first, is a pair, with the state of the new link.
    """
    neighbour = max(at - 1, 0)

    def moved(k: int, old: Link) -> Link:
        """Count distances to other links over the new one."""

        def back(by: int) -> int:
            return by + (k - by < at <= k)

        recalls, widens = (None if by is None else back(by) for by in (old.recalls, old.widens))
        inside = old.inside + (k < at <= k + old.inside) if old.inside else 0
        when, reads = tuple(map(back, old.when)), tuple(map(back, old.reads))
        return old._replace(when=when, reads=reads, inside=inside, recalls=recalls, widens=widens)

    def placed(layout: Any) -> Any:
        if isinstance(layout, int):
            return (neighbour, neighbour + 1) if layout == neighbour else layout + (layout >= at)
        if isinstance(layout, tuple):
            return tuple([placed(part) for part in layout])
        return {name: placed(part) for name, part in layout.items()}

    links = [moved(k, old) for k, old in enumerate(tx._links)]
    return GradientTransformation._of([*links[:at], link, *links[at:]], placed(tx._layout))
