"""Normalized updates: their signs, their direction, their deviation from the mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import at_least, quotient, safe_norm
from functorch_optim.transforms.clipping import global_norm


@factory
def scale_by_sign() -> GradientTransformation:
    """Replace every element by its sign: `g <- sign(g)`, and sign(0) = 0.

    Its derivative is zero. Real and imaginary parts of complex tensors have signs of their own. NaN stays.

    Source: Bernstein et al., signSGD, arXiv:1802.04434.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_sign()
        >>> tx.update(torch.tensor([3.0, 0.0, -0.1]), tx.init(torch.zeros(3)))[0]
        tensor([ 1.,  0., -1.])
    """
    return leafwise(None, lambda g, state, p, s: (torch.sign(g), state), elementwise=True, sparse="touched")


@factory
def normalize_by_update_norm(scale_factor: Hyperparameter = 1.0, eps: Hyperparameter = 1e-6) -> GradientTransformation:
    """Give all updates together a fixed norm: `g <- s g / (|g| + eps)`, |g| over the whole tree.

    Updates that are all zero stay zero, also with `eps=0`. Their derivative is s / eps, and zero with `eps=0`. A norm
    that is NaN makes all updates NaN.

    Args:
        scale_factor: s, number of any sign: number, 0-dim tensor, or schedule.
        eps: added to the norm, >= 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.normalize_by_update_norm()
        >>> grads = {"a": torch.tensor([30.0]), "b": torch.tensor([40.0])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    check("scale_factor", scale_factor, "a number")
    check("eps", eps)

    def scalars(step: Tensor, *, updates: list[Tensor]) -> Any:
        total = global_norm(updates, 2.0, step) + at(eps, step)
        return quotient(at(scale_factor, step), total)

    def update(g: Tensor, state: Any, p: Tensor | None, factor: Any) -> Any:
        return factor * g, state

    return leafwise(None, update, scalars, elementwise=True, sparse="touched")


@factory
def scale_by_trust_ratio(
    min_norm: Hyperparameter = 0.0,
    trust_coefficient: Hyperparameter = 1.0,
    eps: Hyperparameter = 0.0,
    *,
    max_ratio: Hyperparameter = math.inf,
) -> GradientTransformation:
    """Scale each tensor's update to the size of the parameter: the layer-wise rate of LARS and LAMB.

        g <- g c max(|p|, min_norm) / (max(|g|, min_norm) + eps)

    Where one of the two norms is zero the ratio is 1, so that a parameter which begins at zero can move. There, and
    below `min_norm`, the ratio is a constant to derivatives.

    Args:
        min_norm: norm >= 0 that a tensor counts for at least: number, 0-dim tensor, or schedule.
        trust_coefficient: c >= 0.
        eps: added to the norm of the update, >= 0.
        max_ratio: largest factor of the update, >= 0; 1.0 is that of LAMBC. At it the derivative is that of the ratio.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    Leave biases and norms out with `masked`, as both papers do. Source: You et al., Large Batch Training of
    Convolutional Networks, arXiv:1708.03888, and arXiv:1904.00962, algorithm 2; in the form of optax.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.scale_by_trust_ratio(), torch.tensor([3.0, 4.0])
        >>> tx.update(torch.tensor([0.0, 10.0]), tx.init(params), params)[0]
        tensor([0., 5.])
    """
    check("min_norm", min_norm)
    check("trust_coefficient", trust_coefficient)
    check("eps", eps)
    check("max_ratio", max_ratio)

    def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
        least, c, small, most = s
        ours, theirs = [at_least(safe_norm(x), least) for x in (p, g)]
        is_one = (ours == 0) | (theirs == 0)
        ratio = c * ours / (torch.where(is_one, 1.0, theirs) + small)
        ratio = torch.where(is_one, 1.0, ratio)
        return g * torch.where(ratio > most, most, ratio), state

    def scalars(step: Tensor) -> Any:
        return at(min_norm, step), at(trust_coefficient, step), at(eps, step), at(max_ratio, step)

    return leafwise(None, update, scalars, norms=True, needs_params=True)


@factory
def centralize() -> GradientTransformation:
    """Subtract from each unit's gradient its mean: `g_i <- g_i - mean(g_i)`.

    A unit is an entry of the first dimension: a row of a linear layer's weight, a filter of a convolution. Tensors of
    one dimension or none are not changed.

    Source: Yong et al., Gradient Centralization, arXiv:2004.01461.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.centralize()
        >>> tx.update(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), tx.init(torch.zeros(2, 2)))[0]
        tensor([[-1.,  1.],
                [ 0.,  0.]])
    """

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        return g if g.ndim <= 1 else g - g.mean(tuple(range(1, g.ndim)), keepdim=True), state

    return leafwise(None, update)
