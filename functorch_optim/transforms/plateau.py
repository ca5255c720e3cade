"""Lowering the scale of updates when the loss stops improving."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import at, check_choice, check_fixed
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.transforms.scaling import scaled
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved


@saved
class ReduceOnPlateauState(NamedTuple):
    """The state of `reduce_on_plateau`: 0-dim tensors, under torch's names.

    Attributes:
        scale: factor of the next updates, 1 at first: float64.
        best: the best value so far, inf (-inf with `mode="max"`) at first: float64.
        num_bad_epochs: number of values since then that were not better: int64.
        cooldown_counter: number of further values that are not counted when they are bad: int64.
    """

    scale: Tensor
    best: Tensor
    num_bad_epochs: Tensor
    cooldown_counter: Tensor


@factory
def reduce_on_plateau(
    factor: float | Tensor = 0.1,
    patience: float | Tensor = 10,
    threshold: float | Tensor = 1e-4,
    cooldown: float | Tensor = 0,
    *,
    mode: Literal["min", "max"] = "min",
    threshold_mode: Literal["rel", "abs"] = "rel",
    min_scale: float | Tensor = 0.0,
    eps: float | Tensor = 1e-8,
) -> GradientTransformation:
    """Multiply updates by a scale that is lowered when a value stops improving: `g <- s g`.

    The value is given to every update: `tx.update(updates, state, params, value=loss)`. It is better when it is less
    than `best - threshold |best|` ("rel") or `best - threshold` ("abs"); with `mode="max"`, when it is greater than
    `best + threshold |best|` or `best + threshold`. NaN is never better. After more than `patience` values in a row
    that are not better

        s <- max(factor s, min_scale)

    and the next `cooldown` values are not counted.

    A value changes the scale of later updates only, and not of its own. So a loop of `tx.update(..., value=v)` equals
    torch's loop of `optimizer.step(); scheduler.step(v)` with ReduceLROnPlateau. There are two differences.

    - `min_scale` and `eps` are relative to the learning rate: divide torch's `min_lr` and `eps` by it.
    - If the best value is negative, such as a negative log-density, "rel" still requires an improvement. torch's limit,
      `best (1 - threshold)`, is then worse than `best`, so values that slowly get worse count as better.

    Every update counts as an epoch of torch's. To count once an epoch, pass the value of the last epoch at each of its
    n updates, with a `patience` of (patience + 1) n - 1 and a `cooldown` of n cooldown.

    The scale is differentiable with respect to `factor` and `min_scale`. No derivative flows through comparisons, or
    through the value.

    Args:
        factor: in [0, 1): number or 0-dim tensor.
        patience: number of values, a whole number >= 0, that may be no better: number or 0-dim tensor.
        threshold: margin >= 0 by which a value must be better to count: number or 0-dim tensor.
        cooldown: number of values, a whole number >= 0, after a reduction for which bad ones are not counted: number or
            0-dim tensor.
        mode: "min" when less is better, "max" when more is.
        threshold_mode: "rel" or "abs".
        min_scale: lower limit >= 0 of the scale: number or 0-dim tensor.
        eps: number >= 0; the scale is lowered only by more than this: number or 0-dim tensor.

    Returns:
        Transformation whose state is a `ReduceOnPlateauState`.

    Raises:
        ValueError: a number is out of range, a word is none of those above, or the value given to an update is not one
            number.
        TypeError: an argument is neither a number nor a tensor.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.chain(fo.sgd(0.1), fo.reduce_on_plateau(factor=0.5, patience=1))
        >>> params = torch.zeros(1)
        >>> state = tx.init(params)
        >>> for loss in (3.0, 2.0, 2.0, 2.0, 2.0):
        ...     updates, state = tx.update(torch.ones(1), state, params, value=loss)
        ...     print(loss, updates)
        3.0 tensor([-0.1000])
        2.0 tensor([-0.1000])
        2.0 tensor([-0.1000])
        2.0 tensor([-0.1000])
        2.0 tensor([-0.0500])
    """
    _check(factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, min_scale=min_scale, eps=eps)
    check_choice("mode", mode, "min", "max")
    check_choice("threshold_mode", threshold_mode, "rel", "abs")
    sign = 1.0 if mode == "min" else -1.0

    def is_better(value: Tensor, best: Tensor) -> Tensor:
        margin = sign * at(threshold, best)
        if threshold_mode == "rel":  # for a negative best, less is farther from zero; the first best is infinite
            limit = best * (1 - torch.where((best < 0) & best.isfinite(), -margin, margin))
        else:
            limit = best - margin
        better: Tensor = value < limit if mode == "min" else value > limit
        return better

    def init(params: Tree) -> ReduceOnPlateauState:
        device = tree.device_of(params)
        return ReduceOnPlateauState(
            torch.ones((), dtype=torch.float64, device=device),
            torch.full((), sign * torch.inf, dtype=torch.float64, device=device),
            *[torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)],
        )

    def update(
        updates: Tree, state: ReduceOnPlateauState, params: Tree, *, value: float | Tensor
    ) -> tuple[Tree, ReduceOnPlateauState]:
        scale, best, bad, cooling = state
        value = _as_number(value, scale)
        # In torch's order.
        better = is_better(value, best)
        bad = torch.where(better | (cooling > 0), 0, bad + 1)
        cooling = torch.where(cooling > 0, cooling - 1, 0)
        run_out = bad > patience
        lowered, least = scale * at(factor, scale), at(min_scale, scale)
        lowered = torch.where(lowered < least, least, lowered)
        new_state = ReduceOnPlateauState(
            torch.where(run_out & (scale - lowered > at(eps, scale)), lowered, scale),
            torch.where(better, value, best),
            torch.where(run_out, 0, bad),
            torch.where(run_out, cooldown, cooling).to(cooling.dtype),
        )
        return tree.map(lambda g: scaled(g, scale), updates), new_state

    return GradientTransformation(init, update)


_ALLOWED = {"factor": "0 <= value < 1"}


def _check(**numbers: float | Tensor) -> None:
    for name, number in numbers.items():
        check_fixed(name, number, _ALLOWED.get(name, "value >= 0"))
        if name in ("patience", "cooldown") and not isinstance(number, Tensor) and number % 1 != 0:
            raise ValueError(f"Invalid {name}: {number}; it needs a whole number")


def _as_number(value: Any, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor | Real):
        raise TypeError(
            f"reduce_on_plateau needs a number as value, got a {type(value).__name__}; "
            "call tx.update(updates, state, params, value=loss)"
        )
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=like.dtype, device=like.device)
    if value.numel() != 1:
        raise ValueError(
            f"reduce_on_plateau looks at one number, got a value of shape {tuple(value.shape)}; give their mean"
        )
    number: Tensor = value.reshape(()).to(like)
    return number
