"""Averages of the parameters over the steps of any transformation: exponential, equal, and polynomial."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._numerics import minimum, quotient, where
from functorch_optim.wrappers._wrapping import around, copied, wrapped, wrapper


class AverageCarried(NamedTuple):
    """The numbers that an average carries on: the number of parameters in it, and the sum of their weights."""

    n_averaged: Any
    weight_sum: Any


class AverageState(NamedTuple):
    """The state of an average for one parameter; of a tree it has `step`, `n_averaged` and `weight_sum` in front.

    Attributes:
        average: a: like p, and in float32 where p is in half precision.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.ema_weights(fo.sgd(0.1), 0.99).init(torch.ones(1))[1].average
        tensor([1.])
    """

    average: Tensor


leaf_state(AverageState, AverageCarried)


class AverageScalars(NamedTuple):
    """The numbers of an average at a step: the weight of the parameters, and whether they enter it."""

    weight: Any
    due: Any


Weights = Callable[[Any, Any], tuple[Any, Any]]
"""(step, n) -> the factor of the weights so far, and the weight of the n-th parameters."""


def _averaged(
    tx: GradientTransformation, weights: Weights, start: Hyperparameter, every: Hyperparameter, initial: float
) -> GradientTransformation:
    """Average the parameters after some steps.

    Args:
        tx: makes the steps.
        weights: of the average.
        start: number of steps before it begins.
        every: number of steps between two parameters in it.
        initial: weight of the parameters with which it begins.
    """
    skips = not (isinstance(every, Real) and every == 1)

    def carry() -> AverageCarried:
        return AverageCarried(0.0, initial)

    def scalars(step: Tensor, carried: AverageCarried) -> Any:
        since, n = step - at(start, step), carried.n_averaged + 1
        begun = since > 0
        due = begun & (since % at(every, step) == 0)
        factor, weight = weights(step, n)
        total = factor * carried.weight_sum + weight
        new = AverageCarried(where(due, n, carried.n_averaged), where(due, total, carried.weight_sum))
        # Until it begins, the average is the latest parameters.
        return AverageScalars(where(begun, quotient(weight, total), 1.0), due | (since <= 0)), new

    def update(u: Tensor, state: AverageState, p: Any, s: AverageScalars) -> Any:
        average = torch.lerp(state.average, p + u, s.weight)
        return u, AverageState(torch.where(s.due, average, state.average) if skips else average)

    def evaluate(p: Tensor, state: AverageState) -> Tensor:
        return state.average

    after = of_rule(
        _initial, update, scalars, carry=carry, elementwise=True, needs_params=True, evaluate=evaluate, sparse="dense"
    )
    return around(tx, None, after)


def _initial(p: Tensor) -> AverageState:
    return AverageState(copied(p))


def ema_weights(
    tx: Any,
    decay: Hyperparameter,
    *,
    warmup: Literal["timm", "torch_ema"] | None = None,
    debias: bool = False,
    every: Hyperparameter = 1,
    start: Hyperparameter = 0,
) -> Any:
    """Train as `tx` does, and keep an exponential moving average of the parameters to evaluate with.

        p <- p + tx(g)
        a <- d a + (1 - d) p
        d = decay
        d = min(decay, 1 - n^(-2/3))          if warmup="timm",       at the n-th average
        d = min(decay, (1 + n) / (10 + n))    if warmup="torch_ema"

    With debias the initial parameters do not count: a is a sum of the others, with weights that add up to 1.

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.
        decay: d in [0, 1]: number, 0-dim tensor, or schedule.
        warmup: smaller decay in the first steps: of timm's `ModelEmaV3`, or of the package torch_ema.
        debias: whether to divide by 1 - d^n, as if the average had begun at zero.
        every: number of steps from one average to the next: number, 0-dim tensor, or schedule.
        start: number of steps before the average begins. Until then it is the latest parameters.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and an `AverageState`.

    Raises:
        ValueError: a number is out of range, or `warmup` is none of these.
        TypeError: `tx` is neither a transformation nor a factory.

    The average begins with the initial parameters, as in torch_ema. `torch.optim.swa_utils.AveragedModel` begins with
    those after the first step: that is `start=1`. So does timm's `ModelEmaV3` if its `update` is given the step.

    Evaluate with `fo.eval_params(tx, state, params)`, or within `opt.averaged()`. A step that `tx` leaves out, of
    `accumulate` say, is left out here too. A parameter whose gradient is None is left alone, and so is its average,
    which then stays behind: to freeze parameters in mid-training give `fo.frozen` inside, whose updates are zero.

    Source: Polyak & Juditsky 1992; as in timm.utils.ModelEmaV3 and torch_ema.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.ema_weights(fo.sgd(1.0), decay=0.75), torch.zeros(1)
        >>> params, state = fo.step(tx, torch.full((1,), -4.0), tx.init(params), params)
        >>> params, fo.eval_params(tx, state, params)
        (tensor([4.]), tensor([1.]))
    """
    check("decay", decay, "0 <= value <= 1", trees=False)
    check_choice("warmup", warmup, None, "timm", "torch_ema")
    _check_times(start, every)
    options: Any = {"warmup": warmup, "debias": debias, "every": every, "start": start}
    return wrapped(tx, _ema_weights, "ema_weights(adamw(1e-3), 0.999)", decay=decay, **options)


@wrapper
def _ema_weights(
    tx: GradientTransformation,
    decay: Hyperparameter,
    *,
    warmup: Literal["timm", "torch_ema"] | None,
    debias: bool,
    every: Hyperparameter,
    start: Hyperparameter,
) -> GradientTransformation:
    def weights(step: Tensor, n: Any) -> tuple[Any, Any]:
        d = at(decay, step)
        if warmup == "timm":
            d = minimum(d, 1 - n ** (-2 / 3))
        elif warmup == "torch_ema":
            d = minimum(d, (1 + n) / (10 + n))
        return d, 1 - d

    return _averaged(tx, weights, start, every, 0.0 if debias else 1.0)


def swa(tx: Any, start: Hyperparameter, every: Hyperparameter = 1) -> Any:
    """Train as `tx` does, and keep the mean of the parameters from a step on: stochastic weight averaging.

        p <- p + tx(g)
        a <- a + (p - a) / n    every `every` steps after `start`, the n-th time

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.
        start: number of steps before the average begins. Until then it is the latest parameters.
        every: number of steps from one average to the next, the first at step start + every: number, 0-dim tensor, or
            schedule.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and an `AverageState`, which counts `n_averaged`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `tx` is neither a transformation nor a factory.

    Same numbers as `torch.optim.swa_utils.AveragedModel`, where all parameters have gradients; for others see
    `ema_weights`. Evaluate with `fo.eval_params(tx, state, params)`, or within
    `opt.averaged()`; `fo.update_bn` computes the statistics of BatchNorm for the average. `fo.schedules.swa` is the
    learning rate of torch's SWALR.

    Source: Izmailov et al., arXiv:1803.05407, algorithm 1, without the parameters at `start` themselves, as in
    torchcontrib.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.swa(fo.sgd(1.0), start=1), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     params, state = fo.step(tx, -torch.ones(1), state, params)
        >>> params, fo.eval_params(tx, state, params)
        (tensor([3.]), tensor([2.5000]))
    """
    _check_times(start, every)
    return wrapped(tx, _swa, "swa(sgd(0.1), start=1000)", start=start, every=every)


@wrapper
def _swa(tx: GradientTransformation, start: Hyperparameter, every: Hyperparameter) -> GradientTransformation:
    return _averaged(tx, lambda step, n: (1.0, 1.0), start, every, 0.0)


def polynomial_average(tx: Any, gamma: Hyperparameter = 8.0) -> Any:
    """Train as `tx` does, and keep an average in which later parameters count for more.

        p <- p + tx(g)
        a <- a + (1 + gamma) / (t + gamma) (p - a)

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.
        gamma: number >= 0. The weight of p grows like t^gamma; 0 is the mean of all steps. Number, 0-dim tensor, or
            schedule.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and an `AverageState`.

    Raises:
        ValueError: `gamma` is negative.
        TypeError: `tx` is neither a transformation nor a factory.

    Evaluate with `fo.eval_params(tx, state, params)`, or within `opt.averaged()`. The initial parameters do not count.
    For missing gradients see `ema_weights`.

    Source: Shamir & Zhang, arXiv:1212.1824, section 4, with the default of Ivgi et al., DoG, arXiv:2302.12022.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.polynomial_average(fo.sgd(1.0), gamma=1.0), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     params, state = fo.step(tx, torch.full((1,), -3.0), state, params)
        >>> params, fo.eval_params(tx, state, params)
        (tensor([6.]), tensor([5.]))
    """
    check("gamma", gamma, trees=False)
    return wrapped(tx, _polynomial_average, "polynomial_average(sgd(0.1), gamma=8)", gamma=gamma)


@wrapper
def _polynomial_average(tx: GradientTransformation, gamma: Hyperparameter) -> GradientTransformation:
    def weights(step: Tensor, n: Any) -> tuple[Any, Any]:
        weight = (1 + at(gamma, step)) / (n + at(gamma, step))
        return 1 - weight, weight

    return _averaged(tx, weights, 0, 1, 1.0)


def _check_times(start: Hyperparameter, every: Hyperparameter) -> None:
    check("start", start, trees=False)
    check("every", every, "value >= 1", trees=False)
