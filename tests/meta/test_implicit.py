"""Implicit derivatives: against closed forms, unrolled solvers and finite differences, in every mode."""

import functools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import functorch_optim as fo
from functorch_optim._control import while_loop
from functorch_optim.meta import (
    custom_fixed_point,
    custom_root,
    solve_bicgstab,
    solve_cg,
    solve_dense,
    solve_gmres,
    solve_neumann,
    solve_normal_cg,
)

F64 = torch.float64
exact = functools.partial
GENERAL = [
    exact(solve_normal_cg, tol=1e-13, max_iter=24),
    exact(solve_gmres, tol=1e-13, max_iter=12),
    exact(solve_bicgstab, tol=1e-13, max_iter=24),
    solve_dense,
]
CG = exact(solve_cg, tol=1e-13, max_iter=12)
NEUMANN = exact(solve_neumann, tol=1e-14, max_iter=200)


def randn(*shape):
    return torch.randn(*shape, dtype=F64, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(3)
X, Y = randn(9, 3), randn(9)
W = 0.3 * randn(3, 3)
Q, E = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64)) + W @ W.T, randn(2, 3)
LABELS = (X @ randn(3) > 0).to(F64)
THETA = randn(3)


class Case(NamedTuple):
    """A problem: `made(solve)` and `reference` take theta, 3 numbers, to a tree."""

    made: object
    reference: object
    solves: list


# Ridge regression, with a regularization for each weight, by numpy. ---------------------------------------------------


def ridge_gradient(w, theta, data):
    return data["x"].T @ (data["x"] @ w - data["y"]) + theta.exp() * w


def ridge_by_numpy(init, theta, data):
    x, y = data["x"].numpy(), data["y"].numpy()
    return torch.from_numpy(np.linalg.solve(x.T @ x + np.diag(np.exp(theta.numpy())), x.T @ y))


def ridge(solve):
    solver = custom_root(ridge_gradient, solve=solve, sequential=True)(ridge_by_numpy)
    return lambda theta, x=X, y=Y: solver(None, theta, {"x": x, "y": y})


def solved(matrix, b):
    return torch.linalg.inv(matrix) @ b  # torch.linalg.solve (2.13) has wrong second derivatives in forward mode


def ridge_reference(theta, x=X, y=Y):
    return solved(x.T @ x + torch.diag(theta.exp()), x.T @ y)


# Logistic regression by L-BFGS. ---------------------------------------------------------------------------------------


def logistic_loss(w, theta):
    loss = torch.nn.functional.binary_cross_entropy_with_logits(X @ w["w"], LABELS)
    return loss + (theta.exp() * w["w"].square()).sum() / 2


def logistic(solve):
    @custom_root(grad(logistic_loss), solve=solve, sequential=True)
    def solver(w, theta):
        loss = functools.partial(logistic_loss, theta=theta)
        tx = fo.lbfgs(line_search_fn="strong_wolfe", max_iter=100, tolerance_grad=1e-13, tolerance_change=1e-18)
        updates, _ = tx.update(grad(loss)(w), tx.init(w), w, value_fn=loss)
        return fo.apply_updates(w, updates)

    return lambda theta: solver({"w": torch.zeros(3, dtype=F64)}, theta)


def logistic_reference(theta):
    w = torch.zeros(3, dtype=F64)
    for _ in range(9):  # Newton's method, which can be differentiated
        p = torch.sigmoid(X @ w)
        gradient = X.T @ (p - LABELS) / 9 + theta.exp() * w
        w = w - solved((X.T * (p * (1 - p))) @ X / 9 + torch.diag(theta.exp()), gradient)
    return {"w": w}


# A deep equilibrium, by a loop that vmap can batch. -------------------------------------------------------------------


def layer(x, theta):
    return {"h": torch.tanh(W @ x["h"] + theta)}


def equilibrium(solve):
    @custom_fixed_point(layer, solve=solve)
    def solver(init, theta):
        def going(carry):
            return (carry[0] - carry[1]).abs().amax() > 1e-15

        def turn(carry):
            return layer({"h": carry[0]}, theta)["h"], carry[0]

        return {"h": while_loop(going, turn, (init["h"], init["h"] + 1), 100)[0]}

    return lambda theta: solver({"h": torch.zeros(3, dtype=F64)}, theta)


def equilibrium_reference(theta):
    x = {"h": torch.zeros(3, dtype=F64)}
    for _ in range(100):
        x = layer(x, theta)
    return x


# A quadratic program: the root is of its KKT conditions, and indefinite. ----------------------------------------------


def kkt(point, theta):
    x, nu = point
    return Q @ x + theta + E.T @ nu, E @ x - theta[:2].sin()


def program_reference(theta):
    matrix = torch.cat([torch.cat([Q, E.T], 1), torch.cat([E, torch.zeros(2, 2, dtype=F64)], 1)])
    point = solved(matrix, torch.cat([-theta, theta[:2].sin()]))
    return point[:3], point[3:]


def program(solve):
    solver = custom_root(kkt, solve=solve)(lambda init, theta: program_reference(theta))
    return lambda theta: solver(None, theta)


# Square roots in python's floats, of which each is a tree's leaf. -----------------------------------------------------


def roots(solve):
    @custom_root(
        lambda x, a: [root**2 - 1 - square for root, square in zip(x, a.square(), strict=True)],
        solve=solve,
        sequential=True,
    )
    def solver(init, a):
        return [torch.tensor((1 + number.item() ** 2) ** 0.5, dtype=F64) for number in a]

    return lambda theta: solver(None, theta)


def roots_reference(theta):
    return list((1 + theta**2).sqrt())


CASES = {
    "ridge": Case(ridge, ridge_reference, [*GENERAL, CG]),
    "logistic": Case(logistic, logistic_reference, [*GENERAL, CG]),
    "equilibrium": Case(equilibrium, equilibrium_reference, [*GENERAL, NEUMANN]),
    "program": Case(program, program_reference, [*GENERAL[:2], solve_dense]),
    "roots": Case(roots, roots_reference, [*GENERAL, CG]),
}


def numbers(solution):
    return torch.cat([leaf.reshape(-1) for leaf in fo.tree.flatten(solution)[0]])


def cubed(f):
    return lambda theta: (numbers(f(theta)) ** 3).sum()


def by_autograd(f, theta, times):
    theta = theta.clone().requires_grad_()
    value = cubed(f)(theta)
    for _ in range(times):
        (value,) = torch.autograd.grad(value.sum(), theta, create_graph=True)
    return value.detach()


def by_forward_ad(f, theta):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(cubed(f)(forward_ad.make_dual(theta, theta.cos()))).tangent


BATCH = torch.stack([THETA, THETA.sin(), -THETA])
FIRST = {
    "value": lambda f, t: numbers(f(t)),
    "grad": lambda f, t: grad(cubed(f))(t),
    "vjp": lambda f, t: vjp(lambda t: numbers(f(t)), t)[1](numbers(f(t)).sin())[0],
    "jvp": lambda f, t: jvp(cubed(f), (t,), (t.cos(),))[1],
    "jacrev": lambda f, t: jacrev(lambda t: numbers(f(t)))(t),
    "jacfwd": lambda f, t: jacfwd(lambda t: numbers(f(t)))(t),
    "vmap": lambda f, t: vmap(lambda t: numbers(f(t)))(BATCH),
    "vmap(grad)": lambda f, t: vmap(grad(cubed(f)))(BATCH),
    "vmap(jvp)": lambda f, t: vmap(lambda t: jvp(cubed(f), (t,), (t.cos(),))[1])(BATCH),
    "grad(vmap)": lambda f, t: grad(lambda t: vmap(lambda s: cubed(f)(t + s))(BATCH).sum())(t),
    "jvp(vmap)": lambda f, t: jvp(lambda b: vmap(cubed(f))(b), (BATCH,), (BATCH.cos(),))[1],
    "backward": lambda f, t: by_autograd(f, t, 1),
    "forward_ad": by_forward_ad,
}
HIGHER = {
    "hessian": lambda f, t: hessian(cubed(f))(t),
    "jacrev(jacrev)": lambda f, t: jacrev(jacrev(cubed(f)))(t),
    "jacfwd(jacfwd)": lambda f, t: jacfwd(jacfwd(cubed(f)))(t),
    "jacrev(jacfwd)": lambda f, t: jacrev(jacfwd(cubed(f)))(t),
    "vmap(hessian)": lambda f, t: vmap(hessian(cubed(f)))(BATCH),
    "double backward": lambda f, t: by_autograd(f, t, 2),
    "triple backward": lambda f, t: by_autograd(f, t, 3),
}


def deviation(one, other, transform):
    expected = transform(other, THETA)
    return float((transform(one, THETA) - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.sampled
@pytest.mark.parametrize("transform", FIRST)
@pytest.mark.parametrize("case", CASES)
def test_first_derivatives(case, transform):
    made, reference, solves = CASES[case]
    for solve in solves if transform in ("grad", "jvp", "vmap(grad)") else (solves[0], solves[-1]):
        assert deviation(made(solve), reference, FIRST[transform]) < 1e-8, solve


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("transform", HIGHER)
@pytest.mark.parametrize("case", CASES)
def test_higher_derivatives(case, transform):
    made, reference, solves = CASES[case]
    for solve in (solves[0], solves[-1]):
        assert deviation(made(solve), reference, HIGHER[transform]) < 1e-8, solve


@pytest.mark.parametrize("case", CASES)
def test_central_finite_differences(case):
    made, _, solves = CASES[case]
    f = cubed(made(solves[0]))
    steps = 1e-4 * torch.eye(3, dtype=F64)
    slopes = [(8 * (f(THETA + h) - f(THETA - h)) - f(THETA + 2 * h) + f(THETA - 2 * h)) / 12e-4 for h in steps]
    expected = torch.stack(slopes)
    assert (grad(f)(THETA) - expected).abs().max() <= 1e-8 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("case", ["ridge", "equilibrium", "program"])
def test_gradcheck_in_both_modes(case):
    f = CASES[case].made(solve_dense)
    theta = THETA.clone().requires_grad_()
    assert gradcheck(lambda t: numbers(f(t)), theta, check_forward_ad=True)
    assert gradgradcheck(lambda t: numbers(f(t)), theta, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_derivatives_with_respect_to_the_data_as_well():
    f = ridge(CG)
    for argnum in (1, 2):
        for mode in (jacrev, jacfwd):
            expected = mode(ridge_reference, argnum)(THETA, X, Y)
            assert (mode(f, argnum)(THETA, X, Y) - expected).abs().max() < 1e-12
    mixed = jacrev(jacfwd(f, 1), 0)(THETA, X, Y)
    assert (mixed - jacrev(jacfwd(ridge_reference, 1), 0)(THETA, X, Y)).abs().max() < 1e-12


# Negative controls: the checks above can fail. ------------------------------------------------------------------------


def test_a_solution_that_has_not_converged_has_another_derivative():
    exact, rough = [custom_fixed_point(layer)(lambda init, theta, n=n: run(n, theta)) for n in (100, 1)]
    errors = [
        (jacrev(lambda t, f=f: f(None, t)["h"])(THETA) - jacrev(run_h)(THETA)).abs().max() for f in (exact, rough)
    ]
    assert errors[0] < 1e-4
    assert errors[1] > 1e-2


def run(count, theta):
    x = {"h": torch.zeros(3, dtype=F64)}
    for _ in range(count):
        x = layer(x, theta)
    return x


def run_h(theta):
    return run(100, theta)["h"]


def test_a_detached_solution_has_no_derivative_and_a_rough_linear_solver_another():
    detached = lambda theta: {"h": run_h(theta).detach()}
    rough = equilibrium(exact(solve_neumann, max_iter=1))
    assert deviation(detached, equilibrium_reference, FIRST["grad"]) > 0.1
    assert deviation(rough, equilibrium_reference, FIRST["grad"]) > 1e-3


# vmap over init, args and both. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_init_and_args(sequential, in_dims):
    @custom_root(lambda x, a: x**2 - a, solve=solve_dense, sequential=sequential)
    def root(init, a):
        for _ in range(60):
            init = (init + a / init) / 2
        return init

    init = torch.tensor([1.0, -1.0], dtype=F64) if in_dims[0] == 0 else torch.tensor(1.0, dtype=F64)
    a = torch.tensor([4.0, 9.0], dtype=F64) if in_dims[1] == 0 else torch.tensor(4.0, dtype=F64)
    sign, a_of = init.sign() * torch.ones(2), a * torch.ones(2)
    assert torch.equal(vmap(root, in_dims)(init, a), sign * a_of.sqrt())
    slopes = vmap(grad(root, (0, 1)), in_dims)(init, a)
    assert torch.allclose(slopes[1], sign / (2 * a_of.sqrt()), rtol=1e-12)
    assert slopes[0].count_nonzero() == 0
    curvature = vmap(hessian(root, 1), in_dims)(init, a)
    assert torch.allclose(curvature, -sign / 4 * a_of**-1.5, rtol=1e-12)


def test_vmap_of_vmap_runs_every_member():
    f = CASES["roots"].made(solve_dense)
    batch = torch.stack([BATCH, BATCH + 1])
    assert torch.allclose(vmap(vmap(hessian(cubed(f))))(batch), vmap(vmap(hessian(cubed(roots_reference))))(batch))
