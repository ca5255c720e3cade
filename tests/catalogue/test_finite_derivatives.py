"""Derivatives through training are finite, and right, where units are dead and gradients, parameters or norms zero."""

from dataclasses import replace

import pytest
import torch
from catalogue import CATALOGUE, rows, step
from derivatives import (
    RELU,
    SMOOTH,
    STEPS,
    UNITS,
    OfVector,
    begun,
    continued,
    differences,
    error,
    floats,
    make_network,
    with_numbers,
)

import functorch_optim as fo
from functorch_optim.optimizers import adam
from functorch_optim.testing._derivatives import assert_finite

dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
# Whose means or norms, of which they take a part, are over dead units too; or noise is by place.
MIXING = {row.name for row in CATALOGUE if row.name.startswith(("adafactor", "adam_mini", "came", "monitor"))} | {
    # Dead weights are in norms, and decay at a rate that live ones make.
    *("dog", "ldog", "dowg", "dadapt_adam", "dadapt_sgd", "prodigy_options", "adamp_projected", "sgdp", "fromage"),
    *("lamb", "lars", "lars_nesterov", "adai"),
    *("shampoo", "shampoo_kl", "soap", "soap_normalized"),  # blocks, and weights that decay, are in matrices
    "adaptive_grad_clip",
    "add_noise",
    "cautious",
    "cautious_count",
    "centralize",
    "clip_by_block_rms",
    "dion",
    "muon_polar_express",
    "normuon",
    "orthogonalize_against_params",
    "project",
    "ranger",
    "scale_by_trust_ratio",
    "scion",
    "sophia",
}


def gradient_of(function):
    """Return the gradient, after all derivatives of first and second order have been found finite, in both modes."""
    reverse, forward = assert_finite(function)
    assert torch.func.jacfwd(torch.func.grad(function))(function.z).isfinite().all()
    if all(leaf.dtype == torch.float64 for leaf in function.leaves):
        given = function.of("params", "data", "hyperparameters")
        assert error(forward[given], reverse[given]) < 1e-10
    return reverse


def assert_right(function, gradient, tolerance, h, jumps=()):
    """Assert that a gradient equals finite differences, but by zeros of the state, where it is one-sided."""
    expected = differences(function, function.z, h=h)
    for path, place in function.places.items():
        if not set(path.split(".")) & set(jumps):
            by = function.z[place] != 0 if path.startswith("state") else slice(None)
            assert error(gradient[place][by], expected[place][by]) < tolerance, path


# Dead units: one all the time, one from the third step on; one lives. -------------------------------------------------

DYING = torch.zeros(2 + STEPS, UNITS)
DYING[:, 0] = DYING[2:, 1] = -100.0
# Where Rprop's step is the smallest already, its derivative jumps.
AT_A_CORNER = {"rprop": ("smallest", "step_size")}


def from_the_first_step(row, dtype):
    return begun(row, dtype, loss=RELU, shifts=tuple(DYING[:STEPS].to(dtype)))


def from_a_later_step(row, dtype):
    before, after = DYING.to(dtype).split([2, STEPS])
    return continued(row, dtype, fill=0.0, before=tuple(before), loss=RELU, shifts=tuple(after))


@pytest.mark.sampled(size=8)
@rows
@pytest.mark.parametrize(
    ("dtype", "start"),
    [
        (torch.float64, from_the_first_step),
        (torch.float64, from_a_later_step),
        (torch.float32, from_a_later_step),
    ],
    ids=["first step", "later step", "later step in float32"],
)
def test_with_dead_units(row, dtype, start):
    function = OfVector(*start(row, dtype))
    gradient = gradient_of(function)
    if dtype == torch.float64:
        assert_right(function, gradient, 5e-5, 1e-5, AT_A_CORNER.get(row.name, ()))


@pytest.mark.sampled
@rows
def test_a_dead_unit_changes_no_other_derivative(row):
    training, arguments = begun(row, loss=lambda params, data: RELU(params, {**data, "shift": DYING[0].double()}))
    with_dead = torch.func.grad(training)(arguments)
    hidden, output = arguments["params"]["hidden"], arguments["params"]["output"]
    fewer = {
        "hidden": {"weight": hidden["weight"][:, 1:], "bias": hidden["bias"][1:]},
        "output": {"weight": output["weight"][1:], "bias": output["bias"]},
    }
    alone = torch.func.grad(replace(training, loss=RELU))({**arguments, "params": fewer})
    pairs = [
        (with_dead["params"]["hidden"]["weight"][:, 1:], alone["params"]["hidden"]["weight"]),
        (with_dead["params"]["hidden"]["bias"][1:], alone["params"]["hidden"]["bias"]),
        (with_dead["params"]["output"]["weight"][1:], alone["params"]["output"]["weight"]),
        (with_dead["params"]["output"]["bias"], alone["params"]["output"]["bias"]),
        (with_dead["data"]["x"], alone["data"]["x"]),
        (with_dead["data"]["y"], alone["data"]["y"]),
    ]
    assert (max(error(*pair) for pair in pairs) < 1e-11) == (row.name not in MIXING)


def test_a_root_that_is_not_safe_is_noticed(monkeypatch):
    monkeypatch.setattr(adam, "safe_sqrt", torch.sqrt)
    row = next(row for row in CATALOGUE if row.name == "scale_by_adam")
    function = OfVector(*from_the_first_step(row, torch.float64))
    assert function(function.z).isfinite()
    assert not torch.func.grad(function)(function.z).isfinite().all()


# Everything zero. -----------------------------------------------------------------------------------------------------

# Whose updates jump near zero, or are so steep there that differences cannot tell.
JUMPING = (
    "lion",
    "sign_sgd",
    "signum",
    "adam_atan2",
    "lars",
    "lars_nesterov",
    "adai",
    "scale_by_rprop",
    "rprop",
    "lbfgs",
    "lbfgs_search",
    "autoclip",
    "scale_by_sign",
    "orthogonalize_against_params",
    "add_decayed_weights_cautious",
    "add_decayed_weights_last",
    *("prodigy", "prodigy_options", "dadapt_adam_options"),  # which do not decay before a gradient has come
    *("momo_bounded", "momo_adam_bounded"),  # whose model of the loss has its corner at the smallest loss
    *("soap", "soap_normalized"),  # whose bases are any
    *("sam", "sam_adaptive"),  # whose point of evaluation lies in the direction of the gradient
    *("cautious", "cautious_count"),  # which keep what has the sign of the gradient
)
STEEP = (
    "came_corrected",  # whose means of equal numbers depend on decay rates by rounding
    *("adafactor_epsilon", "dion", "muon", "muon_polar_express", "normuon", "muon_with_adamw", "scion"),
    *("chain", "inject_hyperparams_chain", "partition"),
    "project",  # whose projection rounds, so that later gradients are rounding errors
)


@pytest.mark.sampled(size=12)
@rows
@dtypes
def test_where_the_gradient_is_zero(row, dtype):
    """But its derivative is not: the targets are what the network says."""
    training, arguments = begun(with_numbers(row, eps=1.0), dtype, shifts=(0.0,) * 2)
    (hidden, output), data = arguments["params"].values(), arguments["data"]
    units = torch.tanh(data["x"] @ hidden["weight"] + hidden["bias"])
    data["y"] = units @ output["weight"] + output["bias"]
    grads = torch.func.grad(SMOOTH)(arguments["params"], data)
    assert not any(leaf.any() for leaf in fo.tree.flatten(grads)[0])
    function = OfVector(training, arguments)
    gradient = gradient_of(function)
    if dtype == torch.float64 and row.name not in JUMPING + STEEP:
        assert_right(function, gradient, 1e-3, 1e-6)


@pytest.mark.sampled(size=8)
@rows
@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float64, 1.0), (torch.float32, 0.0)], ids=["float64", "float32 without data"]
)
def test_where_parameters_and_state_are_zero(row, dtype, factor):
    training, arguments = begun(row, dtype, loss=RELU)
    arguments["params"] = fo.tree.map(torch.zeros_like, arguments["params"])
    arguments["data"] = fo.tree.map(lambda leaf: factor * leaf, arguments["data"])
    start = training.make(**arguments["hyperparameters"]).init(arguments["params"])
    gradient_of(OfVector(replace(training, start=start), {**arguments, "state": floats(start)}))


# Extremes. ------------------------------------------------------------------------------------------------------------

SINGULAR = ("shampoo", "shampoo_grafted", "shampoo_kl", "shampoo_one_sided")  # whose roots are infinite
with_eps = [
    row for row in CATALOGUE if row.name not in SINGULAR and any(name.startswith("eps") for name in row.hyperparameters)
]


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("row", with_eps, ids=lambda row: row.name)
def test_where_eps_is_zero(row):
    for start in (begun, continued):
        function = OfVector(*start(with_numbers(row, eps=0.0)))
        gradient = gradient_of(function)
        if row.name.startswith(("adabelief", "sophia")):  # whose differences are small: a step of eps is large
            assert_right(function, gradient, 1e-5, 1e-5, ["eps"])
        elif row.name.startswith("soap"):  # of whose small v the result depends too little for differences
            assert_right(function, gradient, 1e-5, 1e-5, ["exp_avg_sq"])
        elif "adadelta" not in row.name:
            assert_right(function, gradient, 1e-5, 1e-5)
        elif start is continued:  # the first step is zero, and takes the root of eps
            assert_right(function, gradient, 1e-5, 1e-5, ["eps"])


@pytest.mark.sampled
@rows
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e15])
@pytest.mark.parametrize("eps", [1e-3, 1e-8])
def test_where_gradients_are_very_small_or_large(row, size, eps):
    """In float32."""
    row = with_numbers(row, eps=eps)
    if row.name in ("adai", "sam", "sam_adaptive"):  # after a step as long as a gradient, the next would have no square
        row = with_numbers(row, lr=0.1 / max(size, 1.0))

    def quadratic(params, x):
        return size * sum((leaf - 1).square().sum() for leaf in fo.tree.flatten(params)[0])

    def moved(arguments):
        """Take two steps, by gradients that are given but depend on the parameters a little."""
        params, tx = arguments["params"], row(**arguments["hyperparameters"])
        state = tx.init(params)
        for given in arguments["grads"]:
            grads = fo.tree.map(lambda g, p: size * (g + 1e-3 * p), given, params)
            updates, state = step(tx, grads, state, params, objective=quadratic)
            params = fo.apply_updates(params, updates)
        return sum(leaf.sum() for leaf in fo.tree.flatten(params)[0])

    params, *grads = [make_network(torch.float32) for _ in range(3)]
    numbers = {name: torch.tensor(value) for name, value in row.hyperparameters.items()}
    function = OfVector(moved, {"params": params, "grads": grads, "hyperparameters": numbers})
    assert function(function.z).isfinite()
    assert torch.func.grad(function)(function.z).isfinite().all()
