"""Sharpness-aware minimization: the numbers of its papers, in both forms; a second evaluation leaves no trace."""

import numpy as np
import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo

LR, RHO = 0.2, 0.3
X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def loss(params, x=X):
    return (x @ params["weight"] + params["bias"]).sin().square().mean()


def start():
    weight = torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    return {"weight": weight, "bias": torch.tensor([0.1], dtype=torch.float64)}


def gradient(params, x):
    """The gradient in numpy."""
    z = x @ params["weight"] + params["bias"]
    by_z = 2 * np.sin(z) * np.cos(z) / len(z)
    return {"weight": x.T @ by_z, "bias": by_z.sum(keepdims=True)}


def by_formula(batches, size=lambda name, p: 1.0, rho=RHO, every=1):
    """SAM with momentum, in numpy; `size` is T."""
    params = {name: p.numpy().copy() for name, p in start().items()}
    buffers = {name: np.zeros_like(p) for name, p in params.items()}
    total = {name: np.zeros_like(p) for name, p in params.items()}
    for k, x in enumerate(batches, 1):
        grads = gradient(params, x.numpy())
        sizes = {name: size(name, p) for name, p in params.items()}
        norm = np.sqrt(sum(((sizes[name] * g) ** 2).sum() for name, g in grads.items())) + 1e-12
        there = {name: p + rho * sizes[name] ** 2 * grads[name] / norm for name, p in params.items()}
        again = gradient(there, x.numpy())
        total = {name: total[name] + again[name] / every for name in params}
        if k % every == 0:
            buffers = {name: 0.9 * buffers[name] + total[name] for name in params}
            params = {name: p - LR * buffers[name] for name, p in params.items()}
            total = {name: np.zeros_like(p) for name, p in params.items()}
    return {name: torch.from_numpy(p) for name, p in params.items()}


def base():
    return fo.sgd(LR, momentum=0.9)


def pure(tx, batches=(X,) * 4, by="grad_fn", take=fo.step):
    params = start()
    state = tx.init(params)
    for x in batches:
        value_fn = lambda params, x=x: loss(params, x)
        extra = {by: torch.func.grad(value_fn) if by == "grad_fn" else value_fn}
        params, state = take(tx, torch.func.grad(value_fn)(params), state, params, **extra)
    return params


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(p) for p in start().values())

    def forward(self, x):
        return loss(dict(self.named_parameters()), x)


def closure_of(model, opt, x=X):
    def closure():
        opt.zero_grad()
        value = model(x)
        value.backward()
        return value

    return closure


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters()}


KINDS = {
    "sam": ({}, lambda name, p: 1.0),
    "adaptive": ({"adaptive": True}, lambda name, p: np.abs(p)),
    "adaptive_eta": ({"adaptive": True, "eta": 0.01}, lambda name, p: np.abs(p) + 0.01),
    "asam": (
        {"adaptive": {"weight": True, "bias": False}, "eta": 0.01},
        lambda name, p: np.abs(p) + 0.01 if name == "weight" else 1.0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_the_formulas(kind):
    options, size = KINDS[kind]
    tx, expected = fo.sam(base(), RHO, **options), by_formula([X] * 4, size)
    for by in ("grad_fn", "value_fn"):
        assert_close(pure(tx, by=by), expected)
    assert_close(pure(tx, take=fo.step_), expected)
    model = Model()
    opt = fo.Optimizer(model.named_parameters(), tx)
    for _ in range(4):
        before = loss(trained(model))
        assert_close(opt.step(closure_of(model, opt)).detach(), before)
    assert_close(trained(model), expected)
    assert not torch.allclose(by_formula([X] * 4, rho=0.0)["weight"], expected["weight"], rtol=1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_numbers_are_those_of_pytorch_optimizer(adaptive):
    peers = pytest.importorskip("pytorch_optimizer")
    ours, theirs = Model(), Model()
    tx = fo.sam(fo.adamw, RHO, adaptive=adaptive)
    opt = fo.Optimizer(ours.parameters(), tx, lr=0.1)
    peer = peers.SAM(theirs.parameters(), torch.optim.AdamW, rho=RHO, adaptive=adaptive, lr=0.1)
    for _ in range(5):
        opt.step(closure_of(ours, opt))
        closure = closure_of(theirs, peer)
        closure()
        peer.step(closure)
    assert_close(trained(ours), trained(theirs), rtol=1e-6, atol=1e-7)  # whose norm is in float32


def test_a_scheduler_drives_the_base():
    model = Model()
    opt = fo.Optimizer([{"params": [model.weight]}, {"params": [model.bias]}], fo.sam(base(), RHO))
    assert opt.param_groups[0]["lr"] == LR
    model = Model()
    opt = fo.Optimizer(model.parameters(), fo.sam(fo.sgd, RHO), lr=1.0)
    torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    opt.param_groups[0]["lr"] = 0.0
    opt.step(closure_of(model, opt))
    assert_close(trained(model), start(), rtol=0, atol=0)


def test_mini_batches_each_have_their_own_second_gradient():
    batches = X.split(3) + X.flip(0).split(3)
    tx = fo.sam(fo.accumulate(base(), 2), RHO)
    expected = by_formula(batches, every=2)
    assert_close(pure(tx, batches), expected)
    model = Model()
    opt = fo.Optimizer(model.parameters(), tx)
    for x in batches:
        opt.step(closure_of(model, opt, x))
    assert_close(trained(model), expected)


def test_inside_of_accumulation_nothing_is_evaluated_between_steps():
    calls = []
    tx, params = fo.accumulate(fo.sam(base(), RHO), 2), start()
    state = tx.init(params)
    for k in range(4):
        grads = torch.func.grad(loss)(params)
        params, state = fo.step(tx, grads, state, params, grad_fn=lambda p: calls.append(k) or torch.func.grad(loss)(p))
    assert calls == [1, 3]
    assert_close(params, by_formula([X] * 2))


@pytest.mark.parametrize("kind", ["sam", "adaptive_eta"])
def test_derivatives_by_all_numbers(kind):
    options = dict(KINDS[kind][0])

    def after(numbers):
        given = {**options, **({"eta": numbers[2]} if "eta" in options else {})}
        return loss(pure(fo.sam(fo.sgd(numbers[0]), numbers[1], **given), by="value_fn"))

    numbers, h = torch.tensor([0.2, 0.3, 0.01], dtype=torch.float64), 1e-6
    steps = h * torch.eye(3, dtype=torch.float64)
    expected = torch.stack([(after(numbers + step) - after(numbers - step)) / (2 * h) for step in steps])
    assert_close(torch.func.grad(after)(numbers), expected, rtol=1e-6, atol=1e-9)
    assert bool(expected[: 3 if "eta" in options else 2].all())


def test_where_the_gradient_is_zero_nothing_moves_and_derivatives_are_finite():
    params = torch.zeros(2, dtype=torch.float64)

    def after(params, rho):
        tx = fo.sam(fo.sgd(0.1), rho)
        square = lambda p: p.square().sum()
        return fo.step(tx, torch.func.grad(square)(params), tx.init(params), params, value_fn=square)[0]

    rho = torch.tensor(RHO, dtype=torch.float64)
    assert_close(after(params, rho), params)
    by_params, by_rho = torch.func.jacrev(after, (0, 1))(params, rho)
    assert_close(by_params, 0.8 * torch.eye(2, dtype=torch.float64))
    assert_close(by_rho, params)


def test_the_radius_may_be_a_schedule():
    tx = fo.sam(base(), fo.schedules.piecewise_constant([RHO, 0.0], [4]))
    assert_close(pure(tx), by_formula([X] * 4))


# Side effects of the second evaluation. -------------------------------------------------------------------------------


class WithStatistics(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.calls = self.calls + 1  # another tensor each time
        return self.layers(x).square().mean()


@pytest.mark.parametrize("wrap", [lambda model: model, "compiled"], ids=["plain", "compiled"])
def test_statistics_are_those_of_the_first_evaluation(wrap):
    model, once = WithStatistics(), WithStatistics()
    call = torch.compile(model, backend="eager", fullgraph=True) if wrap == "compiled" else model
    opt = fo.Optimizer(model.parameters(), fo.sam(fo.sgd, 0.5), lr=0.1)
    evaluations = []

    def closure():
        evaluations.append(1)
        opt.zero_grad()
        value = call(X.float())
        value.backward()
        return value

    once(X.float())
    opt.step(closure)
    assert len(evaluations) == 2
    assert_close(dict(model.named_buffers()), dict(once.named_buffers()), rtol=1e-6, atol=1e-7)
    assert float(model.calls) == 1
    assert not torch.nn.modules.module._has_any_global_hook()
    closure()
    assert float(model.calls) == 2  # of other evaluations they count


def test_statistics_are_put_back_where_the_second_evaluation_raises():
    model, calls = WithStatistics(), []
    opt = fo.Optimizer(model.parameters(), fo.sam(fo.sgd, 0.5), lr=0.1)

    def closure():
        calls.append(1)
        opt.zero_grad()
        value = model(X.float())
        if len(calls) == 2:
            raise ArithmeticError("second")
        value.backward()
        return value

    with pytest.raises(ArithmeticError, match="second"):
        opt.step(closure)
    assert int(model.layers[1].num_batches_tracked) == 1
    assert not torch.nn.modules.module._has_any_global_hook()


@pytest.mark.parametrize("overflows", [False, True])
def test_with_a_gradient_scaler(overflows):
    """The gradient at p is scaled, looked at, and scaled back by torch; the other one is the user's function."""
    model, scaler = Model(), torch.amp.GradScaler("cpu", init_scale=4.0)
    opt = fo.Optimizer(model.named_parameters(), fo.sam(base(), RHO))

    def grad_fn(params):
        return torch.func.grad(lambda params: torch.func.functional_call(model, params, (X,)))(params)

    for _ in range(4):
        opt.zero_grad()
        scaler.scale(model(X)).backward()
        if overflows:
            model.bias.grad.fill_(torch.inf)
        scaler.unscale_(opt)
        scaler.step(opt, grad_fn=grad_fn)
        scaler.update()
    assert_close(trained(model), start() if overflows else by_formula([X] * 4))


@pytest.mark.parametrize("where", ["first", "second"])
def test_a_gradient_that_is_not_finite_is_left_out(where):
    params = start()
    tx = fo.sam(fo.apply_if_finite(base()), RHO)
    grads = torch.func.grad(loss)(params)
    bad = fo.tree.map(lambda g: g * torch.nan, grads)
    given, grad_fn = (bad, torch.func.grad(loss)) if where == "first" else (grads, lambda params: bad)
    found, state = fo.step(tx, given, tx.init(params), params, grad_fn=grad_fn)
    assert_close(found, params, rtol=0, atol=0)
    assert state[1][0].total_notfinite == 1


def test_the_function_is_needed():
    params = start()
    tx = fo.sam(base())
    grads = torch.func.grad(loss)(params)
    with pytest.raises(TypeError, match=r"sam needs the gradient, or the loss, as a function of the parameters; call"):
        fo.step(tx, grads, tx.init(params), params)
    with pytest.raises(ValueError, match="sam needs the parameters, but update was called without them"):
        tx.update(grads, tx.init(params), grad_fn=torch.func.grad(loss))
    model = Model()
    opt = fo.Optimizer(model.parameters(), tx)
    model(X).backward()
    with pytest.raises(TypeError, match=r"or opt.step\(closure\)"):
        opt.step()
    assert_close(trained(model), start(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Invalid rho: -1.0; it needs value >= 0"):
        fo.sam(base(), -1.0)
