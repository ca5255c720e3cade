"""Three ways to train the same network: with pure functions, with an optimizer object, and sixteen times at once."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

import functorch_optim as fo
from functorch_optim.demo.data import Digits

PEAK = 2e-2  # largest learning rate on the schedule
WEIGHT_DECAY = 0.3
LARGEST_NORM = 1.0
WARMUP_SHARE = 0.1
LABEL_SMOOTHING = 0.1
HIDDEN = 192

Parameters: TypeAlias = dict[str, Tensor]


class Trained(NamedTuple):
    """The result of a training.

    Attributes:
        params: the parameters, by name; those of an ensemble have one dimension more, the first: its members.
        losses: the loss of each batch before its step: (steps,) tensor, or (steps, members) for an ensemble.
    """

    params: Parameters
    losses: Tensor


def make_network(seed: int, device: str = "cpu") -> torch.nn.Module:
    """Make a network with two hidden layers that classifies digits.

    Args:
        seed: seed of the initial weights.
        device: where the weights are put.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Linear(64, HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, HIDDEN),
            torch.nn.ReLU(),
            torch.nn.Linear(HIDDEN, 10),
        )
    return network.to(device)


def parameters_of(network: torch.nn.Module) -> Parameters:
    """Return the parameters by name, as plain tensors: the functional ways record no graph across steps."""
    return fo.params_of(network)


def warmup_cosine(peak: float | Tensor, steps: int) -> fo.schedules.Schedule:
    """Make the schedule that all three ways follow."""
    return fo.schedules.warmup_cosine(peak, warmup_iters=int(WARMUP_SHARE * steps), total_iters=steps)


def make_transformation(learning_rate: float | Tensor, steps: int) -> fo.GradientTransformation:
    """Make the transformation that both functional ways use.

    Args:
        learning_rate: the largest on the schedule: number, or 0-dim tensor, which may be batched by vmap.
        steps: number of steps of the schedule.
    """
    schedule = warmup_cosine(learning_rate, steps)
    return fo.chain(fo.clip_by_global_norm(LARGEST_NORM), fo.adamw(schedule, weight_decay=WEIGHT_DECAY))


def loss_of(guesses: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of guesses, logits for each digit, with labels."""
    return functional.cross_entropy(guesses, labels, label_smoothing=LABEL_SMOOTHING)


def take_step(
    network: torch.nn.Module, transformation: fo.GradientTransformation, params: Parameters, state: Any, batch: Digits
) -> tuple[Parameters, Any, Tensor]:
    """Return the parameters and the state after one step, and the loss before the step; nothing is modified."""

    def loss_at(params: Parameters) -> Tensor:
        return loss_of(torch.func.functional_call(network, params, (batch.images,)), batch.labels)

    grads, loss = torch.func.grad_and_value(loss_at)(params)
    updates, state = transformation.update(grads, state, params)
    return fo.apply_updates(params, updates), state, loss


def train_functionally(network: torch.nn.Module, batches: Iterable[Digits], steps: int) -> Trained:
    """Train with pure functions; the network itself is not changed.

    Args:
        network: gives the architecture and the initial weights.
        batches: batches to train with.
        steps: number of batches.
    """
    transformation = make_transformation(PEAK, steps)
    params = parameters_of(network)
    state = transformation.init(params)
    losses = []
    for batch in batches:
        params, state, loss = take_step(network, transformation, params, state, batch)
        losses.append(loss)
    return Trained(params, torch.stack(losses))


def train_statefully(network: torch.nn.Module, batches: Iterable[Digits], steps: int) -> Trained:
    """Train with an optimizer object, as with any of torch.optim; the network is trained in place.

    The steps are those of `train_functionally`, up to rounding, which long training amplifies.

    Args:
        network: the network.
        batches: batches to train with.
        steps: number of batches.
    """
    optimizer = fo.Optimizer(network.parameters(), fo.adamw, lr=PEAK, weight_decay=WEIGHT_DECAY)
    factor = warmup_cosine(1.0, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step).item())
    losses = []
    for images, labels in batches:
        loss = loss_of(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_NORM)
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
    return Trained(parameters_of(network), torch.stack(losses))


def train_ensemble(
    networks: list[torch.nn.Module], learning_rates: Tensor, batches: Iterable[Digits], steps: int
) -> Trained:
    """Train many networks at once, each with a learning rate of its own; the networks themselves are not changed.

    Args:
        networks: give the architecture, the same for all, and the initial weights.
        learning_rates: the largest on each network's schedule: (networks,) tensor.
        batches: batches to train all networks with.
        steps: number of batches.
    """

    def initial_state(params: Parameters, learning_rate: Tensor) -> Any:
        return make_transformation(learning_rate, steps).init(params)

    def step(params: Parameters, state: Any, learning_rate: Tensor, batch: Digits) -> tuple[Parameters, Any, Tensor]:
        return take_step(networks[0], make_transformation(learning_rate, steps), params, state, batch)

    params = fo.tree.map(lambda *members: torch.stack(members), *[parameters_of(network) for network in networks])
    state = torch.vmap(initial_state)(params, learning_rates)
    step_all = torch.vmap(step, in_dims=(0, 0, 0, None))
    losses = []
    for batch in batches:
        params, state, loss = step_all(params, state, learning_rates, batch)
        losses.append(loss)
    return Trained(params, torch.stack(losses))


def classify(network: torch.nn.Module, params: Parameters, images: Tensor) -> Tensor:
    """Return the digit that the network sees on each image, with these parameters in place of its own."""
    logits: Tensor = torch.func.functional_call(network, params, (images,))
    return logits.argmax(-1)
