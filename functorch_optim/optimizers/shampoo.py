"""Shampoo: a full-matrix Adagrad for each side of a tensor."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._control import cond, same, select
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice, check_each, check_integer
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, or_one, safe_norm, safe_sqrt, where
from functorch_optim.optimizers._descent import check_real, descent
from functorch_optim.optimizers._sides import (
    as_sides,
    block_shapes,
    by_size,
    cut,
    glued,
    gram,
    initial,
    joined,
    parted,
    times,
)
from functorch_optim.optimizers._spectral import inverse_root

Grafting = Literal["adam", "rmsprop", "adagrad", "sgd"]


@leaf_state
class ScaleByShampooState(NamedTuple):
    """The state of `scale_by_shampoo` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        factor_matrices: L of all sides, end to end: block after block, and in each dimension after dimension. Those of
            a matrix (n, m) are (n^2 + m^2,). float32 at least.
        inv_factor_matrices: their inverse roots, of the last time they were computed: likewise.
    """

    exp_avg: Tensor
    factor_matrices: Tensor
    inv_factor_matrices: Tensor


@leaf_state
class ScaleByGraftedShampooState(NamedTuple):
    """The state of `scale_by_shampoo` for one parameter, where the method that it is grafted on has one.

    Attributes:
        exp_avg: see `ScaleByShampooState`.
        factor_matrices: see `ScaleByShampooState`.
        inv_factor_matrices: see `ScaleByShampooState`.
        exp_avg_sq: v, running mean of g^2, for Adagrad the sum: like p.
    """

    exp_avg: Tensor
    factor_matrices: Tensor
    inv_factor_matrices: Tensor
    exp_avg_sq: Tensor


class ShampooScalars(NamedTuple):
    """The numbers of Shampoo at a step.

    Attributes:
        weight1: 1 - beta1.
        rate1: 1 / (1 - beta1^t).
        beta2: beta2.
        weight2: 1 - beta2; 1 where L is a sum.
        rate2: 1 / (1 - beta2^t); 1 where L is a sum.
        eps: eps.
        due: 1 where roots are computed, else 0.
        started: 1 from the start on, else 0.
        beta3: decay rate of v.
        weight3: factor of g^2 in v.
        rate3: factor of v.
        grafting_eps: eps of the method that it is grafted on.
    """

    weight1: Any
    rate1: Any
    beta2: Any
    weight2: Any
    rate2: Any
    eps: Any
    due: Any
    started: Any
    beta3: Any
    weight3: Any
    rate3: Any
    grafting_eps: Any


@factory
def scale_by_shampoo(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    frequency: int = 1,
    grafting: Grafting | None = None,
    start: int | None = None,
    max_dim: int = 1024,
    *,
    grafting_beta2: Hyperparameter | None = None,
    grafting_eps: Hyperparameter = 1e-8,
    root: int | None = None,
    one_sided: bool = False,
    kl: bool = False,
    flatten: bool = False,
) -> GradientTransformation:
    """Multiply the momentum of a tensor, along each dimension, by an inverse root of the gradients' second moment.

        m <- beta1 m + (1 - beta1) g,  M = m / (1 - beta1^t)
        L <- beta2 L + (1 - beta2) g g^T,  L + g g^T if beta2 is 1
        R <- likewise with g^T g
        L^ = (L / (1 - beta2^t) + eps)^(-1/4),  R^ likewise,  at steps start, and later at multiples of frequency
        g <- L^ M R^

    That is for a matrix. A tensor of k dimensions has a matrix for each of them, and the power -1 / (2 k); a vector has
    one, and the power -1/2. Before the start g <- M.

    With grafting, the norm is that of another method, which moves alone before the start:

        V = M / (sqrt(v / (1 - grafting_beta2^t)) + grafting_eps)   "adam"
        V = M / (sqrt(v) + grafting_eps)                            "rmsprop"; "adagrad": v is the sum of g^2
        V = M                                                       "sgd"
        g <- g |V| / |g|,  V before the start

    Args:
        betas: decay rates of m, in [0, 1), and of L, in [0, 1]; 1 makes L a sum, as in Adagrad and in the paper.
        eps: added to eigenvalues of L, > 0. Sums that are less than the rounding of the largest eigenvalue, 1e-6 of it
            in float32, are taken for that. Meta's default is 1e-12.
        frequency: steps from one computation of roots to the next, >= 1.
        grafting: the method whose norm a step has: "adam", "rmsprop", "adagrad", "sgd", or None.
        start: first step with roots, >= 1. None: the frequency.
        max_dim: longest side of a matrix L, >= 1. Longer tensors are cut into blocks, each with matrices and a norm of
            its own.
        grafting_beta2: decay rate of v for "adam" and "rmsprop", in [0, 1). None: that of L; 0.999 where that is 1.
        grafting_eps: added to the root of v, >= 0.
        root: r of the power -1 / r, >= 1. None: as above; 2 with `one_sided` or `kl`.
        one_sided: precondition the shorter side alone, of the first of equal ones.
        kl: KL-Shampoo. L is the moment of g, preconditioned on all other sides, (g R^) (g R^)^T, with the last R^.
        flatten: whether the dimensions after the first are one, as for convolutions.

    Raises:
        ValueError: a number is out of range; there is no such grafting.
        TypeError: a parameter is complex.

    Roots are computed only at the steps where they are due, and at all steps under vmap and torch.compile, which pick.
    Derivatives flow through them, exact up to the third order, also where L has equal eigenvalues or zeros; that of the
    norm is zero where the norm is zero. A matrix (n, m) takes 4 n m (n + m) operations a step, and some 12 (n^3 + m^3)
    more for roots.

    The formula is that of Meta's Distributed Shampoo whose `target_parameter_dimensionality` is at least the number of
    dimensions, so that none are merged. It adds 1e-16 to |g|, where we divide by 1 if |g| is 0. Differs from the papers
    in momentum of the gradient and in the correction.

    Source: Gupta et al., arXiv:1802.09568, algorithms 1 and 2; grafting, frequency and blocks: Anil et al.,
    arXiv:2002.09018; Shi et al., arXiv:2309.06497; KL-Shampoo: Lin et al., arXiv:2509.03378.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_shampoo(eps=1e-12)
        >>> updates, state = tx.update(torch.diag(torch.tensor([4.0, -9.0])), tx.init(torch.zeros(2, 2)))
        >>> updates.round(decimals=3)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    check_each("betas", betas, ("0 <= value < 1", "0 <= value <= 1"), "(0.9, 0.999)", "beta parameter")
    check("epsilon value", eps, "value > 0")
    check_integer("frequency", frequency, 1)
    check_choice("grafting", grafting, "adam", "rmsprop", "adagrad", "sgd", None)
    begins = frequency if start is None else start
    check_integer("start", begins, 1)
    check_integer("max_dim", max_dim, 1)
    check("grafting_beta2", 0.0 if grafting_beta2 is None else grafting_beta2, "0 <= value < 1")
    check("grafting_eps", grafting_eps)
    if root is not None:
        check_integer("root", root, 1)
    second = grafting in ("adam", "rmsprop", "adagrad")

    def init(p: Tensor) -> ScaleByShampooState:
        check_real("Shampoo", p)
        all_sizes = _sizes(block_shapes(as_sides(p, flatten).shape, max_dim), one_sided)
        return ScaleByShampooState(torch.zeros_like(p), initial(all_sizes, p, 0.0), initial(all_sizes, p, 1.0))

    def init_grafted(p: Tensor) -> ScaleByGraftedShampooState:
        return ScaleByGraftedShampooState(*init(p), torch.zeros_like(p))

    def scalars(step: Any) -> ShampooScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        sums, due = beta2 == 1, (step == begins) | ((step > begins) & (step % frequency == 0))
        beta3 = where(sums, 0.999, beta2) if grafting_beta2 is None else at(grafting_beta2, step)
        adds = grafting == "adagrad"
        return ShampooScalars(
            weight1=1 - beta1,
            rate1=1 / debias(beta1, step),
            beta2=beta2,
            weight2=where(sums, 1.0, 1 - beta2),
            rate2=1 / where(sums, 1.0, debias(beta2, step)),
            eps=at(eps, step),
            due=where(due, 1.0, 0.0),
            started=where(step >= begins, 1.0, 0.0),
            beta3=1.0 if adds else beta3,
            weight3=1.0 if adds else 1 - beta3,
            rate3=1 / debias(beta3, step) if grafting == "adam" else 1.0,
            grafting_eps=at(grafting_eps, step),
        )

    def update(g: Tensor, state: Any, p: Any, s: ShampooScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        blocks, means = [cut(as_sides(x, flatten), max_dim) for x in (g, s.rate1 * m)]
        shape, shapes = as_sides(g, flatten).shape, [tuple(block.shape) for block in blocks]
        all_sizes = _sizes(shapes, one_sided)
        power = root or (2 if one_sided or kl else 2 * len(shape))

        def paired(vector: Tensor) -> list[list[tuple[int, Tensor]]]:
            """Take the matrices of all blocks out of a vector, each with its dimension."""
            matrices = iter(parted(vector, all_sizes))
            return [[(dim, next(matrices)) for dim in _sides(some, one_sided)] for some in shapes]

        def computed(_: Tensor) -> Tensor:
            factors = parted(s.rate2 * new_factors, all_sizes)
            return joined(by_size(lambda a: inverse_root(a, power, s.eps), factors), g)

        last = paired(state.inv_factor_matrices)
        moments = [
            gram(_times_all(block, [one for one in matrices if kl and one[0] != dim]), dim)
            for block, matrices in zip(blocks, last, strict=True)
            for dim, _ in matrices
        ]
        new_factors = s.beta2 * state.factor_matrices + s.weight2 * joined(moments, g)
        roots = cond(s.due > 0, computed, same, state.inv_factor_matrices)
        directions = [_times_all(mean, matrices) for mean, matrices in zip(means, paired(roots), strict=True)]
        new: Any = ScaleByShampooState(m, new_factors, roots)
        if grafting is None:
            return glued(directions, shape, max_dim).reshape(g.shape), new
        grafts = means
        if second:
            v = s.beta3 * state.exp_avg_sq + s.weight3 * g * g
            scaled = s.rate1 * m / (safe_sqrt(s.rate3 * v) + s.grafting_eps)
            grafts, new = cut(as_sides(scaled, flatten), max_dim), ScaleByGraftedShampooState(m, new_factors, roots, v)
        grafted = [
            direction * (safe_norm(graft) / or_one(safe_norm(direction)))
            for direction, graft in zip(directions, grafts, strict=True)
        ]
        moved = select(s.started > 0, glued(grafted, shape, max_dim), glued(grafts, shape, max_dim))
        return moved.reshape(g.shape), new

    return leafwise(init_grafted if second else init, update, scalars)


def _sides(shape: tuple[int, ...], one_sided: bool) -> list[int]:
    """List the dimensions of a block that have a matrix."""
    if 0 in shape:
        return []
    return [shape.index(min(shape))] if one_sided else list(range(len(shape)))


def _sizes(shapes: list[tuple[int, ...]], one_sided: bool) -> list[int]:
    return [shape[dim] for shape in shapes for dim in _sides(shape, one_sided)]


def _times_all(x: Tensor, matrices: list[tuple[int, Tensor]]) -> Tensor:
    for dim, matrix in matrices:
        x = times(x, matrix, dim)
    return x


@factory
def shampoo(
    lr: Hyperparameter = 1e-2,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    frequency: int = 1,
    grafting: Grafting | None = None,
    start: int | None = None,
    max_dim: int = 1024,
    *,
    grafting_beta2: Hyperparameter | None = None,
    grafting_eps: Hyperparameter = 1e-8,
    root: int | None = None,
    one_sided: bool = False,
    kl: bool = False,
    flatten: bool = False,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
) -> GradientTransformation:
    """Shampoo: as Adagrad, with a full matrix for each side of a tensor in place of a number for each element.

        u = -lr (scale_by_shampoo(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule. With `grafting="adam"`, that of Adam.
        betas: see `scale_by_shampoo`.
        eps: see `scale_by_shampoo`.
        weight_decay: >= 0. Unless it is the number 0, `update` needs the parameters.
        frequency: see `scale_by_shampoo`.
        grafting: see `scale_by_shampoo`.
        start: see `scale_by_shampoo`.
        max_dim: see `scale_by_shampoo`.
        grafting_beta2: see `scale_by_shampoo`.
        grafting_eps: see `scale_by_shampoo`.
        root: see `scale_by_shampoo`.
        one_sided: see `scale_by_shampoo`.
        kl: see `scale_by_shampoo`.
        flatten: see `scale_by_shampoo`.
        decoupled_weight_decay: False: decay as an L2 penalty of the gradient.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range; there is no such grafting.
        TypeError: a parameter is complex.

    Source: see `scale_by_shampoo`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.shampoo(lr=0.1, grafting="adam", frequency=10), {"w": torch.ones(3, 2)}
        >>> updates, state = tx.update({"w": torch.ones(3, 2)}, tx.init(params))
        >>> updates["w"][0], fo.tree.get(state, "factor_matrices")["w"].shape
        (tensor([-0.1000, -0.1000]), torch.Size([13]))
    """
    rule = scale_by_shampoo(
        betas,
        eps,
        frequency,
        grafting,
        start,
        max_dim,
        grafting_beta2=grafting_beta2,
        grafting_eps=grafting_eps,
        root=root,
        one_sided=one_sided,
        kl=kl,
        flatten=flatten,
    )
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)
