"""State dicts of our classes and of torch.optim's are the same, and training goes on with either from both."""

import copy

import pytest
import torch
from checkpoint_cases import assert_same_dicts, in_order, make
from torch_like_cases import (
    MODULES,
    OPTIONS,
    REAL,
    awkward_params,
    cases,
    deviation,
    each,
    embedding_params,
    embeddings,
    parameters,
    run,
    run_sparse,
)

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

sources = pytest.mark.parametrize("source", [0, 1], ids=["from ours", "from torch"])


def make_pair(name, params, saved=None, **options):
    """Make ours and torch's, which may load a state dict each, or both the same."""
    pair = [make(module, name, params, **options) for module in MODULES]
    for optimizer, one in zip(pair, saved if isinstance(saved, list) else [saved, saved], strict=True):
        if one is not None:
            optimizer.load_state_dict(through_a_file(one))
    return pair


def missing(step, i):
    """Leave a parameter without gradients, and some at times."""
    return i == 3 or (step + i) % 4 == 0


@pytest.mark.sampled(size=8)
@cases
@pytest.mark.parametrize(
    ("source", "dtype"),
    [(0, torch.float64), (1, torch.float64), (0, torch.complex128)],
    ids=["from ours", "from torch", "complex"],
)
def test_training_goes_on(name, options, dtype, source):
    if dtype.is_complex and name in REAL:
        pytest.skip("torch.optim has it for real numbers only")
    named = {"named": dtype.is_complex}
    trained = make_pair(name, awkward_params(name, dtype), **named, **options)
    run(*trained, steps=7, missing=missing)
    assert_same_dicts(trained[0].state_dict(), trained[1].state_dict())
    # The options are in what is saved.
    pair = make_pair(name, in_order(trained[source]), trained[source].state_dict(), **named)
    assert_same_dicts(pair[0].state_dict(), pair[1].state_dict())
    assert_same_dicts(pair[0].state_dict()["param_groups"], trained[0].state_dict()["param_groups"])

    torch.manual_seed(1)
    assert run(*pair, steps=12, missing=missing) < 1e-12
    assert_same_dicts(pair[0].state_dict(), pair[1].state_dict())
    torch.manual_seed(1)
    run(*trained, steps=12, missing=missing)
    # When loading, torch.optim casts the product of NAdam from float32 to the parameters' dtype. It goes on in that.
    tolerance = 1e-5 if name == "NAdam" and not dtype.is_complex else 1e-12
    for optimizer in pair:
        assert deviation(parameters(optimizer), parameters(trained[1])) < tolerance

    back = make_pair(name, in_order(pair[1]), [one.state_dict() for one in pair[::-1]], **named)
    assert run(*back, steps=4) < 1e-12
    assert_same_dicts(back[0].state_dict(), back[1].state_dict())


@pytest.mark.sampled
@cases
@sources
def test_saved_before_the_first_step(name, options, source):
    new = make_pair(name, awkward_params(name, torch.float64), **options)
    assert_same_dicts(new[0].state_dict(), new[1].state_dict())
    pair = make_pair(name, in_order(new[0]), new[source].state_dict())
    assert_same_dicts(pair[0].state_dict(), new[1].state_dict())
    assert run(*pair, steps=10, missing=missing) < 1e-12
    assert_same_dicts(pair[0].state_dict(), pair[1].state_dict())


@embeddings
@sources
def test_sparse_training_goes_on(name, options, source):
    trained = make_pair(name, embedding_params(), **options)
    run_sparse(*trained, steps=7)
    assert_same_dicts(trained[0].state_dict(), trained[1].state_dict())
    pair = make_pair(name, in_order(trained[source]), trained[source].state_dict())
    assert run_sparse(*pair, steps=12) < 1e-12
    assert_same_dicts(pair[0].state_dict(), pair[1].state_dict())
    back = make_pair(name, in_order(pair[1]), [one.state_dict() for one in pair[::-1]])
    assert run_sparse(*back, steps=12) < 1e-12


# What torch used to save. ---------------------------------------------------------------------------------------------

NEWER = ["maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"]
NEWER += ["nesterov", "amsgrad", "centered"]


def saved_by_torch(name, options):
    """Return parameters, and what torch saved after some steps."""
    pair = make_pair(name, awkward_params(name, torch.float64), **options)
    run(*pair, steps=7)
    return in_order(pair[1]), pair[1].state_dict()


def assert_goes_on_as_torch_does(name, params, saved, options, steps=12):
    pair = make_pair(name, params, saved, **options)
    for ours, torchs in zip(*[optimizer.param_groups for optimizer in pair], strict=True):
        assert {**ours, "params": None} == {**torchs, "params": None}
    assert run(*pair, steps=steps, missing=missing) < 1e-12


@pytest.mark.sampled(size=6)
@cases
def test_groups_that_lack_newer_keys(name, options):
    params, saved = saved_by_torch(name, options)
    filled_in = make(torch.optim, name, params)
    filled_in.load_state_dict({**saved, "param_groups": [{"params": g["params"]} for g in saved["param_groups"]]})
    absent = [key for key in NEWER if key in filled_in.param_groups[0] and key in saved["param_groups"][0]]
    for keys in [*[[key] for key in absent], absent]:
        old = copy.deepcopy(saved)
        for group in old["param_groups"]:
            for key in keys:
                del group[key]
        assert_goes_on_as_torch_does(name, params, old, options, steps=12 if keys == absent else 3)


@each
def test_groups_that_lack_what_torch_does_not_fill_in_keep_ours(name):
    options = {"lr": 0.125, **({} if name in ("SparseAdam", "Muon") else {"maximize": True})}
    optimizer = make(fo.optim, name, [torch.ones(2, 2)], **options)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["lr"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[1]["lr"] == 0.03


FORMS = {
    "int": int,
    "float": float,
    "vector": lambda step: step.reshape(1),
    "int64": lambda step: step.long(),
    "float64": lambda step: step.double(),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_steps_of_other_forms(name, form):
    options = OPTIONS[name][-1]
    params, saved = saved_by_torch(name, options)
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = form(state["step"])
    assert_goes_on_as_torch_does(name, params, saved, options)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_steps_of_sparse_adam(form):
    trained = make_pair("SparseAdam", [torch.randn(7, 3, dtype=torch.float64)])
    run_sparse(*trained, steps=7)
    saved, old = trained[1].state_dict(), trained[1].state_dict()  # torch computes with a tensor, in float32
    old["state"] = {i: {**state, "step": form(torch.tensor(state["step"]))} for i, state in old["state"].items()}
    pair = make_pair("SparseAdam", in_order(trained[1]), [old, saved])
    assert type(pair[0].state[parameters(pair[0])[0]]["step"]) is int
    assert run_sparse(*pair, steps=12) < 1e-12


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_numbers_that_were_no_tensors(name):
    for options in OPTIONS[name]:
        params, saved = saved_by_torch(name, options)
        for state in saved["state"].values():
            state.update({key: float(state[key]) for key in ("mu_product", "eta", "mu", "step") if key in state})
        pair = make_pair(name, params, saved)
        assert_same_dicts(pair[0].state_dict(), pair[1].state_dict())
        assert run(*pair) < 1e-12


def test_momentum_that_was_none():
    for options in OPTIONS["SGD"]:
        params, saved = saved_by_torch("SGD", {**options, "momentum": 0.0, "nesterov": False})
        saved["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
        for group in saved["param_groups"]:
            group["momentum"] = 0.9
        assert_goes_on_as_torch_does("SGD", params, saved, {})


# Parameters of another dtype. -----------------------------------------------------------------------------------------

CASTS = [
    (torch.float64, torch.float32, 4 * 12 * torch.finfo(torch.float32).eps),
    (torch.float64, torch.bfloat16, 30 * torch.finfo(torch.bfloat16).eps),  # torch rounds after every operation
    (torch.float32, torch.float64, 1e-12),
    (torch.bfloat16, torch.float64, 1e-12),
]


@pytest.mark.sampled
@cases
@pytest.mark.parametrize(("before", "after", "tolerance"), CASTS)
def test_other_dtypes(name, options, before, after, tolerance):
    trained = make_pair(name, awkward_params(name, before), **options)
    run(*trained, steps=7, scale=0.01)
    pair = make_pair(name, [p.to(after) for p in in_order(trained[1])])
    pair[0].load_state_dict(through_a_file(trained[1].state_dict()), cast=True)  # as torch.optim does, unasked
    pair[1].load_state_dict(through_a_file(trained[1].state_dict()))
    assert_same_dicts(pair[0].state_dict(), pair[1].state_dict())
    assert run(*pair, steps=12, scale=0.01) < tolerance
    for mine, torchs in zip(*[optimizer.state_dict()["state"].values() for optimizer in pair], strict=True):
        assert {key: value.dtype for key, value in mine.items()} == {key: v.dtype for key, v in torchs.items()}


@pytest.mark.parametrize(("before", "after"), [("complex64", "complex128"), ("complex128", "complex64")])
def test_complex_states_of_other_dtypes_are_cast(before, after):
    """torch.optim leaves them as they are, and its step fails."""
    before, after = getattr(torch, before), getattr(torch, after)
    ours, theirs = make_pair("Adam", [torch.randn(3, dtype=before), torch.randn(2, dtype=before)])
    run(ours, theirs, steps=5)
    pair = make_pair("Adam", [p.to(after) for p in in_order(theirs)], theirs.state_dict())
    assert pair[1].state[parameters(pair[1])[0]]["exp_avg"].dtype == before
    for p in parameters(pair[0]):
        p.grad = torch.ones_like(p)
    pair[0].step()
    assert all(state["exp_avg"].dtype == after for state in pair[0].state.values())


def test_the_comparison_can_fail():
    saved = saved_by_torch("Adam", {})[1]
    reordered = {i: dict(reversed(state.items())) for i, state in saved["state"].items()}
    assert_same_dicts({**saved, "state": reordered}, saved)
    for change in (
        {"state": {}},
        {"param_groups": tuple(saved["param_groups"])},
        {"param_groups": [dict(reversed(group.items())) for group in saved["param_groups"]]},
        {"state": dict(reversed(saved["state"].items()))},
        {"state": {i: {k: v for k, v in state.items() if k != "step"} for i, state in saved["state"].items()}},
        {"state": {i: {**state, "exp_avg": state["exp_avg"].float()} for i, state in saved["state"].items()}},
        {"state": {i: {**state, "exp_avg": state["exp_avg"] * 1.001} for i, state in saved["state"].items()}},
    ):
        with pytest.raises(AssertionError):
            assert_same_dicts({**saved, **change}, saved)
