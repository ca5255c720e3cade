"""The test kit finds what is wrong with a transformation, says so, and lets pass what is right."""

from functools import partial
from typing import Any, NamedTuple

import optree
import pytest
import torch
from catalogue import CATALOGUE
from hypothesis import strategies as st
from testing_cases import name_of, only

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim.testing import PROPERTIES
from functorch_optim.testing._properties import forms


class Count(NamedTuple):
    count: Any
    m: Any


def zeros(params):
    return Count(torch.zeros((), dtype=torch.int64), fo.tree.map(torch.zeros_like, params))


def momentum(lr, beta=0.9, *, begin=zeros, mean=lambda m, g, beta: beta * m + g, out=lambda m, lr: -lr * m):
    """Make momentum of whole trees, of which parts may be replaced by wrong ones."""

    def update(updates, state, params):
        step = (state.count + 1).double()
        m = fo.tree.map(lambda m, g: m if g is None else mean(m, g, fo.at(beta, step)), state.m, updates)
        return fo.tree.map(lambda g, m: out(m, fo.at(lr, step)), updates, m), Count(state.count + 1, m)

    return fo.GradientTransformation(begin, update)


# Wrong ones. ----------------------------------------------------------------------------------------------------------


def in_place(lr):
    def mean(m, g, beta):
        return m.mul_(beta).add_(g)

    return momentum(lr, mean=mean)


def in_a_closure(lr):
    kept = {}

    def update(updates, state, params):
        grads, structure = fo.tree.flatten(updates)
        for i, g in enumerate(grads):
            if g is not None:
                kept[i, g.shape] = 0.9 * kept.get((i, g.shape), 0.0) + g.detach().double()
        moved = [None if g is None else -lr * kept[i, g.shape].to(g.dtype) for i, g in enumerate(grads)]
        return fo.tree.unflatten(structure, moved), state

    return fo.GradientTransformation(lambda params: (), update)


def with_item(lr):
    def update(g, state, p, lr):
        return -lr * g / max(g.abs().sum().item(), 1.0), state

    return fo.leafwise(None, update, lambda step: fo.at(lr, step))


def with_branch(lr):
    def update(g, state, p, lr):
        return (-lr * g if g.sum() > 0 else -2 * lr * g), state

    return fo.leafwise(None, update, lambda step: fo.at(lr, step))


def debiased(lr, beta, exponent=lambda count: count):
    def update(updates, state, params):
        count = state.count + 1
        m = fo.tree.map(lambda m, g: m if g is None else beta * m + (1 - beta) * g, state.m, updates)
        return fo.tree.map(lambda g, m: (-lr * m / (1 - beta ** exponent(count))).to(g.dtype), updates, m), Count(
            count, m
        )

    return fo.GradientTransformation(zeros, update)


def rounded_scalars(lr):
    return fo.leafwise(None, lambda g, state, p, s: (-s * g, state), lambda step: (fo.at(lr, step) * step).float())


def rounded_constant(lr):
    scale = torch.tensor(0.3)
    return fo.chain(fo.scale(scale), fo.scale_by_learning_rate(lr))


def detached_momentum(lr):
    return momentum(lr, mean=lambda m, g, beta: beta * m.detach() + g)


def detached_number(lr):
    return momentum(lr, out=lambda m, lr: -(lr.detach() if isinstance(lr, torch.Tensor) else lr) * m)


def by_order(lr):
    def function(updates, params):
        leaves, structure = fo.tree.flatten(updates)
        return fo.tree.unflatten(structure, [g if g is None else -lr * g / (i + 1) for i, g in enumerate(leaves)])

    return fo.stateless(function)


def by_name(lr):
    def function(updates, params):
        leaves, structure = fo.tree.flatten(updates)
        sizes = [0.5 if "a" in path else 1.0 for path in fo.tree.paths(updates)]
        return fo.tree.unflatten(structure, [g if g is None else -s * g for s, g in zip(sizes, leaves, strict=True)])

    return fo.stateless(function)


def in_single_precision(lr):
    def begin(params):
        return Count(torch.zeros((), dtype=torch.int64), fo.tree.map(lambda p: torch.zeros_like(p).float(), params))

    return momentum(lr, begin=begin, out=lambda m, lr: (-lr * m).double())


def narrow_updates(lr):
    return fo.stateless(lambda updates, params: fo.tree.map(lambda g: (-lr * g).half(), updates))


def growing_state(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g, updates), (*state, torch.zeros(()))

    return fo.GradientTransformation(lambda params: (), update)


def python_count(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g / (1 + state), updates), state + 1

    return fo.GradientTransformation(lambda params: 0, update)


def with_buffer(lr):
    def function(updates, params):
        def moved(g):
            buffer = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
            return buffer.sub_(0.1 * g)

        return fo.tree.map(moved, updates)

    return fo.stateless(function)


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Hidden:
    m: Any


def hidden_state(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g, updates), state

    return fo.GradientTransformation(lambda params: Hidden(fo.tree.map(torch.zeros_like, params)), update)


def forgetful(lr):
    """Keep the state of those parameters only that have a gradient."""

    def begin(params):
        return {"m": dict(zip(fo.tree.paths(params), map(torch.zeros_like, fo.tree.flatten(params)[0]), strict=True))}

    def update(updates, state, params):
        grads = dict(zip(fo.tree.paths(updates), fo.tree.flatten(updates)[0], strict=True))
        left = {path: m for path, m in state["m"].items() if grads[path] is not None}
        return fo.tree.map(lambda g: -lr * g, updates), {"m": left}

    return fo.GradientTransformation(begin, update)


def decaying_without_gradient(lr):
    def update(updates, state, params):
        m = fo.tree.map(lambda m, g: 0.9 * m if g is None else 0.9 * m + g, state, updates)
        return fo.tree.map(lambda g, m: -lr * m, updates, m), m

    return fo.GradientTransformation(lambda params: fo.tree.map(torch.zeros_like, params), update)


def zero_without_gradient(lr):
    def function(updates, params):
        leaves, structure = fo.tree.flatten(updates)
        of = fo.tree.flatten(params)[0]
        pairs = zip(leaves, of, strict=True)
        return fo.tree.unflatten(structure, [torch.zeros_like(p) if g is None else -g for g, p in pairs])

    return fo.stateless(function)


def unsafe_root(lr):
    def update(g, state, p, lr):
        return -lr * g / (g.square().sqrt() + 0.1), state

    return fo.leafwise(None, update, lambda step: fo.at(lr, step), elementwise=True)


def one_step_late(lr):
    return fo.leafwise(None, lambda g, state, p, lr: (-lr * g, state), lambda step: fo.at(lr, step + 1))


def for_numbers_only(lr):
    size = float(lr) if isinstance(lr, torch.Tensor) else lr
    return fo.scale(-size) if not callable(size) else fo.scale_by_learning_rate(lr)


def other_structure(lr):
    return fo.trace(0.9) if isinstance(lr, float) else fo.chain(fo.trace(0.9))


def local_class():
    class Local(NamedTuple):
        m: Any

    return Local


LOCAL = local_class()


def not_to_be_pickled(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g, updates), LOCAL(state.m + 1)

    return fo.GradientTransformation(lambda params: LOCAL(torch.zeros(())), update)


def not_elementwise(lr):
    return fo.leafwise(None, lambda g, state, p, s: (-0.1 * g / (1 + g.abs().sum()), state), elementwise=True)


def forgotten(lr):
    return momentum(0.1)


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


@pytest.mark.parametrize(("make", "name", "message"), WRONG, ids=[f"{name_of(make)}-{name}" for make, name, _ in WRONG])
def test_what_is_wrong_is_found(make, name, message):
    with pytest.raises(testing.PropertyError, match=message) as caught:
        testing.check_transformation(make, {"lr": 0.1}, skip=only(name))
    assert caught.value.name == name
    assert str(caught.value).startswith(f"{name} does not hold: ")
    assert "This was found with\nparams = " in str(caught.value)


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


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name):
    make, numbers, options = RIGHT[name]
    testing.check_transformation(make, numbers, **{"examples": 2, **options})


def test_a_row_of_the_catalogue_passes():
    """All others are checked in test_properties.py, property by property, on a tree that is not drawn."""
    row = next(row for row in CATALOGUE if row.name == "lbfgs_search")
    options = {"tolerance": row.tolerance, "examples": 2, "skip": {"compiled"}}  # it is in test_meta_transforms.py
    testing.check_transformation(row.make, row.hyperparameters, **options)
