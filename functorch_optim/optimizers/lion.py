"""Lion: the sign of two means of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers._descent import descent
from functorch_optim.tree import Tree


@leaf_state
class ScaleByLionState(NamedTuple):
    """The state of `scale_by_lion` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
    """

    exp_avg: Tensor


class LionScalars(NamedTuple):
    """The numbers of Lion at a step: beta1, 1 - beta1, 1 - beta2."""

    beta1: Any
    weight1: Any
    weight2: Any


@factory
def scale_by_lion(betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99)) -> GradientTransformation:
    """Replace gradients by the sign of their running mean, in which the latest one counts for more than it will later.

        c = beta1 m + (1 - beta1) g
        m <- beta2 m + (1 - beta2) g
        g <- sign(c)

    Args:
        betas: weight of m in the step, and decay rate of m, in [0, 1): numbers, 0-dim tensors, or schedules.

    Raises:
        ValueError: a number is out of range.

    The sign has derivative zero, and is zero at zero. So updates have no derivative by gradients, state or betas.
    There is no bias correction: a sign needs none.

    Source: Chen et al., Symbolic discovery of optimization algorithms, arXiv:2302.06675, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_lion()
        >>> updates, state = tx.update(torch.tensor([3.0, -0.2, 0.0]), tx.init(torch.zeros(3)))
        >>> updates, state.exp_avg.round(decimals=3)
        (tensor([ 1., -1.,  0.]), tensor([ 0.0300, -0.0020,  0.0000]))
    """
    check_betas(betas)

    def scalars(step: Tensor) -> LionScalars:
        beta1 = at(betas[0], step)
        return LionScalars(beta1, 1 - beta1, 1 - at(betas[1], step))

    def update(g: Tensor, state: ScaleByLionState, p: Tensor | None, s: LionScalars) -> Any:
        c = s.beta1 * state.exp_avg + s.weight1 * g
        return torch.sign(c), ScaleByLionState(torch.lerp(state.exp_avg, g, s.weight2))

    return leafwise(ScaleByLionState, update, scalars, elementwise=True)


@factory
def lion(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.99),
    weight_decay: Hyperparameter = 0.0,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """Lion: a step of the learning rate for every element, in the memory of one running mean.

        u = -lr (scale_by_lion(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule. Three to ten times smaller than AdamW's is usual.
        betas: see `scale_by_lion`.
        weight_decay: decoupled, >= 0; three to ten times larger than AdamW's is usual. Unless it is the number 0,
            `update` needs the parameters.
        mask: where parameters decay; see `add_decayed_weights`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Of the hyperparameters only lr and weight_decay have a derivative: see `scale_by_lion`. Same numbers as
    lion-pytorch. Source: Chen et al., arXiv:2302.06675, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.lion(lr=0.1, weight_decay=0.5), torch.ones(2)
        >>> tx.update(torch.tensor([3.0, -0.2]), tx.init(params), params)[0]
        tensor([-0.1500,  0.0500])
    """
    rule = scale_by_lion(betas)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, mask=mask, maximize=maximize)
