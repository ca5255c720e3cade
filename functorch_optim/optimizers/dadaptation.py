"""D-Adaptation: Adam and SGD with a learning rate that is estimated from the gradients so far."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import (
    Hyperparameter,
    at,
    at_first,
    check,
    check_betas,
    is_infinite,
    is_zero,
)
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, maximum, minimum, or_one, quotient, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.optimizers._whole import averaged, or_first, total
from functorch_optim.transforms.decay import add_decayed_weights


class DAdaptAdamCarried(NamedTuple):
    """The numbers that D-Adapt Adam carries on: d, the numerator r, and the number of steps that moved."""

    d: Any
    numerator_weighted: Any
    k: Any


class DAdaptAdamState(NamedTuple):
    """The state of `dadapt_adam` for one parameter.

    That of a tree has `d`, `numerator_weighted` and `k` after `step`: 0-dim float64 tensors.

    Attributes:
        s: running mean of eta g: like p.
        exp_avg: m, running mean of eta g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    s: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


leaf_state(DAdaptAdamState, DAdaptAdamCarried)


class DAdaptSGDCarried(NamedTuple):
    """The numbers that D-Adapt SGD carries on: d, the numerator r, and the norm of the first gradient."""

    d: Any
    numerator_weighted: Any
    g0_norm: Any


class DAdaptSGDState(NamedTuple):
    """The state of `dadapt_sgd` for one parameter.

    That of a tree has `d`, `numerator_weighted` and `g0_norm` after `step`: 0-dim float64 tensors.

    Attributes:
        p0: the parameter at the start: like p.
        s: sum of eta g: like p.
    """

    p0: Tensor
    s: Tensor


leaf_state(DAdaptSGDState, DAdaptSGDCarried)


class DAdaptAdamScalars(NamedTuple):
    """The numbers of D-Adapt Adam at a step: decay rates and weights of s, m and v; eps; the factors of m and of p."""

    q: Any
    weight3: Any
    beta1: Any
    weight1: Any
    beta2: Any
    weight2: Any
    eps: Any
    moves: Any
    decay: Any


@factory
def dadapt_adam(
    lr: Hyperparameter = 1.0,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    d0: Hyperparameter = 1e-6,
    growth_rate: Hyperparameter = math.inf,
    use_bias_correction: bool = False,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adam by D-Adaptation: its learning rate is d, a lower bound of the distance to the solution that only grows.

        g <- g + weight_decay p                          unless decoupled_weight_decay
        eta = d lr,  times sqrt(1 - beta2^k) / (1 - beta1^k) if use_bias_correction
        r <- q r + (1 - q) eta <g, s / (sqrt(v) + eps)>  over all parameters,  q = sqrt(beta2)
        m <- beta1 m + (1 - beta1) eta g
        v <- beta2 v + (1 - beta2) g^2
        s <- q s + (1 - q) eta g
        d <- max(d, min(r / ((1 - q) |s|_1), d growth_rate))
        u = -m / (sqrt(v) + eps) - eta weight_decay p    the last term if decoupled_weight_decay

    Where |s|_1 is zero, because no gradient has come yet, nothing moves and k, the number of steps, stands still. The
    same holds where lr is 0. Prodigy has superseded it in use.

    Args:
        lr: factor >= 0 of the estimated rate, 1 for most: number, 0-dim tensor, or schedule.
        betas: decay rates of m and of v, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: L2 penalty >= 0, or decoupled.
        d0: first estimate, > 0.
        growth_rate: largest factor, >= 1, by which d grows in a step.
        use_bias_correction: correct m and v as Adam does.
        decoupled_weight_decay: decay as `adamw` does.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters where they decay.
        TypeError: a hyperparameter is a tree; d is one number for all parameters.

    Same numbers as the authors' dadaptation.DAdaptAdam.

    Source: Defazio & Mishchenko, arXiv:2301.07733, algorithm 5.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.dadapt_adam(d0=0.1), torch.ones(1)
        >>> tx.update(torch.ones(1), tx.init(params), params)[0]
        tensor([-0.3162])
    """
    check_betas(betas)
    check("epsilon value", eps, trees=False)
    check("weight_decay value", weight_decay)
    _check(lr, d0, growth_rate)

    def carry() -> DAdaptAdamCarried:
        return DAdaptAdamCarried(at_first(d0), 0.0, 0.0)

    def scalars(step: Any, carried: DAdaptAdamCarried, *, updates: Any, states: Any) -> Any:
        rate, e, beta1, beta2 = at(lr, step), at(eps, step), at(betas[0], step), at(betas[1], step)
        d, k, q = carried.d, carried.k + 1, safe_sqrt(beta2)
        live = rate > 0
        eta = d * rate
        if use_bias_correction:
            eta = eta * sqrt(debias(beta2, k)) / debias(beta1, k)
        q, weight3 = where(live, q, 1.0), where(live, (1 - q) * eta, 0.0)
        way, size = total(_terms_of_adam, [updates, states.s, states.exp_avg_sq], step, e, q, weight3)
        r = q * carried.numerator_weighted + weight3 * way
        moves = live & (size != 0)
        grown = _grown(d, quotient(r, (1 - q) * size), growth_rate, step)
        now = DAdaptAdamCarried(grown, r, k)
        after = DAdaptAdamCarried(*[where(moves, new, old) for new, old in zip(now, carried, strict=True)])
        return DAdaptAdamScalars(
            q,
            weight3,
            where(live, beta1, 1.0),
            where(live, (1 - beta1) * eta, 0.0),
            where(live, beta2, 1.0),
            where(live, 1 - beta2, 0.0),
            e,
            where(moves, 1.0, 0.0),
            where(moves, eta * at(weight_decay, step), 0.0),
        ), after

    def update(g: Tensor, state: DAdaptAdamState, p: Any, s: DAdaptAdamScalars) -> Any:
        sums = s.q * state.s + s.weight3 * g
        m = s.beta1 * state.exp_avg + s.weight1 * g
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        u = -s.moves * (m / or_one(safe_sqrt(v) + s.eps))  # where that is zero, s and m are
        return u - s.decay * p if decoupled_weight_decay else u, DAdaptAdamState(sums, m, v)

    rule = of_rule(
        DAdaptAdamState,
        update,
        scalars,
        carry=carry,
        elementwise=True,
        needs_params=decoupled_weight_decay,
        turns=True,
        decays=decoupled_weight_decay and not is_zero(weight_decay),
        lr=lr,
    )
    decay = add_decayed_weights(0.0 if decoupled_weight_decay else weight_decay)
    return uphill_or_down(decay, rule, maximize=maximize)


@factory
def dadapt_sgd(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    d0: Hyperparameter = 1e-6,
    growth_rate: Hyperparameter = math.inf,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """SGD by D-Adaptation: its learning rate is d, a lower bound of the distance to the solution that only grows.

        g <- g + weight_decay p
        eta = d lr / |g_1|                               over all parameters; g_1 is the first gradient that is not 0
        r <- r + eta <g, s>
        s <- s + eta g
        d <- max(d, min(2 r / |s|, d growth_rate))
        u = (1 - momentum) (p0 - s - p)

    Args:
        lr: factor >= 0 of the estimated rate, 1 for most: number, 0-dim tensor, or schedule.
        momentum: in [0, 1).
        weight_decay: L2 penalty >= 0.
        d0: first estimate, > 0.
        growth_rate: largest factor, >= 1, by which d grows in a step.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: a hyperparameter is a tree; d is one number for all parameters.

    Same numbers as the authors' dadaptation.DAdaptSGD, but for two things: that divides by zero where the first
    gradients are zero, and leaves weight decay out of |g_1| alone. Here nothing moves before a gradient has come.

    Source: Defazio & Mishchenko, arXiv:2301.07733, algorithm 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.dadapt_sgd(d0=0.1), torch.ones(1)
        >>> tx.update(torch.full((1,), 5.0), tx.init(params), params)[0]
        tensor([-0.1000])
    """
    check("momentum value", momentum, "0 <= value < 1")
    check("weight_decay value", weight_decay)
    _check(lr, d0, growth_rate)

    def carry() -> DAdaptSGDCarried:
        return DAdaptSGDCarried(at_first(d0), 0.0, 0.0)

    def scalars(step: Any, carried: DAdaptSGDCarried, *, updates: Any, states: Any) -> Any:
        g0_norm = or_first(carried.g0_norm, lambda: safe_sqrt(total(torch.square, [updates], step)))
        eta = quotient(carried.d * at(lr, step), g0_norm)
        way, size = total(_terms_of_sgd, [updates, states.s], step, eta)
        r = carried.numerator_weighted + eta * way
        d = _grown(carried.d, quotient(2 * r, safe_sqrt(size)), growth_rate, step)
        return (eta, 1 - at(momentum, step)), DAdaptSGDCarried(d, r, g0_norm)

    def update(g: Tensor, state: DAdaptSGDState, p: Any, numbers: Any) -> Any:
        eta, weight = numbers
        s = state.s + eta * g
        return weight * (state.p0 - s - p), DAdaptSGDState(state.p0, s)

    rule = of_rule(_init_sgd, update, scalars, carry=carry, elementwise=True, needs_params=True, turns=True, lr=lr)
    return uphill_or_down(add_decayed_weights(weight_decay), rule, maximize=maximize)


def _terms_of_adam(g: Tensor, s: Tensor, v: Tensor, eps: Any, q: Any, weight3: Any) -> tuple[Tensor, Tensor]:
    return g * (s / or_one(safe_sqrt(v) + eps)), averaged(g, s, q, weight3).abs()


def _terms_of_sgd(g: Tensor, s: Tensor, eta: Any) -> tuple[Tensor, Tensor]:
    return g * s, (s + eta * g).square()


def _grown(d: Any, estimate: Any, growth_rate: Any, step: Any) -> Any:
    if not is_infinite(growth_rate):
        estimate = minimum(estimate, d * at(growth_rate, step))
    return maximum(d, estimate)


def _check(lr: Any, d0: Any, growth_rate: Any) -> None:
    check("learning rate", lr, trees=False)
    check("d0", d0, "value > 0", trees=False)
    check("growth_rate", growth_rate, "value >= 1", trees=False)


def _init_sgd(p: Tensor) -> DAdaptSGDState:
    return DAdaptSGDState(p.clone(), torch.zeros_like(p))
