"""Muon and AdamW in one call: who gets which, and with whose learning rate."""

import pickle

import pytest
import torch
from torch import nn

import functorch_optim as fo


class LanguageModel(nn.Module):
    """With an embedding under a plain name, a head that is tied to it, and a convolution."""

    def __init__(self, tied=True):
        super().__init__()
        self.lookup = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 7, bias=False)
        if tied:
            self.last.weight = self.lookup.weight

    def forward(self, x):
        x = self.conv(self.lookup(x).mT).mT
        return self.last(self.norm(self.hidden(x).relu()))


def with_grads(model):
    model(torch.arange(6).reshape(2, 3)).square().sum().backward()
    return model


def routed(opt):
    return {name: group["route"] for group in opt.param_groups for name in group["param_names"]}


NAMES = {
    "embed_tokens.weight": "adamw",
    "transformer.wte.weight": "adamw",
    "tok_embeddings.weight": "adamw",
    "pos_embed": "adamw",
    "cls_token": "adamw",
    "lm_head.weight": "adamw",
    "heads.head.weight": "adamw",
    "output.weight": "adamw",
    "fc.weight": "adamw",
    "classifier.6.weight": "adamw",
    "attn.relative_position_bias_table": "adamw",
    "encoder.layer.0.attention.output.dense.weight": "muon",
    "layers.0.multihead_attn.in_proj_weight": "muon",
    "blocks.3.mlp.fc.weight": "muon",
    "layer1.0.conv1.weight": "muon",
    "0.weight": "muon",
}


@pytest.mark.parametrize(("name", "label"), NAMES.items())
def test_names_and_dimensions_say_who_gets_muon(name, label):
    assert fo.muon_route(name, torch.zeros(3, 2)) == label
    assert fo.muon_route(name, torch.zeros(3)) == "adamw"


def test_a_module_says_more_than_names():
    model = LanguageModel()
    opt = fo.Optimizer(model.named_parameters(), fo.muon_with_adamw, route=model)
    matrices = {"conv.weight", "hidden.weight"}
    assert {name for name, label in routed(opt).items() if label == "muon"} == matrices
    untied = LanguageModel(tied=False)
    opt = fo.Optimizer(untied.named_parameters(), fo.muon_with_adamw, route=untied)
    assert {name for name, label in routed(opt).items() if label == "muon"} == matrices
    by_name = fo.Optimizer(untied.named_parameters(), fo.muon_with_adamw)
    assert routed(by_name)["lookup.weight"] == routed(by_name)["last.weight"] == "muon"  # no name says what they are


@pytest.mark.parametrize("form", ["functional", "stateful"])
def test_equals_the_partition(form):
    model = with_grads(LanguageModel(tied=False)).double()
    params = fo.params_of(model)
    grads = {name: p.grad for name, p in model.named_parameters()}
    labels = {name: "muon" if name == "hidden.weight" else "adamw" for name in params}
    numbers = {"lr": 0.05, "adamw_lr": 0.01, "weight_decay": 0.1, "adamw_weight_decay": 0.3, "ns_dtype": None}
    expected = fo.partition(
        {"muon": fo.muon(0.05, 0.1, ns_dtype=None), "adamw": fo.adamw(0.01, (0.9, 0.95), 1e-10, 0.3)}, labels
    )
    after, state = params, expected.init(params)
    for _ in range(3):
        after, state = fo.step(expected, grads, state, after)
    if form == "functional":
        tx, ours = fo.muon_with_adamw(**numbers, route=labels), params
        own = tx.init(ours)
        for _ in range(3):
            ours, own = fo.step(tx, grads, own, ours)
        assert pickle.loads(pickle.dumps(tx)).init(params).keys() == {"muon", "adamw"}
    else:
        opt = fo.Optimizer(model.named_parameters(), fo.muon_with_adamw, **numbers, route=labels)
        for _ in range(3):
            opt.step()
        ours = dict(model.named_parameters())
        assert set(opt.state[model.hidden.weight]) == {"step", "momentum_buffer"}
        assert set(opt.state[model.last.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    for name, p in after.items():
        torch.testing.assert_close(ours[name], p, rtol=1e-12, atol=1e-14)


def test_schedulers_of_torch_drive_both_learning_rates():
    model = with_grads(LanguageModel())
    opt = fo.Optimizer(model.named_parameters(), fo.muon_with_adamw, lr=0.02, adamw_lr=1e-3, route=model)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step()
    first = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    for _ in range(20):
        scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.02 / 2**20, 1e-3 / 2**20]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step()
    for name, p in model.named_parameters():
        assert (p.detach() - before[name]).abs().max() < 1e-4 * first[name]


def test_groups_are_parted_each_with_its_own_numbers():
    model = LanguageModel(tied=False)
    named = dict(model.named_parameters())
    groups = [
        {"params": [("hidden.weight", named["hidden.weight"]), ("hidden.bias", named["hidden.bias"])], "adamw_lr": 0.5},
        {"params": [("last.weight", named["last.weight"])], "route": "adamw", "lr": 0.25},
    ]
    opt = fo.Optimizer(groups, fo.muon_with_adamw, lr=0.1, weight_decay=0.3, adamw_weight_decay=0.0)
    found = [(g["route"], g["lr"], g["weight_decay"], g["param_names"]) for g in opt.param_groups]
    assert found[:2] == [("muon", 0.1, 0.3, ["hidden.weight"]), ("adamw", 0.5, 0.0, ["hidden.bias"])]
    assert found[2][:2] == ("adamw", 0.25)
    opt.add_param_group({"params": [("conv.weight", named["conv.weight"]), ("conv.bias", named["conv.bias"])]})
    assert [(g["route"], g["lr"]) for g in opt.param_groups[3:]] == [("muon", 0.1), ("adamw", 3e-4)]
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    assert len(opt.param_groups) == 5


def test_a_group_that_cannot_be_added_leaves_nothing():
    w, v = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    opt = fo.Optimizer([("w", w)], fo.muon_with_adamw)
    with pytest.raises(ValueError, match="leaf"):
        opt.add_param_group({"params": [("new", nn.Parameter(torch.ones(2, 2))), ("v", v), ("u", v * 2)]})
    assert [g["param_names"] for g in opt.param_groups] == [["w"]]


def test_a_transformation_has_two_rates_which_groups_do_not_drive():
    model = LanguageModel()
    opt = fo.Optimizer(model.named_parameters(), fo.muon_with_adamw(0.02, 1e-3))
    assert "lr" not in opt.param_groups[0]
    with pytest.raises(KeyError, match="has 2 learning rates, .* Give a factory"):
        torch.optim.lr_scheduler.StepLR(opt, 1)
    opt = fo.Optimizer(model.named_parameters(), fo.muon_with_adamw(0.02, None, adjust_lr_fn="match_rms_adamw"))
    assert opt.param_groups[0]["lr"] == 0.02


def test_nested_trees_functions_and_schedules():
    params = {"body": [{"w": torch.ones(2, 2), "b": torch.ones(2)}], "head": torch.ones(2, 2)}
    tx = fo.muon_with_adamw(fo.schedules.cosine(0.1, 10), adamw_lr=None)
    state = tx.init(params)
    assert fo.tree.get(state, "muon.0.momentum_buffer")["head"] == fo.MaskedNode()
    assert fo.tree.get(state, "adamw.0.exp_avg")["body"][0]["w"] == fo.MaskedNode()
    tx = fo.muon_with_adamw(route=lambda name, p: "muon" if name == "head" else "adamw")
    assert fo.tree.get(tx.init(params), "muon.0.momentum_buffer")["head"].shape == (2, 2)
    tx = fo.muon_with_adamw(route={"body": "adamw", "head": "muon"})
    assert fo.tree.get(tx.init(params), "muon.0.momentum_buffer")["head"].shape == (2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fo.muon_with_adamw(route=lambda name, p: "sgd").init({"w": torch.ones(2)}),
            "label 'sgd' at 'w' is unk",
        ),
        (
            lambda: fo.Optimizer([("w", nn.Parameter(torch.ones(2)))], fo.muon_with_adamw, route=lambda name, p: "sgd"),
            "The route of 'w' is 'sgd'; let it be 'muon' or 'adamw'",
        ),
        (
            lambda: fo.Optimizer([("w", nn.Parameter(torch.ones(2)))], fo.muon_with_adamw, route={"v": "muon"}),
            "The route of 'w' is None",
        ),
        (
            lambda: fo.Optimizer(nn.Linear(2, 2).parameters(), fo.muon_with_adamw, route=nn.Linear(2, 2)),
            "The route is a Linear, which has no parameter '0'; give the parameters by name",
        ),
        (lambda: fo.muon_with_adamw(route="muon").init({"b": torch.ones(2)}), "At 'b': Muon is for matrices"),
    ],
)
def test_what_is_no_route_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()
