"""Sign descent, with and without momentum."""

from __future__ import annotations

from functorch_optim._core.hyperparameters import Hyperparameter, check
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers._descent import descent
from functorch_optim.transforms.momentum import ema
from functorch_optim.transforms.normalizing import scale_by_sign


@factory
def sign_sgd(
    lr: Hyperparameter = 1e-3,
    weight_decay: Hyperparameter = 0.0,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Descend by the signs of gradients: a step of the learning rate for every element.

        g <- g + weight_decay p
        u = -lr sign(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        decoupled_weight_decay: decay as `adamw` does: u = -lr (sign(g) + weight_decay p).
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    lr has a derivative, and weight_decay where it is decoupled; the sign, which is 0 where g is 0, has none.

    Source: Bernstein et al., signSGD: compressed optimisation for non-convex problems, arXiv:1802.04434, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.sign_sgd(lr=0.1)
        >>> tx.update(torch.tensor([3.0, -0.2, 0.0]), tx.init(torch.zeros(3)))[0]
        tensor([-0.1000,  0.1000, -0.0000])
    """
    return descent(
        scale_by_sign(), lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize
    )


@factory
def signum(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    *,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Descend by the sign of the running mean of gradients: `sign_sgd` with momentum.

        g <- g + weight_decay p
        m <- momentum m + (1 - momentum) g
        u = -lr sign(m)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: decay rate of m, in [0, 1). A sign needs no correction for the beginning at zero.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        decoupled_weight_decay: decay as the paper and `adamw` do: u = -lr (sign(m) + weight_decay p).
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    lr has a derivative, and weight_decay where it is decoupled; updates have none by gradients, state or momentum.
    Source: Bernstein et al., arXiv:1802.04434, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.signum(lr=0.1)
        >>> tx.update(torch.tensor([3.0, -0.2]), tx.init(torch.zeros(2)))[0]
        tensor([-0.1000,  0.1000])
    """
    check("momentum value", momentum, "0 <= value < 1")
    return descent(
        ema(momentum, debias=False),
        scale_by_sign(),
        lr=lr,
        weight_decay=weight_decay,
        decoupled=decoupled_weight_decay,
        maximize=maximize,
    )
