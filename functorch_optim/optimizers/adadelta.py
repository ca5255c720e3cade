"""Adadelta."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import safe_sqrt
from functorch_optim.optimizers._descent import descent


@leaf_state
class ScaleByAdadeltaState(NamedTuple):
    """The state of `scale_by_adadelta` for one parameter.

    Attributes:
        square_avg: v, running mean of g^2: like p.
        acc_delta: w, running mean of squared steps: like p.
    """

    square_avg: Tensor
    acc_delta: Tensor


class AdadeltaScalars(NamedTuple):
    """The numbers of Adadelta at a step: rho, 1 - rho, eps."""

    rho: Any
    weight: Any
    eps: Any


@factory
def scale_by_adadelta(rho: Hyperparameter = 0.9, eps: Hyperparameter = 1e-6) -> GradientTransformation:
    """Give steps the units of the parameters: the root mean square of steps over that of gradients.

        v <- rho v + (1 - rho) g^2
        d = sqrt(w + eps) / sqrt(v + eps) g
        w <- rho w + (1 - rho) d^2
        g <- d

    Args:
        rho: decay rate in [0, 1]: number, 0-dim tensor, or schedule.
        eps: added under both roots, >= 0.

    Raises:
        ValueError: a number is out of range.

    Source: Zeiler, arXiv:1212.5701, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adadelta()
        >>> updates, state = tx.update(torch.ones(1), tx.init(torch.ones(1)))
        >>> updates
        tensor([0.0032])
    """
    check("rho value", rho, "0 <= value <= 1")
    check("epsilon value", eps)

    def scalars(step: Tensor) -> AdadeltaScalars:
        return AdadeltaScalars(at(rho, step), 1 - at(rho, step), at(eps, step))

    def update(g: Tensor, state: ScaleByAdadeltaState, p: Tensor | None, s: AdadeltaScalars) -> Any:
        v = s.rho * state.square_avg + s.weight * g * g
        d = safe_sqrt(state.acc_delta + s.eps) / safe_sqrt(v + s.eps) * g
        w = s.rho * state.acc_delta + s.weight * d * d
        return d, ScaleByAdadeltaState(v, w)

    return leafwise(ScaleByAdadeltaState, update, scalars, elementwise=True)


@factory
def adadelta(
    lr: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adadelta: steps in the units of the parameters, which need no learning rate in principle.

        g <- g + weight_decay p
        u = -lr scale_by_adadelta(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        rho: see `scale_by_adadelta`.
        eps: see `scale_by_adadelta`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.Adadelta. Source: Zeiler, arXiv:1212.5701, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adadelta()
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.0032])}
    """
    return descent(scale_by_adadelta(rho, eps), lr=lr, weight_decay=weight_decay, maximize=maximize)
