"""Derivatives of solutions, by the implicit function theorem."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim.meta._derivative import is_differentiable, pullback, replaced, split
from functorch_optim.meta._root import rooted
from functorch_optim.meta._solvers import solve_auto
from functorch_optim.tree import Tree

Solve: TypeAlias = Callable[[Callable[[Tree], Tree], Tree], Tree]
"""A linear solver: (matvec, b) -> x, over trees."""
Solver: TypeAlias = Callable[..., Any]


def custom_root(
    optimality_fn: Callable[..., Tree],
    *,
    has_aux: bool = False,
    solve: Solve = solve_auto,
    sequential: bool = False,
) -> Callable[[Solver], Solver]:
    """Give `solver(init, *args)` the derivative of the root of optimality_fn(x, *args) = 0 with respect to args.

        dx = -A^(-1) dF/dargs dargs,    A = dF/dx,    F = optimality_fn, at the x that the solver returns

    The value is the solver's, to the last bit. The solver may do anything: loop in Python, call `.item()` or scipy,
    train with `backward`. It is given constants, and is never differentiated. Derivatives have any order, in both
    modes: `torch.func.grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`, `vmap`, `backward`, `create_graph=True`, and
    `torch.autograd.forward_ad`. They are as accurate as the solution: if F(x, *args) is not zero, they have an error.

    Args:
        optimality_fn: `optimality_fn(x, *args)`, built like x and zero at the solution: the gradient of a loss, such
            as `torch.func.grad(loss)`. It is pure, and differentiable twice by `torch.func`. Tensors to differentiate
            must be arguments; it must not close over them.
        has_aux: whether the solver returns a pair, the solution and something else, which has no derivative.
        solve: linear solver, `solve(matvec, b)`, for products with A' in reverse mode and with A in forward mode. The
            default is for any nonsingular A. Up to 256 unknowns it makes the matrix: a condition number k costs
            log10(k) digits, of 16 in float64 and 7 in float32. For more unknowns it takes about k iterations, and the
            tolerance leaves an error of up to k tol. There `solve_cg` is faster if A is symmetric and positive
            definite, as the Hessian at a minimum is; `functools.partial(solve_cg, tol=1e-10)` gives more digits than
            its default of 1e-5.
        sequential: whether `torch.vmap` runs the solver for one member of the batch after the other. Solvers need this
            if they branch on values in Python or leave torch. Otherwise the solver is batched, and must consist of
            functions that can be: loops of a fixed length, and `fo.cond` in place of a branch.

    Returns:
        A decorator. The decorated function takes `init` and `args`, trees of anything. Its derivative with respect to
        the floating-point and complex tensors in args is that of the root; that with respect to `init` is zero.
        `torch.compile` breaks its graph at the function, which it cannot do within `torch.func.grad`: compile the
        solver and `optimality_fn` instead.

    Raises:
        ValueError: by the decorated function: `optimality_fn` returns a tree, shapes or dtypes other than those of the
            solution; it closes over a tensor that is being differentiated, or the solver over one that is batched.
        TypeError: by the decorated function: a leaf of the solution, such as a number of iterations, is no
            floating-point or complex tensor; return it as aux.
        torch.linalg.LinAlgError: when a derivative is computed: `solve` does not meet its tolerance.

    Source: Blondel et al., Efficient and Modular Implicit Differentiation, arXiv:2105.15183; jaxopt.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import custom_root
        >>> @custom_root(lambda x, a: x**2 - a)
        ... def root(init, a):
        ...     x = init.item()
        ...     for _ in range(20):
        ...         x = (x + a.item() / x) / 2
        ...     return torch.tensor(x)
        >>> root(torch.tensor(1.0), torch.tensor(4.0))
        tensor(2.)
        >>> torch.func.grad(root, argnums=1)(torch.tensor(1.0), torch.tensor(4.0))
        tensor(0.2500)
    """

    def decorate(solver: Solver) -> Solver:
        @functools.wraps(solver)
        def solution(init: Tree, *args: Tree) -> Any:
            found = _run(solver, init, args, sequential)
            if not has_aux:
                return rooted(optimality_fn, found, args, solve)
            x, aux = found
            return rooted(optimality_fn, x, args, solve), aux

        # Dynamo (2.13) leaves out the derivative of an autograd.Function inside of torch.func.grad, silently.
        disable: Any = torch.compiler.disable
        decorated: Solver = disable(solution, reason="torch.compile cannot trace implicit derivatives")
        return decorated

    return decorate


def custom_fixed_point(
    fixed_point_fn: Callable[..., Tree],
    *,
    has_aux: bool = False,
    solve: Solve = solve_auto,
    sequential: bool = False,
) -> Callable[[Solver], Solver]:
    """Give `solver(init, *args)` the derivative of the fixed point x = fixed_point_fn(x, *args) with respect to args.

        dx = (I - dT/dx)^(-1) dT/dargs dargs,    T = fixed_point_fn

    It is `custom_root` of x - T(x, *args).

    Args:
        fixed_point_fn: `fixed_point_fn(x, *args)`, built like x and equal to it at the solution: one step of a
            contraction, or of gradient descent.
        has_aux: see `custom_root`.
        solve: see `custom_root`. `solve_neumann` converges where T is a contraction.
        sequential: see `custom_root`.

    Returns:
        See `custom_root`.

    Raises:
        ValueError: see `custom_root`.
        TypeError: see `custom_root`.
        torch.linalg.LinAlgError: see `custom_root`.

    Source: Blondel et al., arXiv:2105.15183; Bai, Kolter & Koltun, Deep Equilibrium Models, arXiv:1909.01377.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import custom_fixed_point
        >>> @custom_fixed_point(lambda x, a: torch.cos(a * x))
        ... def equilibrium(init, a):
        ...     for _ in range(100):
        ...         init = torch.cos(a * init)
        ...     return init
        >>> torch.func.grad(equilibrium, argnums=1)(torch.tensor(0.0), torch.tensor(1.0))
        tensor(-0.2975)
    """

    def optimality_fn(x: Tree, *args: Tree) -> Tree:
        return tree.map(torch.sub, x, fixed_point_fn(x, *args))

    return custom_root(optimality_fn, has_aux=has_aux, solve=solve, sequential=sequential)


def root_vjp(
    optimality_fn: Callable[..., Tree],
    solution: Tree,
    args: tuple[Tree, ...],
    cotangent: Tree,
    *,
    solve: Solve = solve_auto,
) -> tuple[Tree, ...]:
    """Multiply a cotangent with the derivative of a root: -(dF/dargs)' A'^(-1) cotangent.

    Args:
        optimality_fn: see `custom_root`.
        solution: x, where optimality_fn(x, *args) is zero.
        args: tuple of trees.
        cotangent: tree like `solution`.
        solve: see `custom_root`.

    Returns:
        Tuple like `args`, with None for each leaf that is no floating-point or complex tensor.

    Raises:
        ValueError: see `custom_root`.
        TypeError: see `custom_root`.
        torch.linalg.LinAlgError: see `custom_root`.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import root_vjp
        >>> root_vjp(lambda x, a: x**2 - a, torch.tensor(2.0), (torch.tensor(4.0),), torch.tensor(1.0))
        (tensor(0.2500),)
    """
    leaves, structure = tree.flatten(args)
    chosen = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]

    def root(some: Sequence[Tensor]) -> list[Tensor]:
        given = tree.unflatten(structure, replaced(leaves, chosen, some))
        return _tensors(rooted(optimality_fn, solution, given, solve))

    tree.flatten_up_to(tree.flatten(solution)[1], cotangent, "cotangent", solution, "the solution")
    grads = pullback(root, [leaves[i] for i in chosen])(_tensors(cotangent))
    result: tuple[Tree, ...] = tree.unflatten(structure, replaced([None] * len(leaves), chosen, grads))
    return result


def root_jvp(
    optimality_fn: Callable[..., Tree],
    solution: Tree,
    args: tuple[Tree, ...],
    tangents: tuple[Tree, ...],
    *,
    solve: Solve = solve_auto,
) -> Tree:
    """Multiply the derivative of a root with tangents: -A^(-1) dF/dargs tangents.

    Args:
        optimality_fn: see `custom_root`.
        solution: x, where optimality_fn(x, *args) is zero.
        args: tuple of trees.
        tangents: tuple like `args`; None is zero.
        solve: see `custom_root`.

    Returns:
        Tree like `solution`.

    Raises:
        ValueError: see `custom_root`.
        TypeError: see `custom_root`.
        torch.linalg.LinAlgError: see `custom_root`.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import root_jvp
        >>> root_jvp(lambda x, a: x**2 - a, torch.tensor(2.0), (torch.tensor(4.0),), (torch.tensor(1.0),))
        tensor(0.2500)
    """
    leaves, structure = tree.flatten(args)
    tangent_leaves = tree.flatten_up_to(structure, tangents, "tangents", args, "args")
    chosen = [i for i, tangent in enumerate(tangent_leaves) if tangent is not None]
    if not chosen:
        return tree.zeros_like(solution)

    def root(*some: Tensor) -> list[Tensor]:
        given = tree.unflatten(structure, replaced(leaves, chosen, some))
        return _tensors(rooted(optimality_fn, solution, given, solve))

    def at(leaves: Sequence[Any]) -> tuple[Tensor, ...]:
        return tuple([leaves[i] for i in chosen])

    moves = iter(torch.func.jvp(root, at(leaves), at(tangent_leaves))[1])
    return tree.map(lambda x: next(moves), solution)


def _tensors(tree_of_tensors: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.flatten(tree_of_tensors)[0] if leaf is not None]


# The run of the solver, with constants. -------------------------------------------------------------------------------


def _run(solver: Solver, init: Tree, args: tuple[Tree, ...], sequential: bool) -> Any:
    """Run a solver on constants, outside of all levels of torch.func except vmap: numpy knows no levels."""
    inputs, rebuilt = split((init, args))
    found: list[Any] = []

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        init, args = rebuilt(tensors)
        with torch.enable_grad():  # a solver may train with backward
            results, rebuild = split(solver(init, *args))
        found[:] = [rebuild]
        return tuple([result.detach() for result in results])

    apply: Any = _Constants.apply
    try:
        tensors = apply(run, sequential, *[tensor.detach() for tensor in inputs])
    except RuntimeError as error:
        if "escaped from inside a function being vmapped" not in str(error):
            raise
        raise ValueError(
            "The solver closes over a tensor that torch.vmap batches, and cannot see the batch. Give it as one of "
            "args, solver(init, *args) and optimality_fn(x, *args)"
        ) from error
    return found[0](tensors)


class _Constants(torch.autograd.Function):
    """`_Constants.apply(function, sequential, *tensors)` is function(*tensors), and has no derivative.

    Torch runs the forward of an autograd.Function outside of the levels of torch.func.
    """

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], _sequential: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, sequential: bool, *tensors: Tensor) -> tuple[Any, int]:
        dims = in_dims[2:]
        if not sequential:
            return torch.vmap(function, dims, randomness=info.randomness)(*tensors), 0

        def member(i: int) -> list[Tensor]:
            return [t if dim is None else t.select(dim, i) for t, dim in zip(tensors, dims, strict=True)]

        apply: Any = _Constants.apply
        runs = [apply(function, sequential, *member(i)) for i in range(info.batch_size)]
        return tuple(map(torch.stack, zip(*runs, strict=True))), 0
