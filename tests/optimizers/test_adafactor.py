"""Adafactor with the options of T5 and optax, and CAME, against formulas in numpy and packages."""

import itertools
import math

import numpy as np
import pytest
import torch
from trajectories import deviation, functional, of_each, problem, stateful, tensors

import functorch_optim as fo


def rms(x):
    return math.sqrt((x**2).mean())


def dims_of(shape, factored=True, min_dim_size_to_factor=None):
    """Return the dimensions of rows and columns, or None."""
    if not factored or len(shape) < 2:
        return None
    if min_dim_size_to_factor is None:
        return len(shape) - 2, len(shape) - 1
    *_, small, large = np.argsort(shape, kind="stable")
    return (small, large) if shape[small] >= min_dim_size_to_factor else None


def low_rank(x, dims):
    """Return the matrix of rank one that has the means of x."""
    if dims is None:
        return x
    rows, columns = x.mean(dims[1], keepdims=True), x.mean(dims[0], keepdims=True)
    return rows * columns / x.mean(dims, keepdims=True)


def adafactor(
    p,
    grads,
    lr=1e-2,
    beta2_decay=-0.8,
    eps=(None, 1e-3),
    d=1.0,
    weight_decay=0.0,
    beta1=None,
    scale_parameter=True,
    relative_step=True,
    warmup_init=False,
    add_eps=False,
    decay=None,
    **factoring,
):
    """The means of squares are kept in full here: factoring them is linear, and so is averaging."""
    dims = dims_of(p.shape, **factoring)
    eps1 = (1e-30 if add_eps else np.finfo(float).eps) if eps[0] is None else eps[0]
    decay = decay or ("lr" if lr is not None and relative_step else "step")
    x, m = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        beta2 = 1 - t**beta2_decay
        x = beta2 * x + (1 - beta2) * (g**2 + (eps1 if add_eps else 0))
        v = low_rank(x, dims) if x.any() else x
        w = g / np.sqrt(v if add_eps else np.maximum(v, eps1**2))
        w = w / max(1, rms(w) / d)
        rho = 1e-2 if lr is None else lr
        if relative_step:
            rho = min(rho, 1e-6 * t if warmup_init else math.inf, 1 / math.sqrt(t))
        alpha = rho * (max(eps[1], rms(p)) if scale_parameter else 1)
        m = alpha * w if beta1 is None else beta1 * m + (1 - beta1) * alpha * w
        p = p - m - weight_decay * {"lr": lr or 1e-2, "step": alpha, "independent": 1.0}[decay] * p
        yield p


def came(p, grads, lr, betas, eps, weight_decay, clip_threshold, bias_correction=False):
    dims = dims_of(p.shape)
    x, y, m = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p)
    (b1, b2, b3), (eps1, eps2) = betas, eps
    for t, g in enumerate(grads, 1):
        x = b2 * x + (1 - b2) * (g**2 + eps1)
        u = g / np.sqrt(low_rank(x, dims) / (1 - b2**t if bias_correction else 1))
        u = u / max(1, rms(u) / clip_threshold)
        m = b1 * m + (1 - b1) * u
        y = b3 * y + (1 - b3) * ((u - m) ** 2 + eps2)
        s = low_rank(y, dims) / (1 - b3**t if bias_correction else 1)
        p = (1 - lr * weight_decay) * p - lr * (m if dims is None else m / np.sqrt(s))
        yield p


# Adafactor. -----------------------------------------------------------------------------------------------------------

T5 = {"lr": None, "eps": (1e-30, 1e-3), "add_eps": True}
OPTAX = {**T5, "lr": 0.1, "relative_step": False, "min_dim_size_to_factor": 3, "decay": "independent"}
KINDS = [
    {},
    {"lr": 0.3, "eps": (1e-3, 0.5), "beta2_decay": -0.5, "d": 1.5},
    {"lr": 0.3, "eps": (1e-2, 1e-3), "add_eps": True, "d": math.inf},
    T5,
    {**T5, "warmup_init": True},
    {**T5, "lr": 0.1, "relative_step": False},
    OPTAX,
    {**OPTAX, "min_dim_size_to_factor": 4},
    {**OPTAX, "factored": False, "min_dim_size_to_factor": None},
]
COMBINATIONS = [
    {**kind, "beta1": beta1, "scale_parameter": scale, **decay}
    for kind, beta1, scale, decay in itertools.product(
        KINDS,
        (None, 0.9),
        (True, False),
        ({}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decay": "step"}),
    )
]


def named(options):
    return "-".join([f"{name}={value}" for name, value in options.items()]) or "defaults"


@pytest.mark.sampled(size=32)
@pytest.mark.parametrize("options", COMBINATIONS, ids=named)
def test_every_combination_of_options_is_the_formula(options):
    params, history = problem(zeros=(0,) if options.get("add_eps") else ())
    expected = of_each(adafactor, params, history, **options)
    assert deviation(functional(fo.adafactor(**options), params, history), expected) < 1e-12


CHANGES = [
    *({"lr": 0.5}, {"d": 1.1}, {"eps": (1e-30, 0.9)}, {"eps": (0.9, 1e-3)}, {"beta1": 0.5}, {"scale_parameter": False}),
    *({"relative_step": False, "lr": 1e-2}, {"warmup_init": True}, {"factored": False}, {"min_dim_size_to_factor": 4}),
    *({"add_eps": False, "eps": (0.5, 1e-3)}, {"decay": "independent"}, {"weight_decay": 0.2}),
]


@pytest.mark.parametrize("changed", CHANGES, ids=named)
def test_the_formula_depends_on_every_option(changed):
    """And so does ours: the comparison above can fail."""
    options = {**T5, "lr": 0.8, "weight_decay": 0.1, "eps": (1e-2, 1e-3), "d": 1.0}
    params, history = problem()
    ours = functional(fo.adafactor(**{**options, **changed}), params, history)
    assert deviation(ours, of_each(adafactor, params, history, **options)) > 1e-6


@pytest.mark.parametrize("options", [T5, {**T5, "beta1": 0.9, "weight_decay": 0.1}, OPTAX], ids=named)
def test_the_stateful_form_is_the_formula(options):
    params, history = problem()
    expected = of_each(adafactor, params, history, **options)
    ours = stateful(lambda params: fo.Optimizer(params, fo.adafactor, **options), params, history)
    assert deviation(ours, expected) < 1e-12


@pytest.mark.parametrize("options", [{"eps": (1e-30, 1e-3)}, {**T5}, {"eps": (0.0, 1e-3)}], ids=named)
def test_rows_and_columns_without_a_gradient_stay(options):
    """As those of an embedding do: 1e-30 squared is zero in single precision."""
    params, grads = torch.ones(4, 3), torch.ones(4, 3)
    grads[1] = grads[:, 2] = 0
    for given in (grads, torch.zeros(4, 3)):
        updates, _ = fo.adafactor(**options).update(given, fo.adafactor(**options).init(params), params)
        assert torch.equal(updates == 0, given == 0)
        assert updates.isfinite().all()


def test_momentum_is_of_steps_with_their_learning_rates():
    """As in T5: after the learning rate has become zero, momentum goes on."""
    params, history = problem(shapes=[(3, 2)])

    def lr(count):
        return 0.1 if count < 6 else 0.0

    after = functional(fo.adafactor(lr, beta1=0.9), params, history)
    assert not torch.equal(after[6][0], after[5][0])
    without = functional(fo.adafactor(lr), params, history)
    assert torch.equal(without[6][0], without[5][0])


def test_the_two_largest_dimensions_are_factored():
    params = {"stack": torch.ones(6, 2, 5), "small": torch.ones(6, 4), "vector": torch.ones(7)}
    state = fo.adafactor(min_dim_size_to_factor=5).init(params)
    assert fo.tree.get(state, "row_var")["stack"].shape == (6, 2, 1)
    assert fo.tree.get(state, "col_var")["stack"].shape == (1, 2, 5)
    assert fo.tree.get(state, "variance")["small"].shape == (6, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": None, "relative_step": False}, "With relative_step=False adafactor needs lr; write"),
        ({"warmup_init": True, "relative_step": False}, "relative_step=False adafactor needs no warmup_init"),
        ({"beta1": 1.0}, "Invalid beta1: 1.0; it needs 0 <= value < 1"),
        ({"decay": "alpha"}, "Invalid decay: 'alpha'; choose 'lr', 'step', 'independent' or None"),
        ({"min_dim_size_to_factor": -1}, "Invalid min_dim_size_to_factor: -1; it needs an integer >= 0"),
    ],
)
def test_options_that_contradict_each_other_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fo.adafactor(**options)


# CAME. ----------------------------------------------------------------------------------------------------------------

CAME = {"lr": 2e-4, "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16), "weight_decay": 0.0, "clip_threshold": 1.0}
CASES = [
    CAME,
    {**CAME, "lr": 0.1, "betas": (0.5, 0.8, 0.9), "eps": (1e-3, 1e-2), "weight_decay": 0.1, "clip_threshold": 0.5},
    {**CAME, "lr": 0.1, "weight_decay": 0.1, "bias_correction": True},
]


@pytest.mark.parametrize("numbers", CASES, ids=["defaults", "others", "corrected"])
@pytest.mark.parametrize("zeros", [(), (0, 1)], ids=["", "begins with zeros"])
def test_came_is_the_formula(numbers, zeros):
    params, history = problem(zeros=zeros)
    expected = of_each(came, params, history, **numbers)
    assert deviation(functional(fo.came(**numbers), params, history), expected) < 1e-12
    ours = stateful(lambda params: fo.Optimizer(params, fo.came, **numbers), params, history)
    assert deviation(ours, expected) < 1e-12


@pytest.mark.parametrize(
    "changed",
    [
        *({"lr": 0.2}, {"betas": (0.6, 0.8, 0.9)}, {"betas": (0.5, 0.7, 0.9)}, {"betas": (0.5, 0.8, 0.5)}),
        *({"eps": (1e-2, 1e-2)}, {"eps": (1e-3, 1e-3)}, {"weight_decay": 0.0}, {"clip_threshold": 1.0}),
        {"bias_correction": True},
    ],
    ids=named,
)
def test_the_comparison_of_came_can_fail(changed):
    params, history = problem()
    ours = functional(fo.came(**{**CASES[1], **changed}), params, history)
    assert deviation(ours, of_each(came, params, history, **CASES[1])) > 1e-6


def test_the_first_step_of_came_is_small_when_it_is_corrected_and_large_otherwise():
    params, grads = torch.zeros(64, 32, dtype=torch.float64), torch.randn(64, 32, dtype=torch.float64)
    sizes = []
    for bias_correction in (False, True):
        tx = fo.came(1.0, bias_correction=bias_correction)
        sizes.append(rms(tx.update(grads, tx.init(params))[0].numpy()))
    assert sizes[0] > 10
    assert sizes[1] < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 0.999)}, r"Invalid betas: \(0.9, 0.999\); give 3 numbers, as in betas=\(0.9, 0.999, 0.9999\)"),
        ({"eps": 1e-30}, r"Invalid eps: 1e-30; give 2 numbers, as in eps=\(1e-30, 1e-16\)"),
        ({"eps": (1e-30, -1.0)}, "Invalid epsilon value at index 1: -1.0"),
        ({"clip_threshold": 0.0}, "Invalid clip_threshold: 0.0; it needs value > 0"),
    ],
)
def test_numbers_that_came_cannot_use_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        fo.came(**options)


# Packages. ------------------------------------------------------------------------------------------------------------

PACKAGES = [
    ("CAME", fo.came, {"lr": 0.02, "weight_decay": 0.1}, {}),
    ("CAME", fo.came, {"lr": 0.02, "betas": (0.5, 0.8, 0.9), "weight_decay": 0.1}, {}),
]


def of_package(name, options, params, history):
    """Run an optimizer of pytorch_optimizer."""
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    return stateful(lambda params: getattr(package, name)(params, **options), params, history)


@pytest.mark.parametrize(("name", "make", "options", "theirs"), PACKAGES)
def test_every_step_is_that_of_an_independent_package(name, make, options, theirs):
    params, history = problem(shapes=[(4, 3), (3,), (2, 3, 4)])
    expected = of_package(name, {**options, **theirs}, params, history)
    assert deviation(functional(make(**options), params, history), expected) < 1e-12
    assert deviation(functional(make(**{**options, "weight_decay": 0.0}), params, history), expected) > 1e-6


@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("warmup_init", [True, False])
def test_every_step_is_that_of_an_independent_adafactor(scale_parameter, warmup_init):
    params, history = problem(shapes=[(4, 3), (3,), (2, 3, 4)])
    shared = {"scale_parameter": scale_parameter, "warmup_init": warmup_init, "weight_decay": 0.1}
    theirs = {"lr": 1e-3, "relative_step": True, "momentum_dtype": torch.float64}
    expected = of_package("AdaFactor", {**shared, **theirs}, params, history)
    ours = functional(fo.adafactor(**T5, **shared, beta1=0.9), params, history)
    assert deviation(ours, expected) < 1e-12


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="CAME does not support complex parameters"):
        fo.came().init(tensors([1.0], torch.complex64))


def test_states_in_float32_hold_the_squares_of_large_gradients_in_float16():
    p, g = torch.ones(4, 4, dtype=torch.float16), torch.full((4, 4), 300.0, dtype=torch.float16)

    def last_update(tx):
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update(g, state, p)
        return updates

    theirs = torch.optim.Adafactor([torch.nn.Parameter(p.clone())], lr=0.1)
    theirs.param_groups[0]["params"][0].grad = g
    for _ in range(3):
        theirs.step()
    assert theirs.param_groups[0]["params"][0].isnan().all()
    assert last_update(fo.adafactor(0.1)).isnan().all()
    torch.testing.assert_close(last_update(fo.cast_states(fo.adafactor(0.1))), torch.full_like(p, -0.1))
