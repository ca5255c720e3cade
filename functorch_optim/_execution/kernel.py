"""Programs as python functions, which write where they are told to."""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.program import Instruction, Name, Program, needed
from functorch_optim._numerics import safe_sqrt


@dataclass(frozen=True, eq=False)
class Kernel:
    """A program as a function of tensors of one shape.

    Attributes:
        function: `function(*inputs, *outputs, *numbers, *buffers)`; there are no outputs when it works in place.
        buffers: dtypes of the tensors that it needs to work in.
    """

    function: Callable[..., None]
    buffers: tuple[torch.dtype, ...]

    def scratch(self, size: int, device: torch.device) -> list[Tensor]:
        """Make the buffers."""
        return [torch.empty(size, dtype=dtype, device=device) for dtype in self.buffers]


@functools.lru_cache(maxsize=256)
def kernel(program: Program, in_place: tuple[str, ...] | None) -> Kernel:
    """Write a program so that every instruction stores its result in a tensor that is there already.

    Args:
        program: the program.
        in_place: for each output, the input that it overwrites; None to write the outputs into tensors of their own.
    """
    outputs = tuple([f"y{j}" for j in range(len(program.outputs))]) if in_place is None else in_place
    program = _with_copies(_contracted(program) if program.device.type == "cpu" else program, outputs)
    last = _last_reads(program)
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
    program = _with_copies(program, in_place)
    names = _Names()
    place: dict[str, str] = {name: name for name in (*program.inputs, *program.numbers)}
    lines = [f"{', '.join(program.numbers)}, = numbers.unbind()"] if program.numbers else []
    lines += [f"{name} = {name} != 0" for name in program.numbers if name.endswith("_flag")]
    for instruction in program.instructions:
        place[instruction.result] = instruction.result
        call = names.call(instruction.function, instruction.args, instruction.kwargs, place)
        lines.append(f"{instruction.result} = {call}")
    lines += [f"{out}.copy_({name})" for out, name in zip(in_place, program.outputs, strict=True) if out != name]
    return names.function([*program.inputs, "numbers"], lines)


class _Names:
    """What a source text refers to."""

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

    def function(self, parameters: Sequence[str], lines: Sequence[str]) -> Callable[..., None]:
        body = "".join([f"\n    {line}" for line in lines or ["pass"]])
        source = f"def kernel({', '.join(parameters)}):{body}\n"
        return _made(source, tuple(self.values), tuple(self.values.values()))


@functools.lru_cache(maxsize=256)
def _made(source: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Callable[..., None]:
    namespace = dict(zip(names, values, strict=True))
    exec(compile(source, "<a rule as a kernel>", "exec"), namespace)
    function: Callable[..., None] = namespace["kernel"]
    function.__doc__ = source
    return function


def _with_copies(program: Program, outputs: tuple[str, ...]) -> Program:
    """Let outputs that are inputs, unchanged, be results of a copy, unless they stay where they are."""
    instructions, names = list(program.instructions), list[Name]()
    for out, name in zip(outputs, program.outputs, strict=True):
        if name in program.inputs and name != out:
            copy = Name(f"c{len(names)}")
            instructions.append(Instruction(torch.clone, (name,), (), copy, program.dtype))
            names.append(copy)
        else:
            names.append(name)
    return replace(program, instructions=tuple(instructions), outputs=tuple(names))


def _contracted(program: Program) -> Program:
    """Make one call of `a + n b`, `a + n b c` and `a + n b / c`, with a number n: torch has functions for these."""
    made = {instruction.result: instruction for instruction in program.instructions}
    dtypes = {**dict.fromkeys(program.inputs, program.dtype), **{name: i.dtype for name, i in made.items()}}
    reads = Counter([name for i in program.instructions for name in i.names] + list(program.outputs))

    def factors(value: Any, *called: str) -> tuple[Any, ...] | None:
        """Return the two that a value is the product or quotient of, if nothing else reads it."""
        instruction = made.get(value) if isinstance(value, Name) else None
        if instruction is None or _called(instruction) not in called or instruction.kwargs or reads[value] > 1:
            return None
        return instruction.args

    def scaled(value: Any) -> tuple[Callable[..., Any], str, Any, tuple[Any, ...]] | None:
        """Return what adds n b, n b c or n b / c: the function, its keyword for n, n, and the tensors."""
        for number, rest in _both(factors(value, "mul")):
            if _is_factor(number):
                over, times = factors(rest, "div"), factors(rest, "mul")
                if over is not None and all(map(_is_tensor, over)):
                    return torch.addcdiv, "value", number, over
                if times is not None and all(map(_is_tensor, times)):
                    return torch.addcmul, "value", number, times
                return torch.add, "alpha", number, (rest,)
            for inner, tensor in _both(factors(number, "mul")):  # (n b) c
                if _is_factor(inner):
                    return torch.addcmul, "value", inner, (tensor, rest)
        return None

    def contracted(instruction: Instruction) -> Instruction:
        args = instruction.args
        if _called(instruction) == "add" and not instruction.kwargs and all(map(_is_tensor, args)):
            for kept, other in _both(args):
                found = scaled(other)
                if found is not None and {dtypes.get(name) for name in (kept, *found[3])} == {instruction.dtype}:
                    function, keyword, number, tensors = found
                    return instruction._replace(function=function, args=(kept, *tensors), kwargs=((keyword, number),))
        return instruction

    return replace(program, instructions=needed([contracted(i) for i in program.instructions], program.outputs))


def _both(pair: tuple[Any, ...] | None) -> list[tuple[Any, ...]]:
    return [] if pair is None else [pair, pair[::-1]]


def _last_reads(program: Program) -> dict[str, int]:
    """Tell for each value the last instruction that reads it; outputs are read in the end."""
    last: dict[str, int] = {name: k for k, instruction in enumerate(program.instructions) for name in instruction.names}
    last.update({name: len(program.instructions) for name in program.outputs if name not in program.inputs})
    return last


def _copied(tensor: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(tensor)


_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "absolute": "abs",
    "negative": "neg",
    "clip": "clamp",
    safe_sqrt.__name__: "sqrt",
}
_SYMMETRIC = {"add", "mul", "eq", "ne"}
_ANY = {
    *("abs", "neg", "sqrt", "rsqrt", "square", "reciprocal", "exp", "expm1", "log", "log1p", "tanh", "sigmoid", "sign"),
    *("sin", "cos", "add", "sub", "mul", "div", "pow", "clamp", "lerp", "addcmul", "addcdiv"),
    *("lt", "le", "gt", "ge", "eq", "ne"),
}
_TENSORS = {"where", "maximum", "minimum", "logical_and", "logical_or", "logical_not", "atan2", "hypot"}


def _storing(instruction: Instruction) -> tuple[Callable[..., Any] | None, tuple[Any, ...]]:
    """Find the function with an argument `out` for an instruction, and its arguments; None when there is none."""
    name, args = _called(instruction), instruction.args
    if name in _SYMMETRIC and not instruction.kwargs and not _is_tensor(args[0]):
        args = args[::-1]
    if name == "clone" and len(args) == 1 and not instruction.kwargs:
        return _copied, args
    tensors = all(map(_is_tensor, args)) if name in _TENSORS else _is_tensor(args[0])
    known = getattr(torch, name, None) if name in _ANY | _TENSORS else None
    return (known if tensors else None), args


def _called(instruction: Instruction) -> str:
    """Name a function as torch does, whether it is an operator, a method, or has another name too."""
    name = str(getattr(instruction.function, "__name__", "")).strip("_")
    return _ALIASES.get(name, name)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Name) and not value.startswith("n")


def _is_factor(value: Any) -> bool:
    if isinstance(value, Name):
        return value.startswith("n") and not value.endswith("_flag")
    return isinstance(value, int | float) and not isinstance(value, bool)
