"""The dtypes of states: chosen by `cast_states`, kept by steps and checkpoints."""

import pytest
import torch
from halves import in_single, make, same_bits
from histories import forms, optimize, pure, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

BF16, F32 = torch.bfloat16, torch.float32


def dtypes_of(state, name):
    return {path.rsplit(".", 1)[-1]: v.dtype for path, v in fo.state_dict(state).items() if f"{name}." in path}


@forms
@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [
        (F32, F32, F32),
        (BF16, BF16, BF16),
        ({"exp_avg": BF16}, BF16, F32),
        ({"exp_avg_sq": torch.float16}, F32, torch.float16),
    ],
)
def test_states_have_their_dtypes_at_every_step(take, dtype, first, second):
    params, history = make(3)
    tx = fo.cast_states(fo.adamw(0.1), dtype)
    for state in (tx.init(params), train(take, tx, params, history)[1]):
        assert set(dtypes_of(state, "exp_avg").values()) == {first}
        assert set(dtypes_of(state, "exp_avg_sq").values()) == {second}


@forms
def test_float32_moments_of_halves_are_those_of_float32_gradients(take):
    params, history = make()
    _, state = train(take, fo.cast_states(fo.adam(0.1), F32), params, history)
    _, expected = train(take, fo.adam(0.1), in_single(params), map(in_single, history))
    _, plain = train(take, fo.adam(0.1), params, history)
    torch.testing.assert_close(
        fo.tree.get(state, "exp_avg_sq"), fo.tree.get(expected, "exp_avg_sq"), rtol=1e-5, atol=1e-7
    )
    rounded, exact = fo.tree.get(plain, "exp_avg_sq")["bfloat"].float(), fo.tree.get(expected, "exp_avg_sq")["bfloat"]
    error = (rounded / exact - 1).abs().max()
    assert error > 1e-3


def test_in_bfloat16_a_mean_of_squares_stands_still_and_in_float32_it_does_not():
    p, g = torch.zeros(1, dtype=BF16), torch.ones(1, dtype=BF16)
    for tx, reached in ((fo.adam(0.0), False), (fo.cast_states(fo.adam(0.0), F32), True)):
        _, state = train(pure, tx, p, [g] * 2000)
        assert (fo.tree.get(state, "exp_avg_sq").item() > 0.85) == reached


@pytest.mark.parametrize(
    "make_tx",
    [lambda: fo.adamw(0.1), lambda: fo.muon(0.1), lambda: fo.adafactor(0.1), lambda: fo.lookahead(fo.sgd(0.1, 0.9))],
)
def test_any_chain_has_narrow_states_for_float32_parameters(make_tx):
    params, history = make(4)
    single = {"single": params["single"]}
    grads = [{"single": g["single"]} for g in history]
    found, state = train(pure, fo.cast_states(make_tx(), BF16), single, grads)
    expected, _ = train(pure, make_tx(), single, grads)
    kept = [v.dtype for v in fo.tree.flatten(state)[0] if v.ndim > 0]
    assert set(kept) == {BF16}
    assert found["single"].dtype == F32
    assert (found["single"] - expected["single"]).abs().max() < 0.2
    assert not torch.equal(found["single"], expected["single"])


def test_wider_parameters_and_complex_ones_keep_their_states():
    params = {"double": torch.ones(2, dtype=torch.float64), "waves": torch.ones(2, dtype=torch.complex64)}
    state = fo.cast_states(fo.adam(0.1), BF16).init(params)
    assert [v.dtype for v in fo.tree.get(state, "exp_avg").values()] == [torch.float64, torch.complex64]


def test_copies_of_parameters_are_not_cast():
    params, _ = make(0)
    inner, outer = fo.cast_states(fo.master_weights(fo.adam(0.1)), BF16).init(params)
    assert (fo.tree.get(inner, "exp_avg")["bfloat"].dtype, outer.master["bfloat"].dtype) == (BF16, F32)
    inner, outer = fo.master_weights(fo.cast_states(fo.adam(0.1), {"exp_avg": BF16})).init(params)
    assert (fo.tree.get(inner, "exp_avg")["bfloat"].dtype, fo.tree.get(inner, "exp_avg_sq")["bfloat"].dtype) == (
        BF16,
        F32,
    )


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}])
def test_an_optimizer_keeps_them_through_checkpoints(options):
    params, history = make(6)
    tx = fo.cast_states(fo.adamw(0.1), {"exp_avg": BF16})
    expected, optimizer = optimize(tx, params, history, **options)
    half, first = optimize(tx, params, history[:3], **options)
    own, again = optimize(tx, dict(enumerate(half)), [], **options)
    again.load_state_dict(through_a_file(first.state_dict()))
    for grads in history[3:]:
        for p, g in zip(own, grads.values(), strict=True):
            p.grad = g
        again.step()
    assert same_bits(own, expected)
    for p in own:
        assert (again.state[p]["exp_avg"].dtype, again.state[p]["exp_avg_sq"].dtype) == (BF16, F32)
    wrapped = fo.Optimizer(own, fo.cast_states(fo.adamw, F32), lr=0.1)
    wrapped.step()
    assert wrapped.state[own[0]]["exp_avg"].dtype == F32
    assert optimizer.state[expected[0]]["exp_avg"].dtype == BF16


def test_errors():
    with pytest.raises(ValueError, match="Invalid dtype: torch.float64; states are float32, bfloat16 or float16"):
        fo.cast_states(fo.adamw(0.1), torch.float64)
    with pytest.raises(ValueError, match="Invalid dtype of 'exp_avg': 'bf16'; states are"):
        fo.cast_states(fo.adamw(0.1), {"exp_avg": "bf16"})
    with pytest.raises(ValueError, match=r"Nothing in adamw\(0.1\) keeps a state 'mu'; states are exp_avg, exp_avg_sq"):
        fo.cast_states(fo.adamw(0.1), {"mu": torch.bfloat16})
    with pytest.raises(TypeError, match="is not a GradientTransformation"):
        fo.cast_states(torch.optim.Adam)
