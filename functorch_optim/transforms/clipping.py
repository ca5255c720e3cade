"""Clipping: by value, by each tensor's norm, by the norm of the whole tree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice, check_number
from functorch_optim._core.transformation import GradientTransformation, factory, leafwise
from functorch_optim._execution.foreach import norms
from functorch_optim._numerics import isfinite, safe_norm, where


@factory
def clip(clip_value: Hyperparameter) -> GradientTransformation:
    """Clip every element: `g <- min(max(g, -c), c)`.

    The derivative with respect to g is one inside and at the corners, and zero outside; that with respect to c is the
    sign of g outside, and zero elsewhere. Real and imaginary parts of complex tensors are clipped separately.

    Args:
        clip_value: c >= 0: number, 0-dim tensor, or schedule.

    Raises:
        ValueError: the number is negative or NaN.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.clip(1.0)
        >>> tx.update(torch.tensor([0.5, -3.0]), tx.init(torch.zeros(2)))[0]
        tensor([ 0.5000, -1.0000])
    """
    check("clip_value", clip_value)

    def update(g: Tensor, state: Any, p: Tensor | None, c: Any) -> Any:
        return torch.clamp(g, -c, c), state

    return leafwise(None, update, lambda step: at(clip_value, step), elementwise=True, sparse="touched")


@factory
def clip_by_norm(max_norm: Hyperparameter, norm_type: float = 2.0) -> GradientTransformation:
    """Scale each tensor down to a largest norm: `g <- g min(1, c / |g|)`; a NaN in it makes all of it NaN.

    Derivatives flow through the norm. Where nothing is clipped, at the corner |g| = c and at the norm zero too, they
    are those of the identity. The infinity norm shares its derivative between elements that tie, and in the norm of
    order 1 an element that is zero has none.

    Args:
        max_norm: c >= 0: number, 0-dim tensor, or schedule.
        norm_type: order of the norm: number > 0, or inf.

    Raises:
        ValueError: a number is out of range.
        TypeError: `norm_type` is no number.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.clip_by_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'a': tensor([0.6000, 0.8000]), 'b': tensor([0.1000])}
    """
    check("max_norm", max_norm)
    check_number("norm_type", norm_type, "value > 0")

    def update(g: Tensor, state: Any, p: Tensor | None, c: Any) -> Any:
        return g * _shrink(safe_norm(g, norm_type), c), state

    return leafwise(None, update, lambda step: at(max_norm, step))


@factory
def clip_by_global_norm(
    max_norm: Hyperparameter,
    norm_type: float = 2.0,
    *,
    eps: Hyperparameter = 0.0,
    nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
) -> GradientTransformation:
    """Scale all updates down together to a largest norm: `g <- g min(1, c / (|g| + eps))`, |g| over the whole tree.

    Derivatives flow through the norm; where nothing is clipped they are those of the identity. Each tensor's norm is
    taken in its own precision (float32 for halves), and that of the norms in float64.

    Args:
        max_norm: c >= 0: number, 0-dim tensor, or schedule.
        norm_type: order of the norm: number > 0, or inf.
        eps: number >= 0 added to the norm: number, 0-dim tensor, or schedule. 1e-6 gives the numbers of
            `torch.nn.utils.clip_grad_norm_`; with the default, 0, the clipped norm is exactly c.
        nonfinite: what to do when the norm is NaN or inf. "propagate": nothing, as torch does: a NaN makes all updates
            NaN. "skip": all updates are set to zero, without waiting for the device. "raise": a RuntimeError; this
            waits for the device, and torch refuses it under `torch.vmap` and `torch.compile`.

    Raises:
        ValueError: a number is out of range, or `nonfinite` is none of the three.
        TypeError: `norm_type` is no number.
        RuntimeError: the norm is not finite, and `nonfinite="raise"`.

    Source: Pascanu et al., On the difficulty of training recurrent neural networks, arXiv:1211.5063, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.clip_by_global_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    check("max_norm", max_norm)
    check_number("norm_type", norm_type, "value > 0")
    check("eps", eps)
    check_choice("nonfinite", nonfinite, "propagate", "skip", "raise")
    skip = nonfinite == "skip"

    def scalars(step: Tensor, *, updates: list[Tensor]) -> Any:
        norm = global_norm(updates, norm_type, step)
        finite = isfinite(norm)
        if nonfinite == "raise" and not finite:
            raise RuntimeError(
                f"The total norm of order {norm_type} is {float(norm)}, so it cannot be clipped. Find the cause, or "
                "choose clip_by_global_norm(..., nonfinite='skip')"
            )
        if skip:  # what is thrown away must not reach derivatives either
            norm = global_norm([_finite_part(update) for update in updates], norm_type, step)
        return _shrink(norm + at(eps, step), at(max_norm, step)), finite

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        factor, finite = s
        if skip:
            return torch.where(finite, factor * _finite_part(g), torch.zeros_like(g)), state
        return factor * g, state

    return leafwise(None, update, scalars, elementwise=True, sparse="touched")


def global_norm(tensors: list[Tensor], norm_type: float, step: Any) -> Any:
    """Take the norm of all elements of all tensors: a float where the step is one and nothing is differentiated."""
    if not tensors:
        return 0.0 * step
    taken = norms(tensors, norm_type)
    if any(norm.device != taken[0].device or norm.dtype != taken[0].dtype for norm in taken):
        taken = [norm.to(device=taken[0].device, dtype=torch.float64) for norm in taken]
    [norm] = norms([torch.stack(taken).to(torch.float64)], norm_type)
    is_known = isinstance(step, float) and norm.device.type == "cpu"
    return norm if not is_known or (norm.requires_grad and torch.is_grad_enabled()) else norm.item()


def _shrink(norm: Any, max_norm: Any) -> Any:
    """Return min(1, max_norm / norm); NaN for NaN; with derivative zero where nothing is clipped."""
    fits = norm <= max_norm
    return where(fits, 1.0, max_norm / where(fits, 1.0, norm))


def _finite_part(g: Tensor) -> Tensor:
    return torch.where(torch.isfinite(g), g, torch.zeros_like(g))
