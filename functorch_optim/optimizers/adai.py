"""Adai: SGD whose momentum is adaptive, and not its learning rate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least, sqrt, where
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._whole import total


class AdaiCarried(NamedTuple):
    """The number that Adai carries on: the mean of v over all elements of all parameters."""

    mean_exp_avg_sq: Any


class ScaleByAdaiState(NamedTuple):
    """The state of `scale_by_adai` for one parameter; that of a tree has `mean_exp_avg_sq`, mean(v), after `step`.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
        beta1_prod: q, product of the momenta so far: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    beta1_prod: Tensor


leaf_state(ScaleByAdaiState, AdaiCarried)


class AdaiScalars(NamedTuple):
    """The numbers of Adai at a step: beta2, 1 - beta2; beta0; 1 / sqrt(mean(v)); eps."""

    beta2: Any
    weight2: Any
    beta0: Any
    scale: Any
    eps: Any


@factory
def scale_by_adai(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.1, 0.99), eps: Hyperparameter = 1e-3
) -> GradientTransformation:
    """Take the mean of gradients, over a longer time where they are small.

        v <- beta2 v + (1 - beta2) g^2
        beta1 = min(max(1 - beta0 v / mean(v), 0), 1 - eps)
        q <- beta1 q
        m <- beta1 m + (1 - beta1) g
        g <- m / (1 - q)

    mean(v) is over all elements of all parameters. A correction of v for its beginning at zero would cancel.

    Args:
        betas: beta0, how much smaller than 1 the momentum is in the mean, >= 0, and beta2, the decay rate of v, in
            [0, 1): numbers, 0-dim tensors, or schedules. beta2 is one number for all parameters.
        eps: 1 minus the largest momentum, > 0.

    Raises:
        ValueError: a number is out of range.
        TypeError: beta2 is a tree.

    The mean is carried on as one number, of the gradients that there are. Where some are missing, packages take the
    mean over the v of the others instead. pytorch_optimizer bounds it by eps from below.

    Where beta1 is clipped it has no derivative; at the corners it has that of the line between them.

    Source: Xie et al., Adaptive inertia: disentangling the effects of adaptive learning rate and momentum,
    arXiv:2006.15815, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adai()
        >>> updates, state = tx.update(torch.tensor([3.0, 1.0]), tx.init(torch.zeros(2)))
        >>> updates, state.beta1_prod
        (tensor([3.0000, 1.0000]), tensor([0.8200, 0.9800]))
    """
    check_betas(betas)
    check("epsilon value", eps, "value > 0")

    def carry() -> AdaiCarried:
        return AdaiCarried(0.0)

    def scalars(step: Tensor, carried: AdaiCarried, *, updates: list[Tensor]) -> tuple[AdaiScalars, AdaiCarried]:
        beta0, beta2 = at(betas[0], step), at(betas[1], step)
        mean = beta2 * carried.mean_exp_avg_sq + (1 - beta2) * _mean_square(updates, step)
        scale = 1 / sqrt(where(mean == 0, 1.0, mean))
        return AdaiScalars(beta2, 1 - beta2, beta0, scale, at(eps, step)), AdaiCarried(mean)

    def update(g: Tensor, state: ScaleByAdaiState, p: Tensor | None, s: AdaiScalars) -> Any:
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        # 1 - beta1, which keeps its digits where beta1 is near 1; scaled twice, as the square may not fit into float32.
        line = -at_least(-s.beta0 * (v * s.scale * s.scale), -1.0)
        weight = torch.where(line < s.eps, s.eps, line)
        q = (1 - weight) * state.beta1_prod
        m = torch.lerp(state.exp_avg, g, weight)
        rest = torch.where(1 - q < s.eps, s.eps, 1 - q)  # only rounding makes 1 - q less than eps
        return m / rest, ScaleByAdaiState(m, v, q)

    return leafwise(_init, update, scalars, carry=carry, elementwise=True)


def _init(p: Tensor) -> ScaleByAdaiState:
    return ScaleByAdaiState(torch.zeros_like(p), torch.zeros_like(p), torch.ones_like(p))


def _mean_square(tensors: list[Tensor], step: Any) -> Any:
    """Take the mean of squares of all elements of all tensors; real and imaginary parts are elements of their own."""
    count = sum([x.numel() * (2 if x.is_complex() else 1) for x in tensors])
    return total(torch.square, [tensors], step) / max(count, 1)


@factory
def adai(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.1, 0.99),
    eps: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.0,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Adai: SGD with more momentum where gradients are small, so that it leaves saddles fast and likes flat minima.

        g <- g + weight_decay p
        u = -lr scale_by_adai(g)

    Args:
        lr: learning rate >= 0, of the size of SGD's: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adai`.
        eps: see `scale_by_adai`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        decoupled_weight_decay: decay as `adamw` does: u = -lr (scale_by_adai(g) + weight_decay p).
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.
        TypeError: beta2 is a tree.

    Source: Xie et al., arXiv:2006.15815, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adai(lr=0.1)
        >>> tx.update(torch.tensor([3.0, 1.0]), tx.init(torch.zeros(2)))[0]
        tensor([-0.3000, -0.1000])
    """
    rule = scale_by_adai(betas, eps)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
