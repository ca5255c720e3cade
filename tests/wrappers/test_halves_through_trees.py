"""Functions of the whole tree, such as `quantized`, inside and around wrappers that train half precision in float32."""

import pytest
import torch
from halves import make, same_bits
from histories import forms, in_place, optimize, pure, train

import functorch_optim as fo

rounding = {
    "kahan": fo.kahan,
    "stochastic_rounding": lambda tx: fo.stochastic_rounding(tx, 0),
    "master_weights": fo.master_weights,
}
averaging = {"schedule_free": fo.schedule_free, "gpa": fo.gpa}
wide = pytest.mark.parametrize("wide", [*rounding.values(), *averaging.values()], ids=[*rounding, *averaging])
rounds = pytest.mark.parametrize("rounds", rounding.values(), ids=rounding)
# On the same device, or for tensors below the smallest size, these leave the numbers alone.
without_effect = pytest.mark.parametrize(
    "whole", [fo.offload, lambda tx: fo.quantized(tx, min_size=10**6)], ids=["offload", "quantized"]
)


def base():
    return fo.cast_states(fo.lion(0.01), torch.float32)


def into_the_unit_box(tx):
    return fo.project(tx, lambda params: fo.tree.map(lambda p: p.clamp(0.0, 1.0), params))


@pytest.mark.parametrize("take", [pure, in_place])  # updates alone are rounded where all is one pass
@wide
@without_effect
def test_inside_it_has_the_numbers_of_a_chain_without_it(take, wide, whole):
    params, history = make(5)
    expected = train(take, wide(base()), params, history)[0]
    assert same_bits(train(take, wide(whole(base())), params, history)[0], expected)


@forms
@rounds
@without_effect
def test_around_it_has_the_numbers_of_a_chain_without_it(take, rounds, whole):
    params, history = make(5)
    expected = train(take, rounds(base()), params, history)[0]
    assert same_bits(train(take, whole(rounds(base())), params, history)[0], expected)


@wide
@without_effect
def test_an_optimizer_has_the_numbers_of_a_chain_without_it(wide, whole):
    params, history = make(5)
    expected = optimize(wide(base()), params, history)[0]
    assert same_bits(optimize(wide(whole(base())), params, history)[0], expected)


@wide
def test_inside_its_states_are_quantized_to_much_the_same_training(wide):
    params, history = make(10, size=3 * 4096)
    found, state = train(pure, wide(fo.quantized(base())), params, history)
    expected, _ = train(pure, wide(base()), params, history)
    assert fo.tree.get(state, "codes")[0].exp_avg["bfloat"].dtype == torch.uint8
    moved = [(found[name] - params[name]).float() for name in params]
    others = [(expected[name] - params[name]).float() for name in params]
    for one, other in zip(moved, others, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


@forms
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
@rounds
def test_a_projection_keeps_parameters_in_its_set(take, inside, rounds):
    params, history = make(5)
    tx = rounds(into_the_unit_box(fo.sgd(0.3))) if inside else into_the_unit_box(rounds(fo.sgd(0.3)))
    found, _ = train(take, tx, params, history)
    free, _ = train(take, rounds(fo.sgd(0.3)), params, history)
    lost = 2.0**-9 if rounds is fo.kahan and inside else 0.0  # which it adds after the projection
    for name, p in found.items():
        assert p.dtype == params[name].dtype
        assert -lost <= p.min() < p.max() <= 1 + lost
        assert not -lost <= free[name].min() <= free[name].max() <= 1 + lost


@pytest.mark.parametrize("average", averaging.values(), ids=averaging)
def test_a_projection_keeps_the_iterates_of_an_average_in_its_set(average):
    params, history = make(5)
    _, state = train(pure, average(into_the_unit_box(fo.sgd(0.3))), params, history)
    for z in fo.tree.get(state, "z").values():
        assert z.dtype == torch.float32
        assert z.min() > -1e-6
        assert z.max() < 1 + 1e-6


def test_a_function_of_the_user_sees_one_dtype_inside():
    seen = []

    def function(updates, params):
        seen.extend([(updates["w"].dtype, params["w"].dtype)])
        return updates

    params = {"w": torch.ones(3, dtype=torch.bfloat16)}
    for wrap in (*rounding.values(), *averaging.values(), lambda tx: tx):
        tx = wrap(fo.chain(fo.stateless(function), fo.sgd(0.1)))
        fo.step(tx, params, tx.init(params), params)
    assert seen == [(torch.float32, torch.float32)] * 5 + [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("rounds", rounding.values(), ids=rounding)
def test_inside_updates_are_wide_from_the_first_link_on(rounds):
    """Also where the wrapper is not the first link of a chain."""
    seen = []

    def look(updates, params):
        seen.append(updates)
        return updates

    tx = fo.chain(fo.clip(9.0), rounds(fo.chain(fo.scale(1 / 3), fo.stateless(look))))
    params, grads = torch.ones(4, dtype=torch.bfloat16), torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.bfloat16)
    fo.step(tx, grads, tx.init(params), params)
    torch.testing.assert_close(seen[0], grads.float() / 3)
