"""Clipping where it is easily wrong: NaN, complex tensors, orders of the norm, corners."""

import pytest
import torch

import functorch_optim as fo

pytestmark = pytest.mark.smoke


def updated(tx, grads):
    return tx.update(grads, tx.init(grads))[0]


@pytest.mark.parametrize("norm_type", [0.5, 1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_each_tensor_is_clipped_to_its_norm(norm_type, dtype):
    grads = {"long": 3 * torch.randn(4, 3, dtype=dtype), "short": 1e-3 * torch.randn(5, dtype=dtype)}
    clipped = updated(fo.clip_by_norm(0.5, norm_type), grads)
    norm = torch.linalg.vector_norm(grads["long"], norm_type)
    torch.testing.assert_close(clipped["long"], grads["long"] * 0.5 / norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(clipped["short"], grads["short"], rtol=0, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_one_complex_tensor_is_clipped_alike_by_itself_and_as_a_tree(norm_type):
    grad = torch.tensor([3 + 4j, 1 - 1j], dtype=torch.complex128)
    alone = updated(fo.clip_by_norm(1.0, norm_type), grad)
    torch.testing.assert_close(alone, updated(fo.clip_by_global_norm(1.0, norm_type), grad), rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(alone, norm_type).item(), 1.0, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_by_default_a_norm_that_is_not_finite_does_what_it_does_in_torch(bad):
    grads = {"a": torch.tensor([bad, 1.0]), "b": torch.tensor([1e6])}
    params = [torch.zeros(2), torch.zeros(1)]
    for param, grad in zip(params, grads.values(), strict=True):
        param.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    clipped = updated(fo.clip_by_global_norm(1.0), grads)
    for ours, param in zip(clipped.values(), params, strict=True):
        torch.testing.assert_close(ours, param.grad, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_skipped_updates_have_derivative_zero(bad):
    tx = fo.clip_by_global_norm(1.0, nonfinite="skip")
    gradient = torch.func.grad(lambda g: updated(tx, g).sum())(torch.tensor([bad, 1.0]))
    assert torch.equal(gradient, torch.zeros(2))


def test_at_the_corner_the_derivative_is_that_of_what_fits():
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for tx in (fo.clip_by_norm(5.0), fo.clip_by_global_norm(5.0)):
        jacobian = torch.func.jacrev(lambda g, tx=tx: updated(tx, g))(g)
        assert torch.equal(jacobian, torch.eye(2, dtype=torch.float64))
    inside = torch.func.grad(lambda g: updated(fo.clip(3.0), g).sum())(g)
    assert torch.equal(inside, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_eps_is_a_hyperparameter_and_the_order_a_number():
    grads = torch.tensor([3.0, 4.0], dtype=torch.float64)
    expected = updated(fo.clip_by_global_norm(1.0, eps=1e-2), grads)
    for eps in (torch.tensor(1e-2, dtype=torch.float64), lambda step: 1e-2, fo.schedules.constant(1e-2)):
        assert torch.equal(updated(fo.clip_by_global_norm(1.0, eps=eps), grads), expected)
    for norm_type in (torch.tensor(2.0), lambda step: 2.0, None):
        for factory in (fo.clip_by_norm, fo.clip_by_global_norm):
            with pytest.raises(TypeError, match="Invalid norm_type: .*; give a number"):
                factory(1.0, norm_type)


def test_raising_is_refused_where_values_are_not_known():
    tx = fo.clip_by_global_norm(1.0, nonfinite="raise")
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda g: updated(tx, g))(torch.ones(2, 3))


def test_float64_gradients_beside_float32_ones_are_clipped_to_their_own_precision():
    narrow, wide = torch.randn(40, 30), torch.randn(6, dtype=torch.float64)
    tx = fo.clip_by_global_norm(0.5)

    def clipped(narrow, wide):
        return tx.update((narrow, wide), tx.init((narrow, wide)))[0][1]

    expected = 0.5 * wide / torch.cat([narrow.double().flatten(), wide]).norm()
    torch.testing.assert_close(clipped(narrow, wide), expected, rtol=1e-14, atol=0)
    batched = torch.vmap(clipped)(torch.stack([narrow, 2 * narrow]), torch.stack([wide, 2 * wide]))
    torch.testing.assert_close(batched[0], expected, rtol=1e-14, atol=0)
