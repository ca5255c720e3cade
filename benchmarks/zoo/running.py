"""Many contests, in processes of one thread each."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Iterator
from typing import TypeAlias

import torch

from benchmarks.zoo.contest import Effort, Result, compete
from benchmarks.zoo.entrants import NAMED
from benchmarks.zoo.tasks import all_tasks

Pair: TypeAlias = tuple[str, str]  # a task and an optimizer
# glibc would give the memory of large tensors back after each operation, and a third of the time would go to that.
KEEP_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(2**32 - 1) for name in ("MMAP", "TRIM")}


def held(wanted: list[Pair], effort: Effort, workers: int) -> Iterator[tuple[Pair, Result | Exception]]:
    """Yield results as they come; with one worker, of this process."""
    if workers == 1:
        for pair in wanted:
            yield pair, contest(pair, effort)
        return
    os.environ.update({**KEEP_MEMORY, **os.environ})
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, prepare)
    futures = {pool.submit(contest, pair, effort): pair for pair in wanted}
    try:
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # when somebody stops the run, only the contests that have begun are ended


def contest(pair: Pair, effort: Effort) -> Result | Exception:
    """Hold a contest; return its error, if there is one, since the others are worth having."""
    try:
        return compete(all_tasks()[pair[0]], NAMED[pair[1]], effort)
    except Exception as error:
        return error


def prepare() -> None:
    """Set up a process: one thread, and no numbers so small that the processor is slow with them."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
