"""Schedules: hyperparameters as functions of the step.

A schedule takes the number of updates already done, 0 at the first update, and returns the value for the next one. The
step is a number or a tensor of any shape, and the value is a float64 tensor of that shape. Schedules are pure. They are
differentiable with respect to their arguments, and may be vmapped over them. They can be added, subtracted, multiplied,
divided and negated, with each other, with numbers and tensors, and with any other function of the step. (Arithmetic
with a tensor inside a function that torch.compile traces is an exception: write `Schedule(lambda step: ...)` there.)

An argument may be a number or a 0-dim tensor, unless its description says that it is a list, a word or an int. The
entries of lists may be numbers or tensors, too. Derivatives are finite everywhere; where a schedule jumps or bends they
are those of one side.

Arguments have torch's names and the order of its schedulers, with the value in front. Positional arguments in another
order, such as optax's, are an error if their numbers show it. The error names the right call.

Every scheduler of torch has a counterpart, except three. LambdaLR needs none: any function of the step is a schedule.
MultiplicativeLR multiplies by f(1) f(2) ... f(t), which has as many factors as steps; write the product as a function
of the step, as `exponential` does for a constant factor. ReduceLROnPlateau depends on the loss, so its counterpart is
a transformation with a state, `reduce_on_plateau`.

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
