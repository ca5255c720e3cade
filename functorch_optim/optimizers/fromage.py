"""Fromage: steps in proportion to the norm of each tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import safe_norm, sqrt
from functorch_optim.optimizers._descent import uphill_or_down


@factory
def fromage(
    lr: Hyperparameter = 1e-2, *, min_norm: Hyperparameter = 1e-6, maximize: bool = False
) -> GradientTransformation:
    """Fromage: each tensor moves by lr times its norm, and is then shortened, so that norms do not grow.

        p <- (p - lr g max(|p|, min_norm) / max(|g|, min_norm)) / sqrt(1 + lr^2)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        min_norm: smallest norm, > 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    The authors' program steps by lr g where a norm is zero; with min_norm, as in optax, a zero parameter can begin.

    Source: Bernstein et al., On the distance between two neural networks and the stability of learning,
    arXiv:2002.03432, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.fromage(lr=0.75), torch.tensor([5.0])
        >>> tx.update(torch.tensor([2.0]), tx.init(params), params)[0]
        tensor([-4.])
    """
    check("learning rate", lr)
    check("min_norm", min_norm, "value > 0")

    def scalars(step: Any) -> tuple[Any, Any, Any]:
        rate = at(lr, step)
        shrunk = 1 / sqrt(1 + rate * rate)
        return rate * shrunk, 1 - shrunk, at(min_norm, step)

    def update(g: Tensor, state: Any, p: Any, s: tuple[Any, Any, Any]) -> Any:
        rate, shrinkage, least = s
        relative = torch.clamp_min(safe_norm(p), least) / torch.clamp_min(safe_norm(g), least)
        return -(rate * relative * g + shrinkage * p), state

    return uphill_or_down(
        of_rule(None, update, scalars, norms=True, needs_params=True, turns=True, lr=lr), maximize=maximize
    )
