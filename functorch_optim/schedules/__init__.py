"""Schedules: hyperparameters as functions of the step.

A schedule takes the number of updates already done, 0 at the first update, and returns the value for the next one. A
number or a tensor of any shape in, a float64 tensor of that shape out. Schedules are pure; they are differentiable in
their arguments and may be vmapped over them. They can be added, subtracted, multiplied, divided and negated, with each
other, with numbers and tensors, and with any other function of the step. (Inside a function that torch.compile traces,
write `Schedule(lambda step: ...)` instead where a tensor takes part.)

Every argument that is not said to be a list, a word or an int may be a number or a 0-dim tensor; so may the entries of
lists. Derivatives are finite everywhere; where a schedule jumps or bends they are those of one side.

Arguments are named as torch's and ordered as its schedulers', with the value in front. Where positional ones are in
another order, optax's say, and their numbers tell, that is an error which names the call that would be right.

Every scheduler of torch has a counterpart, but for three. LambdaLR needs none: any function of the step is a schedule.
MultiplicativeLR multiplies by f(1) f(2) ... f(t): as many factors as steps, of a function that is not known; write the
product down, as `exponential` does for a constant factor. ReduceLROnPlateau looks at the loss, so it is not a function
of the step but a transformation with a state, `reduce_on_plateau`.

Example:
    >>> from functorch_optim import schedules
    >>> schedule = schedules.linear(0.0, 1.0, 10) * schedules.exponential(0.1, 0.5)
    >>> schedule(0), schedule(1)
    (tensor(0., dtype=torch.float64), tensor(0.0050, dtype=torch.float64))
"""

from functorch_optim.schedules._combine import join, product
from functorch_optim.schedules._cycles import cosine_annealing, cosine_warm_restarts, cyclic, cyclic_momentum
from functorch_optim.schedules._decay import (
    cosine,
    exponential,
    linear,
    linear_factor,
    momentum_warmup,
    polynomial,
    rex,
    swa,
)
from functorch_optim.schedules._phases import (
    inverse_sqrt,
    one_cycle,
    one_cycle_momentum,
    piecewise_interpolate,
    rewarm,
    warmup_cosine,
    warmup_stable_decay,
)
from functorch_optim.schedules._schedule import Schedule
from functorch_optim.schedules._stairs import constant, constant_factor, multi_step, piecewise_constant, step, table

__all__ = [
    "Schedule",
    "constant",
    "constant_factor",
    "cosine",
    "cosine_annealing",
    "cosine_warm_restarts",
    "cyclic",
    "cyclic_momentum",
    "exponential",
    "inverse_sqrt",
    "join",
    "linear",
    "linear_factor",
    "momentum_warmup",
    "multi_step",
    "one_cycle",
    "one_cycle_momentum",
    "piecewise_constant",
    "piecewise_interpolate",
    "polynomial",
    "product",
    "rewarm",
    "rex",
    "step",
    "swa",
    "table",
    "warmup_cosine",
    "warmup_stable_decay",
]
