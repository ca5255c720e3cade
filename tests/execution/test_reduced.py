"""Rules that take norms of their tensor, run in blocks: they compute what they compute tensor by tensor."""

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import functorch_optim as fo
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution import reduced
from functorch_optim._execution.blocks import BLOCK
from functorch_optim._numerics import rms

SHAPES = {"cut": (3, BLOCK // 2 + 7), "small": (4, 3), "number": (), "empty": (0, 3), "one": (1,)}


class Total(NamedTuple):
    """A state."""

    total: torch.Tensor


def norm_of_norms(g, state, p, c):
    """Scale by norms of computed values, of states, and of values that depend on norms; with conditions."""
    total = state.total + g * p
    length = fo.safe_norm(total, 1.0)
    u = torch.where(length > c, total / (length + 1), total) + fo.safe_norm(state.total, math.inf) * g
    largest = torch.maximum(fo.safe_norm(u), rms(p))
    return u * torch.where((largest == 0) | (length == 0), 1.0, c / (fo.safe_norm(u, 3.0) + largest)), Total(total)


RULES = {
    "norms of norms": fo.chain(
        fo.trace(0.5), fo.leafwise(Total, norm_of_norms, lambda step: 1 / step, norms=True, needs_params=True)
    ),
    "lamb": fo.lamb(0.1, weight_decay=0.1),
    "lars": fo.chain(fo.lars(0.1, weight_decay=0.1), fo.add_decayed_weights(0.1)),
    "stable_adamw": fo.stable_adamw(0.1, weight_decay=0.1),
    "fromage": fo.fromage(0.1),
    "clip_by_norm": fo.chain(*[fo.clip_by_norm(0.7, norm_type=p) for p in (1.0, 2.0, 3.5, math.inf)]),
    "clip_by_block_rms": fo.chain(fo.clip_by_block_rms(0.1), fo.adam(0.1)),
    "novograd": fo.novograd(0.1, weight_decay=0.1),
    "adanorm": fo.adanorm(0.1),
    "ldog": fo.ldog(0.1, reps_rel=0.1),
    "cautious": fo.chain(fo.cautious(fo.chain(fo.trace(0.5), fo.scale(0.1))), fo.scale(-0.1)),
    "cautious of the same links": fo.chain(fo.trace(0.5), fo.cautious(fo.scale(0.1)), fo.scale(-0.1)),
    "cautious behind another rule": fo.chain(fo.centralize(), fo.cautious(fo.adamw(0.1))),
    "masked": fo.masked(fo.lars(0.1), lambda params: fo.tree.map(lambda p: p.ndim != 1, params)),
}
rules = pytest.mark.parametrize("tx", RULES.values(), ids=RULES)


def by_tensor(tx):
    """The same rules, tensor by tensor."""
    links = [link._replace(rule=replace(link.rule, norms=False)) for link in tx._links]
    return GradientTransformation._of(links, tx._layout)


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = lambda: {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in SHAPES.items()}
    params, history = drawn(), [drawn() for _ in range(3)]
    history[1]["small"] = torch.zeros_like(history[1]["small"])
    params["turned"] = torch.randn(5, 4, dtype=dtype, generator=generator).T
    for grads in history:
        grads["turned"] = torch.randn(4, 5, dtype=dtype, generator=generator)
    return params, history


def updated(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


def train(take, tx, params, history):
    params, state = fo.tree.map(torch.clone, params), tx.init(params)
    for grads in history:
        params, state = take(tx, params, state, grads)
    return params, state


def step(tx, params, state, grads):
    return fo.step(tx, grads, state, params)


def step_(tx, params, state, grads):
    return fo.step_(tx, grads, state, params)


def assert_close(found, expected, rtol):
    left, right = [fo.tree.flatten(some)[0] for some in (found, expected)]
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol, equal_nan=True)


def counted(monkeypatch):
    """Count the steps that are run so."""
    calls = []
    numbers = reduced.Reduced.numbers
    monkeypatch.setattr(reduced.Reduced, "numbers", lambda *args: calls.append(1) or numbers(*args))
    return calls


@rules
@pytest.mark.parametrize("take", [updated, step, step_])
def test_it_is_the_rule_tensor_by_tensor(tx, take, monkeypatch):
    calls = counted(monkeypatch)
    params, history = make()
    found = train(take, tx, params, history)
    assert calls
    del calls[:]
    assert_close(found, train(take, by_tensor(tx), params, history), 1e-13)
    assert not calls


@rules
def test_in_single_precision_norms_are_nearer_to_those_of_double(tx):
    params, history = make(torch.float32)
    found, _ = train(step_, tx, params, history)
    wide = lambda tree: fo.tree.map(torch.Tensor.double, tree)
    exact, _ = train(step_, tx, wide(params), list(map(wide, history)))
    assert_close(wide(found), exact, 1e-5)


@rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_single_precision(tx, dtype):
    params, history = make(dtype)
    found = train(step, tx, params, history[:1])
    wide = lambda tree: fo.tree.map(torch.Tensor.float, tree)
    assert all(p.dtype == dtype for p in fo.tree.flatten(found[0])[0])
    assert_close(wide(found[0]), train(step, tx, wide(params), list(map(wide, history[:1])))[0], 0.02)


@rules
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_what_they_are_tensor_by_tensor(tx, value):
    params, history = make()
    history[0]["cut"][1, 2] = history[0]["small"][0, 0] = value
    assert_close(train(step_, tx, params, history), train(step_, by_tensor(tx), params, history), 1e-13)


@rules
def test_the_stateful_form_is_the_functional_one(tx):
    params, history = make()
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    optimizer = fo.Optimizer(own, tx)
    for grads in history:
        for p, g in zip(own, grads.values(), strict=True):
            p.grad = g.clone()
        optimizer.step()
    assert_close(list(map(torch.Tensor.detach, own)), list(train(step, tx, params, history)[0].values()), 1e-13)


@pytest.mark.parametrize("name", [name for name in RULES if "another rule" not in name])
def test_a_step_in_place_takes_no_memory_of_the_size_of_a_tensor(name):
    tx = RULES[name]
    params, grads = {"w": torch.ones(8, BLOCK)}, {"w": torch.ones(8, BLOCK)}
    state = tx.init(params)
    for _ in range(2):
        params, state = step_(tx, params, state, grads)
    with torch.profiler.profile(profile_memory=True) as profile:
        step_(tx, params, state, grads)
    assert max(event.cpu_memory_usage for event in profile.events()) <= params["w"].nbytes / 8


def test_derivatives_are_those_of_the_rule():
    params, history = make()
    small = {name: params[name] for name in ("small", "number", "one")}
    grads = {name: history[0][name] for name in small}

    def moved(lr, tx=RULES["lars"]):
        tx = fo.lars(lr, weight_decay=0.1)
        return sum(p.sum() for p in fo.tree.flatten(fo.step(tx, grads, tx.init(small), small)[0])[0])

    lr = torch.tensor(0.1, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(moved)(lr), (moved(lr + 1e-6) - moved(lr - 1e-6)) / 2e-6)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            lambda g, state, p, s: (g / g.abs().sum(), state),
            "must keep shapes, which sum does not; leave norms=True out",
        ),
        (
            lambda g, state, p, s: (g - g.amax(), state),
            "must keep shapes, which amax does not; leave norms=True out",
        ),
        (lambda g, state, p, s: (fo.safe_norm(g), state), "must return tensors like those it was given"),
        (lambda g, state, p, s: (g * float(fo.safe_norm(g)), state), "must not look at values"),
    ],
)
def test_rules_that_do_more_than_take_norms_are_errors(rule, message):
    tx, params = fo.leafwise(None, rule, norms=True), {"w": torch.ones(BLOCK)}
    with pytest.raises((TypeError, AttributeError), match=message):
        tx.update(params, tx.init(params))


def test_elementwise_rules_take_no_norms():
    tx, params = fo.leafwise(None, lambda g, state, p, s: (g / fo.safe_norm(g), state), elementwise=True), torch.ones(3)
    with pytest.raises(TypeError, match="must keep shapes, which safe_norm does not; declare elementwise=False"):
        tx.update(params, tx.init(params))
