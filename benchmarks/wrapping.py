"""What wrappers cost: steps of AdamW inside of each, beside AdamW alone."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import functorch_optim as fo
from benchmarks.measure import Comparison, cpu_seconds
from benchmarks.shapes import Setting, Shapes
from benchmarks.stateful import stepping

Wrapper = Callable[[fo.GradientTransformation], fo.GradientTransformation]
WRAPPERS: dict[str, Wrapper] = {
    "ema_weights(_, 0.999)": lambda tx: fo.ema_weights(tx, 0.999),
    "ema_weights(_, 0.999, every=10)": lambda tx: fo.ema_weights(tx, 0.999, every=10),
    "swa(_, start=0)": lambda tx: fo.swa(tx, 0),
    "lookahead(_)": fo.lookahead,
    "schedule_free(_)": fo.schedule_free,
    "apply_if_finite(_)": fo.apply_if_finite,
    "master_weights(_)": fo.master_weights,
    "monitor(_)": fo.monitor,
    "cautious(_)": fo.cautious,
}


def wrappers(setting: Setting) -> Iterator[Comparison]:
    """A step of fo.Optimizer around AdamW in a wrapper, beside AdamW; time on the processor."""
    for case, shapes in setting.shapes("mlp", "resnet"):
        peers = {"AdamW": around(lambda tx: tx, setting, shapes)}
        for name, wrapper in WRAPPERS.items():
            yield Comparison(name, case, around(wrapper, setting, shapes), peers, None, cpu_seconds)
        yield Comparison(
            "accumulate(_, 10**9), between steps",
            case,
            around(lambda tx: fo.accumulate(tx, 10**9), setting, shapes),
            {"torch._foreach_add_": partial(added, setting, shapes)},
            1.0,
            cpu_seconds,
        )


def around(wrapper: Wrapper, setting: Setting, shapes: Shapes) -> Callable[[], Callable[[], object]]:
    """Return the way of an optimizer around AdamW in a wrapper."""
    return stepping(lambda params: fo.Optimizer(params, wrapper(fo.adamw(1e-3))), setting, shapes)


def added(setting: Setting, shapes: Shapes) -> Callable[[], None]:
    """Add gradients to their sums, as the least that accumulation does."""
    grads: list[Tensor] = [p.grad for p in setting.parameters(shapes) if p.grad is not None]
    sums = list(map(torch.zeros_like, grads))
    return lambda: torch._foreach_add_(sums, grads)
