"""Training with differentiable steps as one function of everything it depends on, and its derivatives."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from derivatives import SMOOTH, STEPS, OfVector, differences

import functorch_optim as fo


def directly(params, objective):
    """Give parameters their gradients by torch.autograd.grad, of a loss that sees them and not copies of them."""
    leaves = fo.tree.flatten(params)[0]
    loss = objective(params)
    for p, gradient in zip(leaves, torch.autograd.grad(loss, leaves, create_graph=True), strict=True):
        p.grad = gradient
    return loss


def by_grad(params, objective):
    """Give parameters their gradients by torch.autograd.grad."""
    return directly(params, lambda params: objective(fo.tree.map(torch.clone, params)))


def by_backward(params, objective):
    """Give parameters their gradients by backward."""
    leaves = fo.tree.flatten(params)[0]
    for p in leaves:
        p.retain_grad()
        p.grad = None
    loss = objective(fo.tree.map(torch.clone, params))
    loss.backward(create_graph=True, inputs=leaves)
    return loss


def without_a_graph(params, objective):
    """Give parameters their gradients as constants: what must not be taken for a derivative."""
    loss = by_grad(params, objective)
    for p in fo.tree.flatten(params)[0]:
        p.grad = p.grad.detach()
    return loss


@dataclass(frozen=True)
class Stateful:
    """What `derivatives.Training` is, with an optimizer.

    Attributes:
        make: (pairs of name and parameter, hyperparameters) -> optimizer.
        loss: (params, data) -> loss.
        shifts: for each step, what is added to the inputs of the hidden units.
        give_gradients: (params, objective) -> loss.
        missing: for each step, the names of parameters that have no gradient in it.
        extras: what steps are given besides, of "value" and "value_fn".
    """

    make: Callable[[list[tuple[str, torch.Tensor]], dict[str, Any]], torch.optim.Optimizer]
    loss: Callable[[Any, Any], torch.Tensor] = SMOOTH
    shifts: tuple[Any, ...] = (0.0,) * STEPS
    give_gradients: Callable[[Any, Any], torch.Tensor] = by_grad
    missing: dict[int, tuple[str, ...]] | None = None
    extras: frozenset[str] = frozenset()

    def __call__(self, arguments):
        """Train, and return the loss."""
        params = fo.tree.map(torch.clone, arguments["params"])
        leaves, structure = fo.tree.flatten(params)
        named = dict(zip(fo.tree.paths(params), leaves, strict=True))
        optimizer = self.make(list(named.items()), arguments["hyperparameters"])
        for i, shift in enumerate(self.shifts):
            objective = partial(self._loss, {**arguments["data"], "shift": shift})
            loss = self.give_gradients(params, objective)
            for name in (self.missing or {}).get(i, ()):
                named[name].retain_grad()  # or torch warns that there is none
                named[name].grad = None
            extras = {"value": loss, "value_fn": partial(self._loss_by_name, objective, structure, list(named))}
            optimizer.step(**{name: extras[name] for name in self.extras})
        return self._loss(arguments["data"], params)

    def _loss(self, data, params):
        return self.loss(params, data)

    def _loss_by_name(self, objective, structure, names, params):
        return objective(fo.tree.unflatten(structure, [params[name] for name in names]))


# Derivatives. ---------------------------------------------------------------------------------------------------------


def reverse(function):
    """Return the gradient of a function of a vector, by autograd."""
    z = function.z.clone().requires_grad_()
    [gradient] = torch.autograd.grad(function(z), z)
    return gradient


def second(function):
    """Return the product of the second derivative of a function of a vector with a vector, by autograd."""
    z = function.z.clone().requires_grad_()
    [gradient] = torch.autograd.grad(function(z), z, create_graph=True)
    return torch.autograd.grad(gradient @ torch.linspace(-1, 1, len(z), dtype=z.dtype), z)[0]


def directions_of(function):
    """Return, for each argument, a random direction of it alone.

    A hyperparameter's direction is itself, so that steps are in proportion to it.
    """
    directions = torch.zeros(len(function.places), function.z.numel(), dtype=function.z.dtype)
    for row, (path, place) in zip(directions, function.places.items(), strict=True):
        row[place] = function.z[place] if path.startswith("hyperparameters") else torch.randn_like(function.z[place])
    return directions


def are_right(function, gradient, directions):
    """Tell, for each of some directions, whether the derivative along it is that by finite differences."""

    def moved(t):
        return function((function.z + t @ directions).requires_grad_()).detach()

    expected = differences(moved, torch.zeros_like(directions[:, 0]), batched=False)
    return torch.isclose(directions @ gradient, expected, rtol=1e-6, atol=1e-9).tolist()


def wrong(function, gradient):
    """List the arguments by which a gradient differs from finite differences."""
    close = are_right(function, gradient, directions_of(function))
    return [path for path, right in zip(function.places, close, strict=True) if not right]


def is_right(function, gradient):
    """Tell whether a gradient is that by finite differences along one direction of all arguments at once.

    It takes a tenth of the time that `wrong` takes, and does not say by which.
    """
    [right] = are_right(function, gradient, directions_of(function).sum(0, keepdim=True))
    return right


def gradient_of(training, arguments):
    """Return a training as a function of a vector, and its gradient."""
    function = OfVector(training, arguments)
    return function, reverse(function)
