"""The shapes of parameters that steps are timed on."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]
ALL = ("mlp", "small", "resnet", "big")
LARGE = ("resnet", "big")


def resnet50() -> Shapes:
    """Return the shapes of the 161 parameters of ResNet-50, 25.6M numbers."""
    return [*_convolution(3, 64, 7), *_stages(), (1000, 2048), (1000,)]


def _stages() -> Iterator[tuple[int, ...]]:
    wide = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from _convolution(wide, width, 1)
            yield from _convolution(width, width, 3)
            yield from _convolution(width, 4 * width, 1)
            if block == 0:  # what is added to the block's result needs its shape
                yield from _convolution(wide, 4 * width, 1)
            wide = 4 * width


def _convolution(before: int, after: int, size: int) -> Shapes:
    """Return the shapes of a convolution without bias and of its batch normalization."""
    return [(after, before, size, size), (after,), (after,)]


SHAPES = {
    "net": [(32, 4), (32,), (2, 32), (2,)],
    "mlp": [(128, 64), (128,), (128, 128), (128,), (10, 128), (10,)],
    "small": [(12, 12)] * 500,
    "layer": [(128, 128)] * 4 + [(512, 128), (128, 512)],
    "resnet": resnet50(),
    "big": [(4096, 4096)] * 2,
}


class Setting(NamedTuple):
    """How to run the benchmarks.

    Attributes:
        quick: whether to take a few tiny tensors for every shape: to see that everything works.
        device: where the tensors are.
    """

    quick: bool = False
    device: str = "cpu"

    def shapes(self, *names: str) -> Iterator[tuple[str, Shapes]]:
        """Yield the names and their shapes; one of them is enough where it is quick."""
        for name in names[:1] if self.quick else names:
            yield name, self.tiny(SHAPES[name])

    def tiny(self, shapes: Shapes) -> Shapes:
        """Return the shapes, or a few tiny ones like them where it is quick."""
        return [tuple(min(size, 8) for size in shape) for shape in shapes[:6]] if self.quick else shapes

    def tensors(self, shapes: Shapes) -> list[Tensor]:
        """Return random tensors."""
        return [torch.randn(shape, device=self.device) for shape in shapes]

    def parameters(self, shapes: Shapes) -> list[Tensor]:
        """Return random parameters that have gradients."""
        params = [tensor.requires_grad_() for tensor in self.tensors(shapes)]
        for param in params:
            param.grad = torch.randn_like(param)
        return params
