"""The test kit reports the mistakes of wrong transformations, and passes right ones."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from catalogue import CATALOGUE
from hypothesis import strategies as st
from testing_cases import name_of, only
from wrong_transformations import (
    by_name,
    by_order,
    debiased,
    decaying_without_gradient,
    detached_momentum,
    detached_number,
    for_numbers_only,
    forgetful,
    forgotten,
    growing_state,
    hidden_state,
    in_a_closure,
    in_place,
    in_single_precision,
    momentum,
    narrow_updates,
    not_elementwise,
    not_to_be_pickled,
    one_step_late,
    other_structure,
    python_count,
    rounded_constant,
    rounded_scalars,
    unsafe_root,
    with_branch,
    with_buffer,
    with_item,
    zero_without_gradient,
)

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim.testing import PROPERTIES
from functorch_optim.testing._properties import forms

# Wrong ones. ----------------------------------------------------------------------------------------------------------


VALUES = "takes a value out of a tensor \\(\\.item\\(\\), float\\(\\), bool\\(\\), `if x > 0`\\)"
FLOAT32 = "a number on the way is not float64: .* the parameter is .*, and should be"
WRONG = [
    (in_place, "pure", "the state at 'm.*' was modified in place: it was .*, and is "),
    (in_a_closure, "pure", "the updates of the same call, made again, is .*, and should be"),
    (python_count, "kept", "the state has a int at '', 0, where a tensor belongs: keep numbers as 0-dim tensors"),
    (growing_state, "kept", "the state changes its structure"),
    (hidden_state, "kept", "the state's 'm.*' is in a container that torch.func does not see into; use dicts, tuples"),
    (narrow_updates, "kept", "have shape .* and dtype torch.float16 at .*, but the one it was given there has"),
    (in_single_precision, "kept", "the state at 'm.*' was of .* torch.float32, .*, and is of .* torch.float64"),
    (forgetful, "missing_gradients", "the state's 'm.*', of a parameter without a gradient, is gone"),
    (decaying_without_gradient, "missing_gradients", "the state's '.*', of a parameter without a gradient, is"),
    (zero_without_gradient, "missing_gradients", "have a tensor at .*, but the one it was given there is None"),
    (by_order, "leaves", "the parameter '.*', with leaves renamed and in reverse order, is .*, and should be"),
    (by_name, "leaves", "the parameter '.*a.*', with leaves renamed and in reverse order, is .*, and should be"),
    (other_structure, "tensors", "with a tensor for 'lr' of 0.1, the state is built differently than it should be"),
    (one_step_late, "schedules", "with a schedule for 'lr', which is 0.1 after 0 updates, the parameter is"),
    (partial(debiased, beta=0.9), "double_precision", FLOAT32),
    (partial(debiased, beta=0.9, exponent=torch.Tensor.float), "double_precision", FLOAT32),
    (rounded_scalars, "double_precision", "the scalars of rounded_scalars are torch.float32: keep the dtype of `step`"),
    (rounded_constant, "double_precision", FLOAT32),
    (not_to_be_pickled, "saving", "it raises (AttributeError|PicklingError): Can't (get|pickle) local object"),
    (not_elementwise, "ways", "in blocks"),
    (with_item, "vmap_parameters", f"by vmap: it cannot be transformed; mostly because it {VALUES}"),
    (with_branch, "vmap_parameters", f"by vmap: it cannot be transformed; mostly because it {VALUES}"),
    (with_buffer, "vmap_parameters", "by vmap: it cannot be transformed; .*inplace arithmetic"),
    (for_numbers_only, "vmap_hyperparameters", f"by vmap: .* {VALUES}"),
    (forgotten, "used_hyperparameters", "the hyperparameter 'lr' is not used: .* the same with half of 0.1 and with a"),
    (detached_momentum, "derivatives", "the derivative by 'gradients.0.* is .*; is something detached?"),
    (detached_number, "derivatives", "the derivative by 'hyperparameters.lr' is 0.0, .*; is something detached?"),
    (unsafe_root, "finite_derivatives", "the derivative by '.* is nan in reverse mode; .* take fo.safe_sqrt"),
    (with_branch, "compiled", f"by torch.compile: it cannot be transformed; mostly because it {VALUES}"),
    (python_count, "compiled", "by torch.compile: it is compiled anew at a later step.* count with a 0-dim tensor"),
]


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize(("make", "name", "message"), WRONG, ids=[f"{name_of(make)}-{name}" for make, name, _ in WRONG])
def test_what_is_wrong_is_found(make, name, message):
    with pytest.raises(testing.PropertyError, match=message) as caught:
        testing.check_transformation(make, {"lr": 0.1}, skip=only(name))
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name} does not hold: ")
    assert "This was found with\nparams = " in str(caught.value)


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("make", [in_place, with_item, detached_momentum], ids=name_of)
def test_the_whole_check_finds_it_too(make):
    expected = next(name for other, name, _ in WRONG if other is make)
    with pytest.raises(testing.PropertyError) as caught:
        testing.check_transformation(make, {"lr": 0.1}, examples=3)
    assert caught.value.name == expected


def test_every_property_can_fail():
    assert PROPERTIES.keys() - {name for _, name, _ in WRONG} == {"complex_parameters", "steps", "stateful"}
    # And these:
    real = fo.stateless(lambda updates, params: fo.tree.map(lambda g: g.abs(), updates))
    with pytest.raises(testing.PropertyError, match="complex_parameters does not hold: .*\nBut it raises ValueError"):
        testing.check_transformation(real, skip=only("complex_parameters"))
    for_dicts = fo.masked(fo.scale(2.0), {"w": True})
    params = st.just({"w": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(testing.PropertyError, match="stateful does not hold: .*\nBut it raises ValueError: the mask"):
        testing.check_transformation(for_dicts, params=params, skip=only("stateful"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "step", lambda tx, grads, state, params: (params, state))
        with pytest.raises(testing.PropertyError, match="by fo.step the parameter.* is .*, and should be"):
            testing.check_transformation(fo.scale(-1.0), skip=only("steps"))


def test_the_smallest_tree_is_reported():
    def wrong_for_vectors(updates, params):
        return fo.tree.map(lambda g, p: g.half() if p.ndim == 1 else g, updates, params)

    with pytest.raises(testing.PropertyError) as caught:
        testing.check_transformation(fo.stateless(wrong_for_vectors), skip=only("kept"))
    [leaf] = fo.tree.flatten(caught.value.on.params)[0]
    assert leaf.shape == (1,)
    assert len(caught.value.on.history) == 1


@pytest.mark.sampled(pool="long")
def test_derivatives_are_of_parameters_that_have_numbers():
    """And of gradients that finite differences can tell: those of very different sizes are rounded to nothing."""
    params = st.dictionaries(
        st.sampled_from("ab"), testing.tensors([torch.float64], [(0,), (2,)])
    )  # {} is the simplest
    skip = only("derivatives")
    testing.check_transformation(momentum, {"lr": 0.1, "beta": 0.9}, params=params, skip=skip)
    with pytest.raises(testing.PropertyError, match="is something detached?"):
        testing.check_transformation(detached_momentum, {"lr": 0.1}, params=params, skip=skip)


def test_what_depends_on_earlier_calls_is_reported_as_that():
    calls = []

    def function(updates, params):
        calls.append(1)
        return fo.tree.map(lambda g: len(calls) * g if 9 < len(calls) < 13 else g, updates)

    with pytest.raises(testing.PropertyError, match="pure does not hold") as caught:
        testing.check_transformation(fo.stateless(function), skip=only("pure"))
    assert "it depends on what was called before, outside of the state" in str(caught.value)


# Right ones. ----------------------------------------------------------------------------------------------------------


class LionState(NamedTuple):
    exp_avg: torch.Tensor


def lion(lr, betas=(0.9, 0.99), weight_decay=0.0):
    def scalars(step):
        return 1 - fo.at(betas[0], step), 1 - fo.at(betas[1], step)

    def update(g, state, p, s):
        weight1, weight2 = s
        direction = torch.sign(torch.lerp(state.exp_avg, g, weight1))
        return direction, LionState(torch.lerp(state.exp_avg, g, weight2))

    rule = fo.leafwise(LionState, update, scalars, elementwise=True)
    return fo.chain(rule, fo.add_decayed_weights(weight_decay), fo.scale_by_learning_rate(lr))


def scaled_by_loss(lr, power):
    """Declare the loss, and an extra of its own."""

    def scalars(step, *, value, size):
        return -fo.at(lr, step) * size * torch.as_tensor(value).detach().abs().double() ** 0

    return fo.leafwise(None, lambda g, state, p, s: (s * g, state), scalars, elementwise=True)


def by_shape(params):
    return fo.tree.map(lambda p: p.ndim > 1, params)


RIGHT = {
    "rule": (lion, {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.1}, {}),
    "whole tree": (momentum, {"lr": 0.1, "beta": 0.9}, {"skip": {"compiled"}}),
    "transformation": (
        fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 5), eps=1e-3)),
        {},
        {"skip": {"compiled"}},
    ),
    "stateless": (fo.stateless(lambda updates, params: fo.tree.map(torch.sin, updates)), {}, {"skip": {"compiled"}}),
    "parts": (
        lambda lr: fo.partition({True: fo.adam(lr, eps=1e-3), False: fo.sgd(lr, 0.9)}, by_shape),
        {"lr": 0.1},
        {"skip": {"compiled"}},
    ),
    "extras": (scaled_by_loss, {"lr": 0.1, "power": 1}, {"extra": {"size": 2.0}, "skip": {"stateful", "compiled"}}),
    "certain parameters": (
        lambda lr: fo.masked(fo.scale(lr), {"w": True, "b": False}),
        {"lr": 0.1},
        {
            "params": st.fixed_dictionaries({name: testing.tensors([torch.float64]) for name in "wb"}),
            "skip": {"leaves", "stateful", "compiled"},
        },
    ),
}


@pytest.mark.sampled(size=2)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name):
    make, numbers, options = RIGHT[name]
    testing.check_transformation(make, numbers, **{"examples": 2, **options})


@pytest.mark.sampled(pool="long")
def test_a_row_of_the_catalogue_passes():
    """All others are checked in test_properties.py, property by property, on a tree that is not drawn."""
    row = next(row for row in CATALOGUE if row.name == "lbfgs_search")
    options = {"tolerance": row.tolerance, "examples": 2, "skip": {"compiled"}}  # it is in test_meta_transforms.py
    testing.check_transformation(row.make, row.hyperparameters, **options)
