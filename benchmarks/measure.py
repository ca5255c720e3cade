"""Ways to do the same work, measured in turns, and what is said of them."""

import contextlib
import functools
import gc
import importlib.metadata
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

Way = Callable[[], Callable[[], Any]]  # prepares everything, and returns the function that is measured
PACKAGES = (
    *("functorch_optim", "torch", "optree", "torchopt", "higher", "optax", "jax"),
    *("pytorch_optimizer", "prodigyopt", "schedulefree", "dog-optimizer"),
)
MANY, FEW = 25, 5  # rounds
ENOUGH = 10.0  # seconds for a comparison, after which there are few rounds
WORTH_TIMING = 2e-3  # seconds; what is faster is called many times


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Return a function that times `function`, which is warm by then; the mean of many calls if they are short."""
    for _ in range(2):
        function()
    calls = max(1, int(WORTH_TIMING / _time(function, 1, clock)))
    return lambda: _time(function, calls, clock) / calls


def cpu_seconds(function: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that takes the time of `function` on the processor, without that of waiting for it."""
    return seconds(function, time.process_time)


def value(function: Callable[[], float]) -> Callable[[], float]:
    """Return the function itself, whose result is what is measured."""
    return function


def _time(function: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    _wait()
    begin = clock()
    for _ in range(calls):
        function()
    _wait()
    return clock() - begin


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Unit(NamedTuple):
    """A unit, and how many of it are one of what is measured."""

    name: str = "ms"
    scale: float = 1e3


class Comparison(NamedTuple):
    """Ways to do the same work.

    Attributes:
        work: what is done, and by what of ours.
        case: on what.
        ours: our way.
        peers: the ways of others; one that is not installed is said to be missing.
        bar: the largest ratio to the fastest peer that we allow ourselves; without peers the largest value.
        measure: what turns the function of a way into one that returns a sample.
        unit: in which samples are printed, and the bar is meant.
        floor: what every way has to do besides, and is taken off their samples.
        rounds: how many samples of each way there are at most.
    """

    work: str
    case: str
    ours: Way
    peers: Mapping[str, Way] = {}
    bar: float | None = None
    measure: Callable[[Callable[[], Any]], Callable[[], float]] = seconds
    unit: Unit = Unit()
    floor: Way | None = None
    rounds: int = MANY


class Summary(NamedTuple):
    """The quartiles of samples."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> "Summary":
        """Summarize one sample or more."""
        return cls(*statistics.quantiles(samples, method="inclusive")) if len(samples) > 1 else cls(*samples * 3)


class Outcome(NamedTuple):
    """What came out of a comparison.

    Attributes:
        work, case, unit, bar: those of the comparison.
        ours: our samples, in this unit, or why there are none.
        peers: those of the others; the fastest comes first.
        ratio: of our samples to those of the fastest peer in the same rounds; None where there is no such.
        floor: what was taken off the samples, if anything.
        disturbed: how many cores other programs had in use meanwhile. With as many threads as cores one is enough to
            make each parallel operation wait for milliseconds, so that such figures are worth nothing.
    """

    work: str
    case: str
    unit: str
    bar: float | None
    ours: Summary | str
    peers: dict[str, Summary | str]
    ratio: Summary | None
    floor: Summary | None
    disturbed: float

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none, or nothing to compare with."""
        against = self.ours if not self.peers else self.ratio
        return None if self.bar is None or not isinstance(against, Summary) else against.median <= self.bar


def compare(comparison: Comparison, rounds: int) -> Outcome:
    """Measure all ways in turns, for as many rounds at most, so that whatever disturbs them disturbs all alike."""
    ways = {"ours": comparison.ours, **comparison.peers}
    if comparison.floor is not None:
        ways["floor"] = comparison.floor
    begin, others = time.perf_counter(), _seconds_of_others()
    samples, failed = _in_turns(ways, comparison.measure, min(rounds, comparison.rounds))
    disturbed = (_seconds_of_others() - others) / (time.perf_counter() - begin)
    samples = {name: [comparison.unit.scale * sample for sample in taken] for name, taken in samples.items()}
    floor = samples.pop("floor", None)
    if floor is not None:
        samples = {name: [a - b for a, b in zip(taken, floor, strict=True)] for name, taken in samples.items()}
    found = {name: Summary.of(taken) for name, taken in samples.items()}
    fastest = sorted(found.keys() - {"ours"}, key=lambda name: found[name].median)
    ratio = None
    if fastest and "ours" in found:
        ratio = Summary.of([_ratio(a, b) for a, b in zip(samples["ours"], samples[fastest[0]], strict=True)])
    said: dict[str, Summary | str] = {**found, **failed}
    return Outcome(
        comparison.work,
        comparison.case,
        comparison.unit.name,
        comparison.bar,
        said["ours"],
        {name: said[name] for name in [*fastest, *(name for name in comparison.peers if name in failed)]},
        ratio,
        None if floor is None else Summary.of(floor),
        disturbed,
    )


def _ratio(a: float, b: float) -> float:
    """Divide; nothing is as much as nothing."""
    return 1.0 if a == b else a / b if b else math.inf


def _in_turns(
    ways: Mapping[str, Way], measure: Callable[[Callable[[], Any]], Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the samples of the ways that work, and what is wrong with the others."""
    functions: dict[str, Callable[[], float]] = {}
    samples: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for name, way in ways.items():
        with _noting(failed, name):
            functions[name], samples[name] = measure(way()), []
    frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()  # so that each collection looks only at what is new
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEW and time.perf_counter() - begin > ENOUGH:
            break
        gc.collect()
        gc.disable()
        for name in list(functions)[:: -1 if done % 2 else 1]:  # for each may leave the caches cold for the next
            with _noting(failed, name):
                samples[name].append(functions[name]())
        gc.enable()
    if not frozen:
        gc.unfreeze()
    return {name: taken for name, taken in samples.items() if name not in failed}, failed


def _seconds_of_others() -> float:
    """Return how long other programs have had the cores; 0 where it is not known."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = [int(ticks) for ticks in stat.read_text().split()[1:4]]
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


@contextlib.contextmanager
def _noting(failed: dict[str, str], name: str) -> Iterator[None]:
    """Note what is raised: a peer may be missing or too old for this torch, and the other rows are worth having."""
    try:
        yield
    except ModuleNotFoundError as missing:
        failed[name] = f"{missing.name} is not installed"
    except Exception as reason:
        failed[name] = f"{type(reason).__name__}: {str(reason).strip().partition(chr(10))[0]}"


def environment() -> dict[str, Any]:
    """Return what the figures depend on: versions and the machine."""
    return {
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}),
    }


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # which says more than the metadata: cpu or cuda
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _cpu() -> str:
    """Return the name of the processor, which Python does not know on Linux."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
