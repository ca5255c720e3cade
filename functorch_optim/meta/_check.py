"""Comparison of a derivative with finite differences."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim.meta._derivative import is_differentiable, replaced

_WIDTHS = tuple(2.0**-k for k in range(4, 18, 2))
_RELATIVE = 1e-6  # a smaller relative error is none
_ROUNDING = 1e-15  # relative rounding error of a value
_DOUBT = 1e-3  # finite differences are not used as evidence above this doubt, relative to the derivative


@dataclasses.dataclass(frozen=True)
class DerivativeCheck:
    """The result of `check_derivative`; it prints as a verdict.

    `ok` is True where finite differences are reliable and torch's derivative agrees with them in every mode.
    `verdict(mode)` gives the verdict on one mode in a few words.

    Attributes:
        value: the number that the function returns.
        differences: the directional derivative by central differences.
        doubt: estimated error of `differences`.
        found: for each mode the derivative that torch computes, or the message of the error that it raises.
        repeats: whether a second call of the function returned the same number.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.meta.check_derivative(torch.relu, torch.tensor(0.0)).verdict("forward")
        'in doubt: differences disagree; is there a kink, or float32 inside?'
    """

    value: float
    differences: float
    doubt: float
    found: dict[str, float | str]
    repeats: bool

    @property
    def ok(self) -> bool:
        """Tell whether differences are reliable, and torch's derivative agrees with them in every mode."""
        return all(self.verdict(mode) == "right" for mode in self.found)

    def verdict(self, mode: str) -> str:
        """Give the verdict on one mode in a few words."""
        value = self.found[mode]
        if isinstance(value, str):
            return f"raises: {value}"
        scale = max(abs(self.differences), abs(value))
        off = abs(self.differences - value)
        if not self.repeats:
            return "in doubt: the function returns another number each time; seed it"
        if not math.isfinite(off):
            return "not finite"
        if off > max(_RELATIVE * scale, 10 * self.doubt):
            return f"wrong by {100 * off / scale:.3g} %"
        if self.doubt > max(_DOUBT * scale, _ROUNDING * abs(self.value)):
            return "in doubt: differences disagree; is there a kink, or float32 inside?"
        return "right"

    def __str__(self) -> str:
        lines = [f"central differences: {self.differences:.12g}, to {self.doubt:.0e}"]
        for mode, value in self.found.items():
            number = f"{value:.12g}, " if isinstance(value, float) else ""
            lines.append(f"{mode} mode: {number}{self.verdict(mode)}")
        return "\n".join(lines)


def check_derivative(
    function: Callable[..., Tensor], *args: Any, modes: str | Sequence[str] = ("reverse", "forward"), seed: int = 0
) -> DerivativeCheck:
    """Compare the derivative of a function with finite differences, along one random direction.

        d/dt f(x + t v) at t = 0,    against    (f(x + h v) - f(x - h v)) / 2h

    Everything is computed in float64. Differences are taken with several widths h and extrapolated to h = 0. The two
    neighbouring widths that agree best give the derivative, and their disagreement is the doubt.

    Args:
        function: f, which returns one real number, a 0-dim tensor: a loss after training, for example. Each call must
            return the same. It computes in the precision of its arguments: tensors in its closure should be float64.
        *args: its arguments, trees. The derivative is with respect to all floating-point tensors in them; v has their
            sizes.
        modes: "reverse", which is `torch.func.grad`, and "forward", `torch.func.jvp`; or one of them alone.
        seed: seed of the random direction.

    Returns:
        `DerivativeCheck`, which prints as a verdict; `check.ok` is True when the derivative passes in every mode.

    Raises:
        ValueError: there is no floating-point tensor in the arguments; f does not return one real number; a mode is
            neither "reverse" nor "forward".

    Example:
        >>> import functorch_optim as fo, torch
        >>> cut = lambda x: (x * x.detach()).sum()
        >>> check = fo.meta.check_derivative(cut, torch.tensor(2.0))  # print(check) has the numbers, too
        >>> check.ok, check.verdict("reverse")
        (False, 'wrong by 50 %')
        >>> fo.meta.check_derivative(lambda x: (x * x).sum(), torch.tensor(2.0)).ok
        True
    """
    leaves, structure = tree.flatten(args)
    places = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
    if not places:
        raise ValueError(
            "There is no floating-point tensor in the arguments to differentiate by: check_derivative(f, x)"
        )
    modes = (modes,) if isinstance(modes, str) else modes
    if unknown := set(modes) - {"reverse", "forward"}:
        raise ValueError(f"Invalid modes: {sorted(unknown)}; give 'reverse', 'forward' or both")
    generator = torch.Generator().manual_seed(seed)
    x = [leaves[i].detach().to(torch.promote_types(leaves[i].dtype, torch.float64)) for i in places]
    v = [_direction(tensor, generator) for tensor in x]

    def along(t: Tensor) -> Tensor:
        moved = [a + t * b for a, b in zip(x, v, strict=True)]
        value = function(*tree.unflatten(structure, replaced(leaves, places, moved)))
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"The function must return one real number, a 0-dim tensor, got a {what}")
        return value

    def value(t: float) -> float:
        return along(torch.tensor(t, dtype=torch.float64, device="cpu")).item()

    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    ways: dict[str, Callable[[], Tensor]] = {
        "reverse": lambda: torch.func.grad(along)(zero),
        "forward": lambda: torch.func.jvp(along, (zero,), (torch.ones_like(zero),))[1],
    }
    here = value(0.0)
    differences, doubt = _differences(value)
    return DerivativeCheck(
        here, differences, doubt, {mode: _number_or_message(ways[mode]) for mode in modes}, here == value(0.0)
    )


def _direction(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a direction of the size of a tensor."""
    size = x.abs().square().mean().sqrt() if x.numel() else x.abs().sum()
    drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)
    return drawn * torch.where(size == 0, 1.0, size)


def _differences(value: Callable[[float], float]) -> tuple[float, float]:
    """Return the derivative at 0, and the smallest disagreement of neighbouring widths about it.

    At a kink the slopes to the two sides do not converge to each other.
    """
    center = value(0.0)
    sides = [(value(h) - center, center - value(-h)) for h in _WIDTHS]
    slopes = [(a + b) / (2 * h) for h, (a, b) in zip(_WIDTHS, sides, strict=True)]
    finer = [(16 * fine - coarse) / 15 for coarse, fine in itertools.pairwise(slopes)]  # errors go with h squared
    doubts = [max(abs(a - b), _ROUNDING * abs(center)) for a, b in itertools.pairwise(finer)]
    best = min(range(len(doubts)), key=lambda i: doubts[i] if math.isfinite(doubts[i]) else math.inf)
    bends = [abs(a - b) / h for h, (a, b) in zip(_WIDTHS, sides, strict=True)]
    kink = bends[-1] > 0.5 * bends[0] and bends[-1] > _DOUBT * abs(finer[best])
    return finer[best], max(doubts[best], bends[-1] if kink else 0.0)


def _number_or_message(derivative: Callable[[], Tensor]) -> float | str:
    try:
        return derivative().item()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return str(error).splitlines()[0]
