"""Modules of every kind, and transformations of a learning rate, for the tests of the inner loop."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import functorch_optim as fo

F64 = torch.float64


class Tied(nn.Module):
    """A language model whose output layer is its embedding, and whose inner layer is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.first = nn.Linear(3, 3)
        self.second = self.first  # one submodule of two names
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight  # one parameter of two names

    def forward(self, x):
        words = x.argmax(-1)
        return self.output(self.second(torch.tanh(self.first(self.embedding(words) * x.sum(-1, keepdim=True)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 5)

    def forward(self, x):
        return self.layer(x)[0]


class Centered(nn.Module):
    """A buffer that is computed with and changed in place, with a graph from call to call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.register_buffer("mean", torch.ones(5))

    def forward(self, x):
        hidden = self.layer(x)
        self.mean.mul_(0.5).add_(hidden.mean(0))
        return hidden * self.mean


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), nn.Tanh()), "head": nn.Linear(4, 5)})
        self.register_parameter("scale", nn.Parameter(torch.ones(())))

    def forward(self, x, shift=0.0):
        return self.parts["head"](self.parts["body"](x)) * self.scale + shift


def frozen_part():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    model[0].requires_grad_(False)
    return model


MODULES = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)),
    "nested": Nested,
    "batch_norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 5)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 5)),
    "tied": Tied,
    "frozen": frozen_part,
    "recurrent": Recurrent,
    "parametrized": lambda: nn.utils.parametrize.register_parametrization(nn.Linear(3, 5), "weight", nn.Softplus()),
    "centered": Centered,
}


def make(name="plain", device="cpu"):
    return MODULES[name]().to(device, F64)


def muon(lr):
    hidden = fo.muon(lr, ns_dtype=None)
    return fo.partition({True: hidden, False: fo.sgd(lr)}, lambda p: fo.tree.map(lambda p: p.ndim == 2, p))


TRANSFORMATIONS = {
    "sgd": fo.sgd,
    "momentum": lambda lr: fo.sgd(lr, momentum=0.9),
    "adam": lambda lr: fo.adam(lr, eps=1e-3),
    "amsgrad": lambda lr: fo.adam(lr, eps=1e-3, amsgrad=True),
    "clipped": lambda lr: fo.chain(fo.clip_by_global_norm(0.3), fo.adamw(lr, eps=1e-3, weight_decay=0.1)),
    "muon": muon,
    "rmsprop": lambda lr: fo.rmsprop(lr, eps=1e-3, centered=True, momentum=0.9),
}


class Task(NamedTuple):
    """A regression problem: what to adapt to, and what the outer loss is computed on."""

    x: torch.Tensor
    y: torch.Tensor
    outer_x: torch.Tensor
    outer_y: torch.Tensor


def make_task(seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return Task(*[torch.randn(4, size, dtype=F64, generator=generator).to(device) for size in (3, 5, 3, 5)])


def loss_fn(output, y):
    return (output - y).square().mean()


def adapt(inner, steps=3):
    for _ in range(steps):
        inner.step(loss_fn(inner(TASK.x), TASK.y))


def adapted(module, tx=None, **options):
    with fo.meta.inner_loop(module, tx or fo.adam(0.05), **options) as inner:
        adapt(inner)
    return inner


def outer_loss(inner):
    return loss_fn(inner(TASK.outer_x), TASK.outer_y)


TASK = make_task()
modules = pytest.mark.parametrize("name", MODULES)
transformations = pytest.mark.parametrize("tx", TRANSFORMATIONS)
modes = pytest.mark.parametrize("options", [{}, {"first_order": True}, {"differentiable": False}], ids=str)
