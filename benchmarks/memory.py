"""Measure the derivative of a training run with respect to its learning rate: `python benchmarks/memory.py`.

Adam trains one tensor. Peak memory of all tensors, in multiples of that tensor; time in milliseconds, best of three.
"""

import pathlib
import sys
import time
from collections.abc import Callable

import torch

import functorch_optim as fo

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests/helpers"))

from memory import peak_bytes

SIZE = 100_000
STEPS = (16, 64, 256, 1024)
TARGET = torch.randn(SIZE)


def loss_fn(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Stand for a network with one activation."""
    return (torch.tanh(params["w"] * x) - TARGET).square().mean()


def outer(lr: torch.Tensor, steps: int, checkpoint: bool) -> torch.Tensor:
    """Train, and return the loss after it."""
    batches = torch.linspace(1, 2, steps)
    trained = fo.meta.unroll(loss_fn, fo.adam(lr), {"w": torch.ones(SIZE)}, batches, checkpoint=checkpoint)
    return loss_fn(trained.params, torch.ones(()))


def backward(steps: int, checkpoint: bool) -> torch.Tensor:
    """Differentiate with plain autograd."""
    lr = torch.tensor(1e-3, requires_grad=True)
    return torch.autograd.grad(outer(lr, steps, checkpoint), lr)[0]


WAYS: dict[str, Callable[[int], torch.Tensor]] = {
    "torch.func.grad": lambda steps: torch.func.grad(outer)(torch.tensor(1e-3), steps, False),
    "torch.func.grad, checkpoint": lambda steps: torch.func.grad(outer)(torch.tensor(1e-3), steps, True),
    "backward": lambda steps: backward(steps, False),
    "backward, checkpoint": lambda steps: backward(steps, True),
    "forward_grad": lambda steps: fo.meta.forward_grad(outer)(torch.tensor(1e-3), steps, False),
}


def milliseconds(function: Callable[[], object]) -> float:
    """Time the best of three runs."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def main() -> None:
    """Print a row for each way, a column for each number of steps."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {SIZE} numbers in float32\n")
    print("| peak memory; time | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |")
    print("|---" * (len(STEPS) + 1) + "|")
    for name, way in WAYS.items():
        cells = []
        for steps in STEPS:
            multiple = peak_bytes(lambda way=way, steps=steps: way(steps)) / (4 * SIZE)
            cells.append(f"{multiple:.0f}; {milliseconds(lambda way=way, steps=steps: way(steps)):.0f} ms")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
