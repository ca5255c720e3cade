"""A plugin of pytest that keeps the default run short: of a test marked `sampled`, it takes a sample of the cells.

A cell is a test function with one set of parameters, such as a property of one row of the catalogue. Compilation,
Hessians and long runs are marked `@pytest.mark.sampled`. The default run takes about `CELLS` of the cells of each such
test, or as many as `sampled(size=...)` says, however many rows there are. Single tests that are expensive share a pool:
of all that are marked `sampled(pool="compiled")`, some are run.

The seed chooses them, and pytest prints it. Consecutive seeds take disjoint samples until every cell has had its turn,
and each run of everything that passes is followed by the next seed.

`--exhaustive` runs every cell. So do `--last-failed` and a call that names tests, as `pytest tests/test_x.py::test_y`.
Where `-k` or `-m` leaves few cells of a test, all of them are run.
"""

import datetime
import hashlib
import math

import pytest

CELLS = 16
POOLS = {"compiled": 8, "long": 5}
KEY = "sample/seed"


def sample(cells: list[str], seed: int, size: int = CELLS) -> set[str]:
    """Choose cells: about `size`, at least one, and each of them by exactly one seed in `ceil(len(cells) / size)`."""
    shuffled = sorted(cells, key=lambda cell: hashlib.sha256(cell.encode()).digest())
    parts = max(1, math.ceil(len(cells) / size))
    return set(shuffled[seed % parts :: parts])


def pytest_addoption(parser):
    group = parser.getgroup("tiers")
    group.addoption("--exhaustive", action="store_true", help="run every cell of the tests marked sampled")
    group.addoption("--sample-seed", type=int, help="choose the cells of the tests marked sampled")


def pytest_configure(config):
    if config.option.sample_seed is None:  # workers are given the options as they are after this
        today = datetime.date.today().toordinal()
        config.option.sample_seed = config.cache.get(KEY, today) if hasattr(config, "cache") else today


def everything(config):
    """Tell whether the call names no files."""
    return config.args_source is config.ArgsSource.TESTPATHS


def exhaustive(config):
    named = any("::" in argument for argument in config.args)
    return config.option.exhaustive or named or config.getoption("lf", False)


def pytest_report_header(config):
    if exhaustive(config):
        return "sample: every cell"
    seed = config.option.sample_seed
    return f"sample: of expensive tests, the cells of --sample-seed={seed}; all with --exhaustive"


def population(item, size=CELLS, pool=None):
    """Return what a sample is taken of, a test function or a pool, and the size of the sample."""
    return (pool, POOLS[pool]) if pool else (item.nodeid.partition("[")[0], size)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    if exhaustive(config):
        return
    cells = {}
    for item in items:
        if mark := item.get_closest_marker("sampled"):
            cells.setdefault(population(item, **mark.kwargs), []).append(item.nodeid)
    left = set().union(*(set(of) - sample(of, config.option.sample_seed, size) for (_, size), of in cells.items()))
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
        items[:] = [item for item in items if item.nodeid not in left]


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    whole = everything(config) and not exhaustive(config) and not config.option.keyword and not config.option.markexpr
    if whole and exitstatus == pytest.ExitCode.OK and hasattr(config, "cache") and not hasattr(config, "workerinput"):
        config.cache.set(KEY, config.option.sample_seed + 1)
