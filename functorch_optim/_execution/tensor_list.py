"""A list of tensors that answers like one tensor."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.stand_in import StandIn
from functorch_optim._numerics import safe_sqrt


class TensorList(StandIn):
    """A list of tensors that answers like one tensor.

    Each torch function called on it is one `torch._foreach_*` call over the list where there is such a kernel for these
    arguments, and the function itself on each tensor where there is not.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        """Hold these tensors, of one dtype and device."""
        self.tensors = tensors

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> "TensorList":
        """Answer a torch function, or a method of Tensor, by its name."""
        kwargs = kwargs or {}
        name = function.__name__.strip("_")
        in_place = function.__name__.endswith("_") and not function.__name__.endswith("__")
        if in_place and function not in (operator.and_, operator.or_):
            raise TypeError(f"A rule must not modify its arguments: use {name}() in place of {function.__name__}()")
        result = _foreach_call(_ALIASES.get(name, name), args, kwargs)
        if result is None:
            result = [function(*row, **row_kwargs) for row, row_kwargs in _rows(args, kwargs)]
        return cls(result)

    def __getattr__(self, name: str) -> Any:
        """Answer a method or property of Tensor."""
        if name in ("device", "dtype"):
            return getattr(self.tensors[0], name)  # the same for all
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"An elementwise rule must not look at .{name}; declare it with elementwise=False"
            ) from None

    def __bool__(self) -> bool:
        raise TypeError("A rule must not branch on values: use torch.where(condition, a, b)")

    def __repr__(self) -> str:
        return f"TensorList({self.tensors!r})"


def _rows(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield the arguments for each tensor of the list."""

    def row(value: Any, i: int) -> Any:
        return value.tensors[i] if isinstance(value, TensorList) else value

    length = next(len(value.tensors) for value in (*args, *kwargs.values()) if isinstance(value, TensorList))
    for i in range(length):
        yield [row(value, i) for value in args], {name: row(value, i) for name, value in kwargs.items()}


_ALIASES = {"truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}
_UNARY = {
    "abs",
    "exp",
    "expm1",
    "log",
    "log1p",
    "neg",
    "reciprocal",
    "rsqrt",
    "sign",
    "sqrt",
    "tanh",
    safe_sqrt.__name__,
}
_COMMUTATIVE = {"add", "mul"}
_WITH_LIST = {"add", "sub", "mul", "div", "maximum", "minimum", "pow"}
_WITH_NUMBER = {"add", "sub", "mul", "div", "clamp_min", "clamp_max", "pow"}
_WITH_SCALAR_TENSOR = {"add", "mul", "div"}


def _foreach_call(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """Call the foreach kernel for these arguments; None when there is none."""
    if kwargs:
        if name in ("addcmul", "addcdiv") and set(kwargs) == {"value"} and isinstance(kwargs["value"], int | float):
            args, kwargs = (*args, kwargs["value"]), {}
        else:
            return None
    if name in _WITH_LIST and len(args) == 2:
        args = _as_lists(args)
    kinds = "".join(map(_kind, args))
    if name in _COMMUTATIVE and kinds in ("nl", "sl"):
        args, kinds = args[::-1], kinds[::-1]
    known = (
        (kinds == "l" and name in _UNARY)
        or (kinds == "ll" and name in _WITH_LIST)
        or (kinds == "ln" and name in _WITH_NUMBER)
        or (kinds == "ls" and name in _WITH_SCALAR_TENSOR)
        or (kinds in ("lll", "lln") and name == "lerp")
        or (kinds in ("lll", "llln") and name in ("addcmul", "addcdiv"))
    )
    if not known:
        return None
    kernel = getattr(torch, f"_foreach_{'sqrt' if name == safe_sqrt.__name__ else name}")
    values = [value.tensors if isinstance(value, TensorList) else value for value in args]
    result: list[Tensor] = list(kernel(*values))
    return result


def _as_lists(args: Sequence[Any]) -> list[Any]:
    """Make a list of a number on the CPU, where kernels take it in less than half of the time."""
    tensors = next(arg.tensors for arg in args if isinstance(arg, TensorList))
    if tensors[0].device.type != "cpu":
        return list(args)
    like = tensors[0].new_full
    return [TensorList([like((), arg)] * len(tensors)) if isinstance(arg, float) else arg for arg in args]


def _kind(value: Any) -> str:
    """Return l for a list of tensors, n for a number, s for a scalar tensor, and ? for anything else."""
    if isinstance(value, TensorList):
        return "l"
    if isinstance(value, int | float):
        return "n"
    return "s" if isinstance(value, Tensor) and value.ndim == 0 else "?"
