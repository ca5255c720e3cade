"""AdaNorm: Adam whose small gradients are lengthened to their mean norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim._numerics import debias, safe_norm, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import check_real, descent


@leaf_state
class ScaleByAdaNormState(NamedTuple):
    """The state of `scale_by_adanorm` for one parameter.

    Attributes:
        exp_avg: m, running mean of lengthened g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
        exp_grad_norm: n, running mean of |g|: 0-dim, float32 at least.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_grad_norm: Tensor


class AdaNormScalars(NamedTuple):
    """The numbers of AdaNorm at a step: 1 - beta1, beta2, 1 - beta2; sqrt(1 - beta2^t) / (1 - beta1^t); eps; 1 - r."""

    weight1: Any
    beta2: Any
    weight2: Any
    rate: Any
    eps: Any
    weight: Any


@factory
def scale_by_adanorm(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99), eps: Hyperparameter = 1e-8, r: Hyperparameter = 0.95
) -> GradientTransformation:
    """Scale as Adam does, with gradients that are at least as long as they were in the mean.

        n <- r n + (1 - r) |g|
        G = g max(1, n / |g|)
        m <- beta1 m + (1 - beta1) G
        v <- beta2 v + (1 - beta2) g^2
        g <- sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

    |g| is the norm of each tensor.

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0. It is not corrected, as in the authors' code.
        r: decay rate of n, in [0, 1).

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    Derivatives flow through |g| and n where G is longer than g. Where |g| is zero, G is too, and its derivative is that
    of g.

    Source: Dubey et al., AdaNorm: adaptive gradient norm correction based optimizer for CNNs, arXiv:2210.06364,
    algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adanorm(r=0.5)
        >>> _, state = tx.update(torch.tensor([3.0, 4.0]), tx.init(torch.zeros(2)))
        >>> state.exp_grad_norm
        tensor(2.5000)
    """
    check_betas(betas)
    check("epsilon value", eps)
    check("r", r, "0 <= value < 1")

    def init(p: Tensor) -> ScaleByAdaNormState:
        check_real("AdaNorm", p)
        return ScaleByAdaNormState(torch.zeros_like(p), torch.zeros_like(p), p.new_zeros((), dtype=common_dtype([p])))

    def scalars(step: Tensor) -> AdaNormScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        rate = sqrt(debias(beta2, step)) / debias(beta1, step)
        return AdaNormScalars(1 - beta1, beta2, 1 - beta2, rate, at(eps, step), 1 - at(r, step))

    def update(g: Tensor, state: ScaleByAdaNormState, p: Tensor | None, s: AdaNormScalars) -> Any:
        norm = safe_norm(g)
        n = torch.lerp(state.exp_grad_norm, norm, s.weight)
        short = (norm > 0) & (n > norm)
        m = torch.lerp(state.exp_avg, g * torch.where(short, n / torch.where(short, norm, 1.0), 1.0), s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return s.rate * m / (safe_sqrt(v) + s.eps), ScaleByAdaNormState(m, v, n)

    return leafwise(init, update, scalars, norms=True)


@factory
def adanorm(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    r: Hyperparameter = 0.95,
    *,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
) -> GradientTransformation:
    """AdaNorm: Adam that goes on where gradients become short.

        u = -lr (scale_by_adanorm(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adanorm`.
        eps: see `scale_by_adanorm`.
        weight_decay: factor >= 0. Unless it is the number 0, `update` needs the parameters.
        r: see `scale_by_adanorm`.
        decoupled_weight_decay: decay as above; if False, weight_decay p is added to the gradient.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    Same numbers as pytorch_optimizer's AdaNorm. Source: Dubey et al.,
    arXiv:2210.06364, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adanorm(lr=0.1)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0]
        tensor([-0.1000])
    """
    rule = scale_by_adanorm(betas, eps, r)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
