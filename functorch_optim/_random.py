"""Random numbers as a function of a key: element i is a hash of key + i golden ratios."""

from typing import Any

import torch
from torch import Tensor


def key_of(generator: Any, example: str) -> int | Tensor:
    """Draw a key from a generator, or from torch's own if it is None; a key is returned as it is.

    Args:
        generator: `torch.Generator`, None, an integer, or a tensor of int64.
        example: a call that would be right.

    Raises:
        TypeError: `generator` is of another type.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        return torch.randint(1 << 62, (), generator=generator, device=device)
    if type(generator) is not int and not (isinstance(generator, Tensor) and generator.dtype == torch.int64):
        raise TypeError(f"Invalid generator: {generator!r}; give a torch.Generator, or an integer as in {example}")
    return generator


def bits(key: Tensor, places: torch.Size | Tensor, count: int) -> Tensor:
    """Make random integers of so many bits, int64.

    Args:
        key: 0-dim tensor of int64.
        places: a shape; or for each element the number i whose hash it is, int64.
        count: of bits.
    """
    if not isinstance(places, Tensor):
        places = torch.arange(places.numel(), device=key.device).reshape(places)
    # torch.compile computes with the index of a loop in C++ (torch 2.13). Where its product overflows, the loop runs
    # past its end, and vectors of products are wrong. So the index becomes data, and the product has two halves.
    places = (places ^ key) ^ key
    products = places * (_GOLDEN & 0xFFFFFFFF) + ((places * (_GOLDEN >> 32)) << 32)
    return _shifted(mixed(key + products), 64 - count)


def uniform(key: Tensor, places: torch.Size | Tensor) -> Tensor:
    """Make numbers between 0 and 1, float64: the middles of 2^52 intervals."""
    return (bits(key, places, 52).to(torch.float64) + 0.5) * 2.0**-52


def normal(key: Tensor, places: torch.Size | Tensor) -> Tensor:
    """Make numbers of the standard normal distribution, float64."""
    numbers: Tensor = 2**0.5 * torch.special.erfinv(2 * uniform(key, places) - 1)
    return numbers


def signs(key: Tensor, shape: torch.Size) -> Tensor:
    """Make numbers that are -1 or 1, float64."""
    return torch.where(uniform(key, shape) < 0.5, -1.0, 1.0).to(torch.float64)


def mixed(x: Tensor) -> Tensor:
    """Hash an integer by SplitMix64: each bit changes each bit of the result."""
    x = (x ^ _shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shifted(x, 31)


def at_step(key: int | Tensor, step: Tensor) -> Tensor:
    """Return the key of a step."""
    return mixed(mixed(torch.as_tensor(key, dtype=torch.int64, device=step.device)) + step)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift an integer right without its sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


_GOLDEN = -0x61C8864680B583EB
