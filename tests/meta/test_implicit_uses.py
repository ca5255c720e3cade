"""Uses of implicit derivatives, their arguments and results, and errors."""

import functools
import math
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import functorch_optim as fo
from functorch_optim.meta import (
    custom_fixed_point,
    custom_root,
    root_jvp,
    root_vjp,
    solve_cg,
    solve_dense,
    solve_gmres,
)

F64 = torch.float64
FOUR, ONE = torch.tensor(4.0, dtype=F64), torch.tensor(1.0, dtype=F64)


def square_root(**options):
    return custom_root(lambda x, a: x**2 - a, **options)(lambda init, a: a.sqrt())


# Bilevel optimization. ------------------------------------------------------------------------------------------------


def test_hyperparameters_learn_by_implicit_gradients():
    x, noise = torch.randn(40, 10, dtype=F64), torch.randn(40, dtype=F64)
    y = x[:, 0] - x[:, 1] + noise
    train, valid = slice(0, 15), slice(15, 40)

    def train_loss(w, log_l2):
        return (x[train] @ w - y[train]).square().mean() + (log_l2.exp() * w.square()).sum()

    @custom_root(grad(train_loss), solve=solve_cg)
    def fit(w, log_l2):
        tx = fo.lbfgs(line_search_fn="strong_wolfe", max_iter=60)
        loss = functools.partial(train_loss, log_l2=log_l2)
        return fo.apply_updates(w, tx.update(grad(loss)(w), tx.init(w), w, value_fn=loss)[0])

    def valid_loss(log_l2):
        w = fit(torch.zeros(10, dtype=F64), log_l2)
        return (x[valid] @ w - y[valid]).square().mean()

    log_l2 = torch.full((10,), -4.0, dtype=F64)
    tx = fo.adam(0.3)
    state, losses = tx.init(log_l2), []
    for _ in range(30):
        hypergradient, loss = torch.func.grad_and_value(valid_loss)(log_l2)
        updates, state = tx.update(hypergradient, state)
        log_l2 = fo.apply_updates(log_l2, updates)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert log_l2[:2].max() < log_l2[2:].mean()  # what does not help is penalized


@pytest.mark.sampled(pool="long")
def test_imaml_learns_a_beginning_for_all_tasks():
    """Tasks are regressions near a common w; the inner problem stays near the beginning (arXiv:1909.04630)."""
    common, strength = torch.randn(4, dtype=F64), 2.0
    targets = common + 0.1 * torch.randn(6, 4, dtype=F64)
    x = torch.randn(6, 3, 4, dtype=F64)
    test_x = torch.randn(6, 8, 4, dtype=F64)

    def inner_loss(w, meta, x, target):
        return (x @ (w - target)).square().mean() + strength / 2 * (w - meta).square().sum()

    @custom_root(grad(inner_loss), solve=solve_cg)
    def adapt(w, meta, x, target):
        for _ in range(150):
            w = w - 0.1 * grad(inner_loss)(w, meta, x, target)
        return w

    def outer_loss(meta):
        w = vmap(adapt, (None, None, 0, 0))(torch.zeros(4, dtype=F64), meta, x, targets)
        return torch.einsum("tij,tj->ti", test_x, w - targets).square().mean()

    def unrolled(meta):
        def one(x, target, test_x):
            curvature = 2 * x.T @ x / 3
            w = torch.linalg.inv(curvature + strength * torch.eye(4)) @ (curvature @ target + strength * meta)
            return (test_x @ (w - target)).square().mean()

        return vmap(one)(x, targets, test_x).mean()

    meta = torch.zeros(4, dtype=F64)
    assert torch.allclose(grad(outer_loss)(meta), grad(unrolled)(meta), rtol=1e-5)
    before = outer_loss(meta)
    for _ in range(40):
        meta = meta - 0.5 * grad(outer_loss)(meta)
    assert outer_loss(meta) < 0.05 * before


@pytest.mark.sampled(pool="long")
def test_roots_within_roots():
    """The optimality function of one root needs another: x = sqrt(a + y), y = cos(x y)."""
    inner = custom_fixed_point(lambda y, x: torch.cos(x * y), solve=solve_dense)(
        lambda init, x: functools.reduce(
            lambda y, _: y - (y - torch.cos(x * y)) / (1 + x * torch.sin(x * y)), range(40), init
        )
    )

    def step(x, a):
        return torch.sqrt(a + inner(ONE / 2, x))

    outer = custom_fixed_point(step, solve=solve_gmres)(
        lambda init, a: functools.reduce(lambda x, _: step(x, a), range(60), init)
    )

    def plain(a):
        x, y = ONE, ONE / 2
        for _ in range(40):  # Newton's method for both
            z = torch.stack([x, y])
            f = lambda z: torch.stack([z[0] - (a + z[1]).sqrt(), z[1] - torch.cos(z[0] * z[1])])
            x, y = z - torch.linalg.inv(jacrev(f)(z)) @ f(z)
        return x

    nested = lambda a: outer(ONE, a)
    assert abs(nested(FOUR) - plain(FOUR)) < 1e-12
    for derivative in (grad, jacfwd, hessian):
        assert abs(derivative(nested)(FOUR) - derivative(plain)(FOUR)) < 1e-9
    batch = torch.stack([FOUR, FOUR + 1])
    assert torch.allclose(vmap(grad(nested))(batch), vmap(grad(plain))(batch), rtol=1e-9)


# What goes in and comes out. ------------------------------------------------------------------------------------------


class Point(NamedTuple):
    x: torch.Tensor
    missing: None
    deep: dict


def test_the_value_is_that_of_the_solver_and_init_has_no_derivative():
    found = Point(torch.tensor([-0.0, torch.inf]), None, {"h": torch.tensor([1.0], dtype=torch.bfloat16)})
    f = custom_root(lambda p, a: fo.tree.map(lambda x: x * a.to(x), p))(lambda init, a: found)
    point = f(None, torch.tensor(2.0))
    assert type(point) is Point
    assert point.missing is None
    assert [str(leaf) for leaf in fo.tree.flatten(point)[0]] == [str(leaf) for leaf in fo.tree.flatten(found)[0]]
    assert grad(square_root(), (0, 1))(ONE, FOUR) == (0, 0.25)
    a = FOUR.clone().requires_grad_()
    value = square_root()(ONE.clone().requires_grad_(), a)
    value.backward()
    assert a.grad == 0.25
    assert not square_root()(ONE, FOUR).requires_grad


def test_args_of_all_kinds():
    labels, a = torch.tensor([0, 1, 1]), torch.tensor([4.0, 9.0], dtype=F64)

    @custom_root(lambda x, args, power, scale, nothing, f: f(x) ** power - scale * args["a"][args["labels"]])
    def root(init, args, power, scale, nothing, f):
        assert nothing is None
        assert not args["a"].requires_grad
        return (scale * args["a"][args["labels"]]) ** (1 / power)

    def value(a, labels=labels, scale=1.0):
        return root(None, {"a": a, "labels": labels}, 2, scale, None, torch.abs)

    expected = torch.zeros(3, 2, dtype=F64).index_put((torch.arange(3), labels), a.rsqrt()[labels] / 2)
    for mode in (jacrev, jacfwd):
        assert torch.allclose(mode(value)(a), expected, atol=1e-9)
    flipped = torch.stack([labels, 1 - labels])
    assert torch.allclose(vmap(jacrev(value), (None, 0))(a, flipped)[0], expected, atol=1e-9)
    assert square_root()(1, torch.tensor(4.0)) == 2
    only_numbers = custom_root(lambda x, a: x**2 - a)(lambda init, a: torch.tensor(a**0.5))
    assert only_numbers(None, 4.0) == 2


@pytest.mark.parametrize("sequential", [False, True])
def test_aux(sequential):
    @custom_root(lambda x, a: x**2 - a, has_aux=True, sequential=sequential)
    def root(init, a):
        return a.sqrt(), {"residual": a - a.sqrt() ** 2, "count": torch.tensor(3), "name": "sqrt"}

    def tensors(a):
        value, aux = root(None, a)
        return value, aux["count"]

    value, aux = root(None, FOUR)
    assert (value, aux["name"], aux["count"]) == (2, "sqrt", 3)
    slope, count = grad(tensors, has_aux=True)(FOUR)
    assert abs(slope - 0.25) < 1e-12
    assert count == 3
    assert grad(lambda a: root(None, a)[1]["residual"])(FOUR) == 0
    values, counts = vmap(tensors)(torch.stack([FOUR, ONE]))
    assert values.tolist() == [2, 1]
    assert counts.tolist() == [3, 3]


def test_complex_roots():
    f = square_root(solve=solve_dense)
    a = torch.tensor(3 + 4j, dtype=torch.complex128)
    for part in (torch.real, torch.imag, torch.abs):
        expected = grad(lambda a: part(a.sqrt()))(a)
        assert abs(grad(lambda a: part(f(None, a)))(a) - expected) < 1e-14
    tangent = torch.tensor(1j, dtype=torch.complex128)
    assert abs(jvp(lambda a: f(None, a), (a,), (tangent,))[1] - tangent / (2 * a.sqrt())) < 1e-14


def test_a_solver_may_train_with_backward_and_leave_torch():
    @custom_root(lambda w, target: 2 * (w - target))
    def train(w, target):
        w = w.clone().requires_grad_()
        optimizer = torch.optim.SGD([w], lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            (w - target).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            return torch.from_numpy(w.numpy())

    target = torch.ones(3)
    for derivative in (jacrev, jacfwd):
        assert torch.allclose(derivative(lambda t: train(torch.zeros(3), t))(target), torch.eye(3))


def test_products_with_the_derivative_of_a_root():
    optimality_fn = lambda x, args, n: {"r": x["r"] ** n - args["a"]}
    solution, args = {"r": 2 * torch.ones(2, dtype=F64)}, ({"a": 4 * torch.ones(2, dtype=F64)}, 2)
    ones = torch.ones(2, dtype=F64)
    vjps = root_vjp(optimality_fn, solution, args, {"r": ones}, solve=solve_dense)
    assert vjps[1] is None
    assert vjps[0]["a"].tolist() == [0.25, 0.25]
    moved = root_jvp(optimality_fn, solution, args, ({"a": 3 * ones}, None), solve=solve_dense)
    assert moved["r"].tolist() == [0.75, 0.75]
    assert root_jvp(optimality_fn, solution, args, ({"a": None}, None))["r"].tolist() == [0.0, 0.0]
    slope = jacrev(lambda a: root_vjp(optimality_fn, solution, ({"a": a}, 2), {"r": ones}, solve=solve_dense)[0]["a"])(
        4 * ones
    )
    assert torch.allclose(slope, -torch.eye(2, dtype=F64) / 32)


@pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_compile_breaks_the_graph_with_the_same_derivative():
    compiled = torch.compile(lambda a: square_root()(ONE, a) ** 2 + a, backend="eager")
    a = FOUR.clone().requires_grad_()
    compiled(a).backward()
    assert abs(a.grad - 2) < 1e-12


# Errors. --------------------------------------------------------------------------------------------------------------


def test_errors_name_the_path():
    solver = lambda init, a: {"w": a, "v": (a, a)}
    with pytest.raises(ValueError, match="results of optimality_fn and the solution do not match: 'v.1' is missing"):
        custom_root(lambda x, a: {"w": a, "v": (a,)})(solver)(None, FOUR)
    with pytest.raises(
        ValueError, match=r"optimality_fn have shape \(1,\) and dtype torch.float64 at 'v.1', but the sol"
    ):
        custom_root(lambda x, a: {"w": a, "v": (a, a[None])})(solver)(None, FOUR)
    with pytest.raises(ValueError, match="the results of optimality_fn have None at 'w'"):
        custom_root(lambda x, a: {"w": None, "v": (a, a)})(solver)(None, FOUR)
    with pytest.raises(TypeError, match="The solution has a tensor of torch.int64 at 'n'.*has_aux=True"):
        custom_root(lambda x, a: x)(lambda init, a: {"n": torch.tensor(3)})(None, FOUR)
    with pytest.raises(TypeError, match="The solution has a int at '1'"):
        custom_root(lambda x, a: x)(lambda init, a: (a, 3))(None, FOUR)
    with pytest.raises(ValueError, match="cotangent and the solution do not match"):
        root_vjp(lambda x, a: x["w"] - a, {"w": ONE}, (FOUR,), ONE)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, b: grad(f)(b),
        lambda f, b: jvp(f, (b,), (b,)),
        lambda f, b: f(b.clone().requires_grad_()),
        lambda f, b: vmap(grad(f))(b[None]),
        lambda f, b: jvp(lambda b: grad(lambda _: f(b))(ONE), (b,), (b,)),
        lambda f, b: jacrev(lambda b: jacfwd(lambda _: f(b))(ONE))(b),
    ],
    ids=["grad", "jvp", "autograd", "vmap(grad)", "jvp(grad)", "jacrev(jacfwd)"],
)
def test_what_is_differentiated_must_not_come_in_through_a_closure(derivative):
    def f(b):
        return custom_root(lambda x, a: x**2 - a * b)(lambda init, a: a.sqrt())(None, FOUR)

    with pytest.raises(ValueError, match="optimality_fn closes over a tensor that is being differentiated"):
        derivative(f, ONE)
    assert f(ONE) == 2


def test_what_is_batched_must_not_come_in_through_a_closure_of_the_solver():
    with pytest.raises(ValueError, match="The solver closes over a tensor that torch.vmap batches"):
        vmap(lambda b: custom_root(lambda x, a: x - a)(lambda init, a: a * b)(None, FOUR))(torch.ones(2, dtype=F64))


# Badly conditioned systems. -------------------------------------------------------------------------------------------


def conditioned_solver(condition, n, **options):
    """Solve A x = t^2 b exactly, with A of this condition number; return the solver and A^(-1) b."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64))
    sizes = torch.logspace(0, -math.log10(condition), n, dtype=F64)
    a, b = (q * sizes) @ q.T, torch.randn(n, dtype=F64)
    solution = q @ ((q.T @ b) / sizes)
    solver = custom_root(lambda x, t: a @ x - t**2 * b, **options)(lambda init, t: t**2 * solution)
    return lambda t: solver(None, t), solution


@pytest.mark.parametrize("condition", [1e1, 1e5, 1e8])
def test_the_default_solver_copes_with_bad_conditions_in_every_mode(condition):
    f, solution = conditioned_solver(condition, 50)
    total = lambda t: f(t).sum()
    batch = torch.tensor([1.0, 2.0], dtype=F64)
    found = {
        "reverse": grad(total)(ONE) / 2,
        "forward": jacfwd(f)(ONE).sum() / 2,
        "second": hessian(total)(ONE) / 2,
        "batched": vmap(grad(total))(batch)[1] / 4,
        "both": vmap(hessian(total))(batch)[1] / 2,
    }
    for mode, value in found.items():
        assert float(abs(value / solution.sum() - 1)) < 1e-13 * condition, mode


def test_a_derivative_whose_linear_system_is_not_solved_is_an_error():
    f, _ = conditioned_solver(1e6, 50, solve=functools.partial(solve_cg, max_iter=20))
    for derivative in (grad(lambda t: f(t).sum()), jacfwd(f), lambda t: vmap(jacfwd(f))(torch.stack([t, t]))):
        with pytest.raises(torch.linalg.LinAlgError, match="is not solved after 20 iterations.*Take solve_auto"):
            derivative(ONE)


def test_numbers_that_nothing_depends_on_do_no_harm():
    """A weight that the loss does not use makes the Hessian singular; of the others the derivative is as ever."""
    loss = lambda w, a: (w["used"] - a**2).square().sum() + 0 * w["unused"].square().sum()
    solver = custom_root(grad(loss))(lambda init, a: {"used": a**2, "unused": torch.zeros(2, dtype=F64)})
    slopes = jacfwd(lambda a: solver(None, a))(FOUR)
    assert slopes["used"] == pytest.approx(8.0, rel=1e-14)
    assert slopes["unused"].tolist() == [0.0, 0.0]
    assert grad(lambda a: solver(None, a)["used"])(FOUR) == pytest.approx(8.0, rel=1e-14)
    with pytest.raises(torch.linalg.LinAlgError, match="A is singular to the precision of torch.float64"):
        grad(lambda a: solver(None, a)["unused"].sum())(FOUR)  # it depends on where training began
