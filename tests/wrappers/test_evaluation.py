"""Optimizers in and out of evaluation: at averages of parameters, and at those that are trained."""

import copy

import pytest
import torch
from averaging_cases import RATE, WRAPPERS, each
from catalogue import assert_close
from histories import give, make, optimize, pure, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


@each
def test_evaluation_changes_nothing_errors_or_not(name):
    params, history = make()
    tx = WRAPPERS[name](fo.adamw(0.1))
    expected, _ = optimize(tx, params, history)
    own, opt = optimize(tx, params, history[:4])
    before = [p.detach().clone() for p in own]
    with opt.averaged():
        assert not torch.equal(own[0], before[0])
    with pytest.raises(KeyError), opt.averaged():
        raise KeyError
    assert all(map(torch.equal, own, before))
    for _ in range(2):
        opt.eval()
    for _ in range(2):
        opt.train()
    for grads in history[4:]:
        give(own, grads)
        opt.step()
    assert all(map(torch.equal, own, expected))


def test_evaluation_within_evaluation_goes_on():
    params, history = make(2)
    own, opt = optimize(WRAPPERS["swa"](fo.sgd(RATE)), params, history)
    opt.eval()
    average = own[0].detach().clone()
    with opt.averaged():
        pass
    assert torch.equal(own[0], average)
    with pytest.raises(RuntimeError, match=r"call opt.train\(\) before opt.step\(\)"):
        opt.step()


def test_a_closure_is_not_called_where_no_step_is_made():
    params, history = make(2)
    _, opt = optimize(WRAPPERS["swa"](fo.sgd(RATE)), params, history)
    with opt.averaged(), pytest.raises(RuntimeError, match=r"call opt.train\(\) before opt.step\(\)"):
        opt.step(lambda: pytest.fail("called"))


@each
@pytest.mark.parametrize("how", ["file", "deepcopy", "not strict"])
def test_a_checkpoint_says_the_mode_and_has_both_weights(name, how):
    params, history = make()
    tx = WRAPPERS[name](fo.adamw(0.1))
    expected, _ = optimize(tx, params, history)
    own, opt = optimize(tx, params, history[:4])
    assert [group["train_mode"] for group in opt.state_dict()["param_groups"]] == [True]
    opt.eval()
    saved, weights = through_a_file(opt.state_dict()), [p.detach().clone() for p in own]
    assert [group["train_mode"] for group in saved["param_groups"]] == [False]
    if how == "deepcopy":
        fresh = copy.deepcopy(opt)
        own = fresh.param_groups[0]["params"]
    else:
        own = [torch.nn.Parameter(p) for p in weights]
        fresh = fo.Optimizer(own, tx)
        fresh.load_state_dict(saved, strict=how == "file")
    assert "train_mode" not in fresh.param_groups[0]
    with pytest.raises(RuntimeError, match=r"call opt.train\(\)"):
        fresh.step()
    fresh.train()
    for grads in history[4:]:
        give(own, grads)
        fresh.step()
    assert all(map(torch.equal, own, expected))


def test_a_class_refuses_a_checkpoint_of_evaluation():
    params, history = make(2)
    own, opt = optimize(fo.asgd, params, history, lr=RATE)
    plain = fo.optim.ASGD(own, lr=RATE)
    plain.load_state_dict(opt.state_dict())
    assert "train_mode" not in plain.param_groups[0]
    opt.eval()
    with pytest.raises(ValueError, match="was saved while parameters were evaluated"):
        plain.load_state_dict(opt.state_dict())


def test_loading_a_checkpoint_of_training_ends_evaluation():
    params, history = make(2)
    _, trained = optimize(WRAPPERS["swa"](fo.sgd(RATE)), params, history)
    _, opt = optimize(WRAPPERS["swa"](fo.sgd(RATE)), params, history)
    opt.eval()
    opt.load_state_dict(trained.state_dict())
    opt.step()


@pytest.mark.parametrize("wrong", [torch.zeros(2), 1.0])
def test_trained_parameters_of_another_model_are_refused(wrong):
    params, history = make(2)
    own, opt = optimize(WRAPPERS["swa"](fo.sgd(RATE)), params, history)
    with opt.averaged():
        saved = opt.state_dict()
    saved["state"][0]["trained"] = wrong
    before = own[0].detach().clone()
    with pytest.raises(ValueError, match=r"The saved trained of parameter '0' is no tensor of shape \(4, 3\)"):
        opt.load_state_dict(saved)
    opt.step()
    assert not torch.equal(own[0], before)


@pytest.mark.sampled(pool="compiled")
def test_steps_of_averages_compile_to_one_kernel():
    params, history = make(4)
    for tx in (fo.lookahead(fo.sgd(RATE), 2), fo.swa(fo.sgd(RATE), 1, every=2), fo.gpa(fo.sgd(RATE))):
        own, state = fo.tree.map(torch.clone, params), tx.init(params)
        for grads in history:
            own, state = fo.step_(tx, grads, state, own, fused=True)
        expected, expected_state = train(pure, tx, params, history)
        assert_close(own, expected)
        assert_close(fo.eval_params(tx, state, own), fo.eval_params(tx, expected_state, expected))


def test_without_averages_checkpoints_are_those_of_torch():
    _, opt = optimize(fo.sgd, *make(1), lr=0.1)
    assert "train_mode" not in opt.state_dict()["param_groups"][0]


def test_without_averages_nothing_is_evaluated():
    _, opt = optimize(fo.adam, *make(1), lr=0.1)
    with pytest.raises(ValueError, match="Nothing in adam has parameters to evaluate with"):
        with opt.averaged():
            pass


def test_before_the_first_step_nothing_moves():
    params, _ = make(0)
    own, opt = optimize(WRAPPERS["ema_weights"](fo.sgd(RATE)), params, [])
    with opt.averaged():
        assert torch.equal(own[0], params["w"])


@pytest.mark.parametrize("wrapper", [fo.lookahead, lambda tx: fo.ema_weights(tx, 0.9), lambda tx: fo.swa(tx, 1)])
def test_schedulers_and_groups_drive_a_wrapped_factory(wrapper):
    params, history = make()
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    groups = [{"params": own[:1], "lr": 0.1}, {"params": own[1:], "lr": 0.2}]
    opt = fo.Optimizer(groups, wrapper(fo.adamw), lr=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    for grads in history:
        give(own, grads)
        opt.step()
        scheduler.step()
    parts = {k: wrapper(fo.adamw(fo.schedules.exponential(lr, 0.5))) for k, lr in (("w", 0.1), ("b", 0.2))}
    found, _ = train(pure, fo.partition(parts, {"w": "w", "b": "b"}), params, history)
    assert_close([p.detach() for p in own], list(found.values()), rtol=1e-6, atol=1e-7)
