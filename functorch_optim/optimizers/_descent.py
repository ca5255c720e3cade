"""The links around the rule of every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from functorch_optim._core.combine import chain
from functorch_optim._core.hyperparameters import Hyperparameter, at, is_zero
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.transforms.decay import add_decayed_weights
from functorch_optim.transforms.scaling import maximize as ascend
from functorch_optim.transforms.scaling import scale_by_learning_rate
from functorch_optim.tree import Tree


def descent(
    *rules: GradientTransformation,
    lr: Hyperparameter,
    weight_decay: Hyperparameter,
    decoupled: bool | Literal["after", "proximal"] = False,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """Chain a rule with sign, weight decay and learning rate, in torch.optim's order.

    Args:
        *rules: the rules of the optimizer.
        lr: learning rate.
        weight_decay: added to the gradient, or to the rule's update when decoupled.
        decoupled: which of the two. "after": the parameters decay after the step, (1 - lr weight_decay) (p - lr u).
            "proximal": the step minimizes the penalty too, (p - lr u) / (1 + lr weight_decay).
        mask: where parameters decay.
        maximize: negate the gradient first; weight decay keeps its sign.
    """
    decay = add_decayed_weights(weight_decay, mask)
    links = [*rules, decay] if decoupled else [decay, *rules]
    if not is_zero(weight_decay) and decoupled == "after":
        links.insert(-1, _scale_by(lambda shrunk: 1 - shrunk, lr, weight_decay))
    if not is_zero(weight_decay) and decoupled == "proximal":
        links.append(_scale_by(lambda shrunk: 1 / (1 + shrunk), lr, weight_decay))
    return uphill_or_down(*links, scale_by_learning_rate(lr), maximize=maximize)


def _scale_by(factor: Callable[[Any], Any], lr: Hyperparameter, weight_decay: Hyperparameter) -> GradientTransformation:
    """Scale by a function of lr weight_decay, the part of the parameters that decays in a step."""

    def update(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
        return s * g, state

    def scalars(step: Tensor) -> Any:
        return factor(at(lr, step) * at(weight_decay, step))

    return leafwise(None, update, scalars, elementwise=True)


def uphill_or_down(*links: GradientTransformation, maximize: bool) -> GradientTransformation:
    """Chain links, after a change of sign if it is to ascend."""
    return chain(*([ascend()] if maximize else []), *links)


def check_real(name: str, p: Tensor) -> None:
    """Raise where an optimizer is given a complex parameter.

    Raises:
        TypeError: it is complex.
    """
    if p.is_complex():
        raise TypeError(f"{name} does not support complex parameters; give it torch.view_as_real(parameter)")
