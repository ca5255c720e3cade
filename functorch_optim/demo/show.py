"""The demonstration itself: train in three ways, and compare them."""

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from functorch_optim.demo import train
from functorch_optim.demo.data import Batches, Digits, load
from functorch_optim.demo.report import Result, draw, make_table
from functorch_optim.demo.tune import explore

PEAKS = torch.logspace(-5, 0, 16, dtype=torch.float64)  # from far too small to far too large


def show(picture: Path, device: str, seed: int, epochs: int) -> None:
    """Differentiate trainings, train in three ways with a progress bar, draw a picture, and print a table.

    Args:
        picture: path of the PNG file to write.
        device: where to train.
        seed: seed of the initial weights and of the order of the digits.
        epochs: number of times that each digit is trained with.
    """
    console = Console()
    with Progress(console=console) as progress, one_thread():
        landscape = explore(load(device)[0], seed)
        results = compare(device, seed, epochs, progress)
    draw(landscape, *results, picture)
    console.print(make_table(*results))
    console.print(
        f"Gradients of {landscape.losses.numel()} trainings by learning rate and momentum, through {landscape.steps} "
        f"steps each: {landscape.seconds:.1f} s; from finite differences by at most {landscape.error:.0e}.",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f"Picture: {picture}", soft_wrap=True, highlight=False)


def compare(device: str, seed: int, epochs: int, progress: Progress) -> tuple[Result, Result, Result]:
    """Train one network functionally, the same one statefully, and an ensemble, all with the same batches.

    Args:
        device: where to train.
        seed: seed of the initial weights and of the order of the digits.
        epochs: number of times that each digit is trained with.
        progress: shows the progress of each training.
    """
    digits, test = load(device)
    batches = Batches(digits, epochs, seed)
    steps = len(batches)
    network = train.make_network(seed, device)

    def functional(batches: Iterable[Digits]) -> train.Trained:
        return train.train_functionally(network, batches, steps)

    def stateful(batches: Iterable[Digits]) -> train.Trained:
        return train.train_statefully(copy.deepcopy(network), batches, steps)

    def ensemble(batches: Iterable[Digits]) -> train.Trained:
        networks = [train.make_network(seed + member, device) for member in range(len(PEAKS))]
        return train.train_ensemble(networks, PEAKS.to(device), batches, steps)

    def classify(params: train.Parameters) -> Tensor:
        return train.classify(network, params, test.images)

    def measure(what: str, peaks: Tensor, training: Callable[[Iterable[Digits]], train.Trained]) -> Result:
        start = time.perf_counter()
        params, losses = training(progress.track(batches, total=steps, description=what))
        losses = losses.cpu()  # waits until the device is done
        seconds = time.perf_counter() - start
        guesses = torch.vmap(classify)(params) if peaks.ndim else classify(params)
        return Result(
            what=what,
            peaks=peaks,
            steps=torch.arange(epochs, steps + 1, epochs),
            losses=losses.reshape(-1, epochs, *peaks.shape).mean(1),  # as many points for few epochs as for many
            accuracies=share_right(guesses, test.labels),
            vote=share_right(guesses.mode(0).values, test.labels) if peaks.ndim else None,
            seconds=seconds,
        )

    functional(itertools.islice(batches, 1))  # torch loads parts of itself at their first use; do not count that
    peak = torch.tensor(train.PEAK)
    return (
        measure("functional", peak, functional),
        measure("stateful", peak, stateful),
        measure(f"ensemble of {len(PEAKS)}", PEAKS, ensemble),
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: small tensors gain little from more, and lose much on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def share_right(guesses: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right guesses over the last dimension."""
    return (guesses == labels).double().mean(-1).cpu()
