"""Dion: Muon's step of low rank, from one step of power iteration."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_integer, check_number
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim._execution.mode import current, is_plain
from functorch_optim._numerics import safe_sqrt
from functorch_optim._random import key_of, mixed, normal
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers._newton_schulz import as_matrices, check_matrix


@leaf_state
class DionState(NamedTuple):
    """The state of `dion` for one parameter, a matrix of n rows and m columns.

    Attributes:
        momentum_buffer: M, sum of gradients without the parts that steps have taken: like p.
        Q: right basis, which the power iteration goes on from: (..., m, r), float32 at least.
    """

    momentum_buffer: Tensor
    Q: Tensor


class DionScalars(NamedTuple):
    """The numbers of Dion at a step: mu and eps."""

    momentum: Any
    eps: Any


@factory
def dion(
    lr: Hyperparameter = 1e-2,
    momentum: Hyperparameter = 0.95,
    weight_decay: Hyperparameter = 0.01,
    rank: float = 1.0,
    eps: Hyperparameter = 1e-8,
    *,
    generator: torch.Generator | int | Tensor | None = 0,
    maximize: bool = False,
) -> GradientTransformation:
    """Dion, for the matrices of hidden layers: orthonormal steps of rank r, with feedback of the error.

        M <- M + g
        P = the orthonormal factor of M Q, by QR
        R = M^T P
        M <- M - (1 - momentum) P R^T
        Q <- R with columns divided by their norms + eps
        u = -lr (sqrt(rows / columns) P Q^T + weight_decay p)

    Three dimensions are a stack of matrices; of four and more, those after the first are the columns. Give vectors,
    embeddings and heads another optimizer, with `fo.partition` and `fo.muon_route`.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: mu in [0, 1].
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        rank: r. An integer >= 1: at most the smaller side. A float in (0, 1]: a part of the smaller side, rounded up.
        eps: added to norms, > 0.
        generator: source of the first Q, standard normal numbers: a `torch.Generator`, None for torch's own, or a key,
            an integer or a 0-dim tensor of int64. Parameters of one shape begin with the same Q.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; a parameter is no matrix.
        TypeError: a parameter is complex; `rank` or `generator` is of another type.

    A column of M Q that depends on those before it, as all do where M is zero, has no direction: here it takes no part
    in the step, and Q keeps it. In the authors' program its direction is one of rounding. Derivatives flow through the
    factorization, and are finite where columns depend on each other.

    This is the algorithm on one device; its purpose is to save communication between many. A step multiplies with M
    twice, and makes a QR decomposition of M Q.

    Source: Ahn et al., Dion: Distributed Orthonormalized Updates,
    arXiv:2504.05295, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.dion(lr=0.1, weight_decay=0.0), torch.zeros(2, 2)
        >>> updates, state = tx.update(torch.diag(torch.tensor([5.0, 0.5])), tx.init(params))
        >>> fo.tree.get(state, "Q").shape
        torch.Size([2, 2])
    """
    check("momentum", momentum, "0 <= value <= 1")
    check("epsilon value", eps, "value > 0")
    if isinstance(rank, float):
        check_number("rank", rank, "0 < value <= 1")
    else:
        check_integer("rank", rank, 1)
    key = key_of(generator, "dion(generator=0)")

    def init(p: Tensor) -> DionState:
        check_matrix("Dion", p)
        *stack, rows, columns = as_matrices(p, None).shape
        smaller = min(rows, columns)
        r = math.ceil(round(rank * smaller, 6)) if isinstance(rank, float) else min(rank, smaller)
        numbers = normal(mixed(torch.as_tensor(key, device=p.device)), torch.Size([*stack, columns, r]))
        return DionState(torch.zeros_like(p), numbers.to(common_dtype([p])))

    def scalars(step: Tensor) -> DionScalars:
        return DionScalars(at(momentum, step), at(eps, step))

    def update(g: Tensor, state: DionState, p: Any, s: DionScalars) -> Any:
        total, q = as_matrices(state.momentum_buffer + g, None), state.Q
        if q.numel() == 0:
            return g, DionState(g, q)
        basis, found = _orthonormal(total @ q)
        r = total.mT @ basis
        rest = total - (1 - s.momentum) * (basis @ r.mT)
        directions = r / (safe_sqrt(r.square().sum(-2, keepdim=True)) + s.eps)
        rows, columns = total.shape[-2:]
        u = math.sqrt(rows / columns) * (basis @ directions.mT)
        return u.reshape(g.shape), DionState(rest.reshape(g.shape), torch.where(found, directions, q))

    rule = of_rule(init, update, scalars, stacks=True)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)


def _orthonormal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthonormal factor of x, zero in columns that depend on those before; and which columns do not.

    QR of dependent columns has no derivative, so a constant that is orthogonal to the others takes their places.
    """
    q, r = torch.linalg.qr(x.detach())
    sizes = r.diagonal(dim1=-2, dim2=-1).abs().unsqueeze(-2)
    found = sizes > max(x.shape[-2:]) * torch.finfo(x.dtype).eps * sizes.amax(-1, keepdim=True)
    if not is_plain(current(), (x,)):
        q = torch.linalg.qr(torch.where(found, x, q)).Q
    return torch.where(found, q, 0), found
