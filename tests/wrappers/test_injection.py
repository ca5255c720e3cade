"""Hyperparameters in the state: read, set, scheduled, learned, batched, saved and compiled, in both forms."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing

import functorch_optim as fo

PARAMS = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), "b": torch.tensor([0.3, -0.7]).double()}


def gradient(params):
    return torch.func.grad(lambda p: (p["w"] @ p["b"]).square().sum() + fo.tree.vdot(p, p))(params)


def train(tx, state=None, params=PARAMS, steps=3):
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        params, state = fo.step(tx, gradient(params), state, params)
    return params, state


def assert_equal(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))


FACTORIES = {
    "sgd": (fo.sgd, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "adam": (fo.adam, {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3}),
    "adamw": (fo.adamw, {"lr": 0.01, "weight_decay": 0.1}),
    "asgd": (fo.asgd, {"lr": 0.01, "t0": 1.0}),
    "rprop": (fo.rprop, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-6, 50)}),
    "lambda": (lambda lr: fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.5 * lr, 0.9)), {"lr": 0.02}),
}
factories = pytest.mark.parametrize(("factory", "numbers"), FACTORIES.values(), ids=FACTORIES)


@factories
def test_the_updates_and_states_are_those_of_the_factory(factory, numbers):
    params, state = train(fo.inject_hyperparams(factory)(**numbers))
    expected, inner = train(factory(**numbers))
    assert_equal(params, expected)
    assert_equal(fo.tree.flatten(state["inner"])[0], fo.tree.flatten(inner)[0])


def test_functions_of_the_whole_tree_read_the_state_too():
    def halving(lr):
        def update(updates, state, params):
            return fo.tree.scale(-fo.at(lr, torch.ones(())), updates), state

        return fo.GradientTransformation(lambda params: (), update)

    tx = fo.inject_hyperparams(halving)(lr=0.1)
    state = fo.tree.set(tx.init(PARAMS), "lr", 0.01)
    assert_equal(train(tx, state)[0], train(fo.sgd(0.01))[0], rtol=1e-12, atol=0)


def test_read_and_set():
    tx = fo.inject_hyperparams(fo.adam)(lr=0.1, betas=(0.9, 0.99))
    state = tx.init(PARAMS)
    kept = state["hyperparams"]
    assert kept._fields == ("step", "lr", "betas_0", "betas_1", "eps")  # weight_decay is off
    assert [number.dtype for number in kept[1:]] == [torch.float64] * 4
    assert fo.tree.get(state, "lr") == 0.1
    params, state = train(tx, state)
    state = fo.tree.set(fo.tree.set(state, "lr", 0.01), "betas_0", 0.5)
    after, _ = train(tx, state, params, 2)
    expected = train(fo.adam(0.01, (0.5, 0.99)), train(fo.adam(0.1, (0.9, 0.99)))[1], params, 2)[0]
    assert_equal(after, expected)
    unset, _ = train(tx, fo.tree.set(state, "lr", 0.1), params, 2)
    assert not torch.equal(unset["w"], after["w"])


def test_halves_keep_their_numbers_whole():
    params = fo.tree.cast(PARAMS, torch.bfloat16)
    tx = fo.inject_hyperparams(fo.adam)(lr=1e-3)
    state = tx.init(params)
    assert fo.tree.get(state, "betas_1") == 0.999
    updates, _ = tx.update(fo.tree.map(torch.ones_like, params), state, params)
    assert all(torch.isfinite(u).all() for u in fo.tree.flatten(updates)[0])


def test_what_is_kept():
    def fields(factory, *args, static=(), **kwargs):
        return fo.inject_hyperparams(factory, static=static)(*args, **kwargs).init(PARAMS)["hyperparams"]._fields[1:]

    assert fields(fo.sgd, 0.1) == ("lr",)
    assert fields(fo.sgd, 0.1, momentum=0.0) == ("lr", "momentum")  # given, and so kept, and on
    assert fields(fo.sgd, 1) == ("lr",)
    assert fields(fo.adam, 0.1, static=("betas", "eps")) == ("lr",)
    assert fields(fo.sgd, torch.tensor(0.1)) == ("lr",)
    assert fields(fo.sgd, {"w": 0.1, "b": 0.2}) == ("lr_b", "lr_w")
    assert fields(lambda lr, every: fo.accumulate(fo.sgd(lr), every), 0.1, 2) == ("lr",)
    assert fields(lambda lr, **rest: fo.sgd(lr, **rest), 0.1, momentum=0.9, nesterov=True) == ("lr", "momentum")
    assert fields(fo.clip_by_global_norm, 1.0) == ("max_norm",)
    assert fields(fo.adamw, 0.1, mask=lambda params: {"w": True, "b": False}) == (
        *("lr", "betas_0", "betas_1", "eps", "weight_decay"),
    )


def test_a_rate_for_each_parameter():
    tx = fo.inject_hyperparams(fo.sgd)(lr={"w": 0.1, "b": 0.2})
    state = fo.tree.set(tx.init(PARAMS), "lr_w", 0.0)
    params, _ = train(tx, state)
    assert_equal(params, train(fo.sgd({"w": 0.0, "b": 0.2}))[0])
    assert torch.equal(params["w"], PARAMS["w"])


def test_scheduled_ones_are_shown_and_cannot_be_set():
    schedule = fo.schedules.linear(0.1, 0.0, 10)
    tx = fo.inject_hyperparams(fo.adamw)(lr=schedule, weight_decay=lambda count: 0.01 * (count + 1))
    params, state = train(tx)
    assert_equal(params, train(fo.adamw(schedule, weight_decay=lambda count: 0.01 * (count + 1)))[0])
    assert fo.tree.get(state, "lr") == schedule(2)
    assert fo.tree.get(tx.init(PARAMS), "lr") == schedule(0)
    for given in (state, pickle.loads(pickle.dumps(state)), copy.deepcopy(state)):
        with pytest.raises(ValueError, match=r"'scheduled\.lr' cannot be set: its schedule computes it anew"):
            fo.tree.set(given, "lr", 0.1)


def test_the_derivative_by_a_number_in_the_state_is_exact():
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.inject_hyperparams(fo.adam)(lr=0.1, betas=(0.9, 0.99), eps=1e-2))
    names = ("lr", "betas_0", "betas_1", "eps")
    at = torch.tensor([0.1, 0.8, 0.95, 0.02], dtype=torch.float64, requires_grad=True)

    def final(numbers):
        state = tx.init(PARAMS)
        for name, number in zip(names, numbers, strict=True):
            state = fo.tree.set(state, name, number)
        return fo.tree.norm(train(tx, state)[0])

    assert torch.autograd.gradcheck(final, at, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(final, at)
    assert_equal(torch.func.grad(final)(at.detach()), torch.autograd.grad(final(at), at)[0], rtol=1e-12, atol=1e-12)

    def made(lr):
        return fo.tree.norm(train(fo.inject_hyperparams(fo.adam)(lr=lr))[0])

    assert torch.autograd.gradcheck(made, at[:1].sum().detach().requires_grad_())


def test_a_sweep_by_vmap_is_a_loop():
    tx = fo.inject_hyperparams(fo.sgd)(lr=0.1, momentum=0.9)
    lrs = torch.tensor([0.1, 0.01, 0.0], dtype=torch.float64)

    def run(lr):
        return train(tx, fo.tree.set(tx.init(PARAMS), "lr", lr))

    params, state = torch.vmap(run)(lrs)
    assert torch.equal(fo.tree.get(state, "lr"), lrs)
    for n, lr in enumerate(lrs):
        assert_equal(fo.tree.map(lambda p: p[n], params), run(lr)[0], rtol=1e-12, atol=0)


def test_save_and_load():
    tx = fo.inject_hyperparams(fo.adam)(lr=0.1)
    state = fo.tree.set(train(tx)[1], "lr", 0.03)
    for params in (None, PARAMS):
        loaded = fo.load_state_dict(tx.init(PARAMS), fo.state_dict(state, params), params)
        assert_equal(loaded, state)
    again = pickle.loads(pickle.dumps(state))
    assert fo.tree.get(again, "lr") == 0.03
    assert_equal(train(tx, again)[0], train(tx, state)[0])


@pytest.mark.sampled(pool="compiled")
def test_one_compiled_step_serves_all_values():
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.inject_hyperparams(fo.adamw)(lr=0.1))
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(state, params):
        return fo.step(tx, gradient(params), state, params)

    state = tx.init(PARAMS)
    for lr in (0.1, 0.01):
        state = fo.tree.set(state, "lr", lr)
        params, _ = compiled(state, PARAMS)
        assert_equal(params, train(tx, state, steps=1)[0], rtol=1e-12, atol=0)
    assert counter.frame_count == 1


def test_wrappers_read_the_state():
    tx = fo.accumulate(fo.schedule_free(fo.inject_hyperparams(fo.sgd)(lr=0.1)), 2)
    expected = fo.accumulate(fo.schedule_free(fo.sgd(0.03)), 2)
    state = fo.tree.set(tx.init(PARAMS), "lr", 0.03)
    assert_equal(train(tx, state, steps=4)[0], train(expected, steps=4)[0])
    factory = fo.accumulate(fo.inject_hyperparams(fo.sgd), 2)
    assert_equal(train(factory(lr=0.1), steps=4)[0], train(fo.accumulate(fo.sgd(0.1), 2), steps=4)[0])


def test_one_in_another():
    tx = fo.inject_hyperparams(lambda lr: fo.inject_hyperparams(fo.sgd)(lr=lr, momentum=0.9))(lr=0.1)
    state = fo.tree.set(tx.init(PARAMS), "lr", 0.02, path="hyperparams")
    assert_equal(train(tx, state)[0], train(fo.sgd(0.02, momentum=0.9))[0])


def test_parts_have_numbers_of_their_own():
    tx = fo.partition(
        {"a": fo.inject_hyperparams(fo.sgd)(lr=0.1), "b": fo.inject_hyperparams(fo.adam)(lr=0.2)}, {"w": "a", "b": "b"}
    )
    state = tx.init(PARAMS)
    with pytest.raises(KeyError, match=r"2 nodes bear the name 'lr': a\.hyperparams\.lr, b\.hyperparams\.lr"):
        fo.tree.get(state, "lr")
    state = fo.tree.set(state, "lr", 0.0, path="a")
    params, _ = train(tx, state)
    assert torch.equal(params["w"], PARAMS["w"])
    assert fo.learning_rate(tx, state, "a") == 0
    assert fo.learning_rate(tx, state, "b") == 0.2


def test_it_prints_and_pickles():
    tx = fo.inject_hyperparams(fo.adam, static=("eps",))(lr=0.1)
    assert repr(tx) == "inject_hyperparams(adam)(lr=0.1)"
    assert_equal(train(pickle.loads(pickle.dumps(tx)))[0], train(tx)[0])


# The stateful form. ---------------------------------------------------------------------------------------------------


def optimizer(tx, **hyperparameters):
    params = [torch.nn.Parameter(p.clone()) for p in PARAMS.values()]
    return params, fo.Optimizer([("w", params[0]), ("b", params[1])], tx, **hyperparameters)


def drive(params, opt, steps=3):
    for _ in range(steps):
        grads = gradient(dict(zip(PARAMS, [p.detach() for p in params], strict=True)))
        for p, g in zip(params, grads.values(), strict=True):
            p.grad = g
        opt.step()
    return dict(zip(PARAMS, [p.detach() for p in params], strict=True))


@pytest.mark.parametrize("early", [True, False])
def test_an_optimizer_sets_and_saves_them(early):
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.inject_hyperparams(fo.adam)(lr=0.1))
    params, opt = optimizer(tx)
    assert {**opt.hyperparams, "eps": 0} == {"lr": 0.1, "betas_0": 0.9, "betas_1": 0.999, "eps": 0}
    first = train(tx)
    if early:
        opt.set_hyperparams(lr=0.02)
        first = train(tx, fo.tree.set(tx.init(PARAMS), "lr", 0.02))
    assert_equal(drive(params, opt), first[0])
    opt.set_hyperparams({"lr": torch.tensor(0.5)}, betas_0=0.5)
    assert opt.hyperparams["lr"] == fo.learning_rate(opt) == 0.5
    state = fo.tree.set(fo.tree.set(first[1], "lr", 0.5), "betas_0", 0.5)
    saved = copy.deepcopy(opt.state_dict())
    expected = train(tx, state, first[0])[0]
    again, other = optimizer(tx)
    for p, q in zip(again, params, strict=True):
        p.data.copy_(q.data)
    other.load_state_dict(saved)
    assert_equal(drive(params, opt), expected)
    assert_equal(drive(again, other), expected)


def test_with_a_factory_the_groups_hold_them():
    params, opt = optimizer(fo.inject_hyperparams(fo.adam), lr=0.1)
    opt.param_groups[0]["lr"] = 0.02
    assert_equal(drive(params, opt), train(fo.adam(0.02))[0])
    assert opt.hyperparams == {}
    with pytest.raises(TypeError, match="param_groups hold them already"):
        optimizer(fo.accumulate(fo.inject_hyperparams(fo.adam), 2), lr=0.1)


def test_param_groups_do_not_drive_what_the_state_keeps():
    params, opt = optimizer(fo.chain(fo.clip(1.0), fo.inject_hyperparams(fo.sgd)(lr=0.1)))
    assert "lr" not in opt.param_groups[0]
    opt.param_groups[0]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"in its state, where opt\.set_hyperparams\(lr=1e-4\) sets them"):
        drive(params, opt)


def test_what_an_optimizer_cannot_set():
    _, opt = optimizer(fo.inject_hyperparams(fo.sgd)(lr=fo.schedules.linear(0.1, 0.0, 5), momentum=0.9))
    with pytest.raises(ValueError, match="'lr' cannot be set: its schedule"):
        opt.set_hyperparams(momentum=0.5, lr=0.1)
    assert opt.hyperparams["momentum"] == 0.9  # nothing was set
    with pytest.raises(KeyError, match="Nothing keeps the hyperparameter 'wd'; kept are momentum, lr"):
        opt.set_hyperparams(wd=0.1)
    with pytest.raises(ValueError, match=r"value for 'momentum' has shape \(2,\)"):
        opt.set_hyperparams(momentum=torch.ones(2))
    parts = {"a": fo.inject_hyperparams(fo.sgd)(lr=0.1), "b": fo.inject_hyperparams(fo.sgd)(lr=0.2)}
    params, opt = optimizer(fo.partition(parts, {"w": "a", "b": "b"}))
    opt.set_hyperparams({"a.lr": 0.0})
    assert opt.hyperparams == {"a.lr": 0.0, "b.lr": 0.2}
    assert torch.equal(drive(params, opt)["w"], PARAMS["w"])


# The learning rate. ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_of_the_next_update():
    schedule = fo.schedules.linear(0.1, 0.0, 10)
    for lr, expected in (
        (0.1, 0.1),
        (torch.tensor(0.5), 0.5),
        (schedule, schedule(3)),
        (lambda count: 1 / (count + 1), 0.25),
    ):
        for factory in (fo.adamw, fo.asgd, fo.inject_hyperparams(fo.sgd)):
            tx = fo.chain(fo.clip(1.0), factory(lr))
            _, state = train(tx)
            rate = fo.learning_rate(tx, state)
            assert rate.dtype == torch.float64
            torch.testing.assert_close(rate.item(), float(expected))
        params, opt = optimizer(tx)
        drive(params, opt)
        torch.testing.assert_close(fo.learning_rate(opt).item(), float(expected))
        params, opt = optimizer(fo.adamw, lr=lr)
        drive(params, opt)
        torch.testing.assert_close(fo.learning_rate(opt).item(), float(expected))
    tree = fo.learning_rate(fo.sgd({"w": 0.1, "b": 0.2}), fo.sgd(0.1).init(PARAMS))
    assert tree == {"w": 0.1, "b": 0.2}


def test_the_learning_rate_under_a_scheduler_and_under_transforms():
    weight = torch.nn.Parameter(torch.ones(2))
    for opt in (torch.optim.SGD([weight], 0.4), fo.optim.SGD([weight], 0.4), fo.Optimizer([weight], fo.sgd, lr=0.4)):
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        weight.grad = torch.ones(2)
        opt.step()
        scheduler.step()
        assert fo.learning_rate(opt) == 0.2
    tx = fo.inject_hyperparams(fo.sgd)(lr=0.1)

    def rate(lr):
        return fo.learning_rate(tx, fo.tree.set(tx.init(PARAMS), "lr", lr))

    assert torch.func.grad(rate)(torch.tensor(0.3)) == 1
    assert_equal(torch.vmap(rate)(torch.tensor([0.3, 0.5])), torch.tensor([0.3, 0.5]).double())


def test_no_learning_rate_and_several():
    with pytest.raises(ValueError, match="There is no learning rate; they are at: nowhere"):
        fo.learning_rate(fo.clip(1.0), fo.clip(1.0).init(PARAMS))
    tx = fo.chain(fo.sgd(0.1), fo.sgd(0.2))
    with pytest.raises(ValueError, match=r"2 learning rates; they are at: '0\..*', '1\..*'\. Give one as path"):
        fo.learning_rate(tx, tx.init(PARAMS))
    assert fo.learning_rate(tx, tx.init(PARAMS), "1") == 0.2
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.2}]
    with pytest.raises(ValueError, match="2 learning rates; they are at: '0', '1'"):
        fo.learning_rate(fo.Optimizer(groups, fo.sgd, lr=0.1))
    assert fo.learning_rate(fo.Optimizer(groups, fo.sgd, lr=0.1), path="1") == 0.2
    assert fo.learning_rate(torch.optim.SGD(weights[:1], 0.1)) == 0.1
    with pytest.raises(TypeError, match="is not a GradientTransformation"):
        fo.learning_rate(fo.sgd, ())


# Errors. --------------------------------------------------------------------------------------------------------------


def test_mistakes():
    with pytest.raises(ValueError, match="Invalid learning rate: -0.1"):
        fo.inject_hyperparams(fo.sgd)(lr=-0.1)
    with pytest.raises(TypeError, match=r"takes a function that makes a transformation, got sgd\(0\.1\)"):
        fo.inject_hyperparams(fo.sgd(0.1))
    with pytest.raises(TypeError, match="no parameter 'learning_rate' to be static; it has lr, momentum"):
        fo.inject_hyperparams(fo.sgd, static=("learning_rate",))
    with pytest.raises(TypeError, match=r"write inject_hyperparams\(clip_by_global_norm, static=\('norm_type',\)\)"):
        fo.inject_hyperparams(fo.clip_by_global_norm)(1.0, norm_type=1.0)
    with pytest.raises(TypeError, match="was given no number to keep"):
        fo.inject_hyperparams(fo.identity)()
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        fo.inject_hyperparams(fo.sgd)(learning_rate=0.1)
    with pytest.raises(ValueError, match=r"cannot keep lr, a tensor of shape \(2,\).*static=\('lr',\)"):
        fo.inject_hyperparams(lambda lr: fo.sgd(0.1))(lr=torch.ones(2))
    with pytest.raises(ValueError, match="cannot name a hyperparameter 'step'"):
        fo.inject_hyperparams(lambda step: fo.sgd(step))(step=0.1)
    with pytest.raises(ValueError, match="cannot name a hyperparameter 'a_0'"):
        fo.inject_hyperparams(lambda a, a_0: fo.sgd(a_0))(a=(0.1,), a_0=0.1)
    with pytest.raises(TypeError, match="1 is not a GradientTransformation"):
        fo.inject_hyperparams(lambda lr: 1)(lr=0.1)
