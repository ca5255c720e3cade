"""Lookahead: slow weights that follow the fast ones of any transformation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.wrappers._wrapping import around, copied, wrapped, wrapper


@leaf_state
class LookaheadState(NamedTuple):
    """The state of `lookahead` for one parameter; that of a tree has `step` in front.

    Attributes:
        slow: the slow weights: like p, and in float32 where p is in half precision.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.lookahead(fo.sgd(0.1)).init(torch.ones(1))[1].slow
        tensor([1.])
    """

    slow: Tensor


class LookaheadScalars(NamedTuple):
    """The numbers of Lookahead at a step: alpha, and whether slow and fast weights meet."""

    alpha: Any
    due: Any


def lookahead(tx: Any, every: Hyperparameter = 5, slow_step_size: Hyperparameter = 0.5) -> Any:
    """Take k steps, move slow weights a part of the way to where they lead, and go on from there.

        p <- p + tx(g)
        every k steps: slow <- slow + alpha (p - slow), p <- slow

    The slow weights begin as the initial parameters. The state of `tx` is kept when slow and fast weights meet.

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.
        every: k >= 1: number, 0-dim tensor, or schedule.
        slow_step_size: alpha in [0, 1]: number, 0-dim tensor, or schedule.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and a `LookaheadState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `tx` is neither a transformation nor a factory.

    Evaluate with the slow weights: `fo.eval_params(tx, state, params)`, or within `opt.averaged()`. timm's Lookahead
    begins with the weights at the first meeting, and so its first one moves nothing.

    Source: Zhang et al., arXiv:1907.08610, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.lookahead(fo.sgd(1.0), every=2), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     params, state = fo.step(tx, -torch.ones(1), state, params)
        ...     print(params, fo.eval_params(tx, state, params))
        tensor([1.]) tensor([0.])
        tensor([1.]) tensor([1.])
    """
    check("every", every, "value >= 1")
    check("slow_step_size", slow_step_size, "0 <= value <= 1")
    return wrapped(tx, _lookahead, "lookahead(adamw(1e-3), every=5)", every=every, slow_step_size=slow_step_size)


@wrapper
def _lookahead(
    tx: GradientTransformation, every: Hyperparameter, slow_step_size: Hyperparameter
) -> GradientTransformation:
    def scalars(step: Tensor) -> LookaheadScalars:
        return LookaheadScalars(at(slow_step_size, step), step % at(every, step) == 0)

    def update(u: Tensor, state: LookaheadState, p: Any, s: LookaheadScalars) -> Any:
        slow = torch.lerp(state.slow, p + u, s.alpha)
        return torch.where(s.due, slow - p, u), LookaheadState(torch.where(s.due, slow, state.slow))

    def evaluate(p: Tensor, state: LookaheadState) -> Tensor:
        return state.slow

    after = of_rule(_initial, update, scalars, elementwise=True, needs_params=True, evaluate=evaluate, sparse="dense")
    return around(tx, None, after)


def _initial(p: Tensor) -> LookaheadState:
    return LookaheadState(copied(p))
