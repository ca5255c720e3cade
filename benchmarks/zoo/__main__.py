"""Train with every optimizer on the same small tasks: `python -m benchmarks.zoo`, in the root.

Writes docs/zoo.json after every contest, and goes on where it was stopped. Then writes the tables of docs/zoo.md and
its pictures, as `python -m benchmarks.zoo report` does alone. `python -m benchmarks.zoo hypergradients` tunes by
gradients and by random search. `--quick` shows in a minute that all of it works, and writes nothing.
"""

import argparse
import concurrent.futures
import fnmatch
import functools
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TypeAlias

import torch

from benchmarks.zoo import hypergradients, report, results
from benchmarks.zoo.contest import FULL, QUICK, Effort, Result, compete
from benchmarks.zoo.entrants import ENTRANTS, NAMED
from benchmarks.zoo.results import Book
from benchmarks.zoo.tasks import all_tasks

DOCS = pathlib.Path(__file__).parents[2] / "docs"
IN_QUICK = ("sgd", "adamw", "muon_with_adamw", "prodigy", "schedule_free_adamw", "lbfgs")
WIDTH = 30  # of the progress bar
# glibc would give the memory of large tensors back after each operation, and a third of the time would go to that.
KEEP_MEMORY = {f"MALLOC_{name}_THRESHOLD_": str(2**32 - 1) for name in ("MMAP", "TRIM")}
Pair: TypeAlias = tuple[str, str]

tasks = functools.cache(all_tasks)


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked for; 1 if a contest has failed."""
    given = parse(arguments)
    if given.what == "report":
        report.publish(results.read(given.json), given.json.parent)
        return 0
    prepare()
    if given.what == "hypergradients":
        tuned = hypergradients.compare(hypergradients.QUICK if given.quick else hypergradients.FULL)
        if given.quick:
            print("\n".join(report.tuned_table(tuned)))
            return 0
        book = results.read(given.json)._replace(tuned=tuned)
        results.write(given.json, book)
        report.publish(book, given.json.parent)
        return 0
    effort = QUICK if given.quick else FULL
    book = results.new(tasks().values(), effort)
    try:
        book = book if given.quick else results.resumed(given.json, book)
        wanted = [pair for pair in pairs(given.only, given.quick) if pair not in book.results]
    except ValueError as wrong:
        sys.exit(str(wrong))
    failed = hold(wanted, effort, given.workers, book, None if given.quick else given.json)
    print("\n".join(report.medal_table(book)))
    if not given.quick:
        report.publish(book, given.json.parent)
    return int(failed)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("contests", "hypergradients", "report"), default="contests")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tasks and optimizers, such as digits_mlp 'adam*'")
    parser.add_argument("--quick", action="store_true", help="a few optimizers for a few steps, without a file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", default=DOCS / "zoo.json", help="for the results")
    return parser.parse_args(arguments)


def pairs(only: list[str] | None, quick: bool) -> list[Pair]:
    """List the contests that are asked for; those of a task are next to each other.

    Raises:
        ValueError: a name is neither a task nor an optimizer.
    """
    entrants = list(IN_QUICK) if quick else [entrant.name for entrant in ENTRANTS]
    chosen = [
        [name for name in names if any(fnmatch.fnmatch(name, glob) for glob in only or [])]
        for names in (tasks(), NAMED)
    ]
    for glob in only or []:
        if not fnmatch.filter([*tasks(), *NAMED], glob):
            raise ValueError(f"--only {glob!r} is no task and no optimizer; tasks: {', '.join(tasks())}")
    return [(task, entrant) for task in chosen[0] or tasks() for entrant in chosen[1] or entrants]


def hold(wanted: list[Pair], effort: Effort, workers: int, book: Book, path: pathlib.Path | None) -> bool:
    """Hold contests, and write each result at once; return whether one has failed."""
    begin, failed = time.monotonic(), False
    for done, (pair, result) in enumerate(held(wanted, effort, workers), start=1):
        if isinstance(result, Result):
            book.results[pair] = result
            if path is not None:
                results.write(path, book)
        else:
            failed = True
            print(f"\n{' '.join(pair)} failed: {type(result).__name__}: {result}", file=sys.stderr)
        left = (time.monotonic() - begin) * (len(wanted) - done) / done
        bar = "#" * (WIDTH * done // len(wanted))
        end = "\r" if sys.stderr.isatty() and done < len(wanted) else "\n"
        said = f"[{bar:<{WIDTH}}] {done}/{len(wanted)}, {left / 60:.1f} minutes left, {' '.join(pair):<40}"
        print(said, end=end, file=sys.stderr, flush=True)
    return failed


def held(wanted: list[Pair], effort: Effort, workers: int) -> Iterator[tuple[Pair, Result | Exception]]:
    """Yield results as they come; with one worker, of this process."""
    if workers == 1:
        for pair in wanted:
            yield pair, contest(pair, effort)
        return
    os.environ.update({**KEEP_MEMORY, **os.environ})
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, prepare) as pool:
        futures = {pool.submit(contest, pair, effort): pair for pair in wanted}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()


def contest(pair: Pair, effort: Effort) -> Result | Exception:
    """Hold a contest; return what it raises, since the others are worth having."""
    try:
        return compete(tasks()[pair[0]], NAMED[pair[1]], effort)
    except Exception as error:
        return error


def prepare() -> None:
    """Set up a process: one thread, and no numbers so small that the processor is slow with them."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


if __name__ == "__main__":
    sys.exit(main())
