"""The table and the picture at the end of the demonstration."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from rich.table import Table
from torch import Tensor


class Result(NamedTuple):
    """What came out of one way to train.

    Attributes:
        what: name of the way.
        peaks: largest learning rate on the schedule: 0-dim tensor; (members,) for an ensemble.
        steps: steps at which the losses are shown: (points,) tensor.
        losses: mean loss since the point before: (points,) tensor; (points, members) for an ensemble.
        accuracies: share of test digits that were recognized: 0-dim tensor; (members,) for an ensemble.
        vote: that share when every member of an ensemble has one vote: 0-dim tensor; None without an ensemble.
        seconds: how long the training took.
    """

    what: str
    peaks: Tensor
    steps: Tensor
    losses: Tensor
    accuracies: Tensor
    vote: Tensor | None
    seconds: float


def make_table(*results: Result) -> Table:
    """Lay out one row for each result; an ensemble shows its best member, and the vote of all."""
    table = Table(title="Handwritten digits", caption="Of the ensemble: the member that is best on the test digits.")
    table.add_column("Training")
    for name in ("Peak learning rate", "Test accuracy", "Vote", "Seconds"):
        table.add_column(name, justify="right")
    for result in results:
        best = result.accuracies.argmax()
        table.add_row(
            result.what,
            f"{result.peaks.flatten()[best]:.2g}",
            f"{result.accuracies.max():.4f}",
            "" if result.vote is None else f"{result.vote:.4f}",
            f"{result.seconds:.1f}",
        )
    return table


def draw(functional: Result, stateful: Result, ensemble: Result, path: Path) -> None:
    """Draw the loss curves, and the test accuracy against the learning rate, into a PNG file."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.grid(color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    colors = ScalarMappable(LogNorm(ensemble.peaks.min().item(), ensemble.peaks.max().item()), "viridis")
    shades = colors.to_rgba(ensemble.peaks.numpy())

    for losses, shade in zip(ensemble.losses.T, shades, strict=True):
        left.plot(ensemble.steps, losses, ".-", color=shade, markersize=4, linewidth=1.2)
    left.plot(functional.steps, functional.losses, "-", color="crimson", alpha=0.35, linewidth=5, label=functional.what)
    left.plot(stateful.steps, stateful.losses, "--", color="crimson", linewidth=1.5, label=stateful.what)
    left.set(title="Loss while training", xlabel="step", ylabel="cross-entropy, smoothed labels")
    left.set_yscale("log")
    left.yaxis.set_major_locator(LogLocator(2))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_locator(NullLocator())
    left.margins(y=0.12)  # leaves room for the legend
    left.legend(loc="upper right", ncols=2, frameon=False)
    figure.colorbar(colors, ax=left, label=f"{ensemble.what}: peak learning rate")

    best = ensemble.accuracies.argmax()
    right.plot(ensemble.peaks, ensemble.accuracies, color="0.8", zorder=1)
    right.scatter(ensemble.peaks, ensemble.accuracies, color=shades, s=60)
    for result, marker in ((functional, "+"), (stateful, "x")):
        label = f"{result.what}: {result.accuracies:.1%}"
        right.scatter(result.peaks, result.accuracies, color="crimson", marker=marker, s=90, zorder=3, label=label)
    right.scatter(
        ensemble.peaks[best],
        ensemble.accuracies[best],
        color="none",
        edgecolor="black",
        s=130,
        label=f"best of the ensemble: {ensemble.accuracies[best]:.1%}",
    )
    if ensemble.vote is not None:
        label = f"vote of the ensemble: {ensemble.vote:.1%}"
        right.axhline(ensemble.vote.item(), color="0.4", linestyle=":", zorder=1, label=label)
    right.set(title="Accuracy on test digits", xlabel="peak learning rate", xscale="log", ylim=(0, 1.04))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(loc="lower center", frameon=False)
    figure.savefig(path, dpi=150)
