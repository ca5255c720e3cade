"""A step with differentiable=True from a given state, called as torch's own tests call it."""

import inspect

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError
from torch_like_cases import NAMES

import functorch_optim as fo

pytestmark = pytest.mark.usefixtures("double")
GENERATOR = torch.Generator().manual_seed(0)


def tensor(shape=(5,), low=0.5):
    """Numbers away from zero, where some updates have no derivative."""
    return (low + torch.rand(shape, generator=GENERATOR, dtype=torch.float64)).requires_grad_()


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def adam(names=("exp_avg", "exp_avg_sq")):
    return {"step": number(10.0), **{name: tensor() for name in names}}


CASES = {
    "SGD": ("SGD", {"lr": 0.1}, {}),
    "SGD momentum": (
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
        {"momentum_buffer": tensor()},
    ),
    "SGD nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum_buffer": tensor()}),
    "SGD first": ("SGD", {"lr": 0.1, "momentum": 0.9}, {}),
    "Adam": ("Adam", {"lr": 0.9, "weight_decay": 0.1}, adam()),
    "Adam amsgrad": ("Adam", {"lr": 0.9, "amsgrad": True}, adam(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))),
    "Adam first": ("Adam", {"lr": 0.9}, {}),
    "AdamW": ("AdamW", {"lr": 0.9, "amsgrad": True}, adam(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))),
    "NAdam": ("NAdam", {"lr": 0.9}, {**adam(), "mu_product": number(0.7).requires_grad_()}),
    "NAdam decay": (
        "NAdam",
        {"lr": 0.9, "decoupled_weight_decay": True, "weight_decay": 0.1},
        {**adam(), "mu_product": number(0.7).requires_grad_()},
    ),
    "RAdam": ("RAdam", {"lr": 0.9}, adam()),
    "RAdam decay": ("RAdam", {"lr": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": True}, adam()),
    "Adamax": ("Adamax", {"lr": 0.9, "weight_decay": 0.1}, adam(("exp_avg", "exp_inf"))),
    "Adagrad": ("Adagrad", {"lr": 0.9, "lr_decay": 0.1}, adam(("sum",))),
    "Adadelta": ("Adadelta", {"lr": 0.9, "weight_decay": 0.1}, adam(("square_avg", "acc_delta"))),
    "RMSprop": (
        "RMSprop",
        {"lr": 0.9, "maximize": True, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        {"step": number(10.0), "square_avg": tensor(low=3), "momentum_buffer": tensor(), "grad_avg": tensor()},
    ),
    "Rprop": ("Rprop", {"lr": 0.9}, adam(("prev", "step_size"))),
    "ASGD": (
        "ASGD",
        {"lr": 0.9},
        {"step": number(10.0), "eta": number(0.9).requires_grad_(), "mu": number(0.3).requires_grad_(), "ax": tensor()},
    ),
    "Adafactor": ("Adafactor", {"lr": 0.9, "weight_decay": 0.1}, adam(("variance",))),
}


def step(p, grad, state, kind, options, *values):
    """Take torch's steps of a test: copies of all, a step, and everything that has a derivative."""
    p = p.clone()
    p.grad = grad
    state = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    optimizer = kind([p], differentiable=True, **options)
    optimizer.state[p].update(state)
    optimizer.step()
    return (p, *[value for value in optimizer.state[p].values() if value.requires_grad])


def arguments(name, options, state):
    GENERATOR.manual_seed(1)
    p, grad = tensor(), tensor()
    values = [value for value in (*state.values(), *options.values()) if isinstance(value, torch.Tensor)]
    return p, grad, state, getattr(fo.optim, name), options, *[value for value in values if value.requires_grad]


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_a_step(case):
    """By parameter, gradient, and all of the state."""
    name, options, state = CASES[case]
    given = arguments(name, options, state)
    outputs = step(*given)
    assert all(output.requires_grad for output in outputs)
    # ASGD's next eta and mu do not depend on those before.
    recorded = [key for key, value in state.items() if value.requires_grad and key not in ("eta", "mu")]
    assert len(outputs) == 1 + len(recorded) or not state
    assert torch.autograd.gradcheck(step, given)


@pytest.mark.parametrize("case", CASES)
def test_the_derivatives_are_all_there(case):
    """None of them is zero for lack of a graph."""
    name, options, state = CASES[case]
    p, grad, *rest = arguments(name, options, state)
    outputs = step(p, grad, *rest)
    inputs = {"p": p, "grad": grad, **{key: value for key, value in state.items() if value.requires_grad}}
    derivatives = torch.autograd.grad(
        [(o * torch.rand_like(o)).sum() for o in outputs], list(inputs.values()), allow_unused=True
    )
    missing = {key for key, d in zip(inputs, derivatives, strict=True) if d is None or not d.any()}
    assert missing == ({"prev"} if name == "Rprop" else set())  # of which it takes the sign


def test_all_classes_are_here():
    """But Muon, which rounds to bfloat16, and SparseAdam; both are in test_torch_like_unrolled.py."""
    assert {name for name, *_ in CASES.values()} == set(NAMES) - {"Muon", "SparseAdam"}
    known = {name: inspect.signature(getattr(fo.optim, name)).parameters for name in NAMES}
    assert all("differentiable" in parameters for parameters in known.values())


HYPERPARAMETERS = {
    "SGD": ("lr", "weight_decay"),
    "SGD momentum": ("lr", "momentum", "dampening", "weight_decay"),
    "Adam": ("lr", "weight_decay"),
    "AdamW": ("lr", "weight_decay"),
    "NAdam": ("lr", "weight_decay", "momentum_decay"),
    "RAdam": ("lr", "weight_decay"),
    "Adamax": ("lr", "weight_decay"),
    "Adagrad": ("lr", "lr_decay", "weight_decay"),
    "Adadelta": ("lr", "rho", "weight_decay"),
    "RMSprop": ("lr", "alpha", "momentum", "weight_decay"),
    "ASGD": ("lr", "lambd", "weight_decay"),
    "Adafactor": ("lr", "beta2_decay", "weight_decay"),
}


@pytest.mark.parametrize("case", HYPERPARAMETERS)
def test_derivatives_by_hyperparameters(case):
    name, options, state = CASES[case]
    options = dict(options)
    defaults = inspect.signature(getattr(torch.optim, name)).parameters
    for key in HYPERPARAMETERS[case]:
        options[key] = number(float(options.get(key, defaults[key].default)) or 0.1).requires_grad_()
    assert torch.autograd.gradcheck(step, arguments(name, options, state))


def test_a_wrong_derivative_is_noticed():
    """torch.optim.SGD makes its first buffer without a graph."""
    name, options, state = CASES["SGD first"]
    p, grad, state, _, *rest = arguments(name, options, state)
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(step, (p, grad, state, torch.optim.SGD, *rest))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("Muon", "SparseAdam")])
def test_without_grad_nothing_is_recorded(name):
    p = tensor().detach()
    optimizer = getattr(fo.optim, name)([p], differentiable=True)
    p.grad = torch.ones_like(p)
    with torch.no_grad():  # torch.optim turns grad on all the same
        optimizer.step()
    assert not p.requires_grad
