"""Steps that are left out: where a condition holds, and where gradients are not finite."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._numerics import isfinite, where
from functorch_optim.transforms.clipping import global_norm
from functorch_optim.wrappers._wrapping import around, wrapped, wrapper


class SkipCarried(NamedTuple):
    """The counts of skipping: updates, and those that were left out."""

    seen: Any
    skipped: Any


class SkipState(NamedTuple):
    """The state of `skip`: 0-dim float64 tensors, once for all parameters.

    Attributes:
        seen: number of updates, those that were left out too.
        skipped: number of those that were left out.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.skip(fo.sgd(0.1), lambda step: step < 1).init(torch.zeros(1))[0].skipped
        tensor(0., dtype=torch.float64)
    """


class ApplyIfFiniteCarried(NamedTuple):
    """The counts of gradients that are not finite: in a row, and in all."""

    notfinite_count: Any
    total_notfinite: Any


class ApplyIfFiniteState(NamedTuple):
    """The state of `apply_if_finite`: 0-dim float64 tensors, once for all parameters, under optax's names.

    Attributes:
        notfinite_count: number of updates that were not finite, since the last one that was.
        total_notfinite: number of all updates that were not finite.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.apply_if_finite(fo.sgd(0.1)).init(torch.zeros(1))[0].total_notfinite
        tensor(0., dtype=torch.float64)
    """


leaf_state(SkipState, SkipCarried)
leaf_state(ApplyIfFiniteState, ApplyIfFiniteCarried)


def skip(tx: Any, condition: Callable[..., bool | Tensor]) -> Any:
    """Leave a transformation out at the steps where a condition holds.

        u = 0 where condition(step), else u = tx(g)

    At a step that is left out `tx` stands still: its state, its step count, its schedules and its weight decay.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        condition: function of the number of updates before this one, 0 at the first, skipped ones included: a float
            where it is known, and else a 0-dim tensor. Its keyword-only parameters are extras, such as the loss in
            `lambda step, *, value: value > 10`; the one named `updates` is no extra but the list of the gradients. A
            condition that looks at extras alone needs no positional parameter: `lambda *, value: value > 10`. It
            returns a bool, or a 0-dim tensor of bool, which may be batched.

    Returns:
        Transformation whose state is a tuple: a `SkipState`, and the state of `tx`.

    Raises:
        TypeError: `tx` is neither a transformation nor a factory; `condition` is no function, has further positional
            parameters, or returns no truth value.
        ValueError: it returns several truth values.

    To derivatives the condition is a constant. On the CPU `tx` does not run at a step that is left out. Under
    `torch.vmap` and `torch.compile`, and where the condition is on another device, which is not waited for, it does,
    and `torch.where` picks. A loss in `value` is given to every step; `fo.Optimizer` takes it from a closure.

    optax' `conditionally_mask` asks when to update, and this asks when not to. Its condition counts alike.

    Example:
        Leave out steps whose loss is a spike.

        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.skip(fo.sgd(1.0), lambda *, value: value > 10), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for loss in (3.0, 50.0, 2.0):
        ...     params, state = fo.step(tx, torch.ones(1), state, params, value=loss)
        >>> params, state[0].skipped
        (tensor([-2.]), tensor(1., dtype=torch.float64))
    """
    _takes_step(condition)
    return wrapped(tx, _skip, "skip(adamw(1e-3), lambda step: step < 10)", condition=condition)


def apply_if_finite(tx: Any, max_consecutive: Hyperparameter = 5) -> Any:
    """Leave a transformation out at the steps where a gradient has NaN or infinity in it.

        n <- 0 where all elements of all gradients are finite, else n <- n + 1
        u = tx(g) where n = 0 or n > max_consecutive, else u = 0

    At a step that is left out `tx` stands still: its state, its step count, its schedules and its weight decay. After
    `max_consecutive` such steps in a row the next ones are let through, so that a run that is lost shows NaN.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        max_consecutive: number >= 0 of steps in a row that may be left out: number, 0-dim tensor, or schedule of the
            number of steps that were not finite. With `float("inf")` nothing that is not finite is let through.

    Returns:
        Transformation whose state is a tuple: an `ApplyIfFiniteState`, with the counts, and the state of `tx`.

    Raises:
        ValueError: `max_consecutive` is negative or NaN.
        TypeError: `tx` is neither a transformation nor a factory.

    It sees the gradients at its place in the chain: `apply_if_finite(accumulate(tx, 4))` keeps mini-steps that are not
    finite out of the mean, and does not count them. To derivatives the condition is a constant. Functional steps wait
    for no device: there `tx` runs, on zeros, and `torch.where` picks. `fo.Optimizer` keeps counts on the CPU, and so
    reads one truth value from the device. The numbers are optax'.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.apply_if_finite(fo.sgd(1.0), max_consecutive=2), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for g in (1.0, float("nan"), 1.0):
        ...     params, state = fo.step(tx, torch.tensor([g]), state, params)
        >>> params, state[0].total_notfinite
        (tensor([-2.]), tensor(1., dtype=torch.float64))
    """
    check("max_consecutive", max_consecutive, trees=False)
    return wrapped(
        tx, _apply_if_finite, "apply_if_finite(adamw(1e-3), max_consecutive=5)", max_consecutive=max_consecutive
    )


@wrapper
def _skip(tx: GradientTransformation, condition: Callable[..., Any]) -> GradientTransformation:
    takes_step = _takes_step(condition)

    def carry() -> SkipCarried:
        return SkipCarried(0.0, 0.0)

    @functools.wraps(condition)  # whose extras are those of the rule
    def scalars(step: None, carried: SkipCarried, **extra: Any) -> Any:
        left_out = _truth(condition(*([carried.seen] if takes_step else []), **extra))
        counted = SkipCarried(carried.seen + 1, carried.skipped + where(left_out, 1.0, 0.0))
        return ((), not left_out if isinstance(left_out, bool) else ~left_out), counted

    return around(tx, _gate(SkipState, scalars, carry), None)


@wrapper
def _apply_if_finite(tx: GradientTransformation, max_consecutive: Hyperparameter) -> GradientTransformation:
    def carry() -> ApplyIfFiniteCarried:
        return ApplyIfFiniteCarried(0.0, 0.0)

    def scalars(step: None, carried: ApplyIfFiniteCarried, *, updates: list[Tensor]) -> Any:
        finite = isfinite(global_norm(updates, math.inf, carried.total_notfinite))
        count = where(finite, 0.0, carried.notfinite_count + 1)
        total = carried.total_notfinite + where(finite, 0.0, 1.0)
        return ((), finite | (count > at(max_consecutive, total))), ApplyIfFiniteCarried(count, total)

    return around(tx, _gate(ApplyIfFiniteState, scalars, carry), None)


def _gate(state_type: type, scalars: Callable[..., Any], carry: Callable[[], Any]) -> GradientTransformation:
    """Make a gate that lets gradients through as they are, or not at all."""
    return of_rule(
        state_type,
        lambda g, state, p, s: (g, state),  # a pass of rules that are `unchanged` is left out, and this one holds
        scalars,
        carry=carry,
        elementwise=True,
        sparse="touched",
        hold=lambda g, state, p, s: state,
    )


def _takes_step(condition: Any) -> bool:
    """Tell whether a condition has a positional parameter, for the step.

    Raises:
        TypeError: it is no function, or has several that must be given.
    """
    if not callable(condition):
        raise TypeError(
            f"skip needs a function that tells which steps to leave out, got {condition!r}; write "
            "skip(adamw(1e-3), lambda step: step < 10)"
        )
    code = None if inspect.ismethod(condition) else getattr(condition, "__code__", None)
    if code is not None and code.co_argcount < 2 and not hasattr(condition, "__wrapped__"):
        return bool(code.co_argcount or code.co_flags & inspect.CO_VARARGS)  # torch.compile traces no inspect.signature
    kinds = inspect.Parameter
    positional = [
        parameter
        for parameter in inspect.signature(condition).parameters.values()
        if parameter.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    further = [parameter.name for parameter in positional[1:] if parameter.default is parameter.empty]
    if further:
        raise TypeError(
            f"The condition of skip is given the step, and extras by keyword: {further[0]!r} comes after a star, as in "
            f"lambda step, *, {further[0]}: {further[0]} > 10"
        )
    return bool(positional)


def _truth(value: Any) -> bool | Tensor:
    """Return a truth value as a bool, or as a 0-dim tensor.

    Raises:
        TypeError: it is none.
        ValueError: there are several.
    """
    if not isinstance(value, Tensor):
        if str(type(value).__name__) not in ("bool", "bool_"):  # NumPy's, too
            raise TypeError(
                f"The condition of skip returned {value!r}, a {type(value).__name__}; let it return a bool, or a 0-dim "
                "tensor of bool"
            )
        return bool(value)
    if value.dtype != torch.bool:
        raise TypeError(
            f"The condition of skip returned a tensor of dtype {value.dtype}; let it compare, as in "
            "lambda *, value: value > 10"
        )
    if value.numel() != 1:
        raise ValueError(
            f"The condition of skip returned a tensor of shape {tuple(value.shape)}; it needs one truth value, as "
            "(x > 10).any() is"
        )
    return value.reshape(())
