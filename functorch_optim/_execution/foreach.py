"""Foreach: each call of a program is one `torch._foreach_*` call over lists of tensors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_optim._core.checks import HALF
from functorch_optim._execution.calls import called, contracted, is_factor, is_tensor, last_reads, with_copies
from functorch_optim._execution.mode import Plain
from functorch_optim._execution.program import Instruction, Name, Program, overwritten
from functorch_optim._execution.representation import narrowed, widened
from functorch_optim._numerics import safe_norm

Overwriting: TypeAlias = Callable[[list[Tensor], Sequence[Any]], Callable[[], None]]
"""Takes updates and numbers, takes the memory for a step, and returns the step, which overwrites."""


def norms(tensors: list[Tensor], p: float) -> list[Tensor]:
    """Take the p-norm of each of many tensors; see `safe_norm`."""
    if not isinstance(tensors, Plain) or tensors[0].is_complex() or not all(map(Tensor.numel, tensors)):
        return [safe_norm(tensor, p) for tensor in tensors]
    dtype = torch.float32 if tensors[0].dtype in HALF else tensors[0].dtype
    if p == math.inf and tensors[0].device.type == "cpu":  # torch's takes five times as long (2.13)
        lows, highs = zip(*map(torch.aminmax, tensors), strict=True)
        return list(torch.maximum(-torch.stack(lows), torch.stack(highs)).to(dtype).unbind())
    return list(torch._foreach_norm(tensors, p, dtype=dtype))


class Foreach:
    """Runs a program over lists of tensors, call by call."""

    def __init__(self, program: Program, numbers: Sequence[Any]) -> None:
        self.overwritten = overwritten(program)
        known = all(not isinstance(number, Tensor) or number.dtype == torch.bool for number in numbers)
        self.program, self.known = contracted(program) if known else program, known

    @functools.cached_property
    def pure(self) -> "_Lowered":
        """The calls that make new tensors."""
        return _Lowered(self.program, {}, self.known)

    @functools.cached_property
    def in_place(self) -> "_Lowered":
        """The calls that overwrite; none of them takes memory after something has been overwritten."""
        program = with_copies(self.program, self.overwritten)
        ends = zip(program.outputs, self.overwritten, strict=True)
        home: dict[str, str] = {made: name for made, name in ends if made != name}
        lowered = _Lowered(program, home, self.known)
        while lowered.too_early:
            home = {made: name for made, name in home.items() if name not in lowered.too_early}
            lowered = _Lowered(program, home, self.known)
        return lowered

    @functools.cached_property
    def only_overwrites(self) -> bool:
        """Tell whether all calls overwrite: then none is made before a step, and none takes memory."""
        return not self.in_place.before and all(result < 0 for *_, result in self.in_place.after)

    def new(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> list[list[Tensor]]:
        """Run into new tensors."""
        if all([tensor.dtype == self.program.dtype for column in inputs for tensor in column]):  # noqa: C419
            return [list(output) for output in self.pure.begin(inputs, numbers)()]
        outputs = self.pure.begin([[widened(tensor) for tensor in column] for column in inputs], numbers)()
        likes = [inputs[self.program.inputs.index(name)] for name in self.overwritten]
        return [
            [narrowed(new, old) for new, old in zip(output, like, strict=True)]
            for output, like in zip(outputs, likes, strict=True)
        ]

    def over(self, columns: Sequence[list[Tensor]]) -> Overwriting:
        """Get ready to overwrite parameters and states."""
        return functools.partial(self._ready, columns)

    def _ready(
        self, columns: Sequence[list[Tensor]], updates: list[Tensor], numbers: Sequence[Any]
    ) -> Callable[[], None]:
        inputs = [updates, *columns]
        batches = _batches(updates)
        return (
            self._begin(inputs, numbers)
            if len(batches) == 1
            else functools.partial(self._run, batches, inputs, numbers)
        )

    def _run(self, batches: list[list[int]], inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> None:
        for some in batches:
            self._begin([[column[i] for i in some] for column in inputs], numbers)()

    def _begin(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> Callable[[], None]:
        """Compute all that takes memory, and return the function that overwrites."""
        if all([tensor.dtype == self.program.dtype for column in inputs for tensor in column]):  # noqa: C419
            finish = self.in_place.begin(inputs, numbers)
        else:  # halves, which are computed in single precision
            finish = self.pure.begin([[widened(tensor) for tensor in column] for column in inputs], numbers)
        return functools.partial(self._overwrite, inputs, finish)

    def _overwrite(self, inputs: Sequence[list[Tensor]], finish: Callable[[], list[Any]]) -> None:
        for name, output in zip(self.overwritten, finish(), strict=True):
            column = inputs[self.program.inputs.index(name)]
            if output is not column:
                torch._foreach_copy_(column, output)


_Call: TypeAlias = tuple[Callable[..., Any], tuple[int, ...], int]
"""A function, the places of its arguments, and that of its result; -1 for one that overwrites its first argument."""


def _call(calls: Sequence[_Call], values: list[Any]) -> None:
    for function, places, result in calls:
        value = function(*[values[place] for place in places])
        if result >= 0:
            values[result] = value


class _Lowered:
    """A program as calls of foreach functions on places in a list of values: inputs, numbers, and results.

    Args:
        program: the program.
        home: by output, the input in whose place it is made, where it is.
        known: whether the numbers are python's.

    Attributes:
        before: calls that nothing is overwritten for.
        after: those that overwrite, and that come after these.
        too_early: inputs that are overwritten before memory is taken.
    """

    def __init__(self, program: Program, home: dict[str, str], known: bool) -> None:
        self.program, self.known = program, known
        self.calls: list[_Call] = []
        self.values: list[Any] = [None] * (len(program.inputs) + len(program.numbers))
        self.places: dict[Any, int] = {name: i for i, name in enumerate((*program.inputs, *program.numbers))}
        dtypes = dict.fromkeys(program.inputs, program.dtype)
        last = last_reads(program)
        home = _homes(program, home, last)
        for k, instruction in enumerate(program.instructions):
            function, args, in_place = self._foreach(_ordered(instruction, last, k, program))
            first = args[0] if args else None
            if (
                first is None
                or last.get(first) != k
                or args.count(first) > 1
                or dtypes.get(first) != instruction.dtype
                or (first in program.inputs and home.get(instruction.result) != first)
            ):
                in_place = None
            dtypes[instruction.result] = instruction.dtype or program.dtype
            places = tuple([self._place(arg) for arg in args])
            if in_place is not None:  # it returns nothing: the result is where its first argument is
                self.places[instruction.result] = places[0]
            self.calls.append((in_place or function, places, -1 if in_place else self._place(instruction.result)))
        self.outputs = [self.places[name] for name in program.outputs]
        self.before, self.after, self.too_early = self._parted()

    def begin(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> Callable[[], list[Any]]:
        """Make the calls before anything is overwritten.

        Returns:
            Function that makes the others, and returns all. Those in the place of an input are the lists as given.
        """
        values = [*inputs, *numbers, *self.values[len(inputs) + len(numbers) :]]
        _call(self.before, values)
        return functools.partial(self._finish, values)

    def _finish(self, values: list[Any]) -> list[Any]:
        _call(self.after, values)
        return [values[place] for place in self.outputs]

    def _parted(self) -> tuple[list[_Call], list[_Call], set[str]]:
        """Part calls into those before anything is overwritten and those after; find values overwritten too early."""
        inputs = self.program.inputs
        waits: dict[int, set[Any]] = {}  # by place, the inputs whose overwriting its value comes after
        reads: dict[int, set[Any]] = {}  # the same for calls that read it before it is overwritten itself
        before: list[Any] = []
        after: list[Any] = []
        too_early: set[Any] = set()
        for call in self.calls:
            _, places, result = call
            overwrites = result < 0 and places[0] < len(inputs)
            waiting: set[Any] = {inputs[places[0]]} if overwrites else set()
            waiting.update(*[waits.get(place, ()) for place in places], reads.get(places[0], ()) if result < 0 else ())
            if not waiting:
                before.append(call)
                continue
            after.append(call)
            waits[places[0] if result < 0 else result] = waiting
            for place in places:
                reads.setdefault(place, set()).update(waiting)
            if result >= 0:
                too_early |= waiting
        return before, after, too_early

    def _place(self, value: Any) -> int:
        key = value if isinstance(value, Name | _Repeated) else (type(value), id(value))
        if key not in self.places:
            self.places[key] = len(self.values)
            self.values.append(None if isinstance(value, Name | _Repeated) else value)
        return self.places[key]

    def _foreach(self, instruction: Instruction) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
        """Find the function over lists for an instruction, its arguments, and the one that writes in place."""
        name, args, kwargs = called(instruction), instruction.args, dict(instruction.kwargs)
        if instruction.dtype is None:
            return instruction.function, args, None
        if not all(is_tensor(arg) or is_factor(arg) for arg in args):  # a condition, or a tensor of the rule's own
            return _Each(instruction), tuple(instruction.names), None
        kinds = "".join(["l" if is_tensor(arg) else "n" for arg in args])
        if name == "add" and kwargs.keys() == {"alpha"} and kinds == "ll":
            return _add_scaled, (*args, kwargs["alpha"]), _add_scaled_
        if kwargs.keys() == {"value"} and kinds == "lll":
            args, kinds, kwargs = (*args, kwargs["value"]), "llln", {}
        if kinds == "ln" and name in _AS_LIST and (self.known and self.program.device.type == "cpu"):
            repeated: Any = _Repeated(self._place(args[1]), self.program.dtype)
            if repeated not in self.places:
                self.calls.append((repeated, (self._place(args[1]), 0), self._place(repeated)))
            args, kinds = (args[0], repeated), "ll"
        allowed = _KNOWN if self.known else _UNKNOWN
        kernel = getattr(torch, f"_foreach_{name}", None)
        if kwargs or kernel is None or name not in allowed.get(kinds, ()):
            return _Each(instruction), tuple(instruction.names), None
        return kernel, args, getattr(torch, f"_foreach_{name}_", None)


_UNARY = {"abs", "exp", "expm1", "log", "log1p", "neg", "reciprocal", "rsqrt", "sign", "sqrt", "tanh"}
_AS_LIST = {"add", "sub", "mul", "div"}
"""With a number, a list of one tensor, again and again, takes less than half of the time on the CPU."""
_UNKNOWN = {
    "l": _UNARY,
    "ll": {"add", "sub", "mul", "div", "maximum", "minimum", "pow"},
    "ln": {"add", "mul", "div"},
    "lll": {"lerp", "addcmul", "addcdiv"},
}
_KNOWN = {
    **_UNKNOWN,
    "ln": {"add", "sub", "mul", "div", "clamp_min", "clamp_max", "pow"},
    "lln": {"lerp"},
    "llln": {"addcmul", "addcdiv"},
}


class _Repeated(NamedTuple):
    """Makes of a number a list of one tensor, again and again."""

    place: int
    dtype: torch.dtype

    def __call__(self, number: float, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.tensor(number, dtype=self.dtype, device="cpu")] * len(tensors)


class _Each:
    """A call for which there is no foreach function: one tensor after the other."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.lists = [is_tensor(name) for name in instruction.names]

    def __call__(self, *values: Any) -> list[Tensor]:
        names, instruction = self.instruction.names, self.instruction
        length = len(next(value for value, is_list in zip(values, self.lists, strict=True) if is_list))
        results = []
        for i in range(length):
            row = {n: v[i] if on else v for n, v, on in zip(names, values, self.lists, strict=True)}

            def given(arg: Any, row: dict[Name, Any] = row) -> Any:
                return row[arg] if isinstance(arg, Name) else arg

            kwargs = {key: given(arg) for key, arg in instruction.kwargs}
            results.append(instruction.function(*map(given, instruction.args), **kwargs))
        return results


def _add_scaled(tensors: list[Tensor], others: list[Tensor], number: Any) -> Any:
    return torch._foreach_add(tensors, others, alpha=number)


def _add_scaled_(tensors: list[Tensor], others: list[Tensor], number: Any) -> None:
    torch._foreach_add_(tensors, others, alpha=number)


def _ordered(instruction: Instruction, last: dict[str, int], k: int, program: Program) -> Instruction:
    """Let the first argument be a list, one that can be overwritten if possible, where the order does not matter."""
    args = instruction.args
    if called(instruction) not in ("add", "mul", "maximum", "minimum") or instruction.kwargs or len(args) != 2:
        return instruction
    one, other = args
    dying = is_tensor(other) and last.get(other) == k and other not in program.inputs
    kept = is_tensor(one) and (last.get(one) == k or not dying)
    return instruction if kept or not is_tensor(other) else instruction._replace(args=(other, one))


def _homes(program: Program, home: dict[str, str], last: dict[str, int]) -> dict[str, str]:
    """Tell for values the input in whose place they may be made: it is read no more, and they become it."""
    home = dict(home)
    for k in reversed(range(len(program.instructions))):
        instruction = _ordered(program.instructions[k], last, k, program)
        there = home.get(instruction.result)
        first: Any = instruction.args[0] if instruction.args else None
        if there is not None and is_tensor(first) and first not in program.inputs and last.get(first) == k:
            made = next(i for i, other in enumerate(program.instructions) if other.result == first)
            if last.get(there, -1) <= made:
                home.setdefault(first, there)
    return home


def _batches(tensors: Sequence[Tensor], largest: int = 1 << 24) -> list[list[int]]:
    """Part tensors into lists of at most so many elements, where several are in one, for temporaries are as large."""
    batches: list[list[int]] = [[]]
    filled = 0
    for i, size in enumerate(map(Tensor.numel, tensors)):
        if batches[-1] and filled + size > largest:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += size
    return batches
