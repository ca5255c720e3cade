"""Functions whose derivatives are exact where they exist and zero elsewhere; and functions of numbers.

The scalars of a rule are computed with floats if the step is known, and else with 0-dim tensors. The functions of
numbers take both: `sqrt`, `where`, and so on.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_unary


def safe_sqrt(x: Tensor) -> Tensor:
    """Take the square root, with derivative zero at zero.

    Adam, RMSprop and Adagrad divide by the root of a running mean of squares. That mean is zero for a unit that never
    fired. There the root's derivative is infinite, and the chain rule makes it inf * 0 = NaN. The value is `x.sqrt()`
    everywhere (NaN for NaN and for negative numbers).

    Args:
        x: real tensor of any shape.

    Returns:
        Tensor like `x`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> torch.func.grad(fo.safe_sqrt)(torch.tensor(0.0))
        tensor(0.)
    """
    if isinstance(x, float):
        return math.sqrt(x)
    if has_torch_function_unary(x):  # recorded as one call, for which machines have their own kernel
        return handle_torch_function(safe_sqrt, (x,), x)
    if _is_constant(x):
        return x.sqrt()
    zero = x == 0
    return x.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _is_constant(x: Tensor) -> bool:
    """Tell whether nobody can differentiate by a tensor, now or in a trace."""
    return not (
        x.requires_grad
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad._current_level >= 0
    )


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to a narrower dtype, ties to even, and return it in float32; the derivative is 1.

    It is `x.to(dtype).float()`, which compilers leave out, and whose derivative is rounded.

    Args:
        x: float32 tensor of any shape.
        dtype: float32, bfloat16 or float16.

    Example:
        >>> import torch
        >>> rounded(torch.tensor(1.001), torch.bfloat16)
        tensor(1.)
    """
    if dtype == torch.float32:
        return x
    if has_torch_function_unary(x):  # recorded as one call; a program has no derivatives
        return handle_torch_function(_nearest, (x,), x, dtype)
    return rounded_to(x, _nearest(x.detach(), dtype))


def _nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round without a derivative: by a cast, and where that would be left out by arithmetic on the bits."""
    if not torch.compiler.is_compiling():
        return x.to(dtype).to(x.dtype)
    bits = x.view(torch.int32)
    dropped = DROPPED[dtype]
    half = (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
    return cut(x, half, (x + 0.75) - 0.75, dtype)


DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of float32's mantissa that a narrower dtype lacks."""


def cut(x: Tensor, more: Tensor, near_zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Cut off the bits of float32 numbers that a narrower dtype lacks.

    Args:
        x: float32 tensor.
        more: integers that are added to its bits first.
        near_zero: the same rounded to multiples of 2^-24, as float16 has them below 2^-14.
        dtype: bfloat16 or float16.
    """
    near = ((x.view(torch.int32) + more) & -(1 << DROPPED[dtype])).view(torch.float32)
    if dtype == torch.float16:
        near = torch.where(near.abs() > 65504, torch.copysign(torch.full_like(near, torch.inf), near), near)
        near = torch.where(x.abs() < 2.0**-14, near_zero, near)
    return torch.where(x.isfinite(), near, x)


def rounded_to(x: Tensor, near: Tensor) -> Tensor:
    """Return float32 numbers that are near others, with the derivative of those."""
    # A finite one differs from x by a float32 number, so that the sum is exact.
    return torch.where(near.isfinite(), x + (near - x.detach()), near)


def safe_norm(x: Tensor, p: float = 2.0) -> Tensor:
    """Take the p-norm of all elements, with derivative zero where the norm is zero.

    Args:
        x: real or complex tensor of any shape, empty ones included.
        p: order, a number > 0 or inf.

    Returns:
        0-dim real tensor; float32 for float16 and bfloat16.

    Raises:
        ValueError: `p` is not > 0.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.safe_norm(torch.tensor([3.0, 4.0])), torch.func.grad(fo.safe_norm)(torch.zeros(2))
        (tensor(5.), tensor([0., 0.]))
    """
    if has_torch_function_unary(x):  # recorded as one call
        return handle_torch_function(safe_norm, (x,), x, p)
    if not p > 0:
        raise ValueError(f"Invalid norm order: {p}; a norm needs p > 0, as in safe_norm(x, p=2.0)")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    if x.is_complex() and p == 2:
        x = torch.view_as_real(x.resolve_conj())
    if x.numel() == 0:
        return x.abs().sum()
    if p == float("inf"):
        return x.abs().amax()
    if p == 2:
        return safe_sqrt(x.square().sum())
    if p == 1:
        return x.abs().sum()
    total = safe_power(x.abs(), p).sum()
    return safe_power(total, 1 / p)


def rms(x: Tensor) -> Tensor:
    """Take the root mean square of all elements, 0 without elements; its derivative is zero where it is zero."""
    if has_torch_function_unary(x):  # recorded as one call
        return handle_torch_function(rms, (x,), x)
    if x.is_complex():
        x = x.abs()
    return safe_sqrt(x.square().mean()) if x.numel() else x.sum()


def mean_norm(x: Tensor) -> Tensor:
    """Take the mean of absolute values, 0 without elements."""
    if has_torch_function_unary(x):  # recorded as one call
        return handle_torch_function(mean_norm, (x,), x)
    return x.abs().mean() if x.numel() else x.sum()


def real_dot(x: Tensor, y: Tensor) -> Tensor:
    """Take the inner product of all elements, a complex number being two: Re(conj(x) y)."""
    return (x.conj() * y).real.sum() if x.is_complex() else (x * y).sum()


def or_one(x: Tensor) -> Tensor:
    """Return a divisor: x, and 1 where x is 0."""
    if has_torch_function_unary(x):  # recorded as one call, for which machines have their own kernel
        return handle_torch_function(or_one, (x,), x)
    return x.masked_fill(x == 0, 1)


def clamped_from_below(x: Tensor, least: Any) -> Tensor:
    """Return the larger one. NaN is not larger, as in Python's max, so that it stays in the elements that have it."""
    return torch.clamp_min(x.masked_fill(x.isnan(), 0), least)


def safe_power(x: Tensor, exponent: float) -> Tensor:
    """Raise to a power > 0, with derivative zero at zero."""
    if has_torch_function_unary(x):  # recorded as one call, for which machines have their own kernel
        return handle_torch_function(safe_power, (x,), x, exponent)
    if _is_constant(x):
        return x.pow(exponent)
    zero = x == 0
    return x.masked_fill(zero, 1).pow(exponent).masked_fill(zero, 0)


# Functions of numbers: floats or 0-dim tensors. -----------------------------------------------------------------------


def _of_both(of_float: Callable[[float], float], of_tensor: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def function(x: Any) -> Any:
        return of_float(x) if isinstance(x, float) else of_tensor(x)

    return function


sqrt = _of_both(math.sqrt, torch.sqrt)
exp = _of_both(math.exp, torch.exp)
log = _of_both(math.log, torch.log)
cos = _of_both(math.cos, torch.cos)
floor = _of_both(lambda x: float(math.floor(x)), torch.floor)
isfinite: Callable[[Any], Any] = _of_both(math.isfinite, torch.isfinite)


def double(x: Any) -> Any:
    """Return a number in float64."""
    return x.to(wide_device(x.device), torch.float64) if isinstance(x, Tensor) else x


def wide_device(device: torch.device) -> torch.device:
    """Return where numbers in float64 are kept that go with tensors on a device: on the CPU where it has none."""
    return torch.device("cpu") if device.type == "mps" else device


def known(x: Tensor, step: Any) -> Any:
    """Return a number as a float where the step is one and nothing is differentiated."""
    if not isinstance(step, float) or x.device.type != "cpu":
        return x
    return x if x.requires_grad and torch.is_grad_enabled() else x.item()


def as_kept(x: Any, kept: Any) -> Any:
    """Return a number in the dtype of one that is carried on: torch.optim's are float32."""
    return x.to(kept.dtype) if isinstance(x, Tensor) and isinstance(kept, Tensor) else x


def where(condition: Any, one: Any, other: Any) -> Any:
    """Choose between two numbers; the condition is a bool where it is known."""
    if isinstance(condition, bool):
        return one if condition else other
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        one = torch.full_like(condition, one, dtype=torch.float64)  # with two numbers torch returns float32
    return torch.where(condition, one, other)


def minimum(x: Any, y: Any) -> Any:
    """Take the smaller of two numbers."""
    if isinstance(x, float) and isinstance(y, float):
        return math.nan if math.isnan(x) or math.isnan(y) else min(x, y)
    return torch.minimum(*_both(x, y))


def maximum(x: Any, y: Any) -> Any:
    """Take the larger of two numbers."""
    return -minimum(-x, -y)


def quotient(x: Any, y: Any) -> Any:
    """Divide a number by another; 0 where that is 0."""
    zero = y == 0
    return where(zero, 0.0, x / where(zero, 1.0, y))


def at_least(x: Any, least: Any) -> Any:
    """Clamp from below; at the bound the derivative is that of `x`, where torch.clamp(x, tensor) is inconsistent."""
    if isinstance(x, int | float) and isinstance(least, int | float):
        return max(x, least)
    return torch.where(x < least, least, x)


def _both(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    like = y if isinstance(x, int | float) else x
    return x + torch.zeros_like(like), y + torch.zeros_like(like)


def debias(beta: Tensor | float, step: Tensor) -> Tensor:
    """Return 1 - beta^t: the weight that an exponential mean, begun at zero, has gathered after t steps.

    Args:
        beta: decay rate in [0, 1): number or 0-dim tensor.
        step: t, counted from 1: 0-dim float64 tensor.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.debias(0.9, torch.tensor(2.0, dtype=torch.float64))
        tensor(0.1900, dtype=torch.float64)
    """
    return 1 - beta**step
