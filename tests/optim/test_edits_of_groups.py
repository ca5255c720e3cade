"""Param groups that a program exchanges, removes or adds between steps, as with torch.optim."""

import copy

import pytest
import torch
from torch_like_cases import NAMES, draw_gradient

import functorch_optim as fo

FORMS = {
    "class": lambda groups: fo.optim.Adam(groups, lr=0.1),
    "factory": lambda groups: fo.Optimizer(groups, fo.adam, lr=0.1),
    "chain": lambda groups: fo.Optimizer(groups, fo.chain(fo.identity(), fo.adam(0.1))),
}


def exchanged(optimizer, given):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.01}


def exchanged_for_an_equal_one(optimizer, given):
    """Edits that follow are of the new group."""
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01


def exchanged_all(optimizer, given):
    optimizer.param_groups = [{**group, "lr": 0.01} for group in optimizer.param_groups]


def exchanged_parameters(optimizer, given):
    optimizer.param_groups[0]["params"] = [given]


def removed_first(optimizer, given):
    del optimizer.param_groups[0]


def removed_all(optimizer, given):
    optimizer.param_groups.clear()


def swapped(optimizer, given):
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.param_groups.reverse()


def removed_and_added(optimizer, given):
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [given]})


def begun_anew(optimizer, given):
    optimizer.param_groups.clear()
    optimizer.state.clear()
    optimizer.add_param_group({"params": [given]})


EDITS = [
    *(exchanged, exchanged_for_an_equal_one, exchanged_all, exchanged_parameters, removed_first, removed_all, swapped),
    *(removed_and_added, begun_anew),
]


def assert_trains_alike(ours, theirs, edit):
    """Train two optimizers, made by functions of groups, before and after an edit; also what leaves the groups."""
    params = [torch.randn(4, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    trained = []
    for make in (ours, theirs):
        torch.manual_seed(0)
        own = copy.deepcopy(params)
        optimizer = make([{"params": [p]} for p in own[:2]])
        for step in range(6):
            for p in own:
                p.grad = draw_gradient(optimizer, p)
            if step == 3:
                edit(optimizer, own[2])
            optimizer.step()
        trained.append(own)
    torch.testing.assert_close(*trained, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("form", FORMS)
def test_groups_that_are_edited(form, edit):
    assert_trains_alike(FORMS[form], lambda groups: torch.optim.Adam(groups, lr=0.1), edit)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_is_exchanged(name):
    """Of every class, whether its rate is read at every step or when the step is prepared."""
    assert_trains_alike(getattr(fo.optim, name), getattr(torch.optim, name), exchanged)


@pytest.mark.parametrize("form", FORMS)
def test_groups_of_another_optimizer(form):
    """As wrappers of optimizers share those of the one inside."""
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    one, other = FORMS[form]([p]), FORMS[form]([q])
    other.param_groups = one.param_groups
    p.grad, q.grad = torch.ones(1), torch.ones(1)
    other.step()
    assert (round(p.item(), 5), q.item()) == (0.9, 1.0)


@pytest.mark.parametrize("part", ["param_groups", "state", None])
@pytest.mark.parametrize("form", FORMS)
def test_what_setstate_is_not_given_stays(form, part):
    def restored(optimizer, given):
        new = {"param_groups": [{**group, "lr": 0.01} for group in optimizer.param_groups], "state": optimizer.state}
        optimizer.__setstate__({} if part is None else {part: new[part]})

    assert_trains_alike(FORMS[form], lambda groups: torch.optim.Adam(groups, lr=0.1), restored)


def test_what_setstate_of_lbfgs_is_not_given_stays():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = fo.optim.LBFGS([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.step(lambda: torch.tensor(1.0))
    before = optimizer.state[p]["func_evals"]
    optimizer.__setstate__({"param_groups": [{**optimizer.param_groups[0], "lr": 0.5}]})
    assert (optimizer.param_groups[0]["lr"], optimizer.state[p]["func_evals"]) == (0.5, before)
