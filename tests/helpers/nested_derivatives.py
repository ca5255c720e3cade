"""Derivatives of derivatives of a function of tensors, in every mode, beside finite differences."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

Scalar = Callable[..., Tensor]
TASKS = 3


class Point(NamedTuple):
    """Where to differentiate.

    Attributes:
        x: the arguments.
        v: the direction, like x.
        k: what gradients are multiplied with, to make one number of them, like x.
        noise: what the arguments of each task differ by, like x with a first dimension of TASKS.
    """

    x: list[Tensor]
    v: list[Tensor]
    k: list[Tensor]
    noise: list[Tensor]


class Nesting(NamedTuple):
    """A way to differentiate.

    Attributes:
        name: what is taken of what.
        value: the directional derivative, taken so.
        function: what it is the directional derivative of.
    """

    name: str
    value: Callable[[], Tensor]
    function: Scalar


def point(x: Sequence[Tensor]) -> Point:
    generator = torch.Generator().manual_seed(0)

    def random(like: Tensor, *batch: int) -> Tensor:
        return torch.rand((*batch, *like.shape), generator=generator, dtype=torch.float64) - 0.5

    v, k = [[random(a) for a in x] for _ in range(2)]
    return Point(list(x), v, k, [1e-3 * random(a, TASKS) for a in x])


def nestings(f: Scalar, at: Point) -> Iterator[Nesting]:
    """Yield all ways: a later one makes sense where the earlier ones are right."""
    x, v, k, noise = at

    def reverse(f: Scalar, *xs: Tensor) -> Tensor:
        return dot(grad(f, argnums=tuple(range(len(xs))))(*xs), v)

    def forward(f: Scalar, *xs: Tensor) -> Tensor:
        return jvp(f, xs, tuple(v))[1]

    def after(f: Scalar) -> Scalar:
        """Return a function of the gradient of f, as a loss after a step is."""
        return lambda *xs: f(*xs) + sum((g * c).sin().sum() for g, c in zip(gradient(f, xs), k, strict=True))

    step = after(f)
    yield Nesting("reverse", lambda: reverse(f, *x), f)
    yield Nesting("forward", lambda: forward(f, *x), f)
    yield Nesting("reverse over reverse", lambda: reverse(step, *x), step)
    yield Nesting("forward over reverse", lambda: forward(step, *x), step)
    yield Nesting("forward over forward", lambda: forward(lambda *xs: forward(f, *xs), *x), lambda *xs: reverse(f, *xs))
    yield Nesting("third derivative", lambda: reverse(after(step), *x), after(step))

    chosen = [range(len(x)), *[[i] for i in range(len(x))]] if len(x) > 1 else [range(1)]
    for some in chosen:  # the arguments in which tasks differ; the others they share

        def moved(xs: Sequence[Tensor], by: Sequence[Tensor], some: Sequence[int] = some) -> list[Tensor]:
            return [a + by[i] if i in some else a for i, a in enumerate(xs)]

        def looped(*xs: Tensor, moved: Any = moved) -> Tensor:
            return sum((step(*moved(xs, [n[task] for n in noise])) for task in range(TASKS)), torch.zeros(()))

        def batched(*xs: Tensor, moved: Any = moved) -> Tensor:
            return vmap(lambda *by: step(*moved(xs, by)))(*noise).sum()

        yield Nesting("reverse over vmap of reverse", lambda f=batched: reverse(f, *x), looped)
        yield Nesting("forward over vmap of reverse", lambda f=batched: forward(f, *x), looped)


def gradient(f: Scalar, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = grad(f, argnums=tuple(range(len(xs))))(*xs)
    return gradients


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum(((x * y).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=torch.float64))


def difference(f: Scalar, at: Point, h: float = 2e-4) -> tuple[float, float]:
    """Return the directional derivative by central differences, and how far it may be from the truth.

    Three widths that disagree show a kink nearby, or rounding; one-sided ones, a kink right there.
    """
    values = {
        t: float(f(*[a + t * h * b for a, b in zip(at.x, at.v, strict=True)])) for t in (-2, -1, -0.25, 0, 0.25, 1, 2)
    }
    widths = {t: (values[t] - values[-t]) / (2 * t * h) for t in (0.25, 1, 2)}
    value = (4 * widths[1] - widths[2]) / 3
    sides = (values[1] - values[0]) / h - (values[0] - values[-1]) / h
    doubt = max(abs(widths[t] - value) for t in widths)
    return value, doubt if abs(sides) < 0.03 * (abs(value) + 1e-3 * abs(values[0])) else abs(sides)
