"""A sample of the cells of expensive tests is run: which, when the others, and how to run all."""

import math
import pathlib
import re
from typing import NamedTuple

import pytest
from tiers import CELLS, sample

KINDS = ("cheap", "expensive", "long")
ALL = set(range(30))
TESTS = """
import pytest
cells = pytest.mark.parametrize("i", range(30))

@cells
def test_cheap(i):
    pass

@pytest.mark.sampled(size=3)
@cells
def test_expensive(i, pytestconfig):
    assert not (pytestconfig.rootpath / "broken").exists()

@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("i", range(20))
def test_long(i):
    pass

@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("i", range(20, 30))
def test_long_too(i):
    pass
"""
HELPERS = pathlib.Path(__file__).parents[1] / "helpers"


@pytest.mark.parametrize("count", [0, 1, CELLS - 1, CELLS, CELLS + 1, 150, 10 * CELLS])
def test_every_cell_is_run_once_in_a_bounded_number_of_runs(count):
    cells = [f"test[{i}]" for i in range(count)]
    runs = [sample(cells, seed) for seed in range(739, 739 + max(1, math.ceil(count / CELLS)))]
    assert sorted(cell for run in runs for cell in run) == sorted(cells)
    assert max(len(run) for run in runs) <= CELLS
    assert max(len(run) for run in runs) - min(len(run) for run in runs) <= 1


def test_the_sample_depends_on_the_seed_and_the_test_alone():
    cells = [f"test_a[{i}]" for i in range(30)]
    assert sample(cells, 5) == sample(cells[::-1], 5) != sample(cells, 6)
    others = {cell.replace("_b", "_a") for cell in sample([cell.replace("_a", "_b") for cell in cells], 5)}
    assert others != sample(cells, 5)


class Run(NamedTuple):
    """The seed, and the cells that were run."""

    seed: int | None
    cheap: set[int]
    expensive: set[int]
    long: set[int]


@pytest.fixture
def run(pytester):
    """Return a function that runs pytest on a cheap and an expensive test of thirty cells each."""
    pytester.makepyprojecttoml(
        f"""
        [tool.pytest.ini_options]
        testpaths = ["tests"]
        pythonpath = ["{HELPERS}"]
        markers = ["sampled(size): expensive"]
        """
    )
    pytester.mkdir("tests")
    (pytester.path / "tests" / "conftest.py").write_text("pytest_plugins = ['tiers']\n")
    (pytester.path / "tests" / "test_it.py").write_text(TESTS)

    def run(*arguments):
        """Return the seed, and the numbers of the cells that were run of each test."""
        output = pytester.runpytest(*arguments, "-rA").stdout.str()
        seed = re.search(r"--sample-seed=(\d+)", output)
        cells = re.findall(r"^(?:PASSED|FAILED) .*::test_(\w+)\[(\d+)\]", output, flags=re.MULTILINE)
        return Run(seed and int(seed[1]), *[{int(i) for name, i in cells if name.startswith(kind)} for kind in KINDS])

    return run


def test_cheap_tests_are_run_whole_and_the_next_run_samples_other_cells(run):
    first = run()
    assert first.cheap == ALL
    assert len(first.expensive) == 3
    second = run()
    assert second.seed == first.seed + 1
    assert len(second.expensive) == 3
    assert not first.expensive & second.expensive


def test_all_workers_take_the_same_sample(run):
    alone = run("tests")
    assert run("tests", "-n", "2") == alone
    seed = f"--sample-seed={alone.seed + 1}"
    assert run(seed, "-n", "2") == run(seed)


def test_the_sample_stays_until_it_passes(run, pytester):
    (pytester.path / "broken").touch()
    failed = run()
    assert run() == failed
    assert run("--last-failed")[1:] == (set(), failed.expensive, set())
    (pytester.path / "broken").unlink()
    assert run() == failed
    assert run().seed == failed.seed + 1


def test_tests_of_a_pool_share_a_sample(run):
    runs = [run(f"--sample-seed={seed}", "-k", "long").long for seed in range(6)]
    assert {len(numbers) for numbers in runs} == {5}
    assert set().union(*runs) == ALL


def test_every_cell_is_run_on_request(run):
    assert run("--exhaustive")[1:] == (ALL, ALL, ALL)
    assert run("tests/test_it.py::test_expensive").expensive == ALL


def test_what_few_names_match_is_run_whole(run):
    assert run("-k", "[29]")[1:] == ({29}, {29}, {29})
