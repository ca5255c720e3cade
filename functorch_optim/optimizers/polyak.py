"""Polyak's step size: as far as the loss is above its minimum, over the squared gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least
from functorch_optim.optimizers._whole import bounded, loss_at, total


@factory
def polyak(
    max_lr: Hyperparameter = 1.0,
    variant: Literal["sps", "sps+"] = "sps",
    *,
    f_min: Hyperparameter = 0.0,
    c: Hyperparameter = 1.0,
    eps: Hyperparameter = 0.0,
) -> GradientTransformation:
    """SGD with Polyak's step size, from the loss of each step. The norm is over all parameters.

        eta = min(max_lr, (f - f_min) / (c |g|^2 + eps))     max(f - f_min, 0) with "sps+"
        u = -eta g

    The loss f is given to every update, `tx.update(grads, state, params, value=loss)`; `opt.step(closure)` gives that
    of the closure. It must belong to the same batch as the gradient. Where |g| and eps are zero, so is the step.

    Args:
        max_lr: largest step size, >= 0: number, 0-dim tensor, or schedule.
        variant: "sps", which goes uphill where the loss is below f_min; or "sps+", which then stands still.
        f_min: smallest loss of a batch: number, 0-dim tensor, or schedule.
        c: factor > 0 of the squared norm; 0.5 for losses that are strongly convex.
        eps: added to it, >= 0.

    Raises:
        ValueError: a number is out of range, or `variant` is neither; the value is no single number.
        TypeError: `update` is called without a value, or it is no number.

    Derivatives flow through the value where it has some. At a tie with max_lr each has half of the derivative.

    Source: Loizou et al., Stochastic Polyak step-size for SGD, arXiv:2002.10542, equation 3. The positive part:
    Garrigos et al., arXiv:2307.14528.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.polyak(max_lr=10.0), torch.tensor([2.0])
        >>> grads, value = torch.func.grad_and_value(lambda p: p.square().sum())(params)
        >>> tx.update(grads, tx.init(params), params, value=value)[0]
        tensor([-1.])
    """
    check("max_lr", max_lr, trees=False)
    check("f_min", f_min, "a number", trees=False)
    check("c", c, "value > 0", trees=False)
    check("epsilon value", eps, trees=False)
    check_choice("variant", variant, "sps", "sps+")

    def scalars(step: Any, *, updates: Any, value: Any) -> Any:
        gap = loss_at(value, step) - at(f_min, step)
        gap = at_least(gap, 0.0) if variant == "sps+" else gap
        size = at(c, step) * total(torch.square, [updates], step) + at(eps, step)
        return bounded(at(max_lr, step), gap, size)

    def update(g: Tensor, state: Any, p: Any, eta: Any) -> Any:
        return -(eta * g), state

    return of_rule(None, update, scalars, elementwise=True, turns=True)
