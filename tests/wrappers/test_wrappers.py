"""Wrappers: steps that are left out, and parameters that are handed inside."""

import copy

import pytest
import torch
from catalogue import assert_close
from histories import forms, give, in_place, make, optimize, pure, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


def means(history, every, mean=True):
    groups = [history[i : i + every] for i in range(0, len(history) - every + 1, every)]
    return [{k: sum(g[k] for g in group) / (every if mean else 1) for k in group[0]} for group in groups]


# Accumulation. --------------------------------------------------------------------------------------------------------

INNER = {
    "adamw": lambda: fo.adamw(0.1, weight_decay=0.1),
    "clipped": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.nadam(fo.schedules.cosine(0.1, 10))),
    "muon": lambda: fo.partition({True: fo.muon(0.1, ns_dtype=None), False: fo.sgd(0.1)}, {"w": True, "b": False}),
}
inner = pytest.mark.parametrize("name", INNER)


@forms
@inner
@pytest.mark.parametrize("mean", [True, False])
def test_a_step_is_one_of_the_mean_or_sum(take, name, mean):
    params, history = make()
    expected, _ = train(pure, INNER[name](), params, means(history, 4, mean))
    found, state = train(take, fo.accumulate(INNER[name](), 4, mean=mean), params, history)
    assert_close(found, expected)
    assert float(state[0].gradient_step) == 2


@inner
def test_the_optimizer_does_the_same(name):
    params, history = make()
    named = INNER[name]()
    expected, _ = train(pure, named, params, means(history, 4))
    own = {key: torch.nn.Parameter(p.clone()) for key, p in params.items()}
    optimizer = fo.Optimizer(own.items(), fo.accumulate(named, 4))
    for grads in history:
        give(own.values(), grads)
        optimizer.step()
    assert_close({key: p.detach() for key, p in own.items()}, expected, rtol=1e-6, atol=1e-7)


WHOLE = {
    "mars": lambda: fo.mars(fo.identity()),
    "clip_by_norm": lambda: fo.clip_by_norm(0.5),
    "centralize": fo.centralize,
    "clip_by_block_rms": lambda: fo.clip_by_block_rms(0.5),
}


@forms
@pytest.mark.parametrize("rule", WHOLE.values(), ids=WHOLE)
def test_rules_that_need_a_tensor_whole_stand_before_a_gate(take, rule):
    params, history = make(4)
    tx, changed = rule(), []
    state = tx.init(params)
    for grads in history:
        updates, state = tx.update(grads, state, params)
        changed.append(updates)
    expected, _ = train(pure, fo.sgd(0.1, 0.9), params, means(changed, 2))
    gated = fo.chain(rule(), fo.accumulate(fo.sgd(0.1, 0.9), 2))
    assert_close(train(take, gated, params, history)[0], expected)
    own, _ = optimize(gated, params, history)
    assert_close([p.detach() for p in own], list(expected.values()), rtol=1e-6, atol=1e-7)


@forms
def test_between_steps_everything_inside_stands_still(take):
    params, history = make(3)
    tx = fo.accumulate(fo.adamw(fo.schedules.linear(0.1, 0.0, 4), weight_decay=0.5), 4)
    found, state = train(take, tx, params, history)
    assert_close(found, params, rtol=0, atol=0)
    assert_close(state[1], tx.init(params)[1], rtol=0, atol=0)
    updates, _ = tx.update(history[0], tx.init(params), params)
    assert_close(updates, fo.tree.map(torch.zeros_like, params), rtol=0, atol=0)


def test_a_link_after_the_wrapper_is_given_zeros():
    params, history = make(1)
    tx = fo.chain(fo.accumulate(fo.sgd(1.0), 2), fo.add_decayed_weights(0.5))
    updates, _ = tx.update(history[0], tx.init(params), params)
    assert_close(updates, fo.tree.map(lambda p: 0.5 * p, params))


def test_the_number_of_mini_steps_may_be_a_schedule_of_the_steps():
    params, history = make(6)
    tx = fo.accumulate(fo.sgd(1.0), lambda step: 1 + step, mean=False)
    found, state = train(pure, tx, params, history)
    assert_close(found["w"], params["w"] - sum(g["w"] for g in history))
    assert (float(state[0].gradient_step), float(state[0].mini_step)) == (3, 0)


@pytest.mark.sampled(pool="compiled")
def test_accumulation_is_batched_and_compiled():
    params, history = make()
    tx = fo.accumulate(fo.adamw(0.1), 4)

    def trained(params):
        state = tx.init(params)
        for grads in history:
            params, state = fo.step(tx, grads, state, params)
        return params

    batched = torch.vmap(trained)(fo.tree.map(lambda p: torch.stack([p, 2 * p]), params))
    for i, factor in enumerate((1, 2)):
        alone = trained(fo.tree.map(lambda p: factor * p, params))
        assert_close(fo.tree.map(lambda p: p[i], batched), alone)
    assert_close(torch.compile(trained, backend="eager", fullgraph=True)(params), trained(params))


def test_derivatives_flow_through_the_sum():
    params, history = make(4)

    def after(factor):
        tx = fo.accumulate(fo.adam(0.1, eps=1e-3), 2)
        state, p = tx.init(params), params
        for grads in history:
            p, state = fo.step(tx, fo.tree.map(lambda g: factor * g, grads), state, p)
        return p["w"].square().sum()

    one = torch.ones((), dtype=torch.float64)
    expected = (after(one + 1e-6) - after(one - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(after)(one), expected, rtol=1e-6, atol=1e-9)


def test_training_goes_on_from_a_checkpoint_between_steps():
    params, history = make()
    tx = fo.accumulate(fo.adamw(0.1), 4)
    expected, _ = optimize(tx, params, history)
    own, optimizer = optimize(tx, params, history[:6])
    saved = through_a_file(optimizer.state_dict())
    fresh = fo.Optimizer(own, tx)
    fresh.load_state_dict(saved)
    for grads in history[6:]:
        give(own, grads)
        fresh.step()
    assert_close([p.detach() for p in own], [p.detach() for p in expected], rtol=0, atol=0)


def test_a_factory_becomes_a_factory_whose_hyperparameters_schedulers_drive():
    params, history = make()
    own, optimizer = optimize(fo.accumulate(fo.sgd, 4), params, history[:4], lr=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    for grads in history[4:]:
        give(own, grads)
        optimizer.step()
    first, second = means(history, 4)
    assert_close(own[0].detach(), params["w"] - 0.5 * first["w"] - 0.25 * second["w"])


@pytest.mark.parametrize("wrapper", [lambda tx: fo.accumulate(tx, 2), fo.schedule_free])
@pytest.mark.parametrize("wrong", [3, torch.optim.SGD])
def test_what_is_wrapped_is_a_transformation_or_makes_one(wrapper, wrong):
    with pytest.raises(TypeError, match="is not a GradientTransformation"):
        wrapper(wrong)


def test_every_is_at_least_one():
    with pytest.raises(ValueError, match="Invalid every: 0; it needs value >= 1"):
        fo.accumulate(fo.sgd(0.1), 0)


# Schedule-Free. -------------------------------------------------------------------------------------------------------


def by_formula(params, history, lr, momentum, power=2.0, r=0.0, decay=0.0):
    """Algorithm 1 of the paper, for SGD, with x kept."""
    x, z, total = dict(params), dict(params), 0.0
    y = dict(params)
    for t, grads in enumerate(history, 1):
        weight = t**r * lr**power
        total += weight
        c = weight / total
        for k in params:
            z[k] = z[k] - lr * (grads[k] + decay * z[k])
            x[k] = (1 - c) * x[k] + c * z[k]
            y[k] = momentum * x[k] + (1 - momentum) * z[k]
    return x, y


@forms
@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "r": 1.0, "weight_lr_power": 1.0}])
def test_schedule_free_is_the_formula_of_its_paper(take, options):
    params, history = make()
    tx = fo.schedule_free(fo.sgd(0.1, weight_decay=0.1), **options)
    found, state = train(take, tx, params, history)
    named = {"power": options.get("weight_lr_power", 2.0), "r": options.get("r", 0.0), "decay": 0.1}
    x, y = by_formula(params, history, 0.1, options.get("momentum", 0.9), **named)
    assert_close(found, y)
    assert_close(fo.eval_params(tx, state, found), x)


def test_the_optimizer_evaluates_and_trains_on():
    params, history = make()
    tx = fo.schedule_free(fo.sgd(0.1))
    own, optimizer = optimize(tx, params, history[:4])
    x, y = by_formula(params, history[:4], 0.1, 0.9)
    assert_close([p.detach() for p in own], list(y.values()))
    for _ in range(2):  # a second call changes nothing
        optimizer.eval()
    assert_close([p.detach() for p in own], list(x.values()))
    with pytest.raises(RuntimeError, match=r"call opt.train\(\) before opt.step\(\)"):
        optimizer.step()
    optimizer.train()
    for grads in history[4:]:
        give(own, grads)
        optimizer.step()
    assert_close([p.detach() for p in own], list(by_formula(params, history, 0.1, 0.9)[1].values()))


def test_schedule_free_goes_on_from_a_checkpoint():
    params, history = make()
    tx = fo.schedule_free(fo.adamw(0.1))
    expected, state = train(pure, tx, params, history)
    half, state = train(pure, tx, params, history[:4])
    loaded = fo.load_state_dict(tx.init(params), through_a_file(fo.state_dict(copy.deepcopy(state))))
    assert_close(train(pure, tx, half, history[4:], loaded)[0], expected, rtol=0, atol=0)


def test_wrappers_nest():
    params, history = make()
    tx = fo.accumulate(fo.schedule_free(fo.sgd(0.1)), 2)
    found, state = train(in_place, tx, params, history)
    assert_close(found, by_formula(params, means(history, 2), 0.1, 0.9)[1])
    masked = fo.masked(fo.schedule_free(fo.sgd(0.1)), {"w": True, "b": False})
    found, state = train(pure, masked, params, history)
    assert_close(fo.eval_params(masked, state, found)["w"], by_formula(params, history, 0.1, 0.9)[0]["w"])


@forms
@pytest.mark.parametrize("passes", [1, 2])
def test_what_is_wrapped_may_take_several_passes(take, passes):
    """A global norm is over all parameters, so that links before and after it are run one after the other."""
    params, history = make()
    inner = fo.chain(fo.sgd(0.1, weight_decay=0.1), *[fo.clip_by_global_norm(1e9)] * passes)
    found, _ = train(take, fo.schedule_free(inner), params, history)
    assert_close(found, by_formula(params, history, 0.1, 0.9, decay=0.1)[1])


def test_without_a_wrapper_there_is_nothing_to_evaluate_with():
    params, _ = make(1)
    with pytest.raises(ValueError, match="Nothing in sgd"):
        fo.eval_params(fo.sgd(0.1), fo.sgd(0.1).init(params), params)


def test_momentum_is_in_range():
    with pytest.raises(ValueError, match="Invalid momentum value: 0; it needs 0 < value <= 1"):
        fo.schedule_free(fo.sgd(0.1), 0)
