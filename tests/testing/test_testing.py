"""The parts of the test kit: names, references, strategies. What it finds is in test_testing_*.py."""

import builtins
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim.testing import OPTIMIZER_PROPERTIES, PROPERTIES


def test_names_of_properties():
    with pytest.raises(ValueError, match="There is no property 'purity' to skip; known are pure, kept"):
        testing.check_transformation(fo.sgd(0.1), skip={"purity"})
    with pytest.raises(ValueError, match="skip is 'pure'; give a set of names: skip=\\{'pure'\\}"):
        testing.check_transformation(fo.sgd(0.1), skip="pure")
    for explained, properties in (
        (testing.check_transformation, PROPERTIES),
        (testing.check_optimizer_class, OPTIMIZER_PROPERTIES),
    ):
        for name, check in properties.items():
            assert re.search(rf"^ *\|.* `{name}`[, ].*\|", explained.__doc__, re.MULTILINE), name
            assert check.__doc__


def test_calls_that_are_wrong():
    check, zeros = testing.check_transformation, torch.zeros(2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        check(fo.sgd, {"rate": 0.1})
    with pytest.raises(TypeError, match="is no GradientTransformation; give one, .* is for check_optimizer_class"):
        check(torch.optim.SGD, {"params": [zeros], "lr": 0.1})
    with pytest.raises(TypeError, match="params is a dict; give a hypothesis strategy, .*just\\(tree\\)"):
        check(fo.sgd(0.1), params={"w": zeros})
    with pytest.raises(TypeError, match="The strategy params draws torch.float32 at 'w'; give float64"):
        testing.check_against(fo.sgd(0.1), lambda p, grads: grads, params=st.just({"w": zeros}))


def test_hyperparameters_are_the_floats_of_a_tree():
    subject = testing.Subject(dict, {"lr": 0.1, "betas": (0.9, 0.99), "nesterov": True, "steps": 3})
    assert subject.numbers == {"betas.0": 0.9, "betas.1": 0.99, "lr": 0.1}
    assert subject.given({"betas.1": 0.5}) == {"lr": 0.1, "betas": (0.9, 0.5), "nesterov": True, "steps": 3}


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


@pytest.mark.sampled(size=2)
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


# Hypothesis is optional, and torch's compiler takes seconds to import. ------------------------------------------------


def test_neither_import_nor_a_step_imports_hypothesis_or_the_compiler():
    code = """
import sys, torch
assert "torch._dynamo" not in sys.modules
import functorch_optim as fo
params, tx = {"w": torch.ones(2)}, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
fo.step(tx, params, tx.init(params), params)
assert not {"hypothesis", "functorch_optim.testing", "torch._dynamo", "sympy"} & sys.modules.keys()
"""
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
