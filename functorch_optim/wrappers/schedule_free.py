"""Schedule-Free and primal averaging: gradients are taken between the iterates of a transformation and their mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, at_first, check, check_each, is_zero
from functorch_optim._core.leafwise import of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import maximum, quotient
from functorch_optim.optimizers._descent import descent
from functorch_optim.optimizers.rmsprop import scale_by_rms
from functorch_optim.optimizers.sgd import sgd
from functorch_optim.schedules._pieces import progress
from functorch_optim.schedules._schedule import factory as schedule_factory
from functorch_optim.wrappers._wrapping import around, copied, wrapped, wrapper


class ScheduleFreeCarried(NamedTuple):
    """The numbers that Schedule-Free carries on: the sum of the weights, and the largest learning rate."""

    weight_sum: Any
    lr_max: Any


class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free` for one parameter; that of a tree has `step`, `weight_sum` and `lr_max` in front.

    That of `gpa` has only `step` in front.

    Attributes:
        z: the iterate of the wrapped transformation: like p, and in float32 where p is in half precision.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.schedule_free(fo.sgd(0.1)).init(torch.ones(1))[1].z
        tensor([1.])
    """

    z: Tensor


leaf_state(ScheduleFreeState, ScheduleFreeCarried)


class ScheduleFreeScalars(NamedTuple):
    """The numbers of the rule at a step.

    Attributes:
        c: the weight of z in x.
        gain: 1 - b (1 - c), the weight of z in y.
        decay: the part of y that z loses.
    """

    c: Any
    gain: Any
    decay: Any


def _interpolated(
    tx: GradientTransformation, momentum: Hyperparameter, scalars: Any, carry: Any = None, *, decays: bool = False
) -> GradientTransformation:
    """Hand z to a transformation, and train at y, between z and its average x."""

    def update(u: Tensor, state: ScheduleFreeState, y: Any, s: ScheduleFreeScalars) -> Any:
        dz = u - s.decay * y if decays else u
        return s.c * (state.z - y) + s.gain * dz, ScheduleFreeState(state.z + dz)  # y = b x + (1 - b) z, without x

    def evaluate(y: Tensor, state: ScheduleFreeState) -> Tensor:
        weight = 1 - 1 / at_first(momentum)
        weight = weight.to(y.device, state.z.dtype) if isinstance(weight, Tensor) else weight
        return torch.lerp(y.to(state.z.dtype), state.z, weight)

    after = of_rule(
        _initial,
        update,
        scalars,
        carry=carry,
        elementwise=True,
        needs_params=True,
        hands=_handed,
        evaluate=evaluate,
    )
    return around(tx, None, after)


def _handed(y: Tensor, state: ScheduleFreeState) -> Tensor:
    return state.z


def _initial(p: Tensor) -> ScheduleFreeState:
    return ScheduleFreeState(copied(p))


def schedule_free(
    tx: Any,
    momentum: Hyperparameter = 0.9,
    *,
    weight_lr_power: Hyperparameter = 2.0,
    r: Hyperparameter = 0.0,
    weight_decay_at_y: Hyperparameter = 0.0,
) -> Any:
    """Train any transformation without a schedule: evaluate an average x of its iterates z, and train in between, at y.

        c = w_t / (w_1 + ... + w_t),  w_t = t^r lr_max^weight_lr_power
        z <- z + tx(gradient at y, z) - lr weight_decay_at_y y
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
        weight_decay_at_y: decay >= 0: z loses this part of y.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and a `ScheduleFreeState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `tx` is neither a transformation nor a factory.

    Evaluate with `fo.eval_params(tx, state, params)`, within `opt.averaged()`, or after `opt.eval()`; train after
    `opt.train()`. Training begins without a call. In bfloat16 x loses digits, for it is computed from y.

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
    check("weight_decay_at_y", weight_decay_at_y)
    options = {"weight_lr_power": weight_lr_power, "r": r, "weight_decay_at_y": weight_decay_at_y}
    return wrapped(tx, _schedule_free, "schedule_free(sgd(1.0), momentum=0.9)", momentum=momentum, **options)


@wrapper
def _schedule_free(
    tx: GradientTransformation,
    momentum: Hyperparameter,
    *,
    weight_lr_power: Hyperparameter,
    r: Hyperparameter,
    weight_decay_at_y: Hyperparameter,
) -> GradientTransformation:
    rates = [link.rule.lr for link in tx._links if link.rule.lr is not None]
    lr: Any = rates[0] if len(rates) == 1 else 1.0

    def carry() -> ScheduleFreeCarried:
        return ScheduleFreeCarried(0.0, 0.0)

    def scalars(step: Tensor, carried: ScheduleFreeCarried) -> Any:
        b, rate = at(momentum, step), at(lr, step)
        lr_max = maximum(rate, carried.lr_max)
        w = step ** at(r, step) * lr_max ** at(weight_lr_power, step)
        total = carried.weight_sum + w
        c = quotient(w, total)
        decay = rate * at(weight_decay_at_y, step)
        return ScheduleFreeScalars(c, 1 - b * (1 - c), decay), ScheduleFreeCarried(total, lr_max)

    return _interpolated(tx, momentum, scalars, carry, decays=not is_zero(weight_decay_at_y))


def gpa(tx: Any, mu_x: Hyperparameter = 0.9967, mu_y: Hyperparameter = 0.7) -> Any:
    """Evaluate a running mean x of the iterates z of any transformation, and train in between: primal averaging.

        z <- z + tx(gradient at y, z)
        x <- mu_x x + (1 - mu_x) z
        y = mu_y x + (1 - mu_y) z

    The parameters are y, where gradients are taken. The state holds z; x is computed when it is asked for.

    Args:
        tx: transformation that descends, its learning rate included; or a factory, then the result is a factory of the
            same hyperparameters. Its own weight decay acts on z.
        mu_x: how much of x is kept, in [0, 1): number, 0-dim tensor, or schedule.
        mu_y: share of x in y, in (0, 1]: number or 0-dim tensor. It must not change, since x is computed with it.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and a `ScheduleFreeState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `tx` is neither a transformation nor a factory.

    Evaluate as with `schedule_free`, of which this is the form with a constant weight. With mu_y = 1 and `sgd(lr)` it
    is momentum mu_x with the learning rate lr (1 - mu_x).

    Source: Defazio et al., Smoothing DiLoCo with primal averaging, arXiv:2512.17131, with the numbers of their code.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.gpa(fo.sgd(1.0), mu_x=0.5, mu_y=0.5), torch.zeros(1)
        >>> params, state = fo.step(tx, -torch.ones(1), tx.init(params), params)
        >>> params, fo.eval_params(tx, state, params)
        (tensor([0.7500]), tensor([0.5000]))
    """
    check("mu_x", mu_x, "0 <= value < 1")
    check("mu_y", mu_y, "0 < value <= 1", trees=False)
    return wrapped(tx, _gpa, "gpa(adamw(1e-3))", mu_x=mu_x, mu_y=mu_y)


@wrapper
def _gpa(tx: GradientTransformation, mu_x: Hyperparameter, mu_y: Hyperparameter) -> GradientTransformation:
    def scalars(step: Tensor) -> ScheduleFreeScalars:
        return ScheduleFreeScalars(1 - at(mu_x, step), 1 - at(mu_y, step) * at(mu_x, step), 0.0)

    return _interpolated(tx, mu_y, scalars)


@factory
def schedule_free_sgd(
    lr: Hyperparameter = 1.0,
    momentum: Hyperparameter = 0.9,
    weight_decay: Hyperparameter = 0.0,
    warmup_steps: Hyperparameter = 0,
    *,
    r: Hyperparameter = 0.0,
    weight_lr_power: Hyperparameter = 2.0,
) -> GradientTransformation:
    """Schedule-Free SGD: `schedule_free` of `sgd`, with weight decay at y and a linear warm-up.

        lr_t = lr min(1, t / warmup_steps)
        z <- z - lr_t (g + weight_decay y)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        momentum: see `schedule_free`.
        weight_decay: factor >= 0.
        warmup_steps: number of steps in which the learning rate rises, >= 0.
        r: see `schedule_free`.
        weight_lr_power: see `schedule_free`.

    Raises:
        ValueError: a number is out of range.

    Same numbers as `schedulefree.SGDScheduleFree`. Source: Defazio et al., The Road Less Scheduled, arXiv:2405.15682,
    algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.schedule_free_sgd(lr=0.5)
        >>> tx.update(torch.ones(1), tx.init(torch.zeros(1)), torch.zeros(1))[0]
        tensor([-0.5000])
    """
    check("learning rate", lr)
    check("weight_decay value", weight_decay)
    check("warmup_steps", warmup_steps)
    rate = lr if is_zero(warmup_steps) else _warmed_up(lr, warmup_steps)
    options = {"r": r, "weight_lr_power": weight_lr_power, "weight_decay_at_y": weight_decay}
    made: GradientTransformation = schedule_free(sgd(rate), momentum, **options)
    return made


@factory
def schedule_free_adamw(
    lr: Hyperparameter = 0.0025,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    warmup_steps: Hyperparameter = 0,
    r: Hyperparameter = 0.0,
    *,
    weight_lr_power: Hyperparameter = 2.0,
) -> GradientTransformation:
    """Schedule-Free AdamW: averaging in the place of Adam's momentum, with weight decay at y and a linear warm-up.

        lr_t = lr min(1, t / warmup_steps)
        v <- beta2 v + (1 - beta2) g^2
        z <- z - lr_t (g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay y)

    x and y are those of `schedule_free(momentum=beta1)`. The state is as large as Adam's: v and z.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: the share of x in y, in (0, 1), and the decay rate of v, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: factor >= 0.
        warmup_steps: number of steps in which the learning rate rises, >= 0.
        r: see `schedule_free`.
        weight_lr_power: see `schedule_free`.

    Raises:
        ValueError: a number is out of range.

    Same numbers as `schedulefree.AdamWScheduleFree`. Source: Defazio et al., The Road Less Scheduled, arXiv:2405.15682,
    algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.schedule_free_adamw(lr=0.1)
        >>> tx.update(torch.full((1,), 5.0), tx.init(torch.zeros(1)), torch.zeros(1))[0]
        tensor([-0.1000])
    """
    check("learning rate", lr)
    check_each("betas", betas, ("0 < value < 1", "0 <= value < 1"), "(0.9, 0.999)", "beta parameter")
    check("weight_decay value", weight_decay)
    check("warmup_steps", warmup_steps)
    rate = lr if is_zero(warmup_steps) else _warmed_up(lr, warmup_steps)
    base = descent(scale_by_rms(betas[1], eps, bias_correction=True), lr=rate, weight_decay=0.0)
    options = {"r": r, "weight_lr_power": weight_lr_power, "weight_decay_at_y": weight_decay}
    made: GradientTransformation = schedule_free(base, betas[0], **options)
    return made


@schedule_factory
def _warmed_up(lr: Any, warmup_steps: Any) -> Any:
    """Raise the learning rate linearly: to its own at the step `warmup_steps`."""

    def rate(count: Any) -> Any:
        t = count + 1
        return at(lr, t) * progress(t, at(warmup_steps, t))

    return rate
