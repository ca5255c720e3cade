"""Questions that machines ask of programs: names of calls, last reads, and calls that can be joined."""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from functorch_optim._execution.program import Instruction, Name, Program, needed
from functorch_optim._numerics import safe_power, safe_sqrt

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
    safe_power.__name__: "pow",
}


def called(instruction: Instruction) -> str:
    """Name a function as torch does, whether it is an operator, a method, or has another name too."""
    name = str(getattr(instruction.function, "__name__", "")).strip("_")
    return _ALIASES.get(name, name)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Name) and not value.startswith("n")


def is_factor(value: Any) -> bool:
    if isinstance(value, Name):
        return value.startswith("n") and not value.endswith("_flag")
    return isinstance(value, int | float) and not isinstance(value, bool)


def last_reads(program: Program) -> dict[str, int]:
    """Tell for each value the last instruction that reads it; outputs are read in the end."""
    last: dict[str, int] = {name: k for k, instruction in enumerate(program.instructions) for name in instruction.names}
    last.update({name: len(program.instructions) for name in program.outputs if name not in program.inputs})
    return last


@functools.lru_cache(maxsize=256)
def contracted(program: Program) -> Program:
    """Make one call of `a + n b`, `a + n b c`, `a + n b / c` and `where(a < n, n, a)`, with a number n."""
    made = {instruction.result: instruction for instruction in program.instructions}
    dtypes = {**dict.fromkeys(program.inputs, program.dtype), **{name: i.dtype for name, i in made.items()}}
    reads = Counter([name for i in program.instructions for name in i.names] + list(program.outputs))

    def factors(value: Any, *names: str) -> tuple[Any, ...] | None:
        """Return the two that a value is the product or quotient of, if nothing else reads it."""
        instruction = made.get(value) if isinstance(value, Name) else None
        if instruction is None or called(instruction) not in names or instruction.kwargs or reads[value] > 1:
            return None
        return instruction.args

    def scaled(value: Any) -> tuple[Callable[..., Any], str, Any, tuple[Any, ...]] | None:
        """Return the call that adds n b, n b c or n b / c: the function, its keyword for n, n, and the tensors."""
        for number, rest in both(factors(value, "mul")):
            if is_factor(number):
                over, times = factors(rest, "div"), factors(rest, "mul")
                if over is not None and all(map(is_tensor, over)):
                    return torch.addcdiv, "value", number, over
                if times is not None and all(map(is_tensor, times)):
                    return torch.addcmul, "value", number, times
                return torch.add, "alpha", number, (rest,)
            for inner, tensor in both(factors(number, "mul")):  # (n b) c
                if is_factor(inner):
                    return torch.addcmul, "value", inner, (tensor, rest)
        return None

    def joined(instruction: Instruction) -> Instruction:
        args = instruction.args
        if called(instruction) == "where" and len(args) == 3 and is_tensor(args[2]) and is_factor(args[1]):
            test = made.get(args[0])
            if test is not None and called(test) == "lt" and test.args == (args[2], args[1]) and not test.kwargs:
                return instruction._replace(function=torch.clamp_min, args=(args[2], args[1]))
        if called(instruction) == "add" and not instruction.kwargs and all(map(is_tensor, args)):
            for kept, other in both(args):
                found = scaled(other)
                if found is not None and {dtypes.get(name) for name in (kept, *found[3])} == {instruction.dtype}:
                    function, keyword, number, tensors = found
                    return instruction._replace(function=function, args=(kept, *tensors), kwargs=((keyword, number),))
        return instruction

    return replace(program, instructions=needed([joined(i) for i in program.instructions], program.outputs))


def both(pair: tuple[Any, ...] | None) -> list[tuple[Any, ...]]:
    return [] if pair is None else [pair, pair[::-1]]


def with_copies(program: Program, outputs: tuple[str, ...]) -> Program:
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
