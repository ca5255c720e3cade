"""ASGD: averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, at_first, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least, double
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.decay import add_decayed_weights


class ASGDCarried(NamedTuple):
    """The numbers that ASGD's scalars carry on: the next step's learning rate, and its weight in the average."""

    eta: Any
    mu: Any


class ASGDState(NamedTuple):
    """The state of ASGD for one parameter; that of a tree has `eta` and `mu`, for the next step, after `step`.

    Attributes:
        ax: a, average of the parameters: like p.
    """

    ax: Tensor


leaf_state(ASGDState, ASGDCarried)


class ASGDScalars(NamedTuple):
    """The numbers of ASGD at a step: eta_t, lambda eta_t, mu_t, and whether it is 1, so that infinity is copied."""

    eta: Any
    decay: Any
    mu: Any
    copies: Any


@factory
def asgd(
    lr: Hyperparameter = 1e-2,
    lambd: Hyperparameter = 1e-4,
    alpha: Hyperparameter = 0.75,
    t0: Hyperparameter = 1e6,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Averaged stochastic gradient descent, with decay of the learning rate and of the parameters.

        g <- g + weight_decay p
        eta_1 = lr,  eta_{t+1} = lr / (1 + lambd lr t)^alpha
        mu_1 = 1,  mu_{t+1} = 1 / max(1, t - t0)
        u = -eta_t (g + lambd p)
        a <- a + mu_t (p + u - a)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        lambd: decay of parameters and of the learning rate, >= 0.
        alpha: power of the learning rate's decay.
        t0: number of steps before the average begins; until then it equals the last parameters.
        weight_decay: L2 penalty >= 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    Evaluate with the average: `fo.eval_params(tx, state, params)`, or within `opt.averaged()` of an `fo.Optimizer`.
    Derivatives with respect to t0 flow from the step t0 + 1 on, where the average begins.

    The averaged parameters are in the state: `fo.tree.get(state, "ax")`. As in torch.optim.ASGD, eta lags behind by a
    step: a learning rate that changes acts on the step after the next. The numbers eta and mu are states of the whole
    tree, in float64. (The stateful forms keep them for each parameter, in float32, as torch.optim.ASGD does.)

    Source: Polyak & Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 1992, with
    the schedules of Bottou's SVM-SGD as in torch.optim.ASGD.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.asgd(lr=0.1), torch.ones(1)
        >>> updates, state = tx.update(torch.full((1,), 5.0), tx.init(params), params)
        >>> updates, fo.tree.get(state, "ax")
        (tensor([-0.5000]), tensor([0.5000]))
    """
    check("learning rate", lr)
    check("lambd value", lambd)
    check("alpha value", alpha, "a number")
    check("t0 value", t0, "a number")

    def carry() -> ASGDCarried:
        return ASGDCarried(at_first(lr), 1.0)

    def scalars(step: Tensor, carried: ASGDCarried) -> tuple[ASGDScalars, ASGDCarried]:
        eta, mu = double(carried.eta), double(carried.mu)
        eta_next = at(lr, step) / (1 + at(lambd, step) * at(lr, step) * step) ** at(alpha, step)
        mu_next = 1 / at_least(step - at(t0, step), 1.0)
        return ASGDScalars(eta, at(lambd, step) * eta, mu, mu == 1), ASGDCarried(eta_next, mu_next)

    def update(g: Tensor, state: ASGDState, p: Any, s: ASGDScalars) -> Any:
        u = -(s.eta * g + s.decay * p)
        moved = p + u
        return u, ASGDState(torch.where(s.copies, moved, torch.lerp(state.ax, moved, s.mu)))

    def evaluate(p: Tensor, state: ASGDState) -> Tensor:
        return state.ax

    rule = of_rule(
        _initial,
        update,
        scalars,
        carry=carry,
        elementwise=True,
        needs_params=True,
        evaluate=evaluate,
        narrow=True,
        lr=lr,
        turns=True,
    )
    return uphill_or_down(add_decayed_weights(weight_decay), rule, maximize=maximize)


def _initial(p: Tensor) -> ASGDState:
    return ASGDState(p.clone())  # the average of no steps
