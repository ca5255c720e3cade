"""A model, and optimizers for it: fo.Optimizer and torch's; training them alike, and comparing them."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn, optim

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file, through_pickle

LATE = 20  # the step at which the parameter `late` gets its first gradient


class Model(nn.Module):
    """Parameters of every kind: matrix, vector, 0-dim, empty, with gaps between the elements, complex."""

    def __init__(self, device="cpu"):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def randn(*shape, dtype=torch.float64):
            return torch.randn(shape, dtype=dtype, generator=generator).to(device)

        self.weight = nn.Parameter(randn(4, 3))
        self.bias = nn.Parameter(randn(2))
        self.scale = nn.Parameter(randn())
        self.empty = nn.Parameter(randn(0, 3))
        self.strided = nn.Parameter(randn(4, 4)[:, ::2])
        self.waves = nn.Parameter(randn(3, dtype=torch.complex128))
        self.late = nn.Parameter(randn(3))

    def forward(self, x):
        hidden = torch.tanh(x @ self.weight.T) @ self.strided
        real = torch.sin(hidden + self.bias) * self.scale.cos() + self.empty.sum()
        return real.mean() + torch.view_as_real(self.waves * x).sin().mean() + (self.late * x).sin().mean()


def backward(model, t, missing=True):
    """Compute the gradients of step t. Some are missing, all of them at step 30."""
    model.zero_grad()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t)).to(model.weight.device)
    loss = model(x)
    loss.backward()
    for i, (name, p) in enumerate(model.named_parameters()):
        if missing and ((t + i) % 5 == 0 or (name == "late" and t < LATE) or t == 30):
            p.grad = None
    return loss


class Base(NamedTuple):
    """An optimizer here, the same in torch, the hyperparameters of all groups, and those of the second."""

    factory: Callable[..., fo.GradientTransformation]
    reference: type[optim.Optimizer]
    hyperparameters: dict[str, Any]
    override: dict[str, Any]


SGD = Base(fo.sgd, optim.SGD, {"lr": 0.1}, {"lr": 0.02, "momentum": 0.7, "weight_decay": 0.1})
ADAM = Base(fo.adam, optim.Adam, {"lr": 0.05}, {"betas": (0.8, 0.95), "eps": 1e-3, "amsgrad": True})
ADAMW = ADAM._replace(factory=fo.adamw, reference=optim.AdamW)
ADADELTA = Base(fo.adadelta, optim.Adadelta, {}, {"lr": 0.3, "rho": 0.6, "eps": 1e-3, "weight_decay": 0.1})


def make_both(device, base, **hyperparameters):
    """Make two models alike, one with our optimizer and one with torch's: two pairs of model and optimizer."""

    def make(optimizer):
        model = Model(device)
        params = list(model.parameters())
        given = copy.deepcopy({**base.hyperparameters, **hyperparameters})  # some schedulers write into tensors
        groups = [{"params": params[::2]}, {"params": params[1::2], **copy.deepcopy(base.override)}]
        return model, optimizer(groups, **given)

    return make(partial(fo.Optimizer, transformation=base.factory)), make(base.reference)


assert_close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def assert_same(ours, reference):
    """Compare parameters, all that torch keeps in its state, and all hyperparameters."""
    (model, optimizer), (reference_model, reference_optimizer) = ours, reference
    for p, q in zip(model.parameters(), reference_model.parameters(), strict=True):
        assert_close(p, q)
        kept = dict(reference_optimizer.state.get(q, {}))
        assert_close({key: optimizer.state[p][key] for key in kept}, kept)
    for group, reference_group in zip(optimizer.param_groups, reference_optimizer.param_groups, strict=True):
        common = group.keys() & reference_group.keys() - {"params"}
        assert {name: group[name] for name in common} == {name: reference_group[name] for name in common}


def train(pairs, steps):
    """Train models alike."""
    for t in steps:
        for model, optimizer in pairs:
            backward(model, t)
            optimizer.step()


def make_vectors(device, *values):
    """Make parameters whose gradients are ones."""
    params = [nn.Parameter(torch.tensor(value, dtype=torch.float64, device=device)) for value in values]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def summing():
    """Make a function of the whole tree: updates are the sums of all gradients so far."""

    def update(updates, state, params):
        state = fo.tree.map(lambda m, g: m if g is None else m + g, state, updates)
        return fo.tree.map(lambda g, m: m, updates, state), state

    return fo.GradientTransformation(lambda params: fo.tree.map(torch.zeros_like, params), update)


# Copies. --------------------------------------------------------------------------------------------------------------


def load_into_new(pair, make):
    """Save model and optimizer, and load them into new ones."""
    new_pair = make()
    for new, old in zip(new_pair, pair, strict=True):
        new.load_state_dict(through_a_file(old.state_dict()))
    return new_pair


COPIES = {
    "deepcopy": lambda pair, make: copy.deepcopy(pair),
    "pickle": lambda pair, make: through_pickle(pair),
    "state_dict": load_into_new,
}
each_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


def assert_copy_trains_on_by_itself(make, make_copy):
    """Train, copy, train the copy on, then the original: the same numbers, and neither touches the other."""
    pair = make()
    train([pair], range(25))
    twin, frozen = make_copy(pair, make), copy.deepcopy(pair)
    train([twin], range(25, 32))
    assert_same(pair, frozen)
    train([pair], range(25, 32))
    assert_same(pair, twin)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(pair, frozen)
