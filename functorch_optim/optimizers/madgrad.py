"""MADGRAD: dual averaging with the cube root of Adagrad's sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import or_one, safe_power, sqrt
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.decay import add_decayed_weights


@leaf_state
class MADGRADState(NamedTuple):
    """The state of `madgrad` for one parameter.

    Attributes:
        x0: the parameter at the start: like p.
        grad_sum: s, weighted sum of g: like p.
        grad_sum_sq: v, weighted sum of g^2: like p.
    """

    x0: Tensor
    grad_sum: Tensor
    grad_sum_sq: Tensor


class MADGRADScalars(NamedTuple):
    """The numbers of MADGRAD at a step: l, c, eps, and the factor of decay."""

    weight: Any
    c: Any
    eps: Any
    decay: Any


@factory
def madgrad(
    lr: Hyperparameter = 1e-2,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-6,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """MADGRAD: momentum towards the minimizer of all gradients so far, scaled by a cube root.

        g <- g + weight_decay p                          unless decoupled_weight_decay
        l = (lr + eps) sqrt(t)
        v <- v + l g^2
        s <- s + l g
        z = x0 - s / (cbrt(v) + eps)
        p <- momentum p + (1 - momentum) z
        p <- p - (lr + eps) weight_decay p_before        if decoupled_weight_decay

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: in [0, 1).
        weight_decay: L2 penalty >= 0, or decoupled.
        eps: added to the cube root and to lr, >= 0.
        decoupled_weight_decay: decay as `adamw` does. Where momentum is the number 0, x0 decays with p.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    Same numbers as the authors' madgrad. Derivatives are finite where v is zero.

    Source: Defazio & Jelassi, arXiv:2101.11075, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.madgrad(lr=1.0, momentum=0.0, eps=0.0), torch.ones(1)
        >>> tx.update(torch.full((1,), 8.0), tx.init(params), params)[0]
        tensor([-2.])
    """
    check("learning rate", lr)
    check("momentum value", momentum, "0 <= value < 1")
    check("weight_decay value", weight_decay)
    check("epsilon value", eps)
    decays = decoupled_weight_decay and not is_zero(weight_decay)

    def scalars(step: Any) -> MADGRADScalars:
        rate = at(lr, step) + at(eps, step)
        return MADGRADScalars(rate * sqrt(step), 1 - at(momentum, step), at(eps, step), rate * at(weight_decay, step))

    def update(g: Tensor, state: MADGRADState, p: Any, s: MADGRADScalars) -> Any:
        v = state.grad_sum_sq + s.weight * g * g
        total = state.grad_sum + s.weight * g
        root = safe_power(v, 1 / 3) + s.eps
        z = state.x0 - total / or_one(root)
        u, x0 = s.c * (z - p), state.x0
        if decays:
            u = u - s.decay * p
            x0 = x0 - s.decay * p if is_zero(momentum) else x0
        return u, MADGRADState(x0, total, v)

    rule = of_rule(_init, update, scalars, elementwise=True, needs_params=True, turns=True, decays=decays, lr=lr)
    decay = add_decayed_weights(0.0 if decoupled_weight_decay else weight_decay)
    return uphill_or_down(decay, rule, maximize=maximize)


def _init(p: Tensor) -> MADGRADState:
    return MADGRADState(p.clone(), torch.zeros_like(p), torch.zeros_like(p))
