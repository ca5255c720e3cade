"""Results in a JSON file, which grows by a contest at a time."""

import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from benchmarks.measure import environment
from benchmarks.zoo.contest import Effort, Result
from benchmarks.zoo.tasks import Task

Results: TypeAlias = dict[tuple[str, str], Result]  # by task and optimizer
VERSIONS = ("python", "functorch_optim", "torch", "optree")


class Book(NamedTuple):
    """The contents of the file.

    Attributes:
        about: versions and machine, the effort, and the descriptions of the tasks.
        results: those of the contests.
        tuned: results of tuning by hypergradients and by random search, by task.
    """

    about: dict[str, Any]
    results: Results
    tuned: dict[str, Any]

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The tasks by name, as far as the report needs them."""
        tasks: dict[str, dict[str, Any]] = self.about["tasks"]
        return tasks

    @property
    def contested(self) -> dict[str, dict[str, Any]]:
        """Those of the tasks that there are results of."""
        return {name: said for name, said in self.tasks.items() if any(name == task for task, _ in self.results)}

    @property
    def entrants(self) -> list[str]:
        """The names of the optimizers, in alphabetical order."""
        return sorted({name for _, name in self.results})

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions of the results, by name: versions, the effort, and each task."""
        versions = {name: self.about["environment"].get(name) for name in VERSIONS}
        return {**versions, "effort": self.about["effort"], **self.tasks}


def new(tasks: Iterable[Task], effort: Effort) -> Book:
    """Make a book without results."""
    said = {
        task.name: {"title": task.title, "steps": task.steps, "target": task.target, "measured": task.measured}
        for task in tasks
    }
    return Book({"environment": environment(), "effort": plain(effort._asdict()), "tasks": said}, {}, {})


def resumed(path: pathlib.Path, fresh: Book) -> Book:
    """Read the book of a file, to go on with it; a fresh one if there is no file.

    Raises:
        ValueError: the file has results of other versions, other tasks or another effort.
    """
    if not path.exists():
        return fresh
    book = read(path)
    now = fresh.conditions
    differing = [name for name, condition in book.conditions.items() if now.get(name, condition) != condition]
    if differing:
        raise ValueError(
            f"{path} has results of another run: it differs in {', '.join(differing)}. Delete the file, or write "
            "another: --json FILE"
        )
    return book._replace(about={**book.about, "tasks": fresh.tasks})


def read(path: pathlib.Path) -> Book:
    """Read a file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    results = {
        tuple(pair.split("/")): Result(**{k: _numbers(v) for k, v in result.items()})
        for pair, result in found["results"].items()
    }
    return Book(found["about"], results, found["tuned"])


def write(path: pathlib.Path, book: Book) -> None:
    """Write a file, a line for each contest, in the place of the one that is there."""
    lines = [f'"{"/".join(pair)}": {_line(plain(result._asdict()))}' for pair, result in sorted(book.results.items())]
    tuned = [f'"{task}": {_line(plain(found))}' for task, found in book.tuned.items()]
    written = (
        f'{{"about": {json.dumps(book.about, indent=1, ensure_ascii=False)},\n"results": {{\n'
        + ",\n".join(lines)
        + '\n},\n"tuned": {\n'
        + ",\n".join(tuned)
        + "\n}}\n"
    )
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(written, encoding="utf-8")
    os.replace(unfinished, path)  # so that a run that is stopped leaves a whole file


def _line(thing: Any) -> str:
    return json.dumps(thing, ensure_ascii=False, separators=(",", ":"))


def plain(thing: Any) -> Any:
    """Return a value for JSON: null for infinity."""
    if isinstance(thing, dict):
        return {name: plain(part) for name, part in thing.items()}
    if isinstance(thing, list | tuple):
        return [plain(part) for part in thing]
    return None if isinstance(thing, float) and not math.isfinite(thing) else thing


def _numbers(thing: Any) -> Any:
    """Undo `plain`."""
    if isinstance(thing, list):
        return [_numbers(part) for part in thing]
    return math.inf if thing is None else thing
