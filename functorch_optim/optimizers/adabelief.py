"""AdaBelief: Adam that divides by the distance of gradients from their mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._rectified import rectification


@leaf_state
class ScaleByBeliefState(NamedTuple):
    """The state of `scale_by_belief` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_var: s, running mean of (g - m)^2: like p.
    """

    exp_avg: Tensor
    exp_avg_var: Tensor


class BeliefScalars(NamedTuple):
    """The numbers of AdaBelief at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        trusted: whether to divide by the root of s.
        rate: sqrt(1 - beta2^t) / (1 - beta1^t), times r_t if it is to be rectified; 1 / (1 - beta1^t) if not trusted.
        eps: eps, added to s.
        root_eps: added to its root: eps, times sqrt(1 - beta2^t) if it is not to be rectified.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    trusted: Any
    rate: Any
    eps: Any
    root_eps: Any


@factory
def scale_by_belief(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999), eps: Hyperparameter = 1e-16, rectify: bool = False
) -> GradientTransformation:
    """Divide the mean of gradients by the root of the mean of squared differences from it.

        m <- beta1 m + (1 - beta1) g
        s <- beta2 s + (1 - beta2) (g - m)^2 + eps
        g <- m / (1 - beta1^t) / (sqrt(s / (1 - beta2^t)) + eps)

    With rectify, r_t and rho_t as in `scale_by_radam`:

        g <- m / (1 - beta1^t) r_t sqrt(1 - beta2^t) / (sqrt(s) + eps)  if rho_t > 5,  else  m / (1 - beta1^t)

    Args:
        betas: decay rates of m and of s, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to s at each step, so that it becomes eps / (1 - beta2) in the end, and to the root; >= 0.
        rectify: whether to wait, as RAdam does, until s can be trusted.

    Raises:
        ValueError: a number is out of range.

    The first g - m is beta1 g, so that the first update is 1 / beta1 in size. In float32 the default eps only matters
    where all gradients are zero.

    Source: Zhuang et al., AdaBelief optimizer: adapting stepsizes by the belief in observed gradients,
    arXiv:2010.07468, algorithm 2, with eps as in the authors' code.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_belief(betas=(0.5, 0.999))
        >>> updates, state = tx.update(torch.tensor([3.0, -3.0]), tx.init(torch.zeros(2)))
        >>> updates.round(decimals=3)
        tensor([ 2., -2.])
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> BeliefScalars:
        beta1, beta2, e = at(betas[0], step), at(betas[1], step), at(eps, step)
        root = sqrt(debias(beta2, step))
        trusted, rate, root_eps = True, root, e * root
        if rectify:
            trusted, r = rectification(beta2, step)
            rate, root_eps = where(trusted, r * root, 1.0), e
        return BeliefScalars(1 - beta1, beta2, 1 - beta2, trusted, rate / debias(beta1, step), e, root_eps)

    def update(g: Tensor, state: ScaleByBeliefState, p: Tensor | None, n: BeliefScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, n.weight1)
        surprise = g - m
        s = n.beta2 * state.exp_avg_var + n.weight2 * surprise * surprise + n.eps
        root = safe_sqrt(s) + n.root_eps
        return n.rate * m / (torch.where(n.trusted, root, 1) if rectify else root), ScaleByBeliefState(m, s)

    return leafwise(ScaleByBeliefState, update, scalars, elementwise=True)


@factory
def adabelief(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-16,
    weight_decay: Hyperparameter = 0.0,
    rectify: bool = False,
    *,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
) -> GradientTransformation:
    """AdaBelief: Adam with large steps where gradients are as expected, and small ones where they are not.

        u = -lr (scale_by_belief(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_belief`.
        eps: see `scale_by_belief`.
        weight_decay: factor >= 0. Unless it is the number 0, `update` needs the parameters.
        rectify: see `scale_by_belief`. The authors' package has it by default; the paper, optax and we do not.
        decoupled_weight_decay: decay as above; if False, weight_decay p is added to the gradient.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Same numbers as the authors' adabelief-pytorch. Source: Zhuang et al., arXiv:2010.07468, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adabelief(lr=0.1, betas=(0.5, 0.999))
        >>> tx.update(torch.tensor([3.0]), tx.init(torch.ones(1)))[0]
        tensor([-0.2000])
    """
    rule = scale_by_belief(betas, eps, rectify)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
