"""Hyperparameters: a number, a 0-dim tensor, a schedule, or a tree of them, wherever a number is wanted."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.leaf import DiffersError, Mark, fitting, value_here
from functorch_optim._core.recorded import Recorded

Hyperparameter: TypeAlias = float | Tensor | Callable[[Tensor], Tensor | float] | Mapping[Any, Any] | Sequence[Any]
"""A number; a 0-dim tensor, which may require grad or be batched by vmap; a schedule: a function of the number of
updates already done, 0 at the first update; or a tree of these like the parameters, or a prefix of such a tree: a value
for each. In a tree, a tensor may also have a value for each element: it broadcasts to the parameter."""


def at(hyperparameter: Hyperparameter, step: Tensor) -> Any:
    """Evaluate a hyperparameter at a step.

    Args:
        hyperparameter: number, tensor of one element, schedule, or tree of them.
        step: number of this update, 1 at the first: 0-dim float64 tensor, or a float where it is known. A schedule is
            called with `step - 1`, the number of updates already done, as torch's schedulers and optax count.

    Returns:
        A float, or a 0-dim float64 tensor. For a tree, the value for the parameter that the rule is about to be run on.

    Raises:
        TypeError: the hyperparameter is a tree, and no rule is being run; or a schedule returns no number.

    Example:
        >>> import functorch_optim as fo, torch
        >>> step = torch.tensor(1.0, dtype=torch.float64)
        >>> fo.at(0.1, step), fo.at(lambda count: 0.5**count, step)
        (0.1, tensor(1., dtype=torch.float64))
    """
    value: Any = hyperparameter.read() if type(hyperparameter) is Live else hyperparameter
    if isinstance(value, Recorded) and callable(value):
        value = _scheduled(value, step)
    if type(value) is float:
        return value
    of_leaf = is_tree(value)
    if of_leaf:
        value = value_here(value)
    if callable(value):
        value = _scheduled(value, step)
        if is_tree(value):  # a function of the step may return trees, too
            value, of_leaf = value_here(value), True
    if isinstance(value, Tensor):
        return _number(value.to(torch.float64), step, of_leaf)
    if isinstance(value, Mark):
        return value
    if type(value) is not float:
        check_returned(hyperparameter, value)
    return float(value)


def _number(value: Tensor, step: Any, of_leaf: bool) -> Any:
    """Return a tensor as a float where the step is one, and nothing is differentiated."""
    if value.ndim > 0 and not of_leaf and value.numel() == 1:
        value = value.reshape(())
    if value.ndim > 0:
        return fitting(value if of_leaf else value_here(value))
    if not isinstance(step, float) or value.device.type != "cpu" or type(value) not in (Tensor, torch.nn.Parameter):
        return value
    return value if value.requires_grad and torch.is_grad_enabled() else value.item()


def at_first(hyperparameter: Hyperparameter) -> Any:
    """Evaluate a hyperparameter that numbers begin with, before the first step."""
    return at(hyperparameter, torch.ones((), dtype=torch.float64, device="cpu"))


class Live:
    """A number that is read again at every step, whichever that is."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read

    def __call__(self, count: Any) -> Any:
        """Read it."""
        return self.read()

    def __repr__(self) -> str:
        return repr(self.read())


def _scheduled(schedule: Callable[..., Any], step: Any) -> Any:
    """Call a schedule; those of this library, which are recorded, take a float too."""
    count = step - 1
    if not isinstance(step, float):
        return schedule(count)
    if isinstance(schedule, Recorded):
        try:
            return schedule.at_number(count)  # a Schedule
        except (ArithmeticError, AttributeError, TypeError, ValueError):
            pass  # 1 / 0, say, which is inf in torch; or it needs a tensor
    return schedule(torch.tensor(count, dtype=torch.float64, device="cpu"))


def check_returned(schedule: Any, value: Any) -> None:
    """Raise when a schedule has returned neither a number nor a tensor.

    Raises:
        TypeError: it has.

    Example:
        >>> check_returned(str, "1.0")
        Traceback (most recent call last):
        ...
        TypeError: The schedule <class 'str'> returned '1.0', a str; let it return a number, or a 0-dim tensor
    """
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(
            f"The schedule {schedule!r} returned {value!r}, a {type(value).__name__}; let it return a number, or a "
            "0-dim tensor"
        )


def is_tree(hyperparameter: Any) -> bool:
    """Tell whether a hyperparameter is a tree of values, and no value itself."""
    return not tree.is_leaf(hyperparameter)


def filled_like(p: Tensor, hyperparameter: Hyperparameter) -> Tensor:
    """Make a tensor like `p`, filled with the value of a hyperparameter at the first update; it is differentiable.

    Raises:
        TypeError: the hyperparameter is a tree.

    Example:
        >>> import torch
        >>> filled_like(torch.zeros(2), 0.5)
        tensor([0.5000, 0.5000])
    """
    try:
        value = at_first(hyperparameter)
    except DiffersError:
        raise TypeError(
            f"A state begins with the value of this hyperparameter, so it cannot be a tree: {hyperparameter!r}. Give "
            "each part of the parameters a transformation of its own, with partition"
        ) from None
    return torch.zeros_like(p) + (value.to(p.device, p.dtype) if isinstance(value, Tensor) else value)


def is_zero(hyperparameter: Hyperparameter) -> bool:
    """Tell whether this is the python number 0: a feature that is switched off."""
    return isinstance(hyperparameter, Real) and hyperparameter == 0


def is_infinite(hyperparameter: Hyperparameter) -> bool:
    """Tell whether this is the python number infinity: a bound that is switched off."""
    return isinstance(hyperparameter, Real) and hyperparameter == math.inf


def check(name: str, value: Any, allowed: str = "value >= 0", *, trees: bool = True) -> None:
    """Raise unless `value` is a tensor, a schedule, a python number that is allowed, or a tree of these.

    Args:
        name: its name in the message, in torch.optim's words.
        value: the hyperparameter.
        allowed: "value >= 0", "value > 0", "0 <= value < 1", "0 <= value <= 1", "value <= 0", "value > 1", ... or
            "a number".
        trees: whether it may be a tree.

    Raises:
        ValueError: the number is not allowed; NaN never is.
        TypeError: it is neither a number nor a tensor nor a schedule nor a tree of them.

    Example:
        >>> check("learning rate", -0.1)
        Traceback (most recent call last):
        ...
        ValueError: Invalid learning rate: -0.1; it needs value >= 0
    """
    if is_tree(value):
        if not trees:
            raise TypeError(f"Invalid {name}: {value!r} is a tree, and here one number is needed for all parameters")
        for path, entry in zip(tree.paths(value), tree.flatten(value)[0], strict=True):
            if entry is not None:  # where there is no parameter
                check(f"{name} at {path!r}", entry, allowed)
    elif isinstance(value, Tensor):
        if not trees and value.numel() != 1:
            raise ValueError(f"Invalid {name}: a tensor of shape {tuple(value.shape)}; it needs one number")
        if not value.is_floating_point() and value.dtype not in _INTEGERS:
            raise TypeError(f"Invalid {name}: a tensor of dtype {value.dtype}; it needs real numbers")
    elif not callable(value):  # neither is inspected: a value would have to be waited for, and is not there in a trace
        try:
            check_number(name, value, allowed)
        except TypeError as error:
            raise TypeError(f"{error}, a 0-dim tensor, or a schedule such as schedules.cosine(1e-3, 100)") from None


def check_number(name: str, value: Any, allowed: str = "value >= 0") -> None:
    """Raise unless `value` is a python number that is allowed; see `check`.

    Raises:
        ValueError: the number is not allowed; NaN never is.
        TypeError: it is no number.

    Example:
        >>> check_number("norm_type", None)
        Traceback (most recent call last):
        ...
        TypeError: Invalid norm_type: None is a NoneType; give a number
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"Invalid {name}: {value!r} is a {type(value).__name__}; give a number")
    if not _ALLOWED[allowed](float(value)):
        raise ValueError(f"Invalid {name}: {value}; it needs {allowed}")


def check_fixed(name: str, value: Any, allowed: str = "value >= 0") -> None:
    """Raise unless `value` is a tensor of one element, or a python number that is allowed: no schedule, and no tree.

    Raises:
        ValueError: the number is not allowed, or the tensor has several elements; see `check`.
        TypeError: it is neither.

    Example:
        >>> check_fixed("scale", abs)
        Traceback (most recent call last):
        ...
        TypeError: Invalid scale: <built-in function abs> is a function; give a number, or a 0-dim tensor
    """
    if callable(value):
        raise TypeError(f"Invalid {name}: {value!r} is a function; give a number, or a 0-dim tensor")
    check(name, value, allowed, trees=False)


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_ALLOWED: dict[str, Callable[[float], bool]] = {
    "value >= 0": lambda value: value >= 0,
    "value > 0": lambda value: value > 0,
    "value >= 1": lambda value: value >= 1,
    "value > 1": lambda value: value > 1,
    "value <= 0": lambda value: value <= 0,
    "0 < value < 1": lambda value: 0 < value < 1,
    "0 <= value < 1": lambda value: 0 <= value < 1,
    "0 <= value <= 1": lambda value: 0 <= value <= 1,
    "0 <= value <= 100": lambda value: 0 <= value <= 100,
    "0 < value <= 1": lambda value: 0 < value <= 1,
    "a number": lambda value: not math.isnan(value),
}


def check_betas(betas: Any) -> None:
    """Raise unless `betas` is a pair of decay rates in [0, 1).

    Raises:
        ValueError: it is not a pair, or a number in it is outside [0, 1).

    Example:
        >>> check_betas((0.9, 1.0))
        Traceback (most recent call last):
        ...
        ValueError: Invalid beta parameter at index 1: 1.0; it needs 0 <= value < 1
    """
    check_each("betas", betas, ("0 <= value < 1", "0 <= value < 1"), "(0.9, 0.999)", "beta parameter")


def check_each(name: str, values: Any, allowed: tuple[str, ...], example: str, each: str | None = None) -> None:
    """Raise unless `values` is a tuple of as many hyperparameters as there are in `allowed`, each of them allowed.

    Raises:
        ValueError: it is not such a tuple, or a number in it is not allowed; see `check`.

    Example:
        >>> check_each("etas", (0.5,), ("0 < value < 1", "value > 1"), "(0.5, 1.2)")
        Traceback (most recent call last):
        ...
        ValueError: Invalid etas: (0.5,); give 2 numbers, as in etas=(0.5, 1.2)
    """
    if not isinstance(values, tuple | list) or len(values) != len(allowed):
        inside = ", and trees in their places" if isinstance(values, Mapping) else ""
        raise ValueError(f"Invalid {name}: {values!r}; give {len(allowed)} numbers{inside}, as in {name}={example}")
    for index, (value, range_) in enumerate(zip(values, allowed, strict=True)):
        check(f"{each or name} at index {index}", value, range_)


def check_choice(name: str, word: Any, *choices: Any) -> None:
    """Raise unless a word is one of these.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_choice("mode", "least", "min", "max")
        Traceback (most recent call last):
        ...
        ValueError: Invalid mode: 'least'; choose 'min' or 'max'
    """
    if word not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"Invalid {name}: {word!r}; choose {', '.join(others)} or {last}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is a python integer, not less than `least`.

    Raises:
        TypeError: it is no integer.
        ValueError: it is less.

    Example:
        >>> check_integer("max_iter", 0, 1)
        Traceback (most recent call last):
        ...
        ValueError: Invalid max_iter: 0; it needs an integer >= 1
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Invalid {name}: {value!r} is a {type(value).__name__}; give an integer >= {least}")
    if value < least:
        raise ValueError(f"Invalid {name}: {value}; it needs an integer >= {least}")
