"""Muon: momentum, orthogonalized; and NorMuon, which makes its rows alike."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import chain
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import or_one, safe_sqrt
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._newton_schulz import (
    JORDAN,
    Coefficients,
    as_matrices,
    check_matrix,
    check_ns_dtype,
    checked_triples,
    matrix_norm,
    orthogonalized,
    triples_at,
)


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
        coefficients: triples a, b, c.
        eps: smallest norm.
    """

    momentum: Any
    weight: Any
    coefficients: tuple[Any, ...]
    eps: Any


@factory
def scale_by_muon(
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = JORDAN,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "unit_rms"] | None = None,
    *,
    flatten: bool | None = None,
    ns_dtype: torch.dtype | None = torch.bfloat16,
) -> GradientTransformation:
    """Replace the momentum of a matrix by approximately the nearest matrix with orthonormal rows or columns.

        b <- mu b + (1 - mu) g
        X = mu b + (1 - mu) g  if nesterov,  else  b
        X <- X / max(|X|, eps),  transposed if it has more rows than columns
        X <- a X + (b A + c A A) X,  A = X X^T,  ns_steps times
        g <- X sqrt(max(1, rows / columns)),  or  X 0.2 sqrt(max(rows, columns)),  or  X sqrt(rows / columns)

    Args:
        momentum: mu >= 0: number, 0-dim tensor, or schedule.
        nesterov: whether to look ahead.
        ns_coefficients: (a, b, c) of the Newton-Schulz iteration; or a sequence of such triples, one for each
            iteration; or the name of one: "jordan", "polar_express", "deepseek_v4", "cans".
        eps: smallest norm to divide by, > 0.
        ns_steps: number of iterations, < 100. Of a sequence all triples are used, whatever this number. Where it is
            more than they are, the last triple is repeated.
        adjust_lr_fn: the last factor. "original" or None: the first form, Jordan's. "match_rms_adamw": the second,
            Moonshot's, which allows the learning rate and weight decay of AdamW. "unit_rms": the third, with
            which a layer's output changes by about the learning rate, as in Scion and Dion.
        flatten: the meaning of a tensor of more than two dimensions. True: the dimensions after the first are the
            columns of one matrix, as for convolutions. False: the last two are a matrix, and those before make a stack
            of them, as for experts or heads. None: True for four dimensions and more, False for three, as in Jordan's
            code.
        ns_dtype: dtype in which to iterate. None: that of the parameter.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix; there is no such name.
        TypeError: a parameter is complex.

    Derivatives flow through the norm, and through eps if the norm is less. Small matrices of one shape are
    orthogonalized together.

    Same numbers as torch.optim.Muon, whose b is a mean, as in Jordan's code of now, and where a norm less than eps is
    replaced by it where he adds eps. The shape in the last factor is that of the flattened matrix, where Jordan's code
    takes the last two dimensions.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon; Liu et al., Muon is scalable for LLM training, arXiv:2502.16982; Amsel et
    al., The Polar Express, arXiv:2505.16932; Grishina et al., CANS, arXiv:2506.10935.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_muon(ns_coefficients="deepseek_v4", ns_dtype=None)
        >>> updates, state = tx.update(torch.diag(torch.tensor([3.0, 1.0])), tx.init(torch.zeros(2, 2)))
        >>> updates.round(decimals=1)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return _scale_by_muon(momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, flatten, ns_dtype, False)


def _scale_by_muon(
    momentum: Hyperparameter,
    nesterov: bool,
    ns_coefficients: Coefficients,
    eps: Hyperparameter,
    ns_steps: int,
    adjust_lr_fn: str | None,
    flatten: bool | None,
    ns_dtype: torch.dtype | None,
    adds: bool,
) -> GradientTransformation:
    """Make `scale_by_muon`; `adds` says whether eps is added to the norm, as in the authors' programs."""
    check("momentum", momentum)
    triples, ns_steps = checked_triples(ns_coefficients, ns_steps)
    check("epsilon value", eps, "value > 0")
    check_choice("adjust_lr_fn", adjust_lr_fn, "original", "match_rms_adamw", "unit_rms", None)
    check_choice("flatten", flatten, True, False, None)
    check_ns_dtype(ns_dtype)

    def init(p: Tensor) -> ScaleByMuonState:
        check_matrix("Muon", p)
        return ScaleByMuonState(torch.zeros_like(p))

    def scalars(step: Tensor) -> MuonScalars:
        mu = at(momentum, step)
        return MuonScalars(mu, 1 - mu, triples_at(triples, step), at(eps, step))

    def update(g: Tensor, state: ScaleByMuonState, p: Tensor | None, s: MuonScalars) -> Any:
        b = torch.lerp(state.momentum_buffer, g, s.weight)
        x = as_matrices(torch.lerp(g, b, s.momentum) if nesterov else b, flatten).to(ns_dtype or g.dtype)
        norm = matrix_norm(x)
        x = orthogonalized(x / (norm + s.eps if adds else torch.clamp_min(norm, s.eps)), s.coefficients, ns_steps)
        return (x.to(g.dtype) * _factor(x, adjust_lr_fn)).reshape(g.shape), ScaleByMuonState(b)

    return of_rule(init, update, scalars, stacks=True)


def _factor(x: Tensor, adjust_lr_fn: str | None) -> float:
    rows, columns = x.shape[-2:]
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / max(columns, 1)
    return math.sqrt(ratio if adjust_lr_fn == "unit_rms" else max(1, ratio))


@factory
def muon(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = JORDAN,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "unit_rms"] | None = None,
    *,
    flatten: bool | None = None,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    maximize: bool = False,
) -> GradientTransformation:
    """Muon, for the matrices of hidden layers; all other parameters need another optimizer, see `muon_with_adamw`.

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
        flatten: see `scale_by_muon`; torch.optim.Muon has matrices only.
        ns_dtype: see `scale_by_muon`; torch.optim.Muon has bfloat16 only.
        maximize: ascend instead; parameters still shrink. torch.optim.Muon has no such option.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix.
        TypeError: a parameter is complex.

    Same numbers as torch.optim.Muon. Source: Jordan et al., 2024; Liu et al., arXiv:2502.16982, equation 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.muon(lr=0.02, ns_coefficients="polar_express")
        >>> params = {"linear": torch.ones(2, 3), "convolution": torch.ones(2, 3, 5, 5)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["convolution"].shape
        torch.Size([2, 3, 5, 5])
    """
    rule = scale_by_muon(
        momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn, flatten=flatten, ns_dtype=ns_dtype
    )
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)


@leaf_state
class NormalizeRowsState(NamedTuple):
    """The state of `normalize_rows` for one parameter.

    Attributes:
        second_momentum_buffer: v, running mean of the mean squares of rows: (..., rows, 1); or of columns.
    """

    second_momentum_buffer: Tensor


class NormalizeRowsScalars(NamedTuple):
    """The numbers of `normalize_rows` at a step.

    Attributes:
        weight: 1 - beta2.
        eps: added to roots and norms.
    """

    weight: Any
    eps: Any


@factory
def normalize_rows(
    beta2: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-10,
    axis: Literal[-1, -2] | None = -1,
    *,
    flatten: bool | None = None,
) -> GradientTransformation:
    """Divide each row of a matrix by its size so far, and keep the norm of the matrix.

        v <- beta2 v + (1 - beta2) mean over columns of g^2
        O = g / (sqrt(v) + eps)
        g <- O |g| / (|O| + eps)

    Args:
        beta2: decay rate in [0, 1): number, 0-dim tensor, or schedule. v is not corrected for its beginning at zero.
        eps: added to roots and norms, >= 0.
        axis: the axis of the mean. -1: columns, so that each row, a neuron, has a number. -2: rows. None: the shorter
            side, as in nanochat.
        flatten: see `scale_by_muon`.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix.
        TypeError: a parameter is complex.

    Where a row is zero, it stays zero. Source: Li et al., NorMuon, arXiv:2510.05491, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.normalize_rows()
        >>> tx.update(torch.diag(torch.tensor([4.0, 3.0])), tx.init(torch.zeros(2, 2)))[0]
        tensor([[3.5355, 0.0000],
                [0.0000, 3.5355]])
    """
    check("beta2", beta2, "0 <= value < 1")
    check("epsilon value", eps)
    check_choice("axis", axis, -1, -2, None)

    def over(shape: torch.Size) -> int:
        return axis or (-1 if shape[-2] >= shape[-1] else -2)

    def mean_square(x: Tensor) -> Tensor:
        dim = over(x.shape)
        return x.square().sum(dim, keepdim=True) / max(x.shape[dim], 1)

    def init(p: Tensor) -> NormalizeRowsState:
        check_matrix("Muon", p)
        return NormalizeRowsState(
            torch.zeros_like(mean_square(as_matrices(p, flatten)), memory_format=torch.contiguous_format)
        )

    def scalars(step: Tensor) -> NormalizeRowsScalars:
        return NormalizeRowsScalars(1 - at(beta2, step), at(eps, step))

    def update(g: Tensor, state: NormalizeRowsState, p: Tensor | None, s: NormalizeRowsScalars) -> Any:
        x = as_matrices(g, flatten)
        v = torch.lerp(state.second_momentum_buffer, mean_square(x), s.weight)
        o = x / or_one(safe_sqrt(v) + s.eps)
        return (o * (matrix_norm(x) / or_one(matrix_norm(o) + s.eps))).reshape(g.shape), NormalizeRowsState(v)

    return of_rule(init, update, scalars, stacks=True)


@factory
def normuon(
    lr: Hyperparameter = 0.02,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.95,
    beta2: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-10,
    *,
    nesterov: bool = True,
    ns_coefficients: Coefficients = JORDAN,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "unit_rms"] | None = None,
    axis: Literal[-1, -2] | None = -1,
    flatten: bool | None = None,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    maximize: bool = False,
) -> GradientTransformation:
    """NorMuon: Muon, with neurons whose updates are of one size.

        u = -lr (normalize_rows(scale_by_muon(g)) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        momentum: see `scale_by_muon`.
        beta2: see `normalize_rows`.
        eps: see `normalize_rows`. Newton-Schulz's own, 1e-7, is added to the norm.
        nesterov: see `scale_by_muon`.
        ns_coefficients: see `scale_by_muon`.
        ns_steps: see `scale_by_muon`.
        adjust_lr_fn: see `scale_by_muon`.
        axis: see `normalize_rows`.
        flatten: see `scale_by_muon`.
        ns_dtype: see `scale_by_muon`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix.
        TypeError: a parameter is complex.

    Same numbers as the authors' program, which scales by the shape after the rows; that is the same but for eps. Of a
    convolution, their program takes means over the width of the kernel, and this one over all columns.

    Source: Li et al., NorMuon, arXiv:2510.05491, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.ones(2, 3)}
        >>> tx = fo.normuon(lr=0.02)
        >>> state = tx.init(params)
        >>> fo.tree.get(state, "second_momentum_buffer")["w"].shape
        torch.Size([2, 1])
    """
    muon_rule = _scale_by_muon(
        momentum, nesterov, ns_coefficients, 1e-7, ns_steps, adjust_lr_fn, flatten, ns_dtype, True
    )
    rule = chain(muon_rule, normalize_rows(beta2, eps, axis, flatten=flatten))
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)
