"""Projected descent: parameters that stay in a set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from functorch_optim import tree
from functorch_optim._core.checks import check_has_params, check_updates
from functorch_optim._core.combine import chain
from functorch_optim._core.rule import EmptyState
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.tree import Tree
from functorch_optim.wrappers._wrapping import wrapped, wrapper


def project(tx: Any, projection: Callable[[Tree], Tree]) -> Any:
    """Keep the parameters in a set: project where an update leads.

        u = projection(p + tx(g)) - p

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        projection: function of the tree of parameters that returns the nearest tree in the set, such as
            `fo.projections.nonnegative` or `lambda params: fo.projections.l2_ball(params, 3.0)`. It sees all parameters
            that `tx` is for.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and an empty one.

    Raises:
        TypeError: `tx` is neither a transformation nor a factory; `projection` is no function; or it does not return
            tensors.
        ValueError: `update` is called without parameters; or the projection returns another tree, or other shapes.

    p + u is inside but for the rounding of this sum. A parameter without a gradient stays, and the projection sees it
    where it is. Derivatives are those of the projection.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.project(fo.sgd(1.0), lambda params: fo.tree.map(lambda p: p.clamp(0.0, 1.0), params))
        >>> params = torch.tensor([0.5, 0.5])
        >>> fo.step(tx, torch.tensor([2.0, 0.25]), tx.init(params), params)[0]
        tensor([0.0000, 0.2500])
    """
    if not callable(projection):
        raise TypeError(
            f"project needs a function of the tree of parameters, got a {type(projection).__name__}; write "
            "project(sgd(0.1), lambda params: tree.map(lambda p: p.clamp(0, 1), params))"
        )
    return wrapped(tx, _project, "project(sgd(0.1), projection)", projection=projection)


@wrapper
def _project(tx: GradientTransformation, projection: Callable[[Tree], Tree]) -> GradientTransformation:
    def update(updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        check_has_params("project", params)
        moved = tree.map(lambda p, u: p if u is None else p + u, params, updates)
        inside = projection(moved)
        leaves, structure = tree.flatten(params)
        found = tree.flatten_up_to(structure, inside, "the projection", params, "params")
        check_updates(found, leaves, lambda i: tree.paths(params)[i], "the projection")
        return tree.map(lambda u, p, q: q - p, updates, params, inside), state

    return chain(tx, GradientTransformation(lambda params: EmptyState(), update))
