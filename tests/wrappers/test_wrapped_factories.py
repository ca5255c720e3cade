"""Wrapped factories: they are copied and pickled, look like the factory inside, and messages name the wrapper."""

import copy
import inspect
from functools import partial

import pytest
import torch

import functorch_optim as fo
from functorch_optim.testing._copies import through_pickle


def never(step):
    return step < 0


WRAPPERS = {
    "accumulate": partial(fo.accumulate, every=2),
    "apply_if_finite": fo.apply_if_finite,
    "cast_states": fo.cast_states,
    "cautious": fo.cautious,
    "ema_weights": partial(fo.ema_weights, decay=0.9),
    "gpa": fo.gpa,
    "kahan": fo.kahan,
    "lookahead": partial(fo.lookahead, every=2),
    "mars": fo.mars,
    "master_weights": fo.master_weights,
    "monitor": fo.monitor,
    "offload": fo.offload,
    "polynomial_average": fo.polynomial_average,
    "project": partial(fo.project, projection=fo.projections.nonnegative),
    "quantized": fo.quantized,
    "sam": fo.sam,
    "schedule_free": fo.schedule_free,
    "skip": partial(fo.skip, condition=never),
    "stochastic_rounding": fo.stochastic_rounding,
    "swa": partial(fo.swa, start=1),
}
wrappers = pytest.mark.parametrize("name", WRAPPERS)


def step(opt):
    """Make a step with an ordinary closure, which some wrappers evaluate again."""
    params = opt.param_groups[0]["params"]

    def closure():
        opt.zero_grad()
        loss = sum([p.square().sum() for p in params])
        loss.backward()
        return loss

    opt.step(closure)
    return [p.detach().clone() for p in params]


@wrappers
@pytest.mark.parametrize("copied", [through_pickle, copy.deepcopy])
def test_an_optimizer_of_a_wrapped_factory_is_copied_and_goes_on_alike(name, copied):
    params = [torch.nn.Parameter(torch.tensor([1.0, 2.0]))]
    opt = fo.Optimizer(params, WRAPPERS[name](fo.adamw), lr=0.1)
    step(opt)
    other = copied(opt)
    for _ in range(3):
        assert torch.equal(*step(opt), *step(other))
    assert not torch.equal(params[0], torch.tensor([1.0, 2.0]))


@wrappers
def test_a_wrapped_factory_has_the_name_and_signature_of_what_it_wraps(name):
    factory = WRAPPERS[name](fo.adamw)
    assert factory.__name__ == "adamw"
    assert inspect.signature(factory) == inspect.signature(fo.adamw)
    assert repr(factory).startswith(f"{name}(adamw")


@wrappers
def test_messages_name_the_rules_that_a_wrapper_adds_by_the_wrapper(name):
    tx = fo.adamw(0.1)
    inside = {link.rule.name for link in tx._links}
    names = [link.rule.name for link in WRAPPERS[name](tx)._links]
    assert set(names) <= inside | {name}
    if name != "cast_states":  # which adds none
        assert name in names


def test_what_rounds_parameters_is_refused_inside_by_its_name():
    for name in ("kahan", "master_weights"):
        with pytest.raises(ValueError, match=f"^{name} rounds the parameters, so it goes around other wrappers"):
            fo.schedule_free(WRAPPERS[name](fo.adamw(0.1)))
