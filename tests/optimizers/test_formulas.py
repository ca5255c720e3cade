"""The optimizers that torch has not: the formulas of their papers in numpy, and packages where they are installed."""

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from formulas import (
    adabelief,
    adai,
    adam_atan2,
    adan,
    adanorm,
    ademamix,
    adopt,
    grams,
    lamb,
    laprop,
    lars,
    lion,
    nadamw,
    sign_sgd,
    signum,
    simplified_ademamix,
    stable_adamw,
    yogi,
)

import functorch_optim as fo

STEPS = 12
SHAPES = ((3, 4), (5,), (), (2, 3, 2))


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
