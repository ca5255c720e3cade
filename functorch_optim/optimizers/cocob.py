"""COCOB: coin betting, without a learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, filled_like
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import or_one
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.decay import add_decayed_weights


@leaf_state
class COCOBState(NamedTuple):
    """The state of `cocob` for one parameter.

    Attributes:
        p0: the parameter at the start: like p.
        max_grad: L, largest |g| so far: like p.
        grad_norm_sum: G, sum of |g|: like p.
        reward: R, the sum won so far: like p.
        theta: C, sum of -g: like p.
    """

    p0: Tensor
    max_grad: Tensor
    grad_norm_sum: Tensor
    reward: Tensor
    theta: Tensor


@factory
def cocob(
    lr: Hyperparameter = 1.0,
    alpha: Hyperparameter = 100.0,
    eps: Hyperparameter = 1e-8,
    *,
    weight_decay: Hyperparameter = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """COCOB: each element bets a fraction of its winnings on its next gradient.

        g <- g + weight_decay p
        L <- max(L, |g|),  eps at first
        G <- G + |g|
        R <- max(R - g (p - p0), 0)
        C <- C - g
        u = lr (p0 + C / (L max(G + L, alpha L)) (L + R) - p)

    Args:
        lr: how far to go to the new parameters, >= 0; 1 is the algorithm: number, 0-dim tensor, or schedule.
        alpha: keeps the first bets small, >= 0; the larger, the smaller.
        eps: the first L, > 0.
        weight_decay: L2 penalty >= 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    The derivative at a tie of maxima is half of each. Source: Orabona & Tommasi, arXiv:1705.07795, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.cocob(alpha=10.0), torch.ones(1)
        >>> tx.update(torch.full((1,), 5.0), tx.init(params), params)[0]
        tensor([-0.1000])
    """
    check("learning rate", lr)
    check("alpha", alpha)
    check("epsilon value", eps, "value > 0", trees=False)

    def init(p: Tensor) -> COCOBState:
        zeros = [torch.zeros_like(p) for _ in range(3)]
        return COCOBState(p.clone(), filled_like(p, eps), *zeros)

    def scalars(step: Any) -> tuple[Any, Any]:
        return at(lr, step), at(alpha, step)

    def update(g: Tensor, state: COCOBState, p: Any, s: tuple[Any, Any]) -> Any:
        rate, a = s
        L = torch.maximum(state.max_grad, g.abs())  # noqa: N806
        G = state.grad_norm_sum + g.abs()  # noqa: N806
        reward = state.reward - g * (p - state.p0)
        R = torch.maximum(reward, torch.zeros_like(reward))  # noqa: N806
        C = state.theta - g  # noqa: N806
        new = state.p0 + C / or_one(L * torch.maximum(G + L, a * L)) * (L + R)  # zero where float16 rounds eps to zero
        return rate * (new - p), COCOBState(state.p0, L, G, R, C)

    rule = of_rule(init, update, scalars, elementwise=True, needs_params=True, turns=True)
    return uphill_or_down(add_decayed_weights(weight_decay), rule, maximize=maximize)
