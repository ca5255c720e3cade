"""Updates that are constrained by the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import real_dot, safe_norm


@factory
def keep_params_nonnegative() -> GradientTransformation:
    """Stop updates at zero: `g <- max(g, -p)`, so that p + g >= 0. The last link of a chain.

    A negative parameter moves to zero at once. Where an update is stopped, derivatives are those of -p. Elsewhere, and
    at the corner p + g = 0, they are those of g. A NaN stays. Real and imaginary parts of complex tensors stop
    separately.

    Raises:
        ValueError: `update` is called without parameters.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.chain(fo.sgd(1.0), fo.keep_params_nonnegative()), torch.tensor([1.0, 5.0])
        >>> fo.step(tx, torch.tensor([3.0, 3.0]), tx.init(params), params)[0]
        tensor([0., 2.])
    """

    def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
        return torch.where(p + g < 0, -p, g), state

    return leafwise(None, update, elementwise=True, needs_params=True)


@factory
def orthogonalize_against_params() -> GradientTransformation:
    """Remove from each tensor's gradient its part along the parameter, and keep its norm (OrthoGrad).

        g' = g - p <p, g> / |p|^2
        g <- g' |g| / |g'|

    If g is along p up to rounding, |g'| <= 4 eps |g| with the machine's eps, the update is zero, with derivative zero.
    This is always so for a tensor of one element. To train such tensors, leave them out with `masked`.

    Raises:
        ValueError: `update` is called without parameters.

    Source: Prieto et al., Grokking at the Edge of Numerical Stability, arXiv:2501.04697.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.orthogonalize_against_params(), torch.tensor([2.0, 0.0])
        >>> tx.update(torch.tensor([3.0, 4.0]), tx.init(params), params)[0]
        tensor([0., 5.])
    """

    def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
        size = safe_norm(g.detach(), torch.inf)  # its square may be out of range
        size = torch.where(size == 0, 1.0, size)
        length, u = real_dot(p, p), g / size
        across = u - p * (real_dot(p, u) / torch.where(length == 0, 1.0, length))
        before, after = safe_norm(u), safe_norm(across)
        is_zero = after <= 4 * torch.finfo(g.dtype).eps * before
        return across * torch.where(is_zero, 0.0, size * before / torch.where(is_zero, 1.0, after)), state

    return leafwise(None, update, needs_params=True)
