"""The test kit finds what is wrong, says so, and lets pass what is right."""

import builtins
import subprocess
import sys
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from catalogue import CATALOGUE
from hypothesis import find, given
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim.testing import OPTIMIZER_PROPERTIES, PROPERTIES


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


VALUES = "takes a value out of a tensor \\(\\.item\\(\\), float\\(\\), bool\\(\\), `if x > 0`\\)"
FLOAT32 = "a number on the way is not float64: .* the parameter is .*, and should be"
WRONG = [
    (in_place, "pure", "the state at 'm.*' was modified in place: it was .*, and is "),
    (in_a_closure, "pure", "the updates of the same call, made again, is .*, and should be"),
    (python_count, "kept", "the state has a int at '', 0, where a tensor belongs: keep numbers as 0-dim tensors"),
    (growing_state, "kept", "the state changes its structure"),
    (narrow_updates, "kept", "have shape .* and dtype torch.float16 at .*, but the one it was given there has"),
    (in_single_precision, "kept", "the state at 'm.*' was of .* torch.float32, .*, and is of .* torch.float64"),
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
    (detached_momentum, "derivatives", "the derivative by 'gradients.0.* is .*; is something detached?"),
    (detached_number, "derivatives", "the derivative by 'hyperparameters.lr' is 0.0, .*; is something detached?"),
    (unsafe_root, "finite_derivatives", "the derivative by '.* is nan in reverse mode; .* take fo.safe_sqrt"),
    (with_branch, "compiled", f"by torch.compile: it cannot be transformed; mostly because it {VALUES}"),
    (python_count, "compiled", "by torch.compile: it is compiled anew at a later step.* count with a 0-dim tensor"),
]
name_of = lambda make: getattr(make, "__name__", None) or make.func.__name__


def only(name, properties=PROPERTIES):
    return properties.keys() - {name}


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
        patch.setattr(testing.properties.forms, "step", lambda tx, grads, state, params: (params, state))
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


@pytest.mark.parametrize("check", [testing.check_transformation, lambda *of: testing.check_against(of[0], None, of[1])])
@pytest.mark.parametrize(
    ("transformation", "hyperparameters", "message"),
    [
        (fo.sgd, {"rate": 0.1}, "unexpected keyword argument 'rate'"),
        (fo.sgd(0.1), {"lr": 0.1}, r"^sgd\(0.1\) has its hyperparameters already; give what makes it, as in sgd, {"),
        (lambda lr: None, {"lr": 0.1}, "^None is not a GradientTransformation; as in: check_transformation"),
        ("sgd", None, "^'sgd' is not a GradientTransformation"),
    ],
)
def test_what_is_no_transformation(check, transformation, hyperparameters, message):
    """It is the call that is wrong, and no property that does not hold."""
    with pytest.raises(TypeError, match=message):
        check(transformation, hyperparameters)


def test_names_of_properties():
    with pytest.raises(ValueError, match="There is no property 'purity' to skip; known are pure, kept"):
        testing.check_transformation(fo.sgd(0.1), skip={"purity"})
    with pytest.raises(ValueError, match="skip is 'pure'; give a set of names: skip=\\{'pure'\\}"):
        testing.check_transformation(fo.sgd(0.1), skip="pure")
    for name, check in {**PROPERTIES, **OPTIMIZER_PROPERTIES}.items():
        assert f"| `{name}`" in testing.check_transformation.__doc__ + testing.check_optimizer_class.__doc__ or (
            f", `{name}`" in testing.check_transformation.__doc__ + testing.check_optimizer_class.__doc__
        )
        assert check.__doc__


def test_hyperparameters_are_the_floats_of_a_tree():
    subject = testing.Subject(dict, {"lr": 0.1, "betas": (0.9, 0.99), "nesterov": True, "steps": 3})
    assert subject.numbers == {"betas.0": 0.9, "betas.1": 0.99, "lr": 0.1}
    assert subject({"betas.1": 0.5}) == {"lr": 0.1, "betas": (0.9, 0.5), "nesterov": True, "steps": 3}


# Optimizer classes. ---------------------------------------------------------------------------------------------------


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, as one writes it with torch."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.first_lr = lr
        self.all = [p for group in self.param_groups for p in group["params"]]
        self.buffers = {}

    def lr(self, group):
        return group["lr"]

    def buffer(self, p):
        return self.state[p].setdefault("buffer", torch.zeros_like(p))

    def groups(self):
        return self.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.groups():
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, group)
        return loss

    def move(self, p, grad, group):
        buffer = self.buffer(p).mul_(group["momentum"]).add_(grad)
        p.sub_(self.lr(group) * buffer)


class Returning(Momentum):
    def step(self, closure=None):
        return super().step(closure) or "done"


class Deaf(Momentum):
    def lr(self, group):
        return self.first_lr


class Reluctant(Momentum):
    def lr(self, group):
        return (
            group["lr"]
            if self.state[group["params"][0]].setdefault("first", group["lr"]) is None
            else self.state[group["params"][0]]["first"]
        )


class Restless(Momentum):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.all:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return super().step(closure)


class Keeping(Momentum):
    def zero_grad(self, set_to_none=True):
        pass


class Ungraded(Momentum):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step()
        return loss


class Forgetful(Momentum):
    def buffer(self, p):
        return self.buffers.setdefault(id(p), torch.zeros_like(p))


class Sharing(Momentum):
    def __deepcopy__(self, memo):
        made = type(self)([p.detach().clone().requires_grad_() for p in self.all], self.first_lr)
        for old, new in zip(self.all, made.all, strict=True):
            memo[id(old)] = new
        return made


class Fixed(Momentum):
    def groups(self):
        return [
            {**self.param_groups[0], "params": [p for p in group["params"] if p in set(self.all)]}
            for group in (self.param_groups)
        ]


class Undriven(Momentum):
    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, lr, momentum)
        for group in self.param_groups:
            group["rate"] = group.pop("lr")

    def lr(self, group):
        return group["rate"]


class Unrecorded(Momentum):
    def __init__(self, params, lr, momentum=0.9, differentiable=False):
        super().__init__(params, lr, momentum)


WRONG_CLASSES = [
    (lambda params, lr, **_: object(), "interface", "it makes a object"),
    (Returning, "interface", "step\\(\\) returns 'done'"),
    (Momentum, "functional_form", "compared with the functional form the parameter at '0' is .*, and should be"),
    (Deaf, "groups", "with another lr in the second group the parameter at '1'"),
    (Deaf, "edits", "after param_groups have got another lr the parameter at '0'"),
    (Undriven, "schedulers", "it raises KeyError: 'lr'"),
    (Restless, "missing_gradients", "a parameter without a gradient is .*, and should be"),
    (Keeping, "zero_grad", "after zero_grad\\(set_to_none=False\\) a gradient is tensor"),
    (Ungraded, "closure", "called with gradients disabled; use torch.enable_grad"),
    (Forgetful, "saving", "after its state was saved and loaded the parameter at '0' is"),
    (Sharing, "deepcopy", "of the copy the parameter at '0' is"),
    (
        lambda params, **numbers: fo.Optimizer(params, lambda lr, momentum: fo.sgd(lr, momentum), **numbers),
        "pickles",
        "pickle",
    ),
    (Fixed, "add_param_group", "after add_param_group the parameter at '1' is"),
    (Unrecorded, "differentiable", "can't optimize a non-leaf Tensor"),
    # Which begins its buffer with a detached gradient.
    (torch.optim.SGD, "differentiable", "the derivative by 'gradients.0.0' is 0.0, .*; is something detached?"),
]


@pytest.mark.parametrize(
    ("make", "name", "message"), WRONG_CLASSES, ids=[f"{name}-{name_of(make)}" for make, name, _ in WRONG_CLASSES]
)
def test_wrong_classes_are_found(make, name, message):
    skip, numbers = only(name, OPTIMIZER_PROPERTIES), {"lr": 0.1, "momentum": 0.9}
    with pytest.raises(testing.PropertyError, match=message) as caught:
        testing.check_optimizer_class(make, numbers, transformation=lambda lr, momentum: fo.sgd(lr), skip=skip)
    assert caught.value.name == name
    assert {name for _, name, _ in WRONG_CLASSES} == OPTIMIZER_PROPERTIES.keys()


RIGHT_CLASSES = {
    "a class": (Momentum, {"lr": 0.1, "momentum": 0.9}, fo.sgd),
    "the wrapper": (partial(fo.Optimizer, transformation=fo.nadam), {"lr": 0.1, "betas": (0.9, 0.99)}, fo.nadam),
    "ours": (fo.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, fo.adamw),
    "torch's": (torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.9, "eps": 1e-3}, fo.rmsprop),
}


@pytest.mark.parametrize("name", RIGHT_CLASSES)
def test_right_classes_pass(name):
    make, numbers, transformation = RIGHT_CLASSES[name]
    testing.check_optimizer_class(make, numbers, transformation=transformation)


def test_an_optimizer_without_hyperparameters_passes():
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))
    skip = {"schedulers", "add_param_group"}  # a norm over all parameters is not that of two optimizers
    testing.check_optimizer_class(partial(fo.Optimizer, transformation=tx), transformation=lambda: tx, skip=skip)


# References. ----------------------------------------------------------------------------------------------------------


def torchs(p, grads, lr, **options):
    p = p.requires_grad_()
    optimizer = torch.optim.Adam([p], lr=lr, **options)
    for g in grads:
        p.grad = g
        optimizer.step()
        yield p.detach().clone()


def test_a_reference_that_agrees():
    testing.check_against(fo.adam, torchs, {"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": True})


def test_a_reference_for_all_parameters():
    def clipped(params, grads, max_norm):
        for some in grads:
            norm = sum(g.square().sum() for g in some) ** 0.5
            params = [p + g * min(1.0, max_norm / norm) if norm else p for p, g in zip(params, some, strict=True)]
            yield params

    testing.check_against(fo.clip_by_global_norm, clipped, {"max_norm": 0.7}, whole=True)


@pytest.mark.parametrize("numbers", [{"eps": 1.1e-8}, {"betas": (0.9, 0.9990001)}, {"lr": 0.1 + 1e-10}], ids=str)
def test_a_reference_that_is_slightly_different(numbers):
    def different(p, grads, lr):
        return torchs(p, grads, **{"lr": lr, **numbers})

    with pytest.raises(testing.PropertyError, match="after step \\d+ the parameter( '.*')? is .*, and should be"):
        testing.check_against(fo.adam, different, {"lr": 0.1})


def test_a_reference_that_ends_too_early():
    with pytest.raises(testing.PropertyError, match="the reference gives 0 parameters, and none for step 1"):
        testing.check_against(fo.sgd, lambda p, grads, lr: [], {"lr": 0.1})


# Strategies. ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wanted",
    [
        lambda tree: isinstance(tree, testing.strategies.Pair),
        lambda tree: tree == {},
        lambda tree: isinstance(tree, list) and None in tree,
        lambda tree: isinstance(tree, torch.Tensor) and tree.numel() == 0,
        lambda tree: isinstance(tree, torch.Tensor) and not tree.is_contiguous(),
        lambda tree: isinstance(tree, torch.Tensor) and tree.dtype == torch.bfloat16,
    ],
)
def test_trees_of_all_kinds_are_drawn(wanted):
    find(testing.trees(dtypes=[torch.float64, torch.bfloat16], missing=True), wanted)


@given(st.data())
def test_histories_are_like_parameters(data):
    params = data.draw(testing.trees(missing=True))
    history = data.draw(testing.histories(params, 3))
    assert len(history) == 3
    for grads in history:
        like = fo.tree.map(lambda p, g: g is None or (g.shape, g.dtype) == (p.shape, p.dtype), params, grads)
        assert all(is_like in (True, None) for is_like in fo.tree.flatten(like)[0])


@pytest.mark.parametrize(
    "wanted",
    [
        lambda g: g is None,
        lambda g: g is not None and not g.any(),
        lambda g: g is not None and g.abs().max() > 1e3,
        lambda g: g is not None and 0 < g.abs().max() < 1e-2,
    ],
)
def test_histories_of_all_kinds_are_drawn(wanted):
    find(testing.histories(torch.ones(2), 1), lambda history: wanted(history[0]))


@given(testing.hyperparameters({"lr": 0.1, "momentum": 0.9}))
def test_hyperparameters_are_of_any_kind(numbers):
    step = torch.ones((), dtype=torch.float64)
    assert {name: float(fo.at(value, step)) for name, value in numbers.items()} == {"lr": 0.1, "momentum": 0.9}


# Hypothesis is optional. ----------------------------------------------------------------------------------------------


def test_the_library_does_not_import_hypothesis():
    code = "import functorch_optim, sys; assert not {'hypothesis', 'functorch_optim.testing'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("functorch_optim.testing")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("hypothesis"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="functorch_optim.testing needs hypothesis: pip install hypothesis"):
        import functorch_optim.testing  # noqa: F401
