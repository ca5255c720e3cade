"""What is waited for before the first step: imports and compilation, each in a fresh process."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer

import functorch_optim as fo
from benchmarks.measure import Comparison, Unit, Way, value
from benchmarks.shapes import SHAPES, Setting

Make = Callable[[list[Tensor]], Optimizer]
ROOT = pathlib.Path(__file__).parents[1]
SECONDS = Unit("s", 1.0)
IMPORT = """
import time, torch
begin = time.perf_counter()
import functorch_optim
print(time.perf_counter() - begin)
"""


def imported(setting: Setting) -> Iterator[Comparison]:
    """`import functorch_optim` after `import torch`."""
    yield Comparison("import", "", lambda: partial(printed, IMPORT), bar=0.15, measure=value, unit=SECONDS, rounds=11)


def first_step(setting: Setting) -> Iterator[Comparison]:
    """The first fused step of AdamW, compilation included; and compilations in the hundred steps after it."""
    compared = partial(Comparison, measure=value)
    ours, theirs = [run_apart(waiting, make, setting) for make in (fused, compiled)]
    peers = {} if setting.quick else {"torch.compile(torch.optim.AdamW(params).step)": theirs}
    yield compared("first fused step", "resnet", ours, peers, 0.2, unit=SECONDS, rounds=1 if setting.quick else 3)
    again = run_apart(compilations, fused, setting)
    yield compared("compilations in 100 more steps", "resnet", again, bar=0, unit=Unit("", 1.0), rounds=1)


def run_apart(function: Callable[[Make, bool], float], make: Make, setting: Setting) -> Way:
    """Return the way that calls a function of this file in a process of its own."""
    code = f"from benchmarks.startup import *; print({function.__name__}({make.__name__}, {setting.quick}))"
    return lambda: partial(printed, code)


def printed(code: str) -> float:
    """Run a program in a fresh process, where nothing is compiled yet, and return the number that it prints."""
    with tempfile.TemporaryDirectory() as empty:
        surroundings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": empty}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=surroundings, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


# In that process. -----------------------------------------------------------------------------------------------------


def fused(params: list[Tensor]) -> Optimizer:
    """Return ours around a chain, which is compiled: `fo.optim.AdamW` has torch's kernel, and nothing to compile."""
    return fo.Optimizer(params, fo.adamw, lr=1e-3, fused=True)


def compiled(params: list[Tensor]) -> Optimizer:
    """Return torch's; its learning rate is a tensor, for otherwise each new one is compiled."""
    optimizer = torch.optim.AdamW(params, lr=torch.tensor(1e-3))
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def begin(make: Make, quick: bool) -> tuple[Optimizer, float]:
    """Return an optimizer after its first step, and how many seconds both took."""
    setting = Setting(quick)
    params = setting.parameters(setting.tiny(SHAPES["resnet"]))
    start = time.perf_counter()
    optimizer = make(params)
    optimizer.step()
    return optimizer, time.perf_counter() - start


def waiting(make: Make, quick: bool) -> float:
    """Return how long the first step is waited for."""
    return begin(make, quick)[1]


def compilations(make: Make, quick: bool) -> int:
    """Count what torch compiles in a hundred steps after the first, the learning rate another in each."""
    optimizer, _ = begin(make, quick)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    before = phases()
    for _ in range(100):
        optimizer.step()
        scheduler.step()
    return phases() - before


def phases() -> int:
    """Return how many phases of compilations there have been, of Dynamo, AOTAutograd and Inductor together."""
    return sum(map(len, torch._dynamo.utils.compilation_time_metrics.values()))
