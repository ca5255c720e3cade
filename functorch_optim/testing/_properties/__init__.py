"""Properties that every transformation should have, a function each.

`PROPERTIES` lists them, in the order in which they are checked. A property takes what is checked and a problem that it
is run on, and raises where it does not hold.
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
"""Run on trees that hypothesis draws, and shrinks to the smallest that breaks one."""

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
"""Run on such trees, where some gradients are missing, unless `missing_gradients` is skipped."""

SINGLE: tuple[Property, ...] = (used_hyperparameters, derivatives, finite_derivatives, compiled)
"""Run on one tree: of the first one is enough, and the others take long."""

PROPERTIES: dict[str, Property] = {check.__name__: check for check in (*COMPLETE, *INCOMPLETE, *SINGLE)}
