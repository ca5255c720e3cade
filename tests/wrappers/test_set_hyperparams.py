"""Hyperparameters that an fo.Optimizer keeps: one for all parameters, whenever they begin."""

import pytest
import torch

import functorch_optim as fo


def single():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    return p


@pytest.mark.parametrize("begun", [True, False])
def test_parameters_that_join_have_those_that_were_set(begun):
    p, q = single(), single()
    opt = fo.Optimizer([p], fo.inject_hyperparams(fo.sgd)(lr=0.5))
    if begun:
        opt.step()
    opt.set_hyperparams(lr=0.25)
    opt.add_param_group({"params": [q]})
    opt.step()
    assert q.item() == 0.75
    assert opt.hyperparams == {"lr": 0.25}


@pytest.mark.parametrize("lost", [0, 1])
def test_parameters_whose_state_is_lost_have_those_that_were_set(lost):
    params = [single(), single()]
    opt = fo.Optimizer(params, fo.inject_hyperparams(fo.adam)(lr=0.5))
    opt.step()
    opt.set_hyperparams(lr=0.25)
    del opt.state[params[lost]]
    for load in (lambda: None, lambda: opt.load_state_dict(opt.state_dict(), strict=False)):
        load()
        assert opt.hyperparams["lr"] == fo.learning_rate(opt) == 0.25
    before = params[lost].item()
    opt.step()
    assert before - params[lost].item() == pytest.approx(0.25)
    assert opt.state[params[lost]]["lr"] == 0.25


@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: fo.chain(fo.zclip(), tx), fo.apply_if_finite])
def test_parameters_that_return_to_the_groups_have_those_that_were_set(around):
    p, q = single(), single()
    tx = around(fo.inject_hyperparams(fo.adamw)(lr=0.5))
    opt = fo.Optimizer([{"params": [p]}, {"params": [q]}], tx)
    q.grad = None
    opt.step()
    opt.step()  # so that p has more updates than q
    q.grad = torch.ones(1)
    group = opt.param_groups.pop(0)
    opt.step()
    opt.set_hyperparams(lr=0.25)
    opt.param_groups.insert(0, group)
    opt.step()
    assert [opt.state[one]["lr"] for one in (p, q)] == [0.25, 0.25]
    assert opt.hyperparams["lr"] == 0.25


def test_parameters_in_no_group_keep_those_of_another_part_of_the_transformation():
    p, q = single(), single()
    parts = {"a": fo.inject_hyperparams(fo.adamw)(lr=0.5), "b": fo.inject_hyperparams(fo.adamw)(lr=0.125)}
    labels = {"p": "a", "q": "b"}
    tx = fo.partition(parts, lambda params: {name: labels[name] for name in params})
    opt = fo.Optimizer([{"params": [("p", p)]}, {"params": [("q", q)]}], tx)
    opt.step()
    group = opt.param_groups.pop(0)
    opt.set_hyperparams({"b.lr": 0.25})
    opt.param_groups.insert(0, group)
    assert opt.hyperparams["a.lr"] == 0.5
    assert opt.hyperparams["b.lr"] == 0.25


@pytest.mark.parametrize("begun", [0, 1])
@pytest.mark.parametrize("strict", [True, False])
def test_they_are_saved_before_parameters_have_had_a_gradient(begun, strict):
    tx = fo.inject_hyperparams(fo.adamw)(lr=0.5, weight_decay=0.0)
    params = [single(), single()]
    opt = fo.Optimizer(params, tx)
    params[1].grad = None
    for _ in range(begun):
        opt.step()
    opt.set_hyperparams(lr=0.25)
    again = [single(), single()]
    other = fo.Optimizer(again, tx)
    other.load_state_dict(opt.state_dict(), strict=strict)
    assert other.hyperparams == opt.hyperparams
    other.step()
    assert [1 - p.item() for p in again] == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": torch.tensor(-1.0)}, "Invalid learning rate: -1.0"),
        ({"lr": 0.25, "betas_1": 1.0}, "Invalid beta parameter at index 1: 1.0"),
    ],
)
def test_what_the_factory_refuses_is_not_set(values, message):
    p = single()
    opt = fo.Optimizer([p], fo.chain(fo.clip(1.0), fo.inject_hyperparams(fo.adam)(lr=0.5)))
    opt.step()
    before = opt.hyperparams
    with pytest.raises(ValueError, match=message):
        opt.set_hyperparams(values)
    assert opt.hyperparams == before


def test_values_are_refused_together_with_those_that_stay():
    def factory(low, high):
        if isinstance(low, float) and low > high:
            raise ValueError("low is above high")
        return fo.sgd(low)

    opt = fo.Optimizer([single()], fo.inject_hyperparams(factory)(low=0.1, high=0.2))
    opt.set_hyperparams(low=0.4, high=0.5)
    with pytest.raises(ValueError, match="low is above high"):
        opt.set_hyperparams(high=0.3)
    assert opt.hyperparams == {"low": 0.4, "high": 0.5}


def test_zero_and_schedules_beside_it_are_taken():
    factory = fo.inject_hyperparams(fo.sgd)
    opt = fo.Optimizer([single()], factory(lr=fo.schedules.linear(0.1, 0.0, 5), momentum=0.9))
    opt.set_hyperparams(momentum=0.0)
    assert opt.hyperparams["momentum"] == 0.0
