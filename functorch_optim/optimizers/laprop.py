"""LaProp: Adam that divides first, and takes the mean after."""

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
class ScaleByLaPropState(NamedTuple):
    """The state of `scale_by_laprop` for one parameter.

    Attributes:
        exp_avg: m, running mean of normalized gradients: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class LaPropScalars(NamedTuple):
    """LaProp at a step: 1 - beta1, beta2, 1 - beta2; sqrt(1 - beta2^t), eps times it; 1 / (1 - beta1^t)."""

    weight1: Any
    beta2: Any
    weight2: Any
    root: Any
    eps: Any
    rate: Any


@factory
def scale_by_laprop(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-15
) -> GradientTransformation:
    """Take the mean of gradients that have been divided by the root of the mean of squares.

        v <- beta2 v + (1 - beta2) g^2
        m <- beta1 m + (1 - beta1) g / (sqrt(v / (1 - beta2^t)) + eps)
        g <- m / (1 - beta1^t)

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0.

    Raises:
        ValueError: a number is out of range.

    Source: Ziyin et al., LaProp: separating momentum and adaptivity in Adam, arXiv:2002.04839, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_laprop()
        >>> updates, state = tx.update(torch.tensor([3.0, -3.0]), tx.init(torch.zeros(2)))
        >>> updates.round(decimals=3), state.exp_avg.round(decimals=3)
        (tensor([ 1., -1.]), tensor([ 0.1000, -0.1000]))
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> LaPropScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        root = sqrt(debias(beta2, step))
        return LaPropScalars(1 - beta1, beta2, 1 - beta2, root, at(eps, step) * root, 1 / debias(beta1, step))

    def update(g: Tensor, state: ScaleByLaPropState, p: Tensor | None, s: LaPropScalars) -> Any:
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        m = torch.lerp(state.exp_avg, s.root * g / (safe_sqrt(v) + s.eps), s.weight1)
        return s.rate * m, ScaleByLaPropState(m, v)

    return leafwise(ScaleByLaPropState, update, scalars, elementwise=True)


@factory
def laprop(
    lr: Hyperparameter = 4e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-15,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """LaProp: Adam whose momentum does not depend on how its normalization changes.

        p <- (1 - lr weight_decay) (p - lr scale_by_laprop(g))

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_laprop`.
        eps: see `scale_by_laprop`.
        weight_decay: decoupled, after the step, as in the authors' code; >= 0. Unless it is the number 0, `update`
            needs the parameters.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    In the authors' code the learning rate is inside of the mean. The numbers differ from ours while it changes.

    Source: Ziyin et al., arXiv:2002.04839, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.laprop(lr=0.1)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0].round(decimals=3)
        tensor([-0.1000])
    """
    rule = scale_by_laprop(betas, eps)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled="after", maximize=maximize)
