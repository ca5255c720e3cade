"""Derivatives of functions of lists of tensors, at any levels of torch.func."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from functorch_optim import tree
from functorch_optim.tree import Tree

Tensors: TypeAlias = Sequence[Tensor]

_functorch = torch._C._functorch
_unpack_dual: Callable[[Tensor], Any] = forward_ad.unpack_dual


def pullback(
    function: Callable[[Tensors], Any], primals: Tensors, like: Any = None
) -> Callable[[Tensors], list[Tensor]]:
    """Return the function that multiplies with the transpose of the derivative of `function` at `primals`."""
    multiply = torch.func.vjp(function, list(primals))[1]
    return lambda cotangents: multiply(list(cotangents))[0]


def pushforward(
    function: Callable[[Tensors], Any], primals: Tensors, like: Tensors
) -> Callable[[Tensors], list[Tensor]]:
    """Return the function that multiplies with the derivative of `function`, whose results are like `like`."""
    return pullback(pullback(function, primals), [torch.zeros_like(x) for x in like])


def replaced(items: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Return the items with new ones at these places."""
    result = list(items)
    for i, item in zip(places, new, strict=True):
        result[i] = item
    return result


def split(mixed: Tree) -> tuple[list[Tensor], Callable[[Tensors], Tree]]:
    """Take the tensors out of a tree; return them, and the function that puts others in their places."""
    leaves, structure = tree.flatten(mixed)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = replaced(leaves, places, [None] * len(places))
    return [leaves[i] for i in places], lambda others: tree.unflatten(structure, replaced(rest, places, others))


def is_differentiable(leaf: Any) -> bool:
    """Tell whether this is a tensor of real or complex numbers."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def requires_grad(value: Tensor) -> bool:
    """Tell whether reverse mode records computations with a tensor, at any level of torch.func or by autograd."""
    while not value.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(value):
            return False
        value = _functorch.get_unwrapped(value)
    return True


def alive(tensor: Tensor) -> Tensor:
    """Return a saved tensor without the level of torch.func that has ended.

    The function that torch.func.vjp returns, such as that of `pullback`, saves tensors of its level.
    """
    return _functorch.unwrap_if_dead(tensor)


def forward_mode() -> contextlib.AbstractContextManager[None]:
    """Turn forward mode on in the `jvp` of an autograd.Function: torch turns it off there, for outer levels too."""
    context: contextlib.AbstractContextManager[None] = forward_ad._set_fwd_grad_enabled(True)
    return context


def primal(tensor: Tensor) -> Tensor:
    """Drop the tangent of the innermost level of forward mode, and keep those of outer ones."""
    if _functorch.is_batchedtensor(tensor):  # unpack_dual has no batching rule
        level: Any = _functorch.maybe_get_level(tensor)
        inner, dim = _functorch._unwrap_batched(tensor, level)
        return _functorch._add_batch_dim(primal(inner), dim, level)  # type: ignore[arg-type]
    value: Tensor = _unpack_dual(tensor).primal
    return value


def has_derivative(value: Any) -> bool:
    """Tell whether a tensor is being differentiated, at any level of torch.func or by autograd."""
    with contextlib.ExitStack() as popped:
        while isinstance(value, Tensor):
            level = max(_functorch.maybe_get_level(value) or 0, 0)  # -1 for a plain tensor
            while len(_functorch.get_interpreter_stack() or ()) > level:  # inner levels would hide the tangent
                popped.enter_context(temporarily_pop_interpreter_stack())
            batched = _functorch.is_batchedtensor(value)
            if value.requires_grad or not (batched or _unpack_dual(value).tangent is None):
                return True
            value = _functorch.get_unwrapped(value) if level else None
    return False
