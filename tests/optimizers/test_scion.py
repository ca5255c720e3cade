"""Scion: the formulas of its paper in numpy, and another program where it is installed."""

import numpy as np
import pytest
import torch
from matrix_optimizers import newton_schulz, problem, trained

import functorch_optim as fo


def lmo(m, norm):
    out, columns = m.shape[0], m[0].size
    flat = m.reshape(out, columns)
    if norm == "spectral":
        into = m.shape[1]
        u = newton_schulz(flat, clamps=False) * np.sqrt(out / into) / (columns // into)
    elif norm == "sign":
        u = np.sign(flat) / m.shape[1]
    elif norm == "row":
        u = flat / (np.linalg.norm(flat, axis=1, keepdims=True) * np.sqrt(columns) + 1e-8)
    elif norm == "col":
        u = flat / (np.linalg.norm(flat, axis=0, keepdims=True) / np.sqrt(out) + 1e-8)
    else:
        u = m / (np.sqrt((m * m).mean()) + 1e-8)
    return u.reshape(m.shape)


def numpy_scion(p, grads, lr, a, norm, scale, unconstrained=False):
    m = np.zeros_like(p)
    for g in grads:
        m = (1 - a) * m + a * g
        p = (p if unconstrained else (1 - lr) * p) - lr * scale * lmo(m, norm)
    return p


@pytest.mark.parametrize("unconstrained", [False, True])
@pytest.mark.parametrize("norm", ["spectral", "sign", "row", "col", "rms"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 2, 2)], ids=str)
def test_scion_equals_its_formula(shape, norm, unconstrained):
    p, grads = problem(*shape)
    ours = trained(fo.scion(0.1, 0.3, norm, 2.0, unconstrained, ns_dtype=None), p, grads)
    np.testing.assert_allclose(ours, numpy_scion(p, grads, 0.1, 0.3, norm, 2.0, unconstrained), rtol=1e-10, atol=1e-13)
    for wrong in (
        numpy_scion(p, grads, 0.1, 0.3, norm, 2.01, unconstrained),
        numpy_scion(p, grads, 0.1, 1.0, norm, 2.0),
    ):
        assert np.abs(ours - wrong).max() > 1e-5


@pytest.mark.parametrize(("shape", "norm"), [((5, 3), "spectral"), ((3, 4, 2, 2), "spectral"), ((4,), "rms")], ids=str)
def test_auto_goes_by_the_number_of_dimensions(shape, norm):
    p, grads = problem(*shape)
    ours = trained(fo.scion(0.1, ns_dtype=None), p, grads)
    np.testing.assert_array_equal(ours, trained(fo.scion(0.1, 1.0, norm, ns_dtype=None), p, grads))


@pytest.mark.parametrize(("norm", "number"), [("auto", 1), ("sign", 4), ("row", 7), ("col", 6)])
def test_scion_equals_another_program(norm, number):
    """pytorch_optimizer, whose iteration is in bfloat16."""
    package = pytest.importorskip("pytorch_optimizer")
    p, grads = problem(6, 4)
    theirs = torch.tensor(p, dtype=torch.float32).requires_grad_()
    opt = package.SCION([theirs], lr=0.1, momentum=0.3, constraint=True, norm_type=number, scale=2.0)
    for g in grads:
        theirs.grad = torch.tensor(g, dtype=torch.float32)
        opt.step()
    ours = trained(fo.scion(0.1, 0.3, norm, 2.0), p, grads, torch.float32)
    assert np.abs(ours - theirs.detach().double().numpy()).max() < (5e-3 if norm == "auto" else 1e-6)
    assert np.abs(ours - p).max() > 0.1


def test_weights_stay_in_the_ball():
    """In its infinity norm: what begins inside it is a mean of points of it."""
    p, grads = problem(6, 4)
    p = p / np.abs(p).max() / 2
    assert np.abs(trained(fo.scion(0.5, 1.0, "sign", 2.0), p, grads)).max() <= 0.5
    assert np.abs(trained(fo.scion(0.5, 1.0, "sign", 2.0, unconstrained=True), p, grads)).max() > 0.5


def test_sign_has_derivatives_of_lr_and_scale_alone():
    g = torch.tensor([[0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    lr, a, scale = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.5, 2.0)]
    p = torch.ones_like(g)
    tx = fo.scion(lr, a, "sign", scale)
    updates, _ = tx.update(g, tx.init(p), p)
    found = torch.autograd.grad(updates.sum(), (g, lr, a, scale), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found[1], torch.tensor(-2.0, dtype=torch.float64))  # -(scale lmo + p), summed
    assert [one.abs().max().item() for one in (found[0], found[2], found[3])] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("norm", ["auto", "row", "col", "rms"])
def test_where_gradients_are_zero_everything_is_finite(norm):
    g = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    tx = fo.scion(0.1, 0.5, norm, ns_dtype=None)
    updates, _ = tx.update(g, tx.init(g), g)
    [found] = torch.autograd.grad(updates.sum(), g)
    assert torch.isfinite(found).all()
    assert updates.abs().max() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.scion(norm="nuclear"), "Invalid norm: 'nuclear'; choose 'auto', 'spectral'"),
        (lambda: fo.scion(momentum=1.5), "Invalid momentum: 1.5; it needs 0 <= value <= 1"),
        (lambda: fo.scion(scale=-1.0), "Invalid scale: -1.0"),
        (lambda: fo.scion(ns_dtype="float16"), "Invalid ns_dtype: 'float16'"),
        (
            lambda: fo.scion(norm="spectral").init({"b": torch.ones(3)}),
            r"At 'b': The norm 'spectral' is one of matrices",
        ),
        (lambda: fo.scion().init(torch.ones(2, 2, dtype=torch.complex64)), "Scion does not support complex"),
    ],
)
def test_what_cannot_be_is_said(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
