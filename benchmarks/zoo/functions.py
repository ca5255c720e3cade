"""Functions that are hard to minimize, in float64; one of them asks a network to fulfil an equation."""

import math
from typing import Any

import torch
from torch import Tensor

POINTS = 48  # where the differential equation is asked for
HIDDEN = 24  # of the network that shall fulfil it
SIDE, CONDITION = 12, 1e4  # of the quadratic
DIMENSIONS = 10  # of Rosenbrock's function

# A differential equation: -u'' = f on [0, 1] with u(0) = u(1) = 0, in float64. ----------------------------------------


def solution(x: Tensor) -> Tensor:
    """Return the u of the equation."""
    return (math.pi * x).sin() + 0.2 * (4 * math.pi * x).sin()


def force(x: Tensor) -> Tensor:
    """Return f = -u''."""
    return math.pi**2 * ((math.pi * x).sin() + 3.2 * (4 * math.pi * x).sin())


def network_and_curvature(params: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return u and u'' of a tanh network at points; both derivatives go through the layers beside the values."""
    h, slope, curvature = x[:, None], torch.ones_like(x[:, None]), torch.zeros_like(x[:, None])
    for layer in ("first", "second"):
        weight, bias = params[layer]["weight"], params[layer]["bias"]
        slope, curvature = slope @ weight.mT, curvature @ weight.mT
        h = (h @ weight.mT + bias).tanh()
        curvature = (1 - h.square()) * (curvature - 2 * h * slope.square())
        slope = (1 - h.square()) * slope
    weight = params["head"]["weight"]
    return (h @ weight.mT + params["head"]["bias"])[:, 0], (curvature @ weight.mT)[:, 0]


def residual(params: Any) -> Tensor:
    """Return how far the equation and its boundary values are from being fulfilled: mean of squares."""
    x = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    u, curvature = network_and_curvature(params, x)
    wrong: Tensor = (curvature + force(x)).square().mean() / force(x).square().mean()
    return wrong + 10 * u[[0, -1]].square().sum()


def away_from_solution(params: Any) -> Tensor:
    """Return the root mean square of the error of the network's u."""
    x = torch.linspace(0, 1, 4 * POINTS, dtype=torch.float64)
    return (network_and_curvature(params, x)[0] - solution(x)).square().mean().sqrt()


def tanh_network(generator: torch.Generator) -> Any:
    """Return random weights of a network with two hidden layers from a number to a number."""
    sizes = {"first": (HIDDEN, 1, 6.0), "second": (HIDDEN, HIDDEN, 1.0), "head": (1, HIDDEN, 1.0)}

    def random(*shape: int, scale: float) -> Tensor:
        return scale * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)

    return {
        name: {
            "weight": random(out, into, scale=scale * (3 / into) ** 0.5),
            "bias": random(out, scale=scale),
        }
        for name, (out, into, scale) in sizes.items()
    }


# Two functions. -------------------------------------------------------------------------------------------------------


def ill_conditioned() -> Tensor:
    """Return a positive definite matrix of condition 1e4, whose axes are cosine waves and not the parameters'."""
    places = torch.arange(SIDE, dtype=torch.float64)
    axes = torch.nn.functional.normalize((math.pi / SIDE * (places[:, None] + 0.5) * places).cos(), dim=0)
    return axes * torch.logspace(0, -math.log10(CONDITION), SIDE, dtype=torch.float64) @ axes.mT


def quadratic(params: Any) -> Tensor:
    """Return 1/2 tr(D' A D) / side, where D is the way to a minimum that is not zero: weight decay does not help."""
    places = torch.arange(SIDE, dtype=torch.float64)
    way: Tensor = params["weight"] - (places[:, None] + 2 * places).sin()
    return 0.5 * (way * (ill_conditioned() @ way)).sum() / SIDE


def random_matrix(generator: torch.Generator) -> Any:
    """Return where the quadratic begins."""
    return {"weight": torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64)}


def rosenbrock(params: Any) -> Tensor:
    """Return Rosenbrock's sum, a curved valley in ten dimensions: 0 at ones."""
    x: Tensor = params["x"]
    valley, way = x[1:] - x[:-1].square(), 1 - x[:-1]
    return 100 * valley.square().sum() + way.square().sum()


def random_vector(generator: torch.Generator) -> Any:
    """Return where Rosenbrock's function begins."""
    return {"x": 0.5 * torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)}
