"""Derivatives through training are exact, of first and second order: by parameters, data, state, each hyperparameter.

Where a rule has branches, they are those of the branch taken; test_kinks.py has what they are in between.
"""

from dataclasses import replace

import pytest
import torch
from catalogue import rows
from derivatives import OfVector, begun, continued, differences, error, errors

from functorch_optim.testing._derivatives import check_first_derivatives

starts = pytest.mark.parametrize("start", [begun, continued], ids=lambda start: start.__name__)

# What has derivative zero, besides hyperparameters of which only the first value is used. All else must not.
INACTIVE = {
    begun: {
        "scale_by_radam": {"eps"},  # is rectified from the sixth step on
        "radam": {"eps"},
        "radam_decoupled": {"eps"},
        "ranger": {"eps"},
        "rprop": {"smallest"},
        "lion": {"beta1"},  # of which only a sign depends
        "adafactor_t5": {"eps2"},
        "adafactor_optax": {"d"},
        "adafactor": {"eps1", "eps2"},  # see adafactor_large_eps
        "muon": {"eps"},  # see muon_large_eps
    },
    continued: {
        "scale_by_rprop": {"prev"},  # of which only the sign matters
        "rprop": {"prev"},
        "lion": {"beta1"},
        "adafactor": {"eps1", "eps2"},
        "adafactor_t5": {"eps2"},
        "adafactor_optax": {"d"},
        "muon": {"eps"},
        "lbfgs": {"H_diag", "prev_loss"},  # computed anew in every iteration
        "lbfgs_search": {"H_diag", "prev_loss"},
        "reduce_on_plateau": {"best"},  # is only compared
        "apply_if_finite": {"notfinite_count"},  # a finite gradient sets it to zero
        "prodigy_options": {"d_max"},  # d grows as fast as it may
        "accumulate_clipped": {"mini_step"},  # is only compared, where the sum is taken
        "schedule_free": {"lr_max"},  # to the power of 0
        "schedule_free_adamw": {"lr_max"},
        "schedule_free_sgd": {"lr_max"},  # is less than the rate, which rises
        "schedule_free_corrected": {"lr_max"},
        # What the last update was is written anew.
        "monitor": {"gradients", "grad_norm", "updates", "update_norm", "update_ratio"},
        "monitor_per_layer": {
            *("gradients", "grad_norm", "grad_norms"),
            *("updates", "update_norm", "update_norms", "update_ratio", "update_ratios"),
        },
    },
}
NAMESAKES = {"inject_hyperparams": {"lr", "weight_decay", "eps"}, "inject_hyperparams_chain": {"lr", "max_norm"}}
"""Hyperparameters of which there are others of the same name in the state, which do have a derivative."""
EARLY = {begun: {}, continued: {"zclip": {"max_grad_norm"}}}
"""Hyperparameters that later steps, whose numbers are detached, do not depend on."""
SIGNS = ("lion", "sign_sgd", "signum")  # updates have no derivative by gradients and states
INDEPENDENT = (*SIGNS, "set_to_zero", "scale_by_rprop", "rprop", "scale_by_sign")
"""Transformations whose updates do not depend on where they are made."""


def inactive(row, start):
    """Name what has derivative zero."""
    initial = set(row.initial) - NAMESAKES.get(row.name, set()) if start is continued else set()
    return INACTIVE[start].get(row.name, set()) | initial


def wrong(actual, expected, places, tolerance=1e-6):
    """List the arguments whose derivatives differ."""
    return [f"{path}: {e:.1e}" for path, e in errors(actual, expected, places).items() if not e <= tolerance]


@pytest.mark.sampled(size=8)
@rows
@starts
def test_first_derivatives_equal_finite_differences(row, start):
    function = OfVector(*start(row))
    expected = check_first_derivatives(function, batched=True)
    names = {name for path in function.places for name in path.split(".")[1:]}
    active = {name for path, place in function.places.items() if expected[place].any() for name in path.split(".")[1:]}
    assert names - active == inactive(row, start)


@pytest.mark.sampled(size=8)
@rows
@starts
def test_second_derivatives_equal_finite_differences(row, start):
    function = OfVector(*start(row))
    gradient, places = torch.func.grad(function), function.places
    forward_over_reverse = torch.func.jacfwd(gradient)(function.z)
    expected = differences(gradient, function.z)
    for place in places.values():  # all pairs of arguments: none is hidden by others
        assert wrong(forward_over_reverse[:, place], expected[:, place], places, 2e-5) == []
    reverse_over_reverse = torch.func.jacrev(gradient)(function.z)
    assert error(reverse_over_reverse, forward_over_reverse) < 1e-10


@pytest.mark.sampled
@rows
@starts
def test_a_detached_step_is_noticed(row, start):
    torch.manual_seed(0)
    training, arguments = start(row)
    function = OfVector(training, arguments)
    expected = differences(function, function.z)
    of_kind = {}
    for path, place in function.places.items():
        kind, name = path.split(".")[:2]
        of_kind.setdefault(name if kind == "hyperparameters" else kind, []).append(place)

    def noticed(cut):
        gradient = torch.func.grad(OfVector(replace(training, cut=cut), arguments))(function.z)
        return {kind for kind, places in of_kind.items() if wrong(gradient, expected, dict(enumerate(places)))}

    depends = {"params", "data"} if row.name not in INDEPENDENT else set()
    state = {"state"} & set(of_kind) if row.name not in SIGNS else set()
    assert noticed("updates") >= depends | state
    expected_names = set(row.hyperparameters) - inactive(row, start) - set(row.initial)
    assert noticed("hyperparameters") == expected_names - EARLY[start].get(row.name, set())
