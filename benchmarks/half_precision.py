"""Trainings in bfloat16 beside one in float32: digits, and a language model of characters, of the zoo.

python -m benchmarks.half_precision

It prints the loss on validation data after training, and draws `docs/pictures/half_precision.png`. `--quick` shows that
it works, and draws nothing.
"""

import argparse
import pathlib

import torch
from matplotlib.figure import Figure

import functorch_optim as fo
from benchmarks.zoo.tasks import Task, all_tasks

PICTURE = pathlib.Path(__file__).parents[1] / "docs" / "pictures" / "half_precision.png"
STEPS, POINTS = 2000, 40
STYLES = (
    {"color": "0.8", "linewidth": 6},
    {"color": "C3"},
    {"color": "C1"},
    *[
        {"color": f"C{color}", "linestyle": (start, (5, 10)), "linewidth": 2}
        for color, start in ((0, 0), (2, 5), (4, 10))
    ],
)
"""Lines that lie on each other are dashed in turn."""
RATES = {"digits_mlp": 2e-4, "characters": 3e-4}


def trainings(lr: float) -> dict[str, tuple[fo.GradientTransformation, torch.dtype]]:
    """Return transformations and the dtypes of their parameters, by name."""
    adamw = fo.adamw(lr)
    wide = fo.cast_states(adamw)
    return {
        "float32": (adamw, torch.float32),
        "bfloat16": (adamw, torch.bfloat16),
        "bfloat16, cast_states": (wide, torch.bfloat16),
        "bfloat16, master_weights": (fo.master_weights(adamw), torch.bfloat16),
        "bfloat16, kahan(cast_states)": (fo.kahan(wide), torch.bfloat16),
        "bfloat16, stochastic_rounding(cast_states)": (fo.stochastic_rounding(wide, generator=0), torch.bfloat16),
    }


def losses(task: Task, tx: fo.GradientTransformation, dtype: torch.dtype, steps: int, points: int) -> list[float]:
    """Train, with gradients and activations in the dtype of the parameters; return losses on validation data."""

    def loss(params: fo.tree.Tree, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return task.loss(params, batch)

    params = fo.tree.cast(task.init(0), dtype)
    state, found = tx.init(params), []
    for t, batch in enumerate(task.batches(0, steps), start=1):
        params, state = fo.step_(tx, torch.func.grad(loss)(params, batch), state, params)
        if t % (steps // points) == 0:
            found.append(task.validation(fo.tree.cast(params, torch.float32)).item())
    return found


def draw(curves: dict[str, dict[str, list[float]]]) -> None:
    """Draw a panel for each task."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
        for (label, line), style in zip(lines.items(), STYLES, strict=True):
            axes.plot([STEPS // POINTS * (i + 1) for i in range(len(line))], line, label=label, **style)
        axes.set_title(all_tasks()[name].title, fontsize=10)
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss on validation data")
    legend = figure.axes[-1].legend(frameon=False, fontsize=8)
    for line in legend.get_lines():
        line.set_linestyle("-")
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    """Train, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, and no picture")
    quick = parser.parse_args().quick
    steps, points = (4, 2) if quick else (STEPS, POINTS)
    curves = {
        name: {label: losses(all_tasks()[name], *how, steps, points) for label, how in trainings(lr).items()}
        for name, lr in RATES.items()
    }
    for label in trainings(1.0):
        print(f"| {label} | " + " | ".join(f"{lines[label][-1]:.3f}" for lines in curves.values()) + " |")
    if not quick:
        draw(curves)


if __name__ == "__main__":
    main()
