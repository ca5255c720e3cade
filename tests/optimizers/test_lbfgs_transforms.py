"""L-BFGS in batches, compiled, and differentiated."""

import pytest
import torch
from lbfgs_problems import DOUBLE, WOLFE, few, make, rosenbrock, train

import functorch_optim as fo
from functorch_optim.optimizers.lbfgs import lbfgs

# Batches and compilation. ---------------------------------------------------------------------------------------------


def stacked(trees):
    return fo.tree.map(lambda *leaves: torch.stack(leaves), *trees)


@few
def test_a_batch_of_problems_equals_a_loop(options):
    x = torch.randn(6, 3, **DOUBLE)
    x[2] = 1.0  # where the gradient is zero
    scales = torch.linspace(1, 100, 6, **DOUBLE)

    def run(x, a):
        return train({"x": x}, options, lambda params: rosenbrock(params, a))

    params, state = torch.vmap(run)(x, scales)
    loop = [run(row, a) for row, a in zip(x, scales, strict=True)]
    torch.testing.assert_close(params, stacked([p for p, _ in loop]), rtol=1e-9, atol=1e-9)
    expected = stacked([s for _, s in loop])
    assert torch.equal(state.n_iter, expected.n_iter)
    assert torch.equal(state.func_evals, expected.func_evals)
    assert len(state.n_iter.unique()) > 1
    torch.testing.assert_close(state._replace(ro=expected.ro), expected, rtol=1e-6, atol=1e-6)


@few
def test_batched_states_go_on(options):
    """States that vmap has batched, in which the number of pairs is no longer known."""
    params = {"x": torch.randn(4, 3, **DOUBLE)}
    first = torch.vmap(lambda p: train(p, options, updates=1))(params)
    second, _ = torch.vmap(lambda p, s: train(p, options, updates=1, state=s))(*first)
    torch.testing.assert_close(
        second, torch.vmap(lambda p: train(p, options, updates=2)[0])(params), rtol=1e-9, atol=1e-9
    )


@few
def test_a_batch_of_learning_rates_of_one_problem_equals_a_loop(options):
    params, lrs = make(rosenbrock), torch.tensor([0.01, 0.02, 0.5], **DOUBLE)
    batched = torch.vmap(lambda lr: train(params, {**options, "lr": lr}, updates=1)[0]["x"])(lrs)
    loop = [train(params, {**options, "lr": lr.item()}, updates=1)[0]["x"] for lr in lrs]
    torch.testing.assert_close(batched, torch.stack(loop), rtol=1e-9, atol=1e-9)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"max_iter": 2, "lr": 0.02, "history_size": 2}, "aot_eager"),
        ({"max_iter": 2, "max_eval": 3, "history_size": 1, **WOLFE}, "eager"),  # thousands of calls
    ],
    ids=["fixed", "wolfe"],
)
def test_compiles_whole(options, backend):
    def step(params, state):
        return train(params, options, updates=1, state=state)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    params = expected = {"x": torch.randn(3, **DOUBLE)}
    state = expected_state = lbfgs(**options).init(params)
    for _ in range(3):
        params, state = compiled(params, state)
        expected, expected_state = step(expected, expected_state)
        torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, expected_state, rtol=1e-8, atol=1e-8)


# Derivatives. ---------------------------------------------------------------------------------------------------------


def central_difference(function, args, direction, h=1e-6):
    plus, minus = (function(*[a + sign * h * v for a, v in zip(args, direction, strict=True)]) for sign in (1, -1))
    return (plus - minus) / (2 * h)


@pytest.mark.sampled(pool="long")
@few
def test_derivatives_equal_finite_differences(options):
    """With respect to where training begins, to the learning rate, and to data of the loss: after two updates."""

    def trained(x, lr, a):
        params, _ = train({"x": x}, {**options, "lr": lr}, lambda params: rosenbrock(params, a))
        return params["x"].sin().sum()

    args = torch.tensor([0.3, -0.6, 0.9], **DOUBLE), torch.tensor(options.get("lr", 1.0), **DOUBLE)
    args = (*args, torch.tensor(5.0, **DOUBLE))
    grads = torch.func.grad(trained, argnums=(0, 1, 2))(*args)
    assert all(grad.abs().max() > 1e-6 for grad in (grads[0], grads[2]))
    for k in range(3):
        direction = [torch.zeros_like(arg) for arg in args]
        direction[k] = torch.linspace(1, 2, args[k].numel(), **DOUBLE).reshape(args[k].shape)
        expected = central_difference(trained, args, direction)
        torch.testing.assert_close((grads[k] * direction[k]).sum(), expected, rtol=1e-5, atol=1e-7)
        _, forward = torch.func.jvp(trained, args, tuple(direction))
        torch.testing.assert_close(forward, expected, rtol=1e-5, atol=1e-7)
    batched = torch.func.grad(lambda x: torch.vmap(lambda x: trained(x, *args[1:]))(x).sum())
    torch.testing.assert_close(batched(args[0].expand(2, -1))[1], grads[0], rtol=1e-8, atol=1e-10)
    columns = torch.func.jacfwd(trained)(*args)
    torch.testing.assert_close(columns, grads[0], rtol=1e-8, atol=1e-10)


@few
def test_autograd_goes_through_as_torch_func_does(options):
    x = torch.tensor([0.3, -0.6, 0.9], **DOUBLE)

    def trained(x):
        return train({"x": x}, options)[0]["x"].sum()

    leaf = x.clone().requires_grad_()
    trained(leaf).backward()
    torch.testing.assert_close(leaf.grad, torch.func.grad(trained)(x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert not trained(leaf).requires_grad


@pytest.mark.sampled(size=4)
@few
@pytest.mark.parametrize("batched", [False, True])
def test_at_a_minimum_nothing_moves_and_derivatives_are_finite(options, batched):
    def trained(x, lr):
        return train({"x": x}, {**options, "lr": lr})[0]["x"].sum()

    x, lr = torch.ones(3, **DOUBLE), torch.tensor(0.5, **DOUBLE)
    function = (lambda x, lr: torch.vmap(trained, (0, None))(x.expand(2, 3), lr)[0]) if batched else trained
    assert function(x, lr) == 3
    for derivative in (torch.func.grad, torch.func.jacfwd):
        grads = derivative(function, (0, 1))(x, lr)
        assert torch.equal(grads[0], torch.ones_like(x))
        assert grads[1] == 0


@pytest.mark.sampled(pool="long")
def test_those_of_a_batch_that_have_ended_are_not_led_out_of_the_domain():
    """Another step as long as the last would make x negative, where loss and gradient are NaN."""

    def problem(params):
        return (params["x"] - 0.2 * params["x"].sqrt()).sum()

    def trained(x):
        return train({"x": x}, {"tolerance_grad": 0.82, "lr": 0.01, "max_iter": 5, **WOLFE}, problem, updates=1)

    x = torch.tensor([[1.0], [1.2], [0.01]], **DOUBLE)
    params, state = torch.vmap(trained)(x)
    assert (params["x"] + state.t[:, None] * state.d).min() < -0.5
    batched = torch.func.grad(lambda x: torch.vmap(trained)(x)[0]["x"].sum())(x)
    each = torch.stack([torch.func.grad(lambda x: trained(x)[0]["x"].sum())(row) for row in x])
    assert each.isfinite().all()
    torch.testing.assert_close(batched, each, rtol=1e-8, atol=1e-10)


@few
def test_derivatives_where_a_complex_number_begins_at_an_odd_place(options):
    """In the vector of all numbers: torch's view_as_real cannot be differentiated there."""
    params = {"a": torch.randn(1, **DOUBLE), "z": torch.randn(2, dtype=torch.complex128)}

    def problem(params):
        return (params["z"] * (2 + 1j) - 1).abs().square().sum() + (params["a"] - params["z"].real.sum()).square().sum()

    def trained(params):
        moved, _ = train(params, {**options, "max_iter": 3, "lr": 0.1}, problem, updates=2)
        return problem(moved)

    gradient = torch.func.grad(trained)(params)
    direction = fo.tree.map(torch.randn_like, params)
    by = 1e-6
    up, down = [trained(fo.tree.map(lambda p, d: p + s * by * d, params, direction)) for s in (1, -1)]
    pairs = [(gradient[key], direction[key]) for key in params]
    slope = sum((g.conj() * d).real.sum() if g.is_complex() else (g * d).sum() for g, d in pairs)
    torch.testing.assert_close(slope, (up - down) / (2 * by), rtol=1e-5, atol=1e-8)
