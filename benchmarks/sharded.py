"""Times steps of AdamW over sharded tensors on two processes, beside torch.optim's: `python -m benchmarks.sharded`."""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import functorch_optim as fo

RANKS, STEPS = 2, 12
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


def _worker(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=dist.FileStore(store, RANKS))
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for name, (count, shape) in SHAPES.items():

        def sharded(shape: tuple[int, ...] = shape) -> DTensor:
            return distribute_tensor(torch.randn(shape), mesh, [Shard(0)])

        def make(count: int = count) -> list[torch.nn.Parameter]:
            params = [torch.nn.Parameter(sharded()) for _ in range(count)]
            for p in params:
                p.grad = sharded()
            return params

        steps = _steps(make)
        times: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(STEPS):
            for label, step in steps.items():
                dist.barrier()
                start = time.process_time()
                step()
                times[label].append(1e3 * (time.process_time() - start))
        if rank == 0:
            medians = ", ".join(f"{label} {statistics.median(spent[2:]):.1f}" for label, spent in times.items())
            print(f"{name}: ms of CPU time: {medians}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_worker, (f"{folder}/store",), nprocs=RANKS)
