"""RMSprop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import descent
from functorch_optim.transforms.momentum import trace


@leaf_state
class ScaleByRmsState(NamedTuple):
    """The state of `scale_by_rms` for one parameter.

    Attributes:
        square_avg: v, running mean of g^2: like p.
    """

    square_avg: Tensor


@leaf_state
class ScaleByStddevState(NamedTuple):
    """The state of `scale_by_rms(centered=True)` for one parameter.

    Attributes:
        square_avg: v, running mean of g^2: like p.
        grad_avg: m, running mean of g: like p.
    """

    square_avg: Tensor
    grad_avg: Tensor


class RmsScalars(NamedTuple):
    """The numbers of RMSprop at a step: alpha, 1 - alpha, the root of the bias correction, and eps times that root."""

    alpha: Any
    weight: Any
    root: Any
    eps: Any


@factory
def scale_by_rms(
    alpha: Hyperparameter = 0.99, eps: Hyperparameter = 1e-8, centered: bool = False, *, bias_correction: bool = False
) -> GradientTransformation:
    """Divide gradients by the root of the running mean of their squares; centered, by their standard deviation.

        v <- alpha v + (1 - alpha) g^2
        m <- alpha m + (1 - alpha) g
        g <- g / (sqrt(v - m^2) + eps)  if centered,  else  g / (sqrt(v) + eps)
        g <- g / (sqrt(v / (1 - alpha^t)) + eps)  with bias_correction

    Args:
        alpha: decay rate of v and m, >= 0: number, 0-dim tensor, or schedule.
        eps: added to the root, >= 0.
        centered: whether to subtract the squared mean.
        bias_correction: whether to correct v for its beginning at zero, as Adam does; not when centered.

    Raises:
        ValueError: a number is out of range, or a centered mean is to be corrected.

    For a gradient that hardly changes, rounding may make v - m^2 negative. torch.optim takes its root and gets NaN;
    here the difference is set to zero.

    Source: Tieleman & Hinton, Neural networks for machine learning, lecture 6.5, 2012; centered: Graves,
    arXiv:1308.0850, equations 38 to 41, with eps outside of the root.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_rms(alpha=0.75)
        >>> updates, state = tx.update(torch.tensor([3.0]), tx.init(torch.zeros(1)))
        >>> updates
        tensor([2.])
    """
    check("alpha value", alpha)
    check("epsilon value", eps)

    if centered and bias_correction:
        raise ValueError("scale_by_rms corrects no centered means: give centered or bias_correction, not both")

    def scalars(step: Tensor) -> RmsScalars:
        root = sqrt(debias(at(alpha, step), step)) if bias_correction else 1.0
        return RmsScalars(at(alpha, step), 1 - at(alpha, step), root, root * at(eps, step))

    def plain(g: Tensor, state: ScaleByRmsState, p: Tensor | None, s: RmsScalars) -> Any:
        v = s.alpha * state.square_avg + s.weight * g * g
        return g / (safe_sqrt(v) + s.eps), ScaleByRmsState(v)

    def corrected(g: Tensor, state: ScaleByRmsState, p: Tensor | None, s: RmsScalars) -> Any:
        v = s.alpha * state.square_avg + s.weight * g * g
        return s.root * g / (safe_sqrt(v) + s.eps), ScaleByRmsState(v)

    def deviation(g: Tensor, state: ScaleByStddevState, p: Tensor | None, s: RmsScalars) -> Any:
        v = s.alpha * state.square_avg + s.weight * g * g
        m = torch.lerp(state.grad_avg, g, s.weight)
        return g / (safe_sqrt(torch.clamp_min(v - m * m, 0)) + s.eps), ScaleByStddevState(v, m)

    if centered:
        return leafwise(ScaleByStddevState, deviation, scalars, elementwise=True)
    return leafwise(ScaleByRmsState, corrected if bias_correction else plain, scalars, elementwise=True)


@factory
def rmsprop(
    lr: Hyperparameter = 1e-2,
    alpha: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.0,
    centered: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """RMSprop: gradients divided by their recent size, with momentum.

        g <- g + weight_decay p
        b <- momentum b + scale_by_rms(g)
        u = -lr b

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        alpha: see `scale_by_rms`.
        eps: see `scale_by_rms`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        momentum: factor >= 0; the number 0 switches it off, and no buffer is kept.
        centered: see `scale_by_rms`.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.RMSprop, except for the NaN that `scale_by_rms` mentions. Source: Tieleman & Hinton,
    lecture 6.5, 2012.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.rmsprop(lr=0.1, alpha=0.75)
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.2000])}
    """
    rules = [scale_by_rms(alpha, eps, centered)]
    if not is_zero(momentum):
        rules.append(trace(momentum))
    return descent(*rules, lr=lr, weight_decay=weight_decay, maximize=maximize)
