"""Weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functorch_optim._core.combine import masked
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, is_zero
from functorch_optim._core.transformation import GradientTransformation, factory, leafwise
from functorch_optim.tree import Tree


@factory
def add_decayed_weights(
    weight_decay: Hyperparameter = 0.0, mask: Tree | Callable[[Tree], Tree] | None = None
) -> GradientTransformation:
    """Add the decayed parameters to the updates: `g <- g + weight_decay p`.

    Before an optimizer's rule this is an L2 penalty, as in torch's Adam; between the rule and the learning rate it is
    decoupled weight decay, as in torch's AdamW (Loshchilov & Hutter, arXiv:1711.05101).

    Args:
        weight_decay: factor >= 0: number, 0-dim tensor, or schedule. The number 0 switches it off, and then `update`
            does not need the parameters.
        mask: True where a parameter decays: a tree of bools, a prefix of one, or a function of the parameters; see
            `masked`. None: everywhere.

    Raises:
        ValueError: the number is negative or NaN; or `update` is called without parameters.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.add_decayed_weights(0.1)
        >>> params = torch.tensor([1.0, -2.0])
        >>> tx.update(torch.zeros(2), tx.init(params), params)[0]
        tensor([ 0.1000, -0.2000])
    """
    check("weight_decay value", weight_decay)
    off = is_zero(weight_decay)

    def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
        return g if off else g + s * p, state

    decay = leafwise(
        None,
        update,
        lambda step: at(weight_decay, step),
        elementwise=True,
        needs_params=not off,
        sparse="touched" if off else None,
    )
    return decay if mask is None else masked(decay, mask)
