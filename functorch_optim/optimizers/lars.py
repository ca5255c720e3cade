"""LARS: SGD whose layers move in proportion to their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import masked
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import safe_norm
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.momentum import trace
from functorch_optim.transforms.scaling import scale_by_learning_rate
from functorch_optim.tree import Tree


class LARSScalars(NamedTuple):
    """The numbers of LARS at a step: lambda, the weight decay; eta, the trust coefficient; eps."""

    weight_decay: Any
    trust_coefficient: Any
    eps: Any


@factory
def scale_by_lars(
    weight_decay: Hyperparameter = 0.0, trust_coefficient: Hyperparameter = 1e-3, eps: Hyperparameter = 1e-8
) -> GradientTransformation:
    """Add weight decay, and give each tensor a rate in proportion to the norm of its parameter.

        g <- (g + lambda p) eta |p| / (|g| + lambda |p| + eps)

    Where |p| or |g| is zero, g <- g + lambda p.

    Args:
        weight_decay: lambda >= 0: number, 0-dim tensor, or schedule.
        trust_coefficient: eta >= 0.
        eps: added to the norms, >= 0. The paper has none.

    Raises:
        ValueError: a number is out of range; or `update` is called without parameters.

    Derivatives flow through both norms; where one of them is zero, that of the ratio is zero.

    Source: You et al., Large batch training of convolutional networks, arXiv:1708.03888, algorithm 1. optax divides by
    the norm of the sum, |g + lambda p|.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.scale_by_lars(trust_coefficient=0.1), torch.tensor([3.0, 4.0])
        >>> tx.update(torch.tensor([0.0, 2.0]), tx.init(params), params)[0]
        tensor([0.0000, 0.5000])
    """
    check("weight_decay value", weight_decay)
    check("trust_coefficient", trust_coefficient)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> LARSScalars:
        return LARSScalars(at(weight_decay, step), at(trust_coefficient, step), at(eps, step))

    def update(g: Tensor, state: Any, p: Any, s: LARSScalars) -> Any:
        p_norm, g_norm = safe_norm(p), safe_norm(g)
        is_one = (p_norm == 0) | (g_norm == 0)
        ratio = s.trust_coefficient * p_norm / torch.where(is_one, 1.0, g_norm + s.weight_decay * p_norm + s.eps)
        return (g + s.weight_decay * p) * torch.where(is_one, 1.0, ratio), state

    return leafwise(None, update, scalars, norms=True, needs_params=True)


@factory
def lars(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    trust_coefficient: Hyperparameter = 1e-3,
    eps: Hyperparameter = 1e-8,
    nesterov: bool = False,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """LARS, for large batches: SGD in steps relative to the norm of each tensor.

        d = scale_by_lars(g)
        b <- d  at t = 1,  else  momentum b + d
        u = -lr (d + momentum b)  if nesterov,  else  -lr b

    Args:
        lr: learning rate >= 0, relative to the trust coefficient: number, 0-dim tensor, or schedule.
        momentum: see `trace`; the number 0 switches it off, and no buffer is kept.
        weight_decay: see `scale_by_lars`.
        trust_coefficient: see `scale_by_lars`.
        eps: see `scale_by_lars`.
        nesterov: look ahead, as `sgd` does.
        mask: which parameters decay and are scaled by the ratio: a tree of bools, a prefix of one, or a function of
            the parameters; see `masked`. All others take SGD's step, so that lr is usually too large for them without
            a `partition`. None: all.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range, or nesterov comes without momentum; `update` is called without
            parameters.

    For derivatives see `scale_by_lars`.

    Same numbers as timm's Lars, which takes SGD's step where nothing decays, unless `always_adapt=True`. As there, and
    in torch's SGD, the learning rate stands outside of the sum; in the paper, and in optax, it is inside: that differs
    where it changes.

    Source: You et al., arXiv:1708.03888, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.lars(lr=1.0, trust_coefficient=0.1), torch.tensor([3.0, 4.0])
        >>> tx.update(torch.tensor([0.0, 2.0]), tx.init(params), params)[0]
        tensor([-0.0000, -0.5000])
    """
    scaled = scale_by_lars(weight_decay, trust_coefficient, eps)
    still = is_zero(momentum) and not nesterov
    return uphill_or_down(
        scaled if mask is None else masked(scaled, mask),
        *([] if still else [trace(momentum, nesterov=nesterov)]),
        scale_by_learning_rate(lr),
        maximize=maximize,
    )
