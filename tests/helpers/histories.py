"""Parameters, a history of gradients for them, and the ways to train with it."""

import pytest
import torch

import functorch_optim as fo


def make(count=8):
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(4, 3, dtype=torch.float64, generator=generator), "b": torch.ones(3, dtype=torch.float64)}
    shape = lambda p: torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return params, [fo.tree.map(shape, params) for _ in range(count)]


def by_update(tx, params, state, grads):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


def in_place(tx, params, state, grads):
    return fo.step_(tx, grads, state, params)


def pure(tx, params, state, grads):
    return fo.step(tx, grads, state, params)


forms = pytest.mark.parametrize("take", [by_update, pure, in_place])


def train(take, tx, params, history, state=None):
    params = fo.tree.map(torch.clone, params)
    state = tx.init(params) if state is None else state
    for grads in history:
        params, state = take(tx, params, state, grads)
    return params, state


def optimize(tx, params, history, **options):
    own = [torch.nn.Parameter(p.clone()) for p in params.values()]
    optimizer = fo.Optimizer(own, tx, **options)
    for grads in history:
        give(own, grads)
        optimizer.step()
    return own, optimizer


def give(own, grads):
    for p, g in zip(own, grads.values(), strict=True):
        p.grad = g.clone()
