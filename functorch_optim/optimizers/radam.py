"""RAdam: Adam that begins with momentum alone, until its variance is reliable."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._rectified import rectification


@leaf_state
class ScaleByRAdamState(NamedTuple):
    """The state of `scale_by_radam` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class RAdamScalars(NamedTuple):
    """The numbers of RAdam at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        rectified: whether rho_t > 5.
        rate: 1 / (1 - beta1^t), times r_t sqrt(1 - beta2^t) where rectified.
        eps: eps.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    rectified: Any
    rate: Any
    eps: Any


@factory
def scale_by_radam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    """Scale as Adam does, rectified, once the mean of squares has enough gradients; until then use momentum alone.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        rho_inf = 2 / (1 - beta2) - 1
        rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
        r_t = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
        g <- m / (1 - beta1^t) r_t sqrt(1 - beta2^t) / (sqrt(v) + eps)  if rho_t > 5,  else  m / (1 - beta1^t)

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0. As in torch.optim, and unlike Adam's, it is not corrected.

    Raises:
        ValueError: a number is out of range.

    Differs from the paper as torch.optim.RAdam does: the threshold is 5, not 4. At the threshold the derivative with
    respect to beta2 does not exist, and the derivative of the branch that is taken is returned.

    Source: Liu et al., On the variance of the adaptive learning rate and beyond, arXiv:1908.03265, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_radam()
        >>> updates, state = tx.update(torch.full((1,), 3.0), tx.init(torch.ones(1)))
        >>> updates
        tensor([3.])
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> RAdamScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        rectified, r = rectification(beta2, step)
        rate = where(rectified, r * sqrt(debias(beta2, step)), 1.0) / debias(beta1, step)
        return RAdamScalars(1 - beta1, beta2, 1 - beta2, rectified, rate, at(eps, step))

    def update(g: Tensor, state: ScaleByRAdamState, p: Tensor | None, s: RAdamScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return s.rate * m / torch.where(s.rectified, safe_sqrt(v) + s.eps, 1), ScaleByRAdamState(m, v)

    return leafwise(ScaleByRAdamState, update, scalars, elementwise=True)


@factory
def radam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """RAdam: Adam that needs no warm-up.

        g <- g + weight_decay p
        u = -lr scale_by_radam(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_radam`.
        eps: see `scale_by_radam`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        decoupled_weight_decay: decay as `adamw` does: u = -lr (scale_by_radam(g) + weight_decay p).
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.RAdam. Source: Liu et al., arXiv:1908.03265, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.radam(lr=0.1)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_radam(betas, eps)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
