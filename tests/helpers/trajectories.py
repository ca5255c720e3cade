"""Trajectories of optimizers over given gradients, of ours and of formulas in numpy."""

import numpy as np
import torch

import functorch_optim as fo

STEPS = 12
SHAPES = ((4, 3), (3,), (), (4, 2, 3), (3, 3))


def problem(shapes=SHAPES, steps=STEPS, zeros=(), seed=0):
    """Draw parameters, and gradients of several magnitudes for each step, some of them zero: lists of arrays."""
    random = np.random.default_rng(seed)
    params = [random.normal(size=shape) for shape in shapes]
    history = [[random.normal(size=shape) * 10 ** random.uniform(-1, 0.5) for shape in shapes] for _ in range(steps)]
    for step in zeros:
        history[step] = [np.zeros(shape) for shape in shapes]
    return params, history


def tensors(arrays, dtype=torch.float64):
    return [torch.tensor(array, dtype=dtype) for array in arrays]


def functional(tx, params, history, dtype=torch.float64):
    """Run the functional form; list the parameters after each step."""
    params, after = tensors(params, dtype), []
    state = tx.init(params)
    for grads in history:
        params, state = fo.step(tx, tensors(grads, dtype), state, params)
        after.append(params)
    return after


def stateful(make, params, history):
    """Run a stateful form, `make(params) -> optimizer`; list the parameters after each step."""
    params, after = [torch.nn.Parameter(p) for p in tensors(params)], []
    optimizer = make(params)
    for grads in history:
        for p, g in zip(params, tensors(grads), strict=True):
            p.grad = g
        optimizer.step()
        after.append([p.detach().clone() for p in params])
    return after


def of_each(formula, params, history, **numbers):
    """Run a formula for one parameter and its gradients on each of them; list the parameters after each step."""
    pairs = zip(params, zip(*history, strict=True), strict=True)
    return list(zip(*[list(formula(p, grads, **numbers)) for p, grads in pairs], strict=True))


def deviation(left, right):
    """Compare all steps, relative to the size of each parameter."""
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1.0)) for a, b in pairs
    )
