"""Setting updates to zero: all of them, those of frozen parameters, those that are NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.combine import masked
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.tree import Tree


@factory
def set_to_zero() -> GradientTransformation:
    """Replace all updates by zeros, also NaN and inf.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.set_to_zero()
        >>> tx.update(torch.tensor([1.0, float("nan")]), tx.init(torch.ones(2)))[0]
        tensor([0., 0.])
    """
    return leafwise(None, lambda g, state, p, s: (torch.zeros_like(g), state), elementwise=True, sparse="touched")


@factory
def freeze(mask: Tree | Callable[[Tree], Tree]) -> GradientTransformation:
    """Set the updates of some parameters to zero, so that they stay as they are.

    Args:
        mask: True where a parameter is frozen: a tree of bools, a prefix of one, or a function of the parameters; see
            `masked`. Put it last in a chain.

    Raises:
        ValueError: the mask does not fit the parameters.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.chain(fo.sgd(0.1), fo.freeze({"body": True, "head": False}))
        >>> params = {"body": torch.ones(1), "head": torch.ones(1)}
        >>> tx.update(params, tx.init(params), params)[0]
        {'body': tensor([0.]), 'head': tensor([-0.1000])}
    """
    return masked(set_to_zero(), mask)


@factory
def zero_nans() -> GradientTransformation:
    """Replace NaN by zero: `g <- 0 where g is NaN`, with derivative zero there. Infinities stay.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.zero_nans()
        >>> tx.update(torch.tensor([1.0, float("nan"), float("inf")]), tx.init(torch.ones(3)))[0]
        tensor([1., 0., inf])
    """

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        return torch.where(torch.isnan(g), torch.zeros_like(g), g), state

    return leafwise(None, update, elementwise=True, sparse="touched")
