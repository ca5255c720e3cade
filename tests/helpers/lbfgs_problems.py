"""Problems for L-BFGS, and training on them with torch's and with ours."""

import pytest
import torch

import functorch_optim as fo
from functorch_optim.optimizers._limited_memory import Settings, minimize, new_memory
from functorch_optim.optimizers.lbfgs import lbfgs

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


def train(params, options, problem=rosenbrock, updates=2, state=None):
    tx = lbfgs(**options)
    state = tx.init(params) if state is None else state
    for _ in range(updates):
        grads, value = torch.func.grad_and_value(problem)(params)
        changes, state = tx.update(grads, state, params, value_fn=problem, value=value)
        params = fo.apply_updates(params, changes)
    return params, state


# Options. -------------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    WOLFE,
    {"lr": 0.1, "max_iter": 1},
    {"max_iter": 1, "max_eval": 1, **WOLFE},  # 1.25 max_iter of torch's, and binding
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

FEW = [
    {"max_iter": 5, "lr": 0.02, "history_size": 3},
    {"max_iter": 6, "history_size": 2, **WOLFE},
    {"max_iter": 6, "max_eval": 4, "lr": 10.0, "history_size": 20, **WOLFE},
]
few = pytest.mark.parametrize("options", FEW, ids=["fixed", "wolfe", "few-evaluations"])


# The class, and torch's. ----------------------------------------------------------------------------------------------


def bowl(params):
    """A convex loss of any tensors."""
    x = torch.cat([(torch.view_as_real(p) if p.is_complex() else p).reshape(-1) for p in params])
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scale = torch.linspace(1, 30, x.numel(), dtype=x.dtype)
    return (scale * x * x + 0.1 * x**4 - x).sum() + 0.5 * (x[1:] * x[:-1]).sum()


class Training:
    """An optimizer of a class, and its closure."""

    def __init__(self, kind, params, loss=bowl, **options):
        self.params = [torch.nn.Parameter(p.detach().clone()) for p in params]
        self.optimizer = kind(self.params, **options)
        self.loss, self.calls = loss, []

    @property
    def state(self):
        return self.optimizer.state[self.params[0]]

    def closure(self):
        self.calls.append(torch.is_grad_enabled())
        self.optimizer.zero_grad()
        loss = self.loss(self.params)
        loss.backward()
        return loss

    def step(self):
        return self.optimizer.step(self.closure)


def make_pair(params, loss=bowl, **options):
    """Make ours and torch's."""
    return [Training(module.LBFGS, params, loss, **options) for module in (fo.optim, torch.optim)]


def assert_same(ours, theirs, tolerance=1e-12):
    """Compare parameters, what was called, and states: keys, types, shapes, dtypes, numbers."""
    assert deviation(ours, theirs) < tolerance
    assert len(ours.calls) == len(theirs.calls)
    mine, torchs = [
        {key: value for key, value in some.state.items() if key != "al" and value is not None}
        for some in (ours, theirs)
    ]
    assert set(mine) == set(torchs)
    for key, expected in torchs.items():
        value = mine[key]
        if key in ("func_evals", "n_iter"):
            assert (type(value), value) == (int, expected)
        elif key in ("t", "prev_loss", "H_diag"):  # torch has a number at times, and at times a 0-dim tensor
            torch.testing.assert_close(float(value), float(expected), rtol=1e4 * tolerance, atol=1e4 * tolerance)
        else:
            assert type(value) is type(expected)
            torch.testing.assert_close(value, expected, rtol=1e4 * tolerance, atol=1e4 * tolerance)
