"""NovoGrad: Adam with one second moment for each tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim._numerics import or_one, safe_norm, safe_sqrt, where
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.scaling import scale_by_learning_rate


@leaf_state
class NovoGradState(NamedTuple):
    """The state of `novograd` for one parameter.

    Attributes:
        exp_avg: m, momentum: like p.
        exp_avg_sq: v, running mean of |g|^2: 0-dim, float32 at least.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class NovoGradScalars(NamedTuple):
    """The numbers of NovoGrad at a step: the factors of m and d, of v and |g|^2, eps and weight decay."""

    beta1: Any
    weight1: Any
    beta2: Any
    weight2: Any
    eps: Any
    decay: Any


@factory
def novograd(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.98),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    grad_averaging: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """NovoGrad: the gradient of each tensor is divided by the running mean of its norm, then momentum is taken.

        v <- beta2 v + (1 - beta2) |g|^2,  |g|^2 at the first step
        d = g / (sqrt(v) + eps) + weight_decay p
        m <- beta1 m + d,  (1 - beta1) d if grad_averaging
        u = -lr m

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates of m and of v, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: >= 0; inside of m. Unless it is the number 0, `update` needs the parameters.
        grad_averaging: let m be a mean.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    timm starts v again whenever it is zero, and optax has betas (0.9, 0.25). With grad_averaging the first m is
    (1 - beta1) d, as in timm; pytorch_optimizer's is d. Derivatives are finite at zero gradients.

    Source: Ginsburg et al., arXiv:1905.11286, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.novograd(lr=0.1), torch.zeros(2)
        >>> tx.update(torch.tensor([3.0, 4.0]), tx.init(params))[0]
        tensor([-0.0600, -0.0800])
    """
    check_betas(betas)
    check("epsilon value", eps)
    check("weight_decay value", weight_decay)
    decays = not is_zero(weight_decay)

    def scalars(step: Any) -> NovoGradScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        kept = where(step == 1, 0.0, beta2)
        return NovoGradScalars(
            beta1, 1 - beta1 if grad_averaging else 1.0, kept, 1 - kept, at(eps, step), at(weight_decay, step)
        )

    def update(g: Tensor, state: NovoGradState, p: Any, s: NovoGradScalars) -> Any:
        v = s.beta2 * state.exp_avg_sq + s.weight2 * safe_norm(g).square()
        root = safe_sqrt(v) + s.eps
        d = g / or_one(root)
        d = d + s.decay * p if decays else d
        m = s.beta1 * state.exp_avg + s.weight1 * d
        return m, NovoGradState(m, v)

    rule = leafwise(_init, update, scalars, norms=True, needs_params=decays)
    return uphill_or_down(rule, scale_by_learning_rate(lr), maximize=maximize)


def _init(p: Tensor) -> NovoGradState:
    return NovoGradState(torch.zeros_like(p), p.new_zeros((), dtype=common_dtype([p])))
