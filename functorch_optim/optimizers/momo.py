"""MoMo: momentum with a step size from a model of the loss; for SGD and for Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least, debias, safe_sqrt, where
from functorch_optim.optimizers._whole import averaged, bounded, loss_at, total


class MoMoCarried(NamedTuple):
    """The numbers that MoMo carries on: running means of the loss, and of the inner product of gradient and p."""

    loss_avg: Any
    grad_dot_w: Any


class MoMoState(NamedTuple):
    """The state of `momo` for one parameter; that of a tree has `loss_avg` and `grad_dot_w` after `step`.

    Attributes:
        exp_avg: m, running mean of g: like p.
    """

    exp_avg: Tensor


class MoMoAdamState(NamedTuple):
    """The state of `momo_adam` for one parameter; that of a tree has `loss_avg` and `grad_dot_w` after `step`.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


leaf_state(MoMoState, MoMoCarried)
leaf_state(MoMoAdamState, MoMoCarried)


class MoMoScalars(NamedTuple):
    """MoMo at a step: decay rates and weights of m and v, the root of v's correction, eps; tau, lr wd and 1 + lr wd."""

    beta1: Any
    weight1: Any
    beta2: Any
    weight2: Any
    root: Any
    eps: Any
    tau: Any
    decay: Any
    shrink: Any


@factory
def momo(
    lr: Hyperparameter = 1.0,
    beta: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    *,
    lb: Hyperparameter = 0.0,
) -> GradientTransformation:
    """MoMo: SGD with momentum, whose step size is at most lr, and less where a model of the loss says so.

        m <- beta m + (1 - beta) g                       at first m = g, and f and q likewise
        f <- beta f + (1 - beta) loss
        q <- beta q + (1 - beta) <g, p>                  inner products and norms are over all parameters
        h = (1 + lr wd) (f - lb - q) + <m, p>
        tau = min(lr, max(h, 0) / |m|^2)
        p <- (p - tau m) / (1 + lr wd)

    The loss is given to every update, `tx.update(grads, state, params, value=loss)`; `opt.step(closure)` gives that of
    the closure.

    Args:
        lr: largest step size, >= 0: number, 0-dim tensor, or schedule.
        beta: decay rate of the means, in [0, 1).
        weight_decay: wd >= 0, by a proximal step.
        lb: lower bound of the loss.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters; the value is no single number.
        TypeError: `update` is called without a value, or it is no number.

    Same numbers as the authors' momo-opt, without its estimate of lb. The step is zero where m is.

    Source: Schaipp et al., MoMo, arXiv:2305.07583, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.momo(lr=10.0), torch.tensor([2.0])
        >>> grads, value = torch.func.grad_and_value(lambda p: p.square().sum())(params)
        >>> tx.update(grads, tx.init(params), params, value=value)[0]
        tensor([-1.])
    """
    check("beta", beta, "0 <= value < 1", trees=False)
    _check(lr, weight_decay, lb)

    def scalars(
        step: Any, carried: MoMoCarried, *, updates: Any, params: Any, states: Any, value: Any
    ) -> tuple[MoMoScalars, MoMoCarried]:
        kept = where(step == 1, 0.0, at(beta, step))
        rate = at(lr, step)
        f = kept * carried.loss_avg + (1 - kept) * loss_at(value, step)
        here, way, size = total(_terms, [updates, states.exp_avg, params], step, kept, 1 - kept)
        q = kept * carried.grad_dot_w + (1 - kept) * here
        decay = rate * at(weight_decay, step)
        h = (1 + decay) * (f - at(lb, step) - q) + way
        tau = bounded(rate, at_least(h, 0.0), size)
        return MoMoScalars(kept, 1 - kept, 0.0, 0.0, 1.0, 0.0, tau, decay, 1 + decay), MoMoCarried(f, q)

    def update(g: Tensor, state: MoMoState, p: Any, s: MoMoScalars) -> Any:
        m = s.beta1 * state.exp_avg + s.weight1 * g
        return -(s.tau * m + s.decay * p) / s.shrink, MoMoState(m)

    return of_rule(MoMoState, update, scalars, **_options(lr, weight_decay))


@factory
def momo_adam(
    lr: Hyperparameter = 1e-2,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    *,
    lb: Hyperparameter = 0.0,
) -> GradientTransformation:
    """MoMo-Adam: Adam, whose learning rate is at most lr, and less where a model of the loss says so.

        m <- beta1 m + (1 - beta1) g,  f and q likewise, as in `momo`, but all from zero
        v <- beta2 v + (1 - beta2) g^2
        D = sqrt(v / (1 - beta2^t)) + eps
        h = (1 + lr wd) (f - (1 - beta1^t) lb - q) + <m, p>
        tau = min(lr / (1 - beta1^t), max(h, 0) / <m, m / D>)
        p <- (p - tau m / D) / (1 + lr wd)

    The loss is given to every update, `tx.update(grads, state, params, value=loss)`; `opt.step(closure)` gives that of
    the closure.

    Args:
        lr: largest learning rate, >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates of m, f and q, and of v, in [0, 1).
        eps: added to the root, > 0.
        weight_decay: wd >= 0, by a proximal step.
        lb: lower bound of the loss.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters; the value is no single number.
        TypeError: `update` is called without a value, or it is no number.

    Same numbers as the authors' momo-opt, without its estimate of lb. The step is zero where m is.

    Source: Schaipp et al., MoMo, arXiv:2305.07583, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.momo_adam(lr=10.0), torch.tensor([2.0])
        >>> grads, value = torch.func.grad_and_value(lambda p: p.square().sum())(params)
        >>> tx.update(grads, tx.init(params), params, value=value)[0]
        tensor([-1.0000])
    """
    check_betas(betas)
    check("epsilon value", eps, "value > 0", trees=False)
    _check(lr, weight_decay, lb)

    def scalars(
        step: Any, carried: MoMoCarried, *, updates: Any, params: Any, states: Any, value: Any
    ) -> tuple[MoMoScalars, MoMoCarried]:
        beta1, beta2, e, rate = at(betas[0], step), at(betas[1], step), at(eps, step), at(lr, step)
        root, corrected = safe_sqrt(debias(beta2, step)), debias(beta1, step)
        weights = beta1, 1 - beta1, beta2, 1 - beta2, root, e
        here, way, size = total(_terms_of_adam, [updates, states.exp_avg, params, states.exp_avg_sq], step, *weights)
        f = beta1 * carried.loss_avg + (1 - beta1) * loss_at(value, step)
        q = beta1 * carried.grad_dot_w + (1 - beta1) * here
        decay = rate * at(weight_decay, step)
        h = (1 + decay) * (f - corrected * at(lb, step) - q) + way
        tau = bounded(rate / corrected, at_least(h, 0.0), size)
        return MoMoScalars(*weights, tau, decay, 1 + decay), MoMoCarried(f, q)

    def update(g: Tensor, state: MoMoAdamState, p: Any, s: MoMoScalars) -> Any:
        m = s.beta1 * state.exp_avg + s.weight1 * g
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        direction = m / (safe_sqrt(v) / s.root + s.eps)
        return -(s.tau * direction + s.decay * p) / s.shrink, MoMoAdamState(m, v)

    return of_rule(MoMoAdamState, update, scalars, **_options(lr, weight_decay))


def _options(lr: Hyperparameter, weight_decay: Hyperparameter) -> dict[str, Any]:
    decays = not is_zero(weight_decay)
    return {"carry": _carry, "elementwise": True, "needs_params": True, "turns": True, "decays": decays, "lr": lr}


def _carry() -> MoMoCarried:
    return MoMoCarried(0.0, 0.0)


def _terms(g: Tensor, m: Tensor, p: Tensor, beta1: Any, weight1: Any) -> tuple[Tensor, ...]:
    m = averaged(g, m, beta1, weight1)
    return g * p, m * p, m.square()


def _terms_of_adam(
    g: Tensor, m: Tensor, p: Tensor, v: Tensor, beta1: Any, weight1: Any, beta2: Any, weight2: Any, root: Any, eps: Any
) -> tuple[Tensor, ...]:
    m, v = averaged(g, m, beta1, weight1), averaged(g * g, v, beta2, weight2)
    return g * p, m * p, m.square() / (safe_sqrt(v) / root + eps)


def _check(lr: Any, weight_decay: Any, lb: Any) -> None:
    check("learning rate", lr, trees=False)
    check("weight_decay value", weight_decay, trees=False)
    check("lb", lb, "a number", trees=False)
