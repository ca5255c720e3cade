"""The picture of the zoo: how far each optimizer gets with each learning rate, a panel for each."""

import math
import pathlib

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.zoo.contest import Result
from benchmarks.zoo.entrants import NAMED
from benchmarks.zoo.results import Book

COLUMNS = 8
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C8", "C9")
ENOUGH = 0.01  # of the target; a loss below is as good


def heights(result: Result, best: float) -> list[float]:
    """Return the part of the way to the best loss of all that was gone with each rate, by the logarithm of the loss."""
    whole = math.log(result.untrained / best)

    def gone(loss: float) -> float:
        return 0.0 if loss >= result.untrained else math.log(result.untrained / max(loss, best)) / whole

    return [gone(min(losses)) for losses in zip(*result.losses, strict=True)]


def draw(book: Book, path: pathlib.Path) -> None:
    """Draw a panel for each optimizer, with a line for each task; those that get far with many rates come first."""
    lowest = {task: [min(map(min, r.losses)) for (t, _), r in book.results.items() if t == task] for task in book.tasks}
    best = {task: max(min(lowest[task], default=1.0), ENOUGH * said["target"]) for task, said in book.tasks.items()}
    lines = {pair: heights(result, best[pair[0]]) for pair, result in book.results.items()}
    sums = {name: sum(sum(line) for (_, other), line in lines.items() if other == name) for name in book.entrants}
    order = sorted(book.entrants, key=lambda name: -sums[name])
    rows = math.ceil(len(order) / COLUMNS)
    figure = Figure(figsize=(14, 1.3 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, order, strict=False):
        draw_panel(axes, name, book, lines)
    for axes in panels.flat[len(order) :]:
        axes.set_axis_off()
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=(len(labels) + 1) // 2, frameon=False, fontsize=9)
    figure.supxlabel("learning rate; the dotted line is the default", fontsize=10)
    figure.supylabel("way to the best loss of all", fontsize=10)
    figure.savefig(path, dpi=110)


def draw_panel(axes: Axes, name: str, book: Book, lines: dict[tuple[str, str], list[float]]) -> None:
    """Draw the lines of an optimizer."""
    for task, color in zip(book.tasks, COLORS, strict=False):
        if (task, name) in lines:
            lrs = book.results[task, name].lrs
            axes.plot(lrs, lines[task, name], color=color, linewidth=1.1, label=book.tasks[task]["title"])
    axes.axvline(NAMED[name].default, color="0.5", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([1e-5, 1e-3, 1e-1, 10])
    axes.set_ylim(-0.04, 1.06)
    axes.set_yticks([0, 1])
    axes.tick_params(labelsize=7, length=2)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, fontsize=8.5, pad=2)
