"""Steps that are left out: accumulation and its remainder, gradients that are not finite, conditions."""

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

LR, MOMENTUM = 0.1, 0.9
NAN, INF = float("nan"), float("inf")


def make(count=8):
    generator = torch.Generator().manual_seed(0)

    def randn():
        return {
            "w": torch.randn(2, 3, dtype=torch.float64, generator=generator),
            "b": torch.randn(3, dtype=torch.float64, generator=generator),
        }

    return randn(), [randn() for _ in range(count)]


def spoiled(history, *places, by=NAN):
    """Put one number that is not finite into the gradients of some steps."""
    found = [{name: g.clone() for name, g in grads.items()} for grads in history]
    for k in places:
        found[k]["w"][0, 1] = by
    return found


def momentum_sgd(params, history):
    """SGD with momentum and decay, by its formulas."""
    buffer = {name: torch.zeros_like(p) for name, p in params.items()}
    for grads in history:
        for name in params:
            buffer[name] = MOMENTUM * buffer[name] + grads[name] + 0.1 * params[name]
        params = {name: p - LR * buffer[name] for name, p in params.items()}
    return params


def base():
    return fo.sgd(LR, MOMENTUM, weight_decay=0.1)


def pure(tx, params, history, state=None, **extras):
    state = tx.init(params) if state is None else state
    for k, grads in enumerate(history):
        params, state = fo.step(tx, grads, state, params, **{name: values[k] for name, values in extras.items()})
    return params, state


def in_place(tx, params, history, **extras):
    params = fo.tree.map(torch.clone, params)
    state = tx.init(params)
    for k, grads in enumerate(history):
        given = {name: values[k] for name, values in extras.items()}
        params, state = fo.step_(tx, fo.tree.map(torch.clone, grads), state, params, **given)
    return params, state


def stateful(tx, params, history, **extras):
    own = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    opt = fo.Optimizer(own.items(), tx)
    for k, grads in enumerate(history):
        for name, p in own.items():
            p.grad = grads[name].clone()
        opt.step(**{name: values[k] for name, values in extras.items()})
    return {name: p.detach() for name, p in own.items()}, opt


def batched(tx, params, history, **extras):
    """Run in a batch of two, and return the first."""

    def trained(params, history):
        return pure(tx, params, history, **extras)

    two = torch.vmap(trained)(*[fo.tree.map(lambda t: torch.stack([t, 2 * t]), given) for given in (params, history)])
    return fo.tree.map(lambda t: t[0], two)


def compiled(tx, params, history, **extras):
    """Trace one step, and run it for all."""
    torch.compiler.reset()
    traced = torch.compile(
        lambda grads, state, params, given: fo.step(tx, grads, state, params, **given), backend="eager", fullgraph=True
    )
    state = tx.init(params)
    for k, grads in enumerate(history):
        given = {name: torch.as_tensor(values[k]) for name, values in extras.items()}
        params, state = traced(grads, state, params, given)
    return params, state


once_compiled = pytest.param(compiled, marks=pytest.mark.sampled(pool="compiled"))
ways = pytest.mark.parametrize("way", [pure, in_place, stateful, batched, once_compiled], ids=lambda way: way.__name__)
functional = pytest.mark.parametrize("way", [pure, in_place, batched, once_compiled], ids=lambda way: way.__name__)


# Gradients that are not finite. ---------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("by", [NAN, INF, -INF])
def test_steps_that_are_not_finite_are_as_if_they_had_not_been(way, by):
    params, history = make()
    found, _ = way(fo.apply_if_finite(base()), params, spoiled(history, 2, 3, 6, by=by))
    expected = momentum_sgd(params, [grads for k, grads in enumerate(history) if k not in (2, 3, 6)])
    assert_close(found, expected)
    assert not torch.allclose(momentum_sgd(params, history)["w"], expected["w"], rtol=1e-3)


@functional
def test_counts_are_of_steps_in_a_row_and_of_all(way):
    params, history = make(6)
    _, (counts, inner) = way(fo.apply_if_finite(fo.adam(LR)), params, spoiled(history, 1, 4, 5))
    assert (float(counts.notfinite_count), float(counts.total_notfinite)) == (2, 3)
    assert float(fo.tree.get(inner, "step", path="0")) == 3


def test_the_optimizer_counts_as_well():
    params, history = make(6)
    _, opt = stateful(fo.apply_if_finite(fo.adam(LR)), params, spoiled(history, 1, 4, 5))
    for p in opt.param_groups[0]["params"]:
        state = opt.state[p]
        assert [float(state[name]) for name in ("notfinite_count", "total_notfinite", "step")] == [2, 3, 3]


@ways
def test_after_too_many_in_a_row_they_are_let_through(way):
    params, history = make(4)
    tx = fo.apply_if_finite(base(), max_consecutive=2)
    assert_close(way(tx, params, spoiled(history, 1, 2))[0], momentum_sgd(params, [history[0], history[3]]))
    found, _ = way(tx, params, spoiled(history, 1, 2, 3))
    assert found["w"][0, 1].isnan()
    found, _ = way(fo.apply_if_finite(base(), INF), params, spoiled(history, 0, 1, 2, 3))
    assert_close(found, params, rtol=0, atol=0)


def test_large_numbers_are_finite():
    """Of which the squares are not."""
    params = torch.zeros(2)
    tx = fo.apply_if_finite(fo.sgd(1.0))
    found, state = fo.step(tx, torch.tensor([3e38, 1.0]), tx.init(params), params)
    assert found[0] == -3e38
    assert state[0].total_notfinite == 0


@ways
def test_mini_steps_that_are_not_finite_are_not_in_the_mean(way):
    params, history = make(6)
    tx = fo.apply_if_finite(fo.accumulate(base(), 2))
    found, _ = way(tx, params, spoiled(history, 1, 4))
    means = [fo.tree.map(lambda g, h: (g + h) / 2, history[i], history[j]) for i, j in ((0, 2), (3, 5))]
    assert_close(found, momentum_sgd(params, means))


def test_what_is_left_out_has_no_derivative_and_what_is_not_has_its_own():
    params, history = make(4)
    given = spoiled(history, 1)

    def after(lr, batches=1):
        found, _ = pure(fo.apply_if_finite(fo.adam(lr, eps=1e-3)), params, given)
        return found["w"].square().sum()

    lr, h = torch.tensor(LR, dtype=torch.float64), 1e-6
    expected = (after(lr + h) - after(lr - h)) / (2 * h)
    assert_close(torch.func.grad(after)(lr), expected, rtol=1e-6, atol=1e-9)
    several = torch.vmap(torch.func.grad(after))(lr.repeat(2))
    assert_close(several, expected.repeat(2), rtol=1e-6, atol=1e-9)


def test_in_half_precision():
    params = {"w": torch.zeros(3, dtype=torch.float16)}
    grads = [{"w": torch.full((3,), value, dtype=torch.float16)} for value in (6e4, INF, 1.0)]
    found, state = pure(fo.apply_if_finite(fo.sgd(0.5)), params, grads)
    assert_close(found["w"], torch.full((3,), -3e4, dtype=torch.float16))
    assert state[0].total_notfinite == 1


def test_max_consecutive_is_a_number_that_is_not_negative():
    with pytest.raises(ValueError, match=r"Invalid max_consecutive: -1; it needs value >= 0"):
        fo.apply_if_finite(fo.sgd(0.1), -1)
    with pytest.raises(TypeError, match="is a tree"):
        fo.apply_if_finite(fo.sgd(0.1), {"w": 1})


# Conditions. ----------------------------------------------------------------------------------------------------------

LOSSES = (1.0, 50.0, 2.0, 3.0, 70.0, 80.0, 1.0, 2.0)


@ways
def test_a_condition_of_the_step(way):
    params, history = make()
    found, _ = way(fo.skip(base(), lambda step: step % 3 == 1), params, history)
    assert_close(found, momentum_sgd(params, [grads for k, grads in enumerate(history) if k % 3 != 1]))


@ways
@pytest.mark.parametrize(
    "condition",
    [
        lambda *, value: value > 10,
        lambda step, *, value: (step > 0) & (value > 10),
        lambda step, **extra: extra["value"] > 10,
    ],
    ids=["extra", "both", "any"],
)
def test_a_condition_of_extras(way, condition):
    params, history = make()
    values = [torch.tensor(value) for value in LOSSES]
    found, _ = way(fo.skip(base(), condition), params, history, value=values)
    assert_close(found, momentum_sgd(params, [grads for k, grads in enumerate(history) if LOSSES[k] < 10]))


@ways
def test_a_condition_of_the_gradients(way):
    params, history = make()
    sizes = [max(float(g.abs().max()) for g in grads.values()) for grads in history]
    limit = sorted(sizes)[4]
    tx = fo.skip(base(), lambda *, updates: torch.stack([u.abs().max() for u in updates]).max() > limit)
    kept = [grads for size, grads in zip(sizes, history, strict=True) if size <= limit]
    assert_close(way(tx, params, history)[0], momentum_sgd(params, kept))
    assert len(kept) == 5


def test_members_of_a_batch_are_skipped_by_themselves():
    params, history = make(4)
    tx = fo.skip(base(), lambda *, value: value > 10)

    def trained(values):
        return pure(tx, params, history, value=values)

    found, (counts, _) = torch.vmap(trained)(torch.tensor([[1.0, 50.0, 1.0, 1.0], [50.0, 1.0, 1.0, 50.0]]))
    assert counts.skipped.tolist() == [1, 2]
    assert counts.seen.tolist() == [4, 4]
    for k, kept in enumerate(((0, 2, 3), (1, 2))):
        expected = momentum_sgd(params, [history[i] for i in kept])
        assert_close(fo.tree.map(lambda p, k=k: p[k], found), expected)


def test_a_closure_gives_the_loss():
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    opt = fo.Optimizer([p], fo.skip(fo.sgd, lambda *, value: value > 10), lr=1.0)

    def closure(factor):
        opt.zero_grad()
        loss = factor * p.sum()
        loss.backward()
        return loss

    opt.step(lambda: closure(20.0))
    assert p.item() == 1.0
    opt.step(lambda: closure(0.5))
    assert p.item() == 0.5
    assert float(opt.state[p]["skipped"]) == 1


def test_a_condition_prepares_no_second_time():
    """Skipped steps and others take turns, in the optimizer too, and a checkpoint goes on."""
    params, history = make()
    tx = fo.skip(fo.adamw(LR), lambda step: step % 2 == 1)
    expected, _ = pure(fo.adamw(LR), params, history[::2])
    half, state = pure(tx, params, history[:3])
    loaded = fo.load_state_dict(tx.init(params), through_a_file(fo.state_dict(state)))
    assert_close(pure(tx, half, history[3:], loaded)[0], expected)
    assert_close(stateful(tx, params, history)[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "The condition of skip returned None, a NoneType"),
        (1, TypeError, "returned 1, a int; let it return a bool"),
        (torch.tensor(1.0), TypeError, "returned a tensor of dtype torch.float32; let it compare"),
        (torch.tensor([True, False]), ValueError, r"returned a tensor of shape \(2,\); it needs one truth value"),
    ],
)
def test_a_condition_returns_one_truth_value(returned, error, message):
    params, history = make(1)
    with pytest.raises(error, match=message):
        pure(fo.skip(fo.sgd(0.1), lambda step: returned), params, history)


def test_a_condition_is_a_function_of_the_step_and_of_extras_by_keyword():
    with pytest.raises(TypeError, match="skip needs a function that tells which steps to leave out, got 3"):
        fo.skip(fo.sgd(0.1), 3)
    with pytest.raises(TypeError, match=r"'value' comes after a star, as in lambda step, \*, value: value > 10"):
        fo.skip(fo.sgd(0.1), lambda step, value: value > 10)
    params, history = make(1)
    tx = fo.skip(fo.sgd(0.1), lambda step, *, value: value > 10)
    with pytest.raises(TypeError, match="needs the extra 'value'"):
        pure(tx, params, history)


# Functions of the whole tree stand still, too. ------------------------------------------------------------------------


def counting():
    """Make a function of the whole tree that adds how often it was called."""

    def update(updates, state, params):
        count = state["count"] + 1
        return fo.tree.map(lambda g: g + count, updates), {"count": count}

    return fo.GradientTransformation(lambda params: {"count": torch.zeros((), dtype=torch.float64)}, update)


@ways
@pytest.mark.parametrize("after", [fo.identity, lambda: fo.scale(1.0)], ids=["last", "not last"])
def test_functions_of_the_whole_tree_stand_still(way, after):
    params, history = make(5)
    tx = fo.chain(fo.skip(fo.chain(counting(), fo.scale(-1.0)), lambda step: step % 2 == 1), after())
    found, _ = way(tx, params, history)
    expected = fo.tree.map(lambda p, *g: p - sum(g) - 1 - 2 - 3, params, *history[::2])
    assert_close(found, expected)


@ways
@pytest.mark.parametrize(
    ("gate", "used"),
    [
        (lambda tx: fo.accumulate(tx, 2), lambda a, b: (a + b) / 2),
        (lambda tx: fo.skip(tx, lambda step: step % 2 == 0), lambda a, b: b),
    ],
    ids=["accumulate", "skip"],
)
def test_links_behind_a_gate_count_all_steps_and_those_inside_do_not(way, gate, used):
    """Before the first step all count with one tensor."""
    params, history = make(4)
    by_step = fo.scale_by_schedule(lambda step: 1.0 + step)
    tx = fo.chain(gate(fo.chain(by_step, fo.scale(-LR))), by_step)
    found, _ = way(tx, params, history)
    first, second = [fo.tree.map(used, *pair) for pair in zip(history[::2], history[1::2], strict=True)]
    expected = fo.tree.map(lambda p, a, b: p - LR * (1 * 2 * a + 2 * 4 * b), params, first, second)
    assert_close(found, expected)


# The remainder of accumulation. ---------------------------------------------------------------------------------------

FLUSHES = (False, False, True, False, False, False, True)


@ways
@pytest.mark.parametrize("mean", [True, False])
def test_a_remainder_is_a_step_of_its_own(way, mean):
    params, history = make(7)
    found, _ = way(fo.accumulate(base(), 2, mean=mean), params, history, flush=FLUSHES)
    parts = [(0, 1), (2,), (3, 4), (5, 6)]
    means = [fo.tree.map(lambda *g: sum(g) / (len(g) if mean else 1), *[history[i] for i in part]) for part in parts]
    assert_close(found, momentum_sgd(params, means))


def test_whether_to_flush_may_be_a_tensor():
    params, history = make(7)
    tx, flushes = fo.accumulate(base(), 2), torch.tensor(FLUSHES)
    expected = pure(tx, params, history, flush=FLUSHES)[0]
    assert_close(pure(tx, params, history, flush=flushes)[0], expected)
    both = torch.vmap(lambda flush: pure(tx, params, history, flush=flush)[0])(torch.stack([flushes, ~flushes]))
    assert_close(fo.tree.map(lambda p: p[0], both), expected)


def test_flush_is_a_truth_value():
    params, history = make(1)
    with pytest.raises(TypeError, match="flush is True at the last mini-step of an epoch, else False; got 3"):
        pure(fo.accumulate(fo.sgd(0.1), 2), params, history, flush=[3])


@pytest.mark.sampled(pool="long")
def test_every_may_be_a_schedule_of_the_steps_in_all_ways():
    params, history = make(6)
    tx = fo.accumulate(base(), lambda steps: 1 + steps)
    means = [history[0], *[fo.tree.map(lambda *g: sum(g) / len(g), *history[i:j]) for i, j in ((1, 3), (3, 6))]]
    for way in (pure, in_place, stateful, batched, compiled):
        assert_close(way(tx, params, history)[0], momentum_sgd(params, means))


def test_sums_of_halves_are_kept_in_single_precision():
    """In bfloat16 a sum of ones ends at 256."""
    params = {"w": torch.zeros(3, dtype=torch.bfloat16)}
    tx = fo.accumulate(fo.sgd(1.0), 1000, mean=False)
    for way in (pure, in_place, stateful):
        found, _ = way(tx, params, [{"w": torch.ones(3, dtype=torch.bfloat16)}] * 1000)
        assert_close(found["w"], torch.full((3,), -1000.0, dtype=torch.bfloat16), rtol=0, atol=0)
    assert torch.tensor(256.0, dtype=torch.bfloat16) + 1 == 256
