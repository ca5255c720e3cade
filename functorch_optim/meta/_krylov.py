"""Linear solvers for one real vector, and an operator A that is known only as the function x -> A x.

Loops end early where values are known. Under vmap and torch.compile values are unknown, and members of a batch that
have converged wait for the others. Their iterations must stay finite, so 0 / 0 is 0 here.

A solver that ends above its tolerance raises. Under vmap it raises if one member of the batch does. While torch.compile
traces, there are no values, and nothing is raised.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._control import is_known, known_values, while_loop
from functorch_optim._core.checks import Path, check_inexact, check_updates
from functorch_optim._core.hyperparameters import check_fixed, check_integer, check_number
from functorch_optim._core.vector import common_dtype, flattened, unflattened
from functorch_optim.tree import Tree

Apply: TypeAlias = Callable[[Tensor], Tensor]


class Limits(NamedTuple):
    """The conditions for stopping.

    Attributes:
        tol: relative tolerance: a fraction of |b|.
        atol: absolute tolerance.
        max_iter: largest number of iterations.
        promised: whether a tolerance was asked for.
    """

    tol: float
    atol: Tensor
    max_iter: int
    promised: bool


class Run(NamedTuple):
    """A solver between two iterations.

    Attributes:
        x: the solution so far.
        r: b - A x, the residual.
        rr: r'r.
        more: further values that the method carries.
    """

    x: Tensor
    r: Tensor
    rr: Tensor
    more: Any = ()


def cg(apply: Apply, b: Tensor, x: Tensor, limits: Limits) -> Run:
    """Run conjugate gradients from x; see `solve_cg`."""

    def step(run: Run) -> Run:
        p = run.more
        v = apply(p)
        alpha = _ratio(run.rr, p.dot(v))
        r = run.r - alpha * v
        rr = r.dot(r)
        return Run(run.x + alpha * p, r, rr, r + _ratio(rr, run.rr) * p)

    r = b - apply(x)
    return _iterated(step, Run(x, r, r.dot(r), r), b, limits)


def normal_cg(apply: Apply, b: Tensor, x: Tensor, limits: Limits, ridge: Any) -> Run:
    """Run conjugate gradients on the normal equations; see `solve_normal_cg`."""
    transposed = torch.func.vjp(apply, torch.zeros_like(b))[1]
    return cg(lambda p: transposed(apply(p))[0] + ridge * p, transposed(b)[0], x, limits)


def least_squares_cg(apply: Apply, b: Tensor, x: Tensor, limits: Limits) -> Run:
    """Run conjugate gradients on the normal equations until |b - A x| is small; see `solve_auto`.

    Source: Bjorck, Numerical Methods for Least Squares Problems, algorithm 7.4.1, CGLS.
    """
    transposed = torch.func.vjp(apply, torch.zeros_like(b))[1]

    def step(run: Run) -> Run:
        p, ss = run.more
        q = apply(p)
        alpha = _ratio(ss, q.dot(q))
        r = run.r - alpha * q
        s = transposed(r)[0]
        new_ss = s.dot(s)
        return Run(run.x + alpha * p, r, r.dot(r), (s + _ratio(new_ss, ss) * p, new_ss))

    r = b - apply(x)
    s = transposed(r)[0]
    return _iterated(step, Run(x, r, r.dot(r), (s, s.dot(s))), b, limits)


def bicgstab(apply: Apply, b: Tensor, x: Tensor, limits: Limits) -> Run:
    """Run stabilized biconjugate gradients from x; see `solve_bicgstab`."""

    def step(run: Run) -> Run:
        p, v, rho_old, alpha, omega = run.more
        rho = q.dot(run.r)
        p = run.r + _ratio(rho, rho_old) * _ratio(alpha, omega) * (p - omega * v)
        v = apply(p)
        alpha = _ratio(rho, q.dot(v))
        s = run.r - alpha * v
        t = apply(s)
        omega = _ratio(t.dot(s), t.dot(t))
        r = s - omega * t
        return Run(run.x + alpha * p + omega * s, r, r.dot(r), (p, v, rho, alpha, omega))

    q = r = b - apply(x)
    one, zero = torch.ones_like(r.sum()), torch.zeros_like(r)
    return _iterated(step, Run(x, r, r.dot(r), (zero, zero, one, one, one)), b, limits)


def richardson(apply: Apply, b: Tensor, x: Tensor, limits: Limits, step_size: Any) -> Run:
    """Go down the residual; see `solve_neumann`."""

    def step(run: Run) -> Run:
        x = run.x + step_size * run.r
        r = b - apply(x)
        return Run(x, r, r.dot(r))

    r = b - apply(x)
    return _iterated(step, Run(x, r, r.dot(r)), b, limits)


def gmres(apply: Apply, b: Tensor, x: Tensor, limits: Limits, restart: int) -> Run:
    """Run generalized minimal residuals from x; see `solve_gmres`."""
    restart = min(restart, b.numel())
    tolerance = _tolerance(b, limits)

    def cycle(run: Run) -> Run:
        size = run.rr.sqrt()
        basis = [run.r * _ratio(torch.ones_like(size), size)]
        columns: list[Tensor] = []
        for m in range(1, restart + 1):
            v = apply(basis[-1])
            whole = torch.linalg.vector_norm(v)
            rows = torch.stack(basis)
            h = rows @ v
            v = v - h @ rows
            more = rows @ v  # once more: after one pass rounding leaves the basis far from orthogonal
            v = v - more @ rows
            length = torch.linalg.vector_norm(v)
            # If only rounding is left of v, the space is complete, and the further columns are zeros.
            length = length.masked_fill(length <= 10 * torch.finfo(b.dtype).eps * whole, 0)
            basis.append(v * _ratio(torch.ones_like(length), length))
            columns.append(torch.cat([h + more, length[None], h.new_zeros(restart - m)]))
            if is_known(length):
                y, rest = _least_squares(columns, size)
                if not rest > tolerance:
                    break
        else:
            y, _ = _least_squares(columns, size)
        x = run.x + y @ torch.stack(basis[: len(columns)])
        r = b - apply(x)
        return Run(x, r, r.dot(r))

    r = b - apply(x)
    cycles = -(-limits.max_iter // restart)
    return _iterated(cycle, Run(x, r, r.dot(r)), b, limits._replace(max_iter=cycles))


def _least_squares(columns: list[Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
    """Minimize |size e_1 - H y| for the H of these columns, and return the minimum."""
    H = torch.stack(columns, dim=-1)  # noqa: N806 - the field's name
    H = H.where(H.isfinite(), 0)  # noqa: N806 - LAPACK would raise; the residual shows the NaN
    goal = torch.cat([size[None], size.new_zeros(H.shape[0] - 1)])
    y = torch.linalg.pinv(H) @ goal  # of least norm: zero for the columns of zeros after a complete space
    return y, torch.linalg.vector_norm(goal - H @ y)


def dense(apply: Apply, b: Tensor, x: Tensor, limits: Limits) -> Run:
    """Make the matrix and solve; see `solve_dense`."""
    return Run(torch.linalg.solve(_matrix(apply, b), b), b, b.dot(b))


def auto(apply: Apply, b: Tensor, x: Tensor, limits: Limits) -> Run:
    """Solve with the matrix where it is small; see `solve_auto`."""
    if b.numel() > LARGEST_MATRIX:
        return least_squares_cg(apply, b, x, limits)
    A = _matrix(apply, b).double()  # noqa: N806
    is_finite = A.isfinite()  # LAPACK would raise on NaN
    U, sizes, Vh = torch.linalg.svd(A.where(is_finite, 0))  # noqa: N806
    parts = U.mT @ b.double().masked_fill(~is_finite.all(), torch.nan)
    is_noise = sizes <= b.numel() * torch.finfo(b.dtype).eps * sizes[0]
    y = parts * ~is_noise / sizes.masked_fill(is_noise, 1)
    r = U @ (parts * is_noise)
    run = Run((Vh.mT @ y).to(b), r, r.dot(r))
    _check_solved(run, b, limits, f"as A is singular to the precision of {b.dtype}", _LESS)
    return run


LARGEST_MATRIX = 256
"""The number of unknowns up to which `solve_auto` makes the matrix: half a MiB, and 0.03 s for its singular values."""

_MORE = (
    f"Take solve_auto, which solves any nonsingular system of up to {LARGEST_MATRIX} unknowns, or solve_dense; or give "
    "more iterations, as in partial(solve_gmres, max_iter=10000, restart=100), or a ridge, as in partial(solve_cg, "
    "ridge=1e-6). tol=0.0 takes what max_iter iterations give"
)
_LESS = (
    "Regularize the problem; or its linear systems, as in partial(solve_auto, ridge=1e-6); or compute in float64. "
    "solve_normal_cg gives the x of least |b - A x|"
)


def _matrix(apply: Apply, b: Tensor) -> Tensor:
    identity = torch.eye(b.numel(), dtype=b.dtype, device=b.device)
    return torch.vmap(apply, out_dims=1, chunk_size=64)(identity)


def _iterated(step: Callable[[Run], Run], run: Run, b: Tensor, limits: Limits) -> Run:
    square = _tolerance(b, limits) ** 2
    run = while_loop(lambda run: run.rr > square, step, run, limits.max_iter)
    _check_solved(run, b, limits, f"after {limits.max_iter} iterations", _MORE)
    return run


def _check_solved(run: Run, b: Tensor, limits: Limits, why: str, advice: str) -> None:
    """Raise if a requested tolerance is not met. A NaN in x needs no error."""
    # The largest number in b is 1, see `over_trees`.
    share = run.rr.sqrt() / torch.linalg.vector_norm(b).clamp(min=1)
    unmet = known_values(share.masked_fill(~(run.rr > _tolerance(b, limits) ** 2), 0))
    if limits.promised and unmet is not None and unmet.any():
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"The linear system A x = b is not solved {why}: the residual is {float(unmet.max()):.1e} of the "
            f"right-hand side, and tol is {limits.tol:.1e}. {advice}"
        )


def _tolerance(b: Tensor, limits: Limits) -> Tensor:
    return torch.maximum(limits.tol * torch.linalg.vector_norm(b), limits.atol)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    zero = b == 0
    ratio: Tensor = (a / b.masked_fill(zero, 1)).masked_fill(zero, 0)
    return ratio


# Trees as vectors. ----------------------------------------------------------------------------------------------------


def over_trees(
    method: Callable[..., Run],
    matvec: Callable[[Tree], Tree],
    b: Tree,
    init: Tree,
    ridge: Any,
    tol: float | None,
    atol: float,
    max_iter: int | None,
) -> Tree:
    """Run a method on the numbers of trees, as one vector; `solve_cg` explains the arguments."""
    check_fixed("ridge", ridge, "a number")
    check_number("tol", 0.0 if tol is None else tol)
    check_number("atol", atol)
    check_integer("max_iter", 0 if max_iter is None else max_iter, 0)
    leaves, structure = tree.flatten(b)
    check_inexact("b", leaves, lambda i: tree.paths(b)[i])
    vector = flattened(leaves, common_dtype(leaves))
    if not vector.numel():
        return b

    def numbers(other: Tree, name: str) -> Tensor:
        others = tree.flatten_up_to(structure, other, name, b, "b")
        check_alike(others, leaves, lambda i: tree.paths(b)[i], name, "b")
        return flattened(others, vector.dtype)

    def apply(x: Tensor) -> Tensor:
        product = numbers(matvec(tree.unflatten(structure, unflattened(x, leaves))), "the results of matvec")
        return torch.add(product, ridge * x)

    # In units of the largest number in b, squares of tiny numbers do not vanish and squares of large ones are finite.
    largest = vector.abs().amax()
    unit = largest.masked_fill(largest == 0, 1)
    x = torch.zeros_like(vector) if init is None else numbers(init, "init") / unit
    if tol is None:
        tol = torch.finfo(vector.dtype).eps ** (2 / 3)
    limits = Limits(tol, atol / unit, 10 * vector.numel() if max_iter is None else max_iter, bool(tol or atol))
    run = method(apply, vector / unit, x, limits)
    x = (run.x * unit).masked_fill(run.rr.isnan(), torch.nan)  # loops end at a NaN, before it reaches x
    return tree.unflatten(structure, unflattened(x, leaves))


def check_alike(values: Sequence[Any], leaves: Sequence[Any], path: Path, name: str, other_name: str) -> None:
    """Raise unless tensors have the same shapes and dtypes, and None stands in the same places."""
    for i, (value, leaf) in enumerate(zip(values, leaves, strict=True)):
        if value is None and leaf is not None:
            raise ValueError(f"{name} have None at {path(i)!r}, but {other_name} there has a tensor")
    check_updates(values, leaves, path, name, other_name)
