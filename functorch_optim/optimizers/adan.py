"""Adan: Adam with Nesterov momentum from differences of gradients."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_each
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import descent


@leaf_state
class ScaleByAdanState(NamedTuple):
    """The state of `scale_by_adan` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_diff: D, running mean of d: like p.
        exp_avg_sq: n, running mean of (g + beta2 d)^2: like p.
        pre_grad: the last g: like p.
    """

    exp_avg: Tensor
    exp_avg_diff: Tensor
    exp_avg_sq: Tensor
    pre_grad: Tensor


class AdanScalars(NamedTuple):
    """The numbers of Adan at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        beta3: beta3.
        weight3: 1 - beta3.
        known: whether there is a last gradient: 0 at t = 1, then 1.
        rate: root / (1 - beta1^t), where root = sqrt(1 - beta3^t).
        ahead: beta2 root / (1 - beta2^t).
        eps: eps root.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    beta3: Any
    weight3: Any
    known: Any
    rate: Any
    ahead: Any
    eps: Any


@factory
def scale_by_adan(
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.98, 0.92, 0.99), eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    """Scale as Adam does, and look ahead along the mean difference between gradients.

        d = g - last g,  0 at t = 1
        m <- beta1 m + (1 - beta1) g
        D <- beta2 D + (1 - beta2) d
        n <- beta3 n + (1 - beta3) (g + beta2 d)^2
        g <- (m / (1 - beta1^t) + beta2 D / (1 - beta2^t)) / (sqrt(n / (1 - beta3^t)) + eps)

    Args:
        betas: decay rates of m, of D and of n, in [0, 1): numbers, 0-dim tensors, or schedules. The betas of the paper
            are 1 minus these; its code has these.
        eps: added to the root, >= 0.

    Raises:
        ValueError: a number is out of range.

    Source: Xie et al., Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models, arXiv:2208.06677,
    algorithm 1, with the bias corrections of the authors' code.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adan()
        >>> updates, state = tx.update(torch.tensor([3.0, -3.0]), tx.init(torch.zeros(2)))
        >>> updates.round(decimals=3), state.pre_grad
        (tensor([ 1., -1.]), tensor([ 3., -3.]))
    """
    check_each("betas", betas, ("0 <= value < 1",) * 3, "(0.98, 0.92, 0.99)", "beta parameter")
    check("epsilon value", eps)

    def scalars(step: Tensor) -> AdanScalars:
        beta1, beta2, beta3 = [at(beta, step) for beta in betas]
        root = sqrt(debias(beta3, step))
        return AdanScalars(
            weight1=1 - beta1,
            beta2=beta2,
            weight2=1 - beta2,
            beta3=beta3,
            weight3=1 - beta3,
            known=where(step == 1, 0.0, 1.0),
            rate=root / debias(beta1, step),
            ahead=beta2 * root / debias(beta2, step),
            eps=at(eps, step) * root,
        )

    def update(g: Tensor, state: ScaleByAdanState, p: Tensor | None, s: AdanScalars) -> Any:
        d = s.known * (g - state.pre_grad)
        m = torch.lerp(state.exp_avg, g, s.weight1)
        mean_d = torch.lerp(state.exp_avg_diff, d, s.weight2)
        ahead = g + s.beta2 * d
        n = s.beta3 * state.exp_avg_sq + s.weight3 * ahead * ahead
        return (s.rate * m + s.ahead * mean_d) / (safe_sqrt(n) + s.eps), ScaleByAdanState(m, mean_d, n, g)

    return leafwise(ScaleByAdanState, update, scalars, elementwise=True)


@factory
def adan(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.98, 0.92, 0.99),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    proximal: bool = True,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adan: Adam with Nesterov momentum, which takes larger learning rates.

        p <- (p - lr scale_by_adan(g)) / (1 + lr weight_decay)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule. Five to ten times larger than Adam's is usual.
        betas: see `scale_by_adan`.
        eps: see `scale_by_adan`.
        weight_decay: factor >= 0. Unless it is the number 0, `update` needs the parameters.
        proximal: decay as above. If False, as `adamw` does: u = -lr (scale_by_adan(g) + weight_decay p), which the
            authors' code calls `no_prox`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Same numbers as the authors' code, timm and pytorch_optimizer. optax.adan 0.2.8 mixes differences with 1 - beta2
    where the paper has beta2. The authors' clipping of the global norm is `chain(clip_by_global_norm(c), adan(...))`.

    Source: Xie et al., arXiv:2208.06677, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.adan(lr=0.1, weight_decay=2.5), torch.ones(1)
        >>> updates, state = tx.update(torch.tensor([3.0]), tx.init(params), params)
        >>> fo.apply_updates(params, updates)  # (1 - 0.1) / 1.25
        tensor([0.7200])
    """
    decoupled: bool | Literal["proximal"] = "proximal" if proximal else True
    return descent(scale_by_adan(betas, eps), lr=lr, weight_decay=weight_decay, decoupled=decoupled, maximize=maximize)
