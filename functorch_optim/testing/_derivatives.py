"""Derivatives of functions of trees, and their finite differences."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.vector import common_dtype, flattened, unflattened
from functorch_optim.tree import Tree


class OfVector:
    """A function of a tree of tensors as a function of one vector.

    So each element of each argument has its own derivative, and a wrong one cannot hide behind a large one.

    Args:
        function: tree -> tensor.
        arguments: the tree.

    Attributes:
        z: the arguments.
        places: path of an argument -> its slice of z.

    Example:
        >>> import torch
        >>> function = OfVector(lambda a: a["x"].sum() * a["y"], {"x": torch.ones(2), "y": torch.tensor(3.0)})
        >>> function.places["x"], torch.func.grad(function)(function.z)
        (slice(0, 2, None), tensor([3., 3., 2.]))
    """

    def __init__(self, function: Callable[[Any], Tensor], arguments: Tree) -> None:
        self.function = function
        self.leaves, self.structure = tree.flatten(arguments)
        self.z = flattened(self.leaves, common_dtype(self.leaves))
        self.places: dict[str, slice] = {}
        end = 0
        for path, leaf in zip(tree.paths(arguments), self.leaves, strict=True):
            start, end = end, end + leaf.numel()
            self.places[path] = slice(start, end)

    def of(self, *kinds: str) -> Tensor:
        """Return the places of all arguments of these kinds, as indices."""
        places = [place for path, place in self.places.items() if path.split(".")[0] in kinds]
        return torch.cat([torch.arange(place.start, place.stop) for place in places])

    def arguments(self, z: Tensor) -> Tree:
        """Turn a vector back into a tree of arguments."""
        return tree.unflatten(self.structure, unflattened(z, self.leaves))

    def __call__(self, z: Tensor) -> Tensor:
        """Evaluate the function."""
        return self.function(self.arguments(z))


def steps_of(z: Tensor, h: float = 1e-4) -> Tensor:
    """Return the width of the `differences` for each element."""
    return h * torch.where(z == 0, 1, z.abs())


def differences(function: Callable[[Tensor], Tensor], z: Tensor, h: float = 1e-4, batched: bool = True) -> Tensor:
    """Return the derivative of a function of a vector by central differences of fourth order, a row for each element.

    Args:
        function: vector -> tensor.
        z: the vector.
        h: width, relative to the element.
        batched: whether vmap can evaluate the function at all points at once.

    Example:
        >>> import torch
        >>> differences(torch.sin, torch.ones(1, dtype=torch.float64))
        tensor([[0.5403]], dtype=torch.float64)
    """
    steps = steps_of(z, h)
    points = torch.cat([z + k * torch.diag(steps) for k in (2, 1, -1, -2)])
    values = torch.vmap(function)(points) if batched else torch.stack([function(point) for point in points])
    up2, up1, down1, down2 = values.reshape(4, len(z), *values.shape[1:])
    slope: Tensor = (8 * (up1 - down1) - (up2 - down2)) / (12 * steps.reshape(-1, *[1] * (up1.ndim - 1)))
    return slope


def error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error, relative to the largest expected number; inf if that is zero, or a number is NaN."""
    if torch.equal(actual, expected):  # also zeros, and empty tensors
        return 0.0
    relative = (actual - expected).abs().max() / expected.abs().max()
    return torch.nan_to_num(relative, torch.inf, torch.inf).item()


def errors(actual: Tensor, expected: Tensor, places: dict[str, slice]) -> dict[str, float]:
    """Return the error of the derivative with respect to each argument, by path."""
    return {path: error(actual[place], expected[place]) for path, place in places.items()}


def assert_equal_differences(actual: Tensor, expected: Tensor, function: OfVector, tolerance: float = 1e-6) -> None:
    """Raise unless a derivative agrees with finite differences.

    Args:
        actual: gradient of the function.
        expected: result of `differences`.
        function: returns one number.
        tolerance: relative to the largest derivative with respect to an argument.

    Raises:
        AssertionError: with the path of the argument and the values.
    """
    # The division by the width amplifies rounding errors.
    noise = 2e-15 * max(1.0, function(function.z).abs().item()) / steps_of(function.z)
    for path, i, by in _wrong(actual, expected, function.places, tolerance, noise):
        hint = "; is something detached?" if by.isfinite() else ""
        raise AssertionError(
            f"the derivative by {path!r} is {by.item()!r}, and by finite differences it is "
            f"{round(expected[i].item(), 9)!r}{hint}"
        )


def check_first_derivatives(function: OfVector, tolerance: float = 1e-6, batched: bool = False) -> Tensor:
    """Raise unless reverse mode, forward mode and finite differences agree on the derivative by each argument.

    Args:
        function: returns one number.
        tolerance: of finite differences, relative to the largest derivative with respect to an argument.
        batched: whether vmap can evaluate the function at many points at once, which is faster.

    Returns:
        The derivatives by finite differences.

    Raises:
        AssertionError: with the path of the argument and the values.

    Example:
        >>> import torch
        >>> cut = OfVector(lambda a: a["x"] * a["y"].detach(), {name: torch.ones(()).double() for name in "xy"})
        >>> check_first_derivatives(cut)
        Traceback (most recent call last):
        ...
        AssertionError: the derivative by 'y' is 0.0, and by finite differences it is 1.0; is something detached?
    """
    expected = differences(function, function.z, batched=batched)
    reverse = torch.func.grad(function)(function.z)
    assert_equal_differences(reverse, expected, function, tolerance)
    forward = torch.func.jacfwd(function)(function.z)
    rounding = torch.full_like(function.z, 1e-13 * max(1.0, reverse.abs().max().item()))
    for path, i, by in _wrong(forward, reverse, function.places, 1e-10, rounding):
        raise AssertionError(
            f"the derivative by {path!r} is {by.item()!r} forward, and {reverse[i].item()!r} in reverse"
        )
    direction = torch.arange(len(function.z), dtype=function.z.dtype).cos()
    along = torch.func.jvp(function, (function.z,), (direction,))[1]
    if not (along - reverse @ direction).abs() <= 1e-10 * (reverse * direction).abs().sum():
        raise AssertionError(f"jvp is {along.item()!r}, and vjp {(reverse @ direction).item()!r} along a direction")
    return expected


def assert_finite(function: OfVector) -> tuple[Tensor, Tensor]:
    """Raise unless all derivatives are finite, in reverse and in forward mode.

    Args:
        function: returns one number.

    Returns:
        The derivatives in reverse and in forward mode.

    Raises:
        AssertionError: with the path of the argument.

    Example:
        >>> import torch
        >>> assert_finite(OfVector(lambda x: x["w"].sqrt().sum(), {"w": torch.zeros(1)}))
        Traceback (most recent call last):
        ...
        AssertionError: the derivative by 'w' is inf in reverse mode; where a root may be of zero, take fo.safe_sqrt
    """
    reverse, forward = torch.func.grad(function)(function.z), torch.func.jacfwd(function)(function.z)
    for mode, found in (("reverse", reverse), ("forward", forward)):
        for path, place in function.places.items():
            if not found[place].isfinite().all():
                value = found[place][~found[place].isfinite()][0].item()
                raise AssertionError(
                    f"the derivative by {path!r} is {value} in {mode} mode; where a root may be of zero, take "
                    "fo.safe_sqrt"
                )
    return reverse, forward


def _wrong(
    actual: Tensor, expected: Tensor, places: dict[str, slice], tolerance: float, noise: Tensor
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the path, the place and the value of each error above the tolerance."""
    for path, place in places.items():
        largest = expected[place].abs().max() if expected[place].numel() else 0.0
        for i in (~((actual - expected)[place].abs() <= noise[place] + tolerance * largest)).nonzero().flatten():
            k = place.start + int(i)
            yield path, k, actual[k]
