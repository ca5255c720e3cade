"""CAME: Adafactor with momentum that is trusted where it agrees with the steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_each
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim._numerics import debias
from functorch_optim.optimizers._descent import check_real, descent
from functorch_optim.optimizers._factored import estimate, inverse_root, normalized, running_means
from functorch_optim.tree import Tree
from functorch_optim.tree import map as tree_map


@leaf_state
class CameState(NamedTuple):
    """The state of `came` for a parameter (..., n, m) of two dimensions or more.

    Attributes:
        exp_avg: m, running mean of u: like p.
        exp_avg_sq_row: R, running mean of the means of g^2 over columns: (..., n, 1), float32 at least.
        exp_avg_sq_col: C, running mean of the means of g^2 over rows: (..., 1, m), float32 at least.
        exp_avg_res_row: running mean of the means of (u - m)^2 over columns: likewise.
        exp_avg_res_col: running mean of the means of (u - m)^2 over rows: likewise.
    """

    exp_avg: Tensor
    exp_avg_sq_row: Tensor
    exp_avg_sq_col: Tensor
    exp_avg_res_row: Tensor
    exp_avg_res_col: Tensor


@leaf_state
class CameVectorState(NamedTuple):
    """The state of `came` for a vector or a scalar.

    Attributes:
        exp_avg: m, running mean of u: like p.
        exp_avg_sq: V, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class CameScalars(NamedTuple):
    """The numbers of CAME at a step: the weights of new values in m, V and S, both eps, and the clipping threshold."""

    weight1: Any
    weight2: Any
    weight3: Any
    eps1: Any
    eps2: Any
    d: Any


@factory
def came(
    lr: Hyperparameter = 2e-4,
    betas: tuple[Hyperparameter, Hyperparameter, Hyperparameter] = (0.9, 0.999, 0.9999),
    eps: tuple[Hyperparameter, Hyperparameter] = (1e-30, 1e-16),
    weight_decay: Hyperparameter = 0.0,
    clip_threshold: Hyperparameter = 1.0,
    *,
    bias_correction: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """CAME: Adafactor's steps, averaged, and divided by how much they vary about their average.

        R <- beta2 R + (1 - beta2) mean over columns of (g^2 + eps1)
        C <- beta2 C + (1 - beta2) mean over rows of (g^2 + eps1)
        V = R C / mean(R)        for vectors and scalars: V <- beta2 V + (1 - beta2) (g^2 + eps1)
        u = g / sqrt(V)
        u <- u / max(1, RMS(u) / clip_threshold)
        m <- beta1 m + (1 - beta1) u
        S from (u - m)^2 + eps2 as V is from g^2 + eps1, with beta3
        u = -lr (m / sqrt(S) + weight_decay p)        for vectors and scalars: S = 1

    Tensors of more than two dimensions are stacks of matrices, whose dimensions are the last two.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates of m, of V, and of S, in [0, 1).
        eps: (eps1, eps2), added to the squares, >= 0.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        clip_threshold: largest root mean square of u, > 0.
        bias_correction: divide V by 1 - beta2^t and S by 1 - beta3^t. The authors do not: then S is small at first, and
            the steps of matrices are more than ten times too large, by their root mean square, unless there is a
            warm-up.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    Derivatives are finite at zero gradients. At RMS(u) = clip_threshold the derivative is that of the clipped u.

    Source: Luo et al., CAME: Confidence-guided Adaptive Memory Efficient Optimization, arXiv:2307.02047, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.came(lr=0.1, bias_correction=True), torch.ones(2, 3)
        >>> updates, state = tx.update(torch.ones(2, 3), tx.init(params), params)
        >>> updates[0], fo.tree.get(state, "exp_avg_res_row").shape
        (tensor([-0.0111, -0.0111, -0.0111]), torch.Size([2, 1]))
    """
    check_each("betas", betas, ("0 <= value < 1",) * 3, "(0.9, 0.999, 0.9999)", "beta parameter")
    check_each("eps", eps, ("value >= 0",) * 2, "(1e-30, 1e-16)", "epsilon value")
    check("clip_threshold", clip_threshold, "value > 0")
    beta1, beta2, beta3 = betas

    def scalars(step: Tensor) -> CameScalars:
        def weight(beta: Hyperparameter, corrected: bool) -> Any:
            kept = at(beta, step)
            return (1 - kept) / debias(kept, step) if corrected else 1 - kept

        return CameScalars(
            weight(beta1, False),
            weight(beta2, bias_correction),
            weight(beta3, bias_correction),
            *(at(number, step) for number in (*eps, clip_threshold)),
        )

    def of_matrix(g: Tensor, state: CameState, p: Any, s: CameScalars) -> Any:
        r, c = running_means(state.exp_avg_sq_row, state.exp_avg_sq_col, g * g + s.eps1, s.weight2)
        u = normalized(g, estimate(r, c), s.d)
        m = torch.lerp(state.exp_avg, u, s.weight1)
        instability = (u - m).square() + s.eps2
        res_r, res_c = running_means(state.exp_avg_res_row, state.exp_avg_res_col, instability, s.weight3)
        return m * inverse_root(estimate(res_r, res_c)), CameState(m, r, c, res_r, res_c)

    def of_vector(g: Tensor, state: CameVectorState, p: Any, s: CameScalars) -> Any:
        v = torch.lerp(state.exp_avg_sq, g * g + s.eps1, s.weight2)
        m = torch.lerp(state.exp_avg, normalized(g, v, s.d), s.weight1)
        return m, CameVectorState(m, v)

    rules = {
        "matrix": leafwise(_init_matrix, of_matrix, scalars),
        "vector": leafwise(_init_vector, of_vector, scalars),
    }
    return descent(partition(rules, _kinds), lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)


def _kinds(params: Tree) -> Tree:
    return tree_map(lambda p: "matrix" if p.ndim > 1 else "vector", params)


def _init_matrix(p: Tensor) -> CameState:
    check_real("CAME", p)
    # In half precision their changes, by 1 - beta3 of themselves, would be rounded away.
    row, col = [torch.zeros_like(p.sum(dim, keepdim=True), dtype=common_dtype([p])) for dim in (-1, -2)]
    return CameState(torch.zeros_like(p), row, col, torch.zeros_like(row), torch.zeros_like(col))


def _init_vector(p: Tensor) -> CameVectorState:
    check_real("CAME", p)
    return CameVectorState(torch.zeros_like(p), torch.zeros_like(p))
