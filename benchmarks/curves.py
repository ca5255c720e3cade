"""How the cost of a step grows with the number of tensors, and with their size."""

from collections.abc import Iterator
from functools import partial

import torch

import functorch_optim as fo
from benchmarks.functional import fused_in_place, ours, updated
from benchmarks.measure import Comparison, Unit
from benchmarks.shapes import Setting, Shapes
from benchmarks.stateful import stepping

LEAVES = (10, 100, 1000, 10_000)
NUMBERS = (10**4, 10**5, 10**6, 10**7, 10**8)
TENSORS = 4


def curves(setting: Setting) -> Iterator[Comparison]:
    """Adam over tensors of 4 numbers, in microseconds for each; and over 4 tensors, in nanoseconds for each number."""
    for count in LEAVES[:1] if setting.quick else LEAVES:
        yield from steps(setting, f"{count:,} tensors", [(4,)] * count, Unit("µs", 1e6 / count))
    for count in NUMBERS[:1] if setting.quick else NUMBERS:
        yield from steps(setting, f"{count:,} numbers", [(count // TENSORS,)] * TENSORS, Unit("ns", 1e9 / count))


def steps(setting: Setting, case: str, shapes: Shapes, unit: Unit) -> Iterator[Comparison]:
    """Compare each kind of step with the one of torch.optim that it stands for."""
    plain = stepping(torch.optim.Adam, setting, shapes)
    fused = stepping(partial(torch.optim.Adam, fused=True), setting, shapes)
    kinds = {
        "fo.optim.Adam": (stepping(fo.optim.Adam, setting, shapes), {"torch.optim.Adam": plain}),
        "update, apply_updates": (partial(ours, updated, setting, shapes), {"torch.optim.Adam": plain}),
        "fo.optim.Adam, fused": (
            stepping(partial(fo.optim.Adam, fused=True), setting, shapes),
            {"torch.optim.Adam(fused=True)": fused},
        ),
        "fo.step_, fused": (partial(ours, fused_in_place, setting, shapes), {"torch.optim.Adam(fused=True)": fused}),
    }
    for work, (way, peers) in kinds.items():
        yield Comparison(work, case, way, peers, unit=unit)
