"""DoG, L-DoG and DoWG: the step is the distance gone, over the root of the sum of squared gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, at_first, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim._numerics import maximum, quotient, safe_norm, safe_sqrt
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._whole import or_first, total


class DoGCarried(NamedTuple):
    """The numbers that DoG carries on: the largest distance, and the sum of squared gradients."""

    rbar: Any
    G: Any


class DoGState(NamedTuple):
    """The state of `dog` for one parameter; that of a tree has `rbar` and `G` after `step`: 0-dim float64 tensors.

    Attributes:
        p0: the parameter at the start: like p.
    """

    p0: Tensor


leaf_state(DoGState, DoGCarried)


@leaf_state
class LDoGState(NamedTuple):
    """The state of `ldog` for one parameter.

    Attributes:
        p0: the parameter at the start: like p.
        rbar: largest distance from it: 0-dim, float32 at least.
        G: sum of squared gradients: 0-dim, float32 at least.
    """

    p0: Tensor
    rbar: Tensor
    G: Tensor


class DoWGCarried(NamedTuple):
    """The numbers that DoWG carries on: the largest squared distance, and the weighted sum of squared gradients."""

    r2: Any
    v: Any


class DoWGState(NamedTuple):
    """The state of `dowg` for one parameter; that of a tree has `r2` and `v` after `step`: 0-dim float64 tensors.

    Attributes:
        p0: the parameter at the start: like p.
    """

    p0: Tensor


leaf_state(DoWGState, DoWGCarried)


@factory
def dog(
    lr: Hyperparameter = 1.0,
    eps: Hyperparameter = 1e-8,
    reps_rel: Hyperparameter = 1e-6,
    *,
    weight_decay: Hyperparameter = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """DoG, distance over gradients: SGD without a learning rate to tune. Norms are over all parameters.

        g <- g + weight_decay p
        rbar <- max(rbar, |p - p0|),  reps_rel (1 + |p0|) at first
        G <- G + |g|^2
        u = -lr rbar / sqrt(G + eps) g

    Evaluate an average of the iterates; the last one alone is much worse.

    Args:
        lr: factor >= 0 of the step, 1 for most: number, 0-dim tensor, or schedule.
        eps: added to G, >= 0.
        reps_rel: first distance, relative to the norm of the parameters, > 0; 1e-4 with batch normalization.
        weight_decay: L2 penalty >= 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    Same numbers as the authors' dog-optimizer. Source: Ivgi et al., arXiv:2302.12022, equations 1 and 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.dog(reps_rel=0.1), torch.ones(1)
        >>> updates, state = tx.update(torch.full((1,), 5.0), tx.init(params), params)
        >>> updates, state[1].rbar
        (tensor([-0.2000]), tensor(0.2000, dtype=torch.float64))
    """
    _check_dog(lr, eps, reps_rel, trees=False)

    def carry() -> DoGCarried:
        return DoGCarried(0.0, 0.0)

    def scalars(step: Any, carried: DoGCarried, *, updates: Any, params: Any, states: Any) -> Any:
        before = or_first(
            carried.rbar, lambda: at(reps_rel, step) * (1 + safe_sqrt(total(torch.square, [states.p0], step)))
        )
        r2, g2 = total(_terms, [updates, states.p0, params], step)
        rbar = maximum(before, safe_sqrt(r2))
        G = carried.G + g2  # noqa: N806
        return quotient(rbar, safe_sqrt(G + at(eps, step))), DoGCarried(rbar, G)

    def update(g: Tensor, state: DoGState, p: Any, eta: Any) -> Any:
        return eta * g, state

    rule = of_rule(_init_dog, update, scalars, carry=carry, elementwise=True, needs_params=True)
    return descent(rule, lr=lr, weight_decay=weight_decay, maximize=maximize)


@factory
def ldog(
    lr: Hyperparameter = 1.0,
    eps: Hyperparameter = 1e-8,
    reps_rel: Hyperparameter = 1e-6,
    *,
    weight_decay: Hyperparameter = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """L-DoG: `dog` for each tensor by itself, with norms of that tensor alone.

    Args:
        lr: see `dog`.
        eps: see `dog`.
        reps_rel: see `dog`.
        weight_decay: see `dog`.
        maximize: see `dog`.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    Same numbers as the authors' dog-optimizer. Source: Ivgi et al., arXiv:2302.12022, section 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.ldog(reps_rel=0.1), [torch.ones(1), torch.zeros(1)]
        >>> tx.update([torch.full((1,), 5.0), torch.full((1,), 5.0)], tx.init(params), params)[0]
        [tensor([-0.2000]), tensor([-0.1000])]
    """
    _check_dog(lr, eps, reps_rel, trees=True)

    def scalars(step: Any) -> tuple[Any, Any]:
        return at(eps, step), at(reps_rel, step)

    def update(g: Tensor, state: LDoGState, p: Any, s: tuple[Any, Any]) -> Any:
        e, relative = s
        first = relative * (1 + safe_norm(state.p0))
        rbar = torch.maximum(torch.where(state.rbar == 0, first, state.rbar), safe_norm(p - state.p0))
        G = state.G + safe_norm(g).square()  # noqa: N806
        return quotient(rbar, safe_sqrt(G + e)) * g, LDoGState(state.p0, rbar, G)

    rule = of_rule(_init_ldog, update, scalars, norms=True, needs_params=True)
    return descent(rule, lr=lr, weight_decay=weight_decay, maximize=maximize)


@factory
def dowg(
    lr: Hyperparameter = 1.0,
    eps: Hyperparameter = 1e-4,
    d0_squared: Hyperparameter = 1e-4,
    *,
    weight_decay: Hyperparameter = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """DoWG, distance over weighted gradients. Norms are over all parameters.

        g <- g + weight_decay p
        r2 <- max(r2, |p - p0|^2),  d0_squared at first
        v <- v + r2 |g|^2
        u = -lr r2 / (sqrt(v) + eps) g

    Args:
        lr: factor >= 0 of the step, 1 for most: number, 0-dim tensor, or schedule.
        eps: added to the root, >= 0.
        d0_squared: first squared distance, > 0.
        weight_decay: L2 penalty >= 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    Source: Khaled et al., DoWG unleashed, arXiv:2305.16284, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.dowg(d0_squared=0.01, eps=0.0), torch.ones(1)
        >>> tx.update(torch.full((1,), 5.0), tx.init(params), params)[0]
        tensor([-0.1000])
    """
    check("learning rate", lr)
    check("epsilon value", eps, trees=False)
    check("d0_squared", d0_squared, "value > 0", trees=False)

    def carry() -> DoWGCarried:
        return DoWGCarried(at_first(d0_squared), 0.0)

    def scalars(step: Any, carried: DoWGCarried, *, updates: Any, params: Any, states: Any) -> Any:
        r2, g2 = total(_terms, [updates, states.p0, params], step)
        r2 = maximum(carried.r2, r2)
        v = carried.v + r2 * g2
        return quotient(r2, safe_sqrt(v) + at(eps, step)), DoWGCarried(r2, v)

    def update(g: Tensor, state: DoWGState, p: Any, eta: Any) -> Any:
        return eta * g, state

    rule = of_rule(_init_dowg, update, scalars, carry=carry, elementwise=True, needs_params=True)
    return descent(rule, lr=lr, weight_decay=weight_decay, maximize=maximize)


def _check_dog(lr: Any, eps: Any, reps_rel: Any, trees: bool) -> None:
    check("learning rate", lr)
    check("epsilon value", eps, trees=trees)
    check("reps_rel", reps_rel, "value > 0", trees=trees)


def _terms(g: Tensor, p0: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return (p - p0).square(), g.square()


def _init_dog(p: Tensor) -> DoGState:
    return DoGState(p.clone())


def _init_dowg(p: Tensor) -> DoWGState:
    return DoWGState(p.clone())


def _init_ldog(p: Tensor) -> LDoGState:
    zero = p.new_zeros((), dtype=common_dtype([p]))
    return LDoGState(p.clone(), zero, zero.clone())
