"""Properties that every transformation should have, a function each.

`PROPERTIES` lists them, in the order of the checks. A property takes a subject and a problem, and raises if it does not
hold.
"""

from collections.abc import Callable
from typing import TypeAlias

from functorch_optim.testing._problem import Problem, Subject
from functorch_optim.testing._properties.forms import saving, stateful, steps, ways
from functorch_optim.testing._properties.numbers import double_precision, schedules, tensors, used_hyperparameters
from functorch_optim.testing._properties.transforms import (
    compiled,
    derivatives,
    finite_derivatives,
    vmap_hyperparameters,
    vmap_parameters,
)
from functorch_optim.testing._properties.trees import complex_parameters, kept, leaves, missing_gradients, pure

Property: TypeAlias = Callable[[Subject, Problem], None]

COMPLETE: tuple[Property, ...] = (pure, kept, complex_parameters, vmap_parameters, vmap_hyperparameters, stateful)
"""Run on trees that hypothesis draws. It shrinks a tree that breaks a property to the smallest one."""

INCOMPLETE: tuple[Property, ...] = (
    missing_gradients,
    leaves,
    tensors,
    schedules,
    double_precision,
    saving,
    ways,
    steps,
)
"""Run on trees that hypothesis draws, with some missing gradients unless `missing_gradients` is skipped."""

SINGLE: tuple[Property, ...] = (used_hyperparameters, derivatives, finite_derivatives, compiled)
"""Run on one tree: that is enough for the first property, and the others take long."""

PROPERTIES: dict[str, Property] = {check.__name__: check for check in (*COMPLETE, *INCOMPLETE, *SINGLE)}
