"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import as_kept, debias, double, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import descent


class NAdamCarried(NamedTuple):
    """The number that NAdam's scalars carry on: mu_1 ... mu_t."""

    mu_product: Any


class ScaleByNAdamState(NamedTuple):
    """The state of `scale_by_nadam` for one parameter; that of a tree has `mu_product`, mu_1 ... mu_t, after `step`.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


leaf_state(ScaleByNAdamState, NAdamCarried)


class NAdamScalars(NamedTuple):
    """The numbers of NAdam at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        now: weight of g, (1 - mu_t) / (1 - mu_1 ... mu_t), times root.
        ahead: weight of m, mu_{t+1} / (1 - mu_1 ... mu_{t+1}), times root.
        eps: eps times root, where root = sqrt(1 - beta2^t).
    """

    weight1: Any
    beta2: Any
    weight2: Any
    now: Any
    ahead: Any
    eps: Any


@factory
def scale_by_nadam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    momentum_decay: Hyperparameter = 4e-3,
) -> GradientTransformation:
    """Scale as Adam does, with momentum that looks a step ahead and grows as the training goes on.

        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        m' = mu_{t+1} m / (1 - mu_1 ... mu_{t+1}) + (1 - mu_t) g / (1 - mu_1 ... mu_t)
        g <- m' / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0.
        momentum_decay: rate >= 0 at which mu grows from beta1 / 2 to beta1; with 0 it stays at beta1 / 2.

    Raises:
        ValueError: a number is out of range.

    The product of the mu is a state of the whole tree: one number, in float64. (The stateful forms keep it for each
    parameter, in float32, as torch.optim.NAdam does.)

    Source: Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016, algorithm 2 and its schedule of mu.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_nadam()
        >>> updates, state = tx.update(torch.ones(1), tx.init(torch.ones(1)))
        >>> updates.round(decimals=2), state.mu_product.round(decimals=2)
        (tensor([1.0600]), tensor(0.4500, dtype=torch.float64))
    """
    check_betas(betas)
    check("epsilon value", eps)
    check("momentum_decay value", momentum_decay)

    def carry() -> NAdamCarried:
        return NAdamCarried(1.0)

    def scalars(step: Tensor, carried: NAdamCarried) -> tuple[NAdamScalars, NAdamCarried]:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        psi = at(momentum_decay, step)
        mu = beta1 * (1 - 0.5 * 0.96 ** (step * psi))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * psi))
        product = carried.mu_product * as_kept(mu, carried.mu_product)
        root = sqrt(debias(beta2, step))
        now, ahead = (1 - mu) / (1 - double(product)), mu_next / (1 - double(product) * mu_next)
        return NAdamScalars(1 - beta1, beta2, 1 - beta2, now * root, ahead * root, at(eps, step) * root), NAdamCarried(
            product
        )

    def update(g: Tensor, state: ScaleByNAdamState, p: Tensor | None, s: NAdamScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return (s.now * g + s.ahead * m) / (safe_sqrt(v) + s.eps), ScaleByNAdamState(m, v)

    return of_rule(ScaleByNAdamState, update, scalars, carry=carry, elementwise=True, narrow=True)


@factory
def nadam(
    lr: Hyperparameter = 2e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum_decay: Hyperparameter = 4e-3,
    decoupled_weight_decay: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """NAdam: Adam with Nesterov momentum.

        g <- g + weight_decay p
        u = -lr scale_by_nadam(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_nadam`.
        eps: see `scale_by_nadam`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        momentum_decay: see `scale_by_nadam`.
        decoupled_weight_decay: decay as `adamw` does: u = -lr (scale_by_nadam(g) + weight_decay p).
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.NAdam. Source: Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.nadam(lr=0.1)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.1056])}
    """
    rule = scale_by_nadam(betas, eps, momentum_decay)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
