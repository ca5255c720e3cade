"""Adam-atan2: Adam without eps."""

from __future__ import annotations

import math
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
class ScaleByAdamAtan2State(NamedTuple):
    """The state of `scale_by_adam_atan2` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamAtan2Scalars(NamedTuple):
    """The numbers of Adam-atan2 at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        rate: sqrt(1 - beta2^t) / (1 - beta1^t).
        a: a.
        b: b.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    rate: Any
    a: Any
    b: Any


@factory
def scale_by_adam_atan2(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), a: Hyperparameter = 1.27, b: Hyperparameter = 1.0
) -> GradientTransformation:
    """Scale as Adam does, by an arc tangent in place of a quotient.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        g <- a atan2(m / (1 - beta1^t), b sqrt(v / (1 - beta2^t)))

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        a: scale, >= 0. With b = 1 and a = 1.27, about 4 / pi, a first step is 1, as Adam's.
        b: scale of the root, > 0. Where b is large, and a too, this is Adam.

    Raises:
        ValueError: a number is out of range.

    Updates do not depend on the scale of gradients, however small, and are a pi / 2 at most. Where v is zero the angle
    jumps with the sign of m; there, at m = v = 0 too, its derivative is zero.

    Source: Everett et al., Scaling exponents across parameterizations and optimizers, arXiv:2407.05872, section 4.3.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adam_atan2()
        >>> tx.update(torch.tensor([3e-20, -3.0, 0.0]), tx.init(torch.zeros(3)))[0].round(decimals=2)
        tensor([ 1., -1.,  0.])
    """
    check_betas(betas)
    check("a", a)
    check("b", b, "value > 0")

    def scalars(step: Tensor) -> AdamAtan2Scalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        rate = sqrt(debias(beta2, step)) / debias(beta1, step)
        return AdamAtan2Scalars(1 - beta1, beta2, 1 - beta2, rate, at(a, step), at(b, step))

    def update(g: Tensor, state: ScaleByAdamAtan2State, p: Tensor | None, s: AdamAtan2Scalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return s.a * _angle(s.rate * m, s.b * safe_sqrt(v)), ScaleByAdamAtan2State(m, v)

    return leafwise(ScaleByAdamAtan2State, update, scalars, elementwise=True)


def _angle(y: Tensor, x: Tensor) -> Tensor:
    """Compute atan2(y, x) for x >= 0. In forward mode torch's own has derivative NaN at zero."""
    upright = x == 0
    return torch.where(upright, torch.sign(y) * (math.pi / 2), torch.atan(y / x.masked_fill(upright, 1)))


@factory
def adam_atan2(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    weight_decay: Hyperparameter = 0.0,
    a: Hyperparameter = 1.27,
    b: Hyperparameter = 1.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adam-atan2: Adam without eps, whose steps do not depend on the scale of the loss.

        u = -lr (scale_by_adam_atan2(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adam_atan2`.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        a: see `scale_by_adam_atan2`.
        b: see `scale_by_adam_atan2`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Source: Everett et al., arXiv:2407.05872, section 4.3.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adam_atan2(lr=0.1)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0].round(decimals=3)
        tensor([-0.1000])
    """
    rule = scale_by_adam_atan2(betas, a, b)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)
