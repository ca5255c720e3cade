"""The same numbers as torch.optim and torch.nn.utils, step by step, and as the papers' formulas in numpy."""

import copy
import inspect

import numpy as np
import pytest
import torch
from torch_like_cases import CASES, REAL, awkward_params, by_case, deviation, each, factory_of, parameters, run

import functorch_optim as fo
from functorch_optim import testing

pytestmark = pytest.mark.smoke

same = by_case(
    [
        *CASES,
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 3.0}),
        ("Adam", {"lr": 0.1, "betas": (0.0, 0.0), "eps": 1e-2}),
    ]
)


def awkward_tree(dtype, device="cpu", name="Adam"):
    """Nested, scalar, empty and non-contiguous."""
    first, second, *rest = awkward_params(name, dtype, device)
    return {"block": [{"weight": first, "bias": second}], "tuple": (*rest,)}


class Functional:
    """A transformation and a tree of parameters, which takes steps as an optimizer does."""

    def __init__(self, tx, params):
        self.tx, self.params, self.state = tx, params, tx.init(params)

    @property
    def param_groups(self):
        return [{"params": fo.tree.flatten(self.params)[0]}]

    def step(self):
        grads = fo.tree.map(lambda p: p.grad, self.params)
        updates, self.state = self.tx.update(grads, self.state, self.params)
        self.params = fo.apply_updates(self.params, updates)


def both(tx, name, dtype, device="cpu", **options):
    """Make the functional form, and torch's class with some options over the same parameters."""
    params = awkward_tree(dtype, device, name)
    own = torch.clone if options.get("fused") else copy.deepcopy  # torch's kernels take no gaps between the elements
    torch_params = [own(leaf).requires_grad_() for leaf in fo.tree.flatten(params)[0]]
    return Functional(tx, params), getattr(torch.optim, name)(torch_params, **options)


@each
def test_defaults_are_those_of_torch(name):
    ours, theirs = [inspect.signature(f).parameters for f in (factory_of(name), getattr(torch.optim, name))]
    shared = ours.keys() & theirs.keys()
    assert "lr" in shared
    assert {key: ours[key].default for key in shared} == {key: theirs[key].default for key in shared}


@same
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_equals_torch_in_double_precision(name, options, dtype, device, double):
    if dtype.is_complex and name in REAL:
        pytest.skip("torch.optim has it for real numbers only")
    ours, theirs = both(factory_of(name)(**options), name, dtype, device, **options)
    assert run(ours, theirs) < 1e-12
    if name == "ASGD":
        averages = fo.tree.flatten(fo.tree.get(ours.state, "ax"))[0]
        assert deviation(averages, [theirs.state[p]["ax"] for p in parameters(theirs)]) < 1e-12


@same
def test_equals_torch_in_single_precision_to_a_few_units_in_the_last_place(name, options, device):
    pair = both(factory_of(name)(**options), name, torch.float32, device, **options)
    # Gradients up to 10: larger ones would move parameters up and down by more than they keep digits.
    assert run(*pair, scale=0.01) < 36 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_case(
    [
        ("AdamW", {"lr": 0.1, "weight_decay": 0.1}),
        ("Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ]
)
def test_half_precision_is_computed_as_torchs_fused_kernels_do(name, options, dtype):
    pair = both(factory_of(name)(**options), name, dtype, **options, fused=True)
    # The kernel rounds parameters once, we round the update and the sum: one unit in the last place a step.
    assert run(*pair, steps=10, scale=0.01) < 10 * torch.finfo(dtype).eps


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
    assert run(*both(ours, "Adam", torch.float64, **theirs)) > 1e-10


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_global_norm_clipping_equals_torch(norm_type, size, device):
    params = awkward_tree(torch.float64, device)
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

    def paper(theta, grads, alpha, beta_1, beta_2, epsilon):
        m = v = np.zeros_like(theta)
        for t, g in enumerate(grads, 1):
            m = beta_1 * m + (1 - beta_1) * g
            v = beta_2 * v + (1 - beta_2) * g**2
            theta = theta - alpha * (m / (1 - beta_1**t)) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
            yield theta

    def adam(alpha, beta_1, beta_2, epsilon):
        return fo.adam(alpha, (beta_1, beta_2), epsilon)

    numbers = {"alpha": 0.1, "beta_1": 0.9, "beta_2": 0.99, "epsilon": 1e-3}
    testing.check_against(adam, paper, numbers, as_array=np.asarray, steps=60, examples=5)


def test_adadelta_equals_its_paper():
    """Zeiler, algorithm 1, in numpy."""

    def paper(x, grads, rho, epsilon):
        mean_g = mean_dx = np.zeros_like(x)
        for g in grads:
            mean_g = rho * mean_g + (1 - rho) * g**2
            dx = -np.sqrt(mean_dx + epsilon) / np.sqrt(mean_g + epsilon) * g
            mean_dx = rho * mean_dx + (1 - rho) * dx**2
            x = x + dx
            yield x

    def adadelta(rho, epsilon):
        return fo.adadelta(1.0, rho, epsilon)

    testing.check_against(adadelta, paper, {"rho": 0.95, "epsilon": 1e-6}, as_array=np.asarray, steps=60, examples=5)


def test_adams_derivative_is_exact_where_nothing_has_fired():
    """At g = 0 the first update is -lr g / (|g| + eps): its derivative there is -lr / eps."""
    lr, eps = 0.1, 1e-3
    tx = fo.adam(lr, eps=eps)
    params = torch.zeros(3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda g: tx.update(g, tx.init(params))[0])(torch.zeros_like(params))
    torch.testing.assert_close(jacobian, -lr / eps * torch.eye(3, dtype=torch.float64), rtol=1e-12, atol=0)
