"""Clipping: by value, by the norm of a row, of a tensor, of the whole tree."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice, check_number
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._execution.foreach import norms
from functorch_optim._execution.sharded import over_ranks, some_sharded
from functorch_optim._numerics import at_least, isfinite, known, rms, safe_norm, safe_sqrt, where


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
    """Scale each tensor down to a largest norm: `g <- g min(1, c / |g|)`; a NaN in a tensor makes all of it NaN.

    Derivatives flow through the norm. Where nothing is clipped, also at the corner |g| = c and at the norm zero, they
    are those of the identity. The infinity norm shares its derivative between elements that tie. In the norm of order
    1, an element that is zero has derivative zero.

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
        return g * shrink(safe_norm(g, norm_type), c), state

    return leafwise(None, update, lambda step: at(max_norm, step), norms=True)


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
    computed in the tensor's precision (float32 for half precision), and the norm of these norms in float64.

    Args:
        max_norm: c >= 0: number, 0-dim tensor, or schedule.
        norm_type: order of the norm: number > 0, or inf.
        eps: number >= 0 added to the norm: number, 0-dim tensor, or schedule. 1e-6 gives the numbers of
            `torch.nn.utils.clip_grad_norm_`; with the default, 0, the clipped norm is exactly c.
        nonfinite: reaction to a norm that is NaN or inf. "propagate": none, as in torch: a NaN makes all updates NaN.
            "skip": all updates are set to zero, without waiting for the device. "raise": a RuntimeError; this waits
            for the device, and torch refuses it under `torch.vmap` and `torch.compile`.

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
        if skip:
            norm, finite = finite_norm(updates, norm_type, step)
        else:
            norm = global_norm(updates, norm_type, step)
        if nonfinite == "raise" and not isfinite(norm):
            raise RuntimeError(
                f"The total norm of order {norm_type} is {float(norm)}, so it cannot be clipped. Find the cause, or "
                "choose clip_by_global_norm(..., nonfinite='skip')"
            )
        factor = shrink(norm + at(eps, step), at(max_norm, step))
        return (factor, finite) if skip else factor

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        if not skip:
            return s * g, state
        factor, finite = s
        return torch.where(finite, factor * _finite_part(g), torch.zeros_like(g)), state

    return leafwise(None, update, scalars, elementwise=True, sparse="touched")


@factory
def clip_by_block_rms(threshold: Hyperparameter) -> GradientTransformation:
    """Scale each tensor down to a largest root mean square: `g <- g / max(1, RMS(g) / c)`.

    Derivatives are those of `clip_by_norm`: where nothing is clipped, also at the corner, those of the identity.

    Args:
        threshold: c >= 0: number, 0-dim tensor, or schedule.

    Raises:
        ValueError: the number is negative or NaN.

    Source: Shazeer & Stern, Adafactor, arXiv:1804.04235, section 6.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.clip_by_block_rms(1.0)
        >>> tx.update(torch.tensor([6.0, 8.0]), tx.init(torch.zeros(2)))[0]
        tensor([0.8485, 1.1314])
    """
    check("threshold", threshold)

    def update(g: Tensor, state: Any, p: Tensor | None, c: Any) -> Any:
        return g * shrink(rms(g), c), state

    return leafwise(None, update, lambda step: at(threshold, step), norms=True)


@factory
def adaptive_grad_clip(clipping: Hyperparameter, eps: Hyperparameter = 1e-3) -> GradientTransformation:
    """Scale the gradient of each unit down to a part of the unit's weights (AGC).

        g_i <- g_i c max(|p_i|, eps) / max(|g_i|, 1e-6)  where  |g_i| > c max(|p_i|, eps)

    A unit is an entry of the first dimension: a row of a linear layer's weight, a filter of a convolution. A tensor of
    one dimension or none is one unit. The results of the comparisons are constants to derivatives; at the corners
    derivatives are those of the identity and of |p_i|.

    Args:
        clipping: c >= 0, the largest ratio of norms: number, 0-dim tensor, or schedule. The paper has 0.01.
        eps: smallest norm of a unit's weights, >= 0, so that weights which begin at zero can move.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    The paper leaves the last linear layer out: `fo.masked(fo.adaptive_grad_clip(0.01), mask)`. optax takes the units of
    JAX's layout, where the first dimension is the input. Source: Brock et al., High-Performance Large-Scale Image
    Recognition Without Normalization, arXiv:2102.06171, equation 3; 1e-6 as in its code.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.adaptive_grad_clip(0.1), torch.tensor([[3.0, 4.0], [0.0, 0.0]])
        >>> tx.update(torch.ones(2, 2), tx.init(params), params)[0]
        tensor([[3.5355e-01, 3.5355e-01],
                [7.0711e-05, 7.0711e-05]])
    """
    check("clipping value", clipping)
    check("eps", eps)

    def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
        c, least = s
        size, largest = _of_units(g), c * at_least(_of_units(p), least)
        fits = size <= largest
        return g * torch.where(fits, 1.0, largest / torch.clamp(size, min=_TINY)), state

    return leafwise(None, update, lambda step: (at(clipping, step), at(eps, step)), needs_params=True)


_TINY = 1e-6


def _of_units(x: Tensor) -> Tensor:
    """Take the norm of each entry of the first dimension, in a shape that broadcasts; of all elements of a vector."""
    if x.ndim <= 1:
        return safe_norm(x)
    if x.is_complex():
        x = x.abs()
    return safe_sqrt(x.square().sum(tuple(range(1, x.ndim)), keepdim=True))


def global_norm(tensors: list[Tensor], norm_type: float, step: Any) -> Any:
    """Take the norm of all elements of all tensors: a float if the step is a float and nothing is differentiated."""
    if not tensors:
        return 0.0 * step
    if not some_sharded(tensors):
        return known(_norm(tensors, norm_type), step)
    of_some = functools.partial(_norm, norm_type=norm_type)
    return known(over_ranks(tensors, of_some, lambda each: of_some([each])), step)


def _norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    taken = norms(tensors, norm_type)
    if any(norm.dtype != taken[0].dtype for norm in taken):  # float64 gradients keep their digits beside float32 ones
        taken = norms([tensor.to(torch.promote_types(tensor.dtype, torch.float64)) for tensor in tensors], norm_type)
    if any(norm.device != taken[0].device for norm in taken):
        taken = [norm.to(taken[0].device) for norm in taken]
    return norms([torch.stack(taken).to(torch.float64)], norm_type)[0]


def finite_norm(tensors: list[Tensor], norm_type: float, step: Any) -> tuple[Any, Any]:
    """Take the norm of all elements of all tensors; where it is NaN or infinite, 0, with derivative zero.

    Returns:
        The norm, and whether it is finite.
    """
    norm = global_norm(tensors, norm_type, step)
    finite = isfinite(norm)
    if isinstance(finite, bool):
        return norm if finite else 0.0, finite
    kept = [torch.where(finite.to(tensor.device), tensor, torch.zeros_like(tensor)) for tensor in tensors]
    return global_norm(kept, norm_type, step), finite


def shrink(norm: Any, max_norm: Any) -> Any:
    """Return min(1, max_norm / norm) for numbers; NaN for NaN; with derivative zero where nothing is clipped."""
    fits = norm <= max_norm
    return where(fits, 1.0, max_norm / where(fits, 1.0, norm))


def _finite_part(g: Tensor) -> Tensor:
    return torch.where(torch.isfinite(g), g, torch.zeros_like(g))
