"""L-BFGS: torch.optim.LBFGS's numbers, in every way of running, and its derivatives."""

import io
import pickle

import pytest
import torch
from torch.optim.lbfgs import _strong_wolfe

import functorch_optim as fo
from functorch_optim.control import cond, select, while_loop
from functorch_optim.optimizers import line_search
from functorch_optim.optimizers.lbfgs import LBFGSState, lbfgs, pack, unpack
from functorch_optim.optimizers.limited_memory import Settings, from_torch, minimize, new_memory, to_torch
from functorch_optim.optimizers.line_search import Point

DOUBLE = {"dtype": torch.float64}
WOLFE = {"line_search_fn": "strong_wolfe"}


# Problems: a loss, and parameters where to begin. ---------------------------------------------------------------------


def rosenbrock(params, a=100.0):
    x = params["x"]
    return (a * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def quadratic(params):
    x, scale = params["x"], torch.linspace(0.5, 20, 6, **DOUBLE)
    return 0.5 * (scale * x * x).sum() + (x[1:] * x[:-1]).sum() - x.sum()


def network(params):
    inputs = torch.linspace(-2, 2, 60, **DOUBLE).reshape(20, 3).sin()
    hidden = torch.tanh(inputs @ params["layer"]["weight"] + params["layer"]["bias"])
    return ((hidden @ params["out"] + params["shift"] - inputs.sum(1)) ** 2).mean()


def complex_quadratic(params):
    z = params["z"]
    return ((1 + 2j) * z - torch.arange(4, **DOUBLE)).abs().square().sum() + (z[1:] * z[:-1]).real.sum() * 0.3


def log_barrier(params):
    return (params["x"] - 0.1 * params["x"].log()).sum()  # NaN where x < 0


def make(problem, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)

    def randn(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, generator=generator)

    if problem is network:
        layer = {"weight": randn(3, 4), "bias": randn(4), "empty": randn(0, 2)}
        return {"layer": layer, "out": randn(4), "shift": randn()}
    if problem is complex_quadratic:
        return {"z": randn(4, dtype=torch.complex128)}
    if problem is log_barrier:
        return {"x": torch.tensor([3.0, 0.5], dtype=dtype)}
    return {"x": randn(6)}


# Training with torch's and with ours. ---------------------------------------------------------------------------------


def leaves_of(params):
    return fo.tree.flatten(params)[0]


class Theirs:
    """torch.optim.LBFGS for a tree."""

    def __init__(self, problem, params, **options):
        leaves, structure = fo.tree.flatten(params)
        self.leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        self.params = fo.tree.unflatten(structure, self.leaves)
        self.optimizer = torch.optim.LBFGS(self.leaves, **options)
        self.problem = problem

    @property
    def state(self):
        return self.optimizer.state[self.leaves[0]]

    def step(self):
        def closure():
            self.optimizer.zero_grad()
            loss = self.problem(self.params)
            loss.backward()
            return loss

        self.optimizer.step(closure)


class Ours:
    """The functional form."""

    def __init__(self, problem, params, **options):
        self.tx, self.params, self.problem = lbfgs(**options), params, problem
        self.state = self.tx.init(params)

    def step(self):
        grads, value = torch.func.grad_and_value(self.problem)(self.params)
        updates, self.state = self.tx.update(grads, self.state, self.params, value_fn=self.problem, value=value)
        self.params = fo.apply_updates(self.params, updates)


class Core:
    """`minimize` on the vector of all parameters, which no additive update rounds."""

    def __init__(self, problem, params, history_size=100, max_iter=20, max_eval=None, **options):
        leaves, structure = fo.tree.flatten(params)
        shapes = [leaf.shape for leaf in leaves]

        def loss(x):
            pieces = x.split([shape.numel() for shape in shapes])
            return problem(fo.tree.unflatten(structure, [p.view(s) for p, s in zip(pieces, shapes, strict=True)]))

        defaults = {"lr": 1.0, "tolerance_grad": 1e-7, "tolerance_change": 1e-9, "line_search_fn": None}
        max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
        counts = {"max_iter": max_iter, "max_eval": max_eval, "history_size": history_size}
        self.settings = Settings(**{**defaults, **counts, **options})
        self.evaluate = lambda x: torch.func.grad_and_value(loss)(x)[::-1]
        self.x = torch.cat([leaf.reshape(-1) for leaf in leaves])
        self.state = new_memory(self.x)

    def step(self):
        self.x, self.state = minimize(self.evaluate, self.x, *self.evaluate(self.x), self.state, self.settings)

    @property
    def params(self):
        return self.x


def deviation(left, right):
    """Return the largest relative deviation of parameters."""
    ours = torch.cat([leaf.reshape(-1) for leaf in leaves_of(left.params)])
    theirs = torch.cat([leaf.detach().reshape(-1) for leaf in leaves_of(right.params)])
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


def largest_deviation(kind, problem, options, steps, torch_options=None, counted=True):
    """Train with both; return the largest relative deviation in any step, infinity where counts differ."""
    params = make(problem)
    ours = kind(problem, params, **options)
    theirs = Theirs(problem, params, **(options if torch_options is None else torch_options))
    worst = 0.0
    for _ in range(steps):
        ours.step()
        theirs.step()
        worst = max(worst, deviation(ours, theirs))
        if counted and (ours.state.n_iter, ours.state.func_evals) != (
            theirs.state["n_iter"],
            theirs.state["func_evals"],
        ):
            return float("inf")
    return worst


OPTIONS = [
    {},
    WOLFE,
    {"lr": 0.1, "max_iter": 1},
    {"max_iter": 1, **WOLFE},
    {"lr": 0.03, "max_iter": 7, "history_size": 3},
    {"max_iter": 4, "history_size": 3, **WOLFE},
    {"lr": 0.5, "max_iter": 5, "history_size": 1, **WOLFE},
    {"lr": 0.02, "max_iter": 3, "history_size": 1},
    {"lr": 0.1, "max_iter": 25, "max_eval": 6},
    {"max_iter": 25, "max_eval": 3, **WOLFE},
    {"max_iter": 25, "max_eval": 1},
    {"max_iter": 25, "max_eval": 1, **WOLFE},
    {"lr": 0.1, "max_iter": 25, "max_eval": 60, **WOLFE},
    {"max_iter": 10, "tolerance_grad": 1e-1, **WOLFE},
    {"max_iter": 10, "tolerance_change": 1e-1, "lr": 0.2},
    {"max_iter": 10, "tolerance_change": 1e-1, **WOLFE},
    {"lr": 20.0, "max_iter": 6, **WOLFE},
    {"lr": 0.003, "max_iter": 6, **WOLFE},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=[str(list(o.items())) for o in OPTIONS])
problems = pytest.mark.parametrize("problem", [rosenbrock, quadratic, network, complex_quadratic])


@options
@problems
def test_equals_torch(problem, options):
    # Each update rounds the parameters once more than torch does, and the curvature of small steps amplifies that.
    iterations = options.get("max_iter", 20)
    assert largest_deviation(Ours, problem, options, max(1, 20 // iterations)) < 1e-12
    if problem is not network:  # which diverges exponentially while it converges
        assert largest_deviation(Ours, problem, options, max(2, 60 // iterations), counted=False) < 1e-6


@options
@pytest.mark.parametrize("problem", [rosenbrock, quadratic, network])
def test_without_additive_updates_it_equals_torch_for_long(problem, options):
    assert largest_deviation(Core, problem, options, 8) < 1e-9


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"lr": 0.1000001, "max_iter": 3}, {"lr": 0.1, "max_iter": 3}),
        ({"lr": 0.1, "max_iter": 3}, {"lr": 0.1, "max_iter": 4}),
        ({"max_iter": 6, "history_size": 2, **WOLFE}, {"max_iter": 6, "history_size": 3, **WOLFE}),
        ({"max_iter": 6, "max_eval": 5, **WOLFE}, {"max_iter": 6, "max_eval": 6, **WOLFE}),
        ({"max_iter": 6, "lr": 0.1}, {"max_iter": 6, "lr": 0.1, **WOLFE}),
        ({"tolerance_grad": 1e-2}, {"tolerance_grad": 1e-7}),
        ({"tolerance_change": 1e-2}, {"tolerance_change": 1e-9}),
    ],
)
def test_the_comparison_can_fail(ours, theirs):
    assert largest_deviation(Ours, rosenbrock, ours, 3, torch_options=theirs) > 1e-10


@pytest.mark.parametrize("options", [{}, WOLFE, {"max_iter": 4, "history_size": 2, **WOLFE}])
def test_equals_torch_in_single_precision(options):
    params = make(rosenbrock, torch.float32)
    ours, theirs = Ours(rosenbrock, params, **options), Theirs(rosenbrock, params, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.params["x"], theirs.params["x"].detach(), rtol=1e-3, atol=1e-3)
    assert all(field.dtype in (torch.float32, torch.int64) for field in ours.state)


def test_equals_torch_with_mixed_dtypes():
    params = {"a": torch.tensor([2.0, -1.0]), "b": torch.tensor([0.5, 3.0], **DOUBLE)}

    def problem(params):
        return rosenbrock({"x": torch.cat([params["a"].double(), params["b"]])})

    ours = Ours(problem, params, max_iter=5, **WOLFE)
    theirs = Theirs(problem, params, max_iter=5, **WOLFE)
    for _ in range(4):
        ours.step()
        theirs.step()
    assert (ours.params["a"].dtype, ours.params["b"].dtype) == (torch.float32, torch.float64)
    assert ours.state.d.dtype == torch.float64
    for name, leaf in ours.params.items():  # torch rounds the float32 parameters after every iteration, we at the end
        torch.testing.assert_close(leaf, theirs.params[name].detach(), rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_float32():
    ours = Ours(quadratic_of_16_bits, {"x": torch.ones(3, dtype=torch.bfloat16)}, **WOLFE)
    ours.step()
    assert ours.state.d.dtype == torch.float32
    assert ours.params["x"].tolist() == [2.0, 2.0, 2.0]


def quadratic_of_16_bits(params):
    return (params["x"].float() - 2).square().sum()


@pytest.mark.parametrize("options", [{"lr": 20.0}, {"lr": 20.0, "max_iter": 4, **WOLFE}, {"lr": 100.0, **WOLFE}])
def test_goes_on_with_nan_as_torch_does(options):
    params = make(log_barrier)
    ours, theirs = Ours(log_barrier, params, **options), Theirs(log_barrier, params, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.params["x"], theirs.params["x"].detach(), rtol=1e-9, atol=0, equal_nan=True)
        assert ours.state.n_iter == theirs.state["n_iter"]
        assert ours.state.func_evals == theirs.state["func_evals"]
    assert ours.state.prev_loss.isnan()


def test_the_history_is_torchs():
    ours, theirs = (kind(rosenbrock, make(rosenbrock), max_iter=3, lr=0.02, history_size=4) for kind in (Ours, Theirs))
    for _ in range(4):
        ours.step()
        theirs.step()
        count = len(theirs.state["ro"])
        assert count > 0
        for name in ("old_dirs", "old_stps", "ro"):
            rows = getattr(ours.state, name)
            torch.testing.assert_close(rows[4 - count :], torch.stack(theirs.state[name]), rtol=1e-9, atol=1e-12)
            assert not rows[: 4 - count].any()
    assert count == 4


# Line search. ---------------------------------------------------------------------------------------------------------


def search(function, t, max_ls, tolerance_change=1e-9):
    """Search along a function of one number, by `begin` and `advance`."""
    evaluate = torch.func.grad_and_value(function)
    zero, one = torch.zeros((), **DOUBLE), torch.ones((), **DOUBLE)
    gtd, f = evaluate(zero)

    def turn(state):
        gtd_new, f_new = evaluate(state.t)
        new = Point(state.t, f_new, gtd_new[None], gtd_new)
        return line_search.advance(state, new, f, gtd[None], one, state.trials >= max_ls, tolerance_change)

    state = while_loop(lambda s: ~s.done, turn, line_search.begin(f, gtd[None], gtd, t), max_ls + 1)
    return state.low.t, state.low.f, state.low.g, state.trials


def torch_search(function, t, max_ls, tolerance_change=1e-9):
    evaluate = torch.func.grad_and_value(function)
    gtd, f = evaluate(torch.zeros((), **DOUBLE))

    def on_the_line(x, t, d):
        gtd, f = evaluate(torch.as_tensor(t, **DOUBLE))
        return f.item(), gtd[None]

    one = torch.ones(1, **DOUBLE)
    f, g, t, evaluations = _strong_wolfe(
        on_the_line, None, t, one, f.item(), gtd[None], gtd, max_ls=max_ls, tolerance_change=tolerance_change
    )
    return (*[torch.as_tensor(value, **DOUBLE) for value in (t, f, g)], torch.as_tensor(evaluations))


def bumpy(weights, digits):
    """Make a function that falls at first and then does all sorts of things; rounded losses make ties."""

    def function(t):
        waves = torch.arange(1, len(weights) + 1, **DOUBLE)
        f = -0.5 * t + (weights * (waves * t).sin()).sum() + 0.05 * t * t
        f = f - (weights * waves).sum() * t
        return f + (f.round(decimals=digits) - f).detach()

    return function


def kinked(slope, place):
    return lambda t: -0.01 * t + torch.nn.functional.softplus(50 * slope * (t - place)) * (1 + place)


def steep(slope, place):
    return lambda t: -t + torch.exp(slope * (t - place))


def test_the_line_search_is_torchs_on_all_kinds_of_functions():
    evaluations = set()
    for seed in range(150):
        torch.manual_seed(seed)
        slope, place, size = torch.rand(3, **DOUBLE)
        t = 10 ** (5 * size - 2)
        functions = [
            bumpy(torch.randn(3, **DOUBLE).abs() * 0.3, digits=(0, 1, 12)[seed % 3]),
            kinked(10 * slope, 0.1 + 3 * place),
            steep(10 * slope, 0.1 + 3 * place),
        ]
        for function in functions:
            for max_ls in (25, seed % 6):
                ours, theirs = search(function, t, max_ls), torch_search(function, t, max_ls)
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
                evaluations.add(int(ours[3]))
    assert evaluations >= set(range(1, 20))


def test_masked_line_searches_are_the_same():
    torch.manual_seed(0)
    weights, t = torch.randn(200, 3, **DOUBLE).abs() * 0.3, torch.rand(200, **DOUBLE) * 3
    batched = torch.vmap(lambda w, t: search(bumpy(w, 1), t, 10))(weights, t)
    each = [search(bumpy(w, 1), first, 10) for w, first in zip(weights, t, strict=True)]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*each, strict=True))), rtol=1e-12, atol=1e-12)
    assert len(batched[3].unique()) > 4


def test_a_straight_line_is_followed_as_torch_does_with_a_finite_derivative():
    slope = torch.tensor(-0.25, **DOUBLE)
    one = torch.ones((), **DOUBLE)
    torch.testing.assert_close(search(lambda t: slope * t, one, 3), torch_search(lambda t: slope * t, one, 3))
    for derivative in (torch.func.grad, torch.func.jacfwd):
        # t = 10^3 at the end, whatever the slope; proportional to the first trial.
        assert derivative(lambda slope: search(lambda t: slope * t, one, 3)[0])(slope) == 0
        assert derivative(lambda t: search(lambda t: slope * t, t, 3)[0])(one) == 1000


# Batches and compilation. ---------------------------------------------------------------------------------------------


def train(params, options, problem=rosenbrock, updates=2, state=None):
    tx = lbfgs(**options)
    state = tx.init(params) if state is None else state
    for _ in range(updates):
        grads, value = torch.func.grad_and_value(problem)(params)
        changes, state = tx.update(grads, state, params, value_fn=problem, value=value)
        params = fo.apply_updates(params, changes)
    return params, state


FEW = [
    {"max_iter": 5, "lr": 0.02, "history_size": 3},
    {"max_iter": 6, "history_size": 2, **WOLFE},
    {"max_iter": 6, "max_eval": 4, "lr": 10.0, "history_size": 20, **WOLFE},
]
few = pytest.mark.parametrize("options", FEW, ids=["fixed", "wolfe", "few-evaluations"])


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


@pytest.mark.parametrize(
    "options",
    [{"max_iter": 3, "lr": 0.02, "history_size": 2}, {"max_iter": 2, "max_eval": 3, "history_size": 1, **WOLFE}],
    ids=["fixed", "wolfe"],
)
def test_compiles_whole(options):
    def step(params, state):
        return train(params, options, updates=1, state=state)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
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


# Purity, states and trees. --------------------------------------------------------------------------------------------


@few
def test_modifies_no_argument_and_keeps_structure(options):
    params = make(network)
    tx = lbfgs(**options)
    state = tx.init(params)
    for _ in range(4):
        grads, value = torch.func.grad_and_value(network)(params)
        given = leaves_of((params, grads, state, value))
        before = [(leaf.clone(), leaf._version) for leaf in given]
        updates, new_state = tx.update(grads, state, params, value_fn=network, value=value)
        for leaf, (content, version) in zip(given, before, strict=True):
            assert leaf._version == version
            assert torch.equal(leaf, content)
        for old, new in ((params, updates), (state, new_state)):
            assert fo.tree.flatten(old)[1] == fo.tree.flatten(new)[1]
            assert [(a.shape, a.dtype) for a in leaves_of(old)] == [(a.shape, a.dtype) for a in leaves_of(new)]
        params, state = fo.apply_updates(params, updates), new_state


@few
def test_a_saved_state_goes_on_with_the_same_numbers(options):
    params, state = train(make(rosenbrock), options)
    buffer = io.BytesIO()
    torch.save(fo.state_dict(state), buffer)
    buffer.seek(0)
    loaded = fo.load_state_dict(lbfgs(**options).init(params), torch.load(buffer, weights_only=True))
    expected, result = (train(params, options, state=s) for s in (state, loaded))
    assert all(torch.equal(a, b) for a, b in zip(leaves_of(expected), leaves_of(result), strict=True))
    assert isinstance(pickle.loads(pickle.dumps(state)), LBFGSState)


def test_prints_and_pickles():
    tx = lbfgs(0.5, line_search_fn="strong_wolfe")
    assert repr(tx) == repr(pickle.loads(pickle.dumps(tx))) == "lbfgs(0.5, line_search_fn='strong_wolfe')"


@pytest.mark.parametrize("options", [{"max_iter": 3, "lr": 0.02, "history_size": 5}, {"max_iter": 3, **WOLFE}])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_goes_on_from_torchs_state_and_torch_from_ours(options, steps):
    params, size = make(rosenbrock), options.get("history_size", 100)
    core, theirs = Core(rosenbrock, params, **options), Theirs(rosenbrock, params, **options)
    for _ in range(steps):
        core.step()
        theirs.step()

    ours = Core(rosenbrock, theirs.params, **options)
    ours.x, ours.state = ours.x.detach(), from_torch(theirs.state, ours.x.detach())
    functional = Ours(rosenbrock, fo.tree.map(torch.Tensor.detach, theirs.params), **options)
    functional.params = fo.tree.map(torch.clone, functional.params)
    functional.state = pack(torch.tensor(steps), from_torch(theirs.state, ours.x), functional.state)

    again = Theirs(rosenbrock, {"x": core.x}, **options)
    again.optimizer.state[again.leaves[0]].update(to_torch(core.state, size))
    memories = leaves_of((ours.state, core.state))
    before = [leaf.clone() for leaf in memories]
    theirs.step(), again.step(), ours.step(), functional.step()
    assert all(torch.equal(leaf, old) for leaf, old in zip(memories, before, strict=True))  # torch's are its own

    saved = again.optimizer.state_dict()
    again = Theirs(rosenbrock, {"x": again.leaves[0].detach()}, **options)
    again.optimizer.load_state_dict(saved)
    for _ in range(3):
        for side in (ours, functional, theirs, again):
            side.step()
        assert deviation(ours, theirs) < 1e-13
        assert deviation(functional, theirs) < 1e-11
        assert deviation(ours, again) < 1e-13
    assert set(to_torch(ours.state, size)) == set(theirs.state)


def test_memories_survive_packing_exactly():
    core = Core(rosenbrock, make(rosenbrock), max_iter=3)
    state = lbfgs().init(make(rosenbrock))
    for _ in range(3):
        core.step()
        state = pack(state.step + 1, core.state, state)
        again = unpack(state, 20)
        pairs = zip(leaves_of(tuple(core.state)), leaves_of(tuple(again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_is_evaluated_as_often_as_torch_does_and_the_first_time_only_without_a_value():
    calls = []

    def counted(params):
        calls.append(1)
        return rosenbrock(params)

    params = make(rosenbrock)
    grads, value = torch.func.grad_and_value(rosenbrock)(params)
    for options in FEW:
        tx = lbfgs(**options)
        results = []
        for extra, more in (({"value": value}, -1), ({}, 0)):
            calls.clear()
            updates, state = tx.update(grads, tx.init(params), params, value_fn=counted, **extra)
            assert len(calls) == int(state.func_evals) + more
            results.append(updates["x"])
        assert torch.equal(*results)


def test_parameters_without_gradient_stay_and_none_is_nothing():
    def problem(params):
        return rosenbrock({"x": torch.stack([params["a"], params["fixed"], params["b"]])})

    params = {name: torch.tensor(value, **DOUBLE) for name, value in (("a", 0.3), ("fixed", 0.7), ("b", -0.5))}
    fixed = params["fixed"]
    theirs = Theirs(lambda p: problem({**p, "fixed": fixed}), {"a": params["a"], "b": params["b"]}, **WOLFE)
    tx = lbfgs(**WOLFE)
    params["none"] = None
    state = tx.init(params)
    for _ in range(2):
        grads = {**torch.func.grad(problem)({k: v for k, v in params.items() if v is not None}), "fixed": None}
        updates, state = tx.update({**grads, "none": None}, state, params, value_fn=problem)
        assert updates["fixed"] is None
        assert updates["none"] is None
        params = fo.apply_updates(params, updates)
        theirs.step()
    assert params["fixed"] == 0.7
    for name in ("a", "b"):
        torch.testing.assert_close(params[name], theirs.params[name].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("params", [{}, {"x": None}, {"x": torch.zeros(0, 3)}])
@few
def test_without_elements_nothing_happens(params, options):
    tx = lbfgs(**options)
    updates, state = tx.update(params, tx.init(params), params, value_fn=lambda params: torch.zeros(()))
    assert fo.tree.flatten(updates)[1] == fo.tree.flatten(params)[1]
    assert (int(state.step), int(state.n_iter)) == (1, 0)


def test_learning_rates_are_numbers_tensors_or_schedules():
    params = make(rosenbrock)

    def trained(lr, updates=2):
        return train(params, {"lr": lr, "max_iter": 3}, updates=updates)[0]["x"]

    assert torch.equal(trained(0.02), trained(torch.tensor(0.02, **DOUBLE)))
    assert torch.equal(trained(0.02), trained(lambda count: 0.02))
    assert torch.equal(trained(lambda count: 0.02 / (1 + count), updates=1), trained(0.02, updates=1))
    assert not torch.allclose(trained(lambda count: 0.02 / (1 + count)), trained(0.02))


def test_chains_with_others():
    params = make(rosenbrock)
    grads, value = torch.func.grad_and_value(rosenbrock)(params)
    alone, half = lbfgs(**WOLFE), fo.chain(lbfgs(**WOLFE), fo.scale(0.5))
    expected, _ = alone.update(grads, alone.init(params), params, value_fn=rosenbrock, value=value)
    updates, state = half.update(grads, half.init(params), params, value_fn=rosenbrock, value=value)
    assert torch.equal(updates["x"], 0.5 * expected["x"])
    assert isinstance(state[0], LBFGSState)


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0; it needs value >= 0"),
        ({"lr": "fast"}, TypeError, r"Invalid learning rate: 'fast' is a str"),
        ({"max_iter": 0}, ValueError, r"Invalid max_iter: 0; it needs an integer >= 1"),
        ({"max_iter": 2.0}, TypeError, r"Invalid max_iter: 2\.0 is a float; give an integer >= 1"),
        ({"max_iter": True}, TypeError, r"Invalid max_iter: True is a bool"),
        ({"max_eval": 0}, ValueError, r"Invalid max_eval: 0; it needs an integer >= 1"),
        ({"history_size": 0}, ValueError, r"Invalid history_size: 0; it needs an integer >= 1"),
        ({"history_size": None}, TypeError, r"Invalid history_size: None is a NoneType; give an integer >= 1"),
        ({"tolerance_grad": -1e-3}, ValueError, r"Invalid tolerance_grad: -0\.001; it needs value >= 0"),
        ({"tolerance_change": torch.ones(())}, TypeError, r"Invalid tolerance_change: tensor\(1\.\) is a Tensor"),
        ({"line_search_fn": "armijo"}, ValueError, r"Invalid line_search_fn: 'armijo'; only 'strong_wolfe' is supp"),
    ],
)
def test_bad_hyperparameters_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        lbfgs(**options)


def test_bad_calls_are_errors():
    params = {"x": torch.ones(3)}
    tx = lbfgs()
    state = tx.init(params)
    with pytest.raises(TypeError, match="lbfgs needs the extra 'value_fn'"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="lbfgs needs the parameters, but update was called without them"):
        tx.update(params, state, value_fn=rosenbrock)
    with pytest.raises(TypeError, match=r"value_fn must be a function, loss = value_fn\(params\), got a Tensor"):
        tx.update(params, state, params, value_fn=torch.ones(()))
    with pytest.raises(ValueError, match=r"value_fn must return a loss, a 0-dim tensor, got one of shape \(3,\)"):
        tx.update(params, state, params, value_fn=lambda params: params["x"])
    with pytest.raises(TypeError, match="value_fn must return a loss, a 0-dim tensor, got a tuple"):
        tx.update(params, state, params, value_fn=lambda params: (rosenbrock(params), None))
    with pytest.raises(TypeError, match="value must be a loss, a 0-dim tensor, got a float"):
        tx.update(params, state, params, value_fn=rosenbrock, value=1.0)
    with pytest.raises(ValueError, match="The state of lbfgs is a tuple: it belongs to another transformation"):
        tx.update(params, (), params, value_fn=rosenbrock)
    with pytest.raises(ValueError, match=r"a history of shape \(100, 3\) and dtype torch.float32, but .* \(7, 3\)"):
        lbfgs(history_size=7).update(params, state, params, value_fn=rosenbrock)
    larger = {"x": torch.ones(4)}
    with pytest.raises(ValueError, match=r"make it \(100, 4\) and torch.float32: it belongs to other parameters"):
        tx.update(larger, state, larger, value_fn=rosenbrock)


# Control. -------------------------------------------------------------------------------------------------------------


def test_known_conditions_run_one_branch_and_unknown_ones_both():
    ran = []

    def branch(name, result):
        def run(x):
            ran.append(name)
            return x + result

        return run

    def both(x):
        return cond(x > 0, branch("true", 1.0), branch("false", -1.0), x)

    assert both(torch.tensor(2.0)) == 3
    assert ran == ["true"]
    torch.func.grad(both)(torch.tensor(-2.0))
    assert ran == ["true", "false"]
    assert torch.vmap(both)(torch.tensor([2.0, -2.0])).tolist() == [3.0, -3.0]
    assert ran == ["true", "false", "true", "false"]


def test_loops_end_early_where_they_can_with_the_same_numbers():
    turns = []

    def halve(x):
        def body(carry):
            turns.append(1)
            return carry[0] / 2, (carry[1][0] + 1,)

        return while_loop(lambda carry: carry[0] > 1, body, (x, (torch.zeros(()),)), 10)

    x = torch.tensor([5.0, 0.5, 8.0])
    each = [halve(row) for row in x]
    assert len(turns) == 6
    batched = torch.vmap(halve)(x)
    assert len(turns) == 6 + 10
    compiled = torch.compile(torch.vmap(halve), fullgraph=True, backend="eager")(x)
    for result in (batched, compiled):
        assert torch.equal(result[0], torch.stack([row for row, _ in each]))
        assert result[1][0].tolist() == [3.0, 0.0, 3.0]
    assert torch.func.jacfwd(lambda x: halve(x)[0])(x[0]) == torch.func.grad(lambda x: halve(x)[0])(x[0]) == 0.125


def test_select_keeps_types_and_leaves_what_is_the_same():
    a, b = torch.ones(2), torch.zeros(2)
    point = Point(a, a, a, a)
    assert select(True, point, None) is point
    picked = torch.vmap(lambda c: select(c, point, point._replace(f=b)))(torch.tensor([True, False]))
    assert type(picked) is Point
    assert picked.f.tolist() == [[1.0, 1.0], [0.0, 0.0]]
