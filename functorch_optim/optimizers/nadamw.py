"""NAdamW: AdamW with Nesterov momentum, without a schedule of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import descent
from functorch_optim.tree import Tree


@leaf_state
class ScaleByNAdamWState(NamedTuple):
    """The state of `scale_by_nadamw` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class NAdamWScalars(NamedTuple):
    """The numbers of NAdamW at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        now: weight of g, (1 - beta1) root / (1 - beta1^t), where root = sqrt(1 - beta2^t).
        ahead: weight of m, beta1 root / (1 - beta1^t), or beta1 root / (1 - beta1^(t+1)).
        eps: eps root.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    now: Any
    ahead: Any
    eps: Any


@factory
def scale_by_nadamw(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    *,
    correct_ahead: bool = False,
) -> GradientTransformation:
    """Scale as Adam does, with momentum that looks a step ahead.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        m' = (beta1 m + (1 - beta1) g) / (1 - beta1^t)
        g <- m' / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0.
        correct_ahead: correct m for the next step, m' = beta1 m / (1 - beta1^(t+1)) + (1 - beta1) g / (1 - beta1^t), as
            Dozat and optax do; timm and AlgoPerf correct it for this one.

    Raises:
        ValueError: a number is out of range.

    `scale_by_nadam`, torch's, has a momentum that grows with the steps.

    Source: Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop 2016; Dahl et al., Benchmarking neural
    network training algorithms, arXiv:2306.07179, for the default correction.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_nadamw()
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0]
        tensor([1.9000])
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> NAdamWScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        root = sqrt(debias(beta2, step))
        now = (1 - beta1) * root / debias(beta1, step)
        ahead = beta1 * root / debias(beta1, step + 1 if correct_ahead else step)
        return NAdamWScalars(1 - beta1, beta2, 1 - beta2, now, ahead, at(eps, step) * root)

    def update(g: Tensor, state: ScaleByNAdamWState, p: Tensor | None, s: NAdamWScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * g * g
        return (s.now * g + s.ahead * m) / (safe_sqrt(v) + s.eps), ScaleByNAdamWState(m, v)

    return leafwise(ScaleByNAdamWState, update, scalars, elementwise=True)


@factory
def nadamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    *,
    correct_ahead: bool = False,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """NAdamW: AdamW with Nesterov momentum, the baseline of the AlgoPerf benchmark.

        u = -lr (scale_by_nadamw(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_nadamw`.
        eps: see `scale_by_nadamw`.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        correct_ahead: see `scale_by_nadamw`: True for the numbers of optax.nadamw.
        mask: where parameters decay; see `add_decayed_weights`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Same numbers as timm's NAdamW. torch's NAdam with decoupled decay is `nadam(decoupled_weight_decay=True)`.

    Source: Dahl et al., arXiv:2306.07179.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.nadamw(lr=0.1, weight_decay=0.0)
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0]
        tensor([-0.1900])
    """
    rule = scale_by_nadamw(betas, eps, correct_ahead=correct_ahead)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, mask=mask, maximize=maximize)
