"""Optimizers that run a step in one way each, and what must be left of them after a fault."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch_like_cases import parameters

import functorch_optim as fo


def make_params():
    """Parameters that are worked on where they are, some that are copied together, and one that lies otherwise."""
    torch.manual_seed(0)
    tensors = [torch.randn(90, 60), torch.randn(3), torch.randn(()), torch.randn(4, 3).double(), torch.randn(5, 4).t()]
    return [nn.Parameter(tensor) for tensor in tensors]


def in_groups():
    params = make_params()
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]


def whole_tensors():
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10)), fo.clip_by_norm(0.1))


OPTIMIZERS = {
    "native": lambda: fo.optim.Adam(in_groups(), amsgrad=True),
    "native sgd": lambda: fo.optim.SGD(in_groups(), momentum=0.9),
    "blocks": lambda: fo.optim.Adam(in_groups(), fused=False),
    "foreach": lambda: fo.optim.RMSprop(make_params()[:3], momentum=0.9, foreach=True),
    "carried": lambda: fo.optim.NAdam(in_groups()),
    "schedule": lambda: fo.Optimizer(make_params(), fo.chain(fo.clip_by_global_norm(1.0), fo.adam(lambda n: 0.1 / n))),
    "whole tensors": lambda: fo.Optimizer(make_params(), whole_tensors()),
    "whole tree": lambda: fo.Optimizer(make_params(), fo.chain(fo.trace(0.9), fo.reduce_on_plateau(), fo.sgd(0.1))),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
steps_before = pytest.mark.parametrize("before", [0, 1, 4], ids=["first", "second", "steady"])


def give_gradients(optimizer, t):
    generator = torch.Generator().manual_seed(t)
    for p in parameters(optimizer):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def step(optimizer, t, closure=None):
    give_gradients(optimizer, t)
    return optimizer.step(closure or (lambda: torch.tensor(1.0)))


def trained(make, before):
    optimizer = make()
    for t in range(before):
        step(optimizer, t)
    return optimizer


def numbers(optimizer):
    """Copy parameters and states, by name."""
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    found = {f"{i}.p": p.detach().clone() for i, p in enumerate(parameters(optimizer))}
    for i, state in saved.items():
        found.update({f"{i}.{key}": value for key, value in state.items()})
    return fo.state_dict(found)


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def assert_goes_on(optimizer, t=9):
    """What can be seen of an optimizer is all there is: its next steps are those of a copy, which knows no more."""
    twin = copy.deepcopy(optimizer)
    for later in range(t, t + 3):
        for one in (optimizer, twin):
            step(one, later)
        assert_equal(numbers(optimizer), numbers(twin))


@contextmanager
def nothing_changes(optimizer):
    before = numbers(optimizer)
    tensors = [*parameters(optimizer), *[t for state in optimizer.state.values() for t in state.values()]]
    yield
    assert_equal(numbers(optimizer), before)
    now = [*parameters(optimizer), *[t for state in optimizer.state.values() for t in state.values()]]
    assert list(map(id, now)) == list(map(id, tensors))
    assert torch.is_grad_enabled()
    assert_goes_on(optimizer)
