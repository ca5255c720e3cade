"""Gradients by forward mode. Its memory does not grow with the length of a computation."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

from functorch_optim import tree
from functorch_optim._core.checks import check_params
from functorch_optim._core.vector import common_dtype, unflattened
from functorch_optim.meta._exact import exact_derivatives


def forward_grad(
    function: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    *,
    vectorize: bool = False,
    create_graph: bool = False,
) -> Callable[..., Any]:
    """Compute the gradient of a function of few numbers in forward mode.

        df/dx_i = (d/dt) f(x + t e_i) at t = 0,    for each number x_i

    The derivative of every tensor is computed together with the tensor, and nothing is kept for a backward pass. If f
    trains for many steps, the memory is therefore that of one step. The time is that of two to three evaluations of f
    for each number. The gradient is exact, and equals that of `torch.func.grad`.

    Args:
        function: f, which returns a 0-dim tensor. It must take its own gradients, such as those of a training, by
            `torch.func.grad`.
        argnums: which of its positional arguments to differentiate, as in `torch.func.grad`: trees of floating-point
            or complex tensors; None where one is missing.
        has_aux: whether f returns a pair: the number, and a tree of tensors that has no derivative, such as the
            trained parameters.
        vectorize: whether f is evaluated once, with all derivatives at once, by `torch.vmap`: faster, with memory for
            all of them. Otherwise it is evaluated for one number after the other, and each evaluation must give the
            same result: seed its random numbers.
        create_graph: whether autograd records the computation, where grad is enabled, so that `backward` and
            `torch.autograd.grad` can differentiate the gradient; memory then grows with the steps. Otherwise nothing is
            recorded, and autograd sees the gradient as a constant, even if f uses tensors that require grad.
            `torch.func.grad`, `jvp` and the like can differentiate the gradient in both cases.

    Returns:
        A function of the arguments of `function` that returns a tree like the argument, or a tuple of trees for a tuple
        of `argnums`; with `has_aux` a pair, the gradient and the tree that f returned with its number.

    Raises:
        TypeError: a leaf of the argument is no floating-point or complex tensor.
        ValueError: there is no number in the argument; f does not return one real number.

    Source: Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization, arXiv:1703.01785:
    Forward-HG.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from functorch_optim.meta import forward_grad
        >>> def loss_after_training(lr):
        ...     w, tx = torch.tensor(1.0), fo.sgd(lr)
        ...     state = tx.init(w)
        ...     for _ in range(100):
        ...         updates, state = tx.update(2 * w, state)  # of the loss w * w
        ...         w = fo.apply_updates(w, updates)
        ...     return w * w
        >>> forward_grad(loss_after_training)(torch.tensor(0.01)).round(decimals=2)
        tensor(-7.1800)
    """
    places = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    def grad(*args: Any, **kwargs: Any) -> Any:
        chosen = tuple([args[place] for place in places])
        leaves = tree.flatten(chosen)[0]
        check_params(leaves, lambda i: tree.paths(chosen)[i])
        primals = tuple([leaf for leaf in leaves if leaf is not None])
        count = sum([leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in primals])
        if not count:
            raise ValueError(
                f"There is no number to differentiate with respect to in the arguments {places}; choose by argnums"
            )

        def like_chosen(tensors: Sequence[Tensor]) -> Any:
            remaining = iter(tensors)
            return tree.map(lambda leaf: next(remaining), chosen)

        def pieces(x: Tensor) -> tuple[Tensor, ...]:
            split: list[Any] = unflattened(x, primals)
            return tuple([piece.to(leaf.device) for piece, leaf in zip(split, primals, strict=True)])

        def value(*moved: Tensor) -> tuple[Tensor, Any]:
            given = list(args)
            for place, argument in zip(places, like_chosen(moved), strict=True):
                given[place] = argument
            with exact_derivatives():
                result = function(*given, **kwargs)
            number, aux = result if has_aux else (result, ())
            _check_number(number)
            return number, aux

        def along(direction: Tensor) -> tuple[Tensor, Any]:
            _, *derivative_and_aux = torch.func.jvp(value, primals, pieces(direction), has_aux=True)
            return tuple(derivative_and_aux)

        directions = torch.eye(count, dtype=common_dtype(primals), device=primals[0].device)
        with contextlib.nullcontext() if create_graph or _is_differentiated() else torch.no_grad():
            if vectorize:
                batched = torch.vmap(along, out_dims=(0, None), randomness="same")  # type: ignore[arg-type]
                derivatives, aux = batched(directions)
            else:
                several = []
                for direction in directions:
                    derivative, aux = along(direction)
                    several.append(derivative)
                derivatives = torch.stack(several)
            gradients = like_chosen(pieces(derivatives))
        gradient = gradients[0] if isinstance(argnums, int) else gradients
        return (gradient, aux) if has_aux else gradient

    return grad


def _check_number(value: Any) -> None:
    if not isinstance(value, Tensor):
        what = type(value).__name__
    elif value.ndim or not value.is_floating_point():
        what = f"tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    else:
        return
    raise ValueError(f"The function must return one real number, a 0-dim tensor, got a {what}")


def _is_differentiated() -> bool:
    """Tell whether a reverse mode of torch.func is active. Under no_grad it would compute zero derivatives."""
    if torch.compiler.is_compiling():  # Dynamo cannot trace the question
        return True
    return any(level.key() == TransformType.Grad for level in get_interpreter_stack() or ())
