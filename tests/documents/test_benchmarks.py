"""The benchmarks measure the work that they name, and those without compilation run."""

import importlib
import json
import math
import pathlib
import subprocess
import sys
import time

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks.__main__ import SECTIONS
from benchmarks.audit import Sample, audit, judge
from benchmarks.measure import Comparison, Summary, Unit, compare, cpu_seconds, seconds, value
from benchmarks.shapes import ALL, SHAPES, Setting, resnet50
from benchmarks.startup import printed
from benchmarks.storage import peak, saved_by

ROOT = pathlib.Path(__file__).parents[2]
UNCOMPILED = (
    "wrappers",
    "eager",
    "packages",
    "flops",
    "functional",
    "calls",
    "memory",
    "unroll",
    "maml",
    "saved",
    "curves",
)


def constant(number):
    return lambda: lambda: number


def from_list(numbers):
    return lambda: iter(numbers).__next__


def measured(ours, peers=None, rounds=3, **options):
    comparison = Comparison("work", "case", ours, peers or {}, measure=value, unit=Unit("", 1.0), **options)
    return compare(comparison, rounds)


@pytest.mark.parametrize("name", UNCOMPILED)
def test_every_section_runs(name):
    for comparison in SECTIONS[name](Setting(quick=True)):
        if not any(compiled in comparison.work for compiled in ("fused", "torch.compile")):
            outcome = compare(comparison, rounds=1)
            assert isinstance(outcome.ours, Summary), outcome


def test_shapes():
    assert len(resnet50()) == 161
    assert sum(torch.Size(shape).numel() for shape in resnet50()) == 25_557_032
    assert sum(torch.Size(shape).numel() for shape in SHAPES["mlp"]) == 26_122
    assert sum(torch.Size(shape).numel() for shape in SHAPES["net"]) == 226
    assert list(Setting(quick=True).shapes(*ALL)) == [("mlp", [(8, 8), (8,), (8, 8), (8,), (8, 8), (8,)])]
    assert [name for name, _ in Setting().shapes(*ALL)] == list(ALL)


def test_the_ratio_is_the_median_of_those_in_the_same_rounds():
    # The machine is ten times slower in the second round, and the medians by themselves say 3.
    ours, theirs = [2.0, 30.0, 3.0], [1.0, 10.0, 1.0]
    outcome = measured(from_list(ours), {"slow": constant(50.0), "fast": from_list(theirs)}, bar=3.0)
    assert outcome.ours == Summary(2.5, 3.0, 16.5)
    assert list(outcome.peers) == ["fast", "slow"]
    assert outcome.ratio == Summary(2.5, 3.0, 3.0)
    assert outcome.met
    assert not measured(constant(3.1), {"theirs": constant(1.0)}, bar=3.0).met


@pytest.mark.parametrize(("ours", "theirs", "ratio"), [(0.0, 0.0, 1.0), (1.0, 0.0, math.inf), (0.0, 1.0, 0.0)])
def test_nothing_is_as_much_as_nothing(ours, theirs, ratio):
    assert measured(constant(ours), {"peer": constant(theirs)}, rounds=1).ratio == Summary(ratio, ratio, ratio)


def test_ways_take_turns():
    log = []
    ways = {name: lambda name=name: lambda: log.append(name) or 1.0 for name in "abc"}
    measured(ways.pop("a"), ways)
    assert "".join(log) == "abccbaabc"


def test_the_floor_is_taken_off():
    outcome = measured(constant(3.0), {"theirs": constant(5.0)}, floor=constant(1.0))
    assert outcome.ours.median == 2.0
    assert outcome.floor.median == 1.0
    assert outcome.ratio.median == 0.5


def test_without_peers_the_bar_is_for_the_value():
    assert measured(constant(0.1), bar=0.15).met
    assert not measured(constant(0.2), bar=0.15).met
    assert measured(constant(0.2)).met is None


def test_what_does_not_work_is_said():
    def missing():
        importlib.import_module("no_such_package")

    def broken():
        return lambda: [].pop()

    outcome = measured(constant(1.0), {"missing": missing, "broken": broken, "fine": constant(2.0)}, bar=1.0)
    assert list(outcome.peers) == ["fine", "missing", "broken"]
    assert outcome.peers["missing"] == "no_such_package is not installed"
    assert outcome.peers["broken"] == "IndexError: pop from empty list"
    assert outcome.ratio.median == 0.5
    alone = measured(constant(1.0), {"missing": missing}, bar=1.0)
    assert alone.ratio is None
    assert alone.met is None
    assert measured(broken, {"fine": constant(2.0)}, bar=1.0).met is None


def test_time():
    assert 0.005 <= seconds(lambda: time.sleep(0.005))() < 0.5
    calls = []
    sample = seconds(lambda: calls.append(1))
    before = len(calls)
    assert sample() < 1e-4
    assert len(calls) - before > 10  # what is short is called many times


def test_time_on_the_processor():
    sample = cpu_seconds(lambda: (time.sleep(0.05), sum(range(100_000))))
    assert 0 < sample() < 0.05  # the sleep is not counted


class Wasteful(torch.optim.SGD):
    """Holds two tensors at a time, and makes three."""

    def step(self):
        [p] = self.param_groups[0]["params"]
        first = torch.empty_like(p)
        second = torch.empty_like(p)
        del first
        first = torch.empty_like(p)
        del second, first


def test_peak():
    assert peak(Wasteful, Setting(), [(1000, 1000)])() == 2 * 4_000_000


def test_saved():
    def train(params, grads, lr):
        for gs in grads:
            # Saved are the exponential, by both operations, and the parameter, which the step before has made.
            params = [torch.exp(g) * p.detach().requires_grad_() for p, g in zip(params, gs, strict=True)]
        return params

    assert saved_by(train, size=10, learned=True)() == 2 * 2 * 400


def test_a_fresh_process():
    assert (
        printed("import os; print('other output'); print(len(os.listdir(os.environ['TORCHINDUCTOR_CACHE_DIR'])))") == 0
    )


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "saved", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "| an unrolled step of Adam | 2 tensors of 64², lr fixed |" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["torch"] == torch.__version__
    [learned, fixed] = found["outcomes"]["saved"]
    assert learned["peers"]["textbook"]["median"] == 2 * 4 * 64 * 64 * 4 / 2**20
    assert fixed["peers"]["textbook"]["median"] == 2 * 3 * 64 * 64 * 4 / 2**20


def test_the_audit_finds_what_is_wrong_and_nothing_else():
    x = [torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)]
    assert judge(Sample(lambda x: x.sin().sum(), x)) == {}
    assert judge(Sample(lambda x: x.relu().sum(), [x[0] * 0])) == {}  # at a kink nothing is asked
    cut = judge(Sample(lambda x: (x * x.detach()).sum(), x))
    assert set(cut) >= {"reverse", "forward"}
    assert all(float(cell) > 0.1 for cell in cut.values())
    assert audit(["nn.functional.rms_norm"]) == {}


def test_the_audit_says_what_raises():
    def detour(x):
        return OnceOnly.apply(x).sum()

    wrong = judge(Sample(detour, [torch.ones(2, dtype=torch.float64)]))
    assert wrong["forward"].startswith("raises: ")
    assert "reverse" not in wrong


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, _):
        pass

    @staticmethod
    def backward(_, grad):
        return 2 * grad
