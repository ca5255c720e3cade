"""Adamax: Adam with the infinity norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias
from functorch_optim.optimizers._descent import descent


@leaf_state
class ScaleByAdamaxState(NamedTuple):
    """The state of `scale_by_adamax` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_inf: u, decaying maximum of |g|: like p.
    """

    exp_avg: Tensor
    exp_inf: Tensor


class AdamaxScalars(NamedTuple):
    """The numbers of Adamax at a step: 1 - beta1, beta2, 1 / (1 - beta1^t), eps."""

    weight1: Any
    beta2: Any
    rate: Any
    eps: Any


@factory
def scale_by_adamax(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    """Divide the mean of gradients by a decaying maximum of their absolute values.

        m <- beta1 m + (1 - beta1) g
        u <- max(beta2 u, |g| + eps)
        g <- m / (1 - beta1^t) / u

    Args:
        betas: decay rates of m and of u, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to |g|, >= 0. The paper has none; torch.optim has it.

    Raises:
        ValueError: a number is out of range.

    At a tie in the maximum each argument has half of the derivative, as in torch.maximum; the derivative of |g| at
    g = 0 is zero.

    Source: Kingma & Ba, arXiv:1412.6980, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adamax()
        >>> updates, state = tx.update(torch.tensor([3.0, -3.0]), tx.init(torch.zeros(2)))
        >>> updates, state.exp_inf
        (tensor([ 1., -1.]), tensor([3., 3.]))
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> AdamaxScalars:
        beta1 = at(betas[0], step)
        return AdamaxScalars(1 - beta1, at(betas[1], step), 1 / debias(beta1, step), at(eps, step))

    def update(g: Tensor, state: ScaleByAdamaxState, p: Tensor | None, s: AdamaxScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        u = torch.maximum(s.beta2 * state.exp_inf, torch.abs(g) + s.eps)
        return s.rate * m / u, ScaleByAdamaxState(m, u)

    return leafwise(ScaleByAdamaxState, update, scalars, elementwise=True)


@factory
def adamax(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adamax: Adam with the infinity norm in place of the root of the mean of squares.

        g <- g + weight_decay p
        u = -lr scale_by_adamax(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adamax`.
        eps: see `scale_by_adamax`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.Adamax. Source: Kingma & Ba, arXiv:1412.6980, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adamax(lr=0.1)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.1000])}
    """
    return descent(scale_by_adamax(betas, eps), lr=lr, weight_decay=weight_decay, maximize=maximize)
