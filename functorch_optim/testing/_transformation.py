"""The check of a transformation: every property, on trees that hypothesis draws."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from hypothesis import strategies as st

from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.testing._problem import Subject, awkward, moderate, parameters, problems, standard
from functorch_optim.testing._properties import INCOMPLETE, PROPERTIES, SINGLE
from functorch_optim.testing._report import falsify, reported, to_check
from functorch_optim.tree import Tree


def check_transformation(
    transformation: GradientTransformation | Callable[..., GradientTransformation],
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    skip: Collection[str] = (),
    params: st.SearchStrategy[Tree] | None = None,
    extra: Mapping[str, Any] | None = None,
    tolerance: float = 1e-12,
    examples: int = 10,
) -> None:
    """Check that your transformation keeps all promises that this library makes of its own.

    The properties are listed in `functorch_optim.testing.PROPERTIES`, name -> function; `help` explains each of them:

    | name | property |
    |---|---|
    | `pure` | nothing is modified, nothing kept outside of the state |
    | `kept` | structure, shapes and dtypes stay, in three dtypes |
    | `complex_parameters` | the same for complex numbers, or a TypeError |
    | `vmap_parameters`, `vmap_hyperparameters` | equal a loop |
    | `stateful` | `fo.Optimizer` trains the same, with a checkpoint |
    | `missing_gradients` | None leaves a parameter and its state alone |
    | `leaves` | their names and order do not matter |
    | `tensors`, `schedules` | may replace numbers, with the same result |
    | `double_precision` | nothing is computed in less than float64 |
    | `saving` | through `state_dict`, `torch.load(weights_only=True)`, pickle |
    | `ways` | tensor by tensor, in blocks, by foreach kernels, recorded by autograd |
    | `steps` | `fo.step` and `fo.step_` |
    | `used_hyperparameters` | every hyperparameter changes the result |
    | `derivatives` | reverse and forward mode, against finite differences |
    | `finite_derivatives` | also where gradients are zero |
    | `compiled` | as one graph, and once |

    Args:
        transformation: a transformation; or, to have its hyperparameters checked too, a function that makes one.
        hyperparameters: arguments of that function by name, any tree. The floats among them are checked as
            hyperparameters; choose values at which all of them matter, such as `eps=1e-3`.
        skip: names of properties that are not checked.
        params: strategy for the parameters, tensors in float64, if the transformation supports only some trees;
            `hypothesis.strategies.just({...})` for a single tree. None: `trees(dtypes=[torch.float64])`. Trees without
            any number are left out.
        extra: further keyword arguments that `update` declares. `value`, the loss, and `value_fn`, the loss as a
            function of the parameters, are passed without it.
        tolerance: relative tolerance for rounding in float64.
        examples: number of trees that each property is tried on; the last four properties are tried on one.

    Raises:
        PropertyError: a property does not hold. The message names the property, the place and size of the difference,
            and the smallest tree that hypothesis finds.
        ValueError: `skip` has a name that is no property.
        TypeError: no transformation is given or made, or `params` is no strategy for tensors in float64.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from functorch_optim import testing
        >>> testing.check_transformation(fo.sgd, {"lr": 0.1, "momentum": 0.9}, skip={"compiled"}, examples=2)
        >>> def detached(lr):
        ...     def update(g, state, p, lr):
        ...         return -lr.detach() * g if isinstance(lr, torch.Tensor) else -lr * g, state
        ...     return fo.leafwise(None, update, lambda step: fo.at(lr, step))
        >>> testing.check_transformation(detached, {"lr": 0.1}, examples=2)
        Traceback (most recent call last):
        ...
        functorch_optim.testing._report.PropertyError: ...
    """
    make = (lambda: transformation) if isinstance(transformation, GradientTransformation) else transformation
    subject, drawn = Subject(make, hyperparameters or {}, tolerance), parameters(params)
    subject()  # a mistake in the call raises its own error, and no PropertyError
    for name in to_check(PROPERTIES, skip):
        check = PROPERTIES[name]
        missing = check in INCOMPLETE and "missing_gradients" not in skip
        if check not in SINGLE:
            first = awkward(missing, extra) if params is None else None
            falsify(check, subject, problems(drawn, missing=missing, extra=extra), examples, first)
        elif params is None:
            with reported(check, standard(extra=extra)) as problem:
                check(subject, problem)
        else:
            falsify(check, subject, moderate(drawn, extra), 1)
