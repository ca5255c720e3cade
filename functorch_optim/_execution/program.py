"""Elementwise rules as programs: straight lines of torch functions, recorded once.

A program is a list of torch calls: rules without their Python. It is recorded before anything is written to, so that a
rule which raises leaves everything as it was; and a machine knows which values are needed no longer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from functorch_optim._numerics import mean_norm, rms, safe_norm


class Name(str):
    """A value in a program: an input, a number, or the result of an instruction."""

    __slots__ = ()


class Instruction(NamedTuple):
    """One call.

    Attributes:
        function: a torch function, an operator, or a method of Tensor.
        args: names and constants.
        kwargs: the same, as pairs of keyword and value.
        result: name of its result.
        dtype: of the result; None for a number, which is the same for all elements.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    result: Name
    dtype: torch.dtype | None

    @property
    def names(self) -> list[Name]:
        """List the values that it reads."""
        return [value for value in (*self.args, *dict(self.kwargs).values()) if isinstance(value, Name)]


@dataclass(frozen=True, eq=False)
class Program:
    """Rules, one after the other, for one tensor.

    Attributes:
        inputs: names of values that differ between elements: "g", the parameter "p" where it is given, and the states.
            Names of states that are one number for each tensor begin with n.
        numbers: names of the scalars; they begin with n, as do those of results computed from numbers alone.
        instructions: in order.
        outputs: the transformed update, and the new states in the order of the inputs.
        dtype: of inputs and outputs.
        device: the same.
        moves: whether the first output is not the update, but the parameter after it.
        updates: whether there is such an output; where nothing moves, all outputs are states.
    """

    inputs: tuple[Name, ...]
    numbers: tuple[Name, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[Name, ...]
    dtype: torch.dtype
    device: torch.device
    moves: bool = False
    updates: bool = True

    @property
    def takes_norms(self) -> bool:
        """Tell whether some number is a norm of the tensor."""
        return any(instruction.function in NORMS for instruction in self.instructions)

    def __str__(self) -> str:
        lines = [f"{i.result} = {name_of(i.function)}({', '.join(map(str, i.args))})" for i in self.instructions]
        return "\n".join([*lines, f"return {', '.join(self.outputs)}"])


NORMS = (safe_norm, rms, mean_norm)
"""Functions of all elements of a tensor, which make a number of it."""


def overwritten(program: Program) -> tuple[str, ...]:
    """Name for each output the input in whose place it stands: the parameter, if it is one, and the states."""
    states = [name for name in program.inputs if name.startswith(("x", "n_x"))]
    first = ("p" if program.moves else "g",) if program.updates else ()
    return (*first, *states)


def needed(instructions: Sequence[Instruction], outputs: Sequence[Name]) -> tuple[Instruction, ...]:
    """Leave out instructions that no output depends on."""
    names, kept = set(outputs), []
    for instruction in reversed(instructions):
        if instruction.result in names:
            names.update(instruction.names)
            kept.append(instruction)
    return tuple(reversed(kept))


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", function))
