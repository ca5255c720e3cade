"""Estimates of the diagonal of a Hessian."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._random import at_step, key_of, mixed, signs, uniform
from functorch_optim.tree import Tree


def hutchinson(
    loss_fn: Callable[[Tree, Any], Tensor] | None = None, generator: torch.Generator | int | Tensor | None = None
) -> Callable[..., Tree]:
    """Estimate the diagonal of the Hessian of a loss: `z * (H z)`, with z of random signs.

    Args:
        loss_fn: `loss_fn(params, batch)` returns the loss. None: that of the step, the extra `value_fn` of `sophia`.
        generator: source of a key, which is drawn once, when this function is called: a `torch.Generator`, or None for
            torch's own. Or the key itself: an integer, or a 0-dim tensor of int64.

    Returns:
        Function `estimate(params, batch=None, *, step=None, value_fn=None)` that returns a tree like the parameters.
        Its random numbers are a function of the key and of the step, an integer; without a step they are drawn anew,
        and with an integer for the generator they are always the same.

    Raises:
        TypeError: `generator` is of another type; the loss is missing when an estimate is made.

    The expectation is the diagonal, and a diagonal Hessian is returned exactly. An estimate costs a gradient and its
    derivative. It may be differentiated.

    Source: Bekas et al., An estimator for the diagonal of a matrix, Applied Numerical Mathematics 57, 2007; Liu et al.,
    Sophia, arXiv:2305.14342, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> estimate = fo.hutchinson(lambda params, batch: (batch * params**2).sum(), generator=0)
        >>> estimate(torch.ones(2), torch.tensor([1.0, 3.0]))
        tensor([2., 6.])
    """
    key = _Key(generator, "hutchinson(loss, generator=0)")

    def estimate(
        params: Tree, batch: Any = None, *, step: Any = None, value_fn: Callable[[Tree], Tensor] | None = None
    ) -> Tree:
        if loss_fn is None and value_fn is None:
            raise TypeError(
                "hutchinson needs the loss: hutchinson(loss_fn), or the extra value_fn, tx.update(grads, state, "
                "params, value_fn=loss)"
            )
        leaves, arranged = tree.present(params)

        def loss_of(tensors: list[Tensor]) -> Tensor:
            moved = arranged(tensors)
            return loss_fn(moved, batch) if loss_fn is not None else value_fn(moved)  # type: ignore[misc]

        here = key.at(step, tree.device_of(params))
        random = [signs(mixed(here + i), p.shape).to(p) for i, p in enumerate(leaves)]
        products = torch.func.vjp(torch.func.grad(loss_of), leaves)[1](random)[0]  # of a closure this is an error
        return arranged([z * product for z, product in zip(random, products, strict=True)])

    return estimate


def gauss_newton_bartlett(
    logits_fn: Callable[[Tree, Any], Tensor], generator: torch.Generator | int | Tensor | None = None
) -> Callable[..., Tree]:
    """Estimate the diagonal of the Gauss-Newton matrix of a cross-entropy: `B g^2`, with labels that the model draws.

        y_i ~ softmax(logits_i),  i = 1 ... B
        g = gradient of the mean over i of cross_entropy(logits_i, y_i)

    Args:
        logits_fn: `logits_fn(params, batch)` returns logits, whose last dimension is that of the classes. All other
            dimensions together are the B predictions, tokens say.
        generator: see `hutchinson`.

    Returns:
        Function `estimate(params, batch=None, *, step=None)` that returns a tree like the parameters; see `hutchinson`.
        No estimate is negative.

    Raises:
        TypeError: `generator` is of another type.

    The batch needs no labels. An estimate costs one gradient.

    Source: Liu et al., Sophia, arXiv:2305.14342, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> estimate = fo.gauss_newton_bartlett(lambda params, batch: batch @ params, generator=0)
        >>> estimate(torch.zeros(1, 2), torch.ones(1, 1))
        tensor([[0.2500, 0.2500]])
    """
    key = _Key(generator, "gauss_newton_bartlett(logits_fn, generator=0)")

    def estimate(params: Tree, batch: Any = None, *, step: Any = None) -> Tree:
        leaves, arranged = tree.present(params)
        here = key.at(step, tree.device_of(params))

        def loss_of(tensors: list[Tensor]) -> Tensor:
            logits = logits_fn(arranged(tensors), batch)
            labels = _drawn(logits.detach(), here)
            log_likelihood = torch.log_softmax(logits, -1).gather(-1, labels)
            return -log_likelihood.sum() / math.sqrt(labels.numel())  # the square of its gradient is B g^2

        return arranged([g * g for g in torch.func.grad(loss_of)(leaves)])

    return estimate


def _drawn(logits: Tensor, key: Tensor) -> Tensor:
    """Draw labels from softmax(logits); the last dimension has one element."""
    below = torch.softmax(logits.double(), -1).cumsum(-1)
    level = uniform(key.to(logits.device), logits.shape[:-1]).unsqueeze(-1) * below[..., -1:]
    return (below <= level).sum(-1, keepdim=True)


class _Key:
    """A source of keys: for each step the same one, and without a step another one each time."""

    def __init__(self, generator: Any, example: str) -> None:
        self.first, self.generator, self.example = key_of(generator, example), generator, example

    def at(self, step: Any, device: torch.device | None) -> Tensor:
        """Return a key on a device."""
        key = key_of(self.generator, self.example) if step is None else self.first
        return at_step(key, torch.as_tensor(0 if step is None else step, dtype=torch.int64, device=device))
