"""Linear solvers over trees, which know the operator A only as the function x -> A x.

They are functions `solve(matvec, b, *, init, ridge, tol, atol, max_iter) -> x`, and stop where |b - A x| is at most the
larger of tol |b| and atol. A solver that does not reach this tolerance raises. With tol = atol = 0 there is none, and
the solver returns the result of `max_iter` iterations. The numbers of a tree are treated as one real vector, and a
complex number as two: so A need only be linear over the reals, as derivatives of functions of complex numbers are.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from functorch_optim._core.hyperparameters import check_fixed, check_integer
from functorch_optim.meta import _krylov as krylov
from functorch_optim.tree import Tree


def solve_auto(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float | None = None,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> Tree:
    """Solve (A + ridge I) x = b, for any A: by its matrix up to 256 unknowns, iteratively above.

    The matrix takes one product with A for each unknown, with `torch.vmap`. Its singular values give the accuracy: a
    condition number of 1e8 leaves 8 digits in float64. If A is singular and the equations have solutions, as for
    weights that a loss does not depend on, x is the smallest solution. Singular values below n eps times the largest
    count as zero, for n unknowns whose dtype has the machine epsilon eps: 1e-14 in float64 for 50 unknowns, 6e-6 in
    float32.

    More unknowns are solved for by conjugate gradients on the normal equations (CGLS). They converge for every
    nonsingular A, in about as many iterations as the condition number of A. An iteration is one product with A and one
    with A'.

        r = b - A x;              p = s = A'r
        alpha = s's / |A p|^2;    x <- x + alpha p;    r <- r - alpha A p
        s <- A'r;                 p <- s + (s's / s_old's_old) p

    Args:
        matvec: x -> A x, a linear function of trees like `b`, made of functions that `torch.vmap` can batch and torch
            differentiate.
        b: right-hand side: tree of real or complex tensors (a complex number is two unknowns); None where one is
            missing.
        init: first x of the iterations, built like `b`; None is zero.
        ridge: number that is added to the diagonal of A.
        tol: relative tolerance >= 0; None is eps^(2/3): 4e-11 in float64, 2e-5 in float32.
        atol: absolute tolerance >= 0.
        max_iter: see `solve_cg`; not used where the matrix is made.

    Returns:
        Tree like `b`.

    Raises:
        ValueError: see `solve_cg`.
        TypeError: see `solve_cg`.
        torch.linalg.LinAlgError: see `solve_cg`.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_auto
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> solve_auto(lambda x: A @ x, torch.tensor([2.0, 3.0])).round(decimals=4)
        tensor([-3.,  1.])
    """
    return krylov.over_trees(krylov.auto, matvec, b, init, ridge, tol, atol, max_iter)


def solve_cg(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> Tree:
    """Solve (A + ridge I) x = b by conjugate gradients, for a symmetric (Hermitian) positive definite A.

        p = r = b - A x
        alpha = r'r / p'A p;    x <- x + alpha p;    r <- r - alpha A p;    p <- r + (r'r / r_old'r_old) p

    Args:
        matvec: x -> A x, a linear function of trees like `b`.
        b: right-hand side: tree of real or complex tensors; None where one is missing.
        init: first x, built like `b`; None is zero.
        ridge: number that is added to the diagonal of A.
        tol: relative tolerance >= 0; with `tol` and `atol` 0, `max_iter` iterations run and no accuracy is required.
        atol: absolute tolerance >= 0.
        max_iter: largest number of iterations; None is ten times the number of unknowns. Inside of `torch.vmap` and
            `torch.compile` a loop cannot end early, and all of them are computed: choose a small number there.

    Returns:
        Tree like `b`. Derivatives go through the iterations; `custom_root` has those of the solution.

    Raises:
        ValueError: a number is out of range or NaN; `matvec` returns a tree, shapes or dtypes other than those of `b`,
            and the message names the path.
        TypeError: a number is none; or `b` has something else than floating-point and complex tensors.
        torch.linalg.LinAlgError: the tolerance is not met; under `torch.vmap`, by a member of the batch. It is a
            RuntimeError. Inside of `torch.compile` nothing can be raised: x is the result of the last iteration there,
            and |b - matvec(x)| shows its accuracy.

    Source: Hestenes & Stiefel, Methods of conjugate gradients for solving linear systems, 1952; names and defaults are
    those of jaxopt and scipy.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_cg
        >>> solve_cg(lambda x: {"w": 2 * x["w"]}, {"w": torch.tensor([2.0, 4.0])})
        {'w': tensor([1., 2.])}
    """
    return krylov.over_trees(krylov.cg, matvec, b, init, ridge, tol, atol, max_iter)


def solve_normal_cg(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> Tree:
    """Solve (A'A + ridge I) x = A'b by conjugate gradients, for any A; A' is found by differentiating `matvec`.

    It converges for every nonsingular A. On a badly conditioned A it is slower than other solvers, because the
    condition number k is squared. So is the error that the tolerance allows: x may be off by k^2 tol. An iteration is
    one product with A and one with A'.

    Args:
        matvec: see `solve_cg`; made of functions that torch can differentiate.
        b: see `solve_cg`.
        init: see `solve_cg`.
        ridge: number that is added to the diagonal of A'A, as in jaxopt.
        tol: relative tolerance >= 0, of A'b - (A'A + ridge I) x.
        atol: absolute tolerance >= 0, of the same.
        max_iter: see `solve_cg`.

    Returns:
        See `solve_cg`.

    Raises:
        ValueError: see `solve_cg`.
        TypeError: see `solve_cg`.
        torch.linalg.LinAlgError: see `solve_cg`.

    Source: Saad, Iterative Methods for Sparse Linear Systems, 2nd edition, section 8.3; jaxopt.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_normal_cg
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> solve_normal_cg(lambda x: A @ x, torch.tensor([2.0, 3.0])).round(decimals=4)
        tensor([-3.,  1.])
    """
    check_fixed("ridge", ridge, "a number")
    method = functools.partial(krylov.normal_cg, ridge=ridge)
    return krylov.over_trees(method, matvec, b, init, 0.0, tol, atol, max_iter)


def solve_gmres(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
    restart: int = 20,
) -> Tree:
    """Solve (A + ridge I) x = b by generalized minimal residuals, for any A.

    After m iterations x minimizes |b - A x| in x_0 + span(r_0, A r_0, .., A^(m-1) r_0). Arnoldi's process makes an
    orthonormal basis V of that space, with A V_m = V_(m+1) H, and then the small problem is solved:

        x = x_0 + V_m y,    y = argmin | |r_0| e_1 - H y |

    Args:
        matvec: see `solve_cg`.
        b: see `solve_cg`.
        init: see `solve_cg`.
        ridge: see `solve_cg`.
        tol: see `solve_cg`.
        atol: see `solve_cg`.
        max_iter: largest number of iterations, rounded up to whole restarts (scipy and jaxopt count restarts); None is
            ten times the number of unknowns.
        restart: number of iterations after which a new basis is begun, >= 1. Memory grows with it. If it is smaller
            than the number of unknowns, the iteration may stall.

    Returns:
        See `solve_cg`.

    Raises:
        ValueError: see `solve_cg`.
        TypeError: see `solve_cg`.
        torch.linalg.LinAlgError: see `solve_cg`.

    Source: Saad & Schultz, GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems,
    SIAM Journal on Scientific and Statistical Computing 7, 1986.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_gmres
        >>> A = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
        >>> solve_gmres(lambda x: A @ x, torch.tensor([2.0, 3.0])).round(decimals=4)
        tensor([-3.,  1.])
    """
    check_integer("restart", restart, 1)
    method = functools.partial(krylov.gmres, restart=restart)
    return krylov.over_trees(method, matvec, b, init, ridge, tol, atol, max_iter)


def solve_bicgstab(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float = 1e-5,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> Tree:
    """Solve (A + ridge I) x = b by stabilized biconjugate gradients, for any A, in the memory of seven vectors.

        rho = q'r, q = r_0;         p <- r + (rho / rho_old) (alpha / omega) (p - omega v);     v = A p
        alpha = rho / q'v;          s = r - alpha v;      t = A s;      omega = t's / t't
        x <- x + alpha p + omega s;                       r <- s - omega t

    It may break down, for example with a skew-symmetric A, and then raises as `solve_cg` does; `solve_gmres` does not.

    Args:
        matvec: see `solve_cg`.
        b: see `solve_cg`.
        init: see `solve_cg`.
        ridge: see `solve_cg`.
        tol: see `solve_cg`.
        atol: see `solve_cg`.
        max_iter: see `solve_cg`; an iteration is two products with A.

    Returns:
        See `solve_cg`.

    Raises:
        ValueError: see `solve_cg`.
        TypeError: see `solve_cg`.
        torch.linalg.LinAlgError: see `solve_cg`.

    Source: van der Vorst, Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG for the solution of nonsymmetric
    linear systems, SIAM Journal on Scientific and Statistical Computing 13, 1992.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_bicgstab
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> solve_bicgstab(lambda x: A @ x, torch.tensor([4.0, 2.0])).round(decimals=4)
        tensor([1., 2.])
    """
    return krylov.over_trees(krylov.bicgstab, matvec, b, init, ridge, tol, atol, max_iter)


def solve_neumann(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float = 0.0,
    atol: float = 0.0,
    max_iter: int | None = 20,
    step_size: float | Tensor = 1.0,
) -> Tree:
    """Solve (A + ridge I) x = b roughly, by the first terms of the Neumann series.

        x = step_size (I + (I - step_size A) + .. + (I - step_size A)^(max_iter - 1)) b

    These are `max_iter` steps of gradient descent, x <- x + step_size (b - A x), from zero. They converge if all
    eigenvalues of I - step_size A are within the unit circle.

    Args:
        matvec: see `solve_cg`.
        b: see `solve_cg`.
        init: see `solve_cg`.
        ridge: see `solve_cg`.
        tol: see `solve_cg`; 0, the default, adds up all terms.
        atol: see `solve_cg`.
        max_iter: largest number of terms; None is ten times the number of unknowns.
        step_size: number > 0: 1 for an A near the identity, as a fixed point's is; a learning rate for a Hessian.

    Returns:
        See `solve_cg`.

    Raises:
        ValueError: see `solve_cg`.
        TypeError: see `solve_cg`.
        torch.linalg.LinAlgError: see `solve_cg`.

    Source: Lorraine, Vicol & Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation,
    arXiv:1911.02590, algorithm 3.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_neumann
        >>> solve_neumann(lambda x: 0.5 * x, torch.tensor([1.0]), tol=0.0, max_iter=3)
        tensor([1.7500])
    """
    check_fixed("step_size", step_size, "value > 0")
    method = functools.partial(krylov.richardson, step_size=step_size)
    return krylov.over_trees(method, matvec, b, init, ridge, tol, atol, max_iter)


def solve_dense(
    matvec: Callable[[Tree], Tree],
    b: Tree,
    *,
    init: Tree = None,
    ridge: float | Tensor = 0.0,
    tol: float = 0.0,
    atol: float = 0.0,
    max_iter: int | None = None,
) -> Tree:
    """Solve (A + ridge I) x = b by making the matrix A, with `torch.vmap`, and `torch.linalg.solve`.

    Args:
        matvec: see `solve_cg`; made of functions that `torch.vmap` can batch.
        b: see `solve_cg`.
        init: not used. It is an argument so that solvers can be exchanged, and so are the other unused ones.
        ridge: see `solve_cg`.
        tol: not used.
        atol: not used.
        max_iter: not used.

    Returns:
        Tree like `b`.

    Raises:
        ValueError: see `solve_cg`.
        TypeError: see `solve_cg`.
        RuntimeError: A is singular.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import solve_dense
        >>> A = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> solve_dense(lambda x: A @ x, torch.tensor([4.0, 2.0]))
        tensor([1., 2.])
    """
    return krylov.over_trees(krylov.dense, matvec, b, init, ridge, tol, atol, max_iter)
