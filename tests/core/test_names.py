"""Names of the library, and chains made of text and dicts, as in configuration files."""

import inspect

import pytest
import torch

import functorch_optim as fo
from functorch_optim import schedules

PARAMS = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), "b": torch.tensor([0.3, -0.7]).double()}


def trained(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        params, state = fo.step(tx, fo.tree.map(lambda p: p.square() - 1, params), state, params)
    return params


def assert_same(actual, expected):
    torch.testing.assert_close(trained(actual), trained(expected), rtol=0, atol=0)


# Names. ---------------------------------------------------------------------------------------------------------------


def test_names_are_found_by_glob():
    assert fo.names("adamw") == ["adamw"]
    assert fo.names("*adam*") == sorted(name for name in fo.names() if "adam" in name)
    assert {"adam", "adamw", "scale_by_adam", "nadam", "sparse_adam"} <= set(fo.names("*adam*"))
    assert fo.names("nothing*") == []
    expected = {"sgd", "muon", "clip", "chain", "masked", "schedule_free", "inject_hyperparams", "identity", "cosine"}
    assert expected <= set(fo.names())


def test_every_factory_of_optimizers_has_a_name():
    from_signature = {
        name
        for name in fo.__all__
        if inspect.isfunction(getattr(fo, name)) and "lr" in inspect.signature(getattr(fo, name)).parameters
    }
    assert from_signature - {"layer_decay"} <= set(fo.names())  # which makes numbers
    assert {name for name in schedules.__all__ if name != "Schedule"} <= {
        name.removeprefix("schedules.") for name in fo.names()
    }


def test_what_makes_no_transformation_has_no_name():
    others = {
        "step_",
        "migrate",
        "eval_params",
        "minimize",
        "metrics",
        "Optimizer",
        "leafwise",
        "stateless",
        "label",
        "get",
    }
    assert others.isdisjoint(fo.names())
    assert fo.get("step") is schedules.step


def test_a_name_prints_with_hyperparameters_and_one_line():
    for name in fo.names():
        call, line = repr(fo.names(name)).split("\n")
        assert call.startswith(f"{name}(")
        assert line.strip().endswith((".", ":", "`"))
    text = repr(fo.names("sgd"))
    assert "sgd(lr=0.001, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, *, maximize=False)" in text
    assert str(fo.names("a*")).count("\n") == 2 * len(fo.names("a*")) - 1


def test_a_name_is_the_function_itself():
    for name in fo.names():
        plain = name.removeprefix("schedules.")
        assert fo.get(name) in (getattr(fo, plain, None), getattr(schedules, plain, None))
    opt = fo.Optimizer([torch.zeros(1, requires_grad=True)], fo.get("adamw"), lr=0.5)
    assert opt.param_groups[0]["lr"] == 0.5
    assert fo.get("schedules.cosine") is fo.get(" cosine ") is schedules.cosine


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("adamv", "'adamw'"),
        ("AdamW", "'adamw'"),
        ("clip_by_globalnorm", "'clip_by_global_norm'"),
        ("schedules.cosin", "'cosine'"),
        ("adamv(1e-3)", "'adamw'"),
        ("clip(1.0) | adamv(1e-3)", "'adamw'"),
        ("adamw(lr=warmup_cosin(1e-3, 1, 10))", "'warmup_cosine'"),
        ({"name": "adamv"}, "'adamw'"),
        ({"clip": 1.0, "adamv": None}, "'adamw'"),
        ({"adamw": {"lr": {"name": "cosin"}}}, "'cosine'"),
        (["clip(1.0)", "adamv()"], "'adamw'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, nearest):
    with pytest.raises(KeyError, match=rf"has the name '\S+'; did you mean .*{nearest}.*\? fo\.names\(\) lists all"):
        fo.get(name)


def test_a_name_like_no_other_is_an_error():
    with pytest.raises(KeyError, match=r"has the name 'qqqqqq'; fo\.names\(\) lists all"):
        fo.get("qqqqqq")


# Text. ----------------------------------------------------------------------------------------------------------------

CASES = [
    ("adamw()", fo.adamw()),
    ("sgd(0.1, momentum=0.9, nesterov=True)", fo.sgd(0.1, momentum=0.9, nesterov=True)),
    ("clip(0.5) | sgd(0.1)", fo.chain(fo.clip(0.5), fo.sgd(0.1))),
    (
        "clip_by_global_norm(1.0) | adamw(lr=warmup_cosine(1e-1, 2, 10))",
        fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(schedules.warmup_cosine(1e-1, 2, 10))),
    ),
    ("clip(1) |\n trace(0.5)  # two\n | scale(-.1)", fo.chain(fo.clip(1), fo.trace(0.5), fo.scale(-0.1))),
    ("chain(clip(1.0), sgd(0.1) | scale(-1.0))", fo.chain(fo.clip(1.0), fo.sgd(0.1), fo.scale(-1.0))),
    ("adam({'w': 0.1, 'b': 1e-2}, betas=[0.5, 0.9])", fo.adam({"w": 0.1, "b": 1e-2}, betas=(0.5, 0.9))),
    ("inject_hyperparams(adamw)(lr=0.1)", fo.adamw(0.1)),
    ("inject_hyperparams(sgd, static=('momentum',))(lr=0.1)", fo.sgd(0.1)),
    ("partition({True: sgd(0.1), False: adam(0.1)}, {'w': True, 'b': False})",
     fo.partition({1: fo.sgd(0.1), 0: fo.adam(0.1)}, {"w": 1, "b": 0})),
    ("clip_by_norm(1.0, inf) | sgd(0.1)", fo.chain(fo.clip_by_norm(1.0, float("inf")), fo.sgd(0.1))),
    ("add_decayed_weights(0.1, mask=None) | sgd(schedules.linear(0.1, 0.0, 5))",
     fo.chain(fo.add_decayed_weights(0.1), fo.sgd(schedules.linear(0.1, 0.0, 5)))),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[text for text, _ in CASES])
def test_text_makes_what_the_calls_make(text, expected):
    assert_same(fo.get(text), expected)


@pytest.mark.parametrize(
    "tx",
    [
        fo.adamw(1e-1, betas=(0.5, 0.9)),
        fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(schedules.warmup_cosine(0.1, 2, 10), momentum=0.9)),
        fo.named_chain(("clip", fo.clip(1.0)), ("sgd", fo.sgd(0.1))),
        fo.masked(fo.sgd(0.1), {"w": True, "b": False}),
        fo.partition({"a": fo.sgd(0.1), "b": fo.adam(0.1)}, {"w": "a", "b": "b"}),
        fo.chain(fo.clip_by_norm(0.5, float("inf")), fo.sgd(schedules.join([schedules.constant(0.1)], []))),
        fo.swa(fo.sgd(schedules.swa(0.1, 0.05, 3)), 1),
        fo.sgd(schedules.swa(value=0.1, swa_lr=0.05)),
    ],
    ids=repr,
)
def test_what_a_transformation_prints_makes_it_again(tx):
    again = fo.get(repr(tx))
    assert repr(again) == repr(tx)
    assert_same(again, tx)


def test_text_of_a_schedule_makes_it():
    assert fo.get("warmup_cosine(1.0, 10, 100)")(10) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "adamw.__globals__",
        "(lambda: sgd(0.1))()",
        "[sgd(lr) for lr in (1, 2)][0]",
        "sgd(10 ** 10)",
        "sgd(0.1) + sgd(0.1)",
        "sgd(0.1) if True else adam()",
        "sgd(*[0.1])",
        "sgd(**{'lr': 0.1})",
        "partition({**{}}, 1)",
        "sgd(f'{1}')",
        "sgd(lr := 0.1)",
        "schedules.cosine.__globals__",
        "torch.optim.SGD",
        "sgd(1j)",
        "sgd(b'1')",
        "sgd(...)",
    ],
)
def test_only_calls_of_the_library_are_executed(text):
    with pytest.raises((ValueError, KeyError), match="cannot be read: it may have numbers|has the name '__import__'"):
        fo.get(text)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("sgd(0.1", ValueError, r"'sgd\(0\.1' cannot be read: .*; write get\('clip_by_global_norm"),
        ("", ValueError, "'' is no transformation, schedule or name of one"),
        ("0.1", ValueError, r"'0\.1' is no transformation, schedule or name of one; write get"),
        ("sgd(0.1), sgd(0.2)", ValueError, "is no transformation, schedule or name of one"),
        ("sgd(0.1)(0.2)", ValueError, r"'sgd\(0\.1\)' cannot be called: it is no function"),
        ("'sgd'(0.2)", ValueError, "\"'sgd'\" cannot be called: it is no function"),
        ("clip(1.0) | sgd", TypeError, r"sgd is not a GradientTransformation; call it"),
        ("clip(1.0) | cosine(0.1, 10)", TypeError, "is not a GradientTransformation; as in"),
        ("adamw(learning_rate=0.1)", TypeError, r"adamw has no argument 'learning_rate'; did you mean 'lr'\? Its"),
        ("adamw(weight_deacy=0.1)", TypeError, r"did you mean 'weight_decay'\?"),
        ("adamw(qqq=0.1)", TypeError, "adamw has no argument 'qqq'; Its arguments are lr, betas"),
        ("adamw(lr=cosine)", TypeError, r"cosine needs its own arguments to be a schedule: cosine\(\.\.\.\)"),
        ("adamw(lr=-1)", ValueError, "Invalid learning rate: -1"),
        ({}, ValueError, r"There is nothing in \{\}; write get"),
        ([], ValueError, r"There is nothing in \[\]; write get"),
        (fo.adamw, TypeError, "get takes a name, a line of text, a dict or a list, got adamw; write get"),
        ({"name": "adamw", "learning_rate": 1.0}, TypeError, "did you mean 'lr'"),
        ({"adamw": {"learning_rate": 1.0}}, TypeError, "did you mean 'lr'"),
        ({"clip": [1.0, 2.0]}, TypeError, "Its arguments are clip_value"),
        ("adam(0.1) | ema_weights(0.9)", TypeError, "missing a required argument: 'decay'; it goes around a transf"),
        ("cosine(0.1)", TypeError, "cosine is called wrongly: missing a required argument: 'total_iters'; Its arg"),
    ],
)
def test_mistakes_are_errors(spec, error, message):
    with pytest.raises(error, match=message):
        fo.get(spec)


# Dicts. ---------------------------------------------------------------------------------------------------------------

COSINE = schedules.warmup_cosine(1e-1, 2, 10)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "adamw", "lr": 0.1, "betas": [0.5, 0.9]}, fo.adamw(0.1, betas=(0.5, 0.9))),
        ({"adamw": {"lr": 0.1}}, fo.adamw(0.1)),
        ({"adamw": None}, fo.adamw()),
        ({"adamw": 0.1}, fo.adamw(0.1)),
        ({"sgd": [0.1, 0.9]}, fo.sgd(0.1, 0.9)),
        ({"clip_by_global_norm": 1.0, "adamw": {"lr": 0.1}}, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))),
        ([{"clip": 1.0}, "scale(0.5)", {"name": "sgd", "lr": 0.1}, fo.scale(2.0)], fo.chain(fo.clip(1.0), fo.sgd(0.1))),
        ({"adamw": {"lr": "warmup_cosine(1e-1, 2, 10)"}}, fo.adamw(COSINE)),
        ({"adamw": "warmup_cosine(1e-1, 2, 10)"}, fo.adamw(COSINE)),
        ({"sgd": {"name": "cosine", "value": 0.1, "total_iters": 10}}, fo.sgd(schedules.cosine(0.1, 10))),
        ({"adamw": {"lr": "1e-1", "weight_decay": "1e-2"}}, fo.adamw(0.1)),  # as YAML 1.1 reads numbers
        ({"adam": {"lr": {"w": "1e-1", "b": 0.01}}}, fo.adam({"w": 0.1, "b": 0.01})),
        (
            {"partition": [{"a": "sgd(0.1)", "b": {"name": "adam"}}, {"w": "a", "b": "b"}]},
            fo.partition({"a": fo.sgd(0.1), "b": fo.adam()}, {"w": "a", "b": "b"}),
        ),
        (
            {"sgd": {"lr": {"name": "warmup_stable_decay", "peak_value": 0.1, "warmup_iters": 1, "stable_iters": 1,
                            "decay_iters": 2, "decay": "linear"}}},
            fo.sgd(schedules.warmup_stable_decay(0.1, 1, 1, 2, decay="linear")),
        ),
    ],
)  # fmt: skip
def test_dicts_make_what_the_calls_make(spec, expected):
    assert_same(fo.get(spec), expected)


def test_other_values_in_dicts_stay_as_they_are():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = trained(fo.get({"name": "sgd", "lr": lr}))
    assert params["w"].requires_grad
