"""Gradients, parameters, states and optimizers die with their last reference; no cyclic collector is needed."""

import gc
import weakref

import pytest
import torch
from torch import nn

import functorch_optim as fo


@pytest.fixture(autouse=True)
def _no_collector():
    """Let only counts of references free anything."""
    gc.disable()
    yield
    gc.enable()


def clipped(lr=0.1):
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr))


OPTIMIZERS = {
    "native": lambda params: fo.optim.Adam(params, lr=0.1),
    "native, decoupled": lambda params: fo.optim.AdamW(params, lr=0.1),
    "sgd": lambda params: fo.optim.SGD(params, lr=0.1, momentum=0.9),
    "blocks": lambda params: fo.optim.NAdam(params, foreach=False),
    "foreach": lambda params: fo.optim.NAdam(params, foreach=True),
    "factory": lambda params: fo.Optimizer(params, clipped, lr=0.1),
    "chain": lambda params: fo.Optimizer(params, clipped()),
    "whole tensors": lambda params: fo.Optimizer(params, fo.chain(fo.adam(0.1), fo.clip_by_norm(0.1))),
    "whole tree": lambda params: fo.Optimizer(
        params, fo.chain(fo.sgd(0.1, momentum=0.9), fo.stateless(lambda u, p: u))
    ),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def make_params():
    return [nn.Parameter(torch.ones(shape)) for shape in ((300, 200), (3,))]


def give_gradients(params):
    for p in params:
        p.grad = torch.ones_like(p.detach())
    return [weakref.ref(p.grad) for p in params]


def alive(refs):
    return [ref() for ref in refs if ref() is not None]


@each_optimizer
def test_gradients_are_not_kept(make):
    params = make_params()
    optimizer = make(params)
    for _ in range(4):
        grads = give_gradients(params)
        optimizer.step()
        optimizer.zero_grad()
        assert not alive(grads)


@each_optimizer
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
def test_an_optimizer_dies_with_its_last_reference(make, scheduled):
    """And with it its states, and parameters that nothing else holds."""
    params = make_params()
    optimizer = make(params)
    scheduler = (
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled and "lr" in optimizer.defaults else None
    )
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert states
    refs = [weakref.ref(one) for one in (optimizer, *params, *states)]
    del params, optimizer, scheduler, states
    assert not alive(refs)


@each_optimizer
def test_states_that_are_replaced_die(make):
    params = make_params()
    optimizer = make(params)
    for _ in range(3):
        give_gradients(params)
        optimizer.step()
    old = [weakref.ref(v) for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    optimizer.state.clear()
    give_gradients(params)
    optimizer.step()
    assert not alive(old)


TRANSFORMATIONS = {
    "adam": lambda: fo.adam(0.1),
    "sgd": lambda: fo.sgd(0.1, momentum=0.9),
    "nadam": lambda: fo.nadam(0.1),
    "clipped": clipped,
    "whole tensors": lambda: fo.chain(fo.adam(0.1), fo.clip_by_norm(0.1)),
    "whole tree": lambda: fo.chain(fo.sgd(0.1, momentum=0.9), fo.stateless(lambda u, p: u)),
    "masked": lambda: fo.masked(fo.adam(0.1), lambda params: [p.ndim > 1 for p in params]),
    "numbers for each": lambda: fo.sgd([0.1, 0.2], momentum=0.9),
}


def updated(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


def by_foreach(tx, grads, state, params):
    return fo.step_(tx, grads, state, params, foreach=True)


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("step", [updated, fo.step, fo.step_, by_foreach])
@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_a_transformation_keeps_no_tensors(make, step, recorded):
    tx = make()
    params = [p.detach() for p in make_params()]
    state = tx.init(params)
    refs = []
    with torch.set_grad_enabled(recorded):
        for _ in range(4):
            grads = [torch.ones_like(p) for p in params]
            tensors = [*grads, *params, *fo.tree.flatten(state)[0]]
            refs += [weakref.ref(one) for one in tensors]
            params, state = step(tx, grads, state, params)
            del grads, tensors
    refs += [weakref.ref(one) for one in (*params, *fo.tree.flatten(state)[0])]
    del params, state
    assert not alive(refs)
