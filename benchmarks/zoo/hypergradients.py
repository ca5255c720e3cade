"""AdamW's learning rate, betas and weight decay, tuned by gradients through training and by random search."""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functorch_optim as fo
from benchmarks.zoo.contest import rounded
from benchmarks.zoo.tasks import Task, all_tasks

TASKS = ("digits_mlp", "equation")
# Of lr, 1 - beta1, 1 - beta2 and weight decay: all of them are searched by their logarithm.
LOWEST, HIGHEST = (1e-4, 1e-2, 1e-3, 1e-4), (1.0, 0.9, 0.5, 1.0)


class Plan(NamedTuple):
    """How much is done.

    Attributes:
        steps: of a training.
        starts: number of descents, which are run as one batch.
        descent: number of steps of each.
        batch: number of trainings of random search that are run as one batch.
        repeats: number of times that both are done, with other random numbers.
        rate: of the descents, in units of the logarithm of a hyperparameter.
    """

    steps: int = 60
    starts: int = 4
    descent: int = 15
    batch: int = 16
    repeats: int = 3
    rate: float = 0.4


FULL = Plan()
QUICK = Plan(steps=6, starts=2, descent=2, batch=2, repeats=1)


class Found(NamedTuple):
    """The best point of a search.

    Attributes:
        z: logarithms of lr, 1 - beta1, 1 - beta2 and weight decay.
        loss: loss of validation after training with them.
        trainings: number of trainings until the end of the search.
        seconds: its time on the processor.
    """

    z: Tensor
    loss: float
    trainings: int
    seconds: float


def compare(plan: Plan) -> dict[str, Any]:
    """Tune in both ways, for the same time, and return medians of the repeats."""
    tuned: dict[str, Any] = {}
    for name in TASKS:
        task = all_tasks()[name]
        train = training(task, plan.steps)
        repeats: dict[str, list[dict[str, Any]]] = {"hypergradients": [], "random search": []}
        for seed in range(plan.repeats):
            generator = torch.Generator().manual_seed(seed)
            by_gradient = descend(train, task, plan, generator)
            at_random = search(train, task, plan, generator, by_gradient.seconds)
            for way, found in zip(repeats, (by_gradient, at_random), strict=True):
                repeats[way].append(described(found, float(task.error(train(found.z)))))
                print(f"{name}, {way}: {repeats[way][-1]}", file=sys.stderr, flush=True)
        tuned[name] = {way: median(found) for way, found in repeats.items()}
    return tuned


def training(task: Task, steps: int) -> Callable[[Tensor], Any]:
    """Return the function that trains with hyperparameters: z -> parameters."""
    params, batches = task.init(0), task.batches(0, steps)

    def train(z: Tensor) -> Any:
        lr, rest1, rest2, weight_decay = z.exp()
        tx = fo.adamw(fo.schedules.cosine(lr, steps), (1 - rest1, 1 - rest2), weight_decay=weight_decay)
        return fo.meta.unroll(task.loss, tx, params, batches).params

    return train


def drawn(count: int, generator: torch.Generator) -> Tensor:
    """Return random points of the box: (count, 4)."""
    low, high = torch.tensor([LOWEST, HIGHEST], dtype=torch.float64).log()
    points: Tensor = low + (high - low) * torch.rand(count, len(LOWEST), generator=generator, dtype=torch.float64)
    return points


def best_of(losses: Iterator[tuple[Tensor, Tensor]], enough: Callable[[float], bool]) -> Found:
    """Return the best of the points (z, loss) that come in batches, until the time is enough."""
    begin, found, trainings = time.process_time(), (math.inf, torch.empty(0)), 0
    for z, values in losses:
        trainings += len(z)
        lowest = int(values.nan_to_num(torch.inf).argmin())
        if float(values[lowest]) < found[0]:
            found = float(values[lowest]), z[lowest].clone()
        if enough(time.process_time() - begin):
            break
    return Found(found[1], found[0], trainings, time.process_time() - begin)


def descend(train: Callable[[Tensor], Any], task: Task, plan: Plan, generator: torch.Generator) -> Found:
    """Go downhill from random points, along exact gradients through the training."""
    gradient = torch.vmap(torch.func.grad_and_value(lambda z: task.validation(train(z)).double()))
    schedule = fo.schedules.cosine(plan.rate, plan.descent)
    tx = fo.chain(fo.zero_nans(), fo.clip_by_global_norm(1.0), fo.adam(schedule, (0.8, 0.9)))

    def points() -> Iterator[tuple[Tensor, Tensor]]:
        z = drawn(plan.starts, generator)
        state = torch.vmap(tx.init)(z)
        for _ in range(plan.descent):
            slopes, losses = gradient(z)
            yield z, losses
            z, state = torch.vmap(lambda g, s, z: fo.step(tx, g, s, z))(slopes, state, z)

    return best_of(points(), lambda seconds: False)


@torch.no_grad()
def search(train: Callable[[Tensor], Any], task: Task, plan: Plan, generator: torch.Generator, seconds: float) -> Found:
    """Train with random points for a time."""
    losses = torch.vmap(lambda z: task.validation(train(z)))

    def points() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            z = drawn(plan.batch, generator)
            yield z, losses(z)

    return best_of(points(), lambda spent: spent >= seconds)


def described(found: Found, error: float) -> dict[str, Any]:
    """Return the entries of the report on a search."""
    lr, rest1, rest2, weight_decay = found.z.exp().tolist()
    written = f"lr {lr:.2g}, betas {1 - rest1:.4g}, {1 - rest2:.4g}, weight decay {weight_decay:.2g}"
    numbers = {"trainings": found.trainings, "seconds": found.seconds, "loss": found.loss, "error": error}
    return {**{name: rounded(value) for name, value in numbers.items()}, "hyperparameters": written}


def median(repeats: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of the numbers, and the hyperparameters of the repeat with the median loss."""
    middle = sorted(repeats, key=lambda found: found["loss"])[len(repeats) // 2]
    return {
        k: v if isinstance(v, str) else rounded(statistics.median(r[k] for r in repeats)) for k, v in middle.items()
    }
