"""Hooks, subclasses, and the step as a method that others patch: as with torch.optim."""

import copy
import inspect

import pytest
import torch
from hooks import calls_of_hooks
from torch_like_cases import MODULES, assert_same, each, make_pair, make_params, parameters, train

# Hooks. ---------------------------------------------------------------------------------------------------------------


@each
def test_hooks(name):
    """Called in torch's order, with torch's arguments, and gone when their handles are removed."""
    ours, theirs = [calls_of_hooks(optimizer) for optimizer in make_pair(name)]
    assert ours == theirs


@each
def test_hooks_that_change_what_they_see(name):
    pair = make_pair(name)
    results = []
    for optimizer in pair:
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: "changed"), {}))
        optimizer.register_state_dict_post_hook(lambda optimizer, saved: {"wrapped": saved})
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, saved: saved["wrapped"])
        results.append(optimizer.step())
    assert results == ["changed"] * 2
    train(pair)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in pair]
    train(pair)
    for optimizer, state in zip(pair, saved[::-1], strict=True):
        assert list(state) == ["wrapped"]
        optimizer.load_state_dict(state)
    train(pair)
    # Loaded for float64, eta and mu are; torch.optim.ASGD goes on to round them to float32.
    assert_same(*pair, 1e-8 if name == "ASGD" else 1e-12)


def test_hooks_that_return_nonsense():
    errors = []
    for optimizer in make_pair("Adam"):
        optimizer.register_step_pre_hook(lambda *args: "nonsense")
        with pytest.raises(RuntimeError, match="must return None or a tuple") as caught:
            optimizer.step()
        errors.append(str(caught.value).split("must return")[1])
    assert errors[0] == errors[1]


# Subclasses. ----------------------------------------------------------------------------------------------------------


@each
def test_subclasses(name):
    """Users' classes that do something around the step."""

    def subclass(module):
        class Mine(getattr(module, name)):
            def __init__(self, params, **options):
                super().__init__(params, **options)
                self.steps = 0

            def step(self, closure=None):
                loss = super().step(closure)
                self.steps += 1
                return loss, self.steps

        return Mine

    pair = tuple([subclass(module)(make_params(name)) for module in MODULES])
    for p, q in zip(*map(parameters, pair), strict=True):
        p.data = q.data.clone()
    calls = [[], []]
    for optimizer, seen in zip(pair, calls, strict=True):
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs, seen=seen: seen.append("pre"))
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs, seen=seen: seen.append("post"))
        assert optimizer.step(lambda: "loss") == ("loss", 1)
    # torch.optim's own count depends on whether its class has been used before: so here too
    assert {len(seen) for seen in calls} <= {2, 4}
    train(pair)
    assert_same(*pair)
    assert pair[0].steps == pair[1].steps == 6
    assert repr(pair[0]) == repr(pair[1])


@each
def test_hooks_of_subclasses(name):
    """Twice when the class itself has been used before, as torch.optim's."""
    counts = []
    for module in MODULES:
        base = getattr(module, name)
        base(make_params(name))

        class Mine(base):
            def step(self, closure=None):
                return super().step(closure)

        optimizer = Mine(make_params(name))
        seen = []
        optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append("pre"))
        optimizer.step()
        counts.append(len(seen))
    assert counts[0] == counts[1]


@each
def test_step_is_a_bound_method_with_a_profile_record(name):
    optimizer = make_pair(name)[0]
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__self__ is optimizer
    train([optimizer], 1)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"} <= names
