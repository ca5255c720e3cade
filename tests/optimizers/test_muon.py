"""Muon, NorMuon and their parts: the formulas of their papers in numpy, and other programs where they are installed."""

import numpy as np
import pytest
import torch
from matrix_optimizers import JORDAN, newton_schulz, problem, trained

import functorch_optim as fo
from functorch_optim.optimizers._newton_schulz import PRESETS

POLAR_EXPRESS = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def numpy_muon(p, grads, lr, weight_decay, mu, scale, **options):
    b = np.zeros_like(p)
    for g in grads:
        b = mu * b + (1 - mu) * g
        u = newton_schulz(mu * b + (1 - mu) * g, **options)
        p = (1 - lr * weight_decay) * p - lr * scale(*p.shape[-2:]) * u
    return p


def numpy_normuon(p, grads, lr, weight_decay, mu, beta2, eps, axis=-1):
    b, v = np.zeros_like(p), 0.0
    for g in grads:
        b = mu * b + (1 - mu) * g
        u = newton_schulz(mu * b + (1 - mu) * g, clamps=False)
        v = beta2 * v + (1 - beta2) * (u * u).mean(axis, keepdims=True)
        o = u / (np.sqrt(v) + eps)
        o = o * np.linalg.norm(u) / np.linalg.norm(o)
        p = (1 - lr * weight_decay) * p - lr * np.sqrt(max(1, p.shape[0] / p.shape[1])) * o
    return p


def jordan(rows, columns):
    return np.sqrt(max(1, rows / columns))


SCALES = {
    None: jordan,
    "original": jordan,
    "match_rms_adamw": lambda rows, columns: 0.2 * np.sqrt(max(rows, columns)),
    "unit_rms": lambda rows, columns: np.sqrt(rows / columns),
}


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 6)], ids=str)
@pytest.mark.parametrize("adjust_lr_fn", SCALES)
def test_muon_equals_its_formula(shape, adjust_lr_fn):
    p, grads = problem(*shape)
    ours = trained(fo.muon(0.1, 0.2, 0.9, adjust_lr_fn=adjust_lr_fn, ns_dtype=None), p, grads)
    np.testing.assert_allclose(ours, numpy_muon(p, grads, 0.1, 0.2, 0.9, SCALES[adjust_lr_fn]), rtol=1e-11)
    wrong = numpy_muon(p, grads, 0.1, 0.2, 0.901, SCALES[adjust_lr_fn])
    assert np.abs(ours - wrong).max() > 1e-7  # the comparison can fail


@pytest.mark.parametrize(
    ("given", "triples", "margin"),
    [
        ("jordan", JORDAN, 1.0),
        ("polar_express", POLAR_EXPRESS, 1.02),
        (POLAR_EXPRESS, POLAR_EXPRESS, 1.0),
        ("deepseek_v4", JORDAN[:1] * 8 + [(2.0, -1.5, 0.5)] * 2, 1.0),
        ("cans", PRESETS["cans"], 1.0),
        ([list(triple) for triple in POLAR_EXPRESS[:3]], POLAR_EXPRESS[:3] + POLAR_EXPRESS[2:3] * 2, 1.0),
    ],
    ids=["jordan", "polar_express", "triples", "deepseek_v4", "cans", "the_last_is_repeated"],
)
def test_coefficients_by_name_and_by_iteration(given, triples, margin):
    p, grads = problem(4, 6)
    ours = trained(fo.muon(0.1, 0.0, ns_coefficients=given, ns_dtype=None), p, grads)
    np.testing.assert_allclose(
        ours, numpy_muon(p, grads, 0.1, 0.0, 0.95, jordan, triples=triples, margin=margin), rtol=1e-10
    )
    assert np.abs(ours - numpy_muon(p, grads, 0.1, 0.0, 0.95, jordan, triples=triples[:-1], margin=margin)).max() > 1e-4


@pytest.mark.parametrize(("name", "distance"), [("jordan", 0.35), ("polar_express", 0.2), ("deepseek_v4", 0.01)])
def test_singular_values_end_near_one(name, distance):
    """Of a matrix that is not too ill-conditioned. Jordan's coefficients do not converge."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(6, 6, dtype=torch.float64))
    g = u @ torch.diag(torch.linspace(0.2, 1.0, 6, dtype=torch.float64)) @ v
    tx = fo.scale_by_muon(0.0, ns_coefficients=name, ns_dtype=None)
    values = torch.linalg.svdvals(tx.update(g, tx.init(g))[0])
    assert (values - 1).abs().max() < distance


@pytest.mark.parametrize(
    ("shape", "flatten", "as_matrix"),
    [
        ((4, 3, 2, 2), None, (4, 12)),
        ((4, 3, 2, 2), False, (12, 2, 2)),
        ((4, 3, 5), None, (4, 3, 5)),
        ((4, 3, 5), True, (4, 15)),
    ],
    ids=str,
)
@pytest.mark.parametrize("factory", [fo.muon, fo.normuon])
def test_convolutions_are_flattened_and_leading_dimensions_are_stacks(factory, shape, flatten, as_matrix):
    p, grads = problem(*shape)
    ours = trained(factory(0.1, 0.1, flatten=flatten, ns_dtype=None), p, grads).reshape(as_matrix)
    matrices = p.reshape(-1, *as_matrix[-2:])
    for k, matrix in enumerate(matrices):
        own = [g.reshape(matrices.shape)[k] for g in grads]
        expected = trained(factory(0.1, 0.1, ns_dtype=None), matrix, own)
        np.testing.assert_allclose(ours.reshape(matrices.shape)[k], expected, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matrices_of_one_shape_are_orthogonalized_together_to_the_same_numbers(dtype):
    torch.manual_seed(0)
    params = {name: torch.randn(4, 6).to(dtype) for name in "abc"} | {"d": torch.randn(6, 4).to(dtype)}
    grads = fo.tree.map(torch.randn_like, params)
    for tx in (fo.muon(0.1, ns_dtype=None), fo.normuon(0.1, ns_dtype=None), fo.scion(0.1, 0.5, ns_dtype=None)):
        state, states = tx.init(params), {name: tx.init(p) for name, p in params.items()}
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            for name, p in params.items():
                own, states[name] = tx.update(grads[name], states[name], p)
                torch.testing.assert_close(updates[name], own, rtol=0, atol=8 * torch.finfo(dtype).eps)
        assert fo.tree.get(state, "momentum_buffer")["a"].untyped_storage().nbytes() == 24 * params["a"].element_size()


def test_they_are_run_together(monkeypatch):
    calls = []
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda function: calls.append(function) or vmap(function))
    params = [torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 3), torch.ones(64, 64), torch.ones(64, 64)]
    tx = fo.muon(0.1)
    tx.update(params, tx.init(params), params)
    assert len(calls) == 1  # large ones gain nothing on the CPU


@pytest.mark.parametrize("axis", [-1, -2, None])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_normuon_equals_its_formula(shape, axis):
    p, grads = problem(*shape)
    ours = trained(fo.normuon(0.1, 0.2, 0.9, 0.8, 1e-10, axis=axis, ns_dtype=None), p, grads)
    own = axis or (-1 if shape[0] >= shape[1] else -2)
    expected = numpy_normuon(p, grads, 0.1, 0.2, 0.9, 0.8, 1e-10, own)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-11)  # eps is added before the scale
    assert np.abs(ours - numpy_normuon(p, grads, 0.1, 0.2, 0.9, 0.81, 1e-10, own)).max() > 1e-4


@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_normalized_rows_that_are_zero_stay_zero(eps):
    tx = fo.normalize_rows(eps=eps)
    for g in (torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]])):
        state = tx.init(g)
        updates, state = tx.update(g, state)
        torch.testing.assert_close(updates, g)


def test_normuon_leaves_dead_rows_alone():
    g = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    tx = fo.normuon(0.1)
    state = tx.init(g)
    for grad in (torch.zeros(2, 2), g):
        updates, state = tx.update(grad, state)
        assert torch.isfinite(updates).all()
        assert updates[1].abs().max() == 0


def test_normuon_equals_another_program():
    """pytorch_optimizer, whose iteration is in bfloat16."""
    package = pytest.importorskip("pytorch_optimizer")
    p, grads = problem(6, 4)
    theirs = torch.tensor(p, dtype=torch.float32).requires_grad_()
    groups = [{"params": [theirs], "use_muon": True, "lr": 0.1, "weight_decay": 0.1}]
    opt = package.NorMuon(groups, momentum=0.9, beta2=0.8, foreach=False)
    for g in grads:
        theirs.grad = torch.tensor(g, dtype=torch.float32)
        opt.step()
    ours = trained(fo.normuon(0.1, 0.1, 0.9, 0.8), p, grads, torch.float32)
    assert np.abs(ours - theirs.detach().double().numpy()).max() < 2e-3
    assert np.abs(ours - p).max() > 0.1


@pytest.mark.sampled(size=2)
@pytest.mark.parametrize("name", PRESETS)
def test_derivatives_through_the_iteration_are_exact(name):
    torch.manual_seed(0)
    g, p = torch.randn(2, 3, 4, dtype=torch.float64).unbind()

    def loss(g, lr, momentum):
        tx = fo.chain(fo.scale_by_muon(momentum, ns_coefficients=name, ns_dtype=None), fo.scale_by_learning_rate(lr))
        state = tx.init(p)
        for k in (1.0, 0.5):
            updates, state = tx.update(k * g + k * k, state, p)
        return (p + updates).sin().sum()

    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.9)]
    assert torch.autograd.gradcheck(loss, (g.requires_grad_(), *numbers), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (g, *numbers), rtol=1e-2, atol=1e-5)


def test_coefficients_have_derivatives():
    g = torch.randn(3, 2, dtype=torch.float64)

    def loss(*values):
        triples = (values[:3], values[3:])
        tx = fo.scale_by_muon(0.0, ns_coefficients=triples, ns_steps=2, ns_dtype=None)
        return tx.update(g, tx.init(g))[0].sin().sum()

    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.4, -4.7, 2.0, 2.0, -1.5, 0.5)]
    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("factory", [fo.muon, fo.normuon, fo.scion])
def test_training_runs_under_vmap(factory):
    p = torch.randn(3, 4, 2, dtype=torch.float64)
    tx = factory(0.1, ns_dtype=None)

    def step(p):
        return fo.step(tx, p.sin(), tx.init(p), p)[0]

    torch.testing.assert_close(torch.vmap(step)(p), torch.stack([step(one) for one in p]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.muon(ns_coefficients="newton"), "Invalid ns_coefficients: 'newton'; choose 'jordan', 'polar_"),
        (lambda: fo.muon(ns_coefficients=[(1.0, 2.0, "3")]), "Invalid ns_coefficients at index 2: '3' is a str"),
        (lambda: fo.muon(ns_coefficients=[(1.0, 2.0)]), "give 3 numbers, as in ns_coefficients="),
        (lambda: fo.muon(flatten="yes"), "Invalid flatten: 'yes'; choose True, False or None"),
        (lambda: fo.muon(ns_dtype="bf16"), "Invalid ns_dtype: 'bf16'; give a floating-point dtype, such as torch.bf"),
        (lambda: fo.normuon(ns_dtype=torch.int32), "Invalid ns_dtype: torch.int32"),
        (lambda: fo.normuon(beta2=1.0), "Invalid beta2: 1.0; it needs 0 <= value < 1"),
        (lambda: fo.normuon(axis=0), "Invalid axis: 0; choose -1, -2 or None"),
        (
            lambda: fo.normuon().init({"b": torch.ones(3)}),
            r"At 'b': Muon is for matrices, but .* \(3,\); give it .* muon_with_adamw",
        ),
        (lambda: fo.normalize_rows().init(torch.ones(3)), "Muon is for matrices"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
