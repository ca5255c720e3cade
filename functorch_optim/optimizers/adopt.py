"""ADOPT: Adam that divides by the second moment of the step before."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import chain
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least, safe_sqrt, where
from functorch_optim.optimizers._descent import descent
from functorch_optim.transforms.scaling import scale


@leaf_state
class ScaleByADOPTState(NamedTuple):
    """The state of `scale_by_adopt` for one parameter.

    Attributes:
        exp_avg: m, running mean of normalized gradients: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class ADOPTScalars(NamedTuple):
    """The numbers of ADOPT at a step.

    Attributes:
        first: whether t = 1.
        weight1: 1 - beta1; 0 at t = 1.
        beta2: beta2; 0 at t = 1.
        weight2: 1 - beta2; 1 at t = 1.
        eps: smallest root.
        clip: largest normalized gradient.
    """

    first: Any
    weight1: Any
    beta2: Any
    weight2: Any
    eps: Any
    clip: Any


def fourth_root(count: Tensor) -> Any:
    """Return the bound of ADOPT's authors: the fourth root of the number of updates done."""
    return count**0.25


@factory
def scale_by_adopt(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.9999),
    eps: Hyperparameter = 1e-6,
    clip: Hyperparameter | None = fourth_root,
) -> GradientTransformation:
    """Normalize gradients by the root of the mean of earlier squares, and take their running mean.

        n = g / max(sqrt(v), eps)
        n <- min(max(n, -c), c)
        m <- beta1 m + (1 - beta1) n
        v <- beta2 v + (1 - beta2) g^2
        g <- m

    At t = 1, v <- g^2, m stays 0, and so is the update.

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: smallest root to divide by, >= 0.
        clip: c >= 0: number, 0-dim tensor, or schedule. By default it is (t - 1)^(1/4); timm has the power 0.333,
            `clip=lambda count: count**0.333`. None: nothing is clipped, as before the paper's last version. An element
            whose first gradient is zero may then take a step of g / eps.

    Raises:
        ValueError: a number is out of range.

    There is no bias correction. Where n is clipped it has no derivative by g and v; at sqrt(v) = eps it has that of
    sqrt(v).

    Source: Taniguchi et al., ADOPT: modified Adam can converge with any beta2 with the optimal rate, arXiv:2411.02853,
    algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, grads = fo.scale_by_adopt(), torch.tensor([3.0, -3.0])
        >>> updates, state = tx.update(grads, tx.init(torch.zeros(2)))
        >>> updates, state.exp_avg_sq
        (tensor([0., 0.]), tensor([9., 9.]))
        >>> tx.update(grads, state)[0]
        tensor([ 0.1000, -0.1000])
    """
    check_betas(betas)
    check("epsilon value", eps)
    if clip is not None:
        check("clip", clip)

    def scalars(step: Tensor) -> ADOPTScalars:
        first, beta2 = step == 1, at(betas[1], step)
        return ADOPTScalars(
            first,
            where(first, 0.0, 1 - at(betas[0], step)),
            where(first, 0.0, beta2),
            where(first, 1.0, 1 - beta2),
            at(eps, step),
            math.inf if clip is None else at(clip, step),
        )

    def update(g: Tensor, state: ScaleByADOPTState, p: Tensor | None, s: ADOPTScalars) -> Any:
        n = g / torch.where(s.first, 1, at_least(safe_sqrt(state.exp_avg_sq), s.eps))
        if clip is not None:
            n = torch.clamp(n, -s.clip, s.clip)
        m = torch.lerp(state.exp_avg, n, s.weight1)
        return m, ScaleByADOPTState(m, s.beta2 * state.exp_avg_sq + s.weight2 * g * g)

    return leafwise(ScaleByADOPTState, update, scalars, elementwise=True)


def _after_the_first(count: Any) -> Any:
    return where(count == 0, 0.0, 1.0)


@factory
def adopt(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.9999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    decoupled_weight_decay: bool = False,
    clip: Hyperparameter | None = fourth_root,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """ADOPT: Adam that converges with any beta2. The first step only measures, and moves nothing.

        g <- g + weight_decay p
        u = -lr scale_by_adopt(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adopt`.
        eps: see `scale_by_adopt`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        decoupled_weight_decay: decay as `adamw` does, but not at the first step: u = -lr (scale_by_adopt(g) +
            weight_decay p).
        clip: see `scale_by_adopt`.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as the authors' code. Source: Taniguchi et al., arXiv:2411.02853, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, grads = fo.adopt(lr=0.1), torch.tensor([3.0, -3.0])
        >>> updates, state = tx.update(grads, tx.init(torch.zeros(2)))
        >>> tx.update(grads, state)[0]
        tensor([-0.0100,  0.0100])
    """
    tx = descent(
        scale_by_adopt(betas, eps, clip),
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )
    still_at_first = decoupled_weight_decay and not is_zero(weight_decay)
    return chain(tx, scale(_after_the_first)) if still_at_first else tx
