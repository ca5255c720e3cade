"""Accumulation: the gradients of several mini-steps make one step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.checks import HALF
from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, check_transformation, factory
from functorch_optim._numerics import where
from functorch_optim.wrappers._wrapping import around, wrapped, wrapper


class AccumulateCarried(NamedTuple):
    """The counts of accumulation: gradients added up since the last step, and steps."""

    mini_step: Any
    gradient_step: Any


class AccumulateState(NamedTuple):
    """The state of `accumulate` for one parameter; that of a tree has `mini_step` and `gradient_step` in front.

    Attributes:
        acc_grad: a, the sum of gradients since the last step: like p; float32 for halves.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.accumulate(fo.sgd(0.1), 2).init(torch.zeros(1))[0].acc_grad
        tensor([0.])
    """

    acc_grad: Tensor


leaf_state(AccumulateState, AccumulateCarried)


@factory
def _gate(every: Hyperparameter, mean: bool) -> GradientTransformation:
    def begin(p: Tensor) -> AccumulateState:
        return AccumulateState(torch.zeros_like(p, dtype=torch.float32 if p.dtype in HALF else p.dtype))

    def carry() -> AccumulateCarried:
        return AccumulateCarried(0.0, 0.0)

    def scalars(step: None, carried: AccumulateCarried, *, flush: bool | Tensor = False) -> Any:
        k, t = carried.mini_step + 1, carried.gradient_step
        due = (k >= at(every, t + 1)) | _truth(flush)
        factor = 1 / k if mean else 1.0
        return (factor, due), AccumulateCarried(where(due, 0.0, k), where(due, t + 1, t))

    def update(g: Tensor, state: AccumulateState, p: Tensor | None, s: Any) -> Any:
        a = state.acc_grad + g
        return s * a, AccumulateState(torch.zeros_like(a))

    def hold(g: Tensor, state: AccumulateState, p: Tensor | None, s: Any) -> AccumulateState:
        return AccumulateState(state.acc_grad + g)

    return of_rule(begin, update, scalars, carry=carry, elementwise=True, sparse="dense", hold=hold)


def accumulate(tx: Any, every: Hyperparameter, *, mean: bool = True) -> Any:
    """Add up the gradients of several mini-steps, and make one step of them.

        a <- a + g
        every k mini-steps: u = tx(a / k), a <- 0; else u = 0

    Between steps `tx` stands still: its state, its step count, its schedules and its weight decay.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        every: k >= 1, number of mini-steps that make a step: number, 0-dim tensor, or schedule, which is a function of
            the number of steps done.
        mean: whether `tx` is given the mean of the gradients; False for their sum.

    Returns:
        Transformation whose state is a tuple: an `AccumulateState`, and the state of `tx`.

    Raises:
        ValueError: `every` is less than 1.
        TypeError: `tx` is neither a transformation nor a factory; or `flush` is no truth value.

    The remainder at the end of an epoch is not lost: the next epoch goes on with it. To make a step of it, give the
    extra `flush=True` with the last gradient of the epoch, `fo.step(tx, grads, state, params, flush=True)` or
    `opt.step(flush=True)`: the mean is then over the mini-steps there were. It is a bool, or a 0-dim tensor of bool.

    `update` returns zeros where there is no step. `fo.step`, `fo.step_` and `fo.Optimizer` add nothing then. Eagerly
    `tx` does not run at these mini-steps. Under `torch.vmap` and `torch.compile` it does, and `torch.where` picks. A
    parameter whose gradient is None at the last mini-step of a step gets no update, and keeps its sum. All parameters
    that are accumulated count together, also in `fo.Optimizer`. A mini-step at which none of them has a gradient counts
    in `tx.update`, and does not in `fo.Optimizer`.

    Source: gradient accumulation, as in Ott et al., arXiv:1806.00187, section 3.4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.accumulate(fo.sgd(1.0), every=2), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for g in (1.0, 3.0):
        ...     params, state = fo.step(tx, torch.tensor([g]), state, params)
        ...     print(params)
        tensor([0.])
        tensor([-2.])
    """
    if not callable(tx):
        check_transformation(tx, "accumulate(adamw(1e-3), every=4)")
    check("every", every, "value >= 1")
    return wrapped(tx, _accumulate, "accumulate(adamw(1e-3), every=4)", every=every, mean=mean)


def _truth(flush: Any) -> bool | Tensor:
    if not isinstance(flush, bool) and not (isinstance(flush, Tensor) and flush.dtype == torch.bool):
        raise TypeError(f"flush is True at the last mini-step of an epoch, else False; got {flush!r}")
    return flush


@wrapper
def _accumulate(tx: GradientTransformation, every: Hyperparameter, mean: bool) -> GradientTransformation:
    return around(tx, _gate(every, mean), None)
