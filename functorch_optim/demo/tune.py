"""The loss after training as a function of learning rate and momentum, its gradient, and descents along it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import functorch_optim as fo
from functorch_optim.demo.data import Batches, Digits
from functorch_optim.demo.train import Parameters, parameters_of

HELD_OUT = 300  # digits for validation; the others are trained with, once
BATCH_SIZE = 32
HIDDEN = 16
LEARNING_RATES, MOMENTA = (3e-3, 3.0), (0.05, 0.99)  # the grid: from, to
COLUMNS, ROWS = 20, 15
STARTS = ((0.01, 0.2), (0.1, 0.98), (0.6, 0.1))  # of the descents: learning rate, momentum
DESCENT_STEPS = 30

Objective = Callable[[Tensor], Tensor]


class Landscape(NamedTuple):
    """The loss after training as a function of z = (log of the learning rate, logit of the momentum), in float64.

    Attributes:
        z: the grid: (rows, columns, 2) tensor.
        losses: loss on the digits that were held out: (rows, columns).
        gradients: its gradient by z: (rows, columns, 2).
        paths: points of gradient descent from each start: (points, starts, 2).
        steps: number of steps of training that a gradient goes through.
        error: largest relative error of the gradients at the starts, against finite differences.
        seconds: duration of the exploration.
    """

    z: Tensor
    losses: Tensor
    gradients: Tensor
    paths: Tensor
    steps: int
    error: float
    seconds: float


def explore(digits: Digits, seed: int) -> Landscape:
    """Compute the loss after training on a grid, and go downhill from three starts.

    Forward mode computes the gradients. For two numbers it costs about two further trainings, and it keeps no step.

    Args:
        digits: the digits to train with and to hold out.
        seed: seed of the initial weights and of the batches.
    """
    begin = time.perf_counter()
    objective, steps = make_objective(digits, seed)
    gradient = torch.vmap(fo.meta.forward_grad(lambda z: (objective(z),) * 2, has_aux=True))
    z = make_grid().to(digits.images.device)
    gradients, losses = gradient(z.flatten(0, 1))
    rates, momenta = torch.tensor(STARTS, dtype=z.dtype, device=z.device).T
    starts = torch.stack([rates.log(), momenta.logit()], -1)
    paths = descend(lambda z: gradient(z)[0], starts)
    expected = differences(torch.vmap(objective), starts)
    error = (gradient(starts)[0] - expected).norm(dim=-1) / expected.norm(dim=-1)
    return Landscape(
        z=z.cpu(),
        losses=losses.reshape(ROWS, COLUMNS).cpu(),
        gradients=gradients.reshape(z.shape).cpu(),
        paths=paths.cpu(),
        steps=steps,
        error=error.max().item(),
        seconds=time.perf_counter() - begin,
    )


def make_objective(digits: Digits, seed: int) -> tuple[Objective, int]:
    """Make the function of z that trains a network and returns its loss on held-out digits; and count its steps.

    Args:
        digits: see `explore`.
        seed: see `explore`.
    """
    images, labels = digits.images.double(), digits.labels
    held_out = Digits(images[:HELD_OUT], labels[:HELD_OUT])
    batches = list(Batches(Digits(images[HELD_OUT:], labels[HELD_OUT:]), 1, seed, BATCH_SIZE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 10))
    params = parameters_of(network.to(images))

    def loss_at(params: Parameters, batch: Digits) -> Tensor:
        return cross_entropy(torch.func.functional_call(network, params, (batch.images,)), batch.labels)

    def objective(z: Tensor) -> Tensor:
        transformation = fo.sgd(z[0].exp(), momentum=z[1].sigmoid())
        return loss_at(fo.meta.unroll(loss_at, transformation, params, batches).params, held_out)

    return objective, len(batches)


def make_grid() -> Tensor:
    """Return the z of the grid: (rows, columns, 2) tensor."""
    rates, momenta = torch.tensor([LEARNING_RATES, MOMENTA], dtype=torch.float64)
    columns = torch.linspace(rates[0].log(), rates[1].log(), COLUMNS, dtype=torch.float64)
    rows = torch.linspace(momenta[0].logit(), momenta[1].logit(), ROWS, dtype=torch.float64)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)


def descend(gradient: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Take steps of Adam from each row of z separately; return all points: (steps + 1, rows, 2) tensor."""
    transformation = fo.adam(fo.schedules.cosine(0.3, DESCENT_STEPS), betas=(0.9, 0.9))
    state = transformation.init(z)
    places = [z]
    for _ in range(DESCENT_STEPS):
        updates, state = transformation.update(gradient(z), state)
        z = fo.apply_updates(z, updates)
        places.append(z)
    return torch.stack(places)


def differences(function: Objective, z: Tensor, h: float = 1e-4) -> Tensor:
    """Return central differences of fourth order at each row of z."""

    def slope(offset: Tensor) -> Tensor:
        near, far = [function(z + k * offset) - function(z - k * offset) for k in (1, 2)]
        return (8 * near - far) / (12 * h)

    return torch.stack([slope(offset) for offset in h * torch.eye(2, dtype=z.dtype, device=z.device)], -1)
