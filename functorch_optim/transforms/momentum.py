"""Momentum: sums and means of past gradients."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias as debias_weight
from functorch_optim._numerics import where


@leaf_state
class TraceState(NamedTuple):
    """The state of `trace` for one parameter.

    Attributes:
        momentum_buffer: b: like p.
    """

    momentum_buffer: Tensor


class TraceScalars(NamedTuple):
    """The numbers of `trace` at a step: mu, and the weight of a new gradient."""

    momentum: Any
    gain: Any


@factory
def trace(
    momentum: Hyperparameter = 0.9, dampening: Hyperparameter = 0.0, nesterov: bool = False
) -> GradientTransformation:
    """Accumulate a decaying sum of gradients, as torch's SGD does.

        b_1 = g_1
        b_t = mu b_{t-1} + (1 - tau) g_t
        g_t <- g_t + mu b_t  if nesterov,  else  b_t

    Args:
        momentum: mu >= 0: number, 0-dim tensor, or schedule.
        dampening: tau: number, 0-dim tensor, or schedule. The first gradient is not dampened.
        nesterov: look ahead; needs momentum and no dampening.

    Raises:
        ValueError: a number is out of range, or nesterov comes with dampening or without momentum.

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013, in the form
    that torch.optim.SGD gives it: the learning rate stands outside of the sum.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.trace(momentum=0.5)
        >>> updates, state = tx.update(torch.ones(1), tx.init(torch.ones(1)))
        >>> tx.update(torch.ones(1), state)[0]
        tensor([1.5000])
    """
    check("momentum value", momentum)
    check("dampening value", dampening, "a number")
    if nesterov and (is_zero(momentum) or (isinstance(dampening, Real) and dampening != 0)):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={momentum!r} and dampening={dampening!r}"
        )

    def scalars(step: Tensor) -> TraceScalars:
        gain = 1.0 if is_zero(dampening) else where(step == 1, 1.0, 1 - at(dampening, step))
        return TraceScalars(at(momentum, step), gain)

    def update(g: Tensor, state: TraceState, p: Tensor | None, s: TraceScalars) -> Any:
        b = s.momentum * state.momentum_buffer + s.gain * g
        return g + s.momentum * b if nesterov else b, TraceState(b)

    return leafwise(TraceState, update, scalars, elementwise=True, sparse="dense")


@leaf_state
class EmaState(NamedTuple):
    """The state of `ema` for one parameter.

    Attributes:
        exp_avg: m: like p.
    """

    exp_avg: Tensor


class EmaScalars(NamedTuple):
    """The numbers of `ema` at a step: 1 - beta, and the factor that corrects m for its start at zero."""

    weight: Any
    factor: Any


@factory
def ema(decay: Hyperparameter, debias: bool = True) -> GradientTransformation:
    """Replace updates by their exponential moving average.

        m <- beta m + (1 - beta) g
        g <- m / (1 - beta^t)  if debias,  else  m

    The average is of updates, not of parameters.

    Args:
        decay: beta in [0, 1): number, 0-dim tensor, or schedule.
        debias: divide by the weight that m has gathered.

    Raises:
        ValueError: the number is out of range.

    Same numbers as optax.ema. Source: Kingma & Ba, arXiv:1412.6980, section 3.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.ema(0.5)
        >>> updates, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
        >>> tx.update(torch.tensor([4.0]), state)[0]
        tensor([3.])
    """
    check("decay", decay, "0 <= value < 1")

    def scalars(step: Tensor) -> EmaScalars:
        beta = at(decay, step)
        return EmaScalars(1 - beta, 1 / debias_weight(beta, step) if debias else 1.0)

    def update(g: Tensor, state: EmaState, p: Tensor | None, s: EmaScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight)
        return s.factor * m if debias else m, EmaState(m)

    return leafwise(EmaState, update, scalars, elementwise=True, sparse="dense")


@leaf_state
class OptimisticGradientState(NamedTuple):
    """The state of `optimistic_gradient` for one parameter.

    Attributes:
        prev_grad: g_{t-1}: like p.
    """

    prev_grad: Tensor


@factory
def optimistic_gradient(alpha: Hyperparameter = 1.0, beta: Hyperparameter = 1.0) -> GradientTransformation:
    """Add the change of the gradient to the gradient: `g_t <- (alpha + beta) g_t - beta g_{t-1}`, with g_0 = g_1.

    It is for games and saddle points, where plain descent circles.

    Args:
        alpha: weight of the gradient: number, 0-dim tensor, or schedule.
        beta: weight of its change: number, 0-dim tensor, or schedule.

    Raises:
        ValueError: a number is NaN.

    Same numbers as optax.scale_by_optimistic_gradient. Source: Mokhtari et al., A Unified Analysis of Extra-gradient
    and Optimistic Gradient Methods, arXiv:1901.08511.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.optimistic_gradient()
        >>> updates, state = tx.update(torch.tensor([1.0]), tx.init(torch.zeros(1)))
        >>> updates, tx.update(torch.tensor([3.0]), state)[0]
        (tensor([1.]), tensor([5.]))
    """
    check("alpha", alpha, "a number")
    check("beta", beta, "a number")

    def scalars(step: Tensor) -> tuple[Any, Any]:
        b = where(step == 1, 0.0, at(beta, step))
        return at(alpha, step) + b, b

    def update(g: Tensor, state: OptimisticGradientState, p: Tensor | None, s: Any) -> Any:
        now, before = s
        return now * g - before * state.prev_grad, OptimisticGradientState(g)

    return leafwise(OptimisticGradientState, update, scalars, elementwise=True, sparse="dense")
