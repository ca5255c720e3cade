"""Pairs of our classes and torch.optim's over the same parameters, trained on the same gradients."""

import copy

import torch
from test_torch_like_numbers import assert_same_state, deviation, parameters

import functorch_optim as fo

NAMES = [
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"),
    *("Adafactor", "Muon", "SparseAdam"),
]
OPTIONS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "ASGD": {"lr": 0.1, "t0": 2},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
}
"""Those that have a richer state, or do more, than by default."""

WITH_DIFFERENTIABLE = [name for name in NAMES if name not in ("Adafactor", "Muon", "SparseAdam")]
WITH_FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]


def make_params(name, dtype=torch.float64):
    shapes = [(3, 4), (4, 2)] if name in ("Muon", "SparseAdam") else [(3, 4), (4,)]
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def make_pair(name, params=None, **options):
    """Make ours and torch's; `params` may be anything that both take, it is copied."""
    params = make_params(name) if params is None else params
    options = {**OPTIONS.get(name, {}), **options}
    return tuple([getattr(module, name)(copy.deepcopy(params), **options) for module in (fo.optim, torch.optim)])


def draw_gradient(optimizer, p):
    g = torch.randn_like(p.detach())
    if not isinstance(optimizer, torch.optim.SparseAdam):
        return g
    entries = torch.randperm(len(p))[:2].sort().values[None]
    return torch.sparse_coo_tensor(entries, g[entries[0]], g.shape, check_invariants=False)


def give_gradients(*optimizers):
    """Give the same gradients to parameters of several optimizers."""
    for several in zip(*map(parameters, optimizers), strict=True):
        g = draw_gradient(optimizers[0], several[0]) if several[0].requires_grad else None
        for p in several:
            p.grad = g.clone() if g is not None else None


def train(optimizers, steps=5):
    for _ in range(steps):
        give_gradients(*optimizers)
        for optimizer in optimizers:
            optimizer.step()


def assert_same(ours, theirs, tolerance=1e-12):
    assert deviation(parameters(ours), parameters(theirs)) < tolerance
    assert_same_state(ours, theirs, 100 * tolerance)


def outcome(function, *args, **kwargs):
    """Return the type and text of the error that a call raises, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return None
