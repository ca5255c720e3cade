"""Trainings with labels: masks, trees of numbers, param groups, and parameters that are frozen."""

import pytest
import torch
from classifier import LAYERS, Classifier, beit_layer
from torch import nn

import functorch_optim as fo

TOKENS, TARGETS = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[0, 1, 2], [3, 4, 5]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier().double()


def loss_of(model):
    return nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TARGETS.flatten())


def train(model, opt, steps=3):
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model).backward()
        opt.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(make_optimizer):
    torch.manual_seed(0)
    model = Classifier().double()
    return train(model, make_optimizer(model))


def numbers(model):
    rates = fo.layer_decay(model, LAYERS, 0.5, lr=0.01)
    decays = fo.tree.map(lambda on: 0.5 * on, fo.weight_decay_mask(model, "timm"))
    return rates, decays


def in_groups(kind):
    def make(model):
        rates, decays = numbers(model)
        groups = fo.param_groups(model, lr=rates, weight_decay=decays)
        assert len(groups) == 6  # of four layers, two of which have both kinds
        return kind(groups)

    return make


def in_trees(model):
    rates, decays = numbers(model)
    return fo.Optimizer(model.named_parameters(), fo.adamw(rates, weight_decay=decays))


def in_mask(model):
    rates, _ = numbers(model)
    tx = fo.adamw(rates, weight_decay=0.5, mask=fo.weight_decay_mask(model, "timm"))
    return fo.Optimizer(model.named_parameters(), tx)


def in_partition(model):
    labels = fo.label(model, {range(2): "plain"}, "decay")
    rates, _ = numbers(model)
    parts = {"plain": fo.adamw(rates, weight_decay=0.0), "decay": fo.adamw(rates, weight_decay=0.5)}
    return fo.Optimizer(model.named_parameters(), fo.partition(parts, labels))


def by_hand(model):
    return torch.optim.AdamW(
        [
            {
                "params": [p],
                "lr": 0.01 * 0.5 ** (3 - beit_layer(name)),
                "weight_decay": 0.0 if p.ndim <= 1 or name.endswith(".bias") else 0.5,
            }
            for name, p in model.named_parameters()
        ]
    )


@pytest.mark.parametrize(
    "make",
    [
        in_groups(torch.optim.AdamW),
        in_groups(lambda groups: fo.Optimizer(groups, fo.adamw)),
        in_trees,
        in_mask,
        in_partition,
    ],
    ids=["torch", "groups", "trees", "mask", "partition"],
)
def test_masks_trees_labels_and_groups_train_alike(make):
    expected = trained(by_hand)
    torch.testing.assert_close(trained(make), expected, rtol=1e-9, atol=1e-12)
    everywhere = trained(lambda model: torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.5))
    assert not torch.allclose(everywhere["norm.bias"], expected["norm.bias"], rtol=1e-6)


def test_groups_have_what_is_trained_once_and_its_values(model):
    model.norm.requires_grad_(False)
    groups = fo.param_groups(model, lr=fo.label(model, {"head.*": 1e-2}, default=None), name="all")
    assert [group.get("lr") for group in groups] == [None, 1e-2]
    assert groups[0]["name"] == "all"
    assert "lr" not in groups[0]
    named = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in named) == sorted(fo.params_of(model))
    assert all(dict(model.named_parameters())[name] is p for name, p in named)
    w = torch.ones(2)
    assert fo.param_groups({"a": w, "b": w})[0]["params"] == [("a", w)]
    schedules = fo.label(model, {"head.*": fo.schedules.constant(1.0)}, default=fo.schedules.constant(1.0))
    assert len(fo.param_groups(model, lr=schedules)) == 2


def test_groups_that_cannot_be_are_errors(model):
    with pytest.raises(ValueError, match="The values of 'lr' do not fit the parameters: at the root they have"):
        fo.param_groups(model, lr={"wte.weight": 1.0})
    with pytest.raises(ValueError, match=r"There is nothing to train: .*Call module\.requires_grad_\(\)"):
        fo.param_groups(model.requires_grad_(False))


def test_freeze_and_unfreeze_in_mid_training(model):
    free = Classifier().double()
    free.load_state_dict(model.state_dict())
    opt = fo.Optimizer(model.named_parameters(), fo.frozen(fo.adam(0.01), model, ("wte.*", "blocks.*")))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = train(model, opt)
    still = {name for name in start if torch.equal(start[name], after[name])}
    assert still == {name for name in start if name.startswith(("wte", "blocks"))}
    assert not any("exp_avg" in opt.state[dict(model.named_parameters())[name]] for name in still)

    momentum = opt.state[model.norm.weight]["exp_avg"].clone()
    loaded = opt.migrate(fo.frozen(fo.adam(0.01), model, ()))
    assert torch.equal(opt.state[model.norm.weight]["exp_avg"], momentum)
    assert "norm.weight.exp_avg" in loaded.taken
    assert "wte.weight.exp_avg" in loaded.begun
    moved = train(model, opt, 1)
    # The first step of Adam for those that join: of the learning rate, for it is corrected for bias.
    step = (moved["wte.weight"] - after["wte.weight"])[dict(model.named_parameters())["wte.weight"].grad.abs() > 1e-4]
    torch.testing.assert_close(step.abs(), torch.full_like(step, 0.01), rtol=1e-2, atol=0)

    opt.migrate(fo.frozen(fo.adam(0.01), model, model.norm))
    end = train(model, opt)
    assert {name for name in end if torch.equal(end[name], moved[name])} == {"norm.weight", "norm.bias"}


def test_freezing_in_the_functional_form_keeps_states_of_those_that_go_on():
    params = {"body": torch.ones(2), "head": torch.ones(2)}
    tx = fo.frozen(fo.adam(0.1), params, "body")
    params, state = fo.step(tx, params, tx.init(params), params)
    assert torch.equal(params["body"], torch.ones(2))
    tx = fo.frozen(fo.adam(0.1), params, ())
    state, loaded = fo.migrate(tx, state, params)
    assert loaded.begun == ("train.1.exp_avg.body", "train.1.exp_avg_sq.body")
    params, state = fo.step(tx, params, state, params)
    assert not torch.equal(params["body"], torch.ones(2))


def test_frozen_needs_a_transformation_and_patterns_that_match(model):
    with pytest.raises(TypeError, match=r"adam is not a GradientTransformation; call it: frozen\(adamw"):
        fo.frozen(fo.adam, model, "wte.*")
    with pytest.raises(ValueError, match="'body.*' matches no parameter"):
        fo.frozen(fo.adam(), model, "body.*")
