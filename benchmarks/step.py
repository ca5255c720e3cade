"""Time one Adam step in every way there is, against torch.optim: `python benchmarks/step.py`.

Interleaved in one process; medians in milliseconds, and their ratio to torch's default.
"""

import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

import functorch_optim as fo
from functorch_optim import execution

SHAPES = {
    "mlp (6 tensors, 26k)": [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)],
    "small (500 tensors, 72k)": [(12, 12)] * 500,
    "medium (160 tensors, 10M)": [(256, 256)] * 152 + [(64,)] * 8,
    "big (2 tensors, 33.5M)": [(4096, 4096)] * 2,
}


def ways(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    """Return a function for each way that runs one step on tensors of its own."""

    def params() -> list[torch.Tensor]:
        made = [torch.randn(shape, requires_grad=True) for shape in shapes]
        for param in made:
            param.grad = torch.randn_like(param)
        return made

    def functional(*transformations: fo.GradientTransformation) -> Callable[[], None]:
        trained = [param.detach() for param in params()]
        grads = [torch.randn_like(param) for param in trained]
        states = [tx.init(trained) for tx in transformations]

        def step() -> None:
            nonlocal trained
            updates = grads
            for k, tx in enumerate(transformations):
                updates, states[k] = tx.update(updates, states[k], trained)
            trained = fo.apply_updates(trained, updates)

        return step

    def tensor_by_tensor(step: Callable[[], None]) -> Callable[[], None]:
        return mock.patch.object(execution, "_can_batch", return_value=False)(lambda _: step())

    links = fo.add_decayed_weights(1e-2), fo.scale_by_adam(), fo.scale_by_learning_rate(1e-3)
    return {
        "torch.optim.Adam": torch.optim.Adam(params(), weight_decay=1e-2).step,
        "torch.optim.Adam(foreach=True)": torch.optim.Adam(params(), weight_decay=1e-2, foreach=True).step,
        "torch.optim.Adam(fused=True)": torch.optim.Adam(params(), weight_decay=1e-2, fused=True).step,
        "fo.Optimizer(params, fo.adam)": fo.Optimizer(params(), fo.adam, weight_decay=1e-2).step,
        "functional, one chain": functional(fo.chain(*links)),
        "functional, link by link": functional(*links),
        "functional, tensor by tensor": tensor_by_tensor(functional(fo.chain(*links))),
    }


def measure(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of ten interleaved runs, after three that do not count."""
    times: dict[str, list[float]] = {way: [] for way in functions}
    for repetition in range(13):
        for way, function in functions.items():
            start = time.perf_counter()
            function()
            if repetition >= 3:
                times[way].append((time.perf_counter() - start) * 1e3)
    return {way: statistics.median(measured) for way, measured in times.items()}


def main() -> None:
    """Print a table for each set of shapes, and the cost for each tensor as they grow more."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, optree {fo.tree.optree.__version__}, {torch.get_num_threads()} threads")
    for name, shapes in SHAPES.items():
        medians = measure(ways(shapes))
        first = next(iter(medians.values()))
        print(f"\n{name}")
        for way, median in medians.items():
            print(f"  {way:36} {median:9.3f} ms  {median / first:6.2f}")

    print("\nmicroseconds for each tensor of 4 elements")
    for count in (10, 100, 1000, 10_000):
        medians = measure(ways([(4,)] * count))
        print(f"  {count:6} tensors: " + ", ".join(f"{way} {1e3 * ms / count:.1f}" for way, ms in medians.items()))


if __name__ == "__main__":
    main()
