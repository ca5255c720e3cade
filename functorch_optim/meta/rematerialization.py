"""Derivatives by computing again: time for memory, under `torch.func` too."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_optim import tree
from functorch_optim.meta.capture import Capture, Substitute
from functorch_optim.meta.derivative import (
    alive,
    forward_mode,
    has_derivative,
    is_differentiable,
    primal,
    pullback,
    pushforward,
    replaced,
    requires_grad,
)
from functorch_optim.tree import Tree


def checkpoint(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """Let a function forget what it computes, and compute it again when a derivative is wanted.

    The values and all derivatives are those of `function`, in reverse and in forward mode, of any order. Until then
    only its arguments and results are kept. It is what `torch.utils.checkpoint` is, which torch.func does not allow.

    Args:
        function: pure function of trees, which returns a tree. Random numbers are drawn again alike. Tensors that it
            closes over, learned hyperparameters say, have their derivatives too.

    Returns:
        Function of the same arguments.

    Raises:
        RuntimeError: `torch.compile` traces the call; or the function gives a tensor that it closes over, and that a
            derivative is wanted of, to a transform or an autograd.Function: make that an argument.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.

    Example:
        >>> import functorch_optim as fo, torch
        >>> cube = fo.meta.checkpoint(lambda x: x * x * x)
        >>> torch.func.grad(torch.func.grad(cube))(torch.tensor(2.0))
        tensor(12.)
    """

    @functools.wraps(function)
    def checkpointed(*args: Any, **kwargs: Any) -> Tree:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "torch.compile cannot trace fo.meta.checkpoint; leave it out of what is compiled: the compiler decides "
                "itself what to compute again"
            )
        leaves, structure = tree.flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = [leaves[i] for i in places]
        count = len(inputs)
        rest = replaced(leaves, places, [None] * count)
        rebuilt: list[Any] = []

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = tree.unflatten(structure, replaced(rest, places, tensors))
            results, results_structure = tree.flatten(function(*args, **kwargs))
            at = [i for i, result in enumerate(results) if isinstance(result, Tensor)]
            rebuilt[:] = replaced(results, at, [None] * len(at)), results_structure, at
            return [results[i] for i in at]

        def again(tensors: Sequence[Tensor]) -> list[Tensor]:
            with surroundings.restored(), Substitute(found, tensors[count:]) as substitute:
                outputs = run(tensors[:count])
            substitute.check()
            return outputs

        surroundings = _Surroundings.now(_devices(inputs))
        constants = [tensor.detach() for tensor in inputs]
        with Capture(constants) as capture:
            outputs = run(constants)
        capture.check(outputs)
        found = capture.found
        outputs = _attached(again, outputs, [*inputs, *[tensor for tensor, _ in found]])
        others, results_structure, at = rebuilt
        return tree.unflatten(results_structure, replaced(others, at, outputs))

    return checkpointed


Function: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]


def _attached(function: Function, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give outputs, computed of constants, the derivatives of the function of the tensors that computes them."""
    if torch.is_grad_enabled() and any(map(requires_grad, tensors)):
        apply: Any = _Checkpointed.apply
        return list(apply(function, len(outputs), *outputs, *tensors))
    if forward_ad._current_level >= 0 and any(map(has_derivative, tensors)):  # forward mode alone keeps nothing
        return function(tensors)
    return list(outputs)


class _Checkpointed(torch.autograd.Function):
    """`_Checkpointed.apply(f, n, *outputs, *tensors)` is the n outputs, with the derivatives of f(tensors).

    The derivative forgets what it computes, too: torch.func.grad records it, for higher derivatives that nobody may
    want.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(_function: Function, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([tensor.view_as(tensor) for tensor in tensors[:n]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, n, *tensors = inputs
        ctx.differentiable = [i for i, out in enumerate(output) if is_differentiable(out)]
        ctx.mark_non_differentiable(*[out for out in output if not is_differentiable(out)])
        ctx.save_for_backward(*tensors[n:])
        if forward_ad._current_level >= 0:  # else they would be kept for as long as the output is
            ctx.save_for_forward(*tensors[n:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        function, differentiable, n = ctx.function, ctx.differentiable, len(cotangents)
        tensors = [alive(tensor) for tensor in ctx.saved_tensors]
        asked = ctx.needs_input_grad[2 + n :]
        needed = [i for i, tensor in enumerate(tensors) if asked[i] and is_differentiable(tensor)]

        def transposed(given: Sequence[Tensor]) -> list[Tensor]:
            tensors, cotangents = given[: -len(differentiable)], given[-len(differentiable) :]
            moving = _moving(function, tensors, needed, differentiable)
            return pullback(moving, [tensors[i] for i in needed])(cotangents)

        given = [*tensors, *[cotangents[i] for i in differentiable]]
        grads = transposed([tensor.detach() for tensor in given])
        return (None, None, *[None] * n, *replaced([None] * len(tensors), needed, _attached(transposed, grads, given)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        n = len(tangents) - 2 - len(ctx.saved_tensors)
        given = {i: t for i, t in enumerate(tangents[2 + n :]) if t is not None}
        needed = [i for i in given if is_differentiable(ctx.saved_tensors[i])]
        with forward_mode():
            tensors = [primal(tensor) for tensor in ctx.saved_tensors]
            moving = _moving(ctx.function, tensors, needed, ctx.differentiable)
            primals = [tensors[i] for i in needed]
            moves = pushforward(moving, primals, moving(primals))([given[i] for i in needed])
        return tuple(replaced([None] * n, ctx.differentiable, moves))


def _moving(function: Function, tensors: Sequence[Tensor], needed: Sequence[int], wanted: Sequence[int]) -> Function:
    """Return some of the outputs as a function of some of the tensors."""

    def moving(some: Sequence[Tensor]) -> list[Tensor]:
        outputs = function(replaced(tensors, needed, some))
        return [outputs[i] for i in wanted]

    return moving


class _Surroundings(NamedTuple):
    """What a function depends on besides its arguments: random numbers, and torch.autocast.

    Attributes:
        states: of the random numbers of each device.
        autocast: for each type of device, whether torch.autocast is on, and its dtype.
    """

    states: dict[torch.device, Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> "_Surroundings":
        """Note them down."""
        with torch._C._DisableFuncTorch():  # generators know no levels of torch.func
            states = {device: _random(device).get_rng_state(*_index(device)) for device in devices}
        kinds = {device.type for device in devices}
        autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds}
        return cls(states, autocast)

    def restore(self) -> None:
        """Draw the same random numbers again from now on."""
        with torch._C._DisableFuncTorch():
            for device, state in self.states.items():
                _random(device).set_rng_state(state, *_index(device))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Have them again, for a while."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.now(self.states).restore)
            self.restore()
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def _devices(tensors: Sequence[Tensor]) -> set[torch.device]:
    return {torch.device("cpu"), *[tensor.device for tensor in tensors if tensor.device.type != "meta"]}


def _random(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "cpu" else (device,)
