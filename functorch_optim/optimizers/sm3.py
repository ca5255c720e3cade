"""SM3: Adagrad in the memory of one number for each row, column, and so on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim.optimizers._descent import check_real, descent


@leaf_state
class SM3State(NamedTuple):
    """The state of `sm3` for one parameter.

    Attributes:
        accumulators: a, one number for each index of each dimension, one dimension after the other: (n_1 + ... + n_k,),
            or (1,) for a scalar. float32 at least.
        momentum_buffer: m, running mean of the scaled gradient: like p.
    """

    accumulators: Tensor
    momentum_buffer: Tensor


@factory
def sm3(
    lr: Hyperparameter = 0.1,
    momentum: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-8,
    *,
    weight_decay: Hyperparameter = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """SM3-II: as adaptive as Adagrad, with a sum of squares for each index of each dimension in place of each element.

        g <- g + weight_decay p
        nu = min over dimensions i of a_i, + g^2
        a_i = max of nu over all other dimensions
        w = g / sqrt(nu + eps),  0 where nu is 0
        m <- momentum m + (1 - momentum) w
        u = -lr m

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: decay rate of m, in [0, 1).
        eps: added inside of the root, >= 0.
        weight_decay: L2 penalty >= 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.
        TypeError: a parameter is complex.

    At ties of minima and maxima derivatives are shared. Source: Anil et al., arXiv:1901.11150, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.sm3(lr=1.0, momentum=0.0, eps=0.0), torch.zeros(2, 2)
        >>> updates, state = tx.update(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), tx.init(params))
        >>> updates, fo.tree.get(state, "accumulators")
        (tensor([[-1., -0.],
                [-0., -1.]]), tensor([ 9., 16.,  9., 16.]))
    """
    check("momentum value", momentum, "0 <= value < 1")
    check("epsilon value", eps)

    def scalars(step: Any) -> tuple[Any, Any]:
        return 1 - at(momentum, step), at(eps, step)

    def update(g: Tensor, state: SM3State, p: Any, s: tuple[Any, Any]) -> Any:
        weight, e = s
        nu = _smallest(state.accumulators, g.shape) + g * g
        moves = (nu != 0).to(nu.dtype)
        w = g * moves * torch.rsqrt(nu + (1 - moves) + e)
        m = torch.lerp(state.momentum_buffer, w, weight)
        return m, SM3State(_largest(nu, state.accumulators), m)

    return descent(leafwise(_init, update, scalars), lr=lr, weight_decay=weight_decay, maximize=maximize)


def _init(p: Tensor) -> SM3State:
    check_real("SM3", p)
    return SM3State(p.new_zeros(sum(p.shape) if p.ndim else 1, dtype=common_dtype([p])), torch.zeros_like(p))


def _smallest(accumulators: Tensor, shape: torch.Size) -> Tensor:
    """Take the smallest accumulator for each element."""
    if not shape:
        return accumulators.reshape(())
    parts = [
        part.reshape(-1, *[1] * (len(shape) - dim - 1))
        for dim, part in enumerate(torch.split(accumulators, list(shape)))
    ]
    return functools.reduce(torch.minimum, reversed(parts))  # the last one alone is of the size of the parameter


def _largest(nu: Tensor, accumulators: Tensor) -> Tensor:
    """Take the largest of all elements with one index, for each index of each dimension."""
    if nu.ndim < 2:
        return nu.reshape(-1)
    if nu.numel() == 0:
        return accumulators
    found = []
    for _ in range(nu.ndim - 1):
        found.append(nu.amax(list(range(1, nu.ndim))))
        nu = nu.amax(0)
    return torch.cat([*found, nu])
