"""`master_weights` is a training of float32 parameters, of which the user sees the rounding."""

import copy

import pytest
import torch
from halves import HALVES, in_single, make, same_bits
from histories import by_update, forms, in_place, optimize, pure, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

INNER = {
    "sgd": lambda: fo.sgd(0.1, 0.9, weight_decay=0.01),
    "adamw": lambda: fo.adamw(0.1),
    "clipped": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.05)),
    "rprop": lambda: fo.rprop(0.1),
    "schedule_free": lambda: fo.schedule_free(fo.adamw(0.1)),
    "accumulate": lambda: fo.accumulate(fo.adamw(0.1), 2),
    "tree": lambda: fo.chain(fo.autoclip(50.0), fo.adam(0.1)),
}
each = pytest.mark.parametrize("name", INNER)
INNER_OF_ANY = {**INNER, "muon": lambda: fo.schedule_free(fo.muon(0.1, ns_dtype=None))}
MACHINES = {"foreach": {"foreach": True}, "blocks": {"foreach": False}}


def step_by(**options):
    return lambda tx, params, state, grads: fo.step_(tx, grads, state, params, **options)


def copies(state):
    return {name: leaf for name, leaf in state[1].master.items() if isinstance(leaf, torch.Tensor)}


@each
@pytest.mark.parametrize("machine", MACHINES)
def test_the_copies_are_a_float32_training_bit_for_bit(name, machine):
    params, history = make()
    tx, take = INNER[name](), step_by(**MACHINES[machine])
    expected, _ = train(take, tx, in_single(params), map(in_single, history))
    found, state = train(take, fo.master_weights(tx), params, history)
    assert same_bits(copies(state), {half: expected[half] for half in HALVES})
    assert same_bits(found, {k: expected[k].to(p.dtype) for k, p in params.items()})
    plain, _ = train(take, tx, params, history)
    assert not same_bits(plain, found)


@pytest.mark.parametrize("name", INNER_OF_ANY)
@forms
def test_in_every_form_the_parameters_are_the_rounded_copies(take, name):
    params, history = make()
    tx = INNER_OF_ANY[name]()
    expected, _ = train(take, tx, in_single(params), map(in_single, history))
    found, state = train(take, fo.master_weights(tx), params, history)
    assert {k: p.dtype for k, p in found.items()} == {k: p.dtype for k, p in params.items()}
    for half in HALVES:
        assert torch.equal(found[half], copies(state)[half].to(found[half].dtype))
        torch.testing.assert_close(copies(state)[half], expected[half], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["single"], expected["single"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "clipped", "schedule_free", "tree"])
def test_an_optimizer_keeps_the_copies(name):
    params, history = make()
    tx = fo.master_weights(INNER[name]())
    expected, state = train(step_by(foreach=True), tx, params, history)
    own, optimizer = optimize(tx, params, history, foreach=True)
    assert same_bits(dict(zip(params, own, strict=True)), expected)
    kept = {k: optimizer.state[p].get("master") for k, p in zip(params, own, strict=True)}
    assert kept.pop("single") is None
    assert same_bits(kept, copies(state))


def test_a_factory_is_wrapped_as_a_factory():
    params, history = make(2)
    own, _ = optimize(fo.master_weights(fo.adamw), params, history, lr=0.1)
    expected, _ = train(in_place, fo.master_weights(fo.adamw(0.1)), params, history)
    assert same_bits(dict(zip(params, own, strict=True)), expected)


def test_states_are_float32_and_wide_parameters_have_no_copy():
    params, _ = make(0)
    params["double"] = torch.ones(3, dtype=torch.float64)
    inner, outer = fo.master_weights(fo.adamw(0.1)).init(params)
    assert {k: v.dtype for k, v in inner[0].exp_avg_sq.items()} == {
        **dict.fromkeys((*HALVES, "single"), torch.float32),
        "double": torch.float64,
    }
    assert outer.master["single"] == outer.master["double"] == fo.MaskedNode()
    assert same_bits(outer.master["bfloat"], params["bfloat"].float())


def test_many_small_steps_add_up():
    params = {"w": torch.ones(5, dtype=torch.bfloat16)}
    grads = [{"w": torch.full((5,), 1.0, dtype=torch.bfloat16)}] * 1000
    found, _ = train(pure, fo.master_weights(fo.sgd(1e-4)), params, grads)
    assert same_bits(found["w"], torch.full((5,), 0.9).bfloat16())
    plain, _ = train(pure, fo.sgd(1e-4), params, grads)
    assert same_bits(plain["w"], params["w"])


# Edits from outside. --------------------------------------------------------------------------------------------------


@forms
def test_an_edited_element_becomes_its_copy_and_the_others_stay(take):
    params, history = make(4)
    tx = fo.master_weights(fo.adamw(0.1))
    found, state = train(take, tx, params, history[:2])
    before = fo.tree.map(torch.clone, copies(state))
    edited = {**found, "bfloat": found["bfloat"].clone()}
    edited["bfloat"][0] = torch.tensor([7.0, -7.0, 0.5])
    mended, before["bfloat"][0] = dict(before), torch.tensor([7.0, -7.0, 0.5])
    found, new = take(tx, edited, state, history[2])
    wide, states = train(take, fo.adamw(0.1), in_single(params), map(in_single, history[:2]))
    expected, _ = take(fo.adamw(0.1), {**mended, "single": wide["single"]}, states, in_single(history[2]))
    for half in HALVES:
        torch.testing.assert_close(copies(new)[half], expected[half], rtol=1e-4, atol=1e-5)
        assert torch.equal(found[half], copies(new)[half].to(found[half].dtype))


def test_an_edit_by_one_unit_is_noticed_and_the_rounding_itself_is_none():
    tx, p = fo.master_weights(fo.sgd(1.0)), torch.full((2,), 1.0, dtype=torch.bfloat16)
    g = torch.full((2,), 2.0**-10, dtype=torch.bfloat16)
    p, state = fo.step(tx, g, tx.init(p), p)
    assert torch.equal(p, torch.ones(2, dtype=torch.bfloat16))
    p[1] -= 2.0**-8
    p, state = fo.step(tx, g, state, p)
    assert state[1].master.tolist() == [1 - 2.0**-9, 1 - 2.0**-8 - 2.0**-10]


def test_infinite_and_nan_parameters_stay():
    values = [torch.inf, -torch.inf, torch.nan, 1.0]
    tx, p = fo.master_weights(fo.sgd(1.0)), torch.tensor(values, dtype=torch.bfloat16)
    p, state = fo.step(tx, torch.ones_like(p), tx.init(p), p)
    p, state = fo.step(tx, torch.ones_like(p), state, p)
    assert same_bits(p, torch.tensor([torch.inf, -torch.inf, torch.nan, -1.0], dtype=torch.bfloat16))


def test_parameters_are_the_rounding_of_copies_after_steps_of_any_size():
    generator = torch.Generator().manual_seed(0)
    sizes = 2.0 ** (-20 * torch.rand(20_000, generator=generator))
    for dtype in (torch.bfloat16, torch.float16):
        p = torch.randn(20_000, generator=generator).to(dtype)
        g = (p * (1 + sizes * torch.randn(20_000, generator=generator))).to(dtype)
        for take in (by_update, pure, in_place):
            tx = fo.master_weights(fo.sgd(1.0 + 1e-4))
            found, state = take(tx, p.clone(), tx.init(p), g)
            master = state[1].master
            ordinary = master.abs() >= 2**-12 * p.abs()
            assert torch.equal(found[ordinary], master.to(dtype)[ordinary])
            assert ((found.float() - master.to(dtype).float()).abs() <= 2**-23 * p.float().abs()).all()
        assert not torch.equal(by_half(p, g)[ordinary], found[ordinary])


def by_half(p, g):
    return p + (-(1.0 + 1e-4) * g.float()).to(p.dtype)


# Saved, transformed, differentiated, combined. ------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "index"])
def test_a_resumed_training_is_the_uninterrupted_one(by):
    params, history = make()
    tx = fo.master_weights(fo.adamw(0.1))
    expected, last = train(pure, tx, params, history)
    half, state = train(pure, tx, params, history[:5])
    saved = through_a_file(fo.state_dict(state, half, by=by))
    loaded = fo.load_state_dict(tx.init(half), saved, half, by=by)
    assert loaded[1].master["bfloat"].dtype == torch.float32
    found, end = train(pure, tx, half, history[5:], loaded)
    assert same_bits(found, expected)
    assert same_bits(copies(end), copies(last))


def test_an_optimizer_resumes_with_its_copies():
    params, history = make()
    tx = fo.master_weights(fo.adamw(0.1))
    expected, _ = optimize(tx, params, history)
    half, optimizer = optimize(tx, params, history[:5])
    saved = through_a_file(optimizer.state_dict())
    own, again = optimize(tx, dict(enumerate(half)), [])
    again.load_state_dict(saved)
    for grads in history[5:]:
        for p, g in zip(own, grads.values(), strict=True):
            p.grad = g
        again.step()
    assert same_bits(own, expected)
    assert again.state[own[0]]["master"].dtype == torch.float32


def test_members_of_a_batch_are_trained_as_alone():
    params, history = make(3)
    stacked = fo.tree.map(lambda p: torch.stack([p, -2 * p, 0.5 * p]), params)
    tx = fo.accumulate(fo.master_weights(fo.adamw(0.1)), 2)

    def trained(p):
        state = tx.init(p)
        for grads in history:
            p, state = fo.step(tx, grads, state, p)
        return p, state[1][1].master["bfloat"]

    found = torch.vmap(trained)(stacked)
    for k in range(3):
        alone = trained(fo.tree.map(lambda p, k=k: p[k], stacked))
        torch.testing.assert_close(fo.tree.map(lambda p, k=k: p[k], found), alone, rtol=1e-6, atol=1e-6)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("name", ["bfloat", "float16", "single"])
def test_compiled_it_rounds_as_eagerly(name):
    """A compiler leaves out a cast to half precision and back."""
    params, history = make(3)
    params, *history = [{name: some[name]} for some in (params, *history)]
    tx, dtype = fo.master_weights(fo.adamw(0.1)), params[name].dtype

    def two(p, state, grads):
        for g in grads:
            updates, state = tx.update(g, state, p)
            p = fo.apply_updates(p, updates)
        return p, state

    found, state = torch.compile(two, fullgraph=True)(params, tx.init(params), history[:2])
    right, eager = two(params, tx.init(params), history[:2])
    torch.testing.assert_close(copies(state), copies(eager), rtol=1e-5, atol=1e-6)
    fused, end = train(step_by(fused=True), tx, params, history[:2])
    torch.testing.assert_close(copies(end), copies(eager), rtol=1e-5, atol=1e-6)
    if name == "single":  # which needs no copy
        torch.testing.assert_close((found, fused), (right, right), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found[name], copies(state)[name].to(dtype))
        assert torch.equal(fused[name], copies(end)[name].to(dtype))


def test_its_derivative_is_that_of_the_float32_training():
    params, history = make(5, size=30)

    def loss(lr, wrap, params, history):
        tx = wrap(fo.adamw(lr))
        return sum(p.float().square().sum() for p in train(pure, tx, params, history)[0].values())

    lr = torch.tensor(0.1, dtype=torch.float64)
    found = torch.func.grad(loss)(lr, fo.master_weights, params, history)
    expected = torch.func.grad(loss)(lr, lambda tx: tx, in_single(params), list(map(in_single, history)))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=0)
    tangent = torch.func.jvp(lambda lr: loss(lr, fo.master_weights, params, history), (lr,), (torch.ones_like(lr),))[1]
    torch.testing.assert_close(tangent.double(), found, rtol=2e-2, atol=0)


def test_masks_averages_and_copies_of_copies():
    params, history = make()
    tx = fo.ema_weights(
        fo.masked(fo.master_weights(fo.adamw(0.1)), {"bfloat": True, "float16": False, "single": True}), 0.9
    )
    found, state = train(pure, tx, params, history)
    expected, _ = train(pure, fo.master_weights(fo.adamw(0.1)), params, history)
    assert torch.equal(found["bfloat"], expected["bfloat"])
    assert state[0][1].master["float16"] == fo.MaskedNode()
    assert copy.copy(fo.eval_params(tx, state, found))["bfloat"].dtype == torch.bfloat16


@pytest.mark.parametrize("wrap", [fo.master_weights, fo.kahan, fo.cast_states, fo.offload])
def test_sharded_parameters(wrap):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    params, history = make(3)
    plain, grads = [{"w": tree["bfloat"]} for tree in (params, history[0])]
    tx = wrap(fo.adamw(0.1))
    expected, _ = train(pure, tx, plain, [grads] * 3)
    init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded, given = [fo.tree.map(lambda p: distribute_tensor(p, mesh, [Shard(0)]), one) for one in (plain, grads)]
        found, _ = train(pure, tx, sharded, [given] * 3)
        torch.testing.assert_close(found["w"].full_tensor(), expected["w"], rtol=1e-2, atol=1e-2)
        own, _ = optimize(tx, sharded, [given] * 3)
        torch.testing.assert_close(own[0].full_tensor().detach(), expected["w"], rtol=1e-2, atol=1e-2)
    finally:
        destroy_process_group()


def test_gradients_that_are_missing_leave_copies_alone():
    params, history = make(4)
    tx = fo.master_weights(fo.sgd(0.1))
    found, state = train(pure, tx, params, history)
    _, again = fo.step(tx, {**history[0], "bfloat": None}, state, found)
    assert torch.equal(again[1].master["bfloat"], state[1].master["bfloat"])
    assert not torch.equal(again[1].master["float16"], state[1].master["float16"])


@pytest.mark.parametrize("wrap", [fo.schedule_free, fo.gpa, fo.master_weights])
@pytest.mark.parametrize("inner", [fo.master_weights, fo.kahan])
def test_it_goes_around_wrappers_that_hand_parameters_inside(wrap, inner):
    with pytest.raises(ValueError, match="rounds the parameters, so it goes around other wrappers, not inside"):
        wrap(inner(fo.sgd(0.1)))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_complex_parameters_in_half_precision_are_refused():
    waves = {"w": torch.zeros(2, dtype=torch.complex32)}
    message = (
        r"parameter at 'w' has dtype torch.complex32, which cannot be optimized; convert it with .to\(torch.complex64\)"
    )
    with pytest.raises(TypeError, match=message):
        fo.master_weights(fo.sgd(0.1)).init(waves)
    p = torch.nn.Parameter(waves["w"])
    with pytest.raises(TypeError, match=message):
        fo.Optimizer([("w", p)], fo.sgd, lr=0.1)
    optimizer = fo.optim.SGD([("w", p)], lr=0.1)
    p.grad = waves["w"].clone()
    with pytest.raises(TypeError, match=message):
        optimizer.step()
