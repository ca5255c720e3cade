"""The same numbers as torch.optim and torch.nn.utils, step by step, and as the papers' formulas in numpy."""

import numpy as np
import pytest
import torch

import functorch_optim as fo

DECAY = {"weight_decay": 0.1}
SAME = [
    (fo.sgd, torch.optim.SGD, {"lr": 0.1}),
    (fo.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (fo.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, **DECAY}),
    (fo.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, **DECAY}),
    (fo.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 3.0}),
    (fo.adam, torch.optim.Adam, {}),
    (fo.adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, **DECAY}),
    (fo.adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.0), "eps": 1e-2}),
    (fo.adam, torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "maximize": True, **DECAY}),
    (fo.adam, torch.optim.Adam, {"lr": 0.1, "decoupled_weight_decay": True, **DECAY}),
    (fo.adamw, torch.optim.AdamW, {}),
    (fo.adamw, torch.optim.AdamW, {"lr": 0.1, "amsgrad": True, "maximize": True, **DECAY}),
    (fo.adadelta, torch.optim.Adadelta, {}),
    (fo.adadelta, torch.optim.Adadelta, {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "maximize": True, **DECAY}),
    (fo.nadam, torch.optim.NAdam, {}),
    (fo.nadam, torch.optim.NAdam, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "momentum_decay": 0.1, **DECAY}),
    (fo.nadam, torch.optim.NAdam, {"momentum_decay": 0.0, "maximize": True, "decoupled_weight_decay": True, **DECAY}),
    (fo.radam, torch.optim.RAdam, {}),
    (fo.radam, torch.optim.RAdam, {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-2, **DECAY}),
    (fo.radam, torch.optim.RAdam, {"betas": (0.9, 0.9), "maximize": True, "decoupled_weight_decay": True, **DECAY}),
    (fo.adamax, torch.optim.Adamax, {}),
    (fo.adamax, torch.optim.Adamax, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "maximize": True, **DECAY}),
    (fo.adagrad, torch.optim.Adagrad, {}),
    (fo.adagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-2, "maximize": True, **DECAY}),
    (fo.adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    (fo.rmsprop, torch.optim.RMSprop, {}),
    (fo.rmsprop, torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.7, "eps": 1e-2, "momentum": 0.5, **DECAY}),
    (fo.rmsprop, torch.optim.RMSprop, {"centered": True, "momentum": 0.9, "maximize": True, **DECAY}),
    (fo.rprop, torch.optim.Rprop, {}),
    (fo.rprop, torch.optim.Rprop, {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.05, 0.2), "maximize": True}),
    (fo.asgd, torch.optim.ASGD, {}),
    (fo.asgd, torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 5, "maximize": True, **DECAY}),
]
same = pytest.mark.parametrize(
    ("factory", "torch_class", "options"),
    SAME,
    ids=[f"{torch_class.__name__}-{'-'.join(options) or 'defaults'}" for _, torch_class, options in SAME],
)


def awkward_params(dtype, device="cpu"):
    """Nested, scalar, empty and non-contiguous."""
    options = {"dtype": dtype, "device": device}
    return {
        "block": [{"weight": torch.randn(3, 4, **options).t(), "bias": torch.randn(4, **options)}],
        "scale": torch.randn((), **options),
        "strided": torch.randn(10, **options)[::3],
        "empty": torch.randn(0, 2, **options),
        "tuple": (torch.randn(2, 1, 2, **options),),
    }


def largest_deviation(tx, torch_optimizer, params, torch_params, steps=60, scale=1.0):
    """Train both on the same gradients; return the largest relative deviation seen in any step."""
    leaves, structure = fo.tree.flatten(params)
    state, worst = tx.init(params), 0.0
    for step in range(steps):
        # Gradients of many sizes, with some that are exactly zero.
        grads = [scale * 10 ** (step % 7 - 3) * torch.randn_like(leaf) for leaf in leaves]
        if step % 5 == 2:
            grads = [torch.zeros_like(grad) for grad in grads]
        for param, grad in zip(torch_params, grads, strict=True):
            param.grad = grad.clone()
        torch_optimizer.step()
        updates, state = tx.update(fo.tree.unflatten(structure, grads), state, params)
        params = fo.apply_updates(params, updates)
        for ours, theirs in zip(fo.tree.flatten(params)[0], torch_params, strict=True):
            if ours.numel():
                worst = max(worst, ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item())
    return worst


def both(factory, torch_class, options, dtype, device):
    params = awkward_params(dtype, device)
    torch_params = [leaf.clone().requires_grad_() for leaf in fo.tree.flatten(params)[0]]
    return factory(**options), torch_class(torch_params, **options), params, torch_params


@pytest.fixture
def double():
    """Let torch.optim keep the numbers that NAdam and ASGD carry on in float64, as the functional form does."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@same
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_equals_torch_in_double_precision(factory, torch_class, options, dtype, device, double):
    assert largest_deviation(*both(factory, torch_class, options, dtype, device)) < 1e-12


@same
def test_equals_torch_in_single_precision_to_a_few_units_in_the_last_place(factory, torch_class, options, device):
    pair = both(factory, torch_class, options, torch.float32, device)
    # Gradients up to 10: larger ones would move parameters up and down by more than they keep digits.
    assert largest_deviation(*pair, scale=0.01) < 60 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("factory", "torch_class", "options"),
    [
        (fo.adamw, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
        (fo.adam, torch.optim.Adam, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
        (fo.sgd, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ],
)
def test_half_precision_is_computed_as_torchs_fused_kernels_do(factory, torch_class, options, dtype):
    params = awkward_params(dtype)
    torch_params = [leaf.clone().requires_grad_() for leaf in fo.tree.flatten(params)[0]]
    fused = torch_class(torch_params, **options, fused=True)
    # The kernel rounds parameters once, we round the update and the sum: one unit in the last place a step.
    deviation = largest_deviation(factory(**options), fused, params, torch_params, steps=10, scale=0.01)
    assert deviation < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fo.adam(0.1), {"lr": 0.1000001}),
        (fo.adam(0.1), {"lr": 0.1, "eps": 1.1e-8}),
        (fo.adam(0.1), {"lr": 0.1, "betas": (0.9, 0.99901)}),
        (fo.adam(0.1, weight_decay=0.1), {"lr": 0.1}),
    ],
)
def test_the_comparison_can_fail(ours, theirs):
    _, torch_optimizer, params, torch_params = both(fo.adam, torch.optim.Adam, theirs, torch.float64, "cpu")
    assert largest_deviation(ours, torch_optimizer, params, torch_params) > 1e-10


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_global_norm_clipping_equals_torch(norm_type, size, device):
    params = awkward_params(torch.float64, device)
    grads = fo.tree.map(lambda p: size * torch.randn_like(p), params)
    torch_params = fo.tree.flatten(fo.tree.map(torch.empty_like, params))[0]
    for param, grad in zip(torch_params, fo.tree.flatten(grads)[0], strict=True):
        param.grad = grad.clone() if grad.numel() else None  # torch has no infinity norm of nothing; ours is 0
    torch.nn.utils.clip_grad_norm_(torch_params, 2.0, norm_type)
    tx = fo.clip_by_global_norm(2.0, norm_type, eps=1e-6)
    clipped, _ = tx.update(grads, tx.init(params))
    for ours, param in zip(fo.tree.flatten(clipped)[0], torch_params, strict=True):
        if param.grad is not None:
            torch.testing.assert_close(ours, param.grad, rtol=1e-12, atol=1e-14)


def test_the_clipped_norm_is_exactly_the_largest_allowed():
    grads = {"a": torch.randn(100, dtype=torch.float64), "b": torch.randn(50, dtype=torch.float64)}
    for max_norm in (0.1, 1.0, 100.0):
        clipped, _ = fo.clip_by_global_norm(max_norm).update(grads, fo.clip_by_global_norm(max_norm).init(grads))
        norm = torch.cat([clipped["a"], clipped["b"]]).norm()
        before = torch.cat([grads["a"], grads["b"]]).norm()
        torch.testing.assert_close(norm, before.clamp(max=max_norm), rtol=1e-14, atol=0)


def test_value_clipping_equals_torch(device):
    grad = torch.randn(50, dtype=torch.float64, device=device)
    param = torch.empty_like(grad)
    param.grad = grad.clone()
    torch.nn.utils.clip_grad_value_([param], 0.5)
    tx = fo.clip(0.5)
    assert torch.equal(tx.update(grad, tx.init(param))[0], param.grad)


def test_adam_equals_its_paper():
    """Kingma & Ba, algorithm 1, with alpha, beta_1, beta_2, epsilon, m, v, t of the paper, in numpy."""
    alpha, beta_1, beta_2, epsilon = 0.1, 0.9, 0.99, 1e-3
    rng = np.random.default_rng(0)
    theta = rng.normal(size=20)
    m = v = np.zeros(20)
    tx = fo.adam(alpha, (beta_1, beta_2), epsilon)
    params = torch.tensor(theta)
    state = tx.init(params)
    for t in range(1, 61):
        g = rng.normal(size=20)
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        theta = theta - alpha * (m / (1 - beta_1**t)) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        updates, state = tx.update(torch.tensor(g), state)
        params = fo.apply_updates(params, updates)
        np.testing.assert_allclose(params.numpy(), theta, rtol=1e-12, atol=1e-13)


def test_adadelta_equals_its_paper():
    """Zeiler, algorithm 1, in numpy."""
    rho, epsilon = 0.95, 1e-6
    rng = np.random.default_rng(0)
    x = rng.normal(size=20)
    mean_g = mean_dx = np.zeros(20)
    tx = fo.adadelta(1.0, rho, epsilon)
    params = torch.tensor(x)
    state = tx.init(params)
    for _ in range(60):
        g = rng.normal(size=20)
        mean_g = rho * mean_g + (1 - rho) * g**2
        dx = -np.sqrt(mean_dx + epsilon) / np.sqrt(mean_g + epsilon) * g
        mean_dx = rho * mean_dx + (1 - rho) * dx**2
        x = x + dx
        updates, state = tx.update(torch.tensor(g), state)
        params = fo.apply_updates(params, updates)
        np.testing.assert_allclose(params.numpy(), x, rtol=1e-12, atol=1e-13)


def test_adams_derivative_is_exact_where_nothing_has_fired():
    """At g = 0 the first update is -lr g / (|g| + eps): its derivative there is -lr / eps."""
    lr, eps = 0.1, 1e-3
    tx = fo.adam(lr, eps=eps)
    params = torch.zeros(3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda g: tx.update(g, tx.init(params))[0])(torch.zeros_like(params))
    torch.testing.assert_close(jacobian, -lr / eps * torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=0)
