"""The optimizers that torch has not: the formulas of their papers in numpy, and packages where they are installed."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import functorch_optim as fo

STEPS = 12
SHAPES = ((3, 4), (5,), (), (2, 3, 2))


def norm(x):
    return np.sqrt((x * x).sum())


def each(formula):
    """Make a formula for one parameter one for a list of them."""

    def whole(ps, history, **numbers):
        runs = [formula(p, list(grads), **numbers) for p, grads in zip(ps, zip(*history, strict=True), strict=True)]
        return zip(*runs, strict=True)

    return whole


@each
def lion(p, grads, lr, betas, weight_decay):
    m = 0 * p
    for g in grads:
        u = np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def sign_sgd(p, grads, lr, weight_decay):
    for g in grads:
        p = p - lr * np.sign(g + weight_decay * p)
        yield p


@each
def signum(p, grads, lr, momentum, weight_decay, decoupled_weight_decay):
    m = 0 * p
    for g in grads:
        m = momentum * m + (1 - momentum) * (g if decoupled_weight_decay else g + weight_decay * p)
        p = p - lr * (np.sign(m) + (weight_decay * p if decoupled_weight_decay else 0))
        yield p


def adam_direction(grads, betas, eps, correct=True):
    m = v = np.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        c1, c2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if correct else (1, 1)
        yield (m / c1) / (np.sqrt(v / c2) + eps)


@each
def lamb(p, grads, lr, betas, eps, weight_decay, trust_clip=np.inf, bias_correction=True):
    for u in adam_direction(grads, betas, eps, bias_correction):
        r = u + weight_decay * p
        ratio = norm(p) / norm(r) if norm(p) > 0 and norm(r) > 0 else 1.0
        ratio = min(ratio, trust_clip)
        p = p - lr * ratio * r
        yield p


@each
def lars(p, grads, lr, momentum, weight_decay, trust_coefficient, eps, nesterov):
    for t, g in enumerate(grads, 1):
        ratio = trust_coefficient * norm(p) / (norm(g) + weight_decay * norm(p) + eps)
        d = (g + weight_decay * p) * (ratio if norm(p) > 0 and norm(g) > 0 else 1.0)
        b = d if t == 1 else momentum * b + d  # noqa: F821
        p = p - lr * (d + momentum * b if nesterov else b)
        yield p


def half_life(b):
    return np.log(0.5) / np.log(b + 1e-8) - 1


def growing(t, start, end, steps):
    """Return the decay rate of the authors' code, f_inv((1 - t/T) f(start) + t/T f(end))."""
    if steps is None or t >= steps:
        return end
    return 0.5 ** (1 / ((1 - t / steps) * half_life(start) + t / steps * half_life(end) + 1))


@each
def ademamix(p, grads, lr, betas, alpha, eps, weight_decay, alpha_warmup, beta3_warmup):
    m1 = m2 = v = 0 * p
    for t, g in enumerate(grads, 1):
        a = alpha if alpha_warmup is None else alpha * min(t / alpha_warmup, 1)
        b3 = growing(t, betas[0], betas[2], beta3_warmup)
        m1 = betas[0] * m1 + (1 - betas[0]) * g
        m2 = b3 * m2 + (1 - b3) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = (m1 / (1 - betas[0] ** t) + a * m2) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def simplified_ademamix(p, grads, lr, betas, alpha, eps, weight_decay, beta1_warmup, min_beta1):
    m = n = 0 * p
    for t, g in enumerate(grads, 1):
        m = growing(t, min_beta1, betas[0], beta1_warmup) * m + g
        n = betas[1] * n + (1 - betas[1]) * g * g
        p = p - lr * ((alpha * g + m) / (np.sqrt(n / (1 - betas[1] ** t)) + eps) + weight_decay * p)
        yield p


@each
def adopt(p, grads, lr, betas, eps, weight_decay, decoupled_weight_decay, power=0.25, clip=None):
    m = 0 * p
    for t, given in enumerate(grads, 1):
        g = given if decoupled_weight_decay else given + weight_decay * p
        if t == 1:
            v = g * g
        else:
            n = g / np.maximum(np.sqrt(v), eps)
            c = clip if power is None else (t - 1) ** power
            m = betas[0] * m + (1 - betas[0]) * (n if c is None else np.clip(n, -c, c))
            v = betas[1] * v + (1 - betas[1]) * g * g
            p = p - lr * (m + (weight_decay * p if decoupled_weight_decay else 0))
        yield p


@each
def adabelief(p, grads, lr, betas, eps, weight_decay, rectify, decoupled_weight_decay=True):
    m = s = 0 * p
    for t, given in enumerate(grads, 1):
        g = given if decoupled_weight_decay else given + weight_decay * p
        p = p * (1 - lr * weight_decay) if decoupled_weight_decay else p
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * (g - m) ** 2 + eps
        d1, d2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        if not rectify:
            u = m / d1 / (np.sqrt(s / d2) + eps)
        else:
            longest = 2 / (1 - betas[1]) - 1
            n = longest - 2 * t * betas[1] ** t / d2
            if n >= 5:
                r = (n - 4) / (longest - 4) * (n - 2) / n * longest / (longest - 2)
                u = np.sqrt(d2 * r) / d1 * m / (np.sqrt(s) + eps)
            else:
                u = m / d1
        p = p - lr * u
        yield p


@each
def adan(p, grads, lr, betas, eps, weight_decay, proximal):
    m = mean_d = n = 0 * p
    last = grads[0]
    for t, g in enumerate(grads, 1):
        d, last = g - last, g
        m = betas[0] * m + (1 - betas[0]) * g
        mean_d = betas[1] * mean_d + (1 - betas[1]) * d
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * d) ** 2
        d1, d2, d3 = [1 - b**t for b in betas]
        u = (m / d1 + betas[1] * mean_d / d2) / (np.sqrt(n / d3) + eps)
        p = (p - lr * u) / (1 + lr * weight_decay) if proximal else (1 - lr * weight_decay) * p - lr * u
        yield p


@each
def nadamw(p, grads, lr, betas, eps, weight_decay, correct_ahead):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        d1 = 1 - betas[0] ** t
        ahead = betas[0] * m / (1 - betas[0] ** (t + 1) if correct_ahead else d1) + (1 - betas[0]) * g / d1
        p = p - lr * (ahead / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + weight_decay * p)
        yield p


@each
def stable_adamw(p, grads, lr, betas, eps, weight_decay):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        b1, b2 = [b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        rate = lr / max(1, np.sqrt((g * g / np.maximum(v, eps**2)).mean()))
        p = p * (1 - rate * weight_decay) - rate * m / (np.sqrt(v) + eps)
        yield p


@each
def yogi(p, grads, lr, betas, eps, weight_decay, initial_accumulator_value):
    m = v = np.full_like(p, initial_accumulator_value)
    for t, given in enumerate(grads, 1):
        g = given + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = v - (1 - betas[1]) * np.sign(v - g * g) * g * g
        p = p - lr * m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield p


@each
def laprop(p, grads, lr, betas, eps, weight_decay):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        v = betas[1] * v + (1 - betas[1]) * g * g
        m = betas[0] * m + (1 - betas[0]) * g / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        p = (1 - lr * weight_decay) * (p - lr * m / (1 - betas[0] ** t))
        yield p


@each
def adam_atan2(p, grads, lr, betas, weight_decay, a, b):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = a * np.arctan2(m / (1 - betas[0] ** t), b * np.sqrt(v / (1 - betas[1] ** t)))
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def adanorm(p, grads, lr, betas, eps, weight_decay, r):
    m = v = n = 0 * p
    for t, g in enumerate(grads, 1):
        n = r * n + (1 - r) * norm(g)
        longer = np.where((n > norm(g)) & (norm(g) > 0), g * n / max(norm(g), 1e-300), g)
        m = betas[0] * m + (1 - betas[0]) * longer
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (np.sqrt(v) + eps)
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def grams(p, grads, lr, betas, eps, weight_decay):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        rate = np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        p = p * (1 - lr * weight_decay) - lr * rate * np.sign(g) * np.abs(m) / (np.sqrt(v) + eps)
        yield p


def adai(ps, history, lr, betas, eps, weight_decay):
    m, v, q = [[make(p) for p in ps] for make in (np.zeros_like, np.zeros_like, np.ones_like)]
    for t, given in enumerate(history, 1):
        grads = [g + weight_decay * p for g, p in zip(given, ps, strict=True)]
        v = [betas[1] * v_ + (1 - betas[1]) * g * g for v_, g in zip(v, grads, strict=True)]
        corrected = [v_ / (1 - betas[1] ** t) for v_ in v]
        mean = sum(c.sum() for c in corrected) / sum(c.size for c in corrected)
        beta1 = [np.clip(1 - betas[0] * c / mean, 0, 1 - eps) for c in corrected]
        q = [b * q_ for b, q_ in zip(beta1, q, strict=True)]
        m = [b * m_ + (1 - b) * g for b, m_, g in zip(beta1, m, grads, strict=True)]
        ps = [p - lr * m_ / (1 - q_) for p, m_, q_ in zip(ps, m, q, strict=True)]
        yield ps


class Case(NamedTuple):
    """An optimizer with some options, and its formula.

    Attributes:
        make: the factory.
        formula: (parameters, history of gradients, **options) -> parameters after each step.
        options: of both.
        ours: further options of the factory, and
        theirs: of the formula.
    """

    make: Callable[..., Any]
    formula: Callable[..., Any]
    options: dict[str, Any]
    ours: dict[str, Any] = {}  # noqa: RUF012
    theirs: dict[str, Any] = {}  # noqa: RUF012


DECAYED = {"lr": 0.1, "weight_decay": 0.2}
ADAM = {"betas": (0.9, 0.97), "eps": 1e-3}
ADOPT = {**DECAYED, **ADAM, "eps": 0.3}  # so that it matters
THREE = {"betas": (0.9, 0.97, 0.99), "eps": 1e-3}
CASES = {
    "lion": Case(fo.lion, lion, {**DECAYED, "betas": (0.9, 0.5)}),
    "sign_sgd": Case(fo.sign_sgd, sign_sgd, {"lr": 0.1, "weight_decay": 5.0}),
    "signum": Case(
        fo.signum, signum, {"lr": 0.1, "weight_decay": 2.0, "momentum": 0.7}, *[{"decoupled_weight_decay": False}] * 2
    ),
    "signum decoupled": Case(fo.signum, signum, {**DECAYED, "momentum": 0.7}, *[{"decoupled_weight_decay": True}] * 2),
    "lamb": Case(fo.lamb, lamb, {**DECAYED, **ADAM}),
    "lamb clipped": Case(fo.lamb, lamb, {**DECAYED, **ADAM, "trust_clip": 0.8}, *[{"bias_correction": False}] * 2),
    "lars": Case(
        fo.lars, lars, {**DECAYED, "momentum": 0.9, "trust_coefficient": 0.1, "eps": 1e-3}, *[{"nesterov": False}] * 2
    ),
    "lars nesterov": Case(
        fo.lars, lars, {**DECAYED, "momentum": 0.9, "trust_coefficient": 0.1, "eps": 1e-3}, *[{"nesterov": True}] * 2
    ),
    "ademamix": Case(
        fo.ademamix, ademamix, {**DECAYED, **THREE, "alpha": 5.0, "alpha_warmup": 8.5, "beta3_warmup": 9.5}
    ),
    "ademamix at once": Case(
        fo.ademamix, ademamix, {**DECAYED, **THREE, "alpha": 5.0}, {}, {"alpha_warmup": None, "beta3_warmup": None}
    ),
    "simplified_ademamix": Case(
        fo.simplified_ademamix,
        simplified_ademamix,
        {**DECAYED, **ADAM, "alpha": 2.0, "beta1_warmup": 8.5, "min_beta1": 0.5},
    ),
    "adopt": Case(fo.adopt, adopt, {**ADOPT}, *[{"decoupled_weight_decay": False}] * 2),
    "adopt decoupled": Case(fo.adopt, adopt, {**ADOPT}, *[{"decoupled_weight_decay": True}] * 2),
    "adopt of timm": Case(
        fo.adopt,
        adopt,
        {**ADOPT, "decoupled_weight_decay": True},
        {"clip": lambda count: count**0.333},
        {"power": 0.333},
    ),
    "adopt clipped": Case(
        fo.adopt,
        adopt,
        {**ADOPT, "clip": 0.5, "decoupled_weight_decay": False},
        {},
        {"power": None},
    ),
    "adopt not clipped": Case(
        fo.adopt,
        adopt,
        {**ADOPT, "decoupled_weight_decay": False},
        {"clip": None},
        {"power": None},
    ),
    "adabelief": Case(fo.adabelief, adabelief, {**DECAYED, **ADAM}, {}, {"rectify": False}),
    "adabelief coupled": Case(
        fo.adabelief, adabelief, {**DECAYED, **ADAM, "rectify": False}, *[{"decoupled_weight_decay": False}] * 2
    ),
    "adabelief rectified": Case(fo.adabelief, adabelief, {**DECAYED, **ADAM, "rectify": True}),
    "adan": Case(fo.adan, adan, {**DECAYED, **THREE}, {}, {"proximal": True}),
    "adan not proximal": Case(fo.adan, adan, {**DECAYED, **THREE, "proximal": False}),
    "nadamw": Case(fo.nadamw, nadamw, {**DECAYED, **ADAM}, {}, {"correct_ahead": False}),
    "nadamw of optax": Case(fo.nadamw, nadamw, {**DECAYED, **ADAM, "correct_ahead": True}),
    "stable_adamw": Case(fo.stable_adamw, stable_adamw, {**DECAYED, **ADAM}),
    "yogi": Case(fo.yogi, yogi, {**DECAYED, **ADAM, "initial_accumulator_value": 0.1}),
    "laprop": Case(fo.laprop, laprop, {**DECAYED, **ADAM}),
    "adam_atan2": Case(fo.adam_atan2, adam_atan2, {**DECAYED, "betas": (0.9, 0.97), "a": 1.27, "b": 1.5}),
    "adanorm": Case(fo.adanorm, adanorm, {**DECAYED, **ADAM, "r": 0.9}),
    "grams": Case(fo.grams, grams, {**DECAYED, **ADAM}),
    "adai": Case(fo.adai, adai, {**DECAYED, "betas": (0.5, 0.97), "eps": 0.1}),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem():
    """Make parameters, one of them zero, and gradients that become smaller, some of them zero."""
    params = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    params[1] = torch.zeros_like(params[1])
    history = [[0.8**t * torch.randn_like(p) for p in params] for t in range(STEPS)]
    history[0][0][0] = history[1][0][:2] = history[4][2][()] = 0.0
    for grads in history:
        grads[3][0, 0, 0] = 0.0
    return params, history


def trained(tx, params, history):
    """Return the parameters after each step."""
    state, after = tx.init(params), []
    for grads in history:
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        after.append(params)
    return after


def deviation(ours, theirs):
    """Return the largest difference, relative to the largest number of a tensor."""
    return max(
        float(np.abs(a.numpy() - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
        for a, b in zip(chain(*ours), chain(*theirs), strict=True)
        if np.asarray(b).any()
    )


def against_formula(case, **changed):
    params, history = problem()
    ours = trained(case.make(**case.options, **case.ours), params, history)
    theirs = case.formula(
        [p.numpy() for p in params],
        [[g.numpy() for g in grads] for grads in history],
        **{**case.options, **changed},
        **case.theirs,
    )
    return deviation(ours, list(theirs))


@cases
def test_is_the_formula(case):
    assert against_formula(case) < 1e-12


def changes(options):
    """Change each number by a few percent."""
    for name, value in options.items():
        if isinstance(value, tuple):
            for i, beta in enumerate(value):
                yield name, (*value[:i], 0.95 * beta, *value[i + 1 :])
        elif not isinstance(value, bool):
            yield name, 0.95 * value


@pytest.mark.sampled(size=64)
@pytest.mark.parametrize(
    ("case", "name", "value"),
    [
        pytest.param(case, name, value, id=f"{key}-{name}-{value}")
        for key, case in CASES.items()
        for name, value in changes(case.options)
        # Whether a sign changes, or a ratio is clipped, is decided by chance.
        if case.formula not in (lion, signum, sign_sgd) or name == "lr"
    ],
)
def test_the_comparison_can_fail(case, name, value):
    assert against_formula(case, **{name: value}) > 1e-6


@cases
def test_ascent_is_descent_of_the_opposite(case):
    params, history = problem()
    options = {**case.options, **case.ours}
    up = trained(case.make(**options, maximize=True), params, history)
    down = trained(case.make(**options), params, [[-g for g in grads] for grads in history])
    assert deviation(up, down) == 0


@cases
def test_stateful_is_functional(case):
    params, history = problem()
    options = {**case.options, **case.ours}
    expected = trained(case.make(**options), params, history)[-1]
    params = [torch.nn.Parameter(p.clone()) for p in params]
    opt = fo.Optimizer(params, case.make, **options)
    for grads in history:
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        opt.step()
    assert deviation([[p.detach() for p in params]], [expected]) < 1e-12


# Packages. ------------------------------------------------------------------------------------------------------------

BOTH = {"lr": 0.02, "weight_decay": 0.1}
PACKAGES = [
    (fo.lion, {}, "lion_pytorch.Lion", {}),
    (fo.lamb, {"eps": 1e-6}, "timm.optim.lamb.Lamb", {"eps": 1e-6, "max_grad_norm": None, "always_adapt": True}),
    (fo.lamb, {"trust_clip": 1.0}, "timm.optim.lamb.Lamb", {"max_grad_norm": None, "trust_clip": True}),
    (fo.lars, {"momentum": 0.9}, "timm.optim.lars.Lars", {"momentum": 0.9}),
    (fo.lars, {"momentum": 0.9, "nesterov": True}, "timm.optim.lars.Lars", {"momentum": 0.9, "nesterov": True}),
    (
        fo.adopt,
        {"decoupled_weight_decay": True, "clip": lambda count: count**0.333},
        "timm.optim.adopt.Adopt",
        {"decoupled": True},
    ),
    (fo.adabelief, {}, "pytorch_optimizer.AdaBelief", {"rectify": False}),
    (fo.adabelief, {"rectify": True}, "adabelief_pytorch.AdaBelief", {"print_change_log": False}),
    (fo.adabelief, {"rectify": False}, "adabelief_pytorch.AdaBelief", {"print_change_log": False, "rectify": False}),
    (fo.adan, {}, "timm.optim.adan.Adan", {}),
    (fo.adan, {"proximal": False}, "timm.optim.adan.Adan", {"no_prox": True}),
    (fo.nadamw, {}, "timm.optim.nadamw.NAdamW", {}),
    (fo.stable_adamw, {"eps": 1e-8}, "pytorch_optimizer.StableAdamW", {"kahan_sum": False}),
    (fo.yogi, {}, "torch_optimizer.Yogi", {}),
    (fo.yogi, {"decoupled_weight_decay": True}, "pytorch_optimizer.Yogi", {}),
    (fo.laprop, {}, "timm.optim.laprop.LaProp", {}),
    (fo.laprop, {}, "pytorch_optimizer.LaProp", {}),
    (fo.adanorm, {}, "pytorch_optimizer.AdaNorm", {}),
    (fo.adai, {}, "pytorch_optimizer.Adai", {}),
    (fo.sign_sgd, {}, "pytorch_optimizer.SignSGD", {"momentum": 0.0, "weight_decouple": False}),
    (
        fo.signum,
        {"decoupled_weight_decay": True},
        "pytorch_optimizer.SignSGD",
        {"momentum": 0.9, "weight_decouple": True},
    ),
]


def against_package(make, options, package, theirs):
    module, _, name = package.rpartition(".")
    optimizer = getattr(pytest.importorskip(module), name)
    params, history = problem()
    # Some of the packages fail at zero gradients, or take them for the first.
    history = [[torch.where(g == 0, 0.1, g) for g in grads] for grads in history]
    expected, after = [p.clone() for p in params], []
    opt = optimizer(expected, **{**BOTH, **theirs})
    for grads in history:
        for p, g in zip(expected, grads, strict=True):
            p.grad = g.clone()
        opt.step()
        after.append([p.clone() for p in expected])
    return deviation(trained(make(**{**BOTH, **options}), params, history), after)


packages = pytest.mark.parametrize(
    ("make", "options", "package", "theirs"), PACKAGES, ids=[f"{case[2]}-{i}" for i, case in enumerate(PACKAGES)]
)


@packages
def test_is_the_package(make, options, package, theirs):
    assert against_package(make, options, package, theirs) < 1e-7


@packages
def test_the_comparison_with_packages_can_fail(make, options, package, theirs):
    assert against_package(make, {**options, "weight_decay": 0.0}, package, theirs) > 1e-6
