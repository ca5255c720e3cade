"""Scion: steps to the corners of a ball in a norm that fits the layer."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import rms, safe_sqrt
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._newton_schulz import (
    JORDAN,
    Coefficients,
    check_ns_dtype,
    checked_triples,
    matrix_norm,
    orthogonalized,
    triples_at,
)

_NORMS = ("auto", "spectral", "sign", "row", "col", "rms")


@leaf_state
class ScaleByLMOState(NamedTuple):
    """The state of `scale_by_lmo` for one parameter.

    Attributes:
        momentum_buffer: m, running mean of g: like p.
    """

    momentum_buffer: Tensor


class LMOScalars(NamedTuple):
    """The numbers of `scale_by_lmo` at a step.

    Attributes:
        momentum: a, the weight of the new gradient.
        scale: radius of the ball.
        coefficients: of Newton and Schulz's iteration.
    """

    momentum: Any
    scale: Any
    coefficients: tuple[Any, ...]


@factory
def scale_by_lmo(
    momentum: Hyperparameter = 1.0,
    norm: Literal["auto", "spectral", "sign", "row", "col", "rms"] = "auto",
    scale: Hyperparameter = 1.0,
    *,
    ns_coefficients: Coefficients = JORDAN,
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> GradientTransformation:
    """Replace the momentum by the point of a ball that is farthest along it: the linear minimization oracle, negated.

        m <- (1 - a) m + a g
        g <- scale lmo(m)

    Args:
        momentum: a in [0, 1], the weight of the new gradient: number, 0-dim tensor, or schedule. 1: no memory.
        norm: which ball. A tensor of more than two dimensions, (out, in, kernel...), is a matrix of `out` rows.
            "spectral": U V^T sqrt(out / in), and divided by the number of elements of the kernel, where m = U S V^T.
            "sign": sign(m) / in; of a vector, sign(m).
            "row": each row divided by its norm and by sqrt(columns).
            "col": each column divided by its root mean square.
            "rms": m divided by its root mean square.
            "auto": "spectral" for two dimensions and more, "rms" for fewer.
        scale: radius >= 0.
        ns_coefficients: of the Newton-Schulz iteration of "spectral"; see `scale_by_muon`.
        ns_steps: see `scale_by_muon`.
        ns_dtype: see `scale_by_muon`.

    Raises:
        ValueError: a number is out of range; there is no such norm; a vector is given to one of matrices.
        TypeError: a parameter is complex.

    "sign" has no derivative: those with respect to gradients and momentum are zero. 1e-8 is added to a norm that is
    divided by, and 1e-7 to the norm from which the iteration begins.

    Source: Pethick et al., Training deep learning models with norm-constrained LMOs, arXiv:2502.07529.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_lmo(norm="sign")
        >>> tx.update(torch.tensor([[3.0, -2.0]]), tx.init(torch.zeros(1, 2)))[0]
        tensor([[ 0.5000, -0.5000]])
    """
    check("momentum", momentum, "0 <= value <= 1")
    check_choice("norm", norm, *_NORMS)
    check("scale", scale)
    check_ns_dtype(ns_dtype)
    triples, ns_steps = checked_triples(ns_coefficients, ns_steps)

    def init(p: Tensor) -> ScaleByLMOState:
        if norm in ("spectral", "row", "col") and p.ndim < 2:
            raise ValueError(
                f"The norm {norm!r} is one of matrices, but this parameter has shape {tuple(p.shape)}; give "
                "norm='auto', or another norm with partition"
            )
        if p.is_complex():
            raise TypeError("Scion does not support complex parameters; give them to another optimizer, with partition")
        return ScaleByLMOState(torch.zeros_like(p))

    def scalars(step: Tensor) -> LMOScalars:
        return LMOScalars(at(momentum, step), at(scale, step), triples_at(triples, step))

    def spectral(m: Tensor, s: LMOScalars) -> Tensor:
        x = m.flatten(1).to(ns_dtype or m.dtype)
        x = orthogonalized(x / (matrix_norm(x) + 1e-7), s.coefficients, ns_steps)
        rows, columns = m.shape[:2]
        return x.to(m.dtype).reshape(m.shape) * (math.sqrt(rows / max(columns, 1)) / max(m.shape[2:].numel(), 1))

    def lmo(m: Tensor, s: LMOScalars) -> Tensor:
        kind = ("spectral" if m.ndim > 1 else "rms") if norm == "auto" else norm
        if kind == "spectral":
            return spectral(m, s)
        if kind == "sign":
            return torch.sign(m) / (max(m.shape[1], 1) if m.ndim > 1 else 1)
        if kind == "rms":
            return m / (rms(m) + 1e-8)
        x = m.flatten(1)
        if kind == "row":
            size = safe_sqrt(x.square().sum(1, keepdim=True)) * math.sqrt(x.shape[1])
        else:
            size = safe_sqrt(x.square().sum(0, keepdim=True) / max(x.shape[0], 1))
        return (x / (size + 1e-8)).reshape(m.shape)

    def update(g: Tensor, state: ScaleByLMOState, p: Tensor | None, s: LMOScalars) -> Any:
        m = torch.lerp(state.momentum_buffer, g, s.momentum)
        return s.scale * lmo(m, s), ScaleByLMOState(m)

    return of_rule(init, update, scalars, stacks=True)


@factory
def scion(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 1.0,
    norm: Literal["auto", "spectral", "sign", "row", "col", "rms"] = "auto",
    scale: Hyperparameter = 1.0,
    unconstrained: bool = False,
    *,
    ns_coefficients: Coefficients = JORDAN,
    ns_steps: int = 5,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    maximize: bool = False,
) -> GradientTransformation:
    """Scion: walk towards the farthest point of a norm ball, so that weights stay inside it.

        u = -lr (scale_by_lmo(g) + p),  or  -lr scale_by_lmo(g)  if unconstrained

    Args:
        lr: learning rate in [0, 1]: number, 0-dim tensor, or schedule.
        momentum: see `scale_by_lmo`; 0.1 is usual.
        norm: see `scale_by_lmo`. Layers are given "spectral", the last one "sign", by groups or `partition`.
        scale: see `scale_by_lmo`: the authors' examples have 50 for hidden layers and 3000 for the last one.
        unconstrained: do not shrink the weights.
        ns_coefficients: see `scale_by_muon`.
        ns_steps: see `scale_by_muon`.
        ns_dtype: see `scale_by_muon`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; there is no such norm; a vector is given to one of matrices.
        TypeError: a parameter is complex.

    Same numbers as the authors' program. With "sign" only lr, scale and the parameters have a derivative.

    Source: Pethick et al., arXiv:2502.07529, algorithms 1 and 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> hidden = {"params": model[0].parameters(), "scale": 50.0}
        >>> groups = [hidden, {"params": model[2].parameters(), "norm": "sign"}]
        >>> opt = fo.Optimizer(groups, fo.scion, lr=0.01, momentum=0.1)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> opt.step()
    """
    rule = scale_by_lmo(momentum, norm, scale, ns_coefficients=ns_coefficients, ns_steps=ns_steps, ns_dtype=ns_dtype)
    weight_decay = 0.0 if unconstrained else 1.0
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)
