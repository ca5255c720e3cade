"""Optimizers that torch.optim has not, against their papers' formulas in numpy, and against independent packages."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from formulas_of_trees import (
    adamp,
    cocob,
    dadapt_adam,
    dadapt_sgd,
    dog,
    dowg,
    fromage,
    ldog,
    madgrad,
    make_run,
    momo,
    momo_adam,
    novograd,
    polyak,
    prodigy,
    sgdp,
    sm3,
)

import functorch_optim as fo

# Running both. --------------------------------------------------------------------------------------------------------


def tensors(arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def declares_value(tx):
    return any("value" in link.rule.extras.names for link in tx._links)


def ours(name, run, **numbers):
    """Run the functional form."""
    tx, params = getattr(fo, name)(**numbers), tensors(run.params)
    state = tx.init(params)
    for grads, loss in zip(run.grads, run.losses, strict=True):
        extra = {"value": torch.tensor(loss, dtype=torch.float64)} if declares_value(tx) else {}
        params, state = fo.step(tx, tensors(grads), state, params, **extra)
        yield params


def stateful(name, run, **numbers):
    """Run the stateful form, with closures."""
    params = [torch.nn.Parameter(p) for p in tensors(run.params)]
    optimizer = fo.Optimizer(params, getattr(fo, name), **numbers)
    yield from steps_of(optimizer, params, run)


def steps_of(optimizer, params, run, **options):
    for grads, loss in zip(run.grads, run.losses, strict=True):

        def closure(grads=grads, loss=loss):
            for p, g in zip(params, tensors(grads), strict=True):
                p.grad = g.to(p.dtype)
            return torch.tensor(loss, dtype=torch.float64)

        optimizer.step(closure, **options)
        yield [p.detach().clone() for p in params]


def deviation(left, right):
    """Compare all steps, relative to the size of each parameter."""
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1.0)) for a, b in pairs
    )


class Case(NamedTuple):
    """An optimizer, its formula, and options of both."""

    name: str
    formula: Any
    numbers: dict[str, Any] = {}  # noqa: RUF012

    def __repr__(self):
        return "-".join([self.name, *map(str, self.numbers)])


FREE = {"d0": 1e-2}
CASES = [
    Case("prodigy", prodigy),
    Case("prodigy", prodigy, {**FREE, "weight_decay": 0.1, "lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}),
    Case("prodigy", prodigy, {**FREE, "use_bias_correction": True, "beta3": 0.7, "d_coef": 2.0}),
    Case("prodigy", prodigy, {**FREE, "safeguard_warmup": True, "growth_rate": 1.02, "lr": 0.3}),
    Case("prodigy", prodigy, {"d0": 1e-1, "betas": (0.0, 0.5), "d_coef": 0.5}),
    Case("dadapt_adam", dadapt_adam),
    Case("dadapt_adam", dadapt_adam, {**FREE, "weight_decay": 0.1, "betas": (0.8, 0.9), "growth_rate": 1.02}),
    Case(
        "dadapt_adam",
        dadapt_adam,
        {**FREE, "weight_decay": 0.1, "use_bias_correction": True, "decoupled_weight_decay": True},
    ),
    Case("dadapt_sgd", dadapt_sgd),
    Case("dadapt_sgd", dadapt_sgd, {**FREE, "momentum": 0.9, "weight_decay": 0.1, "growth_rate": 1.02, "lr": 0.5}),
    Case("dog", dog),
    Case("dog", dog, {"lr": 0.5, "eps": 0.1, "reps_rel": 0.1, "weight_decay": 0.1}),
    Case("ldog", ldog),
    Case("ldog", ldog, {"lr": 0.5, "eps": 0.1, "reps_rel": 0.1, "weight_decay": 0.1}),
    Case("dowg", dowg),
    Case("dowg", dowg, {"lr": 0.5, "eps": 0.1, "d0_squared": 0.1, "weight_decay": 0.1}),
    Case("polyak", polyak),
    Case("polyak", polyak, {"max_lr": 10.0, "f_min": 1.0, "c": 0.5, "eps": 0.1}),
    Case("polyak", polyak, {"max_lr": 10.0, "f_min": 1.0, "variant": "sps+"}),
    Case("momo", momo),
    Case("momo", momo, {"lr": 0.2, "beta": 0.5, "weight_decay": 0.1, "lb": 0.1}),
    Case("momo_adam", momo_adam),
    Case("momo_adam", momo_adam, {"lr": 0.2, "betas": (0.5, 0.9), "eps": 0.1, "weight_decay": 0.1, "lb": 0.1}),
    Case("cocob", cocob),
    Case("cocob", cocob, {"lr": 0.5, "alpha": 1.5, "eps": 0.1, "weight_decay": 0.1}),
    Case("madgrad", madgrad),
    Case("madgrad", madgrad, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1, "eps": 0.1}),
    Case("madgrad", madgrad, {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("madgrad", madgrad, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Case("novograd", novograd),
    Case("novograd", novograd, {"lr": 0.1, "betas": (0.9, 0.5), "eps": 0.1, "weight_decay": 0.1}),
    Case("novograd", novograd, {"lr": 0.1, "grad_averaging": True}),
    Case("sm3", sm3),
    Case("sm3", sm3, {"lr": 0.5, "momentum": 0.5, "eps": 0.1, "weight_decay": 0.1}),
    Case("adamp", adamp),
    Case("adamp", adamp, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "delta": 1.0}),
    Case("adamp", adamp, {"lr": 0.1, "weight_decay": 0.1, "delta": 0.8, "wd_ratio": 0.5, "nesterov": True}),
    Case("sgdp", sgdp),
    Case("sgdp", sgdp, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "delta": 1.0}),
    Case("sgdp", sgdp, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "delta": 0.8, "nesterov": True}),
    Case("fromage", fromage),
    Case("fromage", fromage, {"lr": 0.5, "min_norm": 1.5}),
]
cases = pytest.mark.parametrize("case", CASES, ids=repr)


@cases
def test_every_step_is_that_of_the_formula(case):
    run = make_run()
    expected = list(case.formula(run, **case.numbers))
    assert deviation(ours(case.name, run, **case.numbers), expected) < 1e-12
    assert deviation(stateful(case.name, run, **case.numbers), expected) < 1e-12


@cases
def test_steps_without_gradients_are_those_of_the_formula(case):
    run = make_run(zeros=2)
    with np.errstate(all="raise", under="ignore"):
        expected = list(case.formula(run, **case.numbers))
    assert deviation(ours(case.name, run, **case.numbers), expected) < 1e-12


@cases
def test_the_comparison_with_the_formula_can_fail(case):
    run = make_run()
    rate = "max_lr" if case.name == "polyak" else "lr"
    changed = {"prodigy": {"d0": 0.3}, "polyak": {"f_min": 0.4}, "momo": {"lb": 0.5}, "momo_adam": {"lb": 5.0}}
    numbers = {**case.numbers, **changed.get(case.name, {rate: 0.7})}
    assert deviation(ours(case.name, run, **numbers), list(case.formula(run, **case.numbers))) > 1e-6


# Independent packages. ------------------------------------------------------------------------------------------------

PACKAGES = [
    ("prodigyopt", "Prodigy", "prodigy", {**FREE, "weight_decay": 0.1}, {}),
    ("prodigyopt", "Prodigy", "prodigy", {"use_bias_correction": True, "safeguard_warmup": True, "d_coef": 2.0}, {}),
    ("prodigyopt", "Prodigy", "prodigy", {**FREE, "growth_rate": 1.02, "betas": (0.8, 0.9), "beta3": 0.7}, {}),
    ("prodigyopt", "Prodigy", "prodigy", {**FREE, "betas": (0.0, 0.9)}, {}),
    ("dadaptation", "DAdaptAdam", "dadapt_adam", {**FREE, "weight_decay": 0.1, "use_bias_correction": True}, {}),
    ("dadaptation", "DAdaptSGD", "dadapt_sgd", {**FREE, "momentum": 0.9}, {}),
    ("dog", "DoG", "dog", {"reps_rel": 0.1}, {}),
    ("dog", "LDoG", "ldog", {"reps_rel": 0.1}, {}),
    ("momo", "Momo", "momo", {"lr": 0.2, "weight_decay": 0.1}, {}),
    ("momo", "MomoAdam", "momo_adam", {"lr": 0.2, "weight_decay": 0.1}, {}),
    ("pytorch_optimizer", "MADGRAD", "madgrad", {"lr": 0.1, "weight_decay": 0.1}, {"weight_decouple": False}),
    # It adds eps before the correction, where the authors add it after: small enough not to matter.
    ("pytorch_optimizer", "AdamP", "adamp", {"lr": 0.1, "weight_decay": 0.1, "delta": 0.8, "eps": 1e-14}, {}),
    ("pytorch_optimizer", "SGDP", "sgdp", {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "delta": 0.8}, {}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("package", "cls", "name", "numbers", "options"), PACKAGES)
def test_every_step_is_that_of_an_independent_package(package, cls, name, numbers, options):
    module = pytest.importorskip(package, reason=f"{package} is not installed")
    run = make_run(shapes=[(4, 3), (3,), (2, 3, 2)])
    params = [torch.nn.Parameter(p) for p in tensors(run.params)]
    with torch.enable_grad():
        theirs = list(steps_of(getattr(module, cls)(params, **numbers, **options), params, run))
    assert deviation(ours(name, run, **numbers), theirs) < 1e-6


# What numbers of the whole tree promise. ------------------------------------------------------------------------------

OF_TREE = {
    "prodigy": ["d", "d_max", "d_numerator", "k"],
    "dadapt_adam": ["d", "numerator_weighted", "k"],
    "dadapt_sgd": ["d", "numerator_weighted", "g0_norm"],
    "dog": ["rbar", "G"],
    "dowg": ["r2", "v"],
    "momo": ["loss_avg", "grad_dot_w"],
    "momo_adam": ["loss_avg", "grad_dot_w"],
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", OF_TREE)
def test_numbers_of_the_tree_are_kept_in_float64(name, dtype):
    run = make_run()
    tx, params = getattr(fo, name)(), tensors(run.params, dtype)
    state = tx.init(params)
    for grads, loss in zip(run.grads, run.losses, strict=True):
        extra = {"value": loss} if declares_value(tx) else {}
        params, state = fo.step(tx, tensors(grads, dtype), state, params, **extra)
    for number in OF_TREE[name]:
        found = fo.tree.get(state, number)
        assert found.dtype == torch.float64
        assert found.shape == ()
        assert bool(torch.isfinite(found))


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adam", "dog", "dowg"])
def test_a_parameter_whose_gradients_come_late_takes_the_numbers_of_the_tree(name):
    run = make_run()
    params = [torch.nn.Parameter(p) for p in tensors(run.params)]
    optimizer = fo.Optimizer(params, getattr(fo, name))
    number = OF_TREE[name][0]
    for step, grads in enumerate(run.grads):
        for i, (p, g) in enumerate(zip(params, tensors(grads), strict=True)):
            p.grad = None if i == 1 and (step < 3 or step == 7) else g
        optimizer.step()
        there = [optimizer.state[p][number] for i, p in enumerate(params) if p.grad is not None]
        assert all(torch.equal(value, there[0]) for value in there)


@pytest.mark.parametrize("name", OF_TREE)
def test_a_tree_of_values_that_numbers_of_the_tree_depend_on_is_an_error(name):
    tree_of_values = {"dog": "reps_rel", "dowg": "d0_squared"}.get(name, "lr")
    with pytest.raises(TypeError, match="one number is needed for all parameters"):
        getattr(fo, name)(**{tree_of_values: [0.1, 0.2]})


@pytest.mark.parametrize("name", ["polyak", "momo", "momo_adam"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(torch.ones(2), ValueError, "take the mean or sum"), ("low", TypeError, "value must be a loss, a 0-dim tensor")],
)
def test_a_value_that_is_no_loss_is_an_error(name, value, error, message):
    tx, params = getattr(fo, name)(), torch.ones(2)
    with pytest.raises(error, match=message):
        tx.update(torch.ones(2), tx.init(params), params, value=value)
    with pytest.raises(TypeError, match="needs the extra 'value'"):
        tx.update(torch.ones(2), tx.init(params), params)


@pytest.mark.parametrize("name", ["sm3", "adamp", "sgdp"])
def test_complex_parameters_are_refused(name):
    with pytest.raises(TypeError, match="does not support complex parameters"):
        getattr(fo, name)().init(torch.ones(2, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["prodigy", "dadapt_sgd", "dog", "dowg"])
def test_sparse_gradients_are_refused(name):
    tx, params = getattr(fo, name)(), torch.ones(3, 2)
    sparse = torch.sparse_coo_tensor([[1]], [[5.0, 1.0]], (3, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        tx.update(sparse, tx.init(params), params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cocob_stays_where_no_gradient_has_come_in_half_precision(dtype):
    """eps is zero in float16."""
    tx, params = fo.cocob(), torch.tensor([1.0, 2.0], dtype=dtype)
    state = tx.init(params)
    for _ in range(3):
        params, state = fo.step(tx, torch.tensor([1.0, 0.0], dtype=dtype), state, params)
    assert params[0] < 1
    assert params[1] == 2


def test_at_a_learning_rate_of_zero_prodigy_stands_still():
    tx = fo.prodigy(lambda count: (count > 0) * 1.0, d0=0.1)
    params = torch.ones(2, dtype=torch.float64)
    updates, state = tx.update(torch.ones(2, dtype=torch.float64), tx.init(params), params)
    assert torch.equal(updates, torch.zeros_like(params))
    assert float(fo.tree.get(state, "k")) == 0.0
    assert torch.equal(fo.tree.get(state, "exp_avg_sq"), torch.zeros_like(params))


def test_numbers_of_a_device_without_float64_are_kept_on_the_cpu():
    from functorch_optim._numerics import wide_device

    assert wide_device(torch.device("mps", 0)) == torch.device("cpu")
    assert wide_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
