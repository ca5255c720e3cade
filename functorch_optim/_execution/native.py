"""Native: torch's own fused kernels, for programs that compute the same.

Each kernel is recorded as a program. A program is one of theirs where the same calls make its parameter and its first
states. The calls before them make the gradient for the kernel: `clip, AdamW` is a product, and then a kernel. The calls
after them compute with the new parameters: an average of the weights is a kernel, and then a `lerp`.
"""

import functools
import math
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.checks import HALF
from functorch_optim._core.rule import Rule
from functorch_optim._execution.blocks import empty_like, layout_of, lies
from functorch_optim._execution.calls import called, is_tensor
from functorch_optim._execution.foreach import Foreach, Overwriting
from functorch_optim._execution.program import Instruction, Name, Program, needed
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage
from functorch_optim._execution.torch_kernels import Numbers, TorchKernel, kernels, number

# Which program is one of theirs. -------------------------------------------------------------------------------------


class _Pattern(NamedTuple):
    """A kernel, and the calls that it makes.

    Attributes:
        kernel: the kernel.
        made: instruction by result.
        outputs: the parameter, and the states.
    """

    kernel: TorchKernel
    made: dict[Name, Instruction]
    outputs: tuple[Name, ...]


_LIKE = torch.empty(0, device="cpu")
_STATES = {n: namedtuple("State", [f"s{i}" for i in range(n)])(*range(n)) if n else () for n in range(4)}


@functools.cache
def _patterns() -> list[_Pattern]:
    """Record all kernels; those with more calls first, for they do more."""
    patterns = []
    for kernel in kernels():

        def update(g: Any, state: Any, p: Any, n: Any, kernel: TorchKernel = kernel) -> Any:
            return kernel.rule(g, state, p, dict(zip(kernel.numbers, n, strict=True)))

        rule = Rule(None, update, elementwise=True, needs_params=True)
        program = record([Stage(rule)], [_STATES[kernel.states]], True, [[1.0] * len(kernel.numbers)], _LIKE)
        made = {instruction.result: instruction for instruction in program.instructions}
        patterns.append(_Pattern(kernel, made, program.outputs))
    return sorted(patterns, key=lambda pattern: -len(pattern.made))


class _Match(NamedTuple):
    """How a program is one of a kernel.

    Attributes:
        kernel: the kernel.
        gradient: name of the value that the kernel is given for the gradient.
        numbers: for each number of the kernel, the name of the program's, or a constant.
        after: the program of the new parameters that makes the other states; None where they stay as they are.
    """

    kernel: TorchKernel
    gradient: Name
    numbers: dict[str, Any]
    after: Program | None


@functools.lru_cache(maxsize=256)
def match(program: Program) -> _Match | None:
    """Find the kernel that a program is one of."""
    states = [name for name in program.inputs if name.startswith("x")]
    made = {instruction.result: instruction for instruction in program.instructions}
    for pattern in _patterns():
        kernel = pattern.kernel
        if kernel.states > len(states) or not program.moves:
            continue
        bound: dict[str, Any] | None = {"p": "p", **{f"x0_{j}": states[j] for j in range(kernel.states)}}
        for theirs, ours in zip(pattern.outputs, program.outputs, strict=False):
            bound = None if bound is None else _unified(theirs, ours, pattern.made, made, bound)
        if bound is None:
            continue
        rest = program.outputs[1 + kernel.states :] != tuple(states[kernel.states :])
        after = _after(program, kernel.states) if rest else None
        if rest and after is None:
            continue
        numbers = {name: bound[f"n{j}"] for j, name in enumerate(kernel.numbers)}
        return _Match(kernel, bound["g"], numbers, after)
    return None


def _after(program: Program, states: int) -> Program | None:
    """Return the program of the new parameters that makes all but the first states.

    Returns:
        None where it needs other values too; or more than one call for a state, which overwrites it and so takes no
        memory.
    """
    moved, own, outputs = program.outputs[0], program.inputs[2 + states :], program.outputs[1 + states :]
    others = [instruction for instruction in program.instructions if instruction.result != moved]
    instructions = needed(others, outputs)
    made = {instruction.result: instruction for instruction in instructions}
    for state, output in zip(own, outputs, strict=True):
        one = made.get(output)
        if output != state and (
            one is None or one.args[:1] != (state,) or not {*one.names} <= {moved, state, *program.numbers}
        ):
            return None
    return replace(
        program, inputs=(moved, *own), instructions=instructions, outputs=outputs, moves=False, updates=False
    )


def _unified(
    theirs: Any, ours: Any, pattern: dict[Name, Instruction], made: dict[Name, Instruction], bound: dict[str, Any]
) -> dict[str, Any] | None:
    """Bind the arguments of a kernel to values of a program, so that one computes the other; None if none does."""
    if theirs in pattern:
        one, other = pattern[theirs], made.get(ours)
        if other is None or called(one) != called(other) or one.kwargs != other.kwargs:
            return None
        for args in (other.args, other.args[::-1]) if called(one) in ("add", "mul", "maximum") else (other.args,):
            found: dict[str, Any] | None = bound
            for a, b in zip(one.args, args, strict=True):
                found = None if found is None else _unified(a, b, pattern, made, found)
            if found is not None:
                return found
        return None
    if theirs in bound:
        return bound if bound[theirs] == ours else None
    if theirs == "g":
        return {**bound, theirs: ours} if is_tensor(ours) else None
    is_number = isinstance(ours, float) or (isinstance(ours, Name) and ours.startswith("n") and ours not in made)
    return {**bound, theirs: ours} if is_number and not str(ours).endswith("_flag") else None


class Native:
    """Runs a program by one of torch's kernels; and by another machine where the kernel cannot.

    Args:
        program: the program.
        found: the kernel.
        other: the machine for tensors and numbers that the kernel does not take.
        numbers: those of the program.
    """

    def __init__(self, program: Program, found: _Match, other: Any, numbers: Sequence[Any]) -> None:
        self.program, self.kernel, self.other = program, found.kernel, other
        self.after = None if found.after is None else Foreach(found.after, numbers)
        self.numbers = [
            (name, program.numbers.index(value) if isinstance(value, Name) else value, isinstance(value, Name))
            for name, value in found.numbers.items()
        ]
        self.taken: bool | None = None  # whether the kernel takes tensors of these kinds, once that is known
        self.prefix: Foreach | None = None
        if found.gradient != "g":
            before = replace(
                program,
                instructions=needed(program.instructions, [found.gradient]),
                outputs=(found.gradient,),
                moves=False,
            )
            self.prefix = Foreach(before, [])

    def new(self, inputs: Sequence[list[Tensor]], numbers: Sequence[Any]) -> list[list[Tensor]]:
        """Run on copies of parameters and states."""
        named = self._named(numbers)
        negated = any(map(Tensor.is_neg, inputs[0]))  # gradients, which the kernels refuse
        if named is None or negated or not _lie_alike(inputs[1:]) or not self._takes(inputs[1:]):
            return self.other.new(inputs, numbers)  # type: ignore[no-any-return]
        own = 1 + self.kernel.states
        copies = [[tensor.clone() for tensor in column] for column in inputs[1 : 1 + own]]
        self.kernel.run(copies[0], self._gradients(inputs, copies[0], numbers), copies[1:], named)
        rest = inputs[1 + own :]
        return [*copies, *(rest if self.after is None else self.after.new([copies[0], *rest], numbers))]

    def over(self, columns: Sequence[list[Tensor]]) -> Overwriting:
        """Get ready to overwrite parameters and states."""
        # The calls after the kernel read its results.
        follows = self.after is None or self.after.only_overwrites
        taken = follows and _lie_alike(columns) and self._takes(columns)
        return _OverNative(self, columns) if taken else self.other.over(columns)

    def _takes(self, columns: Sequence[list[Tensor]]) -> bool:
        """Tell whether the kernels take tensors of these kinds; a machine is for tensors of one form."""
        if self.taken is None:
            like = columns[0][0]
            # On the CPU, in half precision (torch 2.13), SGD's is wrong from 16 elements on, Adagrad's 0 / 0 is NaN.
            alone = self.prefix is None and self.after is None
            half = like.dtype in HALF and (like.device.type == "cpu" or not alone)
            kinds = {(tensor.dtype, tensor.device) for column in columns for tensor in column}
            known = like.device.type in ("cpu", "cuda") and like.is_floating_point()
            self.taken = known and not half and len(kinds) == 1
        return self.taken

    def _named(self, numbers: Sequence[Any]) -> Numbers | None:
        """Name the numbers for the kernel; None where it does not take them."""
        named = {name: numbers[value] if is_place else value for name, value, is_place in self.numbers}
        known = all([isinstance(number, float | int) for number in named.values()])  # noqa: C419
        if not known or not self.kernel.takes(named):
            return None
        if "rate" in named:
            self._add_step(named, numbers)
        return named

    def _add_step(self, named: Numbers, numbers: Sequence[Any]) -> None:
        """Add the step and the eps of Adam, where the numbers after these are those: then the bits are the kernel's."""
        place = next((value for name, value, is_place in self.numbers if name == "eps" and is_place), None)
        if place is not None and len(numbers) > place + 2:
            t, eps = numbers[place + 1 : place + 3]
            if isinstance(t, float) and isinstance(eps, float) and t >= 1:
                root, beta1 = math.sqrt(1 - named["beta2"] ** t), 1 - named["weight1"]
                if named["eps"] == eps * root and named["rate"] == root / (1 - beta1**t):
                    named["t"], named["plain_eps"] = t, eps
                    number(t, self.program.device)  # takes memory before anything is written

    def _gradients(self, inputs: Sequence[list[Tensor]], params: list[Tensor], numbers: Sequence[Any]) -> list[Tensor]:
        """Compute the gradients for the kernel; they lie in memory as parameters do."""
        grads = inputs[0]
        if self.prefix is not None:
            [grads] = self.prefix.new(inputs, numbers)
        if not all(map(Tensor.is_contiguous, [*grads, *params])):
            grads = [g if lies(g, p) else empty_like(g, p).copy_(g) for g, p in zip(grads, params, strict=True)]
        return grads


class _OverNative:
    """Parameters and states that a kernel of torch's overwrites."""

    def __init__(self, machine: Native, columns: Sequence[list[Tensor]]) -> None:
        self.machine, self.columns = machine, columns
        own = 1 + machine.kernel.states
        self.own, self.after = columns[:own], None if machine.after is None else machine.after.over(columns[own:])
        self.counting = [tensor for column in self.own for tensor in column if not tensor.is_inference()]
        self.other: Overwriting | None = None

    def __call__(self, updates: list[Tensor], numbers: Sequence[Any]) -> Callable[[], None]:
        """Take the memory for a step, and return the step."""
        named = self.machine._named(numbers)
        if named is None:
            if self.other is None:
                self.other = self.machine.other.over(self.columns)
            return self.other(updates, numbers)
        grads = self.machine._gradients([updates, *self.columns], self.columns[0], numbers)
        after = None if self.after is None else self.after(self.own[0], numbers)
        return functools.partial(self._step, grads, named, after)

    def _step(self, grads: list[Tensor], named: Numbers, after: Callable[[], None] | None) -> None:
        params, *states = self.own
        self.machine.kernel.run(params, grads, states, named)
        torch.autograd.graph.increment_version(self.counting)  # the kernels do not, and autograd must see the change
        if after is not None:
            after()


def _lie_alike(columns: Sequence[list[Tensor]]) -> bool:
    """Tell whether parameters lie in memory without gaps, and states as they do."""
    if all([all(map(Tensor.is_contiguous, column)) for column in columns]):  # noqa: C419
        return True
    return all([layout_of(p) is p for p in columns[0]]) and all(  # noqa: C419
        [lies(tensor, p) for column in columns for tensor, p in zip(column, columns[0], strict=True)]  # noqa: C419
    )
