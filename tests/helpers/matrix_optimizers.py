"""Newton and Schulz's iteration in numpy, and a run to compare."""

import numpy as np
import torch

import functorch_optim as fo

JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
STEPS = 6


def newton_schulz(x, triples=JORDAN, margin=1.0, eps=1e-7, clamps=True):
    """In numpy."""
    if x.ndim > 2:
        return np.stack([newton_schulz(one, triples, margin, eps, clamps) for one in x])
    norm = margin * np.linalg.norm(x)
    x = x / (max(norm, eps) if clamps else norm + eps)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def problem(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), [rng.normal(size=shape) for _ in range(STEPS)]


def trained(tx, p, grads, dtype=torch.float64):
    p = torch.tensor(p, dtype=dtype)
    state = tx.init(p)
    for g in grads:
        p, state = fo.step(tx, torch.tensor(g, dtype=dtype), state, p)
    return p.double().numpy()
