"""The classes of torch.optim and ours have one interface: construction, groups, hooks, closures, edits, copies."""

import copy
import importlib
import inspect

import pytest
import torch
from torch_like_cases import (
    MODULES,
    NAMES,
    RICHER,
    WITH_DIFFERENTIABLE,
    WITH_FUSED,
    assert_same,
    each,
    give_gradients,
    make_pair,
    make_params,
    parameters,
    train,
)

import functorch_optim as fo

# Construction. --------------------------------------------------------------------------------------------------------


@each
def test_signatures_and_types(name):
    ours, theirs = getattr(fo.optim, name), getattr(torch.optim, name)
    whole = name in ("Adafactor", "Muon", "SparseAdam")  # there is no kernel for these
    added = [] if name in WITH_DIFFERENTIABLE else ["differentiable"]
    added += [] if name in WITH_FUSED or whole else ["fused"]
    mine, torchs = [list(inspect.signature(kind).parameters.values()) for kind in (ours, theirs)]
    assert mine[: len(torchs)] == torchs
    assert [p.name for p in mine[len(torchs) :]] == added
    assert issubclass(ours, theirs)
    assert ours.__name__ == name
    mine, torchs = [inspect.signature(kind.step).parameters.values() for kind in (ours, theirs)]
    assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in torchs]


def test_no_class_is_missing():
    def classes(module):
        return {name for name in module.__all__ if isinstance(getattr(module, name), type)}

    assert classes(fo.optim) == classes(torch.optim)
    assert set(NAMES) == classes(fo.optim) - {"LBFGS", "Optimizer"}  # L-BFGS has tests of its own


@each
def test_arguments_by_position(name):
    signature = inspect.signature(getattr(torch.optim, name))
    given = [p.default for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    given[0] = 0.125  # lr
    ours, theirs = [getattr(module, name)(make_params(name), *given) for module in MODULES]
    assert ours.defaults == theirs.defaults
    assert ours.defaults["lr"] == 0.125


def as_iterator(params):
    return iter(params)


def as_named(params):
    return [(f"layer.{i}", p) for i, p in enumerate(params)]


def as_groups(params):
    return [{"params": params[:1], "lr": 0.25, "of mine": "text"}, {"params": params[1]}]


def as_groups_of_iterators(params):
    return iter([{"params": iter([p])} for p in params])


def as_named_groups(params):
    return [{"params": [pair], "lr": 0.25} for pair in as_named(params)]


@each
@pytest.mark.parametrize(
    "arrange", [list, tuple, as_iterator, as_named, as_groups, as_groups_of_iterators, as_named_groups]
)
def test_groups_after_construction(name, arrange):
    """The groups, all that is in them in its order, their text, the defaults, and the numbers."""
    params = make_params(name)
    twins = copy.deepcopy(params)
    ours = getattr(fo.optim, name)(arrange(params), **RICHER.get(name, {}))
    theirs = getattr(torch.optim, name)(arrange(twins), **RICHER.get(name, {}))
    assert ours.defaults == theirs.defaults
    assert list(ours.defaults) == list(theirs.defaults)
    assert repr(ours) == repr(theirs)
    assert [list(group) for group in ours.param_groups] == [list(group) for group in theirs.param_groups]
    for mine, torchs in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert {**mine, "params": None} == {**torchs, "params": None}
        assert [type(value) for value in mine.values()] == [type(value) for value in torchs.values()]
    assert [id(p) for p in parameters(ours)] == [id(p) for p in params]
    assert type(ours.state) is type(theirs.state)
    assert_same(ours, theirs)
    train((ours, theirs))
    assert_same(ours, theirs)
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == torchs["param_groups"]
    assert mine["state"].keys() == torchs["state"].keys()


def test_modules_are_torchs():
    assert fo.optim.Optimizer is torch.optim.Optimizer
    assert fo.optim.lr_scheduler is torch.optim.lr_scheduler
    assert fo.optim.swa_utils is torch.optim.swa_utils
    assert fo.optim.Adam.OptimizerPreHook is torch.optim.Optimizer.OptimizerPreHook
    assert fo.optim.Adam.OptimizerPostHook is torch.optim.Optimizer.OptimizerPostHook
    assert importlib.import_module("functorch_optim.optim.lr_scheduler") is torch.optim.lr_scheduler
    assert importlib.import_module("functorch_optim.optim.swa_utils") is torch.optim.swa_utils


PROGRAM = """
import torch
import {} as optim
from {}.lr_scheduler import CosineAnnealingLR

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.GELU(), torch.nn.Linear(8, 1)).double()
x = torch.randn(20, 3, dtype=torch.float64)
y = x.prod(1, keepdim=True)
decayed = [p for p in model.parameters() if p.ndim > 1]
others = [p for p in model.parameters() if p.ndim <= 1]
optimizer: optim.Optimizer = optim.AdamW([dict(params=decayed), dict(params=others, weight_decay=0)], 0.01, (0.8, 0.99))
scheduler = CosineAnnealingLR(optimizer, T_max=30)
losses = []
for epoch in range(30):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
"""


def test_a_program_runs_unchanged():
    results = []
    for module in ("functorch_optim.optim", "torch.optim"):
        names = {}
        exec(PROGRAM.format(module, module), names)
        results.append(names)
    assert type(results[0]["optimizer"]) is fo.optim.AdamW
    assert results[0]["losses"] == pytest.approx(results[1]["losses"], rel=1e-12)
    assert results[0]["losses"][-1] < 0.9 * results[0]["losses"][0]


# Steps. ---------------------------------------------------------------------------------------------------------------


@each
def test_closures(name):
    """Called once, with grad enabled, in torch.no_grad() too; what it returns is returned."""
    pair = make_pair(name)
    counts = []
    for optimizer in pair:

        def closure():
            counts.append(torch.is_grad_enabled())
            torch.manual_seed(1)
            give_gradients(optimizer)
            return ["a loss", len(counts)]

        assert optimizer.step(closure) == ["a loss", len(counts)]
        with torch.no_grad():
            assert optimizer.step(closure=closure) == ["a loss", len(counts)]
            assert not torch.is_grad_enabled()
        assert optimizer.step() is None
    assert counts == [True] * 4
    assert_same(*pair)


@each
def test_steps_without_any_gradient(name):
    ours, theirs = make_pair(name)
    before = [p.detach().clone() for p in parameters(ours)]
    for _ in range(3):
        assert ours.step() is None
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(parameters(ours), before, strict=True))
    assert len(ours.state) == len(theirs.state)
    assert_same(ours, theirs)
    train((ours, theirs))
    ours.zero_grad()
    theirs.zero_grad()
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


@each
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(name, set_to_none):
    pair = make_pair(name)
    for _ in range(3):
        train(pair, 1)
        for optimizer in pair:
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all(p.grad is None if set_to_none else not p.grad.to_dense().any() for p in parameters(optimizer))
            optimizer.step()  # with gradients of zero moments go on
    assert_same(*pair)


@pytest.fixture
def late_states(name):
    """Skip Adagrad where torch.optim makes its states in the constructor only, as in torch 2.10."""
    if name == "Adagrad":
        theirs = make_pair(name)[1]
        theirs.state.clear()
        try:
            train([theirs], 1)
        except KeyError:
            pytest.skip("torch.optim.Adagrad of this torch makes no state for a parameter that comes later")


@each
@pytest.mark.usefixtures("late_states")
def test_groups_added_in_mid_training(name):
    pair = make_pair(name)
    train(pair)
    added = make_params(name)[1]
    for optimizer in pair:
        optimizer.add_param_group({"params": added.detach().clone().requires_grad_(), "lr": 0.03})
    assert repr(pair[0]) == repr(pair[1])
    train(pair)
    assert_same(*pair)


@each
def test_parameters_that_are_frozen_and_thawed(name):
    pair = make_pair(name)
    for frozen in (False, True, False):
        for optimizer in pair:
            parameters(optimizer)[0].requires_grad_(not frozen)
        train(pair, 3)
        assert_same(*pair)


@each
def test_data_that_is_replaced(name):
    pair = make_pair(name)
    train(pair)
    for optimizer in pair:
        for p in parameters(optimizer):
            p.data = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape)
    train(pair)
    assert_same(*pair)


@each
@pytest.mark.usefixtures("late_states")
def test_parameters_that_are_replaced(name):
    """A new tensor in the group has no state yet, and the old state stays where it is."""
    pair = make_pair(name)
    if name == "Adagrad":
        for optimizer in pair:
            optimizer.state.clear()  # there from the beginning, but torch.optim.Adagrad makes what is missing
    train(pair)
    new = make_params(name)[0]
    for optimizer in pair:
        optimizer.param_groups[0]["params"][0] = new.detach().clone().requires_grad_()
    train(pair)
    assert_same(*pair)
    assert len(pair[0].state) == len(pair[1].state)
