"""States in 8 and 4 bits, against an own coder in numpy; and states on another device."""

import copy

import numpy as np
import pytest
import torch
from halves import same_bits
from histories import forms, optimize, pure, train
from torch._subclasses.fake_tensor import FakeTensorMode

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file
from functorch_optim.wrappers.quantizing import _maps, _packed, _unpacked

BITS = pytest.mark.parametrize("bits", [8, 4])


def make(count=6, rows=90):
    generator = torch.Generator().manual_seed(0)
    drawn = lambda: {
        "w": torch.randn(rows, 64, generator=generator),
        "b": torch.randn(64, generator=generator),
    }
    return drawn(), [drawn() for _ in range(count)]


def size(state):
    return sum([leaf.nbytes for leaf in fo.tree.flatten(state)[0] if leaf.ndim > 0])


def coded(x, numbers, block):
    """Round each block of a vector to the nearest of some numbers, times the largest absolute value."""
    found = np.empty_like(x)
    for start in range(0, len(x), block):
        part = x[start : start + block]
        largest = np.abs(part).max()
        unsigned = bool((part >= 0).all())
        table = numbers[int(unsigned)] * largest
        nearest = table[np.abs(part[:, None] - table[None]).argmin(1)]
        found[start : start + block] = np.where(unsigned & (part > 0) & (nearest == 0), table[1], nearest)
    return found


def test_the_maps_are_the_published_ones():
    signed, unsigned = [m.double() for m in _maps(8, torch.device("cpu"))]
    assert len(signed) == len(unsigned) == 256
    assert signed.tolist() == sorted(set(signed.tolist()))
    assert unsigned.tolist() == sorted(set(unsigned.tolist()))
    # The first and last numbers in bitsandbytes' functional.create_dynamic_map().
    assert signed[:2].tolist() == pytest.approx([-0.99296875, -0.97890625])
    assert signed[-2:].tolist() == pytest.approx([0.99296875, 1.0])
    assert signed[128].item() == pytest.approx(5.5e-7)
    assert unsigned[:3].tolist() == pytest.approx([0.0, 3.25e-7, 7.75e-7])
    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    four, linear = [m.tolist() for m in _maps(4, torch.device("cpu"))]
    assert four == pytest.approx([*[-x for x in reversed(positive)], 0.0, *positive, 1.0])
    assert linear == [k / 16 for k in range(1, 17)]


@BITS
@pytest.mark.parametrize("block", [128, 100])
@pytest.mark.parametrize("kind", ["signed", "squares", "zeros", "mixed"])
def test_codes_stand_for_the_nearest_numbers(bits, block, kind):
    x = torch.randn(50, 34, generator=torch.Generator().manual_seed(1)) ** 3
    x = {"signed": x, "squares": x.square(), "zeros": x * 0, "mixed": torch.cat([x[:25], x[25:].abs()])}[kind]
    codes, absmax = _packed(x, bits, block)
    found = _unpacked(codes, absmax, bits, block).numpy().ravel()
    numbers = [m.numpy() for m in _maps(bits, torch.device("cpu"))]
    expected = coded(x.numpy().ravel(), numbers, block)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
    assert codes.dtype == torch.uint8
    assert codes.shape == (50, 34 * bits // 8)


@BITS
@forms
def test_training_stays_near_that_in_float32(take, bits):
    params, history = make(20)
    expected, _ = train(take, fo.adamw(1e-2), params, history)
    found, state = train(take, fo.quantized(fo.adamw(1e-2), bits), params, history)
    torch.testing.assert_close(found["b"], expected["b"], rtol=1e-5, atol=1e-6)
    way = expected["w"] - params["w"]
    error = ((found["w"] - expected["w"]).norm() / way.norm()).item()
    assert 1e-4 < error < {8: 0.02, 4: 0.25}[bits]
    assert size(state) < {8: 0.27, 4: 0.15}[bits] * size(fo.adamw(1e-2).init(params))


@BITS
def test_gradients_that_are_small_beside_others_of_their_block_take_no_large_steps(bits):
    params = torch.zeros(4096)
    grads = torch.full_like(params, 1e-5)
    grads[::256] = 1.0  # the squares of the others are 1e-10 of the largest
    tx = fo.quantized(fo.adamw(0.1), bits)
    state = tx.init(params)
    for _ in range(60):
        params, state = fo.step(tx, grads, state, params)
    assert params.abs().amax() < 7.0  # Adam goes 0.1 in a step


def test_small_double_complex_and_odd_tensors_are_not_quantized():
    params = {
        "small": torch.zeros(4095),
        "double": torch.zeros(5000, dtype=torch.float64),
        "waves": torch.zeros(5000, dtype=torch.complex64),
        "odd": torch.zeros(1000, 5),
        "even": torch.zeros(5, 1000),
        "half": torch.zeros(4096, dtype=torch.bfloat16),
    }
    quantities = {}
    for bits in (8, 4):
        state = fo.quantized(fo.sgd(0.1, 0.9), bits).init(params)
        codes, absmax = fo.tree.get(state.codes, "momentum_buffer"), fo.tree.get(state.absmax, "momentum_buffer")
        quantities[bits] = {name for name, a in absmax.items() if isinstance(a, torch.Tensor)}
        assert all((codes[name].dtype == torch.uint8) == (name in quantities[bits]) for name in params)
    assert quantities == {8: {"odd", "even", "half"}, 4: {"even", "half"}}
    state = fo.quantized(fo.sgd(0.1, 0.9), min_size=1, block_size=3).init({"small": torch.ones(4)})
    assert fo.tree.get(state.absmax, "momentum_buffer")["small"].shape == (2,)


def test_a_state_that_does_not_change_is_not_rounded_again():
    params, history = make(2)
    tx = fo.quantized(fo.sgd(0.1, 0.9))
    _, state = train(pure, tx, params, history)
    _, again = fo.step(tx, {"w": None, "b": history[0]["b"]}, state, params)
    new, old = fo.tree.get(again.codes, "momentum_buffer"), fo.tree.get(state.codes, "momentum_buffer")
    assert new["w"] is old["w"]
    assert not torch.equal(new["b"], old["b"])


@BITS
def test_checkpoints_have_codes(bits):
    params, history = make()
    tx = fo.quantized(fo.adamw(0.01), bits)
    expected, _ = train(pure, tx, params, history)
    half, state = train(pure, tx, params, history[:3])
    saved = through_a_file(fo.state_dict(state, half))
    loaded = fo.load_state_dict(tx.init(half), saved, half)
    assert same_bits(train(pure, tx, half, history[3:], loaded)[0], expected)
    own, _ = optimize(tx, params, history)
    torch.testing.assert_close(dict(zip(params, own, strict=True)), expected, check_dtype=True, rtol=1e-3, atol=1e-3)
    first = optimize(tx, params, history[:3])
    again, optimizer = optimize(tx, dict(zip(params, first[0], strict=True)), [])
    optimizer.load_state_dict(through_a_file(first[1].state_dict()))
    for grads in history[3:]:
        for p, g in zip(again, grads.values(), strict=True):
            p.grad = g.clone()
        optimizer.step()
    assert same_bits(again, own)


@BITS
def test_members_of_a_batch_are_trained_as_alone(bits):
    params, history = make(2)
    tx = fo.quantized(fo.adamw(0.01), bits)

    def trained(p):
        state = tx.init(p)
        for grads in history:
            p, state = fo.step(tx, grads, state, p)
        return p

    found = torch.vmap(trained)(fo.tree.map(lambda p: torch.stack([p, -2 * p]), params))
    for k, factor in enumerate((1, -2)):
        alone = trained(fo.tree.map(lambda p, factor=factor: factor * p, params))
        torch.testing.assert_close(fo.tree.map(lambda p, k=k: p[k], found), alone, rtol=1e-4, atol=1e-4)


def test_halves_with_master_weights_and_moments_of_8_bits():
    params, history = make(10)
    halves = fo.tree.cast(params, torch.bfloat16)
    grads = [fo.tree.cast(g, torch.bfloat16) for g in history]
    found, state = train(pure, fo.master_weights(fo.quantized(fo.adamw(1e-3))), halves, grads)
    expected, _ = train(pure, fo.adamw(1e-3), params, history)
    assert found["w"].dtype == torch.bfloat16
    assert state[0].codes[-1] is not None
    assert (state[1].master["w"] - expected["w"]).norm() < 0.1 * (expected["w"] - params["w"]).norm() + 0.2


def test_errors_of_quantized():
    with pytest.raises(ValueError, match="Invalid bits: 6; choose 8 or 4"):
        fo.quantized(fo.adam(0.1), 6)
    with pytest.raises(ValueError, match="Invalid block_size: 0"):
        fo.quantized(fo.adam(0.1), block_size=0)
    with pytest.raises(TypeError, match="min_size"):
        fo.quantized(fo.adam(0.1), min_size=0.5)


# Another device. ------------------------------------------------------------------------------------------------------


def devices_of(tree):
    return {leaf.device.type for leaf in fo.tree.flatten(tree)[0] if leaf.ndim > 0}


@pytest.mark.parametrize("take", ["update", "step"])
def test_states_are_elsewhere_between_steps(take):
    """Simulated devices: tensors without data, which refuse to be mixed."""
    with FakeTensorMode():
        params = {"w": torch.zeros(4, 3, device="cuda"), "b": torch.zeros(3, device="cuda")}
        tx = fo.offload(fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)))
        state = tx.init(params)
        for _ in range(2):
            assert devices_of(state) == {"cpu"}
            grads = fo.tree.map(torch.ones_like, params)
            if take == "step":
                params, state = fo.step(tx, grads, state, params)
            else:
                updates, state = tx.update(grads, state, params)
                params = fo.apply_updates(params, updates)
            assert devices_of(params) == {"cuda"}
        assert devices_of(state) == {"cpu"}
        assert devices_of(fo.adamw(0.1).init(params)) == {"cuda"}


@forms
def test_its_numbers_are_those_without_it(take):
    params, history = make()
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
    expected, _ = train(take, tx, params, history)
    found, state = train(take, fo.offload(tx), params, history)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    _, again = fo.step(fo.offload(tx), {**history[0], "w": None}, copy.copy(state), params)
    assert fo.tree.get(again, "exp_avg")["w"] is fo.tree.get(state, "exp_avg")["w"]


def test_checkpoints_of_offloaded_states():
    params, history = make()
    tx = fo.offload(fo.adamw(0.1))
    expected, _ = optimize(tx, params, history)
    first = optimize(tx, params, history[:3])
    again, optimizer = optimize(tx, dict(zip(params, first[0], strict=True)), [])
    optimizer.load_state_dict(through_a_file(first[1].state_dict()))
    for grads in history[3:]:
        for p, g in zip(again, grads.values(), strict=True):
            p.grad = g.clone()
        optimizer.step()
    assert same_bits(again, expected)


def test_parameters_on_two_devices_are_refused():
    with FakeTensorMode():
        params = [torch.zeros(2), torch.zeros(2, device="cuda")]
        with pytest.raises(ValueError, match="offload is for parameters on one device, got some on cpu and on cuda:0"):
            fo.offload(fo.adamw(0.1)).init(params)
