"""Stochastic gradient descent."""

from __future__ import annotations

from functorch_optim._core.hyperparameters import Hyperparameter, check, is_zero
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers._descent import descent
from functorch_optim.transforms.momentum import trace


@factory
def sgd(
    lr: Hyperparameter = 1e-3,
    momentum: Hyperparameter = 0.0,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Descend along the gradient, with momentum.

        g <- g + weight_decay p
        b <- g  at t = 1,  else  momentum b + (1 - dampening) g
        u = -lr (g + momentum b)  if nesterov,  else  -lr b

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: factor >= 0; the number 0 switches it off, and no buffer is kept.
        dampening: part of each new gradient that is left out, except of the first.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        nesterov: Nesterov's momentum; needs momentum > 0 and dampening = 0.
        maximize: ascend instead.

    Raises:
        ValueError: a number is negative or NaN, or nesterov comes with dampening or without momentum.

    Same numbers as torch.optim.SGD. Source: Sutskever et al., On the importance of initialization and momentum in deep
    learning, ICML 2013, in the form of torch.optim.SGD.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.sgd(lr=0.1, momentum=0.9)
        >>> updates, state = tx.update({"w": torch.ones(2)}, tx.init({"w": torch.ones(2)}))
        >>> updates
        {'w': tensor([-0.1000, -0.1000])}
    """
    check("dampening value", dampening, "a number")  # where no momentum looks at it, too
    still = is_zero(momentum) and not nesterov
    rules = [] if still else [trace(momentum, dampening, nesterov)]
    return descent(*rules, lr=lr, weight_decay=weight_decay, maximize=maximize)
