"""Pairs of our classes and torch.optim's over the same parameters, trained on the same gradients."""

import copy
import math

import pytest
import torch

import functorch_optim as fo

MODULES = (fo.optim, torch.optim)


# Classes and their options. -------------------------------------------------------------------------------------------

DECAY = {"weight_decay": 0.1}
OPTIONS = {
    "SGD": [
        {},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, **DECAY},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True, **DECAY},
    ],
    "Adam": [
        {},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, **DECAY},
        {"lr": 0.1, "amsgrad": True, "maximize": True, **DECAY},
        {"lr": 0.1, "decoupled_weight_decay": True, **DECAY},
    ],
    "AdamW": [{}, {"lr": 0.1, "amsgrad": True, "maximize": True, **DECAY}],
    "NAdam": [
        {},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "momentum_decay": 0.1, **DECAY},
        {"momentum_decay": 0.0, "maximize": True, "decoupled_weight_decay": True, **DECAY},
    ],
    "RAdam": [
        {},
        {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-2, **DECAY},
        {"betas": (0.9, 0.9), "maximize": True, "decoupled_weight_decay": True, **DECAY},
    ],
    "Adamax": [{}, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "maximize": True, **DECAY}],
    "Adagrad": [
        {},
        {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-2, "maximize": True, **DECAY},
        {"initial_accumulator_value": 0.5},
    ],
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "maximize": True, **DECAY}],
    "RMSprop": [
        {},
        {"lr": 0.1, "alpha": 0.7, "eps": 1e-2, "momentum": 0.5, **DECAY},
        {"centered": True, "momentum": 0.9, "maximize": True, **DECAY},
    ],
    "Rprop": [{}, {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.05, 0.2), "maximize": True}],
    "ASGD": [{}, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 5, "maximize": True, **DECAY}],
    "Adafactor": [
        {},
        {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-3, 1e-2), "d": 1.5, "maximize": True, **DECAY},
    ],
    "Muon": [
        {},
        {"lr": 0.1, "momentum": 0.5, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
        {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-3},
    ],
}
"""Every option of every class for dense gradients."""
if not hasattr(torch.optim, "Muon"):  # before torch 2.9
    del OPTIONS["Muon"]
muon = pytest.mark.skipif("Muon" not in OPTIONS, reason="torch.optim has Muon from torch 2.9 on")

EMBEDDINGS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "maximize": True}),
    ("SparseAdam", {}),
    ("SparseAdam", {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "maximize": True}),
]
"""Of those that take sparse gradients."""

CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def by_case(cases):
    """Give a test names of classes with options of each."""
    ids = [f"{name}-{'-'.join(options) or 'defaults'}" for name, options in cases]
    return pytest.mark.parametrize(("name", "options"), cases, ids=ids)


cases = by_case(CASES)
embeddings = by_case(EMBEDDINGS)

NAMES = [*OPTIONS, "SparseAdam"]
each = pytest.mark.parametrize("name", NAMES)

RICHER = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "ASGD": {"lr": 0.1, "t0": 2},
    "RMSprop": {"lr": 0.1, "momentum": 0.9, "centered": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
}
"""Those that have a richer state, or do more, than by default."""

WITH_DIFFERENTIABLE = [name for name in NAMES if name not in ("Adafactor", "Muon", "SparseAdam")]
WITH_FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]
REAL = ["Adafactor", "Muon"]
"""torch.optim has them for real numbers only."""


def factory_of(name):
    """Return the function that a class has its numbers from."""
    return getattr(fo, "sparse_adam" if name == "SparseAdam" else name.lower())


# Parameters. ----------------------------------------------------------------------------------------------------------


def awkward_params(name, dtype, device="cpu"):
    """Matrices, a stack of them, a vector, a scalar, an empty one, and some that are not contiguous."""
    options = {"dtype": dtype, "device": device}
    if name == "Muon":
        return [torch.randn(3, 4, **options).t(), torch.randn(5, 2, **options), torch.randn(2, 6, **options)[:, ::2]]
    empty = [] if name == "Adafactor" else [torch.randn(0, 2, **options)]  # torch's Adafactor divides by their size, 0
    return [
        torch.randn(3, 4, **options).t(),
        torch.randn(2, 3, 2, **options),
        torch.randn(4, **options),
        torch.randn((), **options),
        torch.randn(10, **options)[::3],
        *empty,
    ]


def embedding_params(dtype=torch.float64, device="cpu"):
    return [torch.randn(7, 3, dtype=dtype, device=device), torch.randn(4, 2, 2, dtype=dtype, device=device)]


def make_params(name, dtype=torch.float64):
    shapes = [(3, 4), (4, 2)] if name in ("Muon", "SparseAdam") else [(3, 4), (4,)]
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


# Pairs. ---------------------------------------------------------------------------------------------------------------


def pair(name, params, options):
    """Make ours and torch's over copies of the same parameters, which are laid out in memory as they are."""
    ours, theirs = [[copy.deepcopy(p).requires_grad_() for p in params] for _ in MODULES]
    return getattr(fo.optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)


def make_pair(name, params=None, **options):
    """Make ours and torch's; `params` may be anything that both take, it is copied."""
    params = make_params(name) if params is None else params
    options = {**RICHER.get(name, {}), **options}
    return tuple([getattr(module, name)(copy.deepcopy(params), **options) for module in MODULES])


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# Training. ------------------------------------------------------------------------------------------------------------


def gradient(p, step, scale):
    """Draw a gradient of one of many sizes; some are exactly zero."""
    return torch.zeros_like(p) if step % 5 == 2 else scale * 10 ** (step % 7 - 3) * torch.randn_like(p.detach())


def run(ours, theirs, steps=36, scale=1.0, missing=lambda step, i: False, each=lambda step: None):
    """Train both on the same gradients; return the largest relative deviation of a parameter in any step.

    After 35 steps, sizes and zeros of gradients come as they came before.
    """
    worst = 0.0
    for step in range(steps):
        for i, (p, q) in enumerate(zip(parameters(ours), parameters(theirs), strict=True)):
            q.grad = None if missing(step, i) else gradient(q, step, scale)
            p.grad = None if q.grad is None else q.grad.clone()
        ours.step()
        theirs.step()
        each(step)
        worst = max(worst, deviation(parameters(ours), parameters(theirs)))
    return worst


def run_sparse(ours, theirs, steps=36):
    """Train both on the same sparse gradients; return the largest relative deviation of a parameter in any step."""
    worst = 0.0
    for step in range(steps):
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            entries = torch.randint(len(q), (1, step % 5), device=q.device)  # none at times, and some more than once
            values = torch.randn(entries.shape[1], *q.shape[1:], dtype=q.dtype, device=q.device)
            q.grad = torch.sparse_coo_tensor(entries, values, q.shape)
            p.grad = q.grad.clone()
        ours.step()
        theirs.step()
        assert all(p.grad.is_sparse for p in parameters(ours))
        worst = max(worst, deviation(parameters(ours), parameters(theirs)))
    return worst


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


# Comparing. -----------------------------------------------------------------------------------------------------------


def deviation(ours, theirs):
    """Return the largest relative deviation of a number, infinity where one is NaN."""
    pairs = [(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True) if p.numel()]
    deviations = [((p - q).abs() / q.abs().clamp(min=1)).max().item() for p, q in pairs]
    return max(math.inf if math.isnan(d) else d for d in deviations)


def assert_same_state(ours, theirs, tolerance):
    """Compare all states: keys, shapes, dtypes, and numbers relative to their size."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        mine, torchs = ours.state.get(p, {}), theirs.state.get(q, {})
        assert set(mine) == set(torchs)
        for key, expected in torchs.items():
            assert type(mine[key]) is type(expected)
            if isinstance(expected, torch.Tensor):
                assert (mine[key].shape, mine[key].dtype, mine[key].device) == (
                    expected.shape,
                    expected.dtype,
                    expected.device,
                )
            torch.testing.assert_close(mine[key], expected, rtol=tolerance, atol=tolerance, check_dtype=False)


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


def outcomes(function):
    """Return what happens with our classes, and with torch's."""
    return [outcome(function, module) for module in MODULES]
