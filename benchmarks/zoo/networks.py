"""The networks of the zoo: small, so that some dozens of them are trained at once."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

WIDTH, HEADS, LENGTH = 24, 2, 16  # of the transformers; the length is that of a piece of text
PATCH = (2, 4)  # pixels
CLASSES = 10


def mlp() -> nn.Module:
    """Make a network with one hidden layer for digits."""
    return nn.Sequential(
        OrderedDict(first=nn.Linear(64, 32), relu=nn.ReLU(), hidden=nn.Linear(32, 32), again=nn.ReLU(), head=_head(32))
    )


def cnn() -> nn.Module:
    """Make a network with two convolutions for digits."""
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(-1, (1, 8, 8)),
            first=nn.Conv2d(1, 8, 3, stride=2, padding=1),
            relu=nn.ReLU(),
            second=nn.Conv2d(8, 16, 3, stride=2, padding=1),
            again=nn.ReLU(),
            flat=nn.Flatten(-3),
            head=_head(64),
        )
    )


def autoencoder() -> nn.Module:
    """Make a network that squeezes digits through eight numbers."""
    return nn.Sequential(
        OrderedDict(
            first=nn.Linear(64, 32),
            tanh=nn.Tanh(),
            code=nn.Linear(32, 8),
            second=nn.Linear(8, 32),
            again=nn.Tanh(),
            out=nn.Linear(32, 64),
            sigmoid=nn.Sigmoid(),
        )
    )


def vision_transformer() -> nn.Module:
    """Make a transformer that sees a digit as eight patches of 2 by 4 pixels."""
    return nn.Sequential(
        OrderedDict(
            patches=Patches(),
            embedding=Linear(PATCH[0] * PATCH[1], WIDTH),
            position=Position(64 // (PATCH[0] * PATCH[1])),
            block=Block(causal=False),
            norm=nn.LayerNorm(WIDTH, elementwise_affine=False),
            mean=Mean(),
            head=_head(WIDTH),
        )
    )


def language_model(characters: int) -> nn.Module:
    """Make a transformer that guesses each character of a text from those before it."""
    return nn.Sequential(
        OrderedDict(
            embedding=nn.Embedding(characters, WIDTH),
            position=Position(LENGTH),
            block=Block(causal=True),
            norm=nn.LayerNorm(WIDTH, elementwise_affine=False),
            head=Linear(WIDTH, characters),
        )
    )


def _head(width: int) -> nn.Linear:
    return nn.Linear(width, CLASSES)


class Linear(nn.Linear):
    """A linear layer for each position: one product of matrices, where torch.vmap would copy the weights otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for (..., in)."""
        return super().forward(x.flatten(0, -2)).reshape(*x.shape[:-1], self.out_features)


class Patches(nn.Module):
    """Cut images into patches."""

    def forward(self, images: Tensor) -> Tensor:
        """Return (..., patches, pixels) for (..., 64)."""
        patches = images.unflatten(-1, (8 // PATCH[0], PATCH[0], 8 // PATCH[1], PATCH[1])).transpose(-3, -2)
        return patches.flatten(-2).flatten(-3, -2)


class Position(nn.Module):
    """Add an embedding of the position."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(0.1 * torch.randn(length, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape that is given."""
        return x + self.embedding


class Mean(nn.Module):
    """Take the mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., width) for (..., length, width)."""
        return x.mean(-2)


class Block(nn.Module):
    """Attention, and a layer of neurons, each added to its input."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention, self.mixed = Linear(WIDTH, 3 * WIDTH, bias=False), Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = Linear(WIDTH, 2 * WIDTH), Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape that is given: (..., length, width)."""
        parts = self.attention(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = parts.movedim((-3, -2), (0, -3))  # each (..., heads, length, width of a head)
        scores = query @ key.mT / (WIDTH // HEADS) ** 0.5
        if self.causal:
            scores = scores + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = x + self.mixed((scores.softmax(-1) @ value).transpose(-3, -2).flatten(-2))
        return x + self.down(self.up(self.norm(x)).relu())
