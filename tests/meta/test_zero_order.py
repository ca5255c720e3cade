"""Zero-order gradients: their expectation within its statistical error, their variance, and what f may be."""

import numpy as np
import pytest
import torch

import functorch_optim as fo
from functorch_optim.meta import zero_order_grad

pytestmark = pytest.mark.smoke

F64 = torch.float64
ESTIMATORS = ["naive", "forward", "antithetic"]
each = pytest.mark.parametrize("estimator", ESTIMATORS)
X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
SIGMA = 0.3
SLOPE, CURVATURE = torch.tensor([1.0, 2.0, -1.0], dtype=F64), torch.diag(torch.tensor([1.0, 0.0, 3.0], dtype=F64))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quadratic(x):
    return x @ CURVATURE @ x / 2 + SLOPE @ x


def estimator_of(function, seed=0, **options):
    return zero_order_grad(function, sigma=SIGMA, generator=generator(seed), **options)


def estimates(function, count, seed=0, x=X, **options):
    """Give `count` independent estimates."""
    return torch.vmap(estimator_of(function, seed, **options), randomness="different")(x.expand(count, *x.shape))


def z_scores(samples, expected):
    """How many standard errors the mean is away from what is expected."""
    return (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5)


# Expectation and variance. --------------------------------------------------------------------------------------------


@each
def test_the_expectation_is_the_gradient(estimator):
    samples = estimates(quadratic, 4000, estimator=estimator)
    gradient = torch.func.grad(quadratic)(X)
    assert z_scores(samples, gradient).abs().max() < 4  # 1 in 5000 for three numbers, and the seed is fixed
    # Negative controls: the check sees multiplication by sigma in place of division, and an error of a fourth.
    assert z_scores(samples * SIGMA**2, gradient).abs().max() > 4
    assert z_scores(samples * 1.25, gradient).abs().max() > 4


@each
def test_the_expectation_is_the_gradient_of_the_smoothed_function(estimator):
    """E[sin(x + s z)] = exp(-s^2 / 2) sin x, and a step has the density as its derivative."""
    x = torch.tensor([0.4], dtype=F64)
    for function, expected in [
        (lambda x: x.sin().sum(), (-(SIGMA**2) / 2 + x.cos().log()).exp()),
        (lambda x: (x > 0.5).double().sum(), torch.distributions.Normal(0.5, SIGMA).log_prob(x).exp()),
    ]:
        samples = estimates(function, 6000, x=x, estimator=estimator)
        assert z_scores(samples, expected).abs().max() < 4
        assert z_scores(samples, 1.25 * expected).abs().max() > 4


def test_antithetic_is_exact_where_only_the_slope_counts():
    """For a quadratic, (f(x + s z) - f(x - s z)) / 2 s is f'z; with z = +-1 in one dimension that is f' times z."""

    def signs(shape, generator, dtype, device):
        return torch.randint(2, shape, generator=generator, device=device).to(dtype) * 2 - 1

    samples = estimates(lambda x: 3 * x @ x + x.sum(), 10, x=X[:1], sampler=signs)
    assert (samples - (6 * X[:1] + 1)).abs().max() < 1e-12
    forward = estimates(lambda x: 3 * x @ x + x.sum(), 10, x=X[:1], sampler=signs, estimator="forward")
    assert (forward - (6 * X[:1] + 1)).abs().max() > 0.1


def test_variances():
    curved = lambda x: 10 + quadratic(x) + 5 * x @ x
    naive, forward, antithetic = [estimates(curved, 2000, x=X / 10, estimator=e).var(0).sum() for e in ESTIMATORS]
    assert 2 * antithetic < forward < naive / 2
    odd = lambda x: (x**3).sum()
    forward, antithetic = [estimates(odd, 2000, x=0 * X + 1, estimator=e).var(0).sum() for e in ESTIMATORS[1:]]
    assert 1.1 * antithetic < forward
    one, many = [estimates(curved, 1500, seed=n, samples=n, vectorize=True).var(0).sum() for n in (1, 16)]
    assert 16 / 1.25 < one / many < 16 * 1.25


# What goes in and comes out. ------------------------------------------------------------------------------------------


@each
def test_the_same_numbers_in_a_loop_and_by_vmap_and_from_the_same_generator(estimator):
    def two(vectorize, seed=0):
        grad = estimator_of(quadratic, seed, estimator=estimator, samples=7, vectorize=vectorize)
        return torch.stack([grad(X), grad(X)])

    loop, again, batched = [two(vectorize) for vectorize in (False, False, True)]
    assert torch.equal(loop, again)
    assert torch.allclose(loop, batched, rtol=1e-12)
    assert not torch.equal(loop[0], loop[1])
    assert not torch.equal(loop, two(False, seed=1))


def test_trees_argnums_and_complex_numbers():
    a = {"w": torch.ones(2, 2, dtype=F64), "none": None, "c": torch.tensor(1 + 2j, dtype=torch.complex128)}
    b = [torch.tensor(3.0, dtype=F64)]

    def f(a, name, b, scale=1.0):
        assert name == "name"
        return scale * ((a["w"] ** 2).sum() + a["c"].abs() ** 2 + 2 * b[0])

    options = {"sigma": SIGMA, "samples": 40_000, "vectorize": True}
    first = zero_order_grad(f, generator=generator(), **options)(a, "name", b, scale=2.0)
    assert list(first) == ["w", "none", "c"]
    assert first["none"] is None
    assert (first["w"] - 4).abs().max() < 0.3
    assert abs(first["c"] - (4 + 8j)) < 0.4
    both = zero_order_grad(f, (2, 0), generator=generator(), **options)(a, "name", b, scale=2.0)
    assert abs(both[0][0] - 4) < 0.4
    last = zero_order_grad(f, -1, generator=generator(), **options)(a, "name", b)
    assert abs(last[0] - 2) < 1e-1


def test_functions_may_leave_torch_and_have_jumps():
    def f(x):
        return np.float32(sum(round(100 * number) for number in x.tolist()) / 100)

    grad = zero_order_grad(f, samples=2000, sigma=0.1, generator=generator())
    assert (grad(torch.zeros(2, requires_grad=True)) - 1).abs().max() < 0.1
    assert not grad(torch.zeros(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = torch.tensor([1.0, -2.0], dtype=dtype)
    grad = zero_order_grad(lambda x: (x * x).sum(), samples=20_000, sigma=0.25, generator=generator(), vectorize=True)
    assert grad(x).dtype == dtype
    assert (grad(x) - 2 * x).abs().max() < 0.25


def test_small_differences_of_large_numbers_survive_in_float64():
    grad = zero_order_grad(lambda x: 1e9 + float(x), sigma=0.5, samples=50, generator=generator())
    assert 0.3 < grad(torch.zeros(())) < 3


def test_it_learns_a_learning_rate_from_the_outcomes_of_training():
    target = torch.tensor([1.0, -2.0])

    def outcome(log_lr):
        w, tx = torch.zeros(2), fo.sgd(log_lr.exp(), momentum=0.5)
        state = tx.init(w)
        for _ in range(5):
            updates, state = tx.update(2 * (w - target), state, w)
            w = fo.apply_updates(w, updates)
        return (w - target).square().sum()

    log_lr, tx = torch.tensor(-5.0), fo.adam(0.2)
    state, before = tx.init(log_lr), outcome(log_lr)
    grad = zero_order_grad(outcome, sigma=0.1, samples=4, generator=generator(), vectorize=True)
    for _ in range(30):
        updates, state = tx.update(grad(log_lr), state)
        log_lr = fo.apply_updates(log_lr, updates)
    assert outcome(log_lr) < 0.05 * before


def test_errors():
    with pytest.raises(ValueError, match="Invalid estimator: 'central'; choose 'naive', 'forward' or 'antithetic'"):
        zero_order_grad(quadratic, estimator="central")
    for samples, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="Invalid samples: .* an integer >= 1"):
            zero_order_grad(quadratic, samples=samples)
    with pytest.raises(ValueError, match="Invalid sigma: 0; it needs value > 0"):
        zero_order_grad(quadratic, sigma=0)
    with pytest.raises(ValueError, match=r"must return a number or a 0-dim tensor, got a tensor of shape \(3,\)"):
        zero_order_grad(lambda x: x)(X)
    with pytest.raises(ValueError, match="must return a number or a 0-dim tensor, got a NoneType"):
        zero_order_grad(lambda x: None)(X)
    with pytest.raises(TypeError, match="at '0.n' has dtype torch.int64"):
        zero_order_grad(lambda x: 1.0)({"n": torch.tensor(1)})
