"""Wrappers that keep two sets of weights: their numbers, and where parameters are evaluated."""

import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from averaging_cases import RATE, WRAPPERS, each
from catalogue import assert_close
from histories import forms, give, make, optimize, pure, train
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import functorch_optim as fo


def path(history, params):
    """The parameters before the first step of SGD, and after each one, in numpy."""
    found = [params["w"].numpy()]
    for grads in history:
        found.append(found[-1] - RATE * grads["w"].numpy())
    return found


def evaluated(tx, params, history, take=pure):
    found, state = train(take, tx, params, history)
    return found, fo.eval_params(tx, state, found)


# Averages against formulas. -------------------------------------------------------------------------------------------

DECAYS = {
    "none": lambda n: 0.9,
    "timm": lambda n: min(0.9, 1 - (1 + (n - 1) / 1.0) ** (-2 / 3)),
    "torch_ema": lambda n: min(0.9, (1 + n) / (10 + n)),
}


@forms
@pytest.mark.parametrize("warmup", DECAYS)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (2, 1), (1, 3)])
def test_an_exponential_average_is_the_formula(take, warmup, start, every):
    params, history = make()
    points = path(history, params)
    expected, n = points[0], 0
    for t, p in enumerate(points[1:], 1):
        if t <= start:
            expected = p
        elif (t - start) % every == 0:
            n += 1
            d = DECAYS[warmup](n)
            expected = d * expected + (1 - d) * p
    options = {"warmup": None if warmup == "none" else warmup, "start": start, "every": every}
    tx = fo.ema_weights(fo.sgd(RATE), 0.9, **options)
    found, average = evaluated(tx, params, history, take)
    np.testing.assert_allclose(found["w"], points[-1], rtol=1e-12)
    np.testing.assert_allclose(average["w"], expected, rtol=1e-12)


def test_a_debiased_average_is_divided_by_its_weights():
    params, history = make()
    points = path(history, params)
    total = sum(0.1 * 0.9 ** (len(points) - 1 - t) * p for t, p in enumerate(points) if t > 0)
    _, average = evaluated(fo.ema_weights(fo.sgd(RATE), 0.9, debias=True), params, history)
    np.testing.assert_allclose(average["w"], total / (1 - 0.9 ** len(history)), rtol=1e-12)
    plain = evaluated(fo.ema_weights(fo.sgd(RATE), 0.9), params, history)[1]
    assert (average["w"] - plain["w"]).abs().max() > 1e-2


def test_the_decay_may_be_a_schedule():
    params, history = make()
    points = path(history, params)
    expected = points[0]
    for t, p in enumerate(points[1:], 1):
        d = (1 - 1 / t) ** 7.0  # of Karras et al.
        expected = d * expected + (1 - d) * p
    tx = fo.ema_weights(fo.sgd(RATE), lambda count: (1 - 1 / (count + 1)) ** 7.0)
    np.testing.assert_allclose(evaluated(tx, params, history)[1]["w"], expected, rtol=1e-12)


@forms
@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (2, 2), (20, 1)])
def test_swa_is_the_mean_of_what_comes_after_the_start(take, start, every):
    params, history = make()
    points = path(history, params)
    chosen = points[start + every :: every]
    tx = fo.swa(fo.sgd(RATE), start, every)
    found, state = train(take, tx, params, history)
    np.testing.assert_allclose(
        fo.eval_params(tx, state, found)["w"], np.mean(chosen or points[-1:], axis=0), rtol=1e-12, atol=1e-14
    )
    assert int(state[1].n_averaged) == len(chosen)


@pytest.mark.parametrize("gamma", [0, 1, 8])
def test_weights_of_a_polynomial_average_grow_like_a_power_of_the_step(gamma):
    params, history = make()
    weights = [math.comb(t + gamma - 1, gamma) for t in range(1, len(history) + 1)]
    expected = np.average(path(history, params)[1:], axis=0, weights=weights)
    _, average = evaluated(fo.polynomial_average(fo.sgd(RATE), gamma), params, history)
    np.testing.assert_allclose(average["w"], expected, rtol=1e-12)


@forms
def test_lookahead_is_the_algorithm_of_its_paper(take):
    params, history = make()
    slow = fast = params["w"].numpy()
    momentum = np.zeros_like(slow)
    for t, grads in enumerate(history, 1):
        momentum = 0.9 * momentum + grads["w"].numpy()
        fast = fast - RATE * momentum
        if t % 3 == 0:
            slow = fast = slow + 0.7 * (fast - slow)
    tx = fo.lookahead(fo.sgd(RATE, 0.9), every=3, slow_step_size=0.7)
    found, average = evaluated(tx, params, history, take)
    np.testing.assert_allclose(found["w"], fast, rtol=1e-12)
    np.testing.assert_allclose(average["w"], slow, rtol=1e-12)


def test_gpa_is_the_formula_of_its_paper():
    params, history = make()
    x = y = z = params["w"].numpy()
    for grads in history:
        z = z - RATE * (grads["w"].numpy() + 0.1 * z)
        x = 0.8 * x + 0.2 * z
        y = 0.7 * x + 0.3 * z
    found, average = evaluated(fo.gpa(fo.sgd(RATE, weight_decay=0.1), 0.8, 0.7), params, history)
    np.testing.assert_allclose(found["w"], y, rtol=1e-12)
    np.testing.assert_allclose(average["w"], x, rtol=1e-12)


def test_gpa_where_it_averages_is_momentum():
    params, history = make()
    found, _ = train(pure, fo.gpa(fo.sgd(RATE / 0.1), 0.9, 1.0), params, history)
    assert_close(found, train(pure, fo.sgd(RATE, 0.9), params, history)[0])


# Averages against packages. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "average"),
    [
        (fo.ema_weights(fo.adamw(0.1), 0.9, start=1), {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
        (fo.swa(fo.adamw(0.1), 0), {}),
    ],
    ids=["ema", "swa"],
)
def test_the_same_as_an_averaged_model_of_torch_beside_it(tx, average):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    beside = AveragedModel(model, **average)
    opt = fo.Optimizer(model.parameters(), tx)
    for _ in range(4):
        opt.zero_grad()
        model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
        opt.step()
        beside.update_parameters(model)
    with opt.averaged():
        assert_close(list(model.parameters()), list(beside.module.parameters()))


@pytest.mark.parametrize("warmup", [None, "torch_ema"])
def test_the_same_as_torch_ema(warmup):
    package = pytest.importorskip("torch_ema")
    params, history = make()
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    theirs = package.ExponentialMovingAverage(own, decay=0.9, use_num_updates=warmup is not None)
    opt = fo.Optimizer(own, fo.ema_weights(fo.adamw(0.1), 0.9, warmup=warmup))
    for grads in history:
        give(own, grads)
        opt.step()
        theirs.update()
    with opt.averaged():
        assert_close([p.detach() for p in own], [shadow.detach() for shadow in theirs.shadow_params])


def test_the_same_as_the_lookahead_of_pytorch_optimizer():
    package = pytest.importorskip("pytorch_optimizer")
    params, history = make()
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    theirs = package.Lookahead(torch.optim.AdamW(own, lr=0.1), k=3, alpha=0.7)
    for grads in history:
        give(own, grads)
        theirs.step()
    found, _ = train(pure, fo.lookahead(fo.adamw(0.1), 3, 0.7), params, history)
    assert_close(list(found.values()), [p.detach() for p in own], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "warmup_steps": 3, "r": 0.5}])
def test_the_same_as_schedulefree(name, options):
    package = pytest.importorskip("schedulefree")
    params, history = make()
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    theirs = {"sgd": package.SGDScheduleFree, "adamw": package.AdamWScheduleFree}[name](own, lr=0.1, **options)
    theirs.train()
    for grads in history:
        give(own, grads)
        theirs.step()
    tx = {"sgd": fo.schedule_free_sgd, "adamw": fo.schedule_free_adamw}[name](0.1, **options)
    found, average = evaluated(tx, params, history)
    assert_close(list(found.values()), [p.detach() for p in own], rtol=1e-10, atol=1e-12)
    theirs.eval()
    assert_close(list(average.values()), [p.detach() for p in own], rtol=1e-9, atol=1e-12)


def test_defaults_are_those_of_schedulefree():
    package = pytest.importorskip("schedulefree")
    for ours, theirs in (
        (fo.schedule_free_sgd, package.SGDScheduleFree),
        (fo.schedule_free_adamw, package.AdamWScheduleFree),
        (fo.schedule_free, package.ScheduleFreeWrapper),
    ):
        own, others = [inspect.signature(f).parameters for f in (ours, theirs)]
        shared = own.keys() & others.keys()
        assert {"momentum", "betas"} & shared
        assert {name: own[name].default for name in shared} == {name: others[name].default for name in shared}


# With other wrappers, under transforms. -------------------------------------------------------------------------------


@forms
@each
def test_what_is_inside_left_out_is_left_out(take, name):
    params, history = make(7)
    wrap = WRAPPERS[name]
    inside, outside = wrap(fo.accumulate(fo.adamw(0.1), 2)), fo.accumulate(wrap(fo.adamw(0.1)), 2)
    expected = train(pure, outside, params, history)
    found, state = train(take, inside, params, history)
    assert_close(found, expected[0])
    assert_close(fo.eval_params(inside, state, found), fo.eval_params(outside, expected[1], expected[0]))
    assert int(state[1].step) == 3


@each
def test_wrapped_steps_are_those_of_the_optimizer_class(name):
    params, history = make()
    tx = WRAPPERS[name](fo.adamw(0.1))
    found, average = evaluated(tx, params, history)
    own, opt = optimize(tx, params, history)
    assert_close([p.detach() for p in own], list(found.values()), rtol=1e-6, atol=1e-7)
    with opt.averaged():
        assert_close([p.detach() for p in own], list(average.values()), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make_tx", "value"),
    [
        (lambda d: fo.ema_weights(fo.sgd(RATE), d), 0.8),
        (lambda d: fo.ema_weights(fo.sgd(RATE), d, debias=True, warmup="torch_ema", every=2), 0.25),
        (lambda gamma: fo.polynomial_average(fo.sgd(RATE), gamma), 3.0),
        (lambda alpha: fo.lookahead(fo.sgd(RATE), 2, alpha), 0.3),
        (lambda b: fo.schedule_free(fo.sgd(RATE), b), 0.8),
        (lambda mu: fo.gpa(fo.sgd(RATE), mu), 0.8),
        (lambda mu: fo.gpa(fo.sgd(RATE), 0.8, mu), 0.6),
        (lambda decay: fo.schedule_free_sgd(0.1, weight_decay=decay, warmup_steps=2), 0.3),
        (lambda warmup: fo.schedule_free_sgd(0.1, warmup_steps=warmup), 2.5),
        (lambda beta2: fo.schedule_free_adamw(0.1, (0.9, beta2), eps=1e-2), 0.9),
    ],
)
def test_derivatives_of_what_is_evaluated_are_exact(make_tx, value):
    params, _ = make(0)

    def evaluated(number):
        tx, p = make_tx(number), params
        state = tx.init(p)
        for _ in range(5):
            p, state = fo.step(tx, fo.tree.map(torch.sin, p), state, p)
        return fo.tree.norm(fo.eval_params(tx, state, p))

    number = torch.tensor(value, dtype=torch.float64)
    expected = (evaluated(number + 1e-6) - evaluated(number - 1e-6)) / 2e-6
    assert expected.abs() > 1e-6
    torch.testing.assert_close(torch.func.grad(evaluated)(number), expected, rtol=1e-6, atol=1e-9)
    one = torch.ones_like(number)
    torch.testing.assert_close(torch.func.jvp(evaluated, (number,), (one,))[1], expected, rtol=1e-6, atol=1e-9)


@each
def test_trainings_are_batched(name):
    params, history = make(4)
    tx = WRAPPERS[name](fo.sgd(0.1))

    def averaged(params):
        return evaluated(tx, params, history)[1]["w"]

    both = fo.tree.map(lambda p: torch.stack([p, 2 * p]), params)
    expected = torch.stack([averaged(params), averaged(fo.tree.scale(2, params))])
    torch.testing.assert_close(torch.vmap(averaged)(both), expected, rtol=1e-12, atol=1e-14)


def test_an_average_is_not_touched_between_its_steps():
    params, history = make(3)
    history[2]["w"] = torch.full_like(history[2]["w"], torch.inf)
    _, average = evaluated(fo.swa(fo.sgd(RATE), 0, every=2), params, history)
    assert average["w"].isfinite().all()


@pytest.mark.parametrize("name", ["ema_weights", "swa", "lookahead", "schedule_free"])
def test_averages_of_halves_are_kept_in_float32(name):
    params, history = make()
    half = fo.tree.cast(params, torch.bfloat16)
    tx = WRAPPERS[name](fo.sgd(0.1))
    found, state = train(pure, tx, half, [fo.tree.cast(grads, torch.bfloat16) for grads in history])
    assert state[1][-1]["w"].dtype == torch.float32
    assert {leaf.dtype for leaf in fo.tree.flatten(fo.eval_params(tx, state, found))[0]} == {torch.bfloat16}
    own, opt = optimize(tx, half, [fo.tree.cast(grads, torch.bfloat16) for grads in history])
    assert opt.state[own[0]][state[1]._fields[-1]].dtype == torch.float32


def test_the_outermost_of_several_is_evaluated_and_each_part_has_its_own():
    params, history = make()
    inner = fo.ema_weights(fo.sgd(RATE), 0.9)
    both = fo.swa(inner, 0)
    assert_close(evaluated(both, params, history)[1], evaluated(fo.swa(fo.sgd(RATE), 0), params, history)[1])
    parts = fo.partition({"a": inner, "b": fo.sgd(RATE)}, {"w": "a", "b": "b"})
    found, average = evaluated(parts, params, history)
    assert_close(average["w"], evaluated(inner, params, history)[1]["w"])
    assert_close(average["b"], found["b"])


def test_the_average_of_what_was_frozen_goes_on():
    """As that of torch does. Where gradients are missing it stays behind."""
    model = torch.nn.ParameterDict({"a": torch.zeros(1), "b": torch.zeros(1)})
    averaged = torch.optim.swa_utils.AveragedModel(model)
    params, grads = {name: p.detach().clone() for name, p in model.items()}, {"a": -torch.ones(1), "b": -torch.ones(1)}
    tx = fo.swa(fo.sgd(1.0), 0)
    state = tx.init(params)
    for k in range(20):
        if k == 3:
            tx = fo.swa(fo.frozen(fo.sgd(1.0), params, "b"), 0)
            state, _ = fo.migrate(tx, state, params)
        params, state = fo.step(tx, grads, state, params)
        model.load_state_dict(params)
        averaged.update_parameters(model)
    assert params["b"] == 3
    expected = {name: p.detach() for name, p in averaged.module.items()}
    assert_close(fo.eval_params(tx, state, params), expected, rtol=1e-6, atol=1e-6)


def test_what_is_evaluated_outlives_a_step_in_place():
    params, history = make(2)
    tx = fo.swa(fo.sgd(RATE), 0)
    state = tx.init(params)
    params, state = fo.step_(tx, history[0], state, params)
    average = fo.eval_params(tx, state, params)
    before = fo.tree.map(torch.clone, average)
    fo.step_(tx, history[1], state, params)
    assert_close(average, before, rtol=0, atol=0)


def test_asgd_is_evaluated_at_its_average():
    params, history = make()
    tx = fo.asgd(RATE, lambd=0.0, alpha=0.0, t0=2)
    assert_close(fo.eval_params(tx, tx.init(params), params), params, rtol=0, atol=0)
    _, average = evaluated(tx, params, history)
    np.testing.assert_allclose(average["w"], np.mean(path(history, params)[4:], axis=0), rtol=1e-12)
    own, opt = optimize(fo.asgd, params, history, lr=RATE, lambd=0.0, alpha=0.0, t0=2)
    with opt.averaged():
        assert_close(own[0].detach(), average["w"], rtol=1e-6, atol=1e-7)


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_tx", "message"),
    [
        (lambda: fo.ema_weights(fo.sgd, 1.5), "Invalid decay: 1.5; it needs 0 <= value <= 1"),
        (lambda: fo.ema_weights(fo.sgd, 0.9, warmup="linear"), "Invalid warmup: 'linear'; choose None, 'timm' or 't"),
        (lambda: fo.ema_weights(fo.sgd, 0.9, every=0), "Invalid every: 0; it needs value >= 1"),
        (lambda: fo.swa(fo.sgd, -1), "Invalid start: -1; it needs value >= 0"),
        (lambda: fo.polynomial_average(fo.sgd, -1.0), "Invalid gamma: -1.0; it needs value >= 0"),
        (lambda: fo.lookahead(fo.sgd, 0), "Invalid every: 0; it needs value >= 1"),
        (lambda: fo.lookahead(fo.sgd, 5, 2.0), "Invalid slow_step_size: 2.0; it needs 0 <= value <= 1"),
        (lambda: fo.gpa(fo.sgd, 1.0), "Invalid mu_x: 1.0; it needs 0 <= value < 1"),
        (lambda: fo.gpa(fo.sgd, 0.9, 0.0), "Invalid mu_y: 0.0; it needs 0 < value <= 1"),
        (lambda: fo.schedule_free_sgd(warmup_steps=-1), "Invalid warmup_steps: -1; it needs value >= 0"),
        (lambda: fo.schedule_free(fo.sgd, weight_decay_at_y=-1), "Invalid weight_decay_at_y: -1; it needs value >= 0"),
        (lambda: fo.scale_by_rms(centered=True, bias_correction=True), "give centered or bias_correction, not both"),
    ],
)
def test_numbers_are_checked(make_tx, message):
    with pytest.raises(ValueError, match=message):
        make_tx()


@each
def test_what_is_wrapped_is_a_transformation_or_makes_one(name):
    with pytest.raises(TypeError, match="is not a GradientTransformation"):
        WRAPPERS[name](3)


def test_wrappers_print_as_the_call_that_made_them_and_pickle():
    for tx in (fo.ema_weights(fo.sgd(0.1), 0.9, every=2), fo.gpa(fo.sgd(0.1))):
        assert repr(eval(repr(tx), vars(fo))) == repr(tx)
        assert repr(pickle.loads(pickle.dumps(tx))) == repr(tx)
