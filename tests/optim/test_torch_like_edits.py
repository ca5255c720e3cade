"""Our classes after edits of hyperparameters and states, and after copies, as torch.optim's."""

import copy
from functools import partial

import pytest
import torch
from torch_like_cases import NAMES, assert_same, deviation, each, make_pair, parameters, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file, through_pickle

# Edits. ---------------------------------------------------------------------------------------------------------------

EDITS = [
    *[(name, {"lr": 0.003}) for name in NAMES],
    *[(name, {"lr": 0.0}) for name in NAMES],
    *[(name, {"weight_decay": 0.2}) for name in NAMES if name not in ("Rprop", "SparseAdam")],
    *[(name, {"weight_decay": 0}) for name in NAMES if name not in ("Rprop", "SparseAdam")],
    *[(name, {"maximize": True}) for name in NAMES if name != "Muon"],
    *[(name, {"betas": (0.5, 0.6)}) for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam")],
    *[(name, {"betas": (0.0, 0.0)}) for name in ("Adam", "AdamW", "NAdam", "Adamax", "SparseAdam")],
    *[(name, {"eps": 0.1}) for name in NAMES if name not in ("SGD", "Rprop", "ASGD", "Adafactor")],
    *[(name, {"decoupled_weight_decay": True, "weight_decay": 0.1}) for name in ("Adam", "NAdam", "RAdam")],
    ("SGD", {"momentum": 0.3}),
    ("SGD", {"momentum": 0.0}),
    ("SGD", {"momentum": 0}),
    ("SGD", {"dampening": 0.3}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"momentum": 0, "nesterov": True}),
    ("Adam", {"amsgrad": False}),
    ("AdamW", {"decoupled_weight_decay": False}),
    ("NAdam", {"momentum_decay": 0.1}),
    ("Adagrad", {"lr_decay": 0.5}),
    ("Adagrad", {"initial_accumulator_value": 5.0}),
    ("Adadelta", {"rho": 0.3}),
    ("RMSprop", {"alpha": 0.5}),
    ("RMSprop", {"momentum": 0.5}),
    ("RMSprop", {"momentum": 0}),
    ("RMSprop", {"centered": False}),
    ("Rprop", {"etas": (0.3, 1.5), "step_sizes": (0.01, 0.02)}),
    ("ASGD", {"lambd": 0.1, "alpha": 0.5, "t0": 3}),
    ("Adafactor", {"eps": (1e-3, 1e-2), "d": 1.5, "beta2_decay": -0.5}),
    ("Muon", {"momentum": 0.5, "nesterov": False, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5)}),
    ("Muon", {"adjust_lr_fn": "match_rms_adamw"}),
]
EDITS = [(name, edit) for name, edit in EDITS if name in NAMES]


@pytest.mark.sampled(size=64)
@pytest.mark.parametrize(("name", "edit"), EDITS, ids=[f"{name}-{edit}" for name, edit in EDITS])
def test_hyperparameters_that_are_edited(name, edit):
    pair = make_pair(name)
    train(pair, 3)
    before = dict(pair[0].param_groups[0])
    assert edit.keys() <= before.keys()
    for optimizer in pair:
        optimizer.param_groups[0].update(edit)
    train(pair, 3)
    assert_same(*pair)
    for optimizer in pair:
        optimizer.param_groups[0].update({key: before[key] for key in edit})
    train(pair, 3)
    assert_same(*pair)


@each
def test_an_edit_changes_the_numbers(name):
    """A control of the test above."""
    pair = make_pair(name)
    train(pair, 3)
    pair[0].param_groups[0]["lr"] *= 1.001
    if name == "Rprop":  # its lr is for the first step alone
        pair[0].param_groups[0]["step_sizes"] = (0.1, 0.2)
    train(pair, 3)
    assert deviation(*map(parameters, pair)) > 1e-9


def test_a_schedule_where_torch_keeps_no_step():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = fo.optim.SGD([p], lr=1.0)
    optimizer.param_groups[0]["lr"] = fo.schedules.linear(1.0, 0.0, 4)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
    assert p.item() == -(1.0 + 0.75 + 0.5)


def edited(optimizer):
    for p in parameters(optimizer):
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = value + 2 if key == "step" else value * 0.5


def edited_in_place(optimizer):
    for p in parameters(optimizer):
        for key, value in optimizer.state[p].items():
            if key != "step":
                value.mul_(0.5)


def cleared(optimizer):
    optimizer.state.clear()


@each
@pytest.mark.parametrize("edit", [edited, edited_in_place, cleared])
def test_states_that_are_edited(name, edit):
    pair = make_pair(name)
    train(pair, 3)
    for optimizer in pair:
        edit(optimizer)
    train(pair, 3)
    assert_same(*pair)


@each
def test_states_that_are_given_before_the_first_step(name):
    """As torch's own tests of differentiable optimizers do, with a step of their own too."""
    source = make_pair(name)[1]
    train([source], 4)
    pair = make_pair(name)
    for optimizer in pair:
        for p, q in zip(parameters(optimizer), parameters(source), strict=True):
            state = {key: copy.deepcopy(value) for key, value in source.state[q].items()}
            if "step" in state:
                state["step"] = 7 if name == "SparseAdam" else torch.tensor(7.0, dtype=torch.float64)
            optimizer.state[p].update(state)
    train(pair, 3)
    assert_same(*pair)


@each
def test_numbers_that_are_exchanged_for_those_of_python(name):
    """As older torch kept them; torch.optim is given tensors of the same values."""
    pair = ours, theirs = make_pair(name)
    train(pair, 3)
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        for key, number in {"step": 1, "mu_product": 0.5, "eta": 0.05, "mu": 0.5}.items():
            if isinstance(theirs.state[q].get(key), torch.Tensor):
                ours.state[p][key] = number
                theirs.state[q][key].fill_(number)
    train(pair, 3)
    assert_same(*pair)


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_numbers_that_are_exchanged_for_tensors_of_integers(name):
    pair = ours, theirs = make_pair(name)
    train(pair, 3)
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        for key in ours.state[p].keys() & {"mu_product", "eta", "mu"}:
            ours.state[p][key] = torch.tensor(1)
            theirs.state[q][key].fill_(1)
    train(pair, 3)
    assert_same(*pair)


@pytest.mark.parametrize("step", ["three", [1], torch.ones(2)])
def test_a_step_that_is_no_number_is_an_error_before_anything_is_written(step):
    ours = make_pair("Adam")[0]
    train([ours], 3)
    first, second = parameters(ours)
    ours.state[second]["step"] = step
    before = first.detach().clone(), ours.state[first]["step"].clone()
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        train([ours], 1)
    assert all(map(torch.equal, (first, ours.state[first]["step"]), before))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_state_whose_elements_share_memory(name):
    """It has no room for the next one; torch.optim cannot take it, and is given a copy."""
    pair = ours, theirs = make_pair(name)
    train(pair, 3)
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        for key in ours.state[p].keys() - {"step"}:
            shared = torch.rand((1,) * p.ndim, dtype=p.dtype).expand(p.shape)
            ours.state[p][key], theirs.state[q][key] = shared, shared.clone()
    train(pair, 3)
    assert_same(*pair)


# Copies. --------------------------------------------------------------------------------------------------------------


COPIES = [copy.deepcopy, through_pickle, partial(through_a_file, weights_only=False)]


@pytest.mark.sampled(size=24)
@each
@pytest.mark.parametrize("make_copy", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("begun", [False, True])
def test_copies(name, make_copy, begun):
    """Copies train on by themselves; model and optimizer stay tied when they are copied together."""
    pair = make_pair(name)
    if begun:
        train(pair)
    module = torch.nn.ParameterList(parameters(pair[0]))
    twin_module, twin = make_copy((module, pair[0]))
    assert type(twin) is type(pair[0])
    assert [id(p) for p in parameters(twin)] == [id(p) for p in twin_module]
    assert repr(twin) == repr(pair[0])
    assert twin.defaults == make_copy(pair[1]).defaults
    before = [p.detach().clone() for p in module]
    torch.manual_seed(1)
    train([twin])
    assert all(torch.equal(p, q) for p, q in zip(module, before, strict=True))
    torch.manual_seed(1)
    train(pair)
    assert_same(twin, pair[1])
    assert_same(*pair)
    lone = make_copy(pair[0])  # the optimizer alone
    assert not {id(p) for p in parameters(lone)} & {id(p) for p in module}
    train((lone, make_copy(pair[1])), 2)
    scheduler = torch.optim.lr_scheduler.StepLR(lone, 1)  # which wants a bound method and patches it
    lone.step()
    scheduler.step()
    assert lone.param_groups[0]["lr"] == pytest.approx(0.1 * pair[0].param_groups[0]["lr"])
