"""Every scheduler of torch.optim drives our classes as it drives torch's."""

import math
import pickle

import pytest
import torch
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR
from torch_like_cases import NAMES, assert_same, assert_same_state, give_gradients, make_pair, parameters, train

STEPS = 60
SCHEDULERS = {
    "LambdaLR": lambda opt: lrs.LambdaLR(opt, lambda t: 0.95**t),
    "MultiplicativeLR": lambda opt: lrs.MultiplicativeLR(opt, lambda t: 0.9 if t % 7 == 0 else 1.0),
    "StepLR": lambda opt: lrs.StepLR(opt, 9, gamma=0.5),
    "MultiStepLR": lambda opt: lrs.MultiStepLR(opt, [5, 20, 20, 40], gamma=0.5),
    "ConstantLR": lambda opt: lrs.ConstantLR(opt, factor=0.25, total_iters=11),
    "LinearLR": lambda opt: lrs.LinearLR(opt, start_factor=0.1, total_iters=40),
    "ExponentialLR": lambda opt: lrs.ExponentialLR(opt, gamma=0.93),
    "PolynomialLR": lambda opt: lrs.PolynomialLR(opt, total_iters=50, power=2.0),
    "CosineAnnealingLR": lambda opt: lrs.CosineAnnealingLR(opt, T_max=25, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda opt: lrs.CosineAnnealingWarmRestarts(opt, T_0=7, T_mult=2, eta_min=1e-4),
    "CyclicLR triangular": lambda opt: lrs.CyclicLR(opt, 1e-4, 0.1, step_size_up=8, cycle_momentum=False),
    "CyclicLR triangular2": lambda opt: lrs.CyclicLR(
        opt, 1e-4, 0.1, step_size_up=6, step_size_down=4, mode="triangular2", cycle_momentum=False
    ),
    "CyclicLR exp_range": lambda opt: lrs.CyclicLR(
        opt, 1e-4, 0.1, step_size_up=8, mode="exp_range", gamma=0.99, cycle_momentum=False
    ),
    "CyclicLR scale_fn": lambda opt: lrs.CyclicLR(
        opt, 1e-4, 0.1, step_size_up=8, scale_fn=lambda x: 1 / x, scale_mode="cycle", cycle_momentum=False
    ),
    "OneCycleLR": lambda opt: lrs.OneCycleLR(opt, 0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "SequentialLR": lambda opt: lrs.SequentialLR(
        opt, [lrs.LinearLR(opt, 0.1, total_iters=10), lrs.CosineAnnealingLR(opt, 40)], milestones=[10]
    ),
    "ChainedScheduler": lambda opt: lrs.ChainedScheduler(
        [lrs.ConstantLR(opt, 0.1, total_iters=10), lrs.ExponentialLR(opt, 0.95)], optimizer=opt
    ),
    "ReduceLROnPlateau min": lambda opt: lrs.ReduceLROnPlateau(opt, patience=2, cooldown=1, min_lr=1e-5),
    "ReduceLROnPlateau max abs": lambda opt: lrs.ReduceLROnPlateau(
        opt, mode="max", factor=0.5, patience=1, threshold=0.1, threshold_mode="abs"
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.05, anneal_epochs=20),
    "SWALR linear": lambda opt: SWALR(opt, swa_lr=0.05, anneal_epochs=20, anneal_strategy="linear"),
}
MOMENTUM = {
    f"CyclicLR {mode}": lambda opt, mode=mode: lrs.CyclicLR(opt, 1e-4, 0.1, step_size_up=8, mode=mode, gamma=0.99)
    for mode in ("triangular", "triangular2", "exp_range")
}
MOMENTUM |= {
    f"OneCycleLR {strategy} {phases}": lambda opt, strategy=strategy, phases=phases: lrs.OneCycleLR(
        opt, 0.1, total_steps=STEPS + 1, anneal_strategy=strategy, three_phase=phases == "three"
    )
    for strategy in ("cos", "linear")
    for phases in ("two", "three")
}
"""Those that drive momentum, or the first of betas, too."""

WITH_MOMENTUM = ["SGD", "RMSprop", *({"Muon"} & set(NAMES)), "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam"]


def advance(scheduler, t):
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step(math.cos(0.3 * t))
    else:
        scheduler.step()


def run(pair, schedulers, steps):
    """Train and schedule; return the learning rates, and all other numbers that schedulers may drive."""
    seen = []
    for t in steps:
        train(pair, 1)
        for optimizer, scheduler in zip(pair, schedulers, strict=True):
            advance(scheduler, t)
            group = optimizer.param_groups[0]
            seen.append([group["lr"], group.get("momentum"), group.get("betas")])
        assert seen[-1] == seen[-2]
    assert_same(*pair, 1e-11)
    return seen


def check(name, make, **options):
    pair = make_pair(name, **options)
    schedulers = [make(optimizer) for optimizer in pair]
    seen = run(pair, schedulers, range(STEPS))
    assert len({str(numbers) for numbers in seen}) > 1
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
    return seen


# They know nothing of each other: each scheduler drives a third of the classes, and each class a third of them.
TOGETHER = [(name, kind) for i, name in enumerate(NAMES) for j, kind in enumerate(SCHEDULERS) if (i + j) % 3 == 0]


@pytest.mark.sampled
@pytest.mark.parametrize(("name", "kind"), TOGETHER)
def test_schedulers(name, kind):
    check(name, SCHEDULERS[kind], lr=0.1)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", MOMENTUM)
@pytest.mark.parametrize("name", WITH_MOMENTUM)
def test_schedulers_that_drive_momentum(name, kind):
    seen = check(name, MOMENTUM[kind], lr=0.1)
    assert len({str(numbers[1:]) for numbers in seen}) > 5


def test_schedulers_refuse_optimizers_without_momentum():
    for name in {*NAMES} - {*WITH_MOMENTUM}:
        for optimizer in make_pair(name):
            with pytest.raises(ValueError, match="momentum"):
                lrs.OneCycleLR(optimizer, 0.1, total_steps=10)


def test_all_schedulers_of_torch_are_here():
    kinds = {name.split()[0] for name in [*SCHEDULERS, *MOMENTUM]} - {"SWALR"}
    assert kinds == {name for name in lrs.__all__ if name != "LRScheduler"}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_groups_with_learning_rates_of_their_own(kind):
    pair = make_pair("Adam", None)
    added = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in pair]
    for optimizer, p in zip(pair, added, strict=True):
        optimizer.add_param_group({"params": p, "lr": 0.01})
    run(pair, [SCHEDULERS[kind](optimizer) for optimizer in pair], range(STEPS))


@pytest.mark.sampled(size=24)
@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("name", ["SGD", "Adam", "ASGD"])
def test_a_tensor_as_learning_rate(name, kind):
    """Schedulers then write into it."""
    pair = make_pair(name, lr=torch.tensor(0.1, dtype=torch.float64))
    run(pair, [SCHEDULERS[kind](optimizer) for optimizer in pair], range(STEPS))
    assert isinstance(pair[0].param_groups[0]["lr"], torch.Tensor)


@pytest.mark.sampled(size=12)
@pytest.mark.parametrize("kind", [*SCHEDULERS, *MOMENTUM])
def test_training_goes_on_from_state_dicts(kind):
    """Of scheduler and optimizer, in torch's order, and exchanged between torch.optim and us."""
    make = {**SCHEDULERS, **MOMENTUM}[kind]
    pair = make_pair("Adam", lr=0.1)
    schedulers = [make(optimizer) for optimizer in pair]
    run(pair, schedulers, range(25))
    saved = [pickle.dumps((o.state_dict(), s.state_dict())) for o, s in zip(pair, schedulers, strict=True)]
    # Schedulers write into the groups when they are made.
    new_pair = make_pair("Adam", [p.detach().requires_grad_() for p in parameters(pair[0])], lr=0.1)
    new_schedulers = [make(optimizer) for optimizer in new_pair]
    for optimizer, scheduler, state in zip(new_pair, new_schedulers, saved[::-1], strict=True):
        optimizer_state, scheduler_state = pickle.loads(state)
        scheduler.load_state_dict(scheduler_state)
        optimizer.load_state_dict(optimizer_state)
    for two in (pair, new_pair):
        torch.manual_seed(1)
        run(two, schedulers if two is pair else new_schedulers, range(25, STEPS))
    assert_same(pair[0], new_pair[0])


def test_an_order_that_torch_warns_of():
    for optimizer in make_pair("Adam"):
        scheduler = lrs.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
            scheduler.step()


def test_steps_are_counted_by_a_method_that_schedulers_patch():
    for optimizer in make_pair("Adam"):
        lrs.StepLR(optimizer, 1)
        give_gradients(optimizer)
        optimizer.step()
        assert optimizer._opt_called
        assert optimizer.step._wrapped_by_lr_sched


def test_the_comparison_can_fail():
    ours, theirs = make_pair("Adam", lr=0.1)
    schedulers = [lrs.ExponentialLR(ours, 0.93), lrs.ExponentialLR(theirs, 0.9301)]
    for _ in range(5):
        train((ours, theirs), 1)
        for scheduler in schedulers:
            scheduler.step()
    with pytest.raises(AssertionError):
        assert_same(ours, theirs, 1e-11)
    assert_same_state(ours, theirs, 1e-10)  # moments know nothing of it
