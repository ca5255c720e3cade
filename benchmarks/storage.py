"""Bytes: what a step needs for itself, and what autograd saves of it."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import functorch_optim as fo
from benchmarks.measure import Comparison, Unit, value
from benchmarks.shapes import LARGE, Setting, Shapes

MIB = Unit("MiB", 2**-20)
Update = Callable[[list[Tensor], Any, list[Tensor]], tuple[list[Tensor], Any]]


# The peak of a step. --------------------------------------------------------------------------------------------------


def memory(setting: Setting) -> Iterator[Comparison]:
    """The largest memory that a step of Adam has beyond parameters, gradients and state."""
    compared = partial(Comparison, measure=value, unit=MIB, rounds=1)
    for options in ({}, {"fused": True}):
        work = "fo.optim.Adam, fused" if options else "fo.optim.Adam"
        ours = partial(fo.optim.Adam, **options)
        for case, shapes in setting.shapes(*LARGE):
            peers = {"torch.optim.Adam": partial(peak, torch.optim.Adam, setting, shapes)}
            yield compared(work, case, partial(peak, ours, setting, shapes), peers, 1.0)
        sizes = [64, 128] if setting.quick else [1024, 4096]
        small, large = [partial(peak, ours, setting, [(size, size)]) for size in sizes]
        yield compared(work, f"one tensor of {sizes[1]}²", large, {f"itself, {sizes[0]}²": small}, 1.0)


def peak(make: Callable[[list[Tensor]], torch.optim.Optimizer], setting: Setting, shapes: Shapes) -> Callable[[], int]:
    """Return the way to count all that torch allocates and frees in a step, of an optimizer that has made some."""
    optimizer = make(setting.parameters(shapes))

    def largest() -> int:
        for _ in range(2):
            optimizer.step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            optimizer.step()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(changes, initial=0))

    return largest


# What autograd saves. -------------------------------------------------------------------------------------------------

FIRST, LAST = 2, 4


def saved(setting: Setting) -> Iterator[Comparison]:
    """What autograd saves of an unrolled step of Adam, against the textbook's formula in torch's operations.

    Counted are distinct storages that autograd packs, of four steps less those of two, halved. Parameters and gradients
    that are given are not counted; states, and all that a step makes in between, are, once.
    """
    size = 64 if setting.quick else 2048
    for learned in (True, False):
        ours, theirs = [partial(saved_by, steps, size, learned) for steps in (our_steps, textbook_steps)]
        case = f"2 tensors of {size}², lr {'learned' if learned else 'fixed'}"
        peers = {"textbook": theirs}
        yield Comparison("an unrolled step of Adam", case, ours, peers, 0.65, measure=value, unit=MIB, rounds=1)


def saved_by(
    train: Callable[[list[Tensor], list[list[Tensor]], Any], object], size: int, learned: bool
) -> Callable[[], float]:
    """Return the way to count what is saved for a step."""

    def count(steps: int) -> int:
        params, *grads = [[torch.randn(size, size, requires_grad=True) for _ in range(2)] for _ in range(1 + steps)]
        lr = torch.tensor(1e-3, requires_grad=True) if learned else 1e-3
        given = {key(tensor) for tensor in itertools.chain(params, *grads)}
        storages = {}  # kept, so that none is freed and its address taken by another

        def pack(tensor: Tensor) -> Tensor:
            if key(tensor) not in given:
                storages[key(tensor)] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outcome = train(params, grads, lr)  # noqa: F841, it keeps the graph
        return sum(storage.nbytes() for storage in storages.values())

    return lambda: (count(LAST) - count(FIRST)) / (LAST - FIRST)


def key(tensor: Tensor) -> int:
    """Return what tensors share that share memory."""
    return tensor.untyped_storage()._cdata


def our_steps(params: list[Tensor], grads: list[list[Tensor]], lr: Any) -> object:
    """Train with given gradients."""
    tx = fo.adam(lr)
    state = tx.init(params)
    for g in grads:
        params, state = fo.step(tx, g, state, params)
    return params


def textbook_steps(params: list[Tensor], grads: list[list[Tensor]], lr: Any) -> object:
    """Train as Algorithm 1 of arXiv:1412.6980 is written."""
    return [textbook(p, g, lr) for p, g in zip(params, zip(*grads, strict=True), strict=True)]


def textbook(p: Tensor, grads: tuple[Tensor, ...], lr: Any, b1: float = 0.9, b2: float = 0.999) -> Tensor:
    """Train one tensor."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        m_hat = m / (1 - b1**t)
        v_hat = v / (1 - b2**t)
        p = p - lr * m_hat / (torch.sqrt(v_hat) + 1e-8)
    return p
