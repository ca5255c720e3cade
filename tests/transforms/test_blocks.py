"""The transformations around optimizers have the numbers of their papers, in numpy, also at NaN, zeros and corners."""

import numpy as np
import pytest
import torch

import functorch_optim as fo
from functorch_optim import testing


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def updated(tx, grads, params=None):
    return tx.update(grads, tx.init(grads if params is None else params), params)[0]


def run(tx, norms):
    """Transform one-element gradients of these sizes; return what becomes of them, and the state."""
    state, sizes = tx.init(torch.zeros(1, dtype=torch.float64)), []
    for norm in norms:
        u, state = tx.update(double([norm]), state)
        sizes.append(u.item())
    return sizes, state


# Rules in numpy: a function of a gradient, its parameter, and the gradients before. ---------------------------------


def norm(x):
    return np.sqrt((np.asarray(x) ** 2).sum())


def units(x):
    x = np.asarray(x)
    return norm(x) if x.ndim <= 1 else np.sqrt((x**2).sum(axis=tuple(range(1, x.ndim)), keepdims=True))


def agc(g, p, before, clipping, eps):
    largest = clipping * np.maximum(units(p), eps)
    return np.where(units(g) > largest, g * largest / np.maximum(units(g), 1e-6), g)


def block_rms(g, p, before, threshold):
    return g / max(1.0, np.sqrt((g**2).mean()) / threshold) if g.size else g


def trust_ratio(g, p, before, min_norm, trust_coefficient, eps):
    ours, theirs = max(norm(p), min_norm), max(norm(g), min_norm)
    return g * (trust_coefficient * ours / (theirs + eps) if ours and theirs else 1.0)


def centralized(g, p, before):
    return g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 and g.size else g


def orthogonal(g, p, before):
    if g.size <= 1 or not norm(g):
        return 0 * g
    across = g - p * ((p * g).sum() / (p * p).sum()) if norm(p) else g
    return across * norm(g) / norm(across) if norm(across) > 1e-12 * norm(g) else 0 * g


def nonnegative(g, p, before):
    return np.maximum(g, -p)


def averaged(g, p, before, decay):
    total = 0 * g
    for old in (*before, g):
        total = decay * total + (1 - decay) * old
    return total / (1 - decay ** (len(before) + 1))


def optimistic(g, p, before, alpha, beta):
    return (alpha + beta) * g - beta * (before[-1] if before else g)


RULES = [
    (fo.adaptive_grad_clip, agc, {"clipping": 0.3, "eps": 0.5}),
    (fo.clip_by_block_rms, block_rms, {"threshold": 0.5}),
    (fo.scale_by_trust_ratio, trust_ratio, {"min_norm": 0.0, "trust_coefficient": 0.5, "eps": 0.1}),
    (fo.scale_by_trust_ratio, trust_ratio, {"min_norm": 0.7, "trust_coefficient": 1.0, "eps": 0.0}),
    (fo.centralize, centralized, {}),
    (fo.orthogonalize_against_params, orthogonal, {}),
    (fo.keep_params_nonnegative, nonnegative, {}),
    (fo.ema, averaged, {"decay": 0.9}),
    (fo.optimistic_gradient, optimistic, {"alpha": 0.7, "beta": 0.4}),
    (fo.scale_by_sign, lambda g, p, before: np.sign(g), {}),
]
of_each_rule = pytest.mark.parametrize(("make", "rule", "numbers"), RULES, ids=[rule.__name__ for _, rule, _ in RULES])


def trained(rule):
    def reference(p, grads, **numbers):
        for t, g in enumerate(grads):
            p = p + rule(g, p, grads[:t], **numbers)
            yield p

    return reference


@pytest.mark.sampled(size=4)
@of_each_rule
def test_it_is_the_formula(make, rule, numbers):
    testing.check_against(make, trained(rule), numbers, as_array=np.asarray, tolerance=1e-10)


@of_each_rule
def test_the_comparison_notices_another_formula(make, rule, numbers):
    with pytest.raises(testing.PropertyError):
        testing.check_against(
            make, trained(lambda *args, **kwargs: 1.0001 * rule(*args, **kwargs)), numbers, as_array=np.asarray
        )


@pytest.mark.parametrize("eps", [0.1, 0.0])
def test_the_norm_of_all_updates_is_the_given_one(eps):
    grads = {"a": 5 * torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    size = norm(np.concatenate([leaf.numpy().ravel() for leaf in grads.values()]))
    for name, u in updated(fo.normalize_by_update_norm(-0.7, eps), grads).items():
        torch.testing.assert_close(u, grads[name] * (-0.7 / (size + eps)), rtol=1e-13, atol=0)


def test_without_the_correction_an_average_begins_at_zero():
    g = double([1.0])
    torch.testing.assert_close(updated(fo.ema(0.9, debias=False), g), double([0.1]))
    torch.testing.assert_close(updated(fo.ema(0.9), g), double([1.0]))


# The history of norms. ------------------------------------------------------------------------------------------------

NORMS = [1.0, 1.4, 0.8, 9.0, 1.1, 0.9, 30.0, 2.0, 1.0, 3.0]


def zclipped(norms, alpha=0.97, z_thresh=2.5, max_grad_norm=1.0, eps=1e-6, warmup_steps=25, **options):
    """Compute ZClip with a list for the warm-up."""
    seen, mean, var, sizes = [], None, None, []
    for n in norms:
        kept, spike = n, False
        if len(seen) < warmup_steps:
            seen.append(n)
            mean, var = np.mean(seen), np.var(seen)
        else:
            sigma = np.sqrt(var)
            z = (n - mean) / (sigma + eps)
            if options.get("mode") == "percentile":
                spike, cut = n > mean + z_thresh * sigma, mean + z_thresh * sigma
            elif options.get("clip_option") == "mean":
                spike, cut = z > z_thresh, mean
            else:
                spike, cut = z > z_thresh, options.get("clip_factor", 1.0) * (mean + z_thresh**2 * sigma / z)
            kept = cut if spike else n
            if not (spike and options.get("skip_update_on_spike")):
                mean = alpha * mean + (1 - alpha) * kept
                var = alpha * var + (1 - alpha) * (kept - mean) ** 2
        largest = kept if max_grad_norm is None else min(kept, max_grad_norm)
        sizes.append(n * largest / (n + eps) if n > largest else n)
    return sizes


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": None, "warmup_steps": 3},
        {"max_grad_norm": None, "warmup_steps": 3, "alpha": 0.5, "z_thresh": 1.0, "eps": 0.1},
        {"max_grad_norm": 1.3, "warmup_steps": 1, "clip_factor": 0.8},
        {"max_grad_norm": None, "warmup_steps": 3, "mode": "percentile"},
        {"max_grad_norm": None, "warmup_steps": 3, "clip_option": "mean"},
        {"max_grad_norm": None, "warmup_steps": 3, "skip_update_on_spike": True},
    ],
)
def test_zclip_is_its_algorithm(options):
    sizes, state = run(fo.zclip(**options), NORMS)
    np.testing.assert_allclose(sizes, zclipped(NORMS, **options), rtol=1e-12)
    assert state.step == state.num_norms == len(NORMS)
    assert not np.allclose(sizes, zclipped(NORMS, **{**options, "alpha": 0.2, "max_grad_norm": 0.9}), rtol=1e-6)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 55.5, 100.0])
@pytest.mark.parametrize("window", [1, 3, 1000])
def test_autoclip_is_numpys_percentile(percentile, window):
    sizes, _ = run(fo.autoclip(percentile, window), NORMS)
    seen = [NORMS[max(0, t + 1 - window) : t + 1] for t in range(len(NORMS))]
    expected = [min(now[-1], np.percentile(now, percentile)) for now in seen]
    np.testing.assert_allclose(sizes, expected, rtol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tx", [fo.zclip(warmup_steps=3), fo.autoclip(40.0)])
def test_a_norm_that_is_not_finite_leaves_no_trace(tx, bad):
    clean, state = run(tx, NORMS)
    sizes, other = run(tx, [*NORMS[:5], bad, *NORMS[5:]])
    np.testing.assert_array_equal(sizes[5], bad)
    np.testing.assert_array_equal([*sizes[:5], *sizes[6:]], clean)
    assert [torch.equal(a, b) for a, b in zip(state[1:], other[1:], strict=True)] == [True] * len(state[1:])

    def total(g):
        return tx.update(g, state)[0].nan_to_num(0.0, 0.0).sum()

    assert torch.func.grad(total)(double([bad])).isfinite().all()


# Zeros and errors. ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        fo.adaptive_grad_clip(0.0, 0.0),
        fo.clip_by_block_rms(0.0),
        fo.scale_by_trust_ratio(),
        fo.normalize_by_update_norm(eps=0.0),
        fo.orthogonalize_against_params(),
        fo.zclip(warmup_steps=1, eps=0.0, max_grad_norm=0.0),
        fo.autoclip(50.0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("complex_", [False, True])
def test_zeros_stay_with_finite_derivatives(tx, complex_):
    zeros = torch.zeros(2, 2, dtype=torch.complex128 if complex_ else torch.float64)

    def total(g, p):
        updates, state = tx.update({"w": g, "none": None}, tx.init({"w": p, "none": None}), {"w": p, "none": None})
        assert updates["none"] is None
        u = tx.update({"w": g, "none": None}, state, {"w": p, "none": None})[0]["w"]
        return (u.real + u.imag if complex_ else u).sum()

    assert total(zeros, zeros) == 0
    for gradient in torch.func.grad(total, argnums=(0, 1))(zeros, zeros):
        assert torch.view_as_real(gradient).isfinite().all() if complex_ else gradient.isfinite().all()


def test_a_gradient_along_the_parameter_has_no_other_part():
    p = torch.randn(5, dtype=torch.float64)
    assert not updated(fo.orthogonalize_against_params(), 3.7 * p, p).any()


def test_a_parameter_never_becomes_negative_in_any_form():
    params = torch.rand(50)
    tx = fo.chain(fo.adam(0.3), fo.keep_params_nonnegative())
    state = tx.init(params)
    for _ in range(5):
        params, state = fo.step(tx, torch.randn(50), state, params)
        assert (params >= 0).all()
    assert (params == 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.adaptive_grad_clip(-0.1), "Invalid clipping value: -0.1; it needs value >= 0"),
        (lambda: fo.clip_by_block_rms(-1.0), "Invalid threshold: -1.0"),
        (lambda: fo.ema(1.0), "Invalid decay: 1.0; it needs 0 <= value < 1"),
        (lambda: fo.zclip(alpha=1.0), "Invalid alpha: 1.0"),
        (lambda: fo.zclip(warmup_steps=0), "Invalid warmup_steps: 0; it needs an integer >= 1"),
        (lambda: fo.zclip(mode="z"), "Invalid mode: 'z'; choose 'zscore' or 'percentile'"),
        (lambda: fo.zclip(clip_option="max"), "Invalid clip_option: 'max'"),
        (lambda: fo.autoclip(101.0), "Invalid percentile: 101.0; it needs 0 <= value <= 100"),
        (lambda: fo.autoclip(10.0, 0), "Invalid window: 0"),
        (lambda: fo.scale_by_trust_ratio(eps=-1.0), "Invalid eps: -1.0"),
        (lambda: fo.normalize_by_update_norm(float("nan")), "Invalid scale_factor: nan"),
        (lambda: fo.optimistic_gradient(float("nan")), "Invalid alpha: nan"),
        (lambda: updated(fo.keep_params_nonnegative(), torch.ones(1)), "keep_params_nonnegative needs the parameters"),
        (lambda: updated(fo.adaptive_grad_clip(0.1), torch.ones(1)), "adaptive_grad_clip needs the parameters"),
    ],
)
def test_what_is_wrong_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["alpha", "z_thresh", "eps", "clip_factor"])
def test_a_tree_for_a_number_of_zclips_statistics_is_an_error_at_once(name):
    with pytest.raises(TypeError, match=f"Invalid {name}: .* is a tree, and here one number is needed"):
        fo.zclip(**{name: {"a": 0.5, "b": 0.25}})
