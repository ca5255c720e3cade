"""AdEMAMix: Adam with a second, much longer memory of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, check_each
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, exp, log, minimum, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import descent
from functorch_optim.tree import Tree


@leaf_state
class ScaleByAdEMAMixState(NamedTuple):
    """The state of `scale_by_ademamix` for one parameter.

    Attributes:
        exp_avg: m1, running mean of g: like p.
        exp_avg_slow: m2, slow running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_slow: Tensor
    exp_avg_sq: Tensor


class AdEMAMixScalars(NamedTuple):
    """The numbers of AdEMAMix at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        weight3: 1 - beta3_t.
        rate: root / (1 - beta1^t), where root = sqrt(1 - beta2^t).
        alpha: alpha_t root.
        eps: eps root.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    weight3: Any
    rate: Any
    alpha: Any
    eps: Any


@factory
def scale_by_ademamix(
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.9, 0.999, 0.9999),
    alpha: Hyperparameter = 5.0,
    eps: Hyperparameter = 1e-8,
    alpha_warmup: Hyperparameter | None = None,
    beta3_warmup: Hyperparameter | None = None,
) -> GradientTransformation:
    """Scale as Adam does, with a slow mean of gradients beside the fast one.

        m1 <- beta1 m1 + (1 - beta1) g
        m2 <- beta3_t m2 + (1 - beta3_t) g
        v  <- beta2 v + (1 - beta2) g^2
        g <- (m1 / (1 - beta1^t) + alpha_t m2) / (sqrt(v / (1 - beta2^t)) + eps)

        alpha_t = alpha min(1, t / alpha_warmup)
        1 / ln(beta3_t) = (1 - t / beta3_warmup) / ln(beta1) + t / beta3_warmup / ln(beta3)

    beta3_t begins near beta1, its half-life grows linearly, and from t = beta3_warmup on it is beta3. m2 is not
    corrected for its beginning at zero.

    Args:
        betas: decay rates of m1, of v and of m2, in [0, 1): numbers, 0-dim tensors, or schedules.
        alpha: weight of m2, >= 0.
        eps: added to the root, >= 0.
        alpha_warmup: number of steps, > 0, in which alpha_t rises; the paper takes those of the whole training. None:
            it is alpha from the first step on.
        beta3_warmup: the same for beta3_t.

    Raises:
        ValueError: a number is out of range.

    As in the authors' code, 1e-8 is added inside of the logarithms, so that beta1 may be 0. By the number of warmup
    steps there is a derivative too; half of it at t = alpha_warmup.

    Source: Pagliardini et al., The AdEMAMix optimizer: better, faster, older, arXiv:2409.03137, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_ademamix(betas=(0.9, 0.999, 0.5), alpha=2.0)
        >>> updates, state = tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))
        >>> updates.round(decimals=3), state.exp_avg_slow
        (tensor([2.]), tensor([1.5000]))
    """
    check_each("betas", betas, ("0 <= value < 1",) * 3, "(0.9, 0.999, 0.9999)", "beta parameter")
    check("alpha", alpha)
    check("epsilon value", eps)
    _check_warmup("alpha_warmup", alpha_warmup)
    _check_warmup("beta3_warmup", beta3_warmup)

    def scalars(step: Tensor) -> AdEMAMixScalars:
        beta1, beta2, beta3 = [at(beta, step) for beta in betas]
        mixed = at(alpha, step)
        if alpha_warmup is not None:
            mixed = mixed * minimum(step / at(alpha_warmup, step), 1.0)
        if beta3_warmup is not None:
            beta3 = _of_growing_half_life(step, beta1, beta3, at(beta3_warmup, step))
        root = sqrt(debias(beta2, step))
        rate = root / debias(beta1, step)
        return AdEMAMixScalars(1 - beta1, beta2, 1 - beta2, 1 - beta3, rate, mixed * root, at(eps, step) * root)

    def update(g: Tensor, state: ScaleByAdEMAMixState, p: Tensor | None, s: AdEMAMixScalars) -> Any:
        m1 = torch.lerp(state.exp_avg, g, s.weight1)
        m2 = torch.lerp(state.exp_avg_slow, g, s.weight3)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return (s.rate * m1 + s.alpha * m2) / (safe_sqrt(v) + s.eps), ScaleByAdEMAMixState(m1, m2, v)

    return leafwise(ScaleByAdEMAMixState, update, scalars, elementwise=True)


def _of_growing_half_life(step: Any, start: Any, end: Any, steps: Any) -> Any:
    """Return a decay rate whose half-life, -ln 2 / ln(beta), goes from that of one rate to that of another."""
    done = minimum(step / steps, 1.0)
    rate = exp(1 / ((1 - done) / log(start + 1e-8) + done / log(end + 1e-8)))
    return where(step < steps, rate, end)


def _check_warmup(name: str, steps: Hyperparameter | None) -> None:
    if steps is not None:
        check(name, steps, "value > 0")


@factory
def ademamix(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.9, 0.999, 0.9999),
    alpha: Hyperparameter = 5.0,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    alpha_warmup: Hyperparameter | None = None,
    beta3_warmup: Hyperparameter | None = None,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """AdEMAMix: AdamW that also remembers gradients of tens of thousands of steps ago.

        u = -lr (scale_by_ademamix(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_ademamix`.
        alpha: see `scale_by_ademamix`. The authors' code has 2 by default.
        eps: see `scale_by_ademamix`.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        alpha_warmup: see `scale_by_ademamix`.
        beta3_warmup: see `scale_by_ademamix`.
        mask: where parameters decay; see `add_decayed_weights`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Same numbers as the authors' code and optax.ademamix. Source: Pagliardini et al., arXiv:2409.03137, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.ademamix(lr=0.1, alpha_warmup=1000, beta3_warmup=1000)
        >>> updates, state = tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))
        >>> updates
        tensor([-0.1000])
    """
    rule = scale_by_ademamix(betas, alpha, eps, alpha_warmup, beta3_warmup)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, mask=mask, maximize=maximize)


@leaf_state
class ScaleBySimplifiedAdEMAMixState(NamedTuple):
    """The state of `scale_by_simplified_ademamix` for one parameter.

    Attributes:
        exp_avg: m, decaying sum of g: like p.
        exp_avg_sq: n, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class SimplifiedAdEMAMixScalars(NamedTuple):
    """Simplified AdEMAMix at a step: beta1_t, beta2, 1 - beta2; alpha, root and eps root as in AdEMAMix."""

    beta1: Any
    beta2: Any
    weight2: Any
    alpha: Any
    root: Any
    eps: Any


@factory
def scale_by_simplified_ademamix(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.99, 0.95),
    alpha: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-8,
    beta1_warmup: Hyperparameter | None = None,
    min_beta1: Hyperparameter = 0.9,
) -> GradientTransformation:
    """Scale as Adam does, with a sum of gradients in place of their mean, and the gradient itself beside it.

        m <- beta1_t m + g
        n <- beta2 n + (1 - beta2) g^2
        g <- (alpha g + m) / (sqrt(n / (1 - beta2^t)) + eps)

    Args:
        betas: decay rates of m and of n, in [0, 1): numbers, 0-dim tensors, or schedules.
        alpha: weight of the gradient, >= 0; up to 100 is usual.
        eps: added to the root, >= 0.
        beta1_warmup: number of steps, > 0, in which the half-life of beta1_t grows, as that of beta3_t does in
            `scale_by_ademamix`. None: it is beta1 from the first step on.
        min_beta1: where it begins, in [0, 1).

    Raises:
        ValueError: a number is out of range.

    Source: Morwani et al., Connections between schedule-free optimizers, AdEMAMix, and accelerated SGD variants,
    arXiv:2502.02431.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_simplified_ademamix(alpha=2.0)
        >>> updates, state = tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))
        >>> updates, state.exp_avg
        (tensor([3.]), tensor([3.]))
    """
    check_betas(betas)
    check("alpha", alpha)
    check("epsilon value", eps)
    _check_warmup("beta1_warmup", beta1_warmup)
    check("min_beta1", min_beta1, "0 <= value < 1")

    def scalars(step: Tensor) -> SimplifiedAdEMAMixScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        if beta1_warmup is not None:
            beta1 = _of_growing_half_life(step, at(min_beta1, step), beta1, at(beta1_warmup, step))
        root = sqrt(debias(beta2, step))
        return SimplifiedAdEMAMixScalars(beta1, beta2, 1 - beta2, at(alpha, step), root, at(eps, step) * root)

    def update(g: Tensor, state: ScaleBySimplifiedAdEMAMixState, p: Tensor | None, s: SimplifiedAdEMAMixScalars) -> Any:
        m = s.beta1 * state.exp_avg + g
        n = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return s.root * (s.alpha * g + m) / (safe_sqrt(n) + s.eps), ScaleBySimplifiedAdEMAMixState(m, n)

    return leafwise(ScaleBySimplifiedAdEMAMixState, update, scalars, elementwise=True)


@factory
def simplified_ademamix(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.99, 0.95),
    alpha: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    beta1_warmup: Hyperparameter | None = None,
    min_beta1: Hyperparameter = 0.9,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Simplified AdEMAMix: one memory of gradients, and the latest gradient beside it.

        u = -lr (scale_by_simplified_ademamix(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule. About a hundred times smaller than Adam's, for m is a
            sum of 1 / (1 - beta1) gradients.
        betas: see `scale_by_simplified_ademamix`.
        alpha: see `scale_by_simplified_ademamix`.
        eps: see `scale_by_simplified_ademamix`.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        beta1_warmup: see `scale_by_simplified_ademamix`.
        min_beta1: see `scale_by_simplified_ademamix`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Source: Morwani et al., arXiv:2502.02431.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.simplified_ademamix(lr=0.1)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0]
        tensor([-0.1000])
    """
    rule = scale_by_simplified_ademamix(betas, alpha, eps, beta1_warmup, min_beta1)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)
