"""SOAP against its formula in numpy and an independent package; and what it promises of bases and derivatives."""

import numpy as np
import pytest
import torch
from sides import along, deviation, error_of_batches, error_of_compiled_steps, make_run, second_moment, trained

import functorch_optim as fo
from functorch_optim.optimizers import soap as module
from functorch_optim.testing._derivatives import differences, error

SHAPES = [(4, 4), (3, 4), (5,), (), (2, 3, 3)]  # of which first moments have no two zero eigenvalues


def formula(
    p,
    grads,
    lr=3e-3,
    betas=(0.95, 0.95),
    eps=1e-8,
    weight_decay=0.01,
    shampoo_beta=None,
    frequency=10,
    max_dim=10000,
    normalize_grads=False,
    maximize=False,
):
    """SOAP of one tensor, with lists of matrices."""
    (b1, b2), sb = betas, betas[1] if shampoo_beta is None else shampoo_beta
    dims = [d for d, n in enumerate(p.shape) if p.ndim > 1 and n <= max_dim]
    m, v, L, Q = np.zeros_like(p), np.zeros_like(p), {}, {}  # noqa: N806 - the letters of the paper
    for n, given in enumerate(grads):
        g = -given if maximize else given
        if n == 0:
            for d in dims:
                L[d] = (1 - sb) * second_moment(g, d)
                Q[d] = np.linalg.eigh(L[d])[1][:, ::-1]
            yield p
            continue
        m = b1 * m + (1 - b1) * g
        rotated, u = g, m
        for d in dims:
            rotated, u = along(rotated, Q[d].T, d), along(u, Q[d].T, d)
        v = b2 * v + (1 - b2) * rotated**2
        u = u / (np.sqrt(v) + eps)
        for d in dims:
            u = along(u, Q[d], d)
        if normalize_grads:
            u = u / np.sqrt((u * u).mean())
        p = p - lr * np.sqrt(1 - b2**n) / (1 - b1**n) * u
        p = (1 - lr * weight_decay) * p
        for d in dims:
            L[d] = sb * L[d] + (1 - sb) * second_moment(g, d)
            if n % frequency == 0:
                order = np.argsort(-np.diag(Q[d].T @ L[d] @ Q[d]))
                v = np.take(v, order, axis=d)
                Q[d] = np.linalg.qr(L[d] @ Q[d][:, order])[0]
        yield p


def ours(p, grads, dtype=torch.float64, **numbers):
    tx, p = fo.soap(**numbers), torch.tensor(p, dtype=dtype)
    state = tx.init(p)
    for g in grads:
        p, state = fo.step(tx, torch.tensor(g, dtype=dtype), state, p)
        yield p.numpy()


COMMON = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}
CASES = {
    "defaults": {},
    "common": {**COMMON, "frequency": 2},
    "each step": {**COMMON, "frequency": 1, "shampoo_beta": 0.7},
    "one side": {**COMMON, "frequency": 1, "max_dim": 3},
    "normalized": {**COMMON, "normalize_grads": True, "frequency": 3},
    "uphill": {**COMMON, "maximize": True},
}
cases = pytest.mark.parametrize("numbers", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_that_of_the_formula(numbers, shape):
    p, grads = make_run(shape)
    assert deviation(ours(p, grads, **numbers), formula(p, grads, **numbers)) < 1e-11


@cases
def test_the_comparison_can_fail(numbers):
    p, grads = make_run((4, 4))
    changed = {**numbers, "lr": numbers.get("lr", 3e-3) * (1 + 1e-7)}
    assert deviation(ours(p, grads, **changed), formula(p, grads, **numbers)) > 1e-10


@pytest.mark.parametrize("shape", [(4, 4), (5,)], ids=str)
@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_every_step_is_that_of_an_independent_package(shape, frequency):
    """It has its bases in float32."""
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    p, grads = make_run(shape)
    theirs = torch.nn.Parameter(torch.tensor(p, dtype=torch.float32))
    numbers = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = package.SOAP([theirs], **numbers, precondition_frequency=frequency)
    steps = []
    with torch.enable_grad():
        for g in grads:
            theirs.grad = torch.tensor(g, dtype=torch.float32)
            optimizer.step()
            steps.append(theirs.detach().double().numpy().copy())
    assert deviation(ours(p, grads, **numbers, frequency=frequency), steps) < 2e-4


@pytest.mark.parametrize("name", ["common", "one side"])
def test_every_step_of_an_optimizer_is_that_of_the_formula(name):
    p, grads = make_run((4, 4))
    params = torch.nn.Parameter(torch.tensor(p))
    optimizer, steps = fo.Optimizer([params], fo.soap, **CASES[name]), []
    for g in grads:
        params.grad = torch.tensor(g)
        optimizer.step()
        steps.append(params.detach().numpy().copy())
    assert deviation(steps, formula(p, grads, **CASES[name])) < 1e-11


def test_the_first_step_moves_nothing_and_decays_nothing():
    p, grads = make_run((4, 4))
    first, second, *_ = ours(p, grads, lr=0.1, weight_decay=0.5)
    assert np.array_equal(first, p)
    assert not np.array_equal(second, p)


@pytest.mark.parametrize(
    "decay", [{"w": 0.5, "b": 0.0}, {"w": torch.full((4, 1), 0.5), "b": fo.schedules.constant(0.5)}]
)
def test_a_tree_of_decays_waits_for_the_second_step_too(decay):
    params = {"w": torch.ones(4, 4, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    grads = fo.tree.zeros_like(params)
    tx = fo.soap(0.1, weight_decay=decay)
    state = tx.init(params)
    first, state = fo.step(tx, grads, state, params)
    second, _ = fo.step(tx, grads, state, first)
    assert bool((first["w"] == 1).all())
    assert bool((first["b"] == 1).all())
    torch.testing.assert_close(second["w"], torch.full((4, 4), 0.95, dtype=torch.float64))
    assert bool((second["b"] == 1).all()) == (decay["b"] == 0.0)


def test_adam_in_the_eigenbasis_does_not_depend_on_the_basis_of_parameters():
    """Of rotated gradients the steps are rotated; Adam's are not."""
    _, grads = make_run((4, 4))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    numbers = {**COMMON, "weight_decay": 0.0, "frequency": 1}
    zero = np.zeros((4, 4))
    plain = list(ours(zero, grads, **numbers))[-1]
    rotated = list(ours(zero, [rotation @ g for g in grads], **numbers))[-1]
    assert np.abs(rotated - rotation @ plain).max() < 1e-12
    assert np.abs(list(ours(zero, [rotation @ g for g in grads], **numbers, max_dim=0))[-1] - rotated).max() > 1e-3


def test_dimensions_after_the_first_are_joined_if_asked_for():
    p, grads = make_run((4, 2, 2))
    flat = [g.reshape(4, 4) for g in grads]
    tx, params = fo.soap(**COMMON, flatten=True), torch.tensor(p)
    state = tx.init(params)
    for g in grads:
        params, state = fo.step(tx, torch.tensor(g), state, params)
    assert deviation([params.numpy().reshape(4, 4)], [list(formula(p.reshape(4, 4), flat, **COMMON))[-1]]) < 1e-11


def test_bases_are_computed_where_they_are_due_and_nowhere_else(monkeypatch):
    calls = []
    for name in ("eigenvectors", "orthonormalized"):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda a, name=name, made=made: calls.append(name) or made(a))
    p, grads = make_run((3, 3))
    params = torch.nn.Parameter(torch.tensor(p))
    optimizer = fo.Optimizer([params], fo.soap, frequency=3)
    counts = []
    for g in grads:
        params.grad = torch.tensor(g)
        optimizer.step()
        counts.append(len(calls))
    assert counts == [1, 1, 1, 2, 2, 2, 3]
    assert calls == ["eigenvectors", "orthonormalized", "orthonormalized"]


@pytest.mark.parametrize("name", ["common", "one side"])
def test_batches_have_the_same_numbers(name):
    assert error_of_batches(fo.soap(**CASES[name]), (3, 4)) < 1e-11


@pytest.mark.sampled(pool="compiled")
def test_compiled_steps_have_the_same_numbers():
    assert error_of_compiled_steps(fo.soap(**CASES["common"]), (3, 4)) < 1e-11


def number_of(shape, **numbers):
    p, grads = make_run(shape)
    tx = fo.soap(0.1, eps=0.1, frequency=1, **numbers)

    def number(z):
        given = z.reshape(3, *shape)
        return (trained(tx, torch.tensor(p), list(given)) * torch.tensor(grads[-1])).sum()

    return number, torch.tensor(np.stack(grads[:3])).reshape(-1)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3)], ids=str)
def test_derivatives_by_gradients_flow_through_the_bases(shape):
    number, z = number_of(shape)
    gradient = torch.func.grad(number)
    assert error(gradient(z), differences(number, z)) < 1e-7
    assert error(torch.func.jacfwd(number)(z), gradient(z)) < 1e-10


def test_constant_bases_are_noticed(monkeypatch):
    number, z = number_of((3, 3))
    for name in ("eigenvectors", "orthonormalized"):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda a, made=made: made(a.detach()))
    assert error(torch.func.grad(number)(z), differences(number, z)) > 1e-4


@pytest.mark.parametrize("shape", [(6, 2), (5, 1)], ids=str)
def test_derivatives_are_finite_where_the_choice_of_a_basis_is_rounding(shape):
    number, z = number_of(shape)
    assert torch.func.grad(number)(z).isfinite().all()
    assert torch.func.hessian(number)(z).isfinite().all()
    assert torch.func.grad(number)(torch.zeros_like(z)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_are_kept_in_single_precision_at_least(dtype):
    p, grads = make_run((4, 4))
    params = torch.tensor(p, dtype=dtype)
    tx = fo.soap(**COMMON)
    state = tx.init(params)
    for g in grads:
        params, state = fo.step(tx, torch.tensor(g, dtype=dtype), state, params)
    assert fo.tree.get(state, "GG").dtype == fo.tree.get(state, "Q").dtype == torch.float32
    assert params.dtype == dtype
    expected = list(formula(p, grads, **COMMON))[-1]
    assert np.abs(params.double().numpy() - expected).max() < (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"frequency": 0}, "Invalid frequency: 0; it needs an integer >= 1"),
        ({"max_dim": -1}, "Invalid max_dim: -1; it needs an integer >= 0"),
        ({"shampoo_beta": 1.0}, "Invalid shampoo_beta: 1.0; it needs 0 <= value < 1"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1; it needs value >= 0"),
        ({"eps": -0.1}, "Invalid epsilon value: -0.1; it needs value >= 0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0; it needs 0 <= value < 1"),
    ],
)
def test_wrong_numbers_are_errors(numbers, message):
    with pytest.raises(ValueError, match=message):
        fo.soap(**numbers)
