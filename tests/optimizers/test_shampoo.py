"""Shampoo against its formula in numpy, with every option; and what it promises of steps, states and derivatives."""

import numpy as np
import pytest
import torch
from sides import along, deviation, error_of_batches, error_of_compiled_steps, make_run, second_moment, trained

import functorch_optim as fo
from functorch_optim.optimizers import shampoo as module
from functorch_optim.testing._derivatives import differences, error

SHAPES = [(4, 3), (3, 5), (5,), (), (2, 3, 2)]


def inverse_power(a, power):
    w, q = np.linalg.eigh((a + a.T) / 2)
    return (q * (w - min(w.min(), 0)) ** -power) @ q.T


def formula(
    p,
    grads,
    lr=1e-2,
    betas=(0.9, 0.999),
    eps=1e-6,
    weight_decay=0.0,
    frequency=1,
    grafting=None,
    start=None,
    max_dim=1024,
    grafting_beta2=None,
    grafting_eps=1e-8,
    root=None,
    one_sided=False,
    kl=False,
    decoupled_weight_decay=True,
    maximize=False,
):
    """Shampoo of one tensor, block by block, each of them with lists of matrices."""
    b1, b2, start = *betas, frequency if start is None else start
    whole = p.reshape(p.shape or (1,))
    places = [()]
    for n in whole.shape:
        places = [(*place, slice(i, min(i + max_dim, n))) for place in places for i in range(0, n, max_dim)]
    kept = {}
    for t, given in enumerate(grads, 1):
        new = np.empty_like(whole)
        for number, place in enumerate(places):
            x = whole[place]
            g = (-1 if maximize else 1) * given.reshape(whole.shape)[place]
            g = g if decoupled_weight_decay else g + weight_decay * x
            k = g.ndim
            dims = [int(np.argmin(g.shape))] if one_sided else range(k)
            if number not in kept:
                kept[number] = {"m": 0, "v": 0, "L": dict.fromkeys(dims, 0), "P": {d: np.eye(g.shape[d]) for d in dims}}
            state = kept[number]
            state["m"] = b1 * state["m"] + (1 - b1) * g
            mean = state["m"] / (1 - b1**t)
            for d in dims:
                seen = g
                for other in [o for o in dims if kl and o != d]:
                    seen = along(seen, state["P"][other], other)
                old, moment = state["L"][d], second_moment(seen, d)
                state["L"][d] = old + moment if b2 == 1 else b2 * old + (1 - b2) * moment
            if t == start or (t > start and t % frequency == 0):
                power = 1 / (root or (2 if one_sided or kl else 2 * k))
                correction = 1 if b2 == 1 else 1 - b2**t
                for d in dims:
                    a = state["L"][d] / correction
                    state["P"][d] = inverse_power(a + eps * np.eye(len(a)), power)
            u = mean
            for d in dims:
                u = along(u, state["P"][d], d)
            square = g * g
            adds = grafting == "adagrad"
            b3 = (b2 if b2 < 1 else 0.999) if grafting_beta2 is None else grafting_beta2
            state["v"] = state["v"] + square if adds else b3 * state["v"] + (1 - b3) * square
            v = state["v"] / (1 - b3**t) if grafting == "adam" else state["v"]
            graft = mean if grafting in (None, "sgd") else mean / (np.sqrt(v) + grafting_eps)
            if grafting is not None:
                u = graft if t < start else u * np.linalg.norm(graft) / np.linalg.norm(u)
            new[place] = x - lr * (u + (weight_decay * x if decoupled_weight_decay else 0))
        whole = new
        yield whole.reshape(p.shape)


def ours(p, grads, dtype=torch.float64, **numbers):
    tx, p = fo.shampoo(**numbers), torch.tensor(p, dtype=dtype)
    state = tx.init(p)
    for g in grads:
        p, state = fo.step(tx, torch.tensor(g, dtype=dtype), state, p)
        yield p.numpy()


COMMON = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1}
CASES = {
    "defaults": {},
    "common": COMMON,
    "sum": {**COMMON, "betas": (0.9, 1.0)},
    "seldom": {**COMMON, "frequency": 3},
    "late": {**COMMON, "frequency": 2, "start": 3},
    "early": {**COMMON, "frequency": 3, "start": 1, "grafting": "sgd"},
    "adam": {**COMMON, "grafting": "adam", "grafting_beta2": 0.9, "grafting_eps": 1e-3, "frequency": 2},
    "rmsprop": {**COMMON, "grafting": "rmsprop", "grafting_eps": 1e-3},
    "rmsprop of a sum": {**COMMON, "betas": (0.8, 1.0), "grafting": "rmsprop", "max_dim": 2},
    "adagrad": {**COMMON, "grafting": "adagrad", "grafting_eps": 1e-3, "start": 3},
    "blocks": {**COMMON, "max_dim": 2, "grafting": "sgd"},
    "root": {**COMMON, "root": 3},
    "one_sided": {**COMMON, "one_sided": True},
    "kl": {**COMMON, "kl": True, "frequency": 2, "start": 1},
    "penalty": {**COMMON, "decoupled_weight_decay": False, "maximize": True},
}
cases = pytest.mark.parametrize("numbers", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_that_of_the_formula(numbers, shape):
    p, grads = make_run(shape)
    # Of the defaults, whose first matrices are singular but for a small eps, roots amplify rounding.
    assert deviation(ours(p, grads, **numbers), formula(p, grads, **numbers)) < (1e-11 if numbers else 1e-8)


@cases
def test_the_comparison_can_fail(numbers):
    p, grads = make_run((4, 3))
    changed = {**numbers, "eps": numbers.get("eps", 1e-6) * 1.01, "lr": numbers.get("lr", 1e-2) * (1 + 1e-8)}
    assert deviation(ours(p, grads, **changed), formula(p, grads, **numbers)) > 1e-10


@pytest.mark.parametrize("name", ["rmsprop of a sum", "root", "sum", "seldom"])
def test_every_step_of_an_optimizer_is_that_of_the_formula(name):
    p, grads = make_run((4, 3))
    params = torch.nn.Parameter(torch.tensor(p))
    optimizer, steps = fo.Optimizer([params], fo.shampoo, **CASES[name]), []
    for g in grads:
        params.grad = torch.tensor(g)
        optimizer.step()
        steps.append(params.detach().numpy().copy())
    assert deviation(steps, formula(p, grads, **CASES[name])) < 1e-11


def test_dimensions_after_the_first_are_joined_if_asked_for():
    p, grads = make_run((2, 3, 2))
    flat = [g.reshape(2, 6) for g in grads]
    joined = [q.reshape(2, 6) for q in ours(p, grads, flatten=True, **COMMON)]
    assert deviation(joined, formula(p.reshape(2, 6), flat, **COMMON)) < 1e-11


def test_roots_are_computed_where_they_are_due_and_nowhere_else(monkeypatch):
    calls, root = [], module.inverse_root
    monkeypatch.setattr(module, "inverse_root", lambda *args: calls.append(1) or root(*args))
    p, grads = make_run((3, 3))
    params = torch.nn.Parameter(torch.tensor(p))
    optimizer = fo.Optimizer([params], fo.shampoo, frequency=3, start=2)
    counts = []
    for g in grads:
        params.grad = torch.tensor(g)
        optimizer.step()
        counts.append(len(calls))
    assert counts == [0, 1, 2, 2, 2, 3, 3]
    assert deviation([params.detach().numpy()], [list(formula(p, grads, frequency=3, start=2))[-1]]) < 1e-9


@pytest.mark.parametrize("name", ["seldom", "adam", "kl"])
def test_batches_have_the_same_numbers(name):
    assert error_of_batches(fo.shampoo(**CASES[name]), (3, 2)) < 1e-12


@pytest.mark.sampled(pool="compiled")
def test_compiled_steps_have_the_same_numbers():
    assert error_of_compiled_steps(fo.shampoo(**CASES["adam"]), (3, 2)) < 1e-12


@pytest.mark.parametrize("shape", [(6, 2), (5,)], ids=str)
@pytest.mark.parametrize("grafting", [None, "adam"])
def test_the_first_step_has_exact_derivatives_though_its_matrices_are_singular(shape, grafting):
    """Four eigenvalues are zero, where the derivative of eigh is wrong."""
    p, grads = make_run(shape)
    tx = fo.shampoo(1.0, eps=1e-3, grafting=grafting)

    def number(g):
        moved = trained(tx, torch.zeros(shape, dtype=torch.float64), [g.reshape(shape)])
        return (moved * torch.tensor(p)).sum() + moved.square().sum()

    z = torch.tensor(grads[0]).reshape(-1)
    gradient = torch.func.grad(number)
    expected = differences(number, z)
    assert error(gradient(z), expected) < 1e-7
    assert error(torch.func.jacfwd(number)(z), gradient(z)) < 1e-11
    assert error(torch.func.jacfwd(gradient)(z), differences(gradient, z)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_are_kept_in_single_precision_at_least(dtype):
    p, grads = make_run((4, 3))
    params = torch.tensor(p, dtype=dtype)
    tx = fo.shampoo(0.1, grafting="adam")
    state = tx.init(params)
    for g in grads:
        params, state = fo.step(tx, torch.tensor(g, dtype=dtype), state, params)
    assert (
        fo.tree.get(state, "factor_matrices").dtype == fo.tree.get(state, "inv_factor_matrices").dtype == torch.float32
    )
    assert params.dtype == dtype
    expected = list(formula(p, grads, lr=0.1, grafting="adam"))[-1]
    assert np.abs(params.double().numpy() - expected).max() < (1e-3 if dtype == torch.float32 else 5e-2)


def test_a_state_is_saved_and_loaded_and_goes_on():
    p, grads = make_run((4, 3))
    tx, params = fo.shampoo(0.1, frequency=2, grafting="adam"), torch.tensor(p)
    state = tx.init(params)
    for g in grads[:3]:
        params, state = fo.step(tx, torch.tensor(g), state, params)
    loaded = fo.load_state_dict(tx.init(params), fo.state_dict(state, params), params)
    for g in grads[3:]:
        expected, state = fo.step(tx, torch.tensor(g), state, params)
        found, loaded = fo.step(tx, torch.tensor(g), loaded, params)
        assert torch.equal(expected, found)
        params = expected


@pytest.mark.parametrize(
    ("numbers", "error_type", "message"),
    [
        ({"eps": 0.0}, ValueError, "Invalid epsilon value: 0.0; it needs value > 0"),
        ({"frequency": 0}, ValueError, "Invalid frequency: 0; it needs an integer >= 1"),
        ({"start": 0}, ValueError, "Invalid start: 0; it needs an integer >= 1"),
        ({"max_dim": 0}, ValueError, "Invalid max_dim: 0; it needs an integer >= 1"),
        ({"grafting": "lion"}, ValueError, "Invalid grafting: 'lion'; choose 'adam', 'rmsprop', 'adagrad', 'sgd' or"),
        ({"root": 0}, ValueError, "Invalid root: 0; it needs an integer >= 1"),
        ({"root": 0.5}, TypeError, "Invalid root: 0.5 is a float; give an integer >= 1"),
        ({"betas": (0.9, 1.1)}, ValueError, "Invalid beta parameter at index 1: 1.1; it needs 0 <= value <= 1"),
        ({"grafting_beta2": 1.0}, ValueError, "Invalid grafting_beta2: 1.0; it needs 0 <= value < 1"),
        ({"grafting_eps": -1.0}, ValueError, "Invalid grafting_eps: -1.0; it needs value >= 0"),
    ],
)
def test_wrong_numbers_are_errors(numbers, error_type, message):
    with pytest.raises(error_type, match=message):
        fo.shampoo(**numbers)
