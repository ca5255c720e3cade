"""What calls cost: steps over parameters that are so few and small that the numbers hardly count."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functorch_optim as fo
from benchmarks.functional import LR, Step, compiled, of_optax, of_torchopt, ours, updated
from benchmarks.measure import Comparison, Unit, Way, cpu_seconds, seconds
from benchmarks.shapes import Setting, Shapes
from benchmarks.stateful import TOTAL, stepping

MICROSECONDS = Unit("µs", 1e6)
PURE: dict[str, tuple[Callable[[fo.GradientTransformation], Step], float]] = {
    "fo.step": (lambda tx: partial(fo.step, tx), 1.0),
    "fo.step_": (lambda tx: partial(fo.step_, tx), 0.7),
}


class Work(NamedTuple):
    """The same optimizer in four libraries.

    Attributes:
        ours: makes the transformation.
        torch: makes an optimizer of parameters, with the classes of the module that it is given.
        torchopt, optax: make the transformation, with the module that they are given.
    """

    ours: Callable[[], fo.GradientTransformation]
    torch: Callable[[Any, list[Tensor]], Any]
    torchopt: Callable[[Any], Any]
    optax: Callable[[Any], Any]


class Clipped:
    """AdamW after clipping by the global norm, and a scheduler, as a training loop with torch.optim has them."""

    def __init__(self, module: Any, params: list[Tensor]) -> None:
        self.params = params
        self.optimizer = module.AdamW(params, lr=LR)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, TOTAL)

    def step(self) -> None:
        """Do the next step of all three."""
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.scheduler.step()


def cosine(count: Tensor) -> Tensor:
    """Return the learning rate, for TorchOpt, which has no such schedule."""
    return LR * (1 + torch.cos(torch.pi * count / TOTAL)) / 2


WORKS = {
    "Adam": Work(
        lambda: fo.adam(LR),
        lambda module, params: module.Adam(params, lr=LR),
        lambda torchopt: torchopt.adam(LR),
        lambda optax: optax.adam(LR),
    ),
    "SGD": Work(
        lambda: fo.sgd(LR, momentum=0.9),
        lambda module, params: module.SGD(params, lr=LR, momentum=0.9),
        lambda torchopt: torchopt.sgd(LR, momentum=0.9),
        lambda optax: optax.sgd(LR, momentum=0.9),
    ),
    "clip, AdamW, cosine": Work(
        lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(LR, TOTAL))),
        Clipped,
        lambda torchopt: torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.adamw(cosine)),
        lambda optax: optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(LR, TOTAL), weight_decay=1e-2)
        ),
    ),
}


def calls(setting: Setting) -> Iterator[Comparison]:
    """Steps over few and small tensors, on one thread: time on the processor; against optax, by the clock."""
    with one_thread():
        for name, work in WORKS.items():
            for case, shapes in setting.shapes("net", "mlp"):
                yield from against_torch(setting, name, work, case, shapes)
                yield from against_optax(setting, name, work, case, shapes)


def against_torch(setting: Setting, name: str, work: Work, case: str, shapes: Shapes) -> Iterator[Comparison]:
    """Compare with torch.optim as it is, and the functional form in two parts with TorchOpt."""

    def row(way: str, ours: Way, bar: float, peers: dict[str, Way]) -> Comparison:
        return Comparison(f"{name}: {way}", case, ours, peers, bar, cpu_seconds, MICROSECONDS)

    def around(**options: Any) -> Way:
        return stepping(lambda params: fo.Optimizer(params, work.ours(), **options), setting, shapes)

    theirs = {"torch.optim": stepping(partial(work.torch, torch.optim), setting, shapes)}
    for way, (step, bar) in PURE.items():
        yield row(way, partial(ours, step, setting, shapes, work.ours), bar, theirs)
    yield row("fo.Optimizer", around(), 0.9, theirs)
    yield row("fo.Optimizer, fused", around(fused=True), 0.6, theirs)
    yield row("fo.optim", stepping(partial(work.torch, fo.optim), setting, shapes), 0.6, theirs)
    parts = partial(ours, updated, setting, shapes, work.ours)
    torchopt = {"TorchOpt, in place": partial(of_torchopt, work.torchopt, setting, shapes, inplace=True)}
    yield row("update, apply_updates", parts, 0.6, torchopt)


def against_optax(setting: Setting, name: str, work: Work, case: str, shapes: Shapes) -> Iterator[Comparison]:
    """Compare the pure step with optax under jax.jit: compiled too, and for Adam as it is."""
    peers = {"optax": partial(of_optax, work.optax, setting, shapes, donate=False)}
    ways = {"fo.step, torch.compile": compiled}
    if (name, case) == ("Adam", "mlp"):
        ways["fo.step"] = PURE["fo.step"][0]
    for way, step in ways.items():
        made = partial(ours, step, setting, shapes, work.ours)
        yield Comparison(f"{name}: {way}", case, made, peers, 1.0, seconds, MICROSECONDS)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch have one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
