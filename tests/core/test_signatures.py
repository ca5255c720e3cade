"""Signatures are short enough to read, and annotations mean the same as text."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import functorch_optim as fo

pytestmark = pytest.mark.smoke

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name) for module in (fo, fo.schedules) for name in module.__all__
}
FACTORIES = {
    name: thing
    for name, thing in PUBLIC.items()
    if inspect.isfunction(thing)
    and (
        inspect.signature(thing).return_annotation in ("GradientTransformation", "Callable[[Tensor], Number]")
        or thing.__module__.startswith("functorch_optim.wrappers.")
    )
}


class MeanState(NamedTuple):
    exp_avg: Tensor


def scale_by_mean():
    def init(p: Tensor) -> MeanState:
        return MeanState(torch.zeros_like(p))

    return fo.leafwise(init, lambda g, state, p, s: (g, state))


def test_all_factories_are_looked_at():
    optimizers = {name for name in fo.optim.__all__ if name not in ("Optimizer", "LBFGS")}
    assert len(FACTORIES) > 3 * len(optimizers)
    assert {"functorch_optim.adam", "functorch_optim.chain", "functorch_optim.schedules.cosine"} <= FACTORIES.keys()


@pytest.mark.parametrize("name", FACTORIES)
def test_a_signature_names_types_as_the_code_does(name):
    signature = inspect.signature(FACTORIES[name])
    text = str(signature)
    assert len(text) < 40 + 60 * len(signature.parameters)
    for long in ("Union", "Optional", "collections.abc", "typing.", "functorch_optim."):
        assert long not in text


def test_the_signature_of_adam_is_a_line():
    text = str(inspect.signature(fo.adam))
    assert text.startswith("(lr: 'Hyperparameter' = 0.001, ")
    assert len(text) < 300


def test_a_hyperparameter_that_is_annotated_as_int_stays_whole():
    kinds = set()

    def halved(lr: float, times: int = 1) -> fo.GradientTransformation:
        kinds.add(type(times))
        return fo.chain(fo.sgd(lr), *[fo.scale(0.5) for _ in range(times)])

    w = torch.ones(2, requires_grad=True)
    opt = fo.Optimizer([w], halved, lr=1.0, times=2)
    w.grad = torch.ones(2)
    opt.step()
    assert kinds == {int}
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.75))


def test_the_state_that_init_is_annotated_with_is_that_of_a_tree_without_tensors():
    state = scale_by_mean().init({})
    assert type(state).__name__ == "MeanState"
    assert state._fields == ("exp_avg",)
