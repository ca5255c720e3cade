"""StableAdamW: AdamW that slows down where its estimate is out of date."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least, clamped_from_below, debias, rms, safe_sqrt
from functorch_optim.optimizers._descent import check_real, uphill_or_down
from functorch_optim.transforms.scaling import scale_by_learning_rate


@leaf_state
class StableAdamWState(NamedTuple):
    """The state of `stable_adamw` for one parameter.

    Attributes:
        exp_avg: m, corrected running mean of g: like p.
        exp_avg_sq: v, corrected running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class StableAdamWScalars(NamedTuple):
    """The numbers of StableAdamW at a step: 1 - b1, 1 - b2, eps, the weight decay."""

    weight1: Any
    weight2: Any
    eps: Any
    decay: Any


@factory
def stable_adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 1e-2,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """StableAdamW: AdamW with Adafactor's clipping, so that it needs no clipping of gradients.

        b1 = beta1 (1 - beta1^(t-1)) / (1 - beta1^t),  b2 likewise
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        c = max(1, RMS(g / max(sqrt(v), eps)))
        u = -lr / c (m / (sqrt(v) + eps) + weight_decay p)

    RMS is over the elements of each tensor.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates, in [0, 1). m and v are the corrected means of Adam.
        eps: smallest root in c, and added to the root of the step, >= 0.
        weight_decay: decoupled, and slowed down too, >= 0. Unless it is the number 0, `update` needs the parameters.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    Derivatives flow through c where it is clipped, RMS = 1 included. A NaN in the gradient stays in its element: c is
    1 there.

    Same numbers as pytorch_optimizer's StableAdamW.

    Source: Wortsman et al., Stable and low-precision training for large-scale vision-language models, arXiv:2304.13013,
    algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.stable_adamw(lr=0.1, weight_decay=0.5), torch.ones(1)
        >>> tx.update(torch.tensor([3.0]), tx.init(params), params)[0]
        tensor([-0.1500])
    """
    check_betas(betas)
    check("epsilon value", eps)
    check("weight_decay value", weight_decay)
    decays = not is_zero(weight_decay)

    def init(p: Tensor) -> StableAdamWState:
        check_real("StableAdamW", p)
        return StableAdamWState(torch.zeros_like(p), torch.zeros_like(p))

    def scalars(step: Tensor) -> StableAdamWScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        weight1, weight2 = (1 - beta1) / debias(beta1, step), (1 - beta2) / debias(beta2, step)
        return StableAdamWScalars(weight1, weight2, at(eps, step), at(weight_decay, step))

    def update(g: Tensor, state: StableAdamWState, p: Any, s: StableAdamWScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = (1 - s.weight2) * state.exp_avg_sq + s.weight2 * g * g
        root = safe_sqrt(v)
        c = clamped_from_below(rms(g / at_least(root, s.eps)), 1)
        u = m / (root + s.eps)
        return (u + s.decay * p if decays else u) / c, StableAdamWState(m, v)

    rule = of_rule(init, update, scalars, norms=True, needs_params=decays, decays=decays)
    return uphill_or_down(rule, scale_by_learning_rate(lr), maximize=maximize)
