"""An operation whose derivative is that of a root, in all modes and orders, under vmap.

Where F(x, args) = 0 defines x as a function of args, that function has the derivative dx = -A^(-1) dF/dargs dargs, with
A = dF/dx. A solution is computed with all derivatives off. Then it goes through `_Root`, which keeps the value and has
this derivative.

It is an autograd.Function because nothing else has both modes. Ordinary operations, such as the Newton step
x - A^(-1) F(x, args) with constant x and A, are right in first derivatives only. Reverse mode would also go through the
iterations of the linear solver, and there are none where F is zero. `_Root` is right in all derivatives for two
reasons. It differentiates at its own result, which has derivatives again, and not at the constant that it was given.
And it solves the linear systems of its derivative, too: the u of A'u = g is the root of A'u - g.

Only reverse mode of F is used: a product with A is the transpose of that with A', and F is not evaluated for each.
torch.func.jvp cannot be nested in torch.autograd.forward_ad, and not every operation of torch has a forward mode.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_inexact
from functorch_optim.meta._derivative import (
    Tensors,
    alive,
    forward_mode,
    has_derivative,
    primal,
    pullback,
    pushforward,
    replaced,
)
from functorch_optim.meta._exact import exact_derivatives
from functorch_optim.meta._krylov import check_alike
from functorch_optim.tree import Tree

Derivative: TypeAlias = Callable[[Callable[[Tensors], Any], Tensors, Tensors], Callable[[Tensors], list[Tensor]]]
"""(f, at x, results like) -> product with the derivative of f at x, or with its transpose."""


def rooted(optimality_fn: Callable[..., Tree], x: Tree, args: tuple[Tree, ...], solve: Callable[..., Tree]) -> Tree:
    """Return x with the derivatives of the root of `optimality_fn`; see `custom_root`."""
    x_leaves, x_structure = tree.flatten(x)
    leaves, structure = tree.flatten(args)
    advice = ". Return anything else as aux, with has_aux=True"
    check_inexact("The solution", x_leaves, lambda i: tree.paths(x)[i], advice)
    optimality_fn = exact_derivatives()(optimality_fn)
    present = [i for i, leaf in enumerate(x_leaves) if leaf is not None]
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    blank = [None] * len(x_leaves)

    def pack(xs: Tensors) -> Tree:
        return tree.unflatten(x_structure, replaced(blank, present, xs))

    def unpack(other: Tree, name: str) -> list[Any]:
        return tree.flatten_up_to(x_structure, other, name, x, "the solution")

    def F(xs: Tensors, ts: Tensors) -> list[Tensor]:  # noqa: N802 - the letter of the paper
        given = tree.unflatten(structure, replaced(leaves, tensors, ts))
        values = unpack(optimality_fn(pack(xs), *given), "the results of optimality_fn")
        return [values[i] for i in present]

    constants = tree.unflatten(structure, [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves])
    xs = [x_leaves[i].detach() for i in present]
    values = unpack(optimality_fn(pack(xs), *constants), "the results of optimality_fn")
    check_alike(values, x_leaves, lambda i: tree.paths(x)[i], "the results of optimality_fn", "the solution")
    if any(has_derivative(value) for value in values):
        raise ValueError(
            "optimality_fn closes over a tensor that is being differentiated, of which custom_root cannot know. Give "
            "it as one of args, solver(init, *args) and optimality_fn(x, *args), or detach it"
        )

    def solve_lists(matvec: Callable[[Tensors], Tensors], b: Tensors) -> list[Tensor]:
        def packed(v: Tree) -> Tree:
            return pack(matvec([unpack(v, "what the solver multiplies with")[i] for i in present]))

        solved = unpack(solve(packed, pack(b)), "the results of solve")
        return [solved[i] for i in present]

    return pack(_attached(_Problem(F, solve_lists, len(xs)), xs, [leaves[i] for i in tensors]))


@dataclasses.dataclass(frozen=True)
class _Problem:
    """The arguments of a `_Root` that are no tensors.

    Attributes:
        F: (xs, ts) -> list of tensors like xs, zero at the root.
        solve: (matvec, b) -> x, over lists of tensors like xs.
        count: number of xs.
    """

    F: Callable[[Tensors, Tensors], list[Tensor]]
    solve: Callable[[Callable[[Tensors], Tensors], Tensors], list[Tensor]]
    count: int


class _Root(torch.autograd.Function):
    """`_Root.apply(problem, *xs, *ts)` is xs, with the derivative of the root of problem.F with respect to ts."""

    generate_vmap_rule = True

    @staticmethod
    def forward(problem: _Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([x.clone() for x in tensors[: problem.count]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, *tensors = inputs
        ctx.set_materialize_grads(False)
        saved = (*output, *tensors[ctx.problem.count :])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        saved = [alive(tensor) for tensor in ctx.saved_tensors]
        xs, ts = saved[: problem.count], saved[problem.count :]
        needed = [i for i in range(len(ts)) if ctx.needs_input_grad[1 + problem.count + i]]
        b = [torch.zeros_like(x) if g is None else -g for x, g in zip(xs, grads, strict=True)]
        us = _solved(problem, pullback, xs, ts, b)
        found = pullback(lambda some: problem.F(xs, replaced(ts, needed, some)), [ts[i] for i in needed])(us)
        return (None, *[None] * len(xs), *replaced([None] * len(ts), needed, found))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        problem: _Problem = ctx.problem
        given: dict[int, Tensor] = {i: t for i, t in enumerate(tangents[problem.count :]) if t is not None}
        moving = list(given)
        with forward_mode():
            saved = [primal(tensor) for tensor in ctx.saved_tensors]
            xs, ts = saved[: problem.count], saved[problem.count :]
            product = pushforward(lambda some: problem.F(xs, replaced(ts, moving, some)), [ts[i] for i in moving], xs)
            b = [-value for value in product(list(given.values()))]
            return tuple(_solved(problem, pushforward, xs, ts, b))


def _attached(problem: _Problem, xs: Tensors, ts: Tensors) -> Tensors:
    apply: Any = _Root.apply
    attached: Tensors = apply(problem, *xs, *ts)
    return attached


def _solved(problem: _Problem, derivative: Derivative, xs: Tensors, ts: Tensors, b: Tensors) -> Tensors:
    """Solve A u = b, or A'u = b, as the root of A u - b: differentiable with respect to xs, ts and b."""
    n, m = len(xs), len(ts)

    def matvec_at(rest: Tensors) -> Callable[[Tensors], list[Tensor]]:
        return derivative(lambda xs: problem.F(xs, rest[n : n + m]), rest[:n], rest[:n])

    def F(us: Tensors, rest: Tensors) -> list[Tensor]:  # noqa: N802
        return [product - c for product, c in zip(matvec_at(rest)(us), rest[n + m :], strict=True)]

    rest = [*xs, *ts, *b]
    with torch.no_grad():
        constants = [tensor.detach() for tensor in rest]
        us = [u.detach() for u in problem.solve(matvec_at(constants), constants[n + m :])]
    return _attached(dataclasses.replace(problem, F=F), us, rest)
