"""A transformation that is called with arguments of one form after the other computes what a new one would."""

import itertools
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from catalogue import assert_close
from hypothesis import given
from hypothesis import strategies as st

import functorch_optim as fo

LABELS = {"w": "a", "b": "b"}


def make(labels=None):
    body = fo.partition({"a": fo.adam(0.1), "b": fo.sgd(0.1, momentum=0.9)}, LABELS if labels is None else labels)
    return fo.chain(fo.clip_by_global_norm(1.0), body)


class Form(NamedTuple):
    """The form of gradients, a state after one step, and parameters."""

    size: int = 3
    dtype: torch.dtype = torch.float32
    of_params: Any = dict
    of_grads: Any = dict
    missing: str | None = None
    wanted: str | None = None


def arguments(form):
    generator = torch.Generator().manual_seed(form.size)

    def drawn(kind, names):
        return kind((name, torch.randn(form.size, generator=generator).to(form.dtype)) for name in names)

    params, begin, grads = drawn(form.of_params, "wb"), drawn(dict, "wb"), drawn(form.of_grads, "wb")
    state = fo.step(make(), begin, make().init(dict(params)), dict(params))[1]
    if form.missing:
        grads[form.missing] = None
    if form.wanted:
        params[form.wanted].requires_grad_()
    return grads, state, params


def in_place(tx, grads, state, params):
    copies = fo.tree.map(lambda tensor: tensor.detach().clone(), (state, params))
    return fo.step_(tx, grads, *copies)


CALLS = {"update": lambda tx, *given: tx.update(*given), "step": fo.step, "step_": in_place}
OTHERS = [
    Form(size=2),
    Form(dtype=torch.float64),
    Form(of_params=OrderedDict),
    Form(of_grads=OrderedDict),
    Form(missing="w"),
    Form(missing="b"),
    Form(wanted="w"),
]


def assert_as_new(tx, call, form):
    given = arguments(form)
    found, expected = call(tx, *given), call(make(), *given)
    assert_close(found, expected, rtol=0, atol=0)
    wants = [[t.requires_grad for t in fo.tree.flatten(one)[0] if t is not None] for one in (found, expected)]
    assert wants[0] == wants[1]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("one", "other"), list(itertools.combinations([Form(), *OTHERS], 2)), ids=str)
def test_another_form_is_not_taken_for_the_last_one(one, other, name):
    tx = make()
    for form in (one, other, one):
        assert_as_new(tx, CALLS[name], form)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_checked_after_right_ones_too(name):
    tx, (grads, state, params) = make(), arguments(Form())
    CALLS[name](tx, grads, state, params)
    with pytest.raises(ValueError, match=r"shape \(1,\) and dtype torch.float32 at 'w', but the parameter there"):
        CALLS[name](tx, {**grads, "w": torch.ones(1)}, state, params)


@given(st.lists(st.tuples(st.sampled_from([Form(), *OTHERS]), st.sampled_from(list(CALLS))), min_size=9, max_size=20))
def test_many_forms_in_turn(history):
    tx = make()
    for form, name in history:
        assert_as_new(tx, CALLS[name], form)


def test_labels_that_are_edited_are_read_again():
    labels, swapped = {"w": "fast", "b": "slow"}, {"w": "slow", "b": "fast"}
    parts = {"fast": fo.sgd(0.2), "slow": fo.sgd(0.1)}
    tx, (grads, _, params) = fo.partition(parts, labels), arguments(Form())
    state = tx.init(params)
    for now in (dict(labels), swapped):
        labels.update(now)
        expected = fo.step(fo.partition(parts, now), grads, state, params)
        assert_close(fo.step(tx, grads, state, params), expected, rtol=0, atol=0)
