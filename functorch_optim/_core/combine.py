"""Combining transformations: in a row, by name, and by parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from functorch_optim._core.links import Link, Selection, shift, with_rates
from functorch_optim._core.transformation import GradientTransformation, check_transformation, factory
from functorch_optim.tree import Tree


@factory
def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Run transformations one after the other, as one.

    Rules that stand next to each other, in nested chains too, are run in a single pass over the leaves.

    Args:
        *transformations: the first is given the gradients. None at all is the identity.

    Returns:
        Transformation whose state is a tuple of the states of `transformations`.

    Raises:
        TypeError: an argument is no transformation.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(lr=0.1))
        >>> params = {"w": torch.tensor([1.0, 1.0])}
        >>> updates, state = tx.update({"w": torch.tensor([30.0, 40.0])}, tx.init(params), params)
        >>> updates
        {'w': tensor([-0.0600, -0.0800])}
    """
    return _combined(dict(enumerate(transformations)), "chain(clip(1.0), sgd(0.1))", tuple)


@factory
def named_chain(
    *transformations: tuple[str, GradientTransformation], **named: GradientTransformation
) -> GradientTransformation:
    """Run transformations one after the other, and name their states.

    Args:
        *transformations: pairs of name and transformation.
        **named: further ones, by keyword.

    Returns:
        Transformation whose state is a dict of the states, by name.

    Raises:
        ValueError: a name is given twice.
        TypeError: an argument is not a pair of name and transformation.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.named_chain(momentum=fo.trace(0.9), lr=fo.scale_by_learning_rate(0.1))
        >>> tx.init(torch.zeros(2))["momentum"].momentum_buffer
        tensor([0., 0.])
    """
    parts: dict[Any, Any] = {}
    for pair in (*transformations, *named.items()):
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                f"named_chain takes pairs of name and transformation, got {pair!r}; "
                "write named_chain(('clip', clip(1.0)), ('sgd', sgd(0.1))) or named_chain(clip=clip(1.0), sgd=sgd(0.1))"
            )
        if pair[0] in parts:
            raise ValueError(f"The name {pair[0]!r} is given twice; the links of a chain need names of their own")
        parts[pair[0]] = pair[1]
    return _combined(parts, "named_chain(clip=clip(1.0), sgd=sgd(0.1))")


@factory
def masked(transformation: GradientTransformation, mask: Tree | Callable[[Tree], Tree]) -> GradientTransformation:
    """Run a transformation on some of the parameters; the updates of the others pass through unchanged.

    Unchanged means that a raw gradient stays one: to keep parameters still use `freeze`, and to treat them otherwise
    use `partition`.

    Args:
        transformation: runs where the mask is True. Reductions such as a global norm see only those leaves.
        mask: tree of bools built like the parameters, or a prefix of such a tree; or a function of the parameters
            that returns one. The function must look at shapes and structure only; it sees the updates where `update`
            is called without parameters.

    Returns:
        Transformation whose state is that of `transformation`, with `MaskedNode()` where the mask is False.

    Raises:
        ValueError: the mask does not fit the parameters.

    Example:
        No weight decay for biases:

        >>> import functorch_optim as fo, torch
        >>> def matrices(params):
        ...     return fo.tree.map(lambda p: p.ndim > 1, params)
        >>> tx = fo.masked(fo.add_decayed_weights(0.5), matrices)
        >>> params = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> grads = {"weight": torch.ones(1, 1), "bias": torch.ones(1)}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'weight': tensor([[1.5000]]), 'bias': tensor([1.])}
    """
    check_transformation(transformation, "masked(sgd(0.1), mask)")
    selection = Selection(mask, True, (True, False))
    return GradientTransformation._of(_restricted(transformation, selection), transformation._layout)


@factory
def partition(
    transformations: Mapping[Any, GradientTransformation], labels: Tree | Callable[[Tree], Tree]
) -> GradientTransformation:
    """Give each parameter the transformation that its label names.

    Args:
        transformations: label -> transformation. Reductions such as a global norm see the leaves of their label only.
        labels: tree of labels built like the parameters, or a prefix of such a tree; or a function of the parameters
            that returns one. The function must look at shapes and structure only.

    Returns:
        Transformation whose state is a dict: label -> state.

    Raises:
        ValueError: the labels do not fit the parameters, or one is not in `transformations`.
        TypeError: `transformations` is no dict of transformations.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.partition({"body": fo.adam(1e-3), "head": fo.sgd(0.5)}, {"encoder": "body", "head": "head"})
        >>> params = {"encoder": {"w": torch.zeros(1), "b": torch.zeros(1)}, "head": torch.zeros(1)}
        >>> updates, state = tx.update(fo.tree.map(torch.ones_like, params), tx.init(params), params)
        >>> updates["head"], updates["encoder"]["w"]
        (tensor([-0.5000]), tensor([-0.0010]))
    """
    if not isinstance(transformations, Mapping):
        raise TypeError(
            f"partition needs a dict, label -> transformation, got a {type(transformations).__name__}; "
            "write partition({'a': sgd(0.1), 'b': adam()}, labels)"
        )
    known = tuple(transformations)
    parts = {}
    for label, transformation in transformations.items():
        check_transformation(transformation, "partition({'a': sgd(0.1), 'b': adam()}, labels)")
        restricted = _restricted(transformation, Selection(labels, label, known))
        parts[label] = GradientTransformation._of(restricted, transformation._layout)
    return _combined(parts, "")


def _restricted(transformation: GradientTransformation, selection: Selection) -> tuple[Link, ...]:
    return tuple([link._replace(where=(selection, *link.where)) for link in transformation._links])


def _combined(
    parts: Mapping[Any, GradientTransformation], example: str, container: type = dict
) -> GradientTransformation:
    links: list[Link] = []
    layout = {}
    for name, part in parts.items():
        check_transformation(part, example)
        layout[name] = shift(part._layout, len(links))
        links += part._links
    return GradientTransformation._of(with_rates(links), tuple(layout.values()) if container is tuple else layout)
