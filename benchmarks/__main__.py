"""Measure what steps and derivatives cost, against others that do the same: `python -m benchmarks`, in the root.

Prints a table in markdown for each section: medians and quartiles of all ways, in turns in one process; the ratio to
the fastest peer, which is the median of the ratios in the same rounds; and the bar, the ratio that we allow ourselves.
Rows that other programs have disturbed say so, and are to be repeated on an idle machine.
`python -m benchmarks --only eager fused` runs some sections; `--quick` shows in a minute that all of them work.
Peers are optional: `pip install -r benchmarks/peers.txt`, after torch itself.
"""

import argparse
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator

import torch

from benchmarks.calls import calls
from benchmarks.curves import curves
from benchmarks.functional import donated, functional, pure
from benchmarks.measure import MANY, Comparison, Outcome, Summary, compare, environment
from benchmarks.meta import maml, unroll
from benchmarks.packages import flops, packages
from benchmarks.shapes import Setting
from benchmarks.startup import first_step, imported
from benchmarks.stateful import chain, eager, fused, matrices, rules
from benchmarks.storage import memory, saved
from benchmarks.wrapping import wrappers

SECTIONS: dict[str, Callable[[Setting], Iterator[Comparison]]] = {
    "eager": eager,
    "fused": fused,
    "chain": chain,
    "rules": rules,
    "matrices": matrices,
    "packages": packages,
    "flops": flops,
    "wrappers": wrappers,
    "first": first_step,
    "functional": functional,
    "calls": calls,
    "donated": donated,
    "pure": pure,
    "memory": memory,
    "unroll": unroll,
    "maml": maml,
    "saved": saved,
    "import": imported,
    "curves": curves,
}
ON_GPU = ("eager", "fused", "chain", "rules", "matrices", "functional", "curves")
DISTURBED = 0.1  # cores; said beside the figures
COLUMNS = ("", "on", "ours", "others", "ratio", "bar", "")


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for; 1 if something of ours does not work."""
    given = parse(arguments)
    if hasattr(os, "sched_setaffinity"):  # which limits JAX, and processes that are started, as it does torch
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    setting = Setting(given.quick, given.device)
    found = {}
    around = environment()
    print(", ".join(f"{name} {value}" for name, value in around.items()), flush=True)
    for name in given.only or (SECTIONS if given.device == "cpu" else ON_GPU):
        print(f"\n**{name}**: {(SECTIONS[name].__doc__ or '').partition(chr(10))[0]}\n", flush=True)
        print_line(*COLUMNS)
        print_line(*["---"] * len(COLUMNS))
        found[name] = []
        for comparison in SECTIONS[name](setting):
            found[name].append(compare(comparison, 2 if given.quick else MANY))
            print_line(*cells(found[name][-1]))
    if given.json:
        outcomes = {name: [plain(outcome) for outcome in outcomes] for name, outcomes in found.items()}
        text = json.dumps({"environment": around, "outcomes": outcomes}, indent=1, ensure_ascii=False)
        given.json.write_text(text + "\n", encoding="utf-8")
    return int(any(isinstance(outcome.ours, str) for outcomes in found.values() for outcome in outcomes))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help=f"sections: {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: to see that everything works")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures there")
    return parser.parse_args(arguments)


def cells(outcome: Outcome) -> list[str]:
    """Write a row of the table."""
    others = [f"{name}: {written(value, outcome.unit)}" for name, value in outcome.peers.items()]
    if outcome.floor is not None:
        others.append(f"all above {written(outcome.floor, outcome.unit)}")
    verdict = {True: "met", False: "missed", None: ""}[outcome.met]
    if outcome.disturbed > DISTURBED:
        verdict = f"{verdict} (disturbed: {outcome.disturbed:.1f} cores)".strip()
    bar = "" if outcome.bar is None else f"≤ {outcome.bar}"
    ratio = "" if outcome.ratio is None else written(outcome.ratio, "")
    return [outcome.work, outcome.case, written(outcome.ours, outcome.unit), "; ".join(others), ratio, bar, verdict]


def written(value: Summary | str, unit: str) -> str:
    """Write a median with its quartiles, or why there is none."""
    if isinstance(value, str):
        return value
    low, median, high = [number(part) for part in value]
    return f"{median} {unit}".rstrip() + (f" [{low}, {high}]" if low != high else "")


def number(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"


def plain(outcome: Outcome) -> dict[str, object]:
    """Return what JSON can have."""

    def summary(value: object) -> object:
        return value._asdict() if isinstance(value, Summary) else value

    found = {name: summary(value) for name, value in outcome._asdict().items()}
    return {**found, "peers": {name: summary(value) for name, value in outcome.peers.items()}, "met": outcome.met}


def print_line(*cells: str) -> None:
    """Print a line of a table in markdown."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
