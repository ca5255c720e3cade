"""Numbers whose value is known, and that answer like 0-dim tensors in a fraction of the time."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.stand_in import StandIn


class Known(StandIn):
    """Answers like a 0-dim tensor on the CPU: float64, or bool where it is a condition.

    A torch function takes microseconds, and the scalars of a step are dozens of them. Where the step is a python number
    anyway, and nothing is differentiated, they are computed as such. What python cannot compute, or does otherwise than
    torch (a division by zero, say), torch is asked for; what comes of that is a tensor.

    Args:
        number: float, or bool.
    """

    def __init__(self, number: float) -> None:
        self.number = number

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer a torch function: in python if that can, else as torch does of tensors."""
        computed = _FUNCTIONS.get(function)
        if function is torch.where and Known not in map(type, args[1:]):
            computed = None  # torch makes float32 of two python numbers
        if computed is not None and not kwargs:
            try:
                return cls(computed(*[_number(argument) for argument in args]))
            except (ArithmeticError, ValueError, TypeError):
                pass
        return function(*tree.map(as_tensor, tuple(args)), **tree.map(as_tensor, dict(kwargs or {})))

    @property
    def tensor(self) -> Tensor:
        """Make the tensor."""
        return torch.tensor(self.number, dtype=None if isinstance(self.number, bool) else torch.float64, device="cpu")

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if callable(getattr(Tensor, name)) else getattr(self.tensor, name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor[index]

    def __bool__(self) -> bool:
        return bool(self.number)

    def __float__(self) -> float:
        return float(self.number)

    def __int__(self) -> int:
        return int(self.number)

    def __repr__(self) -> str:
        return repr(self.tensor)

    def __format__(self, spec: str) -> str:
        return format(self.number, spec)

    def item(self) -> float:
        """Return the number."""
        return self.number

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Convert to a dtype or device."""
        return self if args == (torch.float64,) and not kwargs else self.tensor.to(*args, **kwargs)


def settled(scalar: Any) -> Any:
    """Return what a rule computes with: a python number, or for a condition a tensor."""
    if type(scalar) is not Known:
        return scalar
    return scalar.tensor if isinstance(scalar.number, bool) else scalar.number


def as_tensor(scalar: Any) -> Any:
    """Return the tensor, for functions that may take nothing else."""
    return scalar.tensor if type(scalar) is Known else scalar


def alike(scalar: Tensor, other: Any) -> Tensor:
    """Make known what a 0-dim tensor on the CPU is, where another number is known."""
    known: Any = Known(scalar.item()) if type(other) is Known and scalar.device.type == "cpu" else scalar
    return known  # type: ignore[no-any-return]  # it answers like one


def where(condition: Any, one: Any, other: Any) -> Tensor:
    """Choose as `torch.where` does, which takes three microseconds to find out that something is known."""
    if type(condition) is Known:
        return Known.__torch_function__(torch.where, (), (condition, one, other))  # type: ignore[no-any-return]
    return torch.where(condition, one, other)


def _number(argument: Any) -> Any:
    if type(argument) is Known:
        return argument.number
    if type(argument) in (float, int):
        return argument
    raise TypeError


# Functions of python numbers that return what torch's do of 0-dim tensors, or raise. ----------------------------------


def _of_floats(function: Callable[..., Any]) -> Callable[..., float]:
    def computed(*numbers: Any) -> float:
        if bool in map(type, numbers):
            raise TypeError  # torch adds conditions to conditions
        return float(function(*numbers))  # which takes no complex number, such as the root of a negative one

    return computed


def _of_conditions(function: Callable[..., Any]) -> Callable[..., bool]:
    def computed(*conditions: Any) -> bool:
        if set(map(type, conditions)) != {bool}:
            raise TypeError
        return bool(function(*conditions))

    return computed


def _where(condition: Any, one: Any, other: Any) -> float:
    if type(condition) is not bool or bool in (type(one), type(other)):
        raise TypeError
    return float(one if condition else other)


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    **{getattr(operator, name): _of_floats(getattr(operator, name)) for name in (*_ARITHMETIC, "neg", "abs")},
    **{getattr(operator, name): getattr(operator, name) for name in _COMPARISONS},
    operator.and_: _of_conditions(operator.and_),
    operator.or_: _of_conditions(operator.or_),
    operator.invert: _of_conditions(operator.not_),
    **{
        getattr(place, name): _of_floats(getattr(math, name))
        for name in ("sqrt", "exp", "log", "cos", "floor")
        for place in (torch, Tensor)
    },
    torch.isfinite: math.isfinite,
    torch.ones_like: _of_floats(lambda x: 1.0),
    torch.where: _where,
    torch.zeros_like: _of_floats(lambda x: 0.0),
}


def _operator(name: str, *, reflected: bool = False) -> Callable[[Known, Any], Any]:
    """Make an operator that does not go through the table where it need not: most of what is computed are these."""
    function, computed = getattr(operator, name), _FUNCTIONS[getattr(operator, name)]

    def method(self: Known, other: Any) -> Any:
        kind = type(other)
        if kind is Known or kind is float or kind is int:
            number = other.number if kind is Known else other
            try:
                return Known(computed(number, self.number) if reflected else computed(self.number, number))
            except (ArithmeticError, TypeError):
                pass
        return Known.__torch_function__(function, (), (other, self) if reflected else (self, other))

    return method


for _name in (*_ARITHMETIC, *_COMPARISONS):
    setattr(Known, f"__{_name}__", _operator(_name))
for _name in _ARITHMETIC:
    setattr(Known, f"__r{_name}__", _operator(_name, reflected=True))
