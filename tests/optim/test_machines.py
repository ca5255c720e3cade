"""Anything that users do with optimizers, in any order: compared with torch.optim after each action."""

import copy
import functools
import inspect
import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.optim import lr_scheduler
from torch_like_cases import OPTIONS, WITH_FUSED, factory_of, outcome, parameters

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file, through_pickle

pytestmark = pytest.mark.usefixtures("double")

CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
TOLERANCE = {"Muon": 1e-9}  # whose matrix products are summed in another order

# Gradients. -----------------------------------------------------------------------------------------------------------


def plain(p, generator):
    return torch.randn(p.shape, generator=generator, dtype=p.dtype)


GRADIENTS = {
    "plain": plain,
    "huge": lambda p, generator: 1e6 * plain(p, generator),
    "tiny": lambda p, generator: 1e-6 * plain(p, generator),
    "zero": lambda p, generator: torch.zeros_like(p.detach()),
    "transposed": lambda p, generator: plain(p.mT, generator).mT if p.ndim > 1 else plain(p, generator),
    "with gaps": lambda p, generator: torch.stack([plain(p, generator)] * 2, -1)[..., 0],
    "expanded": lambda p, generator: plain(torch.ones((), dtype=p.dtype), generator).expand(p.shape),
    "none": lambda p, generator: None,
    "as it was": lambda p, generator: p.grad,
}

# Hyperparameters. -----------------------------------------------------------------------------------------------------

VALUES = {
    "lr": [0.0, 0.003, 0.1, 1],
    "weight_decay": [0, 0.0, 0.2],
    "maximize": [True, False],
    "betas": [(0.5, 0.6), (0.9, 0.999)],
    "eps": [0.1, 1e-3],
    "momentum": [0, 0.3, 0.9],
    "dampening": [0.3],
    "amsgrad": [True, False],
    "decoupled_weight_decay": [True, False],
    "alpha": [0.5, 0.9],
    "rho": [0.3, 0.9],
    "lr_decay": [0.0, 0.3],
    "momentum_decay": [0.1, 4e-3],
    "t0": [1, 5],
    "etas": [(0.3, 1.5)],
    "ns_steps": [3],
}


def values_of(optimizer):
    """List what hyperparameters may be set to in mid-training."""
    given, sgd = optimizer.defaults, isinstance(optimizer, torch.optim.SGD)
    left_out = {
        "eps": isinstance(given.get("eps"), tuple),  # Adafactor's
        "momentum": given.get("nesterov") if sgd else not given.get("momentum"),  # which torch then has no buffer for
        "dampening": given.get("nesterov"),
        "amsgrad": not given.get("amsgrad"),
    }
    keys = [key for key in VALUES if key in given and not left_out.get(key)]
    return [(key, value) for key in keys for value in VALUES[key]]


def one_cycle(optimizer):
    cycles = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=500, cycle_momentum=cycles)


SCHEDULERS = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.7),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.2),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
    "one cycle": one_cycle,
}


def halve(optimizer, args, kwargs):
    for p in parameters(optimizer):
        p.grad = None if p.grad is None else p.grad / 2


def shrink(optimizer, args, kwargs):
    with torch.no_grad():
        for p in parameters(optimizer):
            p.mul_(0.9)


seeds = st.integers(0, 2**16)


class Training(RuleBasedStateMachine):
    """One of our classes, or the wrapper around the function that it has its numbers from, and torch's class."""

    wrapped = False

    def __init__(self):
        super().__init__()
        self.pair, self.schedulers, self.largest, self.hooked = (), (), 1.0, False

    @initialize(case=st.sampled_from(CASES), seed=seeds)
    def begin(self, case, seed):
        self.name, options = case
        self.tolerance = TOLERANCE.get(self.name, 1e-12)
        shapes = [(3, 4), (4, 2)] if self.name == "Muon" else [(3, 4), (4,), ()]
        theirs = getattr(torch.optim, self.name)([self.parameter(shape, seed) for shape in shapes], **options)
        ours = [self.parameter(shape, seed) for shape in shapes]
        if self.wrapped:
            known = inspect.signature(factory_of(self.name)).parameters
            given = {key: value for key, value in theirs.defaults.items() if key in known}
            self.pair = fo.Optimizer(ours, factory_of(self.name), **given), theirs
            if theirs.state:  # torch's Adagrad makes its states in the constructor, and we at the first step
                self.step(["zero"], seed, closure=False)
        else:
            self.pair = getattr(fo.optim, self.name)(ours, **options), theirs

    @staticmethod
    def parameter(shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    # Steps.

    @rule(kinds=st.lists(st.sampled_from(sorted(GRADIENTS)), min_size=1, max_size=4), seed=seeds, closure=st.booleans())
    def step(self, kinds, seed, closure):
        def give(optimizer):
            generator = torch.Generator().manual_seed(seed)
            for i, p in enumerate(parameters(optimizer)):
                p.grad = GRADIENTS[kinds[i % len(kinds)]](p, generator)
            return loss

        loss = torch.tensor(float(seed))
        for optimizer in self.pair:
            if closure:
                assert optimizer.step(functools.partial(give, optimizer)) is loss
                continue
            give(optimizer)
            grads = [(p.grad, p.grad._version) for p in parameters(optimizer) if p.grad is not None]
            assert optimizer.step() is None
            assert all(grad._version == version for grad, version in grads)
        sizes = [t.abs().max().item() for p in parameters(self.pair[1]) for t in (p.detach(), p.grad) if t is not None]
        self.largest = max([self.largest, *sizes])

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        # In expanded gradients zeros cannot be written.
        ours, theirs = [outcome(optimizer.zero_grad, set_to_none) for optimizer in self.pair]
        assert ours == theirs

    @precondition(lambda self: not self.hooked)
    @rule(when=st.sampled_from(["pre", "post"]))
    def hook(self, when):
        self.hooked = True
        for optimizer in self.pair:
            register = optimizer.register_step_pre_hook if when == "pre" else optimizer.register_step_post_hook
            register(halve if when == "pre" else shrink)

    # Groups and what is in them.

    @precondition(lambda self: len(parameters(self.pair[0])) < 6)
    @rule(matrix=st.booleans(), lr=st.sampled_from([0.01, 0.2]), seed=seeds)
    def add_param_group(self, matrix, lr, seed):
        shape = (2, 3) if matrix or self.name == "Muon" else (3,)
        for optimizer in self.pair:
            optimizer.add_param_group({"params": self.parameter(shape, seed), "lr": lr})
        self.schedulers = ()  # they were made for the groups before

    @rule(data=st.data())
    def edit(self, data):
        ours, theirs = self.pair
        both = [(key, value) for key, value in values_of(theirs) if key in ours.defaults]
        key, value = data.draw(st.sampled_from(both))
        index = data.draw(st.integers(0, len(self.pair[0].param_groups) - 1))
        for optimizer in self.pair:
            optimizer.param_groups[index][key] = value

    @rule(lr=st.sampled_from([0.0, 0.02, 0.3]))
    def tensor_lr(self, lr):
        for optimizer in self.pair:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(lr)

    @rule(way=st.sampled_from(["foreach", "fused"]), value=st.sampled_from([None, False, True]))
    def how_to_run(self, way, value):
        """Of ours alone: they change no number. Elsewhere than in these classes, fused=True calls a compiler."""
        compiles = way == "fused" and value and (self.wrapped or self.name not in WITH_FUSED)
        for group in self.pair[0].param_groups:
            group.update({"foreach": None, "fused": None, way: None if compiles else value})

    @rule(kind=st.sampled_from(sorted(SCHEDULERS)))
    def schedule(self, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one patches the other's step
            self.schedulers = [SCHEDULERS[kind](optimizer) for optimizer in self.pair]

    @precondition(lambda self: self.schedulers)
    @rule(loss=st.sampled_from([1.0, 2.0]))
    def schedule_on(self, loss):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no step has been made
            for scheduler in self.schedulers:
                scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))

    # Parameters and states.

    @rule(how=st.sampled_from(["replaced", "copied", "transposed", "frozen", "thawed"]))
    def parameters_edited(self, how):
        for optimizer in self.pair:
            for p in parameters(optimizer):
                if how == "replaced":
                    p.data = 0.5 * p.data
                elif how == "copied":
                    p.data.copy_(0.5 * p.data)
                elif how == "transposed":
                    p.data = p.data.mT.contiguous().mT if p.ndim > 1 else p.data
                else:
                    p.requires_grad_(how == "thawed")

    @rule(seed=seeds)
    def converted(self, seed):
        """A step in single precision, as after module.float(), which torch's states do not survive: they are told."""
        ours, theirs = self.pair
        for optimizer, dtype in ((ours, None), (theirs, torch.float32)):
            for p in parameters(optimizer):
                p.grad, p.data = None, p.data.float()
                for key, value in optimizer.state.get(p, {}).items():
                    if dtype is not None and key != "step" and isinstance(value, torch.Tensor):
                        optimizer.state[p][key] = value.to(dtype)
        for optimizer in self.pair:
            generator = torch.Generator().manual_seed(seed)
            for p in parameters(optimizer):
                p.grad = plain(p, generator)
            optimizer.step()
        self.check(tolerance=1e-4)
        for p, q in zip(*map(parameters, self.pair), strict=True):
            p.grad, p.data = None, p.data.double()
            q.grad, q.data = None, p.data.clone()
            for key in theirs.state[q]:
                value = ours.state[p][key].to(torch.float64)
                ours.state[p][key], theirs.state[q][key] = value, value.clone()

    @precondition(lambda self: self.name != "Adagrad")  # see above
    @rule(how=st.sampled_from(["popped", "cleared"]), i=st.integers(0, 5))
    def states_forgotten(self, how, i):
        for optimizer in self.pair:
            if how == "cleared":
                optimizer.state.clear()
            else:
                optimizer.state.pop(parameters(optimizer)[i % len(parameters(optimizer))], None)

    @rule(how=st.sampled_from(["step", "step replaced", "halved"]), i=st.integers(0, 5))
    def states_edited(self, how, i):
        for optimizer in self.pair:
            p = parameters(optimizer)[i % len(parameters(optimizer))]
            state = optimizer.state.get(p, {})
            if how == "halved":
                for key, value in state.items():
                    if key != "step" and value is not None:
                        value.mul_(0.5)
            elif "step" in state and self.pair[1].state[parameters(self.pair[1])[i % len(parameters(optimizer))]]:
                state["step"] = state["step"] + 3 if how == "step replaced" else state["step"].fill_(2)

    # Copies.

    @rule(make_copy=st.sampled_from([copy.deepcopy, through_pickle]))
    def copied(self, make_copy):
        self.pair = tuple(map(make_copy, self.pair))
        self.schedulers, self.hooked = (), False

    @rule(crossed=st.booleans(), anew=st.booleans())
    def loaded(self, crossed, anew):
        """Through files: each its own, or each the other's."""
        saved = [through_a_file(optimizer.state_dict()) for optimizer in self.pair]
        if crossed and self.wrapped:
            saved[0]["state"] = copy.deepcopy(saved[1]["state"])
        elif crossed:
            saved.reverse()
        for optimizer, one in zip(self.pair, saved, strict=True):
            if anew:
                optimizer.state.clear()
            optimizer.load_state_dict(one)
            for group in optimizer.param_groups:
                group.update({key: None for key in ("foreach", "fused") if key in group})

    # What holds at all times.

    @invariant()
    def they_are_the_same(self):
        self.check(self.tolerance)

    def check(self, tolerance):
        ours, theirs = self.pair
        near = functools.partial(
            torch.testing.assert_close, rtol=tolerance, atol=tolerance * self.largest, check_dtype=False, equal_nan=True
        )
        for p, q in zip(*map(parameters, self.pair), strict=True):
            near(p.detach(), q.detach())
            mine, torchs = dict(ours.state.get(p, {})), dict(theirs.state.get(q, {}))
            if self.wrapped:
                mine = {key: value for key, value in mine.items() if key in torchs or key != "step"}
            assert mine.keys() == torchs.keys()
            for key, value in torchs.items():
                near(mine[key], value, atol=tolerance * self.largest**2)  # of squares too
        for mine, torchs in zip(ours.param_groups, theirs.param_groups, strict=True):
            for key in mine.keys() & torchs.keys() - {"params", "foreach", "fused"}:
                assert mine[key] == torchs[key]


class Wrapped(Training):
    """The wrapper."""

    wrapped = True


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("machine", [Training, Wrapped])
def test_training(machine):
    several = settings(max_examples=4 * settings().max_examples, stateful_step_count=30)
    run_state_machine_as_test(machine, settings=several)
