"""Steps of optimizers that own their parameters, against those of torch.optim."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functorch_optim as fo
from benchmarks.measure import Comparison, Way
from benchmarks.shapes import ALL, LARGE, Setting, Shapes

CLASSES: dict[str, dict[str, Any]] = {
    "Adam": {},
    "AdamW": {},
    "SGD": {"momentum": 0.9},
    "RMSprop": {},
    "Adagrad": {},
}
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")  # torch has a fused kernel of these


def eager(setting: Setting) -> Iterator[Comparison]:
    """One step, with defaults, against the same class of torch.optim."""
    for name, options in CLASSES.items():
        yield from same_class(setting, name, options, bar=1.0)


def fused(setting: Setting) -> Iterator[Comparison]:
    """One fused step, against the same class of torch.optim, fused too."""
    for name in FUSED:
        yield from same_class(setting, name, {**CLASSES[name], "fused": True}, bar=1.05)


def same_class(setting: Setting, name: str, options: dict[str, Any], bar: float) -> Iterator[Comparison]:
    """Compare a class with torch's of the same name."""
    called = call(name, options)
    for case, shapes in setting.shapes(*ALL):
        ours, theirs = [
            stepping(partial(getattr(module, name), lr=1e-3, **options), setting, shapes)
            for module in (fo.optim, torch.optim)
        ]
        yield Comparison(f"fo.optim.{called}", case, ours, {f"torch.optim.{called}": theirs}, bar)


def stepping(make: Callable[[list[Tensor]], Any], setting: Setting, shapes: Shapes) -> Way:
    """Return the way that makes an optimizer of parameters with gradients, and does its step."""
    return lambda: make(setting.parameters(shapes)).step


def call(name: str, options: dict[str, Any]) -> str:
    """Write a call without its parameters."""
    return name + (f"({', '.join(f'{key}={value}' for key, value in options.items())})" if options else "")


# A chain. -------------------------------------------------------------------------------------------------------------

PEAK, WARMUP, TOTAL = 1e-3, 100, 100_000


def chain(setting: Setting) -> Iterator[Comparison]:
    """Clipping by the global norm, AdamW and a schedule, against what a training loop with torch.optim has."""
    for case, shapes in setting.shapes(*ALL):
        peers = {"clip_grad_norm_, AdamW(fused=True), LambdaLR": partial(clipped_by_torch, setting, shapes)}
        yield Comparison("clip, AdamW, schedule; fused", case, fused_chain(setting, shapes, clipped()), peers, 1.0)


def fused_chain(setting: Setting, shapes: Shapes, transformation: Any, **hyperparameters: Any) -> Way:
    """Return the way of an optimizer around any transformation."""
    return stepping(lambda params: fo.Optimizer(params, transformation, fused=True, **hyperparameters), setting, shapes)


def clipped() -> fo.GradientTransformation:
    """Return the chain."""
    schedule = fo.schedules.warmup_cosine(PEAK, WARMUP, TOTAL)
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(schedule))


def clipped_by_torch(setting: Setting, shapes: Shapes) -> Callable[[], None]:
    """Return the same of torch's pieces."""
    params = setting.parameters(shapes)
    optimizer = torch.optim.AdamW(params, lr=PEAK, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        scheduler.step()

    return step


def warmup_cosine(step: int) -> float:
    """Return the factor of the learning rate."""
    if step < WARMUP:
        return step / WARMUP
    return (1 + math.cos(math.pi * min(1.0, (step - WARMUP) / (TOTAL - WARMUP)))) / 2


# Rules that torch has no fused kernel of. -----------------------------------------------------------------------------

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adadelta": ("Adadelta", {}),
    "nadam": ("NAdam", {}),
    "rmsprop": ("RMSprop", {"centered": True}),
    "radam": ("RAdam", {}),
    "adamax": ("Adamax", {}),
}


def rules(setting: Setting) -> Iterator[Comparison]:
    """Fused steps of rules that torch has no fused kernel of, against the fastest that it has."""
    for case, shapes in setting.shapes(*LARGE):
        ours = fused_chain(setting, shapes, lion, lr=1e-3)
        yield Comparison("lion, fused", case, ours, {"by hand, foreach": partial(lion_by_hand, setting, shapes)}, 0.5)
        for name, (theirs, options) in list(RULES.items())[: 1 if setting.quick else None]:
            ours = fused_chain(setting, shapes, getattr(fo, name), lr=1e-3, **options)
            kind = partial(getattr(torch.optim, theirs), lr=1e-3, **options)
            peers = {
                f"torch.optim.{theirs}(foreach={batched})": stepping(partial(kind, foreach=batched), setting, shapes)
                for batched in (False, True)
            }
            yield Comparison(f"fo.{call(name, options)}, fused", case, ours, peers, 0.5)


def matrices(setting: Setting) -> Iterator[Comparison]:
    """Muon over many matrices of one shape, orthogonalized together, against torch.optim's, one by one."""
    for size in (8,) if setting.quick else (8, 16, 32, 64):
        shapes = setting.tiny([(size, size)] * 100)
        ours, theirs = [
            stepping(partial(module.Muon, lr=1e-3, weight_decay=0.0), setting, shapes)
            for module in (fo.optim, torch.optim)
        ]
        yield Comparison("fo.optim.Muon", f"{len(shapes)} of {size} x {size}", ours, {"torch.optim.Muon": theirs}, 1.0)


class LionState(NamedTuple):
    """The state of Lion."""

    exp_avg: Tensor


def lion(lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.1) -> fo.GradientTransformation:
    """Return Lion, as the README writes it."""

    def scalars(step: Tensor) -> tuple[Any, Any]:
        return 1 - fo.at(betas[0], step), 1 - fo.at(betas[1], step)

    def update(g: Tensor, state: LionState, p: Tensor, s: tuple[Any, Any]) -> tuple[Tensor, LionState]:
        direction = torch.sign(torch.lerp(state.exp_avg, g, s[0]))
        return direction, LionState(torch.lerp(state.exp_avg, g, s[1]))

    rule = fo.leafwise(LionState, update, scalars, elementwise=True)
    return fo.chain(rule, fo.add_decayed_weights(weight_decay), fo.scale_by_learning_rate(lr))


def lion_by_hand(setting: Setting, shapes: Shapes) -> Callable[[], None]:
    """Return Lion as one would write it with torch's foreach functions."""
    params = setting.tensors(shapes)
    grads = setting.tensors(shapes)
    averages: Sequence[Tensor] = [torch.zeros_like(param) for param in params]

    def step() -> None:
        directions = torch._foreach_lerp(averages, grads, 0.1)
        torch._foreach_sign_(directions)
        torch._foreach_lerp_(averages, grads, 0.01)
        torch._foreach_mul_(params, 1 - 1e-3 * 0.1)
        torch._foreach_add_(params, directions, alpha=-1e-3)

    return step
