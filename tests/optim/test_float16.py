"""float16: autocast with a GradScaler, in every form and with fused steps; parameters in float16; complex32."""

import copy

import pytest
import torch
from torch import nn

import functorch_optim as fo

FORMS = {
    "class": lambda params, **options: fo.optim.AdamW(params, lr=0.05, **options),
    "factory": lambda params, **options: fo.Optimizer(params, fo.adamw, lr=0.05, **options),
    "chain": lambda params, **options: fo.Optimizer(
        params, fo.chain(fo.clip_by_global_norm(1e4), fo.adamw(0.05)), **options
    ),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
each_way = pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
INFINITE = (0, 3, 4)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(model, optimizer, steps=7, unscale=False):
    """Train under autocast; yield after each step whether it was skipped, and whether anything has changed."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    for t in range(steps):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
        scaler.scale(loss * (torch.inf if t in INFINITE else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e4)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        after = model.state_dict(), optimizer.state_dict()["state"]
        try:
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            stands = True
        except AssertionError:
            stands = False
        yield scaler.get_scale() < scale, stands


@each_form
@each_way
@pytest.mark.parametrize("unscale", [False, True])
def test_a_training_under_autocast_is_that_of_torch(form, options, unscale):
    model, twin = make_model(), make_model()
    found = list(train(model, form(model.parameters(), **options), unscale=unscale))
    expected = list(train(twin, torch.optim.AdamW(twin.parameters(), lr=0.05), unscale=unscale))
    assert found == expected == [(t in INFINITE, t in INFINITE) for t in range(7)]
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@each_form
@each_way
def test_scalers_refuse_float16_parameters(form, options):
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer, scaler = form([p], **options), torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.float().square().sum()).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)
    assert torch.equal(p, torch.ones(3, dtype=torch.float16))
    assert not optimizer.state


def test_float16_parameters_train_with_a_constant_scale():
    scale = 2.0**12
    inner = fo.chain(fo.scale(1 / scale), fo.adamw(1e-3))
    tx = fo.apply_if_finite(fo.master_weights(inner))
    p = nn.Parameter(torch.linspace(0.5, 2, 8).half())
    single = {"p": p.detach().float()}
    optimizer, plain = fo.Optimizer([p], tx), fo.adamw(1e-3)
    state, skipped = plain.init(single), []
    for t in range(30):
        before = copy.deepcopy((p.detach(), optimizer.state[p].get("master")))
        loss = (p * 1e-6).float().square().sum() * 1e4 * (torch.inf if t in INFINITE else 1.0)
        optimizer.zero_grad()
        (loss * scale).backward()
        optimizer.step()
        skipped.append(torch.equal(p, before[0]) and (t == 0 or torch.equal(optimizer.state[p]["master"], before[1])))
        if t not in INFINITE:
            single, state = fo.step(plain, {"p": p.grad.float() / scale}, state, single)
    assert [t for t, one in enumerate(skipped) if one] == list(INFINITE)
    torch.testing.assert_close(optimizer.state[p]["master"], single["p"])


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "make", [*FORMS.values(), lambda params: fo.adamw(0.1).init(params)], ids=[*FORMS, "functional"]
)
def test_complex32_is_refused(make):
    p = nn.Parameter(torch.zeros(2, dtype=torch.complex32))
    p.grad = torch.ones(2, dtype=torch.complex32)
    with pytest.raises(TypeError, match=r"has dtype torch.complex32, which cannot be optimized; convert it with .to"):
        make([p]).step()
