"""The values of other libraries' schedules, as docs/migration/timm.md says; where they are installed."""

import pytest
import torch

import functorch_optim as fo

TIMM = {
    "cosine": (
        fo.schedules.warmup_cosine(0.1, 3, 3 + 8, 0.0, 0.01),
        ("CosineLRScheduler", {"t_initial": 8, "lr_min": 0.01, "warmup_t": 3, "warmup_prefix": True}),
    ),
    "polynomial": (
        fo.schedules.polynomial(0.1, 8, 0.7, 0.01),
        ("PolyLRScheduler", {"t_initial": 8, "lr_min": 0.01, "power": 0.7}),
    ),
}
PYTORCH_OPTIMIZER = {
    decay: (
        fo.schedules.warmup_stable_decay(0.1, 2, 3, 4, end_value=0.1 * ratio, decay=decay),
        ("get_wsd_schedule", {"cooldown_type": decay, "min_lr_ratio": ratio}),
    )
    for decay, ratio in {"1-sqrt": 0.0, "linear": 0.0, "cosine": 0.3}.items()
}


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)


@pytest.mark.parametrize("name", TIMM)
def test_a_schedule_equals_timms(name):
    ours, (scheduler, options) = TIMM[name]
    opt = optimizer()
    theirs = getattr(pytest.importorskip("timm.scheduler"), scheduler)(opt, **options)
    for step in range(14):
        theirs.step(step)
        assert float(ours(step)) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("name", PYTORCH_OPTIMIZER)
def test_a_schedule_equals_pytorch_optimizers(name):
    ours, (scheduler, options) = PYTORCH_OPTIMIZER[name]
    opt = optimizer()
    make = getattr(pytest.importorskip("pytorch_optimizer"), scheduler)
    theirs = make(opt, num_warmup_steps=2, num_stable_steps=3, num_decay_steps=4, **options)
    for step in range(12):
        assert float(ours(step)) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-9)
        opt.step()
        theirs.step()


def test_rex_equals_pytorch_optimizers():
    opt = optimizer()
    theirs = pytest.importorskip("pytorch_optimizer").REXScheduler(opt, total_steps=6, max_lr=0.1, min_lr=0.01)
    ours = fo.schedules.rex(0.1, 6, 0.01)
    for step in range(1, 7):  # theirs begins with its first step
        theirs.step()
        assert float(ours(step)) == pytest.approx(opt.param_groups[0]["lr"], rel=1e-9)
