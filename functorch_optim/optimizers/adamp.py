"""AdamP and SGDP: the part of a step along the weights is left out where the weights are scale-invariant."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, or_one, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import check_real, uphill_or_down


@leaf_state
class AdamPState(NamedTuple):
    """The state of `adamp` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


@leaf_state
class SGDPState(NamedTuple):
    """The state of `sgdp` for one parameter.

    Attributes:
        momentum_buffer: b, momentum: like p.
    """

    momentum_buffer: Tensor


class Projection(NamedTuple):
    """The numbers of the projection at a step."""

    delta: Any
    wd_ratio: Any
    eps: Any


class AdamPScalars(NamedTuple):
    """AdamP at a step: beta1, 1 - beta1, beta2, 1 - beta2, sqrt(1 - beta2^t), lr / (1 - beta1^t), lr wd."""

    beta1: Any
    weight1: Any
    beta2: Any
    weight2: Any
    root: Any
    rate: Any
    decay: Any
    projection: Projection


class SGDPScalars(NamedTuple):
    """The numbers of SGDP at a step: mu, 1 - dampening, lr, lr wd / (1 - mu)."""

    momentum: Any
    weight: Any
    rate: Any
    decay: Any
    projection: Projection


@factory
def adamp(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    delta: Hyperparameter = 0.1,
    wd_ratio: Hyperparameter = 0.1,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """AdamP: AdamW without the part of a step that only makes scale-invariant weights longer.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        w = m / (sqrt(v / (1 - beta2^t)) + eps)          beta1 m + (1 - beta1) g in place of m if nesterov
        w, ratio = projected(w)
        p <- (1 - lr weight_decay ratio) p - lr / (1 - beta1^t) w

    A parameter of two dimensions or more is projected where its gradient is nearly orthogonal to it. Where the largest
    |cos(g_i, p_i)| of all rows i (dimension 0) is less than delta / sqrt(size of a row), each row of w loses its part
    along p_i. Else, where |cos(g, p)| of the whole is less than delta / sqrt(size), w loses its part along p. In both
    cases ratio is wd_ratio; everywhere else w stays and ratio is 1.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates of m and of v, in [0, 1).
        eps: added to the root and to norms, >= 0.
        weight_decay: decoupled, >= 0.
        delta: threshold of the cosine, >= 0.
        wd_ratio: factor >= 0 of the decay of projected tensors.
        nesterov: look ahead.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: a parameter is complex.

    No derivative flows through the choice. So delta has none.

    Same numbers as the authors' adamp. Source: Heo et al., arXiv:2006.08217, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.adamp(lr=0.1), torch.tensor([[1.0, 1.0]])
        >>> tx.update(torch.tensor([[1.0, -1.0]]), tx.init(params), params)[0]
        tensor([[-0.1000,  0.1000]])
    """
    check("learning rate", lr)
    check_betas(betas)
    _check(eps, weight_decay, delta, wd_ratio)

    def scalars(step: Any) -> AdamPScalars:
        beta1, beta2, rate = at(betas[0], step), at(betas[1], step), at(lr, step)
        projection = Projection(at(delta, step), at(wd_ratio, step), at(eps, step))
        return AdamPScalars(
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            sqrt(debias(beta2, step)),
            rate / debias(beta1, step),
            rate * at(weight_decay, step),
            projection,
        )

    def update(g: Tensor, state: AdamPState, p: Any, s: AdamPScalars) -> Any:
        m = s.beta1 * state.exp_avg + s.weight1 * g
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        ahead = s.beta1 * m + s.weight1 * g if nesterov else m
        w, ratio = _projected(ahead / (safe_sqrt(v) / s.root + s.projection.eps), g, p, s.projection)
        return -s.rate * w - s.decay * ratio * p, AdamPState(m, v)

    rule = of_rule(_init_adamp, update, scalars, needs_params=True, turns=True, decays=not is_zero(weight_decay), lr=lr)
    return uphill_or_down(rule, maximize=maximize)


@factory
def sgdp(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    eps: Hyperparameter = 1e-8,
    delta: Hyperparameter = 0.1,
    wd_ratio: Hyperparameter = 0.1,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """SGDP: SGD without the part of a step that only makes scale-invariant weights longer.

        b <- momentum b + (1 - dampening) g
        w, ratio = projected(g + momentum b if nesterov, else b)         see `adamp`
        p <- (1 - lr weight_decay ratio / (1 - momentum)) p - lr w

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: in [0, 1).
        dampening: part of the gradient that is left out of b.
        weight_decay: decoupled, >= 0.
        nesterov: look ahead.
        eps: added to norms, >= 0.
        delta: see `adamp`.
        wd_ratio: see `adamp`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: a parameter is complex.

    Same numbers as the authors' adamp.SGDP. Unlike torch's SGD, b begins at (1 - dampening) g. Source: Heo et al.,
    arXiv:2006.08217, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.sgdp(lr=0.1), torch.tensor([[1.0, 1.0]])
        >>> tx.update(torch.tensor([[1.0, -1.0]]), tx.init(params), params)[0]
        tensor([[-0.1000,  0.1000]])
    """
    check("learning rate", lr)
    check("momentum value", momentum, "0 <= value < 1")
    check("dampening", dampening, "a number")
    _check(eps, weight_decay, delta, wd_ratio)

    def scalars(step: Any) -> SGDPScalars:
        mu, rate = at(momentum, step), at(lr, step)
        projection = Projection(at(delta, step), at(wd_ratio, step), at(eps, step))
        return SGDPScalars(mu, 1 - at(dampening, step), rate, rate * at(weight_decay, step) / (1 - mu), projection)

    def update(g: Tensor, state: SGDPState, p: Any, s: SGDPScalars) -> Any:
        b = s.momentum * state.momentum_buffer + s.weight * g
        w, ratio = _projected(g + s.momentum * b if nesterov else b, g, p, s.projection)
        return -s.rate * w - s.decay * ratio * p, SGDPState(b)

    rule = of_rule(_init_sgdp, update, scalars, needs_params=True, turns=True, decays=not is_zero(weight_decay), lr=lr)
    return uphill_or_down(rule, maximize=maximize)


def _projected(w: Tensor, g: Tensor, p: Tensor, s: Projection) -> tuple[Tensor, Any]:
    """Leave out the part of w along p where g is nearly orthogonal to p; return the factor of weight decay, too."""
    if p.ndim < 2 or p.numel() == 0:
        return w, 1.0
    ps, gs, ws = [x.reshape(p.shape[0], -1) for x in (p, g, w)]
    pp, gg, pg = [(x * y).sum(1) for x, y in ((ps, ps), (gs, gs), (ps, gs))]
    by_rows, lengths = _nearly_orthogonal(pp, gg, pg, ps.shape[1], s)
    by_whole, length = _nearly_orthogonal(pp.sum(), gg.sum(), pg.sum(), p.numel(), s)
    unit = ps / or_one(torch.where(by_rows, lengths, length)).unsqueeze(1)
    along = (unit * ws).sum(1)
    near = by_rows | by_whole
    part = torch.where(near, torch.where(by_rows, along, along.sum()), 0.0)  # rows are preferred
    one = torch.ones((), dtype=w.dtype, device=w.device)
    return (ws - part.unsqueeze(1) * unit).reshape(w.shape), torch.where(near, s.wd_ratio * one, one)


def _nearly_orthogonal(pp: Tensor, gg: Tensor, pg: Tensor, size: int, s: Projection) -> tuple[Tensor, Tensor]:
    """Tell from their inner products whether all gradients are nearly orthogonal to p; return the lengths of p, too."""
    length = safe_sqrt(pp) + s.eps
    cosine = (pg.abs() / (safe_sqrt(gg) + s.eps) / length).max()
    return cosine < s.delta / math.sqrt(size), length


def _check(eps: Any, weight_decay: Any, delta: Any, wd_ratio: Any) -> None:
    check("epsilon value", eps)
    check("weight_decay value", weight_decay)
    check("delta", delta)
    check("wd_ratio", wd_ratio)


def _init_adamp(p: Tensor) -> AdamPState:
    check_real("AdamP", p)
    return AdamPState(torch.zeros_like(p), torch.zeros_like(p))


def _init_sgdp(p: Tensor) -> SGDPState:
    check_real("SGDP", p)
    return SGDPState(torch.zeros_like(p))
