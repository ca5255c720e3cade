"""Yogi: Adam whose mean of squares moves by bounded steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, filled_like
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import descent


@leaf_state
class ScaleByYogiState(NamedTuple):
    """The state of `scale_by_yogi` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, estimate of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class YogiScalars(NamedTuple):
    """The numbers of Yogi at a step: 1 - beta1, 1 - beta2; rate and eps as in Adam."""

    weight1: Any
    weight2: Any
    rate: Any
    eps: Any


@factory
def scale_by_yogi(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-3,
    initial_accumulator_value: Hyperparameter = 1e-6,
) -> GradientTransformation:
    """Scale as Adam does, with an estimate of squares that moves towards them by steps of their own size.

        m <- beta1 m + (1 - beta1) g
        v <- v - (1 - beta2) sign(v - g^2) g^2
        g <- m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0.
        initial_accumulator_value: first value of m and v, >= 0.

    Raises:
        ValueError: a number is out of range.
        TypeError: the initial value is a tree.

    At v = g^2 nothing changes. The sign has derivative zero; the derivative of v is that of the branch that is taken.

    Source: Zaheer et al., Adaptive methods for nonconvex optimization, NeurIPS 2018, algorithm 2. As in optax and
    torch_optimizer, m begins where v does, and both are corrected as if they began at zero.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_yogi(initial_accumulator_value=0.0)
        >>> updates, state = tx.update(torch.tensor([3.0, -3.0]), tx.init(torch.zeros(2)))
        >>> updates.round(decimals=3), state.exp_avg_sq.round(decimals=3)
        (tensor([ 1., -1.]), tensor([0.0090, 0.0090]))
    """
    check_betas(betas)
    check("epsilon value", eps)
    check("initial_accumulator_value", initial_accumulator_value)

    def init(p: Tensor) -> ScaleByYogiState:
        return ScaleByYogiState(*[filled_like(p, initial_accumulator_value) for _ in range(2)])

    def scalars(step: Tensor) -> YogiScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        root = sqrt(debias(beta2, step))
        return YogiScalars(1 - beta1, 1 - beta2, root / debias(beta1, step), at(eps, step) * root)

    def update(g: Tensor, state: ScaleByYogiState, p: Tensor | None, s: YogiScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = state.exp_avg_sq - s.weight2 * torch.sign(state.exp_avg_sq - g * g) * g * g
        return s.rate * m / (safe_sqrt(v) + s.eps), ScaleByYogiState(m, v)

    return leafwise(init, update, scalars, elementwise=True)


@factory
def yogi(
    lr: Hyperparameter = 1e-2,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Hyperparameter = 1e-6,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Yogi: Adam that forgets large gradients slowly.

        g <- g + weight_decay p
        u = -lr scale_by_yogi(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_yogi`.
        eps: see `scale_by_yogi`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        initial_accumulator_value: see `scale_by_yogi`.
        decoupled_weight_decay: decay as `adamw` does: u = -lr (scale_by_yogi(g) + weight_decay p).
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.
        TypeError: the initial value is a tree.

    Same numbers as optax.yogi with the same eps. Source: Zaheer et al., NeurIPS 2018, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.yogi(lr=0.1)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0].round(decimals=3)
        tensor([-0.1000])
    """
    rule = scale_by_yogi(betas, eps, initial_accumulator_value)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
