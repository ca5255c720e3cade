"""Factories of transformations, and their hyperparameters in param groups."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from functorch_optim.base import GradientTransformation

Factory = Callable[..., GradientTransformation]


def name_of(transformation: Any) -> str:
    """Name a transformation or factory."""
    if isinstance(transformation, functools.partial):
        return name_of(transformation.func)
    return getattr(transformation, "__name__", None) or repr(transformation)


def parameters(factory: Factory) -> dict[str, inspect.Parameter]:
    """Return the parameters of a factory by name: its hyperparameters.

    Raises:
        TypeError: one has no name.
    """
    found = inspect.signature(factory).parameters
    for parameter in found.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{name_of(factory)} takes {parameter}, which has no name to be a hyperparameter; "
                "write lambda lr: chain(clip(1.0), sgd(lr)), or give the transformation itself"
            )
    return dict(found)


def defaults(transformation: Any, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that groups begin with.

    Raises:
        TypeError: `transformation` is neither transformation nor factory, or a hyperparameter is not one of its.
    """
    if isinstance(transformation, GradientTransformation):
        if hyperparameters:
            raise TypeError(
                f"{transformation!r} has its hyperparameters already; {', '.join(hyperparameters)} would not be used. "
                "Give a factory: Optimizer(params, adamw, lr=1e-3)"
            )
        return {}
    if not callable(transformation):
        raise TypeError(
            f"Optimizer needs a transformation or a factory of one, got {transformation!r}; "
            "write Optimizer(params, adamw(1e-3)) or Optimizer(params, adamw, lr=1e-3)"
        )
    known = parameters(transformation)
    unknown = [name for name in hyperparameters if name not in known]
    if unknown:
        raise TypeError(f"{name_of(transformation)} has no hyperparameter {unknown[0]!r}; it has {', '.join(known)}")
    given = {name: parameter.default for name, parameter in known.items() if parameter.default is not parameter.empty}
    return {**given, **hyperparameters}


def make(factory: Factory, group: Mapping[str, Any]) -> GradientTransformation:
    """Make the transformation of a param group.

    Raises:
        TypeError: the group lacks a hyperparameter, or the factory does not return a transformation.
    """
    known = parameters(factory)
    given = {name: group[name] for name in known if name in group}
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing:
        raise TypeError(
            f"A param group lacks the hyperparameter {missing[0]!r} of {name_of(factory)}, which has no default; "
            f"write Optimizer(params, {name_of(factory)}, {missing[0]}=...)"
        )
    made = factory(**given)
    if not isinstance(made, GradientTransformation):
        raise TypeError(
            f"{name_of(factory)} returned a {type(made).__name__}, not a GradientTransformation; "
            "write a function of hyperparameters that returns, say, chain(...)"
        )
    return made


def check_no_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raise when a group gives hyperparameters to a transformation that has them already."""
    extra = [name for name in group if name not in ("params", "param_names", "name", "differentiable")]
    if extra:
        raise ValueError(
            f"A param group gives {', '.join(extra)}, but the transformation has its hyperparameters already. "
            "Give a factory, Optimizer(groups, adamw, lr=1e-3), or use partition"
        )


def snapshot(value: Any) -> Any:
    """Copy containers, so that edits within them can be noticed."""
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    return value


def same(old: Any, new: Any) -> bool:
    """Compare a snapshot with what may have been edited: numbers and text by value, all else by identity."""
    if isinstance(old, list):
        return isinstance(new, list | tuple) and len(old) == len(new) and all(map(same, old, new))
    if isinstance(old, dict):
        return isinstance(new, dict) and old.keys() == new.keys() and all(same(old[key], new[key]) for key in old)
    if isinstance(old, bool | int | float | str):
        return type(old) is type(new) and old == new
    return old is new


def has_function(value: Any) -> bool:
    """Tell whether a hyperparameter is a function, a schedule say, or holds one."""
    if isinstance(value, list | tuple):
        return any(map(has_function, value))
    return callable(value)
