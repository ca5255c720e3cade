"""Schedule-Free: training without a schedule, by an average of the iterates of any transformation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory, of_rule
from functorch_optim._numerics import maximum, where
from functorch_optim.wrappers._wrapping import around, wrapped


class ScheduleFreeCarried(NamedTuple):
    """What Schedule-Free carries on: the sum of the weights, and the largest learning rate."""

    weight_sum: Any
    lr_max: Any


class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free` for one parameter; that of a tree has `step`, `weight_sum` and `lr_max` in front.

    Attributes:
        z: the iterate of the wrapped transformation: like p.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.schedule_free(fo.sgd(0.1)).init(torch.ones(1))[1].z
        tensor([1.])
    """

    z: Tensor


leaf_state(ScheduleFreeState, ScheduleFreeCarried)


class ScheduleFreeScalars(NamedTuple):
    """What Schedule-Free needs at a step.

    Attributes:
        beta: b.
        kept: (1 - c).
        weight: 1 - b + b c, the weight of z in y.
    """

    beta: Any
    kept: Any
    weight: Any


@factory
def _holder(lr: Any, momentum: Hyperparameter, weight_lr_power: Hyperparameter, r: Hyperparameter) -> Any:
    def carry() -> ScheduleFreeCarried:
        return ScheduleFreeCarried(0.0, 0.0)

    def scalars(step: Tensor, carried: ScheduleFreeCarried) -> Any:
        b, lr_max = at(momentum, step), maximum(at(lr, step), carried.lr_max)
        w = step ** at(r, step) * lr_max ** at(weight_lr_power, step)
        total = carried.weight_sum + w
        c = where(total == 0, 0.0, w / where(total == 0, 1.0, total))
        return ScheduleFreeScalars(b, 1 - c, 1 - b + b * c), ScheduleFreeCarried(total, lr_max)

    def update(u: Tensor, state: ScheduleFreeState, y: Any, s: ScheduleFreeScalars) -> Any:
        z = state.z + u
        bx = y - (1 - s.beta) * state.z
        return s.kept * bx + s.weight * z - y, ScheduleFreeState(z)

    def evaluate(y: Tensor, state: ScheduleFreeState) -> Tensor:
        return torch.lerp(y, state.z, _number(1 - 1 / at(momentum, 1.0), y))  # type: ignore[arg-type]

    def resume(x: Tensor, state: ScheduleFreeState) -> Tensor:
        return torch.lerp(x, state.z, _number(1 - at(momentum, 1.0), x))  # type: ignore[arg-type]

    return of_rule(
        lambda p: ScheduleFreeState(p.clone()),
        update,
        scalars,
        carry=carry,
        elementwise=True,
        needs_params=True,
        hands="z",
        evaluate=evaluate,
        resume=resume,
    )


def _number(number: Any, like: Tensor) -> Any:
    return number.to(like.device, like.dtype) if isinstance(number, Tensor) else number


def schedule_free(
    tx: Any, momentum: Hyperparameter = 0.9, *, weight_lr_power: Hyperparameter = 2.0, r: Hyperparameter = 0.0
) -> Any:
    """Train any transformation without a schedule: evaluate an average x of its iterates z, and train in between, at y.

        c = w_t / (w_1 + ... + w_t),  w_t = t^r lr_max^weight_lr_power
        z <- z + tx(gradient at y, z)
        x <- (1 - c) x + c z
        y = b x + (1 - b) z

    The parameters are y, where gradients are taken. The state holds z; x is computed when it is asked for.

    Args:
        tx: transformation that descends, its learning rate included; or a factory, then the result is a factory of the
            same hyperparameters. Its own weight decay acts on z.
        momentum: b in (0, 1]: number or 0-dim tensor. It must not change, since x is computed with it.
        weight_lr_power: power of the largest learning rate so far in the weights. It is 1 for a `tx` without a learning
            rate, or with several.
        r: power of the step in the weights.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and a `ScheduleFreeState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `tx` is neither a transformation nor a factory.

    Evaluate with `fo.eval_params(tx, state, params)`, or after `opt.eval()`; train after `opt.train()`. Training begins
    without a call. In bfloat16 x loses digits.

    Source: Defazio et al., The Road Less Scheduled, arXiv:2405.15682, algorithm 1, with the weights of their code.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.schedule_free(fo.sgd(0.5)), torch.tensor([4.0])
        >>> state = tx.init(params)
        >>> for _ in range(20):
        ...     grads = torch.func.grad(lambda p: p.square().sum())(params)
        ...     params, state = fo.step(tx, grads, state, params)
        >>> bool(fo.eval_params(tx, state, params).abs() < 0.5)
        True
    """
    check("momentum value", momentum, "0 < value <= 1", trees=False)
    check("weight_lr_power", weight_lr_power)
    check("r", r)
    return wrapped(
        tx, lambda tx: _schedule_free(tx, momentum, weight_lr_power, r), "schedule_free(sgd(1.0), momentum=0.9)"
    )


@factory
def _schedule_free(
    tx: GradientTransformation, momentum: Hyperparameter, weight_lr_power: Hyperparameter, r: Hyperparameter
) -> GradientTransformation:
    rates = [link.rule.lr for link in tx._links if link.rule.lr is not None]
    return around(tx, None, _holder(rates[0] if len(rates) == 1 else 1.0, momentum, weight_lr_power, r))
