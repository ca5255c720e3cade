"""Training as one function of everything it depends on, and its derivatives by finite differences.

All arguments, the parameters, the data, the hyperparameters, and the state it begins with, are one vector: so there is
a derivative by each element of each of them, and none can hide behind another.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from catalogue import step

import functorch_optim as fo
from functorch_optim.testing._derivatives import OfVector, differences, error, errors

__all__ = ["OfVector", "differences", "error", "errors"]  # functions of one vector, as the test kit has them

UNITS = 3
STEPS = 4


def network(activation):
    """Return the loss of a small network; `shift` is added to what its hidden units are given, and so can kill them."""

    def loss(params, data):
        hidden, output = params["hidden"], params["output"]
        units = activation(data["x"] @ hidden["weight"] + hidden["bias"] + data.get("shift", 0.0))
        return (units @ output["weight"] + output["bias"] - data["y"]).square().mean()

    return loss


SMOOTH, RELU = network(torch.tanh), network(torch.relu)


def make_network(dtype=torch.float64):
    """Make parameters: a matrix, two vectors, a number."""
    hidden = {"weight": 0.7 * torch.randn(2, UNITS, dtype=dtype), "bias": 0.7 * torch.randn(UNITS, dtype=dtype)}
    output = {"weight": 0.7 * torch.randn(UNITS, dtype=dtype), "bias": 0.7 * torch.randn(1, dtype=dtype)}
    return {"hidden": hidden, "output": output}


def make_data(dtype=torch.float64):
    return {"x": torch.randn(4, 2, dtype=dtype), "y": torch.randn(4, dtype=dtype)}


@dataclass(frozen=True)
class Training:
    """Some steps, as a function of a dict of "params", "data", "hyperparameters" and "state".

    Attributes:
        make: takes hyperparameters by name, returns a transformation.
        held: parts of its state that derivatives do not flow through.
        loss: see `network`.
        start: the state to begin with, of which the arguments hold the float tensors; None: what `init` makes.
        shifts: for each step, what is added to the inputs of the hidden units.
        cut: what is detached: "updates", those of the last step; "hyperparameters", in the second half of the steps.
    """

    make: Callable[..., fo.GradientTransformation]
    held: tuple[str, ...] = ()
    loss: Callable[[Any, Any], torch.Tensor] = SMOOTH
    start: Any = None
    shifts: tuple[Any, ...] = (0.0,) * STEPS
    cut: str | None = None

    def __call__(self, arguments):
        """Train, and return one number that depends on all that comes out."""
        return self.outcome(*self.trained(arguments), arguments["data"])

    def outcome(self, params, state, data):
        kept = [leaf for path, leaf in floats(state).items() if not path.endswith(self.held or ("no path",))]
        return self.loss(params, data) + sum(leaf.sin().sum() for leaf in [*fo.tree.flatten(params)[0], *kept])

    def trained(self, arguments):
        """Train, and return the parameters and the state."""
        params, numbers = arguments["params"], arguments["hyperparameters"]
        tx = self.make(**numbers)
        state = tx.init(params) if self.start is None else replaced(self.start, arguments["state"])
        for i, shift in enumerate(self.shifts):
            if self.cut == "hyperparameters" and i == len(self.shifts) // 2:
                tx = self.make(**fo.tree.map(torch.Tensor.detach, numbers))
            data = {**arguments["data"], "shift": shift}
            grads = torch.func.grad(self.loss)(params, data)
            updates, state = step(tx, grads, state, params, data, self.loss)
            if self.cut == "updates" and i == len(self.shifts) - 1:
                updates = fo.tree.map(torch.Tensor.detach, updates)
            params = fo.apply_updates(params, updates)
        return params, state


def begun(row, dtype=torch.float64, **options):
    """Return the training of a row from its first step on, and arguments."""
    numbers = {name: torch.tensor(value, dtype=dtype) for name, value in row.hyperparameters.items()}
    training = Training(row if "lr" in numbers else small_steps(row), row.held, **options)
    return training, {"params": make_network(dtype), "data": make_data(dtype), "hyperparameters": numbers}


def continued(row, dtype=torch.float64, fill=0.1, before=(0.0,) * 2, **options):
    """Return the same from a state on that some steps have made, and arguments with that state.

    Zeros in it are filled: there Rprop and L-BFGS know that there has been nothing yet, and have no derivative. SM3's
    accumulators are parted: those of a row and of a column are equal where both have their largest element.
    """
    training, arguments = begun(row, dtype, **options)
    params, state = replace(training, shifts=before).trained(arguments)
    filled = {path: torch.where(leaf == 0, fill, leaf) for path, leaf in floats(state).items()}
    parted = {path: leaf * torch.linspace(1, 1.1, len(leaf)) for path, leaf in filled.items() if "accumulators" in path}
    state = replaced(state, {**filled, **parted})
    return replace(training, start=state), {**arguments, "params": params, "state": floats(state)}


def with_numbers(row, **changed):
    """Return a row with other values of all hyperparameters whose names begin so."""
    numbers = row.hyperparameters
    found = {name: value for prefix, value in changed.items() for name in numbers if name.startswith(prefix)}
    return row._replace(hyperparameters={**numbers, **found})


def small_steps(row):
    return lambda **numbers: fo.chain(row(**numbers), fo.scale(-0.1))


def floats(state):
    """Return what there are derivatives by in a state: its float tensors, by path."""
    leaves = zip(fo.tree.paths(state), fo.tree.flatten(state)[0], strict=True)
    return {path: leaf for path, leaf in leaves if leaf.is_floating_point()}


def replaced(state, given):
    """Return a state with other float tensors."""
    leaves, structure = fo.tree.flatten(state)
    paths = fo.tree.paths(state)
    return fo.tree.unflatten(structure, [given.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def training_of_tasks(row):
    """Return what torch.compile is given: two steps of a task, the loss of a batch of them, and what they share.

    Returns:
        train: (params, hyperparameters, state, x) -> (params, state).
        total: (params, hyperparameters, state, xs) -> number.
        params, hyperparameters, state: of all tasks.
    """
    make = row if "lr" in row.hyperparameters else small_steps(row)

    def loss(params, x):
        return (torch.tanh(x @ params["hidden"]["weight"]) @ params["rest"][0] - 1).square().mean()

    def train(params, numbers, state, x):
        tx = make(**numbers)
        for _ in range(2):
            grads = torch.func.grad(loss)(params, x)
            updates, state = step(tx, grads, state, params, x, loss)
            params = fo.apply_updates(params, updates)
        return params, state

    def total(params, numbers, state, xs):
        return torch.vmap(lambda x: loss(train(params, numbers, state, x)[0], x))(xs).sum()

    double = {"dtype": torch.float64}
    params = {"hidden": {"weight": torch.randn(2, 2, **double)}, "rest": [torch.randn(2, **double)]}
    numbers = {name: torch.tensor(value, **double) for name, value in row.hyperparameters.items()}
    # Of clones: ASGD's first eta is the learning rate itself, and that they are one tensor is no part of a program.
    return train, total, params, numbers, make(**fo.tree.map(torch.clone, numbers)).init(params)
