"""The table and the picture at the end of the demonstration."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.table import Table
from torch import Tensor

from functorch_optim.demo.tune import Landscape


class Result(NamedTuple):
    """The result of one way to train.

    Attributes:
        what: name of the way.
        peaks: largest learning rate on the schedule: 0-dim tensor; (members,) for an ensemble.
        steps: steps at which the losses are shown: (points,) tensor.
        losses: mean loss since the point before: (points,) tensor; (points, members) for an ensemble.
        accuracies: share of test digits that were recognized: 0-dim tensor; (members,) for an ensemble.
        vote: the share when every member of an ensemble has one vote: 0-dim tensor; None without an ensemble.
        seconds: duration of the training.
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


def draw(landscape: Landscape, functional: Result, stateful: Result, ensemble: Result, path: Path) -> None:
    """Draw the loss as a function of the hyperparameters, and the losses while training, into a PNG file."""
    figure = Figure(figsize=(12.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_landscape(left, landscape)
    draw_losses(right, functional, stateful, ensemble)
    figure.savefig(path, dpi=150)


def draw_landscape(axes: Axes, landscape: Landscape) -> None:
    """Draw the losses as colors, the direction downhill as arrows, and the descents as lines."""
    rates, momenta = in_units(landscape.z)
    losses = landscape.losses.nan_to_num(torch.inf).clamp(max=1e9).numpy()
    levels = np.geomspace(losses.min(), 2.5, 15)
    filled = axes.contourf(rates, momenta, losses, levels=levels, cmap="cividis", extend="max")
    label = f"loss after {landscape.steps} steps (nats)"
    axes.figure.colorbar(filled, ax=axes, label=label, format="%.2g", pad=0.01)
    some = np.s_[::2, ::2]
    downhill = -torch.nn.functional.normalize(landscape.gradients, dim=-1).numpy()[some]
    arrows: dict[str, Any] = {"color": "white", "alpha": 0.6, "scale": 28.0, "width": 0.0028, "pivot": "mid"}
    axes.quiver(rates[some], momenta[some], downhill[..., 0], downhill[..., 1], **arrows)
    for path in landscape.paths.unbind(1):
        rate, momentum = in_units(path)
        axes.plot(rate, momentum, color="C1", linewidth=2)
        axes.plot(rate[0], momentum[0], "o", color="white", markeredgecolor="C1", markersize=8)
        axes.plot(rate[-1], momentum[-1], "*", color="C1", markeredgecolor="white", markersize=16)
    axes.set(xlabel="learning rate", ylabel="momentum", xscale="log", yscale="logit")
    axes.set(xlim=(rates.min(), rates.max()), ylim=(momenta.min(), momenta.max()))
    axes.set_yticks([0.1, 0.5, 0.9, 0.98], ["0.1", "0.5", "0.9", "0.98"])
    axes.minorticks_off()
    axes.set_title(f"{landscape.losses.numel()} trainings in one vmap, each with its gradient")


def in_units(z: Tensor) -> tuple[Any, Any]:
    """Return learning rates and momenta, as numpy arrays."""
    return z[..., 0].exp().numpy(), z[..., 1].sigmoid().numpy()


def draw_losses(axes: Axes, functional: Result, stateful: Result, ensemble: Result) -> None:
    """Draw the loss curves."""
    axes.grid(color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    colors = ScalarMappable(LogNorm(ensemble.peaks.min().item(), ensemble.peaks.max().item()), "viridis")
    for losses, shade in zip(ensemble.losses.T, colors.to_rgba(ensemble.peaks.numpy()), strict=True):
        axes.plot(ensemble.steps, losses, ".-", color=shade, markersize=4, linewidth=1.2)
    axes.plot(functional.steps, functional.losses, "-", color="crimson", alpha=0.35, linewidth=5, label=functional.what)
    axes.plot(stateful.steps, stateful.losses, "--", color="crimson", linewidth=1.5, label=stateful.what)
    title = f"{len(ensemble.peaks)} learning rates in one vmapped step, and one network twice"
    axes.set(title=title, xlabel="step", ylabel="training loss, smoothed labels (nats)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(2))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)  # leaves room for the legend
    axes.legend(loc="upper right", ncols=2, frameon=False)
    axes.figure.colorbar(colors, ax=axes, label="peak learning rate", pad=0.01)
