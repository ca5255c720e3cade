"""Adagrad."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, filled_like
from functorch_optim._core.leafwise import leafwise, of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import safe_sqrt
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.transforms.decay import add_decayed_weights


@leaf_state
class ScaleByRssState(NamedTuple):
    """The state of `scale_by_rss` for one parameter.

    Attributes:
        sum: s, sum of g^2: like p.
    """

    sum: Tensor


@factory
def scale_by_rss(
    initial_accumulator_value: Hyperparameter = 0.0, eps: Hyperparameter = 1e-10
) -> GradientTransformation:
    """Divide gradients by the root of the sum of their squares.

        s <- s + g^2
        g <- g / (sqrt(s) + eps)

    Args:
        initial_accumulator_value: s before the first update, >= 0: number, 0-dim tensor, or schedule, whose first
            value is used.
        eps: added to the root, >= 0.

    Raises:
        ValueError: a number is out of range.

    Sparse gradients change only the entries that they have.

    Source: Duchi et al., Adaptive subgradient methods for online learning and stochastic optimization, JMLR 2011, in
    the diagonal form, figure 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_rss()
        >>> updates, state = tx.update(torch.tensor([4.0]), tx.init(torch.zeros(1)))
        >>> tx.update(torch.tensor([3.0]), state)[0]
        tensor([0.6000])
    """
    check("initial_accumulator_value value", initial_accumulator_value)
    check("epsilon value", eps)

    def init(p: Tensor) -> ScaleByRssState:
        return ScaleByRssState(filled_like(p, initial_accumulator_value))

    def update(g: Tensor, state: ScaleByRssState, p: Tensor | None, eps: Any) -> Any:
        s = state.sum + g * g
        return g / (safe_sqrt(s) + eps), ScaleByRssState(s)

    return leafwise(init, update, lambda step: at(eps, step), elementwise=True, sparse="touched")


@factory
def adagrad(
    lr: Hyperparameter = 1e-2,
    lr_decay: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    initial_accumulator_value: Hyperparameter = 0.0,
    eps: Hyperparameter = 1e-10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adagrad: the more an element has moved, the smaller its steps become.

        g <- g + weight_decay p
        u = -lr / (1 + (t - 1) lr_decay) scale_by_rss(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        lr_decay: rate >= 0 at which the learning rate decays.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters, and gradients must not
            be sparse.
        initial_accumulator_value: see `scale_by_rss`.
        eps: see `scale_by_rss`.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.Adagrad. Source: Duchi et al., JMLR 2011.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adagrad(lr=0.1)
        >>> updates, state = tx.update({"w": torch.full((1,), 3.0)}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.1000])}
    """
    check("learning rate", lr)
    check("lr_decay value", lr_decay)

    def scalars(step: Tensor) -> Any:
        return -at(lr, step) / (1 + (step - 1) * at(lr_decay, step))

    return uphill_or_down(
        add_decayed_weights(weight_decay),
        scale_by_rss(initial_accumulator_value, eps),
        of_rule(None, lambda g, state, p, s: (s * g, state), scalars, elementwise=True, sparse="touched", turns=True),
        maximize=maximize,
    )
