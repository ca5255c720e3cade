"""Rprop: resilient backpropagation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_each, filled_like
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.scaling import scale


@leaf_state
class ScaleByRpropState(NamedTuple):
    """The state of `scale_by_rprop` for one parameter.

    Attributes:
        prev: h, the last gradient, zero where its sign had changed: like p.
        step_size: d, the size of the step, lr at first: like p.
    """

    prev: Tensor
    step_size: Tensor


class RpropScalars(NamedTuple):
    """The numbers of Rprop at a step: the factors by which step sizes shrink and grow, and their bounds."""

    etaminus: Any
    etaplus: Any
    smallest: Any
    largest: Any


@factory
def scale_by_rprop(
    lr: Hyperparameter = 1e-2,
    etas: tuple[Hyperparameter, Hyperparameter] = (0.5, 1.2),
    step_sizes: tuple[Hyperparameter, Hyperparameter] = (1e-6, 50.0),
) -> GradientTransformation:
    """Step by the sign of the gradient; steps grow while the sign stays the same and shrink when it changes.

        d <- clamp(d etaplus)   where g h > 0
        d <- clamp(d etaminus)  where g h < 0,  and there g <- 0
        d <- clamp(d)           elsewhere
        h <- g
        g <- d sign(g)

    Args:
        lr: size of the first step, >= 0: number, 0-dim tensor, or schedule, whose first value is used.
        etas: (etaminus, etaplus), 0 < etaminus < 1 < etaplus.
        step_sizes: smallest and largest size of a step.

    Raises:
        ValueError: a number is out of range.

    The derivative of sign is zero everywhere, and the derivative at a branch is that of the branch taken. So
    derivatives flow through the step sizes only, and at a bound not through the bound. As in torch, step sizes are
    clamped where the gradient is zero, too.

    Source: Riedmiller & Braun, A direct adaptive method for faster backpropagation learning: the RPROP algorithm, 1993,
    without its step back, as in Igel & Hüsken, 2000, algorithm iRprop-, and torch.optim.Rprop.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_rprop(lr=0.1)
        >>> updates, state = tx.update(torch.tensor([3.0, -5.0]), tx.init(torch.zeros(2)))
        >>> tx.update(torch.tensor([3.0, 5.0]), state)[0]
        tensor([0.1200, 0.0000])
    """
    check("learning rate", lr)
    check_each("etas", etas, ("0 < value < 1", "value > 1"), "(0.5, 1.2)")
    check_each("step_sizes", step_sizes, ("value >= 0", "value >= 0"), "(1e-6, 50.0)")

    def init(p: Tensor) -> ScaleByRpropState:
        return ScaleByRpropState(torch.zeros_like(p), filled_like(p, lr))

    def scalars(step: Tensor) -> RpropScalars:
        return RpropScalars(*[at(value, step) for value in (*etas, *step_sizes)])

    def update(g: Tensor, state: ScaleByRpropState, p: Tensor | None, s: RpropScalars) -> Any:
        same = g * state.prev
        factor = torch.where(same > 0, s.etaplus, torch.where(same < 0, s.etaminus, torch.ones_like(g)))
        d = torch.clamp_max(torch.clamp_min(state.step_size * factor, s.smallest), s.largest)
        h = torch.where(same < 0, torch.zeros_like(g), g)
        return d * torch.sign(h), ScaleByRpropState(h, d)

    return leafwise(init, update, scalars, elementwise=True)


@factory
def rprop(
    lr: Hyperparameter = 1e-2,
    etas: tuple[Hyperparameter, Hyperparameter] = (0.5, 1.2),
    step_sizes: tuple[Hyperparameter, Hyperparameter] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Rprop: steps whose size does not depend on the size of the gradient; for full batches.

        u = -scale_by_rprop(g)

    Args:
        lr: see `scale_by_rprop`.
        etas: see `scale_by_rprop`.
        step_sizes: see `scale_by_rprop`.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.Rprop. Source: Riedmiller & Braun, 1993; see `scale_by_rprop`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.rprop(lr=0.1)
        >>> updates, state = tx.update({"w": torch.full((1,), 3.0)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.1000])}
    """
    return uphill_or_down(scale_by_rprop(lr, etas, step_sizes), scale(-1.0), maximize=maximize)
