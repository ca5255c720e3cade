"""Roots and bases of symmetric matrices whose derivatives are exact at every spectrum.

The derivative of torch.linalg.eigh divides by differences of eigenvalues. It is infinite or wrong, without notice,
where two are equal, as are the zeros of a matrix whose rank is less by two or more. The root of a matrix has a
derivative there, and it is needed: a first gradient with two more rows than columns is such a case.

So a decomposition is computed of constants, and then a power series in the change of the argument. That change is
`a - a.detach()`, which is zero, and whose derivative is not. The result x is the solution of an equation F(x, a) = 0,
and is found by

    x <- x - S F(x, a),  S the inverse of dF/dx at the constants.

An iteration leaves the value as it is, and makes the derivatives of one more order exact. Nothing is divided by but
sums of positive numbers, where x is a root; where it is a basis, by the differences of eigenvalues that differ. It is
all made of ordinary operations, so it is the same in reverse and forward mode, nested, under vmap, and compiled.
"""

from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.mode import current, is_plain

ORDERS = 3
"""Orders of derivatives that are exact."""


def inverse_root(a: Tensor, root: int, eps: Any) -> Tensor:
    """Compute (a + eps)^(-1 / root).

    Args:
        a: symmetric positive semi-definite matrices, (..., n, n). The symmetric part is taken. Eigenvalues of a + eps
            that are less than the rounding of the largest are noise, some of it negative, and are taken for it.
        root: integer >= 1.
        eps: added to eigenvalues, > 0: float or 0-dim tensor.

    Returns:
        Matrices like `a`; NaN where `a` is not finite.
    """
    a = (a + a.mT) / 2
    damping = eps.detach() if isinstance(eps, Tensor) else eps
    w, q = _eigh(a.detach())
    z = torch.maximum(w + damping, _rounding(w).unsqueeze(-1)) ** (1 / root)
    if is_plain(current(), (a, eps)):
        return (q / z.unsqueeze(-2)) @ q.mT
    # In the basis q, with D = diag(z): (D + x)^root - D^root = h, and of its terms linear in x, S divides.
    h = q.mT @ (a - a.detach()) @ q + (eps - damping) * _identity(a)
    slopes = sum(z.unsqueeze(-1) ** k * z.unsqueeze(-2) ** (root - 1 - k) for k in range(root))
    x = h / slopes
    for _ in range(ORDERS - 1):
        power = torch.linalg.matrix_power(torch.diag_embed(z) + x, root)
        x = x - (power - power.detach() - h) / slopes
    # y = (D + x)^(-1) is D^(-1) - D^(-1) x y.
    inverse = y = torch.diag_embed(1 / z)
    for _ in range(ORDERS):
        y = inverse - inverse @ x @ y
    return q @ y @ q.mT


def eigenvectors(a: Tensor) -> Tensor:
    """Compute the eigenvectors of symmetric matrices (..., n, n), as columns, by descending eigenvalue.

    Where eigenvalues are equal to rounding, any basis of their eigenvectors is one, and there is no derivative: their
    plane turns with the others, and the vectors do not turn inside of it.
    """
    a = (a + a.mT) / 2
    w, q = _eigh(a.detach())
    w, q = w.flip(-1), q.flip(-1)
    if is_plain(current(), (a,)):
        return q
    gaps = w.unsqueeze(-2) - w.unsqueeze(-1)
    tied = gaps.abs() <= _rounding(w)[..., None, None]
    rates = (1 / gaps.masked_fill(tied, 1)).masked_fill(tied, 0)
    # In the basis q: U^T h U is diagonal, for a rotation U = exp(x).
    h = torch.diag_embed(w) + q.mT @ (a - a.detach()) @ q
    x = torch.zeros_like(h)
    for _ in range(ORDERS):
        u = _rotation(x)
        x = x + (u.mT @ h @ u) * rates
    turned: Tensor = q @ _rotation(x)
    return turned


def orthonormalized(a: Tensor) -> Tensor:
    """Orthonormalize the columns of square matrices (..., n, n), the first one first: the Q of a QR decomposition.

    A column that depends on those before, to rounding, is replaced by any that is orthogonal to all others. It has no
    derivative of its own, and turns with the others.
    """
    q: Tensor
    q, r = torch.linalg.qr(a.detach())
    if is_plain(current(), (a,)):
        return q
    sizes = r.diagonal(dim1=-2, dim2=-1).abs()
    dependent = sizes <= _rounding(sizes)[..., None]
    solved = torch.where(dependent.unsqueeze(-1), _identity(a), r)
    # In the basis q: U^T h is upper triangular, for a rotation U = exp(x).
    h = r + q.mT @ (a - a.detach())
    x = torch.zeros_like(h)
    for _ in range(ORDERS):
        below = (_rotation(x).mT @ h).tril(-1)
        lower = torch.linalg.solve_triangular(solved, below, upper=True, left=False).tril(-1)
        lower = lower.masked_fill(dependent.unsqueeze(-2), 0)
        x = x + lower - lower.mT
    turned: Tensor = q @ _rotation(x)
    return turned


def _eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose constants; torch.linalg.eigh raises where they are not finite, and here the eigenvalues are NaN."""
    finite = a.isfinite().all(-1).all(-1)
    w, q = torch.linalg.eigh(torch.where(finite[..., None, None], a, torch.zeros_like(a)))
    return torch.where(finite.unsqueeze(-1), w, torch.full_like(w, torch.nan)), q


def _rotation(x: Tensor) -> Tensor:
    """Take the exponential of skew matrices, to the order of the derivatives."""
    term = total = _identity(x)
    for k in range(1, ORDERS + 1):
        term = term @ x / k
        total = total + term
    return total


def _identity(a: Tensor) -> Tensor:
    return torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _rounding(w: Tensor) -> Tensor:
    """Return the largest difference of numbers that are equal but for rounding."""
    largest: Tensor = w.abs().amax(-1)
    return largest * w.shape[-1] * torch.finfo(w.dtype).eps * 8
