"""Runs functions on several ranks: processes on this machine that talk by gloo."""

import datetime
import multiprocessing
import pickle
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist


def on_ranks(n, functions):
    """Run functions of a mesh, one after the other, on n ranks; raise what the first failing one raised.

    Each is a function at the top of a module: `function(mesh)`.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Ranks are forks of a process that has imported everything, and has done nothing.
        multiprocessing.set_forkserver_preload(
            ["functorch_optim", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.tensor"]
        )
        context = torch.multiprocessing.start_processes(
            _run, (n, folder, functions), nprocs=n, join=False, start_method="forkserver"
        )
        while not context.join(grace_period=5):
            pass
        failed = [pickle.loads(path.read_bytes()) for path in sorted(Path(folder).glob("failed*"))]
    assert not failed, "\n".join(failed)


def _run(rank, n, folder, functions):
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", n)
    dist.init_process_group("gloo", rank=rank, world_size=n, store=store, timeout=datetime.timedelta(seconds=60))
    mesh = dist.init_device_mesh("cpu", (n,))
    for function in functions:
        torch.manual_seed(0)
        try:
            function(mesh)
        except Exception:
            text = f"{function} on rank {rank} of {n}:\n{traceback.format_exc()}"
            Path(folder, f"failed{rank}").write_bytes(pickle.dumps(text))
            return  # the others run into the timeout of a collective, or end
    dist.barrier()
    dist.destroy_process_group()
