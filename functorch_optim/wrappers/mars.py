"""MARS: gradients with less variance, by the change since the last step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim._core.combine import chain
from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.transforms.clipping import clip_by_norm
from functorch_optim.wrappers._wrapping import wrapped, wrapper


class MarsState(NamedTuple):
    """The state of `mars` for one parameter; that of a tree has `step` in front.

    Attributes:
        prev_grad: the last gradient, zero at first: like p.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.mars(fo.adamw(1e-3)).init(torch.zeros(1))[0][0].prev_grad
        tensor([0.])
    """

    prev_grad: Tensor


leaf_state(MarsState)


def mars(tx: Any, gamma: Hyperparameter = 0.025, beta1: Hyperparameter = 0.95) -> Any:
    """Give a transformation gradients with less variance, in which the change since the last step is enlarged.

        c = g + gamma beta1 / (1 - beta1) (g - g_prev)
        u = tx(c min(1, 1 / |c|))

    |c| is the norm of each tensor. The first g_prev is zero, as in the authors' code, so that the first c is
    (1 + gamma beta1 / (1 - beta1)) g.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters. The authors' have
            `adamw(3e-3, betas=(0.95, 0.99))`, `lion`, and `muon`.
        gamma: share of the correction, >= 0: number, 0-dim tensor, or schedule.
        beta1: decay rate in [0, 1) of the momentum of `tx`: number, 0-dim tensor, or schedule.

    Returns:
        Transformation whose state is a tuple: those of the correction, the first of them a `MarsState`, and the state
        of `tx`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `tx` is neither a transformation nor a factory.

    This is the approximation that needs one gradient a step: the last one is of the last batch. The authors correct
    matrices only, by default; `fo.partition({True: fo.mars(tx), False: tx}, labels)` does that. Derivatives flow
    through the norm; where it is at most 1 they are those of the identity.

    Source: Yuan et al., MARS, arXiv:2411.10438, algorithms 1 and 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.mars(fo.sgd(1.0), gamma=0.1, beta1=0.5), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for g in (0.5, 0.6):
        ...     updates, state = tx.update(torch.tensor([g]), state, params)
        ...     print(updates)
        tensor([-0.5500])
        tensor([-0.6100])
    """
    check("gamma value", gamma)
    check("beta1 value", beta1, "0 <= value < 1")
    return wrapped(tx, _mars, "mars(adamw(3e-3, betas=(0.95, 0.99)))", gamma=gamma, beta1=beta1)


@wrapper
def _mars(tx: GradientTransformation, gamma: Hyperparameter, beta1: Hyperparameter) -> GradientTransformation:
    def scalars(step: Tensor) -> Any:
        return at(gamma, step) * at(beta1, step) / (1 - at(beta1, step))

    def update(g: Tensor, state: MarsState, p: Tensor | None, s: Any) -> Any:
        return g + s * (g - state.prev_grad), MarsState(g)

    corrected = leafwise(MarsState, update, scalars, elementwise=True)
    return chain(chain(corrected, clip_by_norm(1.0)), tx)
