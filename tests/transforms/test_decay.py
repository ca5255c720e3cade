"""Weight decay of every kind, wherever it stands in a chain."""

import numpy as np
import pytest
import torch

import functorch_optim as fo
from functorch_optim.testing._copies import through_pickle

RATES = [0.5, 0.4, 0.0, 0.2]


rate = fo.schedules.table(torch.tensor(RATES, dtype=torch.float64))


def lost(kind, p, t, wd):
    """Return what a step takes from p."""
    lr = RATES[t]
    return {"decoupled": lr * wd, "independent": wd, "corrected": lr**2 / max(RATES[: t + 1]) * wd}[kind] * p


def trained(tx, params, grads):
    state = tx.init(params)
    for g in grads:
        params, state = fo.step(tx, g, state, params)
    return params


@pytest.fixture
def problem():
    params = torch.randn(6, dtype=torch.float64)
    return params, [torch.randn(6, dtype=torch.float64) for _ in RATES]


@pytest.mark.parametrize("kind", ["decoupled", "independent", "corrected"])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("towards", [None, "init"])
@pytest.mark.parametrize("last", [False, True])
def test_a_step_takes_what_its_kind_says(kind, cautious, towards, last, problem):
    if last and kind == "decoupled":
        pytest.skip("it is added where it stands")
    params, grads = problem
    lr = fo.scale_by_learning_rate(rate)
    decay = fo.add_decayed_weights(0.3, kind=kind, cautious=cautious, towards=towards)
    p, start = params.numpy(), params.numpy() if towards else 0.0
    for t, g in enumerate(grads):
        away = p - start
        if cautious and not (last and RATES[t] == 0):  # no update, no sign to disagree with
            away = np.where(g.numpy() * away >= 0, away, 0)
        # Before a learning rate of zero nothing passes.
        took = lost(kind, away, t, 0.3) if last or RATES[t] else 0.0
        p = p - RATES[t] * g.numpy() - took
    tx = fo.chain(lr, decay) if last else fo.chain(decay, lr)
    torch.testing.assert_close(trained(tx, params, grads).numpy(), p, rtol=1e-13, atol=1e-14)
    other = fo.chain(fo.add_decayed_weights(0.31, kind=kind, cautious=cautious, towards=towards), lr)
    assert not np.allclose(trained(other, params, grads).numpy(), p, rtol=1e-6)


def test_the_largest_rate_may_be_given(problem):
    params, [g, *_] = problem
    tx = fo.chain(fo.add_decayed_weights(0.3, kind="corrected", lr_max=2.0), fo.scale_by_learning_rate(0.5))
    torch.testing.assert_close(trained(tx, params, [g]), params - 0.5 * g - 0.5**2 / 2.0 * 0.3 * params)


@pytest.mark.parametrize(
    "make",
    [
        lambda decay, lr: fo.chain(fo.chain(fo.identity(), decay), fo.chain(lr)),
        lambda decay, lr: fo.named_chain(decay=decay, lr=lr),
        lambda decay, lr: fo.chain(fo.masked(decay, {"a": True, "b": False}), lr),
        lambda decay, lr: fo.partition({0: fo.chain(decay, lr), 1: lr}, {"a": 0, "b": 1}),
        lambda decay, lr: fo.partition({0: fo.chain(decay), 1: fo.identity()}, {"a": 0, "b": 1}),
    ],
)
def test_the_rate_is_that_of_the_chain(make):
    decay, lr = fo.add_decayed_weights(0.25, kind="independent"), fo.scale_by_learning_rate(0.1)
    tx = make(decay, lr)
    if tx._call[0] is fo.partition and len(tx._links) == 2:
        tx = fo.chain(tx, lr)
    params = {"a": torch.tensor([4.0]), "b": torch.tensor([4.0])}
    zeros = fo.tree.map(torch.zeros_like, params)
    updates = through_pickle(tx).update(zeros, tx.init(params), params)[0] if "lambda" not in repr(tx) else None
    assert updates["a"].item() == pytest.approx(-1.0)
    assert updates["b"].item() in (0.0, pytest.approx(-1.0))


def test_a_scheduler_drives_the_rate_of_the_decay_too():
    def make(lr, weight_decay):
        return fo.chain(fo.add_decayed_weights(weight_decay, kind="corrected"), fo.scale_by_learning_rate(lr))

    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = fo.Optimizer([p], make, lr=0.5, weight_decay=0.2)
    for lr in (0.5, 0.25):
        opt.param_groups[0]["lr"] = lr
        p.grad = torch.zeros_like(p)
        opt.step()
    assert p.item() == pytest.approx((1 - 0.5 * 0.2) * (1 - 0.25**2 / 0.5 * 0.2), rel=1e-12)


def test_the_number_zero_needs_no_parameters_and_keeps_none():
    tx = fo.add_decayed_weights(0.0, towards="init", kind="corrected")
    assert isinstance(tx.init(torch.ones(1)), fo.StepState)
    assert torch.equal(tx.update(torch.ones(1), tx.init(torch.ones(1)))[0], torch.ones(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.add_decayed_weights(0.1, kind="l2"), "Invalid kind: 'l2'; choose 'decoupled', 'independent' or"),
        (lambda: fo.add_decayed_weights(0.1, towards="ema"), "Invalid towards: 'ema'; choose None or 'init'"),
        (lambda: fo.add_decayed_weights(0.1, lr_max=1.0), "lr_max is of kind='corrected', and kind='decoupled' was"),
        (
            lambda: fo.chain(fo.add_decayed_weights(0.1, kind="independent"), fo.scale(-0.1)).init(torch.ones(1)),
            "depends on the learning rate, and there is none in its chain: write",
        ),
    ],
)
def test_what_is_wrong_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()
