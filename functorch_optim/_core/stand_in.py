"""Objects that answer like a tensor."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


class StandIn:
    """Answers like a tensor: functions, operators and methods called on it go to its `__torch_function__`."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer a torch function."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        """Answer a method of Tensor."""
        attribute = getattr(Tensor, name)
        if callable(attribute):
            return lambda *args, **kwargs: self.__torch_function__(attribute, (), (self, *args), kwargs)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _operators() -> Iterator[tuple[str, Callable[..., Any]]]:
    def forward(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *others: self.__torch_function__(function, (), (self, *others))

    def backward(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.__torch_function__(function, (), (other, self))

    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        yield f"__{name}__", forward(getattr(operator, name))
        yield f"__r{name}__", backward(getattr(operator, name))
    for name in ("and", "or"):
        yield f"__{name}__", forward(getattr(operator, f"{name}_"))
        yield f"__r{name}__", backward(getattr(operator, f"{name}_"))
    for name in ("neg", "abs", "lt", "le", "gt", "ge", "eq", "ne", "invert"):
        yield f"__{name}__", forward(getattr(operator, name))


for _name, _operator in _operators():
    setattr(StandIn, _name, _operator)
StandIn.__hash__ = object.__hash__  # type: ignore[method-assign]
