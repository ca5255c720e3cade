"""Compensated sums and stochastic rounding of parameters in half precision; and rounding itself."""

import math

import pytest
import torch
from halves import HALVES, in_single, make, same_bits
from histories import by_update, forms, in_place, optimize, pure, train

import functorch_optim as fo
from functorch_optim._numerics import rounded
from functorch_optim.testing._copies import through_a_file, through_pickle

DTYPES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("dtype", DTYPES)
wrappers = pytest.mark.parametrize(
    "wrap", [fo.kahan, lambda tx: fo.stochastic_rounding(tx, 0)], ids=["kahan", "random"]
)


@halves
@pytest.mark.parametrize("compiling", [False, True])
def test_rounding_is_that_of_a_cast(dtype, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    special = [0.0, -0.0, math.inf, -math.inf, 65504.0, 65519.99, 65520.0, -65520.0, 3.4e38, 1e-45, 2.0**-14, 2.0**-24]
    ties = torch.arange(-4000, 4000) * 2.0**-12
    x = torch.cat([bits.view(torch.float32), torch.tensor(special), ties, ties * 2.0**-13])
    assert same_bits(rounded(x, dtype), x.to(dtype).float())
    assert rounded(torch.tensor(math.nan), dtype).isnan()
    assert not same_bits(torch.trunc(x * 256) / 256, x.to(dtype).float())


@halves
def test_the_derivative_of_rounding_is_one(dtype):
    x = torch.tensor([1.001, 2.0, -1e-6, 0.0])
    ones = torch.ones_like(x)
    assert torch.equal(torch.func.grad(lambda x: rounded(x, dtype).sum())(x), ones)
    assert torch.equal(torch.func.jvp(lambda x: rounded(x, dtype), (x,), (ones,))[1], ones)
    assert torch.equal(torch.vmap(torch.func.grad(lambda x: rounded(x, dtype)))(x), ones)


# For both wrappers. ---------------------------------------------------------------------------------------------------


@wrappers
@forms
def test_many_small_updates_add_up(take, wrap):
    params = {"w": torch.ones(2000, dtype=torch.bfloat16)}
    grads = [{"w": torch.ones(2000, dtype=torch.bfloat16)}] * 300
    found, _ = train(take, wrap(fo.sgd(3e-4)), params, grads)
    plain, _ = train(take, fo.sgd(3e-4), params, grads)
    assert found["w"].float().mean() == pytest.approx(0.91, abs=0.002)
    assert torch.equal(plain["w"], params["w"])


@wrappers
@forms
def test_it_follows_a_float32_training_which_half_precision_does_not(take, wrap):
    params, [grads] = make(1)
    history = [grads] * 200
    tx = fo.cast_states(fo.adamw(1e-4), torch.float32)
    expected, _ = train(take, tx, in_single(params), map(in_single, history))
    found, _ = train(take, wrap(tx), params, history)
    plain, _ = train(take, tx, params, history)
    assert {k: p.dtype for k, p in found.items()} == {k: p.dtype for k, p in params.items()}

    def bias(trained):
        return ((trained["bfloat"].float() - expected["bfloat"]) * grads["bfloat"].sign()).mean().abs()

    assert bias(found) < 1e-3
    assert bias(plain) > 0.01
    torch.testing.assert_close(found["single"], expected["single"], rtol=1e-4, atol=1e-6)


@wrappers
def test_wide_parameters_are_trained_as_without_it(wrap):
    params, history = make(3)
    double = {"single": params["single"], "double": torch.ones(3, dtype=torch.float64)}
    grads = [{"single": g["single"], "double": torch.full((3,), 0.3, dtype=torch.float64)} for g in history]
    found, _ = train(pure, wrap(fo.adamw(0.1)), double, grads)
    torch.testing.assert_close(found, train(pure, fo.adamw(0.1), double, grads)[0], rtol=1e-6, atol=1e-6)


@wrappers
def test_all_forms_give_the_same_parameters(wrap):
    params, history = make(4)
    tx = wrap(fo.chain(fo.clip_by_global_norm(5.0), fo.adamw(0.1)))
    expected, _ = train(pure, tx, params, history)
    for take in (by_update, in_place):
        torch.testing.assert_close(train(take, tx, params, history)[0], expected, rtol=2e-2, atol=1e-3)
    own, _ = optimize(tx, params, history)
    torch.testing.assert_close(dict(zip(params, own, strict=True)), expected, rtol=2e-2, atol=1e-3, check_dtype=True)


@wrappers
def test_infinite_and_nan_parameters_stay(wrap):
    for dtype in DTYPES:
        p = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype)
        tx = wrap(fo.sgd(1.0))
        state = tx.init(p)
        for _ in range(2):
            p, state = fo.step(tx, torch.ones_like(p), state, p)
        assert same_bits(p, torch.tensor([torch.inf, -torch.inf, torch.nan, -1.0], dtype=dtype))


@wrappers
def test_a_nan_gradient_is_not_hidden(wrap):
    p, tx = torch.ones(2, dtype=torch.bfloat16), wrap(fo.sgd(1.0))
    p, _ = fo.step(tx, torch.tensor([torch.nan, 0.0], dtype=torch.bfloat16), tx.init(p), p)
    assert p.isnan().tolist() == [True, False]


@wrappers
@pytest.mark.parametrize("by", ["path", "index"])
def test_a_resumed_training_is_the_uninterrupted_one(wrap, by):
    params, history = make()
    tx = wrap(fo.adamw(0.1))
    expected, last = train(pure, tx, params, history)
    half, state = train(pure, tx, params, history[:5])
    saved = through_a_file(fo.state_dict(state, half, by=by))
    found, end = train(pure, tx, half, history[5:], fo.load_state_dict(tx.init(half), saved, half, by=by))
    assert same_bits(found, expected)
    assert same_bits(end, last)


@wrappers
def test_an_optimizer_resumes(wrap):
    params, history = make()
    tx = wrap(fo.adamw(0.1))
    expected, _ = optimize(tx, params, history)
    half, optimizer = optimize(tx, params, history[:5])
    own, again = optimize(tx, dict(enumerate(half)), [])
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    for grads in history[5:]:
        for p, g in zip(own, grads.values(), strict=True):
            p.grad = g
        again.step()
    assert same_bits(own, expected)


@wrappers
def test_members_of_a_batch_are_trained_as_alone(wrap):
    params, history = make(2)
    tx = wrap(fo.adamw(0.1))

    def trained(p):
        state = tx.init(p)
        for grads in history:
            p, state = fo.step(tx, grads, state, p)
        return p

    stacked = fo.tree.map(lambda p: torch.stack([p, -2 * p]), params)
    found = torch.vmap(trained)(stacked)
    for k in range(2):
        alone = trained(fo.tree.map(lambda p, k=k: p[k], stacked))
        torch.testing.assert_close(fo.tree.map(lambda p, k=k: p[k], found), alone, rtol=1e-2, atol=1e-3)


@pytest.mark.sampled(pool="compiled")
@wrappers
def test_compiled_it_rounds_as_eagerly(wrap):
    params, history = make(1)
    tx = wrap(fo.adamw(0.1))
    found, _ = torch.compile(lambda p: fo.step(tx, history[0], tx.init(p), p), fullgraph=True)(params)
    expected, _ = fo.step(tx, history[0], tx.init(params), params)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-4)
    unequal = [(found[half] != expected[half]).float().mean() for half in HALVES]
    assert max(unequal) < 0.02


@wrappers
def test_its_derivative_is_that_of_the_float32_training(wrap):
    params, history = make(5, size=30)

    def loss(lr, wrap, params, history):
        tx = wrap(fo.cast_states(fo.adamw(lr), torch.float32))
        return sum(p.float().square().sum() for p in train(pure, tx, params, history)[0].values())

    lr = torch.tensor(0.1, dtype=torch.float64)
    found = torch.func.grad(loss)(lr, wrap, params, history)
    expected = torch.func.grad(loss)(lr, lambda tx: tx, in_single(params), list(map(in_single, history)))
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)


# Compensated summation. -----------------------------------------------------------------------------------------------


def test_parameter_and_compensation_are_the_sum():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=generator).bfloat16()
    total, tx = p.double(), fo.kahan(fo.sgd(1.0))
    state = tx.init(p)
    for _ in range(500):
        g = (1e-3 * torch.randn(1000, generator=generator)).bfloat16()
        p, state = fo.step(tx, g, state, p)
        total = total - g.double()
    error = (p.double() + state[1].compensation.double() - total).abs()
    assert state[1].compensation.dtype == torch.bfloat16
    assert (error / total.abs().clamp(min=1e-2)).max() < 500 * 2**-17
    assert ((p.double() - total).abs() / total.abs().clamp(min=1e-2)).max() > 2**-9  # without it
    assert ((p.double() - total).abs() <= 2**-8 * total.abs() + 1e-6).all()


def test_the_numbers_of_compensated_summation():
    tx, p = fo.kahan(fo.sgd(1.0)), torch.ones(1, dtype=torch.bfloat16)
    state, g = tx.init(p), torch.tensor([2.0**-10], dtype=torch.bfloat16)
    expected = [(1.0, -(2.0**-10)), (1.0, -(2.0**-9)), (1 - 2.0**-8, 2.0**-10), (1 - 2.0**-8, 0.0)]
    for value, rest in expected:
        p, state = fo.step(tx, g, state, p)
        assert (p.item(), state[1].compensation.item()) == (value, rest)


# Stochastic rounding. -------------------------------------------------------------------------------------------------


@halves
@pytest.mark.parametrize("lr", [0.3, 1e-3, 0.7001, 5e-6])
def test_the_mean_is_the_number_that_is_rounded(dtype, lr):
    count = 200_000
    p, g = torch.full((count,), 0.5, dtype=dtype), torch.ones(count, dtype=dtype)
    tx = fo.stochastic_rounding(fo.sgd(lr), generator=1)
    found, _ = fo.step(tx, g, tx.init(p), p)
    x = 0.5 - torch.tensor(lr).item()
    values = found.double().unique()
    step = (values[-1] - values[0]).item()
    assert len(values) == 2
    assert values[0] < x < values[1]
    deviation = step * math.sqrt(((x - values[0]) * (values[1] - x) / step**2).item() / count)
    assert abs(found.double().mean().item() - x) < 4 * deviation + 2**-24
    nearest = (p.float() - lr).to(dtype).double().mean().item()
    assert abs(nearest - x) > 4 * deviation + 2**-24


def test_below_the_smallest_normal_number_of_float16_too():
    count, x = 200_000, 3.3 * 2.0**-24
    p, g = torch.zeros(count, dtype=torch.float16), torch.full((count,), -1.0, dtype=torch.float16)
    tx = fo.stochastic_rounding(fo.sgd(x), generator=2)
    found, _ = fo.step(tx, g, tx.init(p), p)
    units = found.double() * 2.0**24
    assert units.unique().tolist() == [3.0, 4.0]
    assert units.mean().item() == pytest.approx(3.3, abs=4 * math.sqrt(0.21 / count) + 2**-12)


@halves
def test_numbers_that_need_no_rounding_stay(dtype):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    p = torch.zeros_like(x)
    tx = fo.stochastic_rounding(fo.sgd(1.0), generator=3)
    found, _ = fo.step(tx, -x, tx.init(p), p)
    assert torch.equal(found, x)
    most = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal, 2.0**-24], dtype=dtype)
    assert torch.equal(fo.step(tx, -most, tx.init(most * 0), most * 0)[0], most)


def test_steps_leaves_elements_and_keys_have_bits_of_their_own():
    ups = []
    for key in (0, 1, -1):
        tx = fo.stochastic_rounding(fo.sgd(2.0**-9), generator=key)
        params = {"a": torch.full((2000,), 0.75, dtype=torch.bfloat16), "b": torch.full((2000,), 0.75).bfloat16()}
        state = tx.init(params)
        for _ in range(2):
            new, state = fo.step(tx, fo.tree.map(torch.ones_like, params), state, params)
            ups += [(p == 0.75).double() for p in new.values()]
    rows = torch.stack(ups)
    assert (rows.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(2000)
    assert (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max() < 5 / math.sqrt(2000)
    lags = [((rows[0, lag:] - 0.5) * (rows[0, :-lag] - 0.5)).mean().abs() * 4 for lag in (1, 2, 64)]
    assert max(lags) < 5 / math.sqrt(2000)


def test_generators_give_keys_which_are_reproducible():
    p, g = torch.ones(1000, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bfloat16)

    def found(tx):
        return fo.step(tx, g, tx.init(p), p)[0]

    def made(seed):
        return fo.stochastic_rounding(fo.sgd(1e-3), torch.Generator().manual_seed(seed))

    assert torch.equal(found(made(5)), found(made(5)))
    assert not torch.equal(found(made(5)), found(made(6)))
    assert torch.equal(found(made(5)), found(through_pickle(made(5))))
    keys = torch.arange(2)
    batch = torch.vmap(lambda key: found(fo.stochastic_rounding(fo.sgd(1e-3), key)))(keys)
    assert torch.equal(batch[1], found(fo.stochastic_rounding(fo.sgd(1e-3), 1)))
    assert not torch.equal(batch[0], batch[1])


def test_errors_of_stochastic_rounding():
    with pytest.raises(TypeError, match="Invalid generator: 0.5; give a torch.Generator, or an integer as in"):
        fo.stochastic_rounding(fo.sgd(0.1), generator=0.5)
    tx, p = fo.stochastic_rounding(fo.sgd(0.1), generator=0), torch.ones(2)
    with pytest.raises(ValueError, match=r"stochastic_rounding needs the parameters, but update .* call tx.update\("):
        tx.update(p, tx.init(p))
