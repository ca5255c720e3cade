"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._control import cond, same
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, check_integer, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, maximum, or_one, rms, safe_sqrt, sqrt, where
from functorch_optim.optimizers._descent import check_real, descent
from functorch_optim.optimizers._sides import as_sides, by_size, gram, initial, joined, parted, times
from functorch_optim.optimizers._spectral import eigenvectors, orthonormalized
from functorch_optim.tree import map as tree_map


@leaf_state
class ScaleBySOAPState(NamedTuple):
    """The state of `scale_by_soap` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of the squares of g in the bases: like p.
        GG: L of all sides that have one, end to end: those of a matrix (n, m) are (n^2 + m^2,). float32 at least.
        Q: their bases: likewise.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    GG: Tensor
    Q: Tensor


class SOAPScalars(NamedTuple):
    """The numbers of SOAP at a step, the n-th after the first.

    Attributes:
        first: 1 at the first step, else 0.
        due: 1 where bases are renewed, else 0.
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        rate: sqrt(1 - beta2^n) / (1 - beta1^n).
        eps: eps.
        weight3: 1 - shampoo_beta.
    """

    first: Any
    due: Any
    weight1: Any
    beta2: Any
    weight2: Any
    rate: Any
    eps: Any
    weight3: Any


@factory
def scale_by_soap(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.95),
    eps: Hyperparameter = 1e-8,
    shampoo_beta: Hyperparameter | None = None,
    frequency: int = 10,
    max_dim: int = 10000,
    *,
    flatten: bool = False,
    normalize_grads: bool = False,
) -> GradientTransformation:
    """Run Adam in the eigenbases of the second moments of a tensor's sides.

        L <- shampoo_beta L + (1 - shampoo_beta) g g^T,  R <- likewise with g^T g
        first step:  Q_L, Q_R = eigenvectors of L and R, by descending eigenvalue;  g <- 0
        n-th step after it, in the bases of the last one:
        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) (Q_L^T g Q_R)^2
        g <- sqrt(1 - beta2^n) / (1 - beta1^n) Q_L [Q_L^T m Q_R / (sqrt(v) + eps)] Q_R^T
        then, at multiples n of the frequency, Q_L and Q_R with v are sorted by the diagonal of Q_L^T L Q_L, descending,
        and  Q_L <- the Q of the QR decomposition of L Q_L,  Q_R likewise

    That is for a matrix. A tensor of more dimensions has a basis for each of them. Vectors and numbers have none: for
    them it is Adam, which begins at the second step, too.

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0; not corrected.
        shampoo_beta: decay rate of L and R, in [0, 1). None: that of v.
        frequency: steps from one renewal of the bases to the next, >= 1.
        max_dim: longest side that has a basis, >= 0.
        flatten: whether the dimensions after the first are one, as for convolutions.
        normalize_grads: divide by the root mean square of the update, before the correction.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    The first step moves nothing: in its own bases a gradient is diagonal, and rounding errors would be divided by eps.

    Bases are renewed only at the steps where they are due, and at all steps under vmap and torch.compile, which pick.
    Derivatives flow through them, exact up to the third order where eigenvalues differ. Where they are equal, as are
    two zeros, the algorithm has none: which basis is taken depends on rounding, and so do the numbers that follow.
    Derivatives are finite there, and those of the choice are zero. The first gradient of a matrix (n, m) with
    |n - m| > 1 is such a case. A matrix takes 8 n m (n + m) operations a step, and some 5 (n^3 + m^3) more where bases
    are renewed.

    Same numbers as the authors' program, which has its bases in float32 also for float64; ours have the dtype of the
    parameter, float32 at least. Its `merge_dims`, which joins dimensions up to a size, is `flatten` here, which joins
    those after the first.

    Source: Vyas et al., arXiv:2409.11321, algorithm 3.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_soap(eps=0.0)
        >>> grad = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
        >>> first, state = tx.update(grad, tx.init(torch.zeros(2, 2)))
        >>> second, state = tx.update(torch.tensor([[1.0, 0.0], [0.5, -1.0]]), state)
        >>> first.any(), (second @ second.mT).abs().round(decimals=3)
        (tensor(False), tensor([[2., 0.],
                [0., 2.]]))
    """
    check_betas(betas)
    check("epsilon value", eps)
    check("shampoo_beta", 0.0 if shampoo_beta is None else shampoo_beta, "0 <= value < 1")
    check_integer("frequency", frequency, 1)
    check_integer("max_dim", max_dim, 0)

    def sides(shape: torch.Size) -> list[int]:
        """List the dimensions that have a basis."""
        return [dim for dim, n in enumerate(shape) if n <= max_dim and len(shape) > 1 and 0 not in shape]

    def init(p: Tensor) -> ScaleBySOAPState:
        check_real("SOAP", p)
        shape = as_sides(p, flatten).shape
        sizes = [shape[dim] for dim in sides(shape)]
        return ScaleBySOAPState(
            torch.zeros_like(p), torch.zeros_like(p), initial(sizes, p, 0.0), initial(sizes, p, 1.0)
        )

    def scalars(step: Any) -> SOAPScalars:
        n = maximum(step - 1, 1.0)
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        return SOAPScalars(
            first=where(step == 1, 1.0, 0.0),
            due=where(n % frequency == 0, 1.0, 0.0),
            weight1=1 - beta1,
            beta2=beta2,
            weight2=1 - beta2,
            rate=sqrt(debias(beta2, n)) / debias(beta1, n),
            eps=at(eps, step),
            weight3=1 - (beta2 if shampoo_beta is None else at(shampoo_beta, step)),
        )

    def update(g: Tensor, state: ScaleBySOAPState, p: Any, s: SOAPScalars) -> Any:
        x = as_sides(g, flatten)
        dims = sides(x.shape)
        sizes = [x.shape[dim] for dim in dims]
        moments = torch.lerp(state.GG, joined([gram(x, dim) for dim in dims], g), s.weight3)

        def begin(_: tuple[Tensor, ScaleBySOAPState]) -> tuple[Tensor, ScaleBySOAPState]:
            bases = joined(by_size(eigenvectors, parted(moments, sizes)), g)
            return torch.zeros_like(g), state._replace(GG=moments, Q=bases)

        def renewed(carry: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            v, bases = carry
            found = []
            for dim, a, q in zip(dims, parted(moments, sizes), parted(bases, sizes), strict=True):
                product = a @ q
                order = (q * product).sum(0).argsort(descending=True, stable=True)
                v = torch.index_select(v, dim, order)
                found.append(torch.index_select(product, 1, order))
            return v, joined(by_size(orthonormalized, found), g)

        def go_on(_: tuple[Tensor, ScaleBySOAPState]) -> tuple[Tensor, ScaleBySOAPState]:
            bases = list(zip(dims, parted(state.Q, sizes), strict=True))
            m = torch.lerp(state.exp_avg, g, s.weight1)
            y, direction = x, as_sides(m, flatten)
            for dim, q in bases:
                y, direction = times(y, q, dim), times(direction, q, dim)
            v = s.beta2 * as_sides(state.exp_avg_sq, flatten) + s.weight2 * y * y
            direction = direction / (safe_sqrt(v) + s.eps)
            for dim, q in bases:
                direction = times(direction, q.mT, dim)
            if normalize_grads:
                direction = direction / or_one(rms(direction))
            v, renewed_bases = cond(s.due > 0, renewed, same, (v, state.Q))
            moved = (s.rate * direction).reshape(g.shape)
            return moved, ScaleBySOAPState(m, v.reshape(g.shape), moments, renewed_bases)

        return cond(s.first > 0, begin, go_on, (g, state))

    return leafwise(init, update, scalars)


@factory
def soap(
    lr: Hyperparameter = 3e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.95),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.01,
    shampoo_beta: Hyperparameter | None = None,
    frequency: int = 10,
    max_dim: int = 10000,
    *,
    flatten: bool = False,
    normalize_grads: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

        p <- (1 - lr weight_decay) (p - lr scale_by_soap(g)),  from the second step on

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_soap`.
        eps: see `scale_by_soap`.
        weight_decay: decoupled, >= 0; after the step. Unless it is the number 0, `update` needs the parameters.
        shampoo_beta: see `scale_by_soap`.
        frequency: see `scale_by_soap`; 1 is the most exact.
        max_dim: see `scale_by_soap`.
        flatten: see `scale_by_soap`.
        normalize_grads: see `scale_by_soap`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    The first step moves nothing. Same numbers as the authors' program; see `scale_by_soap`.

    Source: Vyas et al., arXiv:2409.11321, algorithm 3.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.soap(lr=0.1, weight_decay=0.0), {"bias": torch.zeros(2)}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"bias": torch.tensor([3.0, -4.0])}, state)
        >>> updates
        {'bias': tensor([-0.1000,  0.1000])}
    """
    check("weight_decay value", weight_decay)

    def decay(count: Any) -> Any:
        """Wait for the second step; of a tree of values, too."""
        return tree_map(lambda x: where(count == 0, 0.0, x(count) if callable(x) else x), weight_decay)

    rule = scale_by_soap(betas, eps, shampoo_beta, frequency, max_dim, flatten=flatten, normalize_grads=normalize_grads)
    later = weight_decay if is_zero(weight_decay) else decay
    return descent(rule, lr=lr, weight_decay=later, decoupled="after", maximize=maximize)
