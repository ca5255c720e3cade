"""fo.Optimizer has the interface of torch.optim.Optimizer: closures, hooks, copies, checkpoints, edits."""

import copy

import pytest
import torch
from hooks import calls_of_hooks
from torch import nn, optim
from torch.optim import swa_utils
from wrapper_cases import (
    ADADELTA,
    ADAM,
    ADAMW,
    LATE,
    SGD,
    Model,
    assert_close,
    assert_copy_trains_on_by_itself,
    assert_same,
    backward,
    each_copy,
    make_both,
    train,
)

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

BASES = [
    SGD._replace(hyperparameters={"lr": 0.1, "momentum": 0.9, "dampening": 0.4}),
    ADAM._replace(hyperparameters={"amsgrad": True}),
    ADAMW,
    ADADELTA,
]
each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.factory.__name__)


# Steps. ---------------------------------------------------------------------------------------------------------------


def test_closure_is_evaluated_with_grad_and_its_loss_returned(device):
    pairs = make_both(device, ADAM)
    losses = []
    for model, optimizer in pairs:
        with torch.no_grad():
            losses.append(optimizer.step(lambda: backward(model, 0)))
            assert not torch.is_grad_enabled()
    assert losses[0].requires_grad
    assert_close(*losses)
    assert_same(*pairs)


def test_step_without_closure_returns_none(device):
    _, optimizer = make_both(device, ADAM)[0]
    assert optimizer.step() is None
    assert not optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, device):
    model, optimizer = make_both(device, ADAM)[0]
    backward(model, 1, missing=False)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())


def test_add_param_group_mid_training(device):
    pairs = make_both(device, ADAM)
    train(pairs, range(5))
    for model, optimizer in pairs:
        model.added = nn.Parameter(torch.ones(2, dtype=torch.float64, device=device))
        optimizer.add_param_group({"params": model.added, "lr": 0.3})
    for t in range(5, 10):
        for model, optimizer in pairs:
            backward(model, t)
            model.added.grad = torch.full_like(model.added, t)
            optimizer.step()
        assert_same(*pairs)
    model, optimizer = pairs[0]
    assert optimizer.state[model.added]["step"] == 5


def test_groups_take_generators(device):
    groups = [{"params": Model(device).parameters()}, {"params": Model(device).parameters()}]
    optimizer = fo.Optimizer(groups, fo.adam)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(Model().parameters()))] * 2


def test_groups_keep_names(device):
    model = Model(device)
    names = [name for name, _ in model.named_parameters()]
    optimizer = fo.Optimizer(model.named_parameters(), fo.adam)
    saved = optimizer.state_dict()
    assert optimizer.param_groups[0]["param_names"] == saved["param_groups"][0]["param_names"] == names
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == names


def test_scaler_skips_steps_with_infinite_gradients(device):
    pairs = make_both(device, ADAM)
    for model, _ in pairs:
        model.waves.requires_grad_(False)  # scalers know no complex gradients
    scalers = [torch.amp.GradScaler(device.type, init_scale=4.0, growth_interval=3) for _ in pairs]
    for t in range(10):
        before = copy.deepcopy(list(pairs[0][0].parameters()))
        for (model, optimizer), scaler in zip(pairs, scalers, strict=True):
            optimizer.zero_grad()
            loss = sum(p.abs().square().sum() for p in model.parameters())
            (scaler.scale(loss) * (float("inf") if t == 4 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert_same(*pairs)
        assert (t == 4) == all(map(torch.equal, pairs[0][0].parameters(), before))


def test_averaged_model(device):
    pairs = make_both(device, SGD)
    averages = [swa_utils.AveragedModel(model) for model, _ in pairs]
    for t in range(5):
        train(pairs, [t])
        for average, (model, _) in zip(averages, pairs, strict=True):
            average.update_parameters(model)
    assert_close(list(averages[0].parameters()), list(averages[1].parameters()))


# Hooks. ---------------------------------------------------------------------------------------------------------------


def test_hooks_are_called_as_torch_calls_them(device):
    ours, theirs = [calls_of_hooks(optimizer) for _, optimizer in make_both(device, ADAM)]
    assert ours == theirs


def test_step_pre_hook_may_change_the_arguments(device):
    _, optimizer = make_both(device, ADAM)[0]
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: "changed"), {}))
    assert optimizer.step() == "changed"


def test_state_dict_hooks_may_replace_what_is_saved_and_loaded(device):
    pairs = make_both(device, ADAM)
    train(pairs, range(5))
    for _, optimizer in pairs:
        optimizer.register_state_dict_post_hook(lambda optimizer, saved: {"wrapped": saved})
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, saved: saved["wrapped"])
        saved = optimizer.state_dict()
        assert list(saved) == ["wrapped"]
        optimizer.state.clear()
        optimizer.load_state_dict(saved)
    assert_same(*pairs)
    train(pairs, range(5, 10))
    assert_same(*pairs)


def test_state_dict_post_hook_sees_what_is_saved(device):
    optimizer = fo.Optimizer(Model(device).parameters(), fo.sgd, lr=fo.schedules.constant(0.1))
    seen = []
    optimizer.register_state_dict_post_hook(lambda optimizer, saved: seen.append(copy.deepcopy(saved)))
    assert optimizer.state_dict() == seen[0]


def test_repr_names_the_factory_and_the_hyperparameters(device):
    model = Model(device)
    text = repr(fo.Optimizer([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.25}], fo.adamw, lr=0.125))
    assert text.startswith("Optimizer of adamw (\nParameter Group 0\n")
    assert all(part in text for part in ("lr: 0.125", "lr: 0.25", "betas: (0.9, 0.999)", "Parameter Group 1"))
    schedule = fo.schedules.cosine(0.1, 10)
    assert f"lr: {schedule!r}" in repr(fo.Optimizer([model.weight], fo.sgd, lr=schedule))
    assert "clip(1.0)" in repr(fo.Optimizer([model.weight], fo.chain(fo.clip(1.0), fo.sgd(0.1))))


# Copies and checkpoints. ----------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=12)
@each_base
@each_copy
def test_copies_train_on(make_copy, base, device):
    assert_copy_trains_on_by_itself(lambda: make_both(device, base)[0], make_copy)


@each_base
@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_checkpoints_are_exchanged_with_torch(direction, base, device):
    pairs = make_both(device, base)
    train(pairs, range(25))
    source, target = pairs if direction == "to torch" else pairs[::-1]
    target[1].load_state_dict(through_a_file(source[1].state_dict()))
    train(pairs, range(25, 32))
    assert_close(*[list(model.parameters()) for model, _ in pairs])


# Hyperparameters. -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=24)
@pytest.mark.parametrize("reload", [False, True], ids=["", "reload"])
@pytest.mark.parametrize(
    ("base", "hyperparameters", "edit"),
    [
        pytest.param(base, hyperparameters, edit, id=f"{base.factory.__name__} {hyperparameters} {edit}")
        for base, hyperparameters, edit in [
            (SGD, {}, {"lr": 0.5}),
            (SGD, {}, {"weight_decay": 0.5}),
            (SGD, {}, {"momentum": 0.9}),
            (SGD, {"dampening": 0.4}, {"momentum": 0.9}),
            (SGD, {"momentum": 0.9}, {"momentum": 0.0}),
            (SGD, {"momentum": 0.9}, {"nesterov": True, "maximize": True}),
            (ADAM, {}, {"lr": 0.5, "betas": (0.5, 0.7), "eps": 0.1}),
            (ADAM, {}, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
            (ADAM, {"amsgrad": True}, {"amsgrad": False}),
            (ADADELTA, {}, {"rho": 0.3}),
        ]
    ],
)
def test_edits_take_effect_at_the_next_step(base, hyperparameters, edit, reload, device):
    pairs = make_both(device, base, **hyperparameters)
    train(pairs, range(5))
    for _, optimizer in pairs:
        optimizer.param_groups[0].update(edit)
    train(pairs, range(5, 10))
    assert_same(*pairs)
    if reload:
        for _, optimizer in pairs:
            optimizer.load_state_dict(optimizer.state_dict())
    train(pairs, range(10, 15))
    assert_same(*pairs)


def test_edits_within_a_hyperparameter_take_effect(device):
    p = nn.Parameter(torch.ones(2, dtype=torch.float64, device=device))
    p.grad = torch.zeros_like(p)
    optimizer = fo.Optimizer([p], fo.adamw, lr=0.5, weight_decay=1.0, mask=[True])
    optimizer.step()
    optimizer.param_groups[0]["mask"][0] = False
    optimizer.step()
    assert p.tolist() == [0.5, 0.5]


def test_parameters_may_be_replaced(device):
    pairs = make_both(device, ADAM)
    train(pairs, range(5))
    for model, optimizer in pairs:
        old, model.weight = model.weight, nn.Parameter(model.weight.detach() + 1)
        optimizer.param_groups[0]["params"][0] = model.weight
        optimizer.state[model.weight] = optimizer.state.pop(old)
    train(pairs, range(5, 10))
    assert_same(*pairs)


SCHEDULE = fo.schedules.cosine(0.1, 40)


def test_a_schedule_counts_the_steps_of_each_parameter(device):
    model, reference_model = Model(device), Model(device)
    optimizer = fo.Optimizer(model.parameters(), fo.adam, lr=SCHEDULE)
    references = [optim.Adam([p]) for p in reference_model.parameters()]
    counts = [0] * len(references)
    for t in range(LATE + 10):
        train([(model, optimizer)], [t])
        backward(reference_model, t)
        for i, (p, reference) in enumerate(zip(reference_model.parameters(), references, strict=True)):
            reference.param_groups[0]["lr"] = float(SCHEDULE(counts[i]))
            reference.step()
            counts[i] += p.grad is not None
    assert len(set(counts)) > 1
    assert_close(list(model.parameters()), list(reference_model.parameters()))


@pytest.mark.parametrize("hyperparameters", [{"lr": SCHEDULE}, {"betas": (fo.schedules.linear(0.5, 0.9, 20), 0.99)}])
def test_schedules_are_not_saved_and_stay_when_loading(hyperparameters, device):
    def make():
        model = Model(device)
        return model, fo.Optimizer(model.parameters(), fo.adam, **hyperparameters)

    (name, value), (model, optimizer) = *hyperparameters.items(), make()
    train([(model, optimizer)], range(5))
    saved = through_a_file(optimizer.state_dict())
    assert name not in saved["param_groups"][0]
    new_model, new_optimizer = make()
    new_model.load_state_dict(model.state_dict())
    new_optimizer.load_state_dict(saved)
    assert new_optimizer.param_groups[0][name] is value
    pairs = (new_model, new_optimizer), (model, optimizer)
    train(pairs, range(5, 10))
    assert_same(*pairs)


# Differentiable steps. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("lr",), ("lr", "momentum"), ("lr", "weight_decay")], ids="-".join)
@pytest.mark.parametrize("steps", [1, 2])
def test_differentiable_steps_have_the_right_derivatives(steps, names, device):
    def trained(initial, *values):
        p = initial.clone()
        optimizer = fo.Optimizer(
            [p], fo.sgd, differentiable=True, **{"momentum": 0.9, **dict(zip(names, values, strict=True))}
        )
        for _ in range(steps):
            (p.grad,) = torch.autograd.grad(p.clone().pow(3).sum(), p, create_graph=True)
            optimizer.step()
        return p

    initial = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    values = [torch.tensor(0.1, dtype=torch.float64, device=device, requires_grad=True) for _ in names]
    assert torch.autograd.gradcheck(trained, (initial, *values))


def test_a_default_device_is_for_the_model():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
        opt = fo.Optimizer(model.parameters(), fo.adam)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        opt.step()
    assert opt.state[model.bias]["step"] == 1
    assert opt.state[model.bias]["exp_avg"].device.type == "meta"
