"""Every scheduler of torch, and the schedule that is its counterpart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from functorch_optim import schedules

LR = 0.1


def torchs_values(make_scheduler, count=100, key="lr"):
    """Drive an optimizer with a scheduler, and return its learning rates or momenta."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.5)
    scheduler = make_scheduler(optimizer)
    values = []
    for _ in range(count):
        values.append(optimizer.param_groups[0][key])
        optimizer.step()
        if len(values) < count:
            scheduler.step()
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(values, expected):
    """Compare with the relative precision of 1e-12, where a schedule ends at zero with that of its largest value."""
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13 * expected.abs().max().item())


def sequential(optimizer, first, second, milestone):
    return lr_scheduler.SequentialLR(optimizer, [first(optimizer), second(optimizer)], [milestone])


def one_over(cycle):
    return 1 / cycle


def decaying(step):
    return 0.99**step


# The schedule, torch's scheduler, and its arguments; several for each where they make a difference.
TORCH = [
    (schedules.linear(LR * 0.2, LR * 0.9, 60), lr_scheduler.LinearLR, (0.2, 0.9, 60)),
    (schedules.linear_factor(LR, 0.2, 0.9, 60), lr_scheduler.LinearLR, (0.2, 0.9, 60)),
    (schedules.linear_factor(LR), lr_scheduler.LinearLR, ()),
    (schedules.linear_factor(LR, 1.0, 0.0, 200), lr_scheduler.LinearLR, (1.0, 0.0, 200)),
    (schedules.constant_factor(LR), lr_scheduler.ConstantLR, ()),
    (schedules.constant_factor(LR, 0.7, 30), lr_scheduler.ConstantLR, (0.7, 30)),
    (schedules.exponential(LR, 0.97), lr_scheduler.ExponentialLR, (0.97,)),
    (schedules.step(LR, 30, 0.3), lr_scheduler.StepLR, (30, 0.3)),
    (schedules.step(LR, 30), lr_scheduler.StepLR, (30,)),
    (schedules.multi_step(LR, [30, 80]), lr_scheduler.MultiStepLR, ([30, 80],)),
    (schedules.multi_step(LR, [50, 3, 50, 20], 0.3), lr_scheduler.MultiStepLR, ([50, 3, 50, 20], 0.3)),
    (schedules.multi_step(LR, [0, 5], 0.3), lr_scheduler.MultiStepLR, ([0, 5], 0.3)),
    (schedules.polynomial(LR, 80, 2.5), lr_scheduler.PolynomialLR, (80, 2.5)),
    (schedules.polynomial(LR, 5), lr_scheduler.PolynomialLR, ()),
    (schedules.cosine(LR, 99, 0.01), lr_scheduler.CosineAnnealingLR, (99, 0.01)),  # where it does not rise again
    (schedules.cosine_annealing(LR, 99), lr_scheduler.CosineAnnealingLR, (99,)),
    (schedules.cosine_annealing(LR, 33), lr_scheduler.CosineAnnealingLR, (33,)),
    (schedules.cosine_annealing(LR, 1, 0.01), lr_scheduler.CosineAnnealingLR, (1, 0.01)),
    (schedules.cosine_annealing(LR, 7, 0.01), lr_scheduler.CosineAnnealingLR, (7, 0.01)),
    (schedules.cosine_warm_restarts(LR, 7), lr_scheduler.CosineAnnealingWarmRestarts, (7,)),
    (schedules.cosine_warm_restarts(LR, 1, 2), lr_scheduler.CosineAnnealingWarmRestarts, (1, 2)),
    (schedules.cosine_warm_restarts(LR, 3, 3, 0.01), lr_scheduler.CosineAnnealingWarmRestarts, (3, 3, 0.01)),
    (schedules.cyclic(0.01, LR, 20), lr_scheduler.CyclicLR, (0.01, LR, 20)),
    (schedules.cyclic(0.01, LR), lr_scheduler.CyclicLR, (0.01, LR)),
    (schedules.cyclic(0.01, LR, 7, 13, "triangular2"), lr_scheduler.CyclicLR, (0.01, LR, 7, 13, "triangular2")),
    (schedules.cyclic(0.01, LR, 7, 3, "exp_range", 0.9), lr_scheduler.CyclicLR, (0.01, LR, 7, 3, "exp_range", 0.9)),
    (
        schedules.cyclic(0.01, LR, 7, 3, scale_fn=one_over),
        lr_scheduler.CyclicLR,
        (0.01, LR, 7, 3, "triangular", 1.0, one_over),
    ),
    (
        schedules.cyclic(0.01, LR, 7, 3, scale_fn=decaying, scale_mode="iterations"),
        lr_scheduler.CyclicLR,
        (0.01, LR, 7, 3, "triangular", 1.0, decaying, "iterations"),
    ),
    (schedules.one_cycle(LR, 100), lr_scheduler.OneCycleLR, (LR, 100)),
    (schedules.swa(LR, 0.03), SWALR, (0.03,)),
    (schedules.swa(LR, 0.03, 70, "linear"), SWALR, (0.03, 70, "linear")),
    (schedules.swa(LR, 0.03, 0), SWALR, (0.03, 0)),
    (LR * schedules.Schedule(decaying), lr_scheduler.LambdaLR, (decaying,)),
    (
        schedules.join([schedules.linear(LR * 0.2, LR, 20), schedules.exponential(LR, 0.95)], [30]),
        sequential,
        (
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 20),
            lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.95),
            30,
        ),
    ),
    (
        schedules.warmup_cosine(LR, 20, 99, LR * 0.05, 0.01),
        sequential,
        (
            lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.05, 1.0, 20),
            lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 79, 0.01),
            20,
        ),
    ),
    (
        schedules.product(schedules.exponential(LR, 0.97), schedules.constant_factor(1.0, 0.1, 20)),
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(optimizer, 0.97), lr_scheduler.ConstantLR(optimizer, 0.1, 20)]
        ),
        (),
    ),
]


def names():
    seen = {}
    for _, scheduler, _ in TORCH:
        name = scheduler.__name__ if isinstance(scheduler, type) else "composed"
        seen[name] = seen.get(name, -1) + 1
        yield f"{name}-{seen[name]}"


@pytest.mark.parametrize(("schedule", "scheduler", "arguments"), TORCH, ids=names())
def test_equals_torch(schedule, scheduler, arguments):
    expected = torchs_values(lambda optimizer: scheduler(optimizer, *arguments))
    steps = torch.arange(100)
    assert_equal(schedule(steps), expected)
    if expected.unique().numel() > 1:
        # Negative control: the comparison would notice a schedule that is one step ahead.
        with pytest.raises(AssertionError):
            assert_equal(schedule(steps + 1), expected)


def test_no_scheduler_of_torch_is_forgotten():
    compared = {scheduler.__name__ for _, scheduler, _ in TORCH if isinstance(scheduler, type)}
    elsewhere = {
        "SequentialLR",  # above, in sequential
        "ChainedScheduler",  # above
        "MultiplicativeLR",  # left out: see the docstring of schedules
        "ReduceLROnPlateau",  # test_plateau.py
    }
    assert compared | elsewhere == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


LENGTHS = st.integers(1, 60)
STRATEGIES = st.sampled_from(["cos", "linear"])


@given(LENGTHS, LENGTHS, st.sampled_from(["triangular", "triangular2", "exp_range"]), st.floats(0.9, 1.0))
def test_cyclic(up, down, mode, gamma):
    def scheduler(optimizer):
        return lr_scheduler.CyclicLR(optimizer, 0.01, 0.2, up, down, mode, gamma, base_momentum=0.8, max_momentum=0.95)

    steps = torch.arange(100)
    assert_equal(schedules.cyclic(0.01, 0.2, up, down, mode, gamma)(steps), torchs_values(scheduler))
    momentum = schedules.cyclic_momentum(0.8, 0.95, up, down, mode, gamma)
    assert_equal(momentum(steps), torchs_values(scheduler, key="momentum"))


@given(
    st.integers(100, 300),
    st.sampled_from([0.0, 0.001, 0.25, 0.3, 0.49, 0.5, 0.6, 0.9, 1.0]) | st.floats(0.02, 1.0),
    STRATEGIES,
    st.booleans(),
)
def test_one_cycle(total_steps, pct_start, strategy, three_phase):
    def scheduler(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer,
            0.5,
            total_steps,
            pct_start=pct_start,
            anneal_strategy=strategy,
            base_momentum=0.8,
            max_momentum=0.9,
            div_factor=7.0,
            final_div_factor=30.0,
            three_phase=three_phase,
        )

    steps = torch.arange(total_steps)
    lr = schedules.one_cycle(0.5, total_steps, pct_start, strategy, 7.0, 30.0, three_phase)
    assert_equal(lr(steps), torchs_values(scheduler, total_steps))
    momentum = schedules.one_cycle_momentum(total_steps, pct_start, strategy, 0.8, 0.9, three_phase)
    assert_equal(momentum(steps), torchs_values(scheduler, total_steps, "momentum"))
    # Past the end, where torch raises an error, it stays.
    assert torch.equal(lr(total_steps + steps), lr(torch.full_like(steps, total_steps - 1)))


@given(LENGTHS, st.integers(1, 5), st.floats(0, 0.05))
def test_cosine_warm_restarts(T_0, T_mult, eta_min):  # noqa: N803
    expected = torchs_values(
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0, T_mult, eta_min)
    )
    assert_equal(schedules.cosine_warm_restarts(LR, T_0, T_mult, eta_min)(torch.arange(100)), expected)


def test_cosine_warm_restarts_over_thousands_of_steps():
    for arguments in ((1, 2), (10, 2), (3, 3), (7, 1)):
        expected = torchs_values(
            lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, *arguments), 5000
        )
        values = schedules.cosine_warm_restarts(LR, *arguments)(torch.arange(5000))
        assert_equal(values, expected)
        assert torch.equal(values == LR, expected == LR)  # at restarts exactly


@given(st.integers(0, 120), STRATEGIES, st.floats(0.0, 1.0))
def test_swa(anneal_epochs, strategy, swa_lr):
    expected = torchs_values(lambda optimizer: SWALR(optimizer, swa_lr, anneal_epochs, strategy))
    assert_equal(schedules.swa(LR, swa_lr, anneal_epochs, strategy)(torch.arange(100)), expected)


@given(LENGTHS, st.floats(0, 0.05))
def test_cosine_annealing(T_max, eta_min):  # noqa: N803
    expected = torchs_values(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max, eta_min))
    assert_equal(schedules.cosine_annealing(LR, T_max, eta_min)(torch.arange(100)), expected)


def test_a_chain_with_a_scheduler_that_adds_is_no_product():
    """As the docstring of product says."""

    def scheduler(optimizer):
        return lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(optimizer, 0.97), lr_scheduler.CosineAnnealingLR(optimizer, 99, 0.02)]
        )

    multiplied = schedules.product(schedules.exponential(1.0, 0.97), schedules.cosine(LR, 99, 0.02))
    with pytest.raises(AssertionError):
        assert_equal(multiplied(torch.arange(100)), torchs_values(scheduler))
