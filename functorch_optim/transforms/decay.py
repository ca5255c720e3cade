"""Weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import masked
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_choice, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state, unchanged
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import maximum, quotient
from functorch_optim.tree import Tree


class LargestRate(NamedTuple):
    """The number that corrected decay carries on: the largest learning rate so far."""

    lr_max: Any


class AddDecayedWeightsState(NamedTuple):
    """The state of `add_decayed_weights(towards="init")` for one parameter.

    Attributes:
        init_param: p_0, the first parameter: like p.
    """

    init_param: Tensor


class CorrectedDecayState(NamedTuple):
    """The state of `add_decayed_weights(kind="corrected")`: `step` and `lr_max`, once for the tree."""


leaf_state(AddDecayedWeightsState, LargestRate)
leaf_state(CorrectedDecayState, LargestRate)


@factory
def add_decayed_weights(
    weight_decay: Hyperparameter = 0.0,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    *,
    kind: Literal["decoupled", "independent", "corrected"] = "decoupled",
    cautious: bool = False,
    towards: Literal["init"] | None = None,
    lr_max: Hyperparameter | None = None,
) -> GradientTransformation:
    """Add the decayed parameters to the updates: `g <- g + weight_decay p`.

    Before an optimizer's rule this is an L2 penalty, as in torch's Adam. Between the rule and the learning rate it is
    decoupled weight decay, as in torch's AdamW; the other kinds belong there, too. A step subtracts from p

        lr weight_decay p              "decoupled"
        weight_decay p                 "independent" of the learning rate
        lr^2 / lr_max weight_decay p   "corrected"

    "independent" and "corrected" are given the learning rate of their chain: that of the next `scale_by_learning_rate`,
    or else that of the last one before. "independent" divides by it, and so does not decay in a step whose learning
    rate is zero. After the learning rate, as the last link, it decays in every step.

    Args:
        weight_decay: factor >= 0: number, 0-dim tensor, or schedule. The number 0 switches it off, and then `update`
            does not need the parameters.
        mask: True where a parameter decays: a tree of bools, a prefix of one, or a function of the parameters; see
            `masked`. None: everywhere.
        kind: how the decay depends on the learning rate, as above.
        cautious: decay only elements that the update also makes smaller, where g p >= 0. This condition is a constant
            to derivatives.
        towards: "init": decay towards the parameters that `init` was given (L2-SP): p - p_0 replaces p. None: towards
            zero.
        lr_max: largest learning rate, for "corrected": number > 0, 0-dim tensor, or schedule. None: the largest so
            far, which is kept in the state; in a warm-up this is the current rate.

    Raises:
        ValueError: a number is out of range; a word is none of those above; `update` is called without parameters; or
            the kind depends on the learning rate, and the chain has none.

    Source: Loshchilov & Hutter, arXiv:1711.05101; corrected: Defazio, Why Gradients Rapidly Increase Near the End of
    Training, arXiv:2506.02285; cautious: Chen et al., Cautious Weight Decay, arXiv:2510.12402; towards="init": Li et
    al., Explicit Inductive Bias for Transfer Learning, arXiv:1802.01483. timm's corrected decay has the first learning
    rate for lr_max.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.add_decayed_weights(0.1)
        >>> params = torch.tensor([1.0, -2.0])
        >>> tx.update(torch.zeros(2), tx.init(params), params)[0]
        tensor([ 0.1000, -0.2000])
        >>> decay = fo.add_decayed_weights(0.1, kind="independent")
        >>> tx = fo.chain(fo.scale_by_adam(), decay, fo.scale_by_learning_rate(1e-3))
        >>> tx.update(torch.zeros(2), tx.init(params), params)[0]
        tensor([-0.1000,  0.2000])
    """
    check("weight_decay value", weight_decay)
    check_choice("kind", kind, "decoupled", "independent", "corrected")
    check_choice("towards", towards, None, "init")
    if lr_max is not None:
        if kind != "corrected":
            raise ValueError(f"lr_max is of kind='corrected', and kind={kind!r} was given; leave lr_max out")
        check("lr_max", lr_max, "value > 0")
    if is_zero(weight_decay):
        # It still counts steps, so that its state does not depend on the number.
        return of_rule(None, unchanged, lambda step: at(weight_decay, step), elementwise=True, sparse="touched")

    carries = kind == "corrected" and lr_max is None

    def start(p: Tensor) -> AddDecayedWeightsState:
        return AddDecayedWeightsState(p.clone())

    def of_rate(lr: Any, behind: bool) -> GradientTransformation:
        """Make the decay for a known learning rate; `behind`: updates are already multiplied by minus that rate."""

        def amount(step: Any, largest: Any) -> Any:
            factor = at(weight_decay, step)
            if kind == "decoupled":
                return factor
            rate = at(lr, step)
            if kind == "independent":
                return -factor if behind else factor * quotient(1.0, rate)
            return factor * quotient(rate, largest) * (-rate if behind else 1.0)

        def scalars(step: Any) -> Any:
            return amount(step, None if lr_max is None else at(lr_max, step))

        def carried(step: Any, carried: LargestRate) -> Any:
            largest = maximum(at(lr, step), carried.lr_max)
            return amount(step, largest), LargestRate(largest)

        def update(g: Tensor, state: Any, p: Any, s: Any) -> Any:
            way = p - state.init_param if towards == "init" else p
            if cautious:
                way = torch.where(g * way <= 0 if behind else g * way >= 0, way, torch.zeros_like(way))
            return g + s * way, state

        init: Any = start if towards == "init" else CorrectedDecayState if carries else None
        numbers, carry = (carried, _no_rate) if carries else (scalars, None)
        return of_rule(init, update, numbers, carry=carry, elementwise=True, needs_params=True)

    if kind == "decoupled":
        decay = of_rate(None, False)
    else:
        decay = of_rule(
            _without_rate,
            _without_rate,
            elementwise=True,
            needs_params=True,
            of_rate=lambda lr, behind: of_rate(lr, behind)._links[0].rule,
        )
    return decay if mask is None else masked(decay, mask)


def _without_rate(*args: Any) -> Any:
    raise ValueError(
        "This weight decay depends on the learning rate, and there is none in its chain: write "
        "chain(scale_by_adam(), add_decayed_weights(0.1, kind='independent'), scale_by_learning_rate(1e-3))"
    )


def _no_rate() -> LargestRate:
    return LargestRate(0.0)
