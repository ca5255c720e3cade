"""The tables of docs/zoo.md, made from the results."""

import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.zoo import pictures
from benchmarks.zoo.contest import Result
from benchmarks.zoo.entrants import NAMED
from benchmarks.zoo.results import Book

MEDALS = ("🥇", "🥈", "🥉")
BASELINE = "sgd"


class Discipline(NamedTuple):
    """A discipline, in which medals are given.

    Attributes:
        name: a word.
        explained: in words.
        value: (result, target) -> number, of which less is better; infinity gets no medal.
        written: result -> cell of the table.
    """

    name: str
    explained: str
    value: Callable[[Result, float], float]
    written: Callable[[Result, float], str]


def error(result: Result, target: float) -> float:
    """Return the median error on test data."""
    return statistics.median(result.errors)


def fewest_steps(result: Result, target: float) -> float:
    """Return the number of steps to the target."""
    return min(map(min, result.reached))


def seconds(result: Result) -> float:
    """Return the time to the target."""
    return result.seconds * fewest_steps(result, math.inf) / result.steps


def good_rates(result: Result, target: float) -> list[float]:
    """List the learning rates that end at the target or below."""
    return [
        lr for lr, losses in zip(result.lrs, zip(*result.losses, strict=True), strict=True) if min(losses) <= target
    ]


def decades(result: Result, target: float) -> float:
    """Return how wide the range of good rates is."""
    spacing = math.log10(result.lrs[1] / result.lrs[0])
    return round(spacing * len(good_rates(result, target)), 2)


DISCIPLINES = (
    Discipline("error", "Lowest error on test data", error, lambda result, target: number(error(result, target))),
    Discipline(
        "steps",
        "Fewest steps to the target; and milliseconds on the processor until then",
        fewest_steps,
        lambda result, target: f"{number(fewest_steps(result, target))} ({number(1e3 * seconds(result))})",
    ),
    Discipline(
        "range",
        "Widest range of good learning rates, in decades",
        lambda result, target: -decades(result, target) or math.inf,
        lambda result, target: number(decades(result, target)),
    ),
)


def placed(book: Book, discipline: Discipline) -> dict[tuple[str, str], int]:
    """Return the places 0, 1, 2, ... by task and optimizer; those whose values are written alike share a place."""
    places = {}
    for task, said in book.tasks.items():
        values = {
            name: float(number(value))
            for (other, name), result in book.results.items()
            if other == task and math.isfinite(value := discipline.value(result, said["target"]))
        }
        for name, value in values.items():
            places[task, name] = sum(better < value for better in values.values())
    return places


def medal_table(book: Book) -> list[str]:
    """Lay out the medals of each optimizer, over all tasks and disciplines."""
    won = {name: [0, 0, 0] for name in book.entrants}
    for discipline in DISCIPLINES:
        for (_, name), place in placed(book, discipline).items():
            if place < len(MEDALS):
                won[name][place] += 1
    ranked = sorted(won, key=lambda name: (*[-count for count in won[name]], name))
    best, default = [{name: targets(book, name, of_default=own) for name in ranked} for own in (False, True)]
    rows = [[f"`{name}`", *map(str, won[name]), str(best[name]), str(default[name])] for name in ranked]
    return table(["", *MEDALS, "targets, best rate", "targets, default rate"], rows)


def targets(book: Book, name: str, *, of_default: bool) -> int:
    """Count the tasks whose target an optimizer ends at, with its best learning rate or with its default."""
    count = 0
    for task, said in book.tasks.items():
        result = book.results.get((task, name))
        if result is not None:
            rates = [nearest(result.lrs, NAMED[name].default)] if of_default else result.lrs
            count += any(lr in rates for lr in good_rates(result, said["target"]))
    return count


def nearest(lrs: list[float], lr: float) -> float:
    """Return the learning rate of the grid that is nearest to one."""
    return min(lrs, key=lambda other: abs(math.log(other / lr)))


def discipline_table(book: Book, discipline: Discipline) -> list[str]:
    """Lay out a discipline: a row for each optimizer, a column for each task; the best on average come first."""
    places = placed(book, discipline)
    last = len(book.entrants)
    mean = {
        name: statistics.fmean([places.get((task, name), last) for task in book.contested]) for name in book.entrants
    }
    rows = []
    for name in sorted(book.entrants, key=lambda name: (mean[name], name)):
        cells = []
        for task, said in book.contested.items():
            place, result = places.get((task, name)), book.results.get((task, name))
            medal = f" {MEDALS[place]}" if place is not None and place < len(MEDALS) else ""
            cells.append("" if place is None or result is None else discipline.written(result, said["target"]) + medal)
        rows.append([f"`{name}`", *cells, f"{mean[name] + 1:.1f}"])
    return table(["", *[f"`{task}`" for task in book.contested], "mean place"], rows)


def task_table(book: Book) -> list[str]:
    """Lay out the tasks."""
    rows = [[f"`{n}`", t["title"], str(t["steps"]), number(t["target"]), t["measured"]] for n, t in book.tasks.items()]
    return table(["", "", "steps", "target loss", "error"], rows)


def never_better(book: Book) -> list[str]:
    """List the optimizers that beat plain SGD in no discipline on any task."""

    def beats(task: str, name: str) -> bool:
        result, other = book.results.get((task, name)), book.results.get((task, BASELINE))
        target = book.tasks[task]["target"]
        return (
            result is not None
            and other is not None
            and any(d.value(result, target) < d.value(other, target) for d in DISCIPLINES)
        )

    return [name for name in book.entrants if name != BASELINE and not any(beats(task, name) for task in book.tasks)]


def tuned_table(tuned: dict[str, Any]) -> list[str]:
    """Lay out the results of tuning by hypergradients, beside random search of equal cost."""
    rows = [
        [f"`{task}`", way, *[number(found[way][column]) for column in TUNED], found[way]["hyperparameters"]]
        for task, found in tuned.items()
        for way in found
    ]
    return table(["", "", "trainings", "seconds", "loss, validation", "error, test", "found"], rows)


TUNED = ("trainings", "seconds", "loss", "error")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Write a table in markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def sections(book: Book) -> dict[str, list[str]]:
    """Write the parts of the page that are made from results, by name."""
    around, worse = book.about["environment"], never_better(book)
    machine = ", ".join([f"{name} {value}" for name, value in around.items()])
    held = [f"{len(book.results)} contests, on {' and '.join([f'`{task}`' for task in book.contested])}. {machine}."]
    nowhere = ", ".join([f"`{name}`" for name in worse]) or "none"
    parts = {
        "tasks": task_table(book),
        "measured": held,
        "medals": medal_table(book),
        "nowhere": [f"Better than plain SGD in no discipline on any task: {nowhere}."],
    }
    for discipline in DISCIPLINES:
        parts[discipline.name] = [f"{discipline.explained}.", "", *discipline_table(book, discipline)]
    if book.tuned:
        parts["tuned"] = tuned_table(book.tuned)
    return parts


def published(page: str, book: Book) -> str:
    """Return the page with new parts between `<!-- NAME -->` and `<!-- end -->`."""
    for name, lines in sections(book).items():
        before, _, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        page = "\n".join([f"{before}<!-- {name} -->", "", *lines, "", f"{end}{after}"]) if end else page
    return page


def publish(book: Book, docs: pathlib.Path) -> None:
    """Write the tables of a page that there is, and its picture."""
    page = docs / "zoo.md"
    if page.exists():
        page.write_text(published(page.read_text(encoding="utf-8"), book), encoding="utf-8")
        pictures.draw(book, docs / "pictures" / "zoo.png")
