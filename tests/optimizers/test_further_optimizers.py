"""Optimizers that torch.optim has not, against their papers' formulas in numpy, and against independent packages."""

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import functorch_optim as fo

SHAPES = [(4, 3), (3,), (), (2, 3, 2)]
STEPS = 12


class Run(NamedTuple):
    """What optimizers are run on: parameters, and for each step gradients and a loss."""

    params: list[Any]
    grads: list[list[Any]]
    losses: list[float]


def make_run(zeros=0, seed=0, shapes=SHAPES):
    """Make parameters and gradients of several magnitudes, the first steps zero if asked for."""
    random = np.random.default_rng(seed)
    params = [random.normal(size=shape) for shape in shapes]
    grads = [[random.normal(size=shape) * 10 ** random.uniform(-1, 0.5) for shape in shapes] for _ in range(STEPS)]
    for step in range(zeros):
        grads[step] = [np.zeros(shape) for shape in shapes]
    return Run(params, grads, [float(2 * abs(random.normal()) + 0.1) for _ in range(STEPS)])


# The formulas: each takes a run and hyperparameters, and yields parameters after each step. ---------------------------


def dot(xs, ys):
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


def zeros_like(ps):
    return [np.zeros_like(p) for p in ps]


def prodigy(
    run,
    lr=1.0,
    betas=(0.9, 0.999),
    beta3=None,
    eps=1e-8,
    weight_decay=0.0,
    d0=1e-6,
    d_coef=1.0,
    growth_rate=math.inf,
    use_bias_correction=False,
    safeguard_warmup=False,
):
    x, (b1, b2), k = run.params, betas, 1
    b3 = math.sqrt(b2) if beta3 is None else beta3
    x0, s, m, v = x, zeros_like(x), zeros_like(x), zeros_like(x)
    d, d_max, r = d0, d0, 0.0
    for g in run.grads:
        bc = math.sqrt(1 - b2**k) / (1 - b1**k) if use_bias_correction else 1.0
        dlr = d * lr * bc
        new_r = b3 * r + d / d0 * dlr * dot(g, [a - b for a, b in zip(x0, x, strict=True)])
        m = [b1 * a + (1 - b1) * d * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * d**2 * b**2 for a, b in zip(v, g, strict=True)]
        s = [b3 * a + d / d0 * (d if safeguard_warmup else dlr) * b for a, b in zip(s, g, strict=True)]
        size = sum(float(np.abs(a).sum()) for a in s)
        if size > 0:
            r = new_r
            d_hat = d_coef * r / size
            if d == d0:
                d = max(d, d_hat)
            d_max = max(d_max, d_hat)
            d = min(d_max, d * growth_rate)
            x = [
                p * (1 - weight_decay * dlr) - dlr * a / (np.sqrt(b) + d * eps) for p, a, b in zip(x, m, v, strict=True)
            ]
            k += 1
        yield x


def dadapt_adam(
    run,
    lr=1.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    d0=1e-6,
    growth_rate=math.inf,
    use_bias_correction=False,
    decoupled_weight_decay=False,
):
    x, (b1, b2), k = run.params, betas, 1
    q = math.sqrt(b2)
    s, m, v = zeros_like(x), zeros_like(x), zeros_like(x)
    d, r = d0, 0.0
    for g in run.grads:
        if not decoupled_weight_decay:
            g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        bc = math.sqrt(1 - b2**k) / (1 - b1**k) if use_bias_correction else 1.0
        dlr = d * lr * bc
        acc = dlr * dot(g, [a / (np.sqrt(b) + eps) for a, b in zip(s, v, strict=True)])
        m = [b1 * a + (1 - b1) * dlr * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        s = [q * a + (1 - q) * dlr * b for a, b in zip(s, g, strict=True)]
        size = sum(float(np.abs(a).sum()) for a in s)
        if size > 0:
            r = q * r + (1 - q) * acc
            d = max(d, min(r / ((1 - q) * size), d * growth_rate))
            decay = weight_decay * dlr if decoupled_weight_decay else 0.0
            x = [p * (1 - decay) - a / (np.sqrt(b) + eps) for p, a, b in zip(x, m, v, strict=True)]
            k += 1
        yield x


def dadapt_sgd(run, lr=1.0, momentum=0.0, weight_decay=0.0, d0=1e-6, growth_rate=math.inf):
    x = x0 = run.params
    s, d, r, g0 = zeros_like(x), d0, 0.0, 0.0
    for g in run.grads:
        g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        g0 = math.sqrt(dot(g, g)) if g0 == 0 else g0
        if g0 > 0:
            dlr = d * lr / g0
            r += dlr * dot(g, s)
            s = [a + dlr * b for a, b in zip(s, g, strict=True)]
            d = max(d, min(2 * r / math.sqrt(dot(s, s)), d * growth_rate))
            x = [momentum * p + (1 - momentum) * (a - b) for p, a, b in zip(x, x0, s, strict=True)]
        yield x


def dog(run, lr=1.0, eps=1e-8, reps_rel=1e-6, weight_decay=0.0):
    x = x0 = run.params
    rbar, total = reps_rel * (1 + math.sqrt(dot(x0, x0))), 0.0
    for g in run.grads:
        g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        way = [a - b for a, b in zip(x, x0, strict=True)]
        rbar = max(rbar, math.sqrt(dot(way, way)))
        total += dot(g, g)
        x = [p - lr * rbar / math.sqrt(total + eps) * a for p, a in zip(x, g, strict=True)]
        yield x


def ldog(run, **numbers):
    each = [
        list(dog(Run([p], [[grads[i]] for grads in run.grads], run.losses), **numbers))
        for i, p in enumerate(run.params)
    ]
    for step in range(len(run.grads)):
        yield [column[step][0] for column in each]


def dowg(run, lr=1.0, eps=1e-4, d0_squared=1e-4, weight_decay=0.0):
    x = x0 = run.params
    r2, v = d0_squared, 0.0
    for g in run.grads:
        g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        way = [a - b for a, b in zip(x, x0, strict=True)]
        r2 = max(r2, dot(way, way))
        v += r2 * dot(g, g)
        x = [p - lr * r2 / (math.sqrt(v) + eps) * a for p, a in zip(x, g, strict=True)]
        yield x


def polyak(run, max_lr=1.0, variant="sps", f_min=0.0, c=1.0, eps=0.0):
    x = run.params
    for g, loss in zip(run.grads, run.losses, strict=True):
        gap = max(loss - f_min, 0.0) if variant == "sps+" else loss - f_min
        size = c * dot(g, g) + eps
        eta = min(max_lr, gap / size) if size else 0.0
        x = [p - eta * a for p, a in zip(x, g, strict=True)]
        yield x


def momo(run, lr=1.0, beta=0.9, weight_decay=0.0, lb=0.0):
    x = run.params
    m = f = q = None
    for g, loss in zip(run.grads, run.losses, strict=True):
        first = m is None
        m = g if first else [beta * a + (1 - beta) * b for a, b in zip(m, g, strict=True)]
        f = loss if first else beta * f + (1 - beta) * loss
        q = dot(g, x) if first else beta * q + (1 - beta) * dot(g, x)
        decay = 1 + lr * weight_decay
        h = decay * (f - lb) + dot(x, m) - decay * q
        size = dot(m, m)
        tau = min(lr, max(h, 0.0) / size) if size else 0.0
        x = [(p - tau * a) / decay for p, a in zip(x, m, strict=True)]
        yield x


def momo_adam(run, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, lb=0.0):
    x, (b1, b2) = run.params, betas
    m, v, f, q = zeros_like(x), zeros_like(x), 0.0, 0.0
    for t, (g, loss) in enumerate(zip(run.grads, run.losses, strict=True), 1):
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        f = b1 * f + (1 - b1) * loss
        q = b1 * q + (1 - b1) * dot(g, x)
        scale = [np.sqrt(a / (1 - b2**t)) + eps for a in v]
        decay = 1 + lr * weight_decay
        h = decay * (f - (1 - b1**t) * lb) + dot(x, m) - decay * q
        size = dot(m, [a / b for a, b in zip(m, scale, strict=True)])
        tau = min(lr / (1 - b1**t), max(h, 0.0) / size) if size else 0.0
        x = [(p - tau * a / b) / decay for p, a, b in zip(x, m, scale, strict=True)]
        yield x


def of_each(formula):
    """Make a formula for one parameter one for a list of them."""

    def of_list(run, **numbers):
        columns = zip(run.params, zip(*run.grads, strict=True), strict=True)
        yield from map(list, zip(*[formula(p, gs, **numbers) for p, gs in columns], strict=True))

    return of_list


@of_each
def cocob(p, grads, lr=1.0, alpha=100.0, eps=1e-8, weight_decay=0.0):
    p0, largest, total, reward, theta = p, np.full_like(p, eps), 0 * p, 0 * p, 0 * p
    for g in grads:
        g = g + weight_decay * p  # noqa: PLW2901
        largest = np.maximum(largest, abs(g))
        total = total + abs(g)
        reward = np.maximum(reward - g * (p - p0), 0)
        theta = theta - g
        new = p0 + theta / (largest * np.maximum(total + largest, alpha * largest)) * (largest + reward)
        p = p + lr * (new - p)
        yield p


@of_each
def madgrad(p, grads, lr=1e-2, momentum=0.9, weight_decay=0.0, eps=1e-6, decoupled_weight_decay=False):
    x0, s, v = p, 0 * p, 0 * p
    for t, g in enumerate(grads, 1):
        before = p
        if not decoupled_weight_decay:
            g = g + weight_decay * p  # noqa: PLW2901
        weight = (lr + eps) * math.sqrt(t)
        v = v + weight * g**2
        s = s + weight * g
        p = momentum * p + (1 - momentum) * (x0 - s / (np.cbrt(v) + eps))
        if decoupled_weight_decay:
            p = p - (lr + eps) * weight_decay * before
            x0 = x0 - (lr + eps) * weight_decay * before if momentum == 0 else x0
        yield p


@of_each
def novograd(p, grads, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False):
    m, v = 0 * p, None
    for g in grads:
        n = (g**2).sum()
        v = n if v is None else betas[1] * v + (1 - betas[1]) * n
        d = (g / (np.sqrt(v) + eps) if np.sqrt(v) + eps else 0 * g) + weight_decay * p
        m = betas[0] * m + (1 - betas[0] if grad_averaging else 1.0) * d
        p = p - lr * m
        yield p


@of_each
def sm3(p, grads, lr=0.1, momentum=0.9, eps=1e-8, weight_decay=0.0):
    dims = range(p.ndim)
    sums = [np.zeros([n if dim == i else 1 for dim, n in enumerate(p.shape)]) for i in dims] or [0 * p]
    m = 0 * p
    for g in grads:
        g = g + weight_decay * p  # noqa: PLW2901
        nu = np.minimum.reduce([np.broadcast_to(a, p.shape) for a in sums]) + g**2
        sums = [nu.max(axis=tuple(d for d in dims if d != i), keepdims=True) for i in dims] or [nu]
        w = np.where(nu == 0, 0, g / np.sqrt(np.where(nu == 0, 1, nu) + eps))
        m = momentum * m + (1 - momentum) * w
        p = p - lr * m
        yield p


def projected(w, g, p, eps, delta, wd_ratio):
    if p.ndim < 2:
        return w, 1.0
    for rows in (p.shape[0], 1):
        ps, gs, ws = [a.reshape(rows, -1) for a in (p, g, w)]
        length = np.linalg.norm(ps, axis=1, keepdims=True) + eps
        cosine = abs((gs * ps).sum(1, keepdims=True)) / (np.linalg.norm(gs, axis=1, keepdims=True) + eps) / length
        if cosine.max() < delta / math.sqrt(ps.shape[1]):
            unit = ps / length
            return (ws - unit * (unit * ws).sum(1, keepdims=True)).reshape(p.shape), wd_ratio
    return w, 1.0


@of_each
def adamp(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    delta=0.1,
    wd_ratio=0.1,
    nesterov=False,
):
    m, v, (b1, b2) = 0 * p, 0 * p, betas
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w = (b1 * m + (1 - b1) * g if nesterov else m) / (np.sqrt(v / (1 - b2**t)) + eps)
        w, ratio = projected(w, g, p, eps, delta, wd_ratio)
        p = p * (1 - lr * weight_decay * ratio) - lr / (1 - b1**t) * w
        yield p


@of_each
def sgdp(
    p,
    grads,
    lr=1e-3,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    eps=1e-8,
    delta=0.1,
    wd_ratio=0.1,
):
    b = 0 * p
    for g in grads:
        b = momentum * b + (1 - dampening) * g
        w, ratio = projected(g + momentum * b if nesterov else b, g, p, eps, delta, wd_ratio)
        p = p * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * w
        yield p


@of_each
def fromage(p, grads, lr=1e-2, min_norm=1e-6):
    for g in grads:
        size, length = [max(math.sqrt((a**2).sum()), min_norm) for a in (g, p)]
        p = (p - lr * g * length / size) / math.sqrt(1 + lr**2)
        yield p


# Running both. --------------------------------------------------------------------------------------------------------


def tensors(arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def declares_value(tx):
    return any("value" in link.rule.extras.names for link in tx._links)


def ours(name, run, **numbers):
    """Run the functional form."""
    tx, params = getattr(fo, name)(**numbers), tensors(run.params)
    state = tx.init(params)
    for grads, loss in zip(run.grads, run.losses, strict=True):
        extra = {"value": torch.tensor(loss, dtype=torch.float64)} if declares_value(tx) else {}
        params, state = fo.step(tx, tensors(grads), state, params, **extra)
        yield params


def stateful(name, run, **numbers):
    """Run the stateful form, with closures."""
    params = [torch.nn.Parameter(p) for p in tensors(run.params)]
    optimizer = fo.Optimizer(params, getattr(fo, name), **numbers)
    yield from steps_of(optimizer, params, run)


def steps_of(optimizer, params, run, **options):
    for grads, loss in zip(run.grads, run.losses, strict=True):

        def closure(grads=grads, loss=loss):
            for p, g in zip(params, tensors(grads), strict=True):
                p.grad = g.to(p.dtype)
            return torch.tensor(loss, dtype=torch.float64)

        optimizer.step(closure, **options)
        yield [p.detach().clone() for p in params]


def deviation(left, right):
    """Compare all steps, relative to the size of each parameter."""
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1.0)) for a, b in pairs
    )


class Case(NamedTuple):
    """An optimizer, its formula, and options of both."""

    name: str
    formula: Any
    numbers: dict[str, Any] = {}  # noqa: RUF012

    def __repr__(self):
        return "-".join([self.name, *map(str, self.numbers)])


FREE = {"d0": 1e-2}
CASES = [
    Case("prodigy", prodigy),
    Case("prodigy", prodigy, {**FREE, "weight_decay": 0.1, "lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}),
    Case("prodigy", prodigy, {**FREE, "use_bias_correction": True, "beta3": 0.7, "d_coef": 2.0}),
    Case("prodigy", prodigy, {**FREE, "safeguard_warmup": True, "growth_rate": 1.02, "lr": 0.3}),
    Case("prodigy", prodigy, {"d0": 1e-1, "betas": (0.0, 0.5), "d_coef": 0.5}),
    Case("dadapt_adam", dadapt_adam),
    Case("dadapt_adam", dadapt_adam, {**FREE, "weight_decay": 0.1, "betas": (0.8, 0.9), "growth_rate": 1.02}),
    Case(
        "dadapt_adam",
        dadapt_adam,
        {**FREE, "weight_decay": 0.1, "use_bias_correction": True, "decoupled_weight_decay": True},
    ),
    Case("dadapt_sgd", dadapt_sgd),
    Case("dadapt_sgd", dadapt_sgd, {**FREE, "momentum": 0.9, "weight_decay": 0.1, "growth_rate": 1.02, "lr": 0.5}),
    Case("dog", dog),
    Case("dog", dog, {"lr": 0.5, "eps": 0.1, "reps_rel": 0.1, "weight_decay": 0.1}),
    Case("ldog", ldog),
    Case("ldog", ldog, {"lr": 0.5, "eps": 0.1, "reps_rel": 0.1, "weight_decay": 0.1}),
    Case("dowg", dowg),
    Case("dowg", dowg, {"lr": 0.5, "eps": 0.1, "d0_squared": 0.1, "weight_decay": 0.1}),
    Case("polyak", polyak),
    Case("polyak", polyak, {"max_lr": 10.0, "f_min": 1.0, "c": 0.5, "eps": 0.1}),
    Case("polyak", polyak, {"max_lr": 10.0, "f_min": 1.0, "variant": "sps+"}),
    Case("momo", momo),
    Case("momo", momo, {"lr": 0.2, "beta": 0.5, "weight_decay": 0.1, "lb": 0.1}),
    Case("momo_adam", momo_adam),
    Case("momo_adam", momo_adam, {"lr": 0.2, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1, "lb": 0.1}),
    Case("cocob", cocob),
    Case("cocob", cocob, {"lr": 0.5, "alpha": 1.5, "eps": 0.1, "weight_decay": 0.1}),
    Case("madgrad", madgrad),
    Case("madgrad", madgrad, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "eps": 0.1}),
    Case("madgrad", madgrad, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("madgrad", madgrad, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("novograd", novograd),
    Case("novograd", novograd, {"lr": 0.1, "betas": (0.9, 0.5), "eps": 0.1, "weight_decay": 0.1}),
    Case("novograd", novograd, {"lr": 0.1, "grad_averaging": True}),
    Case("sm3", sm3),
    Case("sm3", sm3, {"lr": 0.5, "momentum": 0.5, "eps": 0.1, "weight_decay": 0.1}),
    Case("adamp", adamp),
    Case("adamp", adamp, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "delta": 1.0}),
    Case("adamp", adamp, {"lr": 0.1, "weight_decay": 0.1, "delta": 0.8, "wd_ratio": 0.5, "nesterov": True}),
    Case("sgdp", sgdp),
    Case("sgdp", sgdp, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "delta": 1.0}),
    Case("sgdp", sgdp, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "delta": 0.8, "nesterov": True}),
    Case("fromage", fromage),
    Case("fromage", fromage, {"lr": 0.5, "min_norm": 1.5}),
]
cases = pytest.mark.parametrize("case", CASES, ids=repr)


@cases
def test_every_step_is_that_of_the_formula(case):
    run = make_run()
    expected = list(case.formula(run, **case.numbers))
    assert deviation(ours(case.name, run, **case.numbers), expected) < 1e-12
    assert deviation(stateful(case.name, run, **case.numbers), expected) < 1e-12


@cases
def test_steps_without_gradients_are_those_of_the_formula(case):
    run = make_run(zeros=2)
    with np.errstate(all="raise", under="ignore"):
        expected = list(case.formula(run, **case.numbers))
    assert deviation(ours(case.name, run, **case.numbers), expected) < 1e-12


@cases
def test_the_comparison_with_the_formula_can_fail(case):
    run = make_run()
    rate = "max_lr" if case.name == "polyak" else "lr"
    changed = {"prodigy": {"d0": 0.3}, "polyak": {"f_min": 0.4}, "momo": {"lb": 0.5}, "momo_adam": {"lb": 5.0}}
    numbers = {**case.numbers, **changed.get(case.name, {rate: 0.7})}
    assert deviation(ours(case.name, run, **numbers), list(case.formula(run, **case.numbers))) > 1e-6


# Independent packages. ------------------------------------------------------------------------------------------------

PACKAGES = [
    ("prodigyopt", "Prodigy", "prodigy", {**FREE, "weight_decay": 0.1}, {}),
    ("prodigyopt", "Prodigy", "prodigy", {"use_bias_correction": True, "safeguard_warmup": True, "d_coef": 2.0}, {}),
    ("prodigyopt", "Prodigy", "prodigy", {**FREE, "growth_rate": 1.02, "betas": (0.8, 0.9), "beta3": 0.7}, {}),
    ("dadaptation", "DAdaptAdam", "dadapt_adam", {**FREE, "weight_decay": 0.1, "use_bias_correction": True}, {}),
    ("dadaptation", "DAdaptSGD", "dadapt_sgd", {**FREE, "momentum": 0.9}, {}),
    ("dog", "DoG", "dog", {"reps_rel": 0.1}, {}),
    ("dog", "LDoG", "ldog", {"reps_rel": 0.1}, {}),
    ("momo", "Momo", "momo", {"lr": 0.2, "weight_decay": 0.1}, {}),
    ("momo", "MomoAdam", "momo_adam", {"lr": 0.2, "weight_decay": 0.1}, {}),
    ("pytorch_optimizer", "MADGRAD", "madgrad", {"lr": 0.1, "weight_decay": 0.1}, {"weight_decouple": False}),
    # It adds eps before the correction, where the authors add it after: small enough not to matter.
    ("pytorch_optimizer", "AdamP", "adamp", {"lr": 0.1, "weight_decay": 0.1, "delta": 0.8, "eps": 1e-14}, {}),
    ("pytorch_optimizer", "SGDP", "sgdp", {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "delta": 0.8}, {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "cls", "name", "numbers", "options"), PACKAGES)
def test_every_step_is_that_of_an_independent_package(package, cls, name, numbers, options):
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    run = make_run(shapes=[(4, 3), (3,), (2, 3, 2)])
    params = [torch.nn.Parameter(p) for p in tensors(run.params)]
    with torch.enable_grad():
        theirs = list(steps_of(getattr(module, cls)(params, **numbers, **options), params, run))
    assert deviation(ours(name, run, **numbers), theirs) < 1e-6


# What numbers of the whole tree promise. ------------------------------------------------------------------------------

OF_TREE = {
    "prodigy": ["d", "d_max", "d_numerator", "k"],
    "dadapt_adam": ["d", "numerator_weighted", "k"],
    "dadapt_sgd": ["d", "numerator_weighted", "g0_norm"],
    "dog": ["rbar", "G"],
    "dowg": ["r2", "v"],
    "momo": ["loss_avg", "grad_dot_w"],
    "momo_adam": ["loss_avg", "grad_dot_w"],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OF_TREE)
def test_numbers_of_the_tree_are_kept_in_float64(name, dtype):
    run = make_run()
    tx, params = getattr(fo, name)(), tensors(run.params, dtype)
    state = tx.init(params)
    for grads, loss in zip(run.grads, run.losses, strict=True):
        extra = {"value": loss} if declares_value(tx) else {}
        params, state = fo.step(tx, tensors(grads, dtype), state, params, **extra)
    for number in OF_TREE[name]:
        found = fo.tree.get(state, number)
        assert found.dtype == torch.float64
        assert found.shape == ()
        assert bool(torch.isfinite(found))


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adam", "dog", "dowg"])
def test_a_parameter_whose_gradients_come_late_takes_the_numbers_of_the_tree(name):
    run = make_run()
    params = [torch.nn.Parameter(p) for p in tensors(run.params)]
    optimizer = fo.Optimizer(params, getattr(fo, name))
    number = OF_TREE[name][0]
    for step, grads in enumerate(run.grads):
        for i, (p, g) in enumerate(zip(params, tensors(grads), strict=True)):
            p.grad = None if i == 1 and (step < 3 or step == 7) else g
        optimizer.step()
        there = [optimizer.state[p][number] for i, p in enumerate(params) if p.grad is not None]
        assert all(torch.equal(value, there[0]) for value in there)


@pytest.mark.parametrize("name", OF_TREE)
def test_a_tree_of_values_that_numbers_of_the_tree_depend_on_is_an_error(name):
    tree_of_values = {"dog": "reps_rel", "dowg": "d0_squared"}.get(name, "lr")
    with pytest.raises(TypeError, match="one number is needed for all parameters"):
        getattr(fo, name)(**{tree_of_values: [0.1, 0.2]})


@pytest.mark.parametrize("name", ["polyak", "momo", "momo_adam"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(torch.ones(2), ValueError, "take the mean or sum"), ("low", TypeError, "value must be a loss, a 0-dim tensor")],
)
def test_a_value_that_is_no_loss_is_an_error(name, value, error, message):
    tx, params = getattr(fo, name)(), torch.ones(2)
    with pytest.raises(error, match=message):
        tx.update(torch.ones(2), tx.init(params), params, value=value)
    with pytest.raises(TypeError, match="needs the extra 'value'"):
        tx.update(torch.ones(2), tx.init(params), params)


@pytest.mark.parametrize("name", ["sm3", "adamp", "sgdp"])
def test_complex_parameters_are_refused(name):
    with pytest.raises(TypeError, match="does not support complex parameters"):
        getattr(fo, name)().init(torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["prodigy", "dadapt_sgd", "dog", "dowg"])
def test_sparse_gradients_are_refused(name):
    tx, params = getattr(fo, name)(), torch.ones(3, 2)
    sparse = torch.sparse_coo_tensor([[1]], [[5.0, 1.0]], (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        tx.update(sparse, tx.init(params), params)


def test_at_a_learning_rate_of_zero_prodigy_stands_still():
    tx = fo.prodigy(lambda count: (count > 0) * 1.0, d0=0.1)
    params = torch.ones(2, dtype=torch.float64)
    updates, state = tx.update(torch.ones(2, dtype=torch.float64), tx.init(params), params)
    assert torch.equal(updates, torch.zeros_like(params))
    assert float(fo.tree.get(state, "k")) == 0.0
    assert torch.equal(fo.tree.get(state, "exp_avg_sq"), torch.zeros_like(params))


def test_numbers_of_a_device_without_float64_are_kept_on_the_cpu():
    from functorch_optim._numerics import wide_device

    assert wide_device(torch.device("mps", 0)) == torch.device("cpu")
    assert wide_device(torch.device("cuda", 0)) == torch.device("cuda", 0)


# Scalars that see the whole tree. -------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A state."""

    total: Any


def seeing(log):
    """Make a rule whose scalars are shown all there is."""

    def scalars(step, *, updates, params, states):
        log.append((updates, params, states))
        return 2.0

    def update(g, state, p, factor):
        return factor * g, Kept(state.total + g)

    return fo.leafwise(Kept, update, scalars, elementwise=True, needs_params=True)


def test_scalars_are_shown_updates_params_and_states_in_one_order():
    log = []
    tx = fo.masked(seeing(log), {"a": True, "b": False, "c": True, "d": True})
    params = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    grads = {**params, "d": None}
    updates, state = tx.update(grads, tx.init(params), params)
    _, state = tx.update(grads, state, params)
    seen, weights, states = log[-1]
    assert [float(u[0]) for u in seen] == [0.0, 2.0]
    assert [float(p[0]) for p in weights] == [0.0, 2.0]
    assert [float(total[0]) for total in states.total] == [0.0, 2.0]
    assert type(states) is Kept
    assert float(updates["c"][0]) == 4.0


def test_scalars_inside_of_a_wrapper_are_shown_its_parameters():
    log = []
    tx, params = fo.schedule_free(fo.chain(seeing(log), fo.scale(-1.0))), torch.zeros(1)
    state = tx.init(params)
    for _ in range(2):
        params, state = fo.step(tx, torch.ones(1), state, params)
    assert torch.equal(log[-1][1][0], torch.tensor([-2.0]))  # the iterate of the wrapped transformation


# SGLD. ----------------------------------------------------------------------------------------------------------------


def test_sgld_steps_by_half_the_gradient_and_noise_of_variance_lr_times_temperature():
    run = make_run()
    params, grads, noise = tensors(run.params), tensors(run.grads[0]), tensors(run.grads[1])
    tx = fo.sgld(lambda count: 0.1 / (1 + count), temperature=0.5, weight_decay=0.2)
    state = tx.init(params)
    for lr in (0.1, 0.05):
        before = params
        params, state = fo.step(tx, grads, state, params, noise=noise)
        for new, p, g, n in zip(params, before, grads, noise, strict=True):
            expected = p - lr / 2 * (g + 0.2 * p) + math.sqrt(lr * 0.5) * n
            torch.testing.assert_close(new, expected, rtol=1e-14, atol=1e-14)


def test_sgld_samples_the_density():
    tx = fo.sgld(0.05, generator=torch.Generator().manual_seed(0))
    params = torch.zeros(20_000, dtype=torch.float64)
    state = tx.init(params)
    for _ in range(300):
        params, state = fo.step(tx, params - 3.0, state, params)  # the density is N(3, 1)
    assert abs(float(params.mean()) - 3) < 0.05
    assert abs(float(params.var()) - 1 / (1 - 0.05 / 4)) < 0.05  # the variance of the discrete chain


def test_sgld_repeats_with_the_seed_of_its_generator_and_runs_in_an_optimizer():
    def trained(seed):
        params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
        optimizer = fo.Optimizer(params, fo.sgld, lr=0.1, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_sgld_without_noise_is_an_error():
    tx, params = fo.sgld(), torch.ones(2)
    with pytest.raises(ValueError, match="sgld needs noise"):
        tx.update(torch.ones(2), tx.init(params), params)
