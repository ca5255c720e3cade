"""Grams: the size of Adam's step, in the direction of the gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import descent


@leaf_state
class ScaleByGramsState(NamedTuple):
    """The state of `scale_by_grams` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class GramsScalars(NamedTuple):
    """The numbers of Grams at a step: 1 - beta1, beta2, 1 - beta2; sqrt(1 - beta2^t) / (1 - beta1^t); eps."""

    weight1: Any
    beta2: Any
    weight2: Any
    rate: Any
    eps: Any


@factory
def scale_by_grams(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-6
) -> GradientTransformation:
    """Scale as Adam does, and give each element the sign of its gradient.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        g <- sqrt(1 - beta2^t) / (1 - beta1^t) sign(g) |m| / (sqrt(v) + eps)

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0. It is not corrected, as in the authors' code.

    Raises:
        ValueError: a number is out of range.

    The signs have derivative zero. Where g and m are both zero, the derivative is Adam's, as if they had one sign.

    Source: Cao et al., Grams: gradient descent with adaptive momentum scaling, arXiv:2412.17107, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_grams()
        >>> _, state = tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))
        >>> tx.update(torch.tensor([-1.0]), state)[0].round(decimals=3)
        tensor([-0.4000])
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> GramsScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        rate = sqrt(debias(beta2, step)) / debias(beta1, step)
        return GramsScalars(1 - beta1, beta2, 1 - beta2, rate, at(eps, step))

    def update(g: Tensor, state: ScaleByGramsState, p: Tensor | None, s: GramsScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        # sign(g) |m|, whose derivative is right where both are zero.
        turned = torch.where(g == m, 1, torch.sign(g) * torch.sign(m)) * m
        return s.rate * turned / (safe_sqrt(v) + s.eps), ScaleByGramsState(m, v)

    return leafwise(ScaleByGramsState, update, scalars, elementwise=True)


@factory
def grams(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Grams: AdamW whose momentum says how far to go, and never where.

        u = -lr (scale_by_grams(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_grams`.
        eps: see `scale_by_grams`.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Same numbers as the authors' code. Source: Cao et al., arXiv:2412.17107, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.grams(lr=0.1)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0].round(decimals=3)
        tensor([-0.1000])
    """
    rule = scale_by_grams(betas, eps)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)
