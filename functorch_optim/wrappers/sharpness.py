"""Sharpness-aware minimization: gradients where the loss near the parameters is largest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_has_params
from functorch_optim._core.combine import chain, masked
from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import EmptyState
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import where
from functorch_optim.transforms.clipping import global_norm
from functorch_optim.tree import Tree
from functorch_optim.wrappers._wrapping import wrapped, wrapper

_EPS = 1e-12
"""Added to the norm, as in the code that all others were written after."""


def sam(
    tx: Any,
    rho: Hyperparameter = 0.05,
    *,
    adaptive: bool | Tree | Callable[[Tree], Tree] = False,
    eta: Hyperparameter = 0.0,
) -> Any:
    """Give a transformation the gradient where the loss is largest nearby (SAM, ASAM): it descends to flat minima.

        e = rho T^2 g / (|T g| + 1e-12),  T = |p| + eta where adaptive, else 1
        u = tx(gradient at p + e), at p

    The norm is that of the whole tree. Every step evaluates the gradient twice.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        rho: radius >= 0: number, 0-dim tensor, or schedule.
        adaptive: whether the radius is relative to the size of each element (ASAM), with ten times the `rho`. A mask
            says where, as that of `fo.masked` does: the authors of ASAM leave biases and norms out.
        eta: number >= 0 added to that size: number, 0-dim tensor, or schedule. ASAM has 0.01.

    Returns:
        Transformation whose state is a tuple: that of the ascent, and the state of `tx`.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: `tx` is neither a transformation nor a factory; or none of the extras is given.

    `update` declares the extras `grad_fn` and `value_fn`, and needs one of them: the gradient, or the loss, as a
    function of the parameters, on the batch of the step. In `fo.Optimizer` an ordinary closure is enough,
    `opt.step(closure)`: it is evaluated again at p + e, with autocast and whatever else it does. Parameters, gradients,
    and the buffers of modules, such as the statistics of BatchNorm, are then as the first evaluation has left them.
    Inside of `masked` and `partition`, `grad_fn` and `value_fn` get `MaskedNode()` in place of the other parameters,
    and must have their values from elsewhere.

    Where all gradients are zero, so is e, with derivative zero. A parameter without a gradient stays in both places.
    `sam(accumulate(tx, 4))` adds up gradients of small batches, each at its own p + e. `sam(apply_if_finite(tx))`
    leaves steps out in which either gradient is not finite. A model that was compiled in place, by `model.compile()`,
    is not seen, and updates its buffers twice; one from `torch.compile(model)` does not.

    Source: Foret et al., Sharpness-Aware Minimization, arXiv:2010.01412, algorithm 1; Kwon et al., ASAM,
    arXiv:2102.11600, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> loss = lambda params: params.square().sum() / 2
        >>> tx, params = fo.sam(fo.sgd(0.1), rho=0.5), torch.tensor([3.0, 4.0])
        >>> grad_fn = torch.func.grad(loss)
        >>> fo.step(tx, grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]
        tensor([2.6700, 3.5600])
    """
    check("rho", rho)
    check("eta", eta)
    return wrapped(tx, _sam, "sam(adamw(1e-3), rho=0.05)", rho=rho, adaptive=adaptive, eta=eta)


@wrapper
def _sam(tx: GradientTransformation, rho: Hyperparameter, adaptive: Any, eta: Hyperparameter) -> GradientTransformation:
    ascent = [_ascent(rho)]
    if adaptive is not False:
        size = _times_size(eta) if adaptive is True else masked(_times_size(eta), adaptive)
        ascent = [size, *ascent, size]
    return chain(chain(*ascent, _there()), tx)


@factory
def _ascent(rho: Hyperparameter) -> GradientTransformation:
    def scalars(step: Tensor, *, updates: list[Tensor]) -> Any:
        norm = global_norm(updates, 2.0, step)
        return where(norm == 0, 0.0, at(rho, step) / (norm + _EPS))

    return leafwise(None, lambda g, state, p, s: (s * g, state), scalars, elementwise=True, sparse="dense")


@factory
def _times_size(eta: Hyperparameter) -> GradientTransformation:
    def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
        return (torch.abs(p) + s) * g, state

    return leafwise(None, update, lambda step: at(eta, step), elementwise=True, needs_params=True)


@factory
def _there() -> GradientTransformation:
    """Return the gradient where an update leads to."""

    def update(
        updates: Tree,
        state: Any,
        params: Tree,
        *,
        grad_fn: Callable[[Tree], Tree] | None = None,
        value_fn: Callable[[Tree], Tensor] | None = None,
    ) -> tuple[Tree, Any]:
        function = grad_fn if grad_fn is not None else value_fn
        check_has_params("sam", params, ", grad_fn=grad_fn")
        if not callable(function):
            raise TypeError(
                "sam needs the gradient, or the loss, as a function of the parameters; call fo.step(tx, grads, state, "
                "params, grad_fn=torch.func.grad(loss)), or opt.step(closure)"
            )
        moved = tree.map(lambda p, e: p if e is None else p + e, params, updates)
        grads = function(moved) if grad_fn is not None else _gradient(function, moved)
        return tree.map(lambda e, g: torch.zeros_like(e) if g is None else g, updates, grads), state

    return GradientTransformation(lambda params: EmptyState(), update)


def _gradient(value_fn: Callable[[Tree], Tensor], params: Tree) -> Tree:
    leaves, arranged = tree.present(params)
    return arranged(torch.func.grad(lambda tensors: value_fn(arranged(tensors)))(leaves))
