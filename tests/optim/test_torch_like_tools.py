"""Our classes among torch's tools: averaging, gradient scaling, clipping, conversion, torch.compile."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch_like_cases import (
    MODULES,
    NAMES,
    RICHER,
    WITH_FUSED,
    assert_same,
    deviation,
    draw_gradient,
    each,
    make_pair,
    parameters,
    train,
)

DENSE = [name for name in NAMES if name != "SparseAdam"]


def make_models(name, **options):
    """Make two equal models, and ours and torch's optimizer for what they may train."""
    made = []
    for module in MODULES:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()
        params = [p for p in model.parameters() if p.ndim == 2 or name != "Muon"]
        made.append((model, getattr(module, name)(params, **{**RICHER.get(name, {}), **options})))
    return made


def loss_of(model, t):
    torch.manual_seed(t)
    return model(torch.randn(6, 3, dtype=torch.float64)).square().sum()


def assert_same_models(made):
    (ours, optimizer), (theirs, reference) = made
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-11, atol=1e-11)
    assert_same(optimizer, reference, 1e-11)


# Averages and clipping. -----------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=12)
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averaged_models(name, average):
    made = make_models(name)
    averages = []
    for model, optimizer in made:
        averaged = AveragedModel(model, multi_avg_fn=average)
        scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        for t in range(8):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            averaged.update_parameters(model)
            scheduler.step()
        torch.manual_seed(0)
        update_bn([torch.randn(6, 3, dtype=torch.float64) for _ in range(3)], averaged)
        averages.append(averaged.state_dict())
    assert_same_models(made)
    torch.testing.assert_close(*averages, rtol=1e-11, atol=1e-11)
    assert deviation(averaged.module.parameters(), model.parameters()) > 1e-6


@each
@pytest.mark.parametrize("clip", ["norm", "value"])
def test_clipped_gradients(name, clip):
    pair = make_pair(name)
    if name == "SparseAdam":
        pytest.skip("torch clips no sparse gradients")
    for _ in range(5):
        gradients = [10 * torch.randn_like(p.detach()) for p in parameters(pair[0])]
        for optimizer in pair:
            for p, g in zip(parameters(optimizer), gradients, strict=True):
                p.grad = g.clone()
            clip_(clip, parameters(optimizer))
            optimizer.step()
    assert_same(*pair)


def clip_(clip, params):
    if clip == "norm":
        nn.utils.clip_grad_norm_(params, 1.0)
    else:
        nn.utils.clip_grad_value_(params, 0.1)


# Scaled gradients. ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags"),
    [*[(name, {}) for name in NAMES], *[(name, {"fused": True}) for name in WITH_FUSED]],
    ids=str,
)
@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_gradients(name, flags, unscale):
    """Steps with infinite gradients are skipped, and leave parameters and states alone."""
    pair = make_pair(name, **flags)
    pair = pair[0], getattr(torch.optim, name)(copy.deepcopy(parameters(pair[1])), **RICHER.get(name, {}))
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3) for _ in pair]
    scales = set()
    for t in range(12):
        gradients = [draw_gradient(pair[0], p) for p in parameters(pair[0])]
        before = copy.deepcopy((parameters(pair[0]), pair[0].state_dict()["state"]))
        for optimizer, scaler in zip(pair, scalers, strict=True):
            scale = scaler.scale(torch.ones(()))
            for p, g in zip(parameters(optimizer), gradients, strict=True):
                p.grad = g * scale
            if t in (0, 4, 5):
                p.grad = p.grad * float("inf")
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        if t in (0, 4, 5):
            torch.testing.assert_close(parameters(pair[0]), before[0], rtol=0, atol=0)
            torch.testing.assert_close(pair[0].state_dict()["state"], before[1], rtol=0, atol=0)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.add(scalers[0].get_scale())
    assert scales == {1.0, 2.0, 4.0}
    assert_same(*pair)


def test_what_a_fused_optimizer_tells_scalers():
    """torch.optim's leaves unscaling to its kernel; ours leaves it to the scaler."""
    for name in WITH_FUSED:
        ours, theirs = make_pair(name, fused=True)
        assert theirs._step_supports_amp_scaling
        assert not ours._step_supports_amp_scaling


# Conversions. ---------------------------------------------------------------------------------------------------------

IN_PLACE = ["SGD", "Adagrad", "Adadelta", "Rprop", "ASGD", "SparseAdam"]
"""torch.optim's others raise an error when parameters are not of the dtype that they were."""


@pytest.mark.sampled(size=64)
@each
@pytest.mark.parametrize("old", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [torch.float64, torch.float32, torch.bfloat16])
def test_modules_converted_in_mid_training(name, old, new):
    """States follow their parameters, as when they are loaded; torch.optim's stay what they were."""
    ours, theirs = make_pair(name)
    for optimizer in (ours, theirs):
        torch.manual_seed(1)
        for dtype in (old, new):
            nn.ParameterList(parameters(optimizer)).to(dtype)
            optimizer.zero_grad()
            if optimizer is ours or dtype == old or name in IN_PLACE:
                train([optimizer], 4)
            else:
                continue
    assert all(p.dtype == new and p.isfinite().all() for p in parameters(ours))
    assert all(float(ours.state[p].get("step", 8)) == 8 for p in parameters(ours))
    if old == new or name in IN_PLACE:
        eps = max(torch.finfo(old).eps, torch.finfo(new).eps)
        assert deviation(*[[p.double() for p in parameters(optimizer)] for optimizer in (ours, theirs)]) < 16 * eps


# torch.compile. -------------------------------------------------------------------------------------------------------


def compiled_step(optimizer, model, backend):
    step = torch.compile(optimizer.step, backend=backend)

    def train(t):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        step()

    return train


def step_in_a_compiled_function(optimizer, model, backend):
    @torch.compile(backend=backend)
    def step(x):
        optimizer.step()
        return x.sin() + x.cos()

    def train(t):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        step(torch.ones(3))

    return train


def compiled_training(optimizer, model, backend):
    @torch.compile(backend=backend)
    def train(t):
        optimizer.zero_grad()
        model(t).square().sum().backward()
        optimizer.step()

    def with_data(t):
        torch.manual_seed(t)
        return train(torch.randn(6, 3, dtype=torch.float64))

    return with_data


def compiled_closure(optimizer, model, backend):
    @torch.compile(backend=backend)
    def train(x):
        def closure():
            optimizer.zero_grad()
            model(x).square().sum().backward()
            return x.sum()

        return optimizer.step(closure)

    def with_data(t):
        torch.manual_seed(t)
        return train(torch.randn(6, 3, dtype=torch.float64))

    return with_data


WAYS = [compiled_step, step_in_a_compiled_function, compiled_training, compiled_closure]
COMPILED = [
    *[(name, WAYS[i % 4]) for i, name in enumerate(DENSE)],
    *[(name, way) for name in ("SGD", "Adam") for way in WAYS],
]


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize(
    ("name", "way"), dict.fromkeys(COMPILED), ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_compiled(name, way):
    """The same numbers, no recompilation after the second step, and groups that stay as they are."""
    made = make_models(name)
    counter = CompileCounter()
    (model, optimizer), (torchs_model, reference) = made
    one_step = way(optimizer, model, counter)
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    frames = []
    for t in range(6):
        one_step(t)
        frames.append(counter.frame_count)
        reference.zero_grad()
        loss_of(torchs_model, t).backward()
        reference.step()
        if t == 3:  # as a scheduler does
            for _, either in made:
                either.param_groups[0]["lr"] *= 0.5
    assert_same_models(made)
    assert frames[1:] == [frames[1]] * 5
    assert (frames[-1] > 0) == (way is not compiled_step)  # the step itself runs eagerly
    groups[0]["lr"] *= 0.5
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups


def test_sparse_gradients_in_a_compiled_function():
    pair = make_pair("SparseAdam")
    step = torch.compile(pair[0].step, backend=CompileCounter())
    for _ in range(6):
        gradients = [draw_gradient(pair[0], p) for p in parameters(pair[0])]
        for optimizer in pair:
            for p, g in zip(parameters(optimizer), gradients, strict=True):
                p.grad = g.clone()
        step()
        pair[1].step()
    assert_same(*pair)
