"""fo.Optimizer has the numbers of torch.optim's classes: parameters, states, and what schedulers make of them."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler, swa_utils
from wrapper_cases import ADADELTA, ADAM, ADAMW, SGD, assert_same, make_both, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


def assert_trains_the_same(pairs, steps=40, schedulers=()):
    """Train a model with our optimizer and one with torch's, and compare after each step."""
    model, optimizer = pairs[0]
    assert all("lr" in group for group in optimizer.param_groups)
    counts = dict.fromkeys(model.parameters(), 0)
    for t in range(steps):
        train(pairs, [t])
        for scheduler in schedulers:
            scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        assert_same(*pairs)
        counts = {p: count + (p.grad is not None) for p, count in counts.items()}
        assert {p: int(state["step"]) for p, state in optimizer.state.items()} == {p: n for p, n in counts.items() if n}


@pytest.mark.sampled(size=8)
@pytest.mark.parametrize(
    ("base", "hyperparameters"),
    [
        pytest.param(base, hyperparameters, id=" ".join([base.factory.__name__, *hyperparameters]))
        for base, hyperparameters in [
            (SGD, {}),
            (SGD, {"momentum": 0.9}),
            (SGD, {"momentum": 0.9, "dampening": 0.4}),
            (SGD, {"momentum": 0.9, "nesterov": True}),
            (SGD, {"weight_decay": 0.3}),
            (SGD, {"momentum": 0.9, "weight_decay": 0.3, "maximize": True}),
            (ADAM, {}),
            (ADAM, {"amsgrad": True}),
            (ADAM, {"weight_decay": 0.3}),
            (ADAM, {"weight_decay": 0.3, "decoupled_weight_decay": True}),
            (ADAM, {"weight_decay": 0.3, "maximize": True}),
            (ADAMW, {}),
            (ADAMW, {"weight_decay": 0.3, "amsgrad": True}),
            (ADAMW, {"weight_decay": 0.3, "maximize": True}),
            (ADADELTA, {}),
            (ADADELTA, {"weight_decay": 0.3, "maximize": True}),
        ]
    ],
)
def test_numbers_are_those_of_torch(base, hyperparameters, device):
    assert_trains_the_same(make_both(device, base, **hyperparameters))


@pytest.mark.parametrize(
    ("base", "name", "wrong"),
    [
        (SGD, "lr", 0.1 * (1 + 1e-9)),
        (SGD, "weight_decay", 1e-9),
        (ADAM, "eps", 1.1e-8),
        (ADAM, "betas", (0.9, 0.999 + 1e-8)),
        (ADAMW, "weight_decay", 0.01 + 1e-9),
        (ADADELTA, "rho", 0.9 + 1e-9),
    ],
)
def test_the_comparison_notices_a_slightly_wrong_hyperparameter(base, name, wrong):
    pairs = make_both("cpu", base)
    optimizer = pairs[0][1]
    group, right = optimizer.param_groups[0], optimizer.param_groups[0][name]
    # Wrong only within the step: the numbers must tell, not the comparison of hyperparameters.
    optimizer.register_step_pre_hook(lambda *_: group.update({name: wrong}))
    optimizer.register_step_post_hook(lambda *_: group.update({name: right}))
    with pytest.raises(AssertionError, match="not close"):
        assert_trains_the_same(pairs)


# Schedulers. ----------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.8, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, 0.01),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR triangular": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "CyclicLR triangular2": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "CyclicLR exp_range": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "CyclicLR of lr alone": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=13, three_phase=True),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(o, 0.8)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=2),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


LRS = {"number": float, "tensor": partial(torch.tensor, dtype=torch.float64)}
BASES = {"sgd": SGD, "adam": ADAM}
# Each scheduler with both optimizers and both kinds of learning rate, and either two of them together.
SCHEDULED = [
    pytest.param(make, BASES[base], LRS[("number", "tensor")[(i + j) % 2]], id=f"{kind}-{base}")
    for i, (kind, make) in enumerate(SCHEDULERS.items())
    for j, base in enumerate(BASES)
]


@pytest.mark.sampled
@pytest.mark.parametrize(("make_scheduler", "base", "make_lr"), SCHEDULED)
def test_schedulers_do_what_they_do_to_torch(make_scheduler, base, make_lr, device):
    base = base._replace(override={**base.override, "lr": make_lr(0.02)})
    momentum = {"momentum": 0.9} if base.factory is fo.sgd else {}
    pairs = make_both(device, base, lr=make_lr(0.1), **momentum)
    assert_trains_the_same(pairs, steps=12, schedulers=[make_scheduler(optimizer) for _, optimizer in pairs])


# Edits, checkpoints, gaps: in any order. ------------------------------------------------------------------------------


SHAPES = [(2, 3), (), (3,)]
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("step"), st.tuples(*[st.booleans() for _ in SHAPES])),
        st.tuples(st.just("lr"), st.floats(0.0, 1.0)),
        st.tuples(st.just("reload"), st.none()),
    ),
    min_size=1,
    max_size=15,
)


@given(events=EVENTS, amsgrad=st.booleans(), seed=st.integers(0, 1000))
def test_any_sequence_of_events_leads_where_it_leads_with_torch(events, amsgrad, seed):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    makers = [partial(fo.Optimizer, transformation=fo.adam), optim.Adam]
    models = [nn.ParameterList([nn.Parameter(value.clone()) for value in values]) for _ in makers]
    optimizers = [make(model, lr=0.1, amsgrad=amsgrad) for make, model in zip(makers, models, strict=True)]
    for kind, argument in events:
        grads = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
        for i, (make, model) in enumerate(zip(makers, models, strict=True)):
            if kind == "lr":
                optimizers[i].param_groups[0]["lr"] = argument
            elif kind == "reload":
                saved = through_a_file(optimizers[i].state_dict())
                optimizers[i] = make(model, lr=0.7)
                optimizers[i].load_state_dict(saved)
            else:
                for p, grad, present in zip(model, grads, argument, strict=True):
                    p.grad = grad.clone() if present else None
                optimizers[i].step()
        assert_same(*zip(models, optimizers, strict=True))
