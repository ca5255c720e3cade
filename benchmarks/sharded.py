"""Times steps over sharded tensors on several processes: `python -m benchmarks.sharded`.

AdamW on two, beside torch.optim's; and Muon on two and four, where each matrix is computed by one of them, beside every
process computing all. `python -m benchmarks.sharded adamw` and `... muon` run one of the two.
"""

import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import functorch_optim as fo
from functorch_optim._execution import wholes
from functorch_optim._execution.sharded import Layout

STEPS = 12
SHAPES = {"8 of 512 x 512": (8, (512, 512)), "100 of 64 x 32": (100, (64, 32)), "500 of 64 x 32": (500, (64, 32))}
Step = Callable[[], object]


def _steps(make: Callable[[], list[torch.nn.Parameter]]) -> dict[str, Step]:
    def clipped() -> Step:
        params = make()
        optimizer = torch.optim.AdamW(params, fused=True)

        def step() -> None:
            grads = [p.grad for p in params]
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

        return step

    return {
        "torch, foreach": torch.optim.AdamW(make(), foreach=True).step,
        "torch, fused": torch.optim.AdamW(make(), fused=True).step,
        "fo.optim": fo.optim.AdamW(make()).step,
        "fo.Optimizer": fo.Optimizer(make(), fo.adamw(1e-3)).step,
        "torch, clipped": clipped(),
        "fo.Optimizer, clipped": fo.Optimizer(make(), fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-3))).step,
    }


def _begin(rank: int, ranks: int, store: str) -> dist.device_mesh.DeviceMesh:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(store, ranks))
    return dist.init_device_mesh("cpu", (ranks,))


def _params(mesh: dist.device_mesh.DeviceMesh, count: int, shape: tuple[int, ...]) -> list[torch.nn.Parameter]:
    def sharded() -> DTensor:
        return distribute_tensor(torch.randn(shape), mesh, [Shard(0)])

    params = [torch.nn.Parameter(sharded()) for _ in range(count)]
    for p in params:
        p.grad = sharded()
    return params


def _medians(steps: dict[str, Step]) -> dict[str, float]:
    """Measure steps in turn: ms of this process's CPU time."""
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(STEPS):
        for label, step in steps.items():
            dist.barrier()
            start = time.process_time()
            step()
            times[label].append(1e3 * (time.process_time() - start))
    return {label: statistics.median(spent[2:]) for label, spent in times.items()}


def _adamw(rank: int, ranks: int, store: str) -> None:
    mesh = _begin(rank, ranks, store)
    for name, (count, shape) in SHAPES.items():
        medians = _medians(_steps(functools.partial(_params, mesh, count, shape)))
        if rank == 0:
            spent = ", ".join(f"{label} {median:.1f}" for label, median in medians.items())
            print(f"AdamW, {name}: ms of CPU time: {spent}", flush=True)
    dist.destroy_process_group()


def _muon(rank: int, ranks: int, store: str) -> None:
    """Also counts the bytes that each process receives from others."""
    mesh = _begin(rank, ranks, store)
    received = 0
    exchange, whole, owners = dist.all_to_all_single, Layout.whole, wholes._owners

    def exchanging(
        output: Tensor, given: Tensor, output_sizes: list[int], input_sizes: list[int], group: object
    ) -> None:
        nonlocal received
        received += sum(output_sizes) - output_sizes[rank]
        exchange(output, given, output_sizes, input_sizes, group=group)

    def gathering(layout: Layout, shard: Tensor) -> Tensor:
        nonlocal received
        found = whole(layout, shard)
        received += (found.numel() - shard.numel()) * shard.itemsize
        return found

    dist.all_to_all_single, Layout.whole = exchanging, gathering
    for label in ("each matrix by one process", "all by every process"):
        wholes._owners = owners if label.startswith("each") else lambda layouts, states: None
        step = fo.Optimizer(_params(mesh, 8, (512, 512)), fo.muon(1e-3, ns_dtype=None)).step
        step()
        received = 0
        median = _medians({label: step})[label]
        if rank == 0:
            print(
                f"Muon, 8 of 512 x 512, {ranks} processes, {label}: {median:.0f} ms of CPU time, "
                f"{received / STEPS / 2**20:.1f} MiB received by a process",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    for section, worker, ranks in (("adamw", _adamw, 2), ("muon", _muon, 2), ("muon", _muon, 4)):
        if section in (sys.argv[1:] or ("adamw", "muon")):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(worker, (ranks, f"{folder}/store"), nprocs=ranks)
