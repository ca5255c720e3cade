"""Native: torch's own fused kernels, for programs that compute the same.

Each kernel is written down here as a rule, and recorded. A program is one of theirs where its last calls are the same.
The calls before them make the gradient for the kernel: `clip, AdamW` is a product, and then a kernel. The kernels
correct for bias by themselves, from the step. The numbers of a program are corrected already, so the kernels are given
a step at which nothing is left to correct.
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
from functorch_optim._execution.program import Instruction, Name, Program, needed, record
from functorch_optim._execution.reference import Stage
from functorch_optim._numerics import safe_sqrt

Numbers = dict[str, float]


class _Kernel(NamedTuple):
    """One of torch's kernels.

    Attributes:
        rule: its computation: `rule(g, state, p, n) -> (p, state)`.
        numbers: names of the numbers n.
        states: how many states it overwrites.
        takes: whether it computes that with these values of the numbers.
        run: overwrites parameters and states.
    """

    rule: Callable[..., Any]
    numbers: tuple[str, ...]
    states: int
    takes: Callable[[Numbers], bool]
    run: Callable[..., None]


# Their computations. -------------------------------------------------------------------------------------------------


def _gradient(g: Any, p: Any, n: Any, maximize: bool, decay: bool) -> Any:
    g = -g if maximize else g
    return g + n["weight_decay"] * p if decay else g


def _adam(g: Any, state: Any, p: Any, n: Any, *, amsgrad: bool, maximize: bool, decay: str | None) -> Any:
    g = _gradient(g, p, n, maximize, decay == "L2")
    m = torch.lerp(state[0], g, n["weight1"])
    v = n["beta2"] * state[1] + n["weight2"] * g * g
    largest = torch.maximum(state[2], v) if amsgrad else v
    u = n["rate"] * m / (safe_sqrt(largest) + n["eps"])
    if decay == "decoupled":
        u = u + n["weight_decay"] * p
    return p + n["lr"] * u, (m, v, largest) if amsgrad else (m, v)


def _sgd(g: Any, state: Any, p: Any, n: Any, *, momentum: bool, nesterov: bool, maximize: bool, decay: bool) -> Any:
    g = _gradient(g, p, n, maximize, decay)
    if not momentum:
        return p + n["lr"] * g, ()
    b = n["momentum"] * state[0] + n["gain"] * g
    return p + n["lr"] * (g + n["momentum"] * b if nesterov else b), (b,)


def _adagrad(g: Any, state: Any, p: Any, n: Any, *, maximize: bool, decay: bool) -> Any:
    g = _gradient(g, p, n, maximize, decay)
    s = state[0] + g * g
    return p + n["lr"] * (g / (safe_sqrt(s) + n["eps"])), (s,)


# How they are called. ------------------------------------------------------------------------------------------------


def _run_adam(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[list[Tensor]],
    n: Numbers,
    *,
    decoupled: bool,
    **options: Any,
) -> None:
    lr, decay, eps = -n["lr"], n.get("weight_decay", 0.0), n.get("plain_eps", n["eps"])
    if "t" not in n:
        lr = lr * n["rate"]
    if decoupled and "t" not in n:  # the kernel's decay is lr * weight_decay, with the lr that it is given
        decay = decay / n["rate"] if n["rate"] else 0.0
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        params,
        grads,
        states[0],
        states[1],
        states[2] if len(states) > 2 else [],
        [_number(n.get("t", _ENDLESS), params[0].device)] * len(params),
        lr=lr,
        beta1=1 - n["weight1"],
        beta2=n["beta2"],
        weight_decay=decay,
        eps=eps,
        **options,
    )


def _run_sgd(
    params: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]], n: Numbers, **options: Any
) -> None:
    torch._fused_sgd_(
        params,
        grads,
        states[0] if states else [],
        lr=-n["lr"],
        weight_decay=n.get("weight_decay", 0.0),
        momentum=n.get("momentum", 0.0),
        dampening=1 - n.get("gain", 1.0),
        is_first_step=False,
        **options,
    )


def _run_adagrad(
    params: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]], n: Numbers, **options: Any
) -> None:
    torch._fused_adagrad_(
        params,
        grads,
        states[0],
        [_number(1.0, params[0].device)] * len(params),
        lr=-n["lr"],
        lr_decay=0.0,
        weight_decay=n.get("weight_decay", 0.0),
        eps=n["eps"],
        **options,
    )


_ENDLESS = 1e30
"""A step at which nothing is left to correct: beta^step is 0."""


@functools.lru_cache
def _number(value: float, device: torch.device) -> Tensor:
    """Make a number once: nothing takes memory while parameters are overwritten."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def _kernels() -> list[_Kernel]:
    kernels = []
    for maximize in (False, True):
        for decay in (None, "L2", "decoupled"):
            for amsgrad in (False, True):
                names = ["weight1", "beta2", "weight2", "rate", "eps", "lr", *(["weight_decay"] if decay else [])]
                rule = functools.partial(_adam, amsgrad=amsgrad, maximize=maximize, decay=decay)
                run = functools.partial(_run_adam, amsgrad=amsgrad, maximize=maximize, decoupled=decay == "decoupled")
                kernels.append(_Kernel(rule, tuple(names), 2 + amsgrad, _is_adam, run))
        for decays in (False, True):
            own = ("weight_decay",) if decays else ()
            for momentum, nesterov in ((False, False), (True, False), (True, True)):
                also = ("momentum", "gain") if momentum else ()
                rule = functools.partial(_sgd, momentum=momentum, nesterov=nesterov, maximize=maximize, decay=decays)
                run = functools.partial(_run_sgd, nesterov=nesterov, maximize=maximize)
                kernels.append(_Kernel(rule, ("lr", *also, *own), int(momentum), _is_sgd, run))
            rule = functools.partial(_adagrad, maximize=maximize, decay=decays)
            run = functools.partial(_run_adagrad, maximize=maximize)
            kernels.append(_Kernel(rule, ("lr", "eps", *own), 1, _is_any, run))
    return kernels


def _is_adam(n: Numbers) -> bool:
    return n["weight2"] == 1 - n["beta2"] and n["beta2"] < 1 and n["weight1"] > 0


def _is_sgd(n: Numbers) -> bool:
    return n.get("momentum") != 0  # the kernel then leaves the buffer alone


def _is_any(n: Numbers) -> bool:
    return True


# Which program is one of theirs. -------------------------------------------------------------------------------------


class _Pattern(NamedTuple):
    """A kernel, and the calls that it makes.

    Attributes:
        kernel: the kernel.
        made: instruction by result.
        outputs: the parameter, and the states.
    """

    kernel: _Kernel
    made: dict[Name, Instruction]
    outputs: tuple[Name, ...]


_LIKE = torch.empty(0)
_STATES = {n: namedtuple("State", [f"s{i}" for i in range(n)])(*range(n)) if n else () for n in range(4)}


@functools.cache
def _patterns() -> list[_Pattern]:
    """Record all kernels; those with more calls first, for they do more."""
    patterns = []
    for kernel in _kernels():

        def update(g: Any, state: Any, p: Any, n: Any, kernel: _Kernel = kernel) -> Any:
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
    """

    kernel: _Kernel
    gradient: Name
    numbers: dict[str, Any]


@functools.lru_cache(maxsize=256)
def match(program: Program) -> _Match | None:
    """Find the kernel that a program is one of."""
    states = [name for name in program.inputs if name.startswith("x")]
    made = {instruction.result: instruction for instruction in program.instructions}
    for pattern in _patterns():
        kernel = pattern.kernel
        if kernel.states != len(states) or not program.moves:
            continue
        bound: dict[str, Any] | None = {"p": "p", **{f"x0_{j}": name for j, name in enumerate(states)}}
        for theirs, ours in zip(pattern.outputs, program.outputs, strict=True):
            bound = None if bound is None else _unified(theirs, ours, pattern.made, made, bound)
        if bound is not None:
            numbers = {name: bound[f"n{j}"] for j, name in enumerate(kernel.numbers)}
            return _Match(kernel, bound["g"], numbers)
    return None


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
    """

    def __init__(self, program: Program, found: _Match, other: Any) -> None:
        self.program, self.kernel, self.other = program, found.kernel, other
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
        copies = [[tensor.clone() for tensor in column] for column in inputs[1:]]
        self.kernel.run(copies[0], self._gradients(inputs, copies[0], numbers), copies[1:], named)
        return copies

    def over(self, columns: Sequence[list[Tensor]]) -> Overwriting:
        """Get ready to overwrite parameters and states."""
        taken = _lie_alike(columns) and self._takes(columns)
        return _OverNative(self, columns) if taken else self.other.over(columns)

    def _takes(self, columns: Sequence[list[Tensor]]) -> bool:
        """Tell whether the kernels take tensors of these kinds; a machine is for tensors of one form."""
        if self.taken is None:
            like = columns[0][0]
            # On the CPU, in half precision (torch 2.13), SGD's is wrong from 16 elements on, Adagrad's 0 / 0 is NaN.
            half = like.dtype in HALF and (like.device.type == "cpu" or self.prefix is not None)
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
                    _number(t, self.program.device)  # takes memory before anything is written

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
        self.written = [tensor for column in columns for tensor in column]
        self.counting = [tensor for tensor in self.written if not tensor.is_inference()]
        self.other: Overwriting | None = None

    def __call__(self, updates: list[Tensor], numbers: Sequence[Any]) -> Callable[[], None]:
        """Take the memory for a step, and return the step."""
        named = self.machine._named(numbers)
        if named is None:
            if self.other is None:
                self.other = self.machine.other.over(self.columns)
            return self.other(updates, numbers)
        grads = self.machine._gradients([updates, *self.columns], self.columns[0], numbers)
        return functools.partial(self._step, grads, named)

    def _step(self, grads: list[Tensor], named: Numbers) -> None:
        self.machine.kernel.run(self.columns[0], grads, self.columns[1:], named)
        torch.autograd.graph.increment_version(self.counting)  # the kernels do not, and autograd must see the change


def _lie_alike(columns: Sequence[list[Tensor]]) -> bool:
    """Tell whether parameters lie in memory without gaps, and states as they do."""
    if all([all(map(Tensor.is_contiguous, column)) for column in columns]):  # noqa: C419
        return True
    return all([layout_of(p) is p for p in columns[0]]) and all(  # noqa: C419
        [lies(tensor, p) for column in columns for tensor, p in zip(column, columns[0], strict=True)]  # noqa: C419
    )
