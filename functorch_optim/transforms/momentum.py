"""Momentum."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, is_zero
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory, leafwise
from functorch_optim._numerics import where


@leaf_state
class TraceState(NamedTuple):
    """The state of `trace` for one parameter.

    Attributes:
        momentum_buffer: b: like p.
    """

    momentum_buffer: Tensor


class TraceScalars(NamedTuple):
    """What `trace` needs at a step: mu, and what a new gradient counts for."""

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
