"""Muon: momentum, orthogonalized."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice, check_each, check_integer
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory, leafwise
from functorch_optim.optimizers._descent import descent

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: Jordan's, which have a large slope at zero."""


@leaf_state
class ScaleByMuonState(NamedTuple):
    """The state of `scale_by_muon` for one parameter.

    Attributes:
        momentum_buffer: b, running mean of g: like p.
    """

    momentum_buffer: Tensor


class MuonScalars(NamedTuple):
    """The numbers of Muon at a step.

    Attributes:
        momentum: mu.
        weight: 1 - mu.
        coefficients: a, b, c.
        eps: smallest norm.
    """

    momentum: Any
    weight: Any
    coefficients: tuple[Any, Any, Any]
    eps: Any


@factory
def scale_by_muon(
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = COEFFICIENTS,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
    *,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> GradientTransformation:
    """Replace the momentum of a matrix by approximately the nearest matrix with orthonormal rows or columns.

        b <- mu b + (1 - mu) g
        X = mu b + (1 - mu) g  if nesterov,  else  b
        X <- X / max(|X|, eps),  transposed if it has more rows than columns
        X <- a X + (b A + c A A) X,  A = X X^T,  ns_steps times
        g <- X sqrt(max(1, rows / columns)),  or  X 0.2 sqrt(max(rows, columns))

    Args:
        momentum: mu >= 0: number, 0-dim tensor, or schedule.
        nesterov: whether to look ahead.
        ns_coefficients: (a, b, c) of the Newton-Schulz iteration.
        eps: smallest norm to divide by, > 0.
        ns_steps: number of iterations, < 100.
        adjust_lr_fn: choice of the last factor. "original" or None: the first form, Jordan's. "match_rms_adamw": the
            second, Moonshot's, which allows the learning rate and weight decay of AdamW.
        ns_dtype: dtype in which to iterate. None: that of the parameter.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix.
        TypeError: a parameter is complex.

    Derivatives flow through the norm, and through eps if the norm is less.

    Differs from Jordan's as torch.optim.Muon does: b is a mean of gradients, and his is a sum; eps is a lower limit of
    the norm, and he adds it to the norm.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon; Liu et al., Muon is scalable for LLM training, arXiv:2502.16982.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_muon(ns_steps=10, ns_coefficients=(2.0, -1.5, 0.5))
        >>> updates, state = tx.update(torch.diag(torch.tensor([3.0, 1.0])), tx.init(torch.zeros(2, 2)))
        >>> updates.round(decimals=1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    check("momentum", momentum)
    check_each("ns_coefficients", ns_coefficients, ("a number",) * 3, "(3.4445, -4.775, 2.0315)")
    check("epsilon value", eps, "value > 0")
    check_integer("ns_steps", ns_steps, 0)
    if ns_steps >= 100:
        raise ValueError(f"Invalid ns_steps: {ns_steps}; torch.optim.Muon takes less than 100, and 5 are usual")
    check_choice("adjust_lr_fn", adjust_lr_fn, "original", "match_rms_adamw", None)

    def init(p: Tensor) -> ScaleByMuonState:
        if p.ndim != 2:
            raise ValueError(
                f"Muon is for matrices, but this parameter has shape {tuple(p.shape)}; give it to another optimizer, "
                "as in partition({True: muon(), False: adamw()}, lambda ps: tree.map(lambda p: p.ndim == 2, ps))"
            )
        if p.is_complex():
            raise TypeError("Muon does not support complex parameters; give them to another optimizer, with partition")
        return ScaleByMuonState(torch.zeros_like(p))

    def scalars(step: Tensor) -> MuonScalars:
        mu = at(momentum, step)
        a, b, c = [at(value, step) for value in ns_coefficients]
        return MuonScalars(mu, 1 - mu, (a, b, c), at(eps, step))

    def update(g: Tensor, state: ScaleByMuonState, p: Tensor | None, s: MuonScalars) -> Any:
        b = torch.lerp(state.momentum_buffer, g, s.weight)
        x = torch.lerp(g, b, s.momentum) if nesterov else b
        orthogonal = _orthogonalized(x.to(ns_dtype or x.dtype), s.coefficients, ns_steps, s.eps)
        return orthogonal.to(g.dtype) * _factor(g.shape, adjust_lr_fn), ScaleByMuonState(b)

    return leafwise(init, update, scalars)


def _orthogonalized(x: Tensor, coefficients: tuple[Any, Any, Any], ns_steps: int, eps: Any) -> Tensor:
    """Approximate U V^T of x = U S V^T by the iteration of Newton and Schulz."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / torch.clamp_min(x.norm(), eps)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = _addmm(a, x, 1.0, _addmm(b, gram, c, gram, gram), x)
    return x.mT if tall else x


def _addmm(beta: Any, x: Tensor, alpha: Any, y: Tensor, z: Tensor) -> Tensor:
    """Compute beta x + alpha y z: rounded once where the factors are numbers."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        mixed: Tensor = beta * x + alpha * (y @ z)
        return mixed
    return torch.addmm(x, y, z, beta=beta, alpha=alpha)


def _factor(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / max(columns, 1)))


@factory
def muon(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = COEFFICIENTS,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
    *,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    maximize: bool = False,
) -> GradientTransformation:
    """Muon, for the matrices of hidden layers; all other parameters need another optimizer, see `partition`.

        u = -lr (scale_by_muon(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        momentum: see `scale_by_muon`.
        nesterov: see `scale_by_muon`.
        ns_coefficients: see `scale_by_muon`.
        eps: see `scale_by_muon`.
        ns_steps: see `scale_by_muon`.
        adjust_lr_fn: see `scale_by_muon`.
        ns_dtype: see `scale_by_muon`; torch.optim.Muon has bfloat16 only.
        maximize: ascend instead; parameters still shrink. torch.optim.Muon has no such option.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix.
        TypeError: a parameter is complex.

    Same numbers as torch.optim.Muon. Source: Jordan et al., 2024; Liu et al., arXiv:2502.16982, equation 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> def matrices(params):
        ...     return fo.tree.map(lambda p: p.ndim == 2, params)
        >>> tx = fo.partition({True: fo.muon(lr=0.02), False: fo.adamw(lr=1e-3)}, matrices)
        >>> params = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["weight"].shape
        torch.Size([2, 3])
    """
    rule = scale_by_muon(momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, ns_dtype=ns_dtype)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)
