"""Labels by rules, and their results: masks, trees of numbers, param groups, frozen parameters."""

import re

import pytest
import torch
from classifier import LAYERS, Classifier, beit_layer
from torch import nn

import functorch_optim as fo


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Classifier().double()


def names_with(labels, value):
    return {name for name, label in labels.items() if label == value}


# Rules. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matcher", "is_matched"),
    [
        ("*.bias", lambda name, p: name.endswith(".bias")),
        ("blocks.0.*", lambda name, p: name.startswith("blocks.0.")),
        (re.compile(r"norm\d?\.weight$"), lambda name, p: re.search(r"norm\d?\.weight$", name)),
        (1, lambda name, p: p.ndim == 1),
        (range(2), lambda name, p: p.ndim <= 1),
        (nn.LayerNorm, lambda name, p: "norm" in name),
        (nn.TransformerEncoderLayer, lambda name, p: name.startswith("blocks")),
        (lambda path, p: p.shape[-1] == 8 and path != "", lambda name, p: p.shape[-1] == 8),
        (("*.bias", 3), lambda name, p: name.endswith(".bias") or p.ndim == 3),
        (("norm.*", nn.Embedding), lambda name, p: name.startswith("norm.") or name == "wte.weight"),
    ],
)
def test_a_rule_matches_by_path_dimensions_or_module(model, matcher, is_matched):
    labels = fo.label(model, [(matcher, "yes")], "no")
    expected = {name: "yes" if is_matched(name, p) else "no" for name, p in model.named_parameters()}
    assert labels == expected
    assert set(expected.values()) == {"yes", "no"}


def test_a_module_matches_what_is_in_it(model):
    assert names_with(fo.label(model, {model.norm: 1}, 0), 1) == {"norm.weight", "norm.bias"}


def test_the_first_rule_wins():
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    assert fo.label(params, {"b": "first", "*": "second"}) == {"w": "second", "b": "first"}
    assert fo.label(params, [("*", "first"), ("b", "second")]) == {"w": "first", "b": "first"}


def test_labels_are_built_like_the_tree():
    params = {"body": [torch.ones(2, 2), None], "head": (torch.ones(2),)}
    assert fo.label(params, {"body.*": 1e-3, "head.0": 1e-2}) == {"body": [1e-3, None], "head": (1e-2,)}
    assert fo.label(torch.ones(2), {1: "vector"}) == "vector"


def test_a_tied_parameter_is_matched_by_each_of_its_names(model):
    for rules in (
        {"head.*": "head", "*": "other"},
        {nn.Linear: "head", "*": "other"},
        {model.head: "head", "*": "other"},
    ):
        assert fo.label(model, rules)["wte.weight"] == "head"
    assert fo.label(model, {nn.Embedding: "table", "head.*": "head"}, "other")["wte.weight"] == "table"
    assert "head.weight" not in fo.label(model, {"*": 0})
    w = torch.ones(2)
    assert fo.label({"a": w, "b": w, "c": torch.ones(2)}, {"b": 1}, 0) == {"a": 1, "b": 1, "c": 0}


def test_names_of_wrappers_match_with_and_without_prefix(model):
    wrapped = nn.ModuleDict({"module": model})  # as of DistributedDataParallel
    assert set(fo.label(wrapped, {"norm.*": 1}, 0)) == {f"module.{name}" for name, _ in model.named_parameters()}
    for glob in ("norm.*", "module.norm.*"):
        assert names_with(fo.label(wrapped, {glob: 1}, 0), 1) == {"module.norm.weight", "module.norm.bias"}


def test_frozen_parameters_have_labels(model):
    model.wte.requires_grad_(False)
    assert fo.label(model, {"wte.*": "frozen"}, "train")["wte.weight"] == "frozen"


def test_what_no_rule_matches_is_an_error_that_lists_it(model):
    with pytest.raises(ValueError, match=r"No rule matches 'pos_embed', 'norm\.weight', 'norm\.bias'\. Add rules"):
        fo.label(model, {"blocks.*": 1, ("wte.*", "head.*"): 2})
    many = {f"w{i}": torch.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match="'w26', and 10 more"):
        fo.label(many, {})


def test_patterns_that_match_nothing_are_an_error_that_lists_them(model):
    rules = {"blocs.*": 1, re.compile("^heads"): 2, "*": 3}
    with pytest.raises(
        ValueError, match=r"'blocs\.\*', re.compile\('\^heads'\) match no parameter.*The parameters are"
    ):
        fo.label(model, rules)
    with pytest.raises(ValueError, match="'biases' matches no parameter"):
        fo.label(model, {("*.bias", "biases"): 1}, 0)
    with pytest.raises(ValueError, match="Conv2d matches no parameter"):
        fo.label(model, {nn.Conv2d: 1}, 0)
    with pytest.raises(ValueError, match="4 matches no parameter"):
        fo.label(model, {4: 1}, 0)
    assert fo.label(model, {(nn.Conv2d, nn.LayerNorm): 1}, 0)["norm.bias"] == 1  # types of one rule: some of them


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("norm", r"instead of 'norm', 'norm\.\*' would"),
        ("bias", r"instead of '[^']+', '\*\.bias'"),
        ("nrom.weight", r"instead of 'nrom\.weight', 'norm\.weight' would"),
        (r".*\.bias$", r"is a regular expression, write re\.compile"),
    ],
)
def test_the_right_pattern_is_named(model, pattern, hint):
    with pytest.raises(ValueError, match=hint):
        fo.label(model, {pattern: 1}, 0)


def test_a_bare_bias_is_named_for_a_single_layer():
    with pytest.raises(ValueError, match="instead of '[^']+', 'bias'"):
        fo.label(nn.Linear(2, 2), {"*.bias": 1}, 0)


def test_what_is_no_module_tree_or_rule_is_an_error(model):
    with pytest.raises(
        TypeError, match=r"label needs a module or a tree of tensors, got a generator; write label\(model"
    ):
        fo.label(model.parameters(), {"*": 1})
    with pytest.raises(TypeError, match="The parameter at 'w' is a float, not a tensor"):
        fo.label({"w": 1.0}, {"*": 1})
    for rules in ("*.bias", [("*.bias", 1, 2)], 3):
        with pytest.raises(TypeError, match=r"Rules are a dict or pairs.*write label\(model, {'\*\.bias'"):
            fo.label(model, rules)
    for matcher in (True, None, 1.5, torch.Tensor):
        with pytest.raises(TypeError, match=r"A rule cannot match by .*Give a glob, '\*\.bias'; a regular expression"):
            fo.label(model, {matcher: 1})
    with pytest.raises(TypeError, match="matches by LayerNorm, and a tree of tensors has no modules; give the module"):
        fo.label(fo.params_of(model), {nn.LayerNorm: 1}, 0)


# Decay. ---------------------------------------------------------------------------------------------------------------


def decaying_in_hugging_face(module, prefix=""):
    """Names of what decays, by recursion, as in the Trainer of transformers."""
    forbidden = ["bias", "layernorm", "rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    found = set()
    for name, child in module.named_children():
        if not isinstance(child, nn.LayerNorm):
            found |= decaying_in_hugging_face(child, f"{prefix}{name}.")
    own = {f"{prefix}{name}" for name in module._parameters}
    return found | {name for name in own if not any(re.search(word, name.lower()) for word in forbidden)}


def test_the_rules_of_timm_and_hugging_face(model):
    timm = {name for name, p in model.named_parameters() if not (p.ndim <= 1 or name.endswith(".bias"))}
    assert names_with(fo.weight_decay_mask(model, "timm"), True) == timm
    theirs = decaying_in_hugging_face(model)
    assert names_with(fo.weight_decay_mask(model, "huggingface"), True) == theirs & set(fo.params_of(model))
    tree = fo.weight_decay_mask(fo.params_of(model), "huggingface")
    assert tree["norm.weight"] is False
    assert tree["blocks.0.norm1.weight"] is True  # only the module tells
    model.no_weight_decay = lambda: {"pos_embed", "dist_token"}
    assert names_with(fo.weight_decay_mask(model, "timm"), True) == timm - {"pos_embed"}


def test_biases_norms_and_embeddings_do_not_decay(model):
    mask = fo.weight_decay_mask(model)
    kinds = ("in_proj_weight", "out_proj.weight", "linear1.weight", "linear2.weight")
    assert names_with(mask, True) == {name for name in mask if name.endswith(kinds)}
    assert not fo.weight_decay_mask(nn.MultiheadAttention(4, 2, add_bias_kv=True))["bias_k"]  # of three dimensions
    assert not fo.weight_decay_mask(nn.LayerNorm((2, 2)))["weight"]
    assert fo.weight_decay_mask({"patch_embed": {"proj": {"weight": torch.ones(2, 2)}}}) == {
        "patch_embed": {"proj": {"weight": True}}
    }
    params = {
        "embed_tokens.weight": torch.ones(2, 2),
        "lm_head.weight": torch.ones(2, 2),
        "cls_token": torch.ones(1, 2),
    }
    assert names_with(fo.weight_decay_mask(params), True) == {"lm_head.weight"}


def test_more_is_left_out_by_pattern(model):
    mask = fo.weight_decay_mask(model, exclude=("blocks.0.*", "*.linear2.weight"))
    assert names_with(mask, True) == {f"blocks.1.{name}" for name in ("self_attn.in_proj_weight", "linear1.weight")} | {
        "blocks.1.self_attn.out_proj.weight"
    }
    with pytest.raises(ValueError, match="'block.*' matches no parameter"):
        fo.weight_decay_mask(model, exclude="block.*")
    with pytest.raises(ValueError, match="Invalid rule: 'hf'; choose None, 'timm' or 'huggingface'"):
        fo.weight_decay_mask(model, "hf")


# Layer-wise rates. ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "error"), [(-1.0, ValueError), ("0.1", TypeError), (True, TypeError)])
def test_a_learning_rate_that_is_none_is_an_error_of_layer_decay(model, lr, error):
    with pytest.raises(error, match="Invalid learning rate"):
        fo.layer_decay(model, LAYERS, 0.5, lr=lr)


def test_layer_decay_is_beits(model):
    rates = fo.layer_decay(model, LAYERS, 0.5, lr=0.1)
    assert rates == {name: 0.1 * 0.5 ** (3 - beit_layer(name)) for name, _ in model.named_parameters()}
    floored = fo.layer_decay(model, LAYERS, 0.5, lr=0.1, min_scale=0.25)
    assert floored == {name: max(rate, 0.1 * 0.25) for name, rate in rates.items()}


def test_frozen_parameters_count_for_the_depth(model):
    expected = fo.layer_decay(model, LAYERS, 0.5)
    model.blocks[0].requires_grad_(False)
    model.wte.requires_grad_(False)
    assert fo.layer_decay(model, LAYERS, 0.5) == expected


def test_layers_are_in_the_order_of_numbers():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)])
    rates = fo.layer_decay(model, re.compile(r"^(\d+)\."), 0.5)
    assert [rates[f"{i}.weight"] for i in range(12)] == [0.5 ** (11 - i) for i in range(12)]


def test_the_learning_rate_may_be_a_schedule_or_tensor(model):
    rates = fo.layer_decay(model, LAYERS, 0.5, lr=fo.schedules.linear(1.0, 0.0, 10))
    assert rates["blocks.0.linear1.weight"](5) == 0.5 * 0.25
    assert rates["blocks.0.linear1.weight"] is rates["blocks.0.linear1.bias"]
    rates = fo.layer_decay(model, LAYERS, 0.5, lr=lambda step: 1 / (step + 1))
    assert rates["pos_embed"](3) == 0.25 * 0.125
    rates = fo.layer_decay(model, LAYERS, 0.5, lr=torch.tensor(2.0, requires_grad=True))
    assert rates["blocks.1.linear1.weight"].item() == 1.0
    assert rates["blocks.1.linear1.weight"].requires_grad


def test_mistakes_of_layers_are_errors(model):
    with pytest.raises(ValueError, match=r"No rule matches 'norm\.weight', 'norm\.bias'"):
        fo.layer_decay(model, [*LAYERS[:-1], "head.*"])
    with pytest.raises(ValueError, match=r"finds 'self_attn'; write \(\\d\+\) for a number, and \(\?:\.\.\.\)"):
        fo.layer_decay(model, [LAYERS[0], re.compile(r"^blocks\.\d+\.(linear1|.*)\."), LAYERS[2]])
    with pytest.raises(ValueError, match="Invalid decay: 0.0; it needs 0 < value <= 1"):
        fo.layer_decay(model, LAYERS, 0.0)
    with pytest.raises(ValueError, match="Invalid min_scale: 2; it needs 0 <= value <= 1"):
        fo.layer_decay(model, LAYERS, min_scale=2)


# The table. -----------------------------------------------------------------------------------------------------------


def test_the_table_shows_what_got_which_label(model):
    model.norm.requires_grad_(False)
    table = fo.label_table(model, label=fo.label(model, {"head.*": "head"}, "body"), lr=1e-3).splitlines()
    assert table[0].split() == ["parameter", "shape", "label", "lr"]
    assert len(table) == 1 + len(list(model.named_parameters()))
    assert "wte.weight = head.weight  " in table[2] or "wte.weight = head.weight  " in table[1]
    [norm] = [line for line in table if line.startswith("norm.bias")]
    assert norm.split() == ["norm.bias", "(frozen)", "(4,)", "body", "0.001"]
    with pytest.raises(ValueError, match="The values of 'mask' do not fit the parameters"):
        fo.label_table(model, mask={"w": True})
