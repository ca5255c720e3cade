"""Gradients that are estimated from values of a function alone."""

from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_params
from functorch_optim._core.hyperparameters import check_choice, check_integer, check_number
from functorch_optim._core.vector import common_dtype, flattened, unflattened
from functorch_optim._execution.representation import widened
from functorch_optim.tree import Tree

ESTIMATORS = ("naive", "forward", "antithetic")


def zero_order_grad(
    function: Callable[..., Tensor | float],
    argnums: int | tuple[int, ...] = 0,
    *,
    estimator: Literal["naive", "forward", "antithetic"] = "antithetic",
    samples: int = 1,
    sigma: float = 0.01,
    sampler: Callable[..., Tensor] = torch.randn,
    generator: torch.Generator | None = None,
    vectorize: bool = False,
) -> Callable[..., Tree]:
    """Estimate the gradient of E[f(x + sigma z)], for random z, from values of f.

        naive:          mean of f(x + sigma z) z / sigma
        forward:        mean of (f(x + sigma z) - f(x)) z / sigma
        antithetic:     mean of (f(x + sigma z) - f(x - sigma z)) z / (2 sigma)

    All have that gradient as their expectation when z is normal; for a quadratic f it is the gradient of f itself. The
    variance of "naive" grows as f(x)^2 / sigma^2. "forward" subtracts f(x), which removes this term for one more
    evaluation. "antithetic" also removes the terms of the even derivatives of f, for twice the evaluations.

    Args:
        function: f, which returns a number or a 0-dim tensor. Only its values are used: it may have jumps, call
            `.item()`, or train a network.
        argnums: which of its positional arguments to differentiate, as in `torch.func.grad`: trees of floating-point
            or complex tensors; None where one is missing.
        estimator: "naive", "forward" or "antithetic".
        samples: number of z, >= 1. The variance falls as 1 / samples.
        sigma: standard deviation of the steps, > 0. A larger one smoothes f; a smaller one amplifies the rounding of
            f. In half precision it must not vanish beside the parameters.
        sampler: `sampler(shape, generator=, dtype=, device=)` draws z, of mean 0 and covariance 1.
        generator: source of random numbers; None is torch's default generator.
        vectorize: whether f is evaluated at all points at once, by `torch.vmap`, with the same random numbers.
            Otherwise it is evaluated at one point after the other, in the memory of one z. Functions that branch on
            values in Python need this.

    Returns:
        A function of the arguments of `function` that returns a tree like the argument, or a tuple of trees for a tuple
        of `argnums`. It computes in float32 where the argument has half precision. Its result has no derivative.

    Raises:
        ValueError: `estimator` is none of the three; `samples` or `sigma` is out of range; the values are not numbers.
        TypeError: `samples` is no integer; a leaf of the argument is no floating-point or complex tensor.

    Source: Nesterov & Spokoiny, Random Gradient-Free Minimization of Convex Functions, Foundations of Computational
    Mathematics 17, 2017; Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning,
    arXiv:1703.03864.

    Example:
        >>> import torch
        >>> from functorch_optim.meta import zero_order_grad
        >>> stairs = lambda params: (10 * params["w"]).round().square().sum() / 100
        >>> generator = torch.Generator().manual_seed(0)
        >>> grad = zero_order_grad(stairs, samples=100_000, sigma=0.1, generator=generator, vectorize=True)
        >>> grad({"w": torch.tensor([1.0, 2.0])})["w"].round(decimals=1)
        tensor([2., 4.])
    """
    check_choice("estimator", estimator, *ESTIMATORS)
    check_integer("samples", samples, 1)
    check_number("sigma", sigma, "value > 0")
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def grad(*args: Any, **kwargs: Any) -> Tree:
        chosen = tuple([args[place] for place in places])
        leaves, structure = tree.flatten(chosen)
        check_params(leaves, lambda i: tree.paths(chosen)[i])
        x = flattened(leaves, common_dtype(leaves)).detach()

        def value(x: Tensor) -> Tensor:
            given = list(args)
            for place, moved in zip(places, tree.unflatten(structure, unflattened(x, leaves)), strict=True):
                given[place] = moved
            return _number(function(*given, **kwargs))

        def weight(z: Tensor) -> Tensor:
            ahead = value(x + sigma * z)
            if estimator == "antithetic":
                return ((ahead - value(x - sigma * z)) / (2 * sigma)).to(x)
            return ((ahead - base) / sigma).to(x)

        def draws() -> Iterator[Tensor]:
            for _ in range(samples):
                yield sampler(x.shape, generator=generator, dtype=x.dtype, device=x.device)

        base = value(x) if estimator == "forward" else 0.0
        if vectorize:
            z = torch.stack(list(draws()))
            total = torch.vmap(weight, randomness="different")(z) @ z
        else:
            total = torch.zeros_like(x)
            for z in draws():
                total = total + weight(z) * z
        estimate = tree.unflatten(structure, unflattened(total / samples, leaves))
        return estimate[0] if isinstance(argnums, int) else estimate

    return grad


def _number(value: Any) -> Tensor:
    """Turn a number into a tensor of full precision, because differences of these tensors are taken."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return widened(value.detach())
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    what = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"The function must return a number or a 0-dim tensor, got a {what}")
