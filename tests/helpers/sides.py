"""Runs over single tensors, for optimizers with a matrix for each side."""

import numpy as np
import torch

import functorch_optim as fo
from functorch_optim.testing._derivatives import error

STEPS = 7


def make_run(shape, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=shape), [random.normal(size=shape) for _ in range(STEPS)]


def along(x, matrix, dim):
    return np.moveaxis(np.tensordot(matrix, x, axes=(1, dim)), 0, dim)


def second_moment(x, dim):
    unfolded = np.moveaxis(x, dim, 0).reshape(x.shape[dim], -1)
    return unfolded @ unfolded.T


def trained(tx, p, grads):
    state = tx.init(p)
    for g in grads:
        p, state = fo.step(tx, g, state, p)
    return p


def deviation(some, others):
    return max(np.abs(a - b).max() for a, b in zip(some, others, strict=True))


def error_of_batches(tx, shape):
    """Compare runs under torch.vmap with the same runs one by one."""
    runs = [make_run(shape, seed) for seed in range(3)]
    p = torch.stack([torch.tensor(p) for p, _ in runs])
    grads = torch.stack([torch.stack([torch.tensor(g) for g in grads]) for _, grads in runs])
    one_by_one = torch.stack([trained(tx, *some) for some in zip(p, grads, strict=True)])
    return error(torch.vmap(lambda p, grads: trained(tx, p, grads))(p, grads), one_by_one)


def error_of_compiled_steps(tx, shape):
    """Compare steps that are compiled whole with eager ones."""
    p, grads = make_run(shape)
    compiled = torch.compile(lambda g, state, p: fo.step(tx, g, state, p), backend="eager", fullgraph=True)
    q, state = torch.tensor(p), tx.init(torch.tensor(p))
    for g in grads:
        q, state = compiled(torch.tensor(g), state, q)
    return error(q, trained(tx, torch.tensor(p), list(map(torch.tensor, grads))))
