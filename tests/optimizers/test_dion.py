"""Dion against its algorithm in numpy, and where columns depend on each other."""

import numpy as np
import pytest
import torch
from trajectories import deviation, functional, problem, stateful, tensors

import functorch_optim as fo

NUMBERS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-3}


def first_basis(shape, rank):
    state = fo.dion(rank=rank).init(torch.zeros(shape, dtype=torch.float64))
    return fo.tree.get(state, "Q").numpy()


def dion(p, grads, lr, momentum, weight_decay, rank, eps):
    q, m = first_basis(p.shape, rank), np.zeros_like(p)
    rows, columns = p.shape
    for g in grads:
        m = m + g
        basis = np.linalg.qr(m @ q)[0]
        r = m.T @ basis
        m = m - (1 - momentum) * basis @ r.T
        q = r / (np.linalg.norm(r, axis=0) + eps)
        p = (1 - lr * weight_decay) * p - lr * np.sqrt(rows / columns) * basis @ q.T
        yield p


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 0.5, 1.0])
def test_every_step_is_that_of_the_algorithm(shape, rank):
    params, history = problem(shapes=[shape])
    expected = [[p] for p in dion(params[0], [grads[0] for grads in history], **NUMBERS, rank=rank)]
    assert deviation(functional(fo.dion(**NUMBERS, rank=rank), params, history), expected) < 1e-10
    ours = stateful(lambda params: fo.Optimizer(params, fo.dion, **NUMBERS, rank=rank), params, history)
    assert deviation(ours, expected) < 1e-10
    for changed in ({"momentum": 0.8}, {"eps": 1e-1}, {"lr": 0.2}, {"weight_decay": 0.0}):
        other = functional(fo.dion(**{**NUMBERS, **changed}, rank=rank), params, history)
        assert deviation(other, expected) > 1e-6


@pytest.mark.parametrize(
    ("rank", "shape", "columns"),
    [(3, (8, 5), 3), (9, (8, 5), 5), (0.5, (8, 5), 3), (0.25, (8, 8), 2), (0.1, (5, 30), 1), (1.0, (5, 30), 5)],
)
def test_the_rank_is_a_number_of_columns_or_a_part_of_the_smaller_side(rank, shape, columns):
    assert first_basis(shape, rank).shape == (shape[1], columns)


def test_of_full_rank_the_step_reaches_all_directions():
    """The step of the largest rank has the space of the momentum, with values near one."""
    params, history = problem(shapes=[(4, 4)], steps=30)
    history = [history[0]] * 30  # the power iteration converges
    after = functional(fo.dion(1.0, 0.95, 0.0), params, history)
    step = after[-1][0] - after[-2][0]
    polar = torch.linalg.svd(tensors(history[0])[0])
    torch.testing.assert_close(-step, polar.U @ polar.Vh, rtol=0, atol=0.1)


def test_stacks_and_convolutions_are_matrices():
    random = np.random.default_rng(0)
    stack, kernel = random.normal(size=(2, 4, 3)), random.normal(size=(5, 2, 3, 3))
    tx = fo.dion(0.1, weight_decay=0.0, rank=2)
    params = tensors([stack, kernel])
    updates, state = tx.update(params, tx.init(params))
    flat = torch.tensor(kernel.reshape(5, 18))
    torch.testing.assert_close(updates[1].reshape(5, 18), tx.update(flat, tx.init(flat))[0])
    assert fo.tree.get(state, "Q")[0].shape == (2, 3, 2)
    for i in range(2):
        alone = tx.init(params[0][i])
        alone = fo.tree.set(alone, "Q", fo.tree.get(tx.init(params), "Q")[0][i])
        torch.testing.assert_close(updates[0][i], tx.update(params[0][i], alone)[0])


# Columns that depend on each other. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_of_rank_one_makes_a_step_of_rank_one(dtype):
    """All other directions would be those of rounding errors."""
    g = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).to(dtype)
    tx = fo.dion(1.0, weight_decay=0.0)
    state = tx.init(torch.zeros_like(g))
    updates, after = tx.update(g, state)
    expected = -((4 / 3) ** 0.5) * g / torch.linalg.norm(g)
    torch.testing.assert_close(updates, expected, rtol=1e-5, atol=1e-6)
    kept = fo.tree.get(after, "Q") == fo.tree.get(state, "Q")
    assert kept.all(0).tolist() == [False, True, True]


def test_a_gradient_of_zero_makes_no_step_and_keeps_the_basis():
    params, history = problem(shapes=[(4, 3)], zeros=(0, 1))
    after = functional(fo.dion(weight_decay=0.0), params, history)
    assert torch.equal(after[1][0], tensors(params)[0])
    expected = functional(fo.dion(weight_decay=0.0), params, history[2:])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(after[2:], expected, strict=True))


@pytest.mark.parametrize("rank", [1, 2])
def test_derivatives_are_exact_where_columns_depend_on_each_other(rank):
    left, right = torch.randn(4, rank, dtype=torch.float64), torch.randn(rank, 3, dtype=torch.float64)
    tx = fo.dion(0.1, 0.9, 0.0, eps=0.1)
    state = tx.init(torch.zeros(4, 3, dtype=torch.float64))

    def stepped(left):
        updates, after = tx.update(left @ right, state)
        return updates.sin().sum() + fo.tree.get(after, "Q").sin().sum()

    assert torch.autograd.gradcheck(stepped, left.requires_grad_())
    assert torch.autograd.gradgradcheck(stepped, left)


def test_derivatives_at_zero_are_finite():
    tx = fo.dion()
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        params = torch.zeros(3, 2)
        found = mode(lambda g, params=params: tx.update(g, tx.init(params), params)[0])(params)
        assert found.isfinite().all()


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "Invalid rank: 0; it needs an integer >= 1"),
        ({"rank": 1.5}, ValueError, "Invalid rank: 1.5; it needs 0 < value <= 1"),
        ({"rank": "full"}, TypeError, "Invalid rank: 'full'"),
        ({"momentum": 1.5}, ValueError, "Invalid momentum: 1.5; it needs 0 <= value <= 1"),
        ({"eps": 0.0}, ValueError, "Invalid epsilon value: 0.0; it needs value > 0"),
        ({"generator": 0.5}, TypeError, r"Invalid generator: 0.5; .* as in dion\(generator=0\)"),
    ],
)
def test_arguments_that_cannot_be_used_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        fo.dion(**options)


def test_vectors_and_complex_matrices_are_errors():
    with pytest.raises(ValueError, match=r"At 'b': Dion is for matrices, but this parameter has shape \(3,\)"):
        fo.dion().init({"b": torch.ones(3)})
    with pytest.raises(TypeError, match="Dion does not support complex parameters; give them to another"):
        fo.dion().init(torch.ones(2, 2, dtype=torch.complex64))


def test_the_first_basis_repeats_with_the_key():
    params = torch.zeros(4, 3)
    keys = [0, 0, 1, torch.Generator().manual_seed(0)]
    bases = [fo.tree.get(fo.dion(generator=key).init(params), "Q") for key in keys]
    assert torch.equal(bases[0], bases[1])
    assert not torch.equal(bases[0], bases[2])
    assert not torch.equal(bases[0], bases[3])
