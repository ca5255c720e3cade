"""Programs as python functions, which write where they are told to."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.calls import called, contracted, is_tensor, last_reads, with_copies
from functorch_optim._execution.program import Instruction, Name, Program
from functorch_optim._numerics import or_one


@dataclass(frozen=True, eq=False)
class Kernel:
    """A program as a function of tensors of one shape.

    Attributes:
        function: `function(*inputs, *outputs, *numbers, *buffers)`; there are no outputs when it works in place.
        buffers: dtypes of the tensors that it needs to work in.
    """

    function: Callable[..., None]
    buffers: tuple[torch.dtype, ...]


@functools.lru_cache(maxsize=256)
def kernel(program: Program, in_place: tuple[str, ...] | None) -> Kernel:
    """Write a program so that every instruction stores its result in a tensor that is there already.

    Args:
        program: the program.
        in_place: for each output, the input that it overwrites; None to write the outputs into tensors of their own.
    """
    outputs = tuple([f"y{j}" for j in range(len(program.outputs))]) if in_place is None else in_place
    program = with_copies(contracted(program) if program.device.type == "cpu" else program, outputs)
    last = last_reads(program)
    free: dict[torch.dtype, list[str]] = defaultdict(list)
    place: dict[str, str] = {name: name for name in (*program.inputs, *program.numbers)}
    buffers: list[torch.dtype] = []
    lines, names = [], _Names()
    for k, instruction in enumerate(program.instructions):
        for name in {name for name in instruction.names if last.get(name) == k and place[name].startswith("b")}:
            free[buffers[int(place[name][1:])]].append(place[name])
        result, dtype = instruction.result, instruction.dtype
        ends = [out for out, name in zip(outputs, program.outputs, strict=True) if name == result]
        ends = [out for out in ends if last.get(Name(out), -1) <= k]
        function, args = _storing(instruction)
        if function is None or dtype is None:
            place[result] = result
            lines.append(f"{result} = {names.call(instruction.function, instruction.args, instruction.kwargs, place)}")
            continue
        if ends:
            place[result] = ends[0]
        else:
            if not free[dtype]:
                free[dtype].append(f"b{len(buffers)}")
                buffers.append(dtype)
            place[result] = free[dtype].pop()
        stored = (*instruction.kwargs, ("out", result))
        lines.append(names.call(function, args, stored, place))
    for out, name in zip(outputs, program.outputs, strict=True):
        if place[name] != out:
            lines.append(f"{out}.copy_({place[name]})")
    own = outputs if in_place is None else ()
    parameters = [*program.inputs, *own, *program.numbers, *[f"b{i}" for i in range(len(buffers))]]
    return Kernel(names.function(parameters, lines), tuple(buffers))


@functools.lru_cache(maxsize=256)
def pure(program: Program, in_place: tuple[str, ...]) -> Callable[..., None]:
    """Write a program for a compiler: all is computed, and then the inputs are overwritten.

    Returns:
        A function of the inputs, and of one tensor that has all numbers. It is the same for programs that are alike.
    """
    program, names = with_copies(program, in_place), _Names()
    lines = _computing(program, names)
    lines += [f"{out}.copy_({name})" for out, name in zip(in_place, program.outputs, strict=True) if out != name]
    return names.function([*program.inputs, "numbers"], lines)


@functools.lru_cache(maxsize=256)
def summing(program: Program, sums: tuple[tuple[Name, Callable[[Tensor], Tensor]], ...]) -> Callable[..., Tensor]:
    """Write a program for a compiler, of whose values only sums are wanted.

    Args:
        program: the program.
        sums: values, and functions that sum up their elements.

    Returns:
        A function of the inputs, and of one tensor that has all numbers, which returns a vector.
    """
    names = _Names()
    lines = _computing(program, names)
    lines.append(f"return {names.of(torch.stack)}([{', '.join([f'{names.of(of)}({name})' for name, of in sums])}])")
    return names.function([*program.inputs, "numbers"], lines)


def _computing(program: Program, names: "_Names") -> list[str]:
    """Write down the instructions of a program, after those that read its numbers off a tensor."""
    place: dict[str, str] = {name: name for name in (*program.inputs, *program.numbers)}
    lines = [f"{', '.join(program.numbers)}, = numbers.unbind()"] if program.numbers else []
    lines += [f"{name} = {name} != 0" for name in program.numbers if name.endswith("_flag")]
    for instruction in program.instructions:
        place[instruction.result] = instruction.result
        call = names.call(instruction.function, instruction.args, instruction.kwargs, place)
        lines.append(f"{instruction.result} = {call}")
    return lines


class _Names:
    """The objects that a source text refers to."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"nan": math.nan, "inf": math.inf}

    def call(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Sequence[tuple[str, Any]],
        place: dict[str, str],
    ) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Name):
                return place[value]
            return repr(value) if isinstance(value, int | float | None) else self.of(value)

        arguments = [text(value) for value in args] + [f"{key}={text(value)}" for key, value in kwargs]
        return f"{self.of(function)}({', '.join(arguments)})"

    def of(self, value: Any) -> str:
        for name, known in self.values.items():
            if known is value:
                return name
        label = str(getattr(value, "__name__", "constant"))
        name = f"{label if label.isidentifier() else 'function'}_{len(self.values)}"
        self.values[name] = value
        return name

    def function(self, parameters: Sequence[str], lines: Sequence[str]) -> Callable[..., Any]:
        body = "".join([f"\n    {line}" for line in lines or ["pass"]])
        source = f"def kernel({', '.join(parameters)}):{body}\n"
        return _made(source, tuple(self.values), tuple(self.values.values()))


@functools.lru_cache(maxsize=256)
def _made(source: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Callable[..., Any]:
    namespace = dict(zip(names, values, strict=True))
    exec(compile(source, "<a rule as a kernel>", "exec"), namespace)
    function: Callable[..., Any] = namespace["kernel"]
    function.__doc__ = source
    return function


def _copied(tensor: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(tensor)


def _nonzero(tensor: Tensor, *, out: Tensor) -> Tensor:
    """Compute `or_one`: to add a one is faster than to fill it in."""
    return torch.add(tensor, torch.eq(tensor, 0, out=torch.empty_like(tensor)), out=out)


_SYMMETRIC = {"add", "mul", "eq", "ne"}
_ANY = {
    *("abs", "neg", "sqrt", "rsqrt", "square", "reciprocal", "exp", "expm1", "log", "log1p", "tanh", "sigmoid", "sign"),
    *("sin", "cos", "add", "sub", "mul", "div", "pow", "clamp", "clamp_min", "lerp", "addcmul", "addcdiv"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
}
_TENSORS = {"where", "maximum", "minimum", "logical_and", "logical_or", "logical_not", "atan2", "hypot"}


def _storing(instruction: Instruction) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    """Find the function with an argument `out` for an instruction, and its arguments; None when there is none."""
    name, args = called(instruction), instruction.args
    if name in _SYMMETRIC and not instruction.kwargs and not is_tensor(args[0]):
        args = args[::-1]
    if name == "clone" and len(args) == 1 and not instruction.kwargs:
        return _copied, args
    if instruction.function is or_one:
        return _nonzero, args
    tensors = all(map(is_tensor, args)) if name in _TENSORS else is_tensor(args[0])
    known = getattr(torch, name, None) if name in _ANY | _TENSORS else None
    return (known if tensors else None), args
