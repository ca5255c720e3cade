"""Train with every optimizer on the same small tasks: `python -m benchmarks.zoo`, in the root.

Writes docs/zoo.json after every contest, and goes on where it was stopped. Then writes the tables of docs/zoo.md and
its pictures, as `python -m benchmarks.zoo report` does alone. `python -m benchmarks.zoo hypergradients` tunes by
gradients and by random search. `--quick` shows in a minute that all of it works, and writes nothing.
"""

import argparse
import fnmatch
import os
import pathlib
import sys
import time

from benchmarks.zoo import hypergradients, report, results
from benchmarks.zoo.contest import FULL, QUICK, Effort, Result
from benchmarks.zoo.entrants import ENTRANTS, NAMED
from benchmarks.zoo.results import Book
from benchmarks.zoo.running import Pair, held, prepare
from benchmarks.zoo.tasks import all_tasks

DOCS = pathlib.Path(__file__).parents[2] / "docs"
IN_QUICK = ("sgd", "adamw", "muon_with_adamw", "prodigy", "schedule_free_adamw", "lbfgs")
WIDTH = 30  # of the progress bar


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 if a contest has failed."""
    given = parse(arguments)
    prepare()
    if given.what == "hypergradients":
        return tune(given.json, given.quick)
    if given.what == "report":
        report.publish(results.read(given.json), given.json.parent)
        return 0
    effort = QUICK if given.quick else FULL
    book = results.new(all_tasks().values(), effort)
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


def tune(path: pathlib.Path, quick: bool) -> int:
    """Tune by gradients and by random search; write the results into the file."""
    tuned = hypergradients.compare(hypergradients.QUICK if quick else hypergradients.FULL)
    print("\n".join(report.tuned_table(tuned)))
    if not quick:
        book = results.read(path)._replace(tuned=tuned)
        results.write(path, book)
        report.publish(book, path.parent)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("contests", "hypergradients", "report"), default="contests")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="tasks and optimizers, such as digits_mlp 'adam*'")
    parser.add_argument("--quick", action="store_true", help="a few optimizers for a few steps, without a file")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        default=DOCS / "zoo.json",
        help="for the results; a zoo.md beside it gets the tables",
    )
    return parser.parse_args(arguments)


def pairs(only: list[str] | None, quick: bool) -> list[Pair]:
    """List the contests that are asked for; those of a task are next to each other.

    Raises:
        ValueError: a name is neither a task nor an optimizer.
    """
    entrants = list(IN_QUICK) if quick else [entrant.name for entrant in ENTRANTS]
    chosen = [
        [name for name in names if any(fnmatch.fnmatch(name, glob) for glob in only or [])]
        for names in (all_tasks(), NAMED)
    ]
    for glob in only or []:
        if not fnmatch.filter([*all_tasks(), *NAMED], glob):
            raise ValueError(f"--only {glob!r} is no task and no optimizer; tasks: {', '.join(all_tasks())}")
    return [(task, entrant) for task in chosen[0] or all_tasks() for entrant in chosen[1] or entrants]


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


if __name__ == "__main__":
    sys.exit(main())
