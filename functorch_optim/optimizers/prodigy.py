"""Prodigy: Adam with a learning rate that is estimated from the way gone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, at_first, check, check_betas, is_infinite, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, maximum, minimum, or_one, quotient, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.optimizers._whole import averaged, total


class ProdigyCarried(NamedTuple):
    """The numbers that Prodigy carries on: d, the largest estimate, the numerator r, and the steps that moved."""

    d: Any
    d_max: Any
    d_numerator: Any
    k: Any


class ProdigyState(NamedTuple):
    """The state of `prodigy` for one parameter.

    That of a tree has `d`, `d_max`, `d_numerator` and `k` after `step`: 0-dim float64 tensors.

    Attributes:
        p0: the parameter at the start: like p.
        s: weighted sum of gradients: like p.
        exp_avg: m, running mean of d g: like p.
        exp_avg_sq: v, running mean of (d g)^2: like p.
    """

    p0: Tensor
    s: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


leaf_state(ProdigyState, ProdigyCarried)


class ProdigyScalars(NamedTuple):
    """Prodigy at a step: decay rates and weights of s, m and v; eps; the factors of the step and of p."""

    beta3: Any
    weight3: Any
    beta1: Any
    weight1: Any
    beta2: Any
    weight2: Any
    eps: Any
    rate: Any
    decay: Any


@factory
def prodigy(
    lr: Hyperparameter = 1.0,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    beta3: Hyperparameter | None = None,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    d0: Hyperparameter = 1e-6,
    d_coef: Hyperparameter = 1.0,
    growth_rate: Hyperparameter = math.inf,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Prodigy: Adam whose learning rate is d, an estimate of the distance to the solution that only grows.

        eta = d lr,  times sqrt(1 - beta2^k) / (1 - beta1^k) if use_bias_correction
        r <- beta3 r + d / d0 eta <g, p0 - p>           over all parameters
        s <- beta3 s + d / d0 eta g                     d in place of eta if safeguard_warmup
        m <- beta1 m + (1 - beta1) d g
        v <- beta2 v + (1 - beta2) d^2 g^2
        d_hat = d_coef r / |s|_1                        over all parameters
        d <- max(d, d_hat)                              while d is d0
        d_max <- max(d_max, d_hat)
        d <- min(d_max, d growth_rate)
        u = -eta (m / (sqrt(v) + d eps) + weight_decay p)

    Where beta1 is the number 0, there is no momentum: m = d g, with the new d.

    Where |s|_1 is zero, because no gradient has come yet, nothing moves and k, the number of steps, stands still. The
    same holds where lr is 0.

    Args:
        lr: factor >= 0 of the estimated rate, 1 for most: number, 0-dim tensor, or schedule.
        betas: decay rates of m and of v, in [0, 1).
        beta3: decay rate of r and s, in [0, 1). None: sqrt(beta2).
        eps: added to the root, relative to d, >= 0.
        weight_decay: decoupled, >= 0.
        d0: first estimate, > 0; so small that the first steps do no harm.
        d_coef: factor >= 0 of every estimate; 0.5 to 2.
        growth_rate: largest factor, >= 1, by which d grows in a step.
        use_bias_correction: correct m and v as Adam does.
        safeguard_warmup: leave lr out of s, so that a warmup of lr does not make estimates too large.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: a hyperparameter is a tree; d is one number for all parameters.

    Same numbers as the authors' prodigyopt. Derivatives are finite at zero gradients, where optax' prodigy, which
    always corrects for bias, is NaN. At ties of maxima each argument has half of the derivative.

    Source: Mishchenko & Defazio, arXiv:2306.06101, algorithm 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.prodigy(d0=0.1), torch.ones(1)
        >>> updates, state = tx.update(torch.ones(1), tx.init(params), params)
        >>> updates, fo.tree.get(state, "d")
        (tensor([-0.3162]), tensor(0.1000, dtype=torch.float64))
    """
    check("learning rate", lr, trees=False)
    check_betas(betas)
    check("beta3", 0.0 if beta3 is None else beta3, "0 <= value < 1", trees=False)
    check("epsilon value", eps)
    check("weight_decay value", weight_decay)
    check("d0", d0, "value > 0", trees=False)
    check("d_coef", d_coef, trees=False)
    check("growth_rate", growth_rate, "value >= 1", trees=False)
    decays = not is_zero(weight_decay)

    def carry() -> ProdigyCarried:
        return ProdigyCarried(at_first(d0), at_first(d0), 0.0, 0.0)

    def scalars(step: Any, carried: ProdigyCarried, *, updates: Any, params: Any, states: Any) -> Any:
        rate, start, beta1, beta2 = at(lr, step), at(d0, step), at(betas[0], step), at(betas[1], step)
        b3 = safe_sqrt(beta2) if beta3 is None else at(beta3, step)
        d, k = carried.d, carried.k + 1
        live = rate > 0
        eta = d * rate
        if use_bias_correction:
            eta = eta * sqrt(debias(beta2, k)) / debias(beta1, k)
        weight3 = where(live, d / start * (d if safeguard_warmup else eta), 0.0)
        b3 = where(live, b3, 1.0)
        way, size = total(_terms, [updates, states.s, states.p0, params], step, b3, weight3)
        r = b3 * carried.d_numerator + where(live, d / start * eta, 0.0) * way
        moves = live & (size != 0)
        d_hat = at(d_coef, step) * quotient(r, size)
        begun = where(d == start, maximum(d, d_hat), d)
        d_max = maximum(carried.d_max, d_hat)
        grown = d_max if is_infinite(growth_rate) else minimum(d_max, begun * at(growth_rate, step))
        now = ProdigyCarried(grown, d_max, r, k)
        after = ProdigyCarried(*[where(moves, new, old) for new, old in zip(now, carried, strict=True)])
        eta = where(moves, eta, 0.0)
        return ProdigyScalars(
            b3,
            weight3,
            where(live, beta1, 1.0),
            where(live, after.d if is_zero(betas[0]) else (1 - beta1) * d, 0.0),
            where(live, beta2, 1.0),
            where(live, (1 - beta2) * d * d, 0.0),
            after.d * at(eps, step),
            eta,
            eta * at(weight_decay, step),
        ), after

    def update(g: Tensor, state: ProdigyState, p: Any, s: ProdigyScalars) -> Any:
        total_g = s.beta3 * state.s + s.weight3 * g
        m = s.beta1 * state.exp_avg + s.weight1 * g
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        root = safe_sqrt(v) + s.eps
        u = -s.rate * (m / or_one(root))  # where it is zero, m is
        return u - s.decay * p if decays else u, ProdigyState(state.p0, total_g, m, v)

    options: Any = {"elementwise": True, "needs_params": True, "turns": True, "decays": decays, "lr": lr}
    rule = of_rule(_init, update, scalars, carry=carry, **options)
    return uphill_or_down(rule, maximize=maximize)


def _terms(g: Tensor, s: Tensor, p0: Tensor, p: Tensor, beta3: Any, weight3: Any) -> tuple[Tensor, Tensor]:
    return g * (p0 - p), averaged(g, s, beta3, weight3).abs()


def _init(p: Tensor) -> ProdigyState:
    return ProdigyState(p.clone(), *[torch.zeros_like(p) for _ in range(3)])
