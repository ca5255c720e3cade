"""Derivatives with recomputation, which trades time for memory, under `torch.func` too."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_optim import tree
from functorch_optim.meta._capture import Capture, Substitute, check_repeated, check_unchanged, fingerprint
from functorch_optim.meta._derivative import (
    alive,
    forward_mode,
    has_derivative,
    is_differentiable,
    primal,
    pullback,
    pushforward,
    replaced,
    requires_grad,
    split,
)
from functorch_optim.meta._exact import exact_derivatives
from functorch_optim.tree import Tree


def checkpoint(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """Let a function keep no intermediate tensors; compute them again when a derivative is wanted.

    The values and all derivatives are those of `function`, in reverse and in forward mode, of any order. Until a
    derivative is taken, only arguments and results are kept. This is `torch.utils.checkpoint` for torch.func, which
    does not allow torch's own.

    The function may close over tensors, such as learned hyperparameters, and their derivatives are right. It follows
    the rules of torch.func: it takes gradients by `torch.func.grad` and not by `backward`, cuts graphs by `detach` and
    not by `torch.no_grad`, and does not modify its arguments. The second run repeats the random numbers of torch's
    default generators. It does not reset other generators, the training mode of modules, or Python numbers that the
    function reads. If its results differ from the first ones by more than rounding, an error is raised. Every torch
    operation is inspected, so a checkpoint pays where tensors are large.

    Args:
        function: pure function of trees, which returns a tree of tensors and plain python values.

    Returns:
        Function of the same arguments. `torch.compile` breaks its graph there: leave `checkpoint` out of compiled
        functions, for the compiler chooses by itself which tensors to compute again.

    Raises:
        TypeError: the function returns an object that is no tree, and so could hide a tensor.
        RuntimeError: it modifies an argument; or it closes over a tensor with a derivative and passes it on to a
            transform or an autograd.Function, where it cannot be found: make that tensor an argument. When the
            derivative is taken: the second run has other tensors or results than the first, or a tensor in the closure
            was modified.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.

    Example:
        >>> import functorch_optim as fo, torch
        >>> cube = fo.meta.checkpoint(lambda x: x * x * x)
        >>> torch.func.grad(torch.func.grad(cube))(torch.tensor(2.0))
        tensor(12.)
    """

    @functools.wraps(function)
    def checkpointed(*args: Any, **kwargs: Any) -> Tree:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        inputs, rebuilt = split((args, kwargs))
        count = len(inputs)
        results: list[Any] = []

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            args, kwargs = rebuilt(tensors)
            with exact_derivatives():
                outputs, results[:] = _split_results(function(*args, **kwargs))
            return outputs

        def again(tensors: Sequence[Tensor]) -> list[Tensor]:
            check_unchanged(others)
            substitute = Substitute(found, tensors[count:])
            with surroundings.restored(), substitute:
                outputs = run(tensors[:count])
            return substitute.others(outputs)

        surroundings = _Surroundings.now(_devices(inputs))
        constants = [tensor.detach() for tensor in inputs]
        versions = [constant._version for constant in constants if not constant.is_inference()]
        with Capture(inputs, constants) as capture:
            outputs = run(constants)
        outputs = capture.constants(outputs)
        if versions != [constant._version for constant in constants if not constant.is_inference()]:
            raise RuntimeError("The function modifies its arguments in place, and cannot run again: let it copy them")
        found, others = capture.found, capture.others
        outputs = _attached(again, outputs, [*inputs, *[tensor for tensor, _ in found]])
        [rebuild] = results
        return rebuild(outputs)

    disable: Any = torch.compiler.disable
    made: Callable[..., Tree] = disable(checkpointed, reason="torch.compile cannot trace fo.meta.checkpoint")
    return made


def _split_results(results: Tree) -> tuple[list[Tensor], list[Callable[[Sequence[Tensor]], Tree]]]:
    for leaf in tree.flatten(results)[0]:
        if not isinstance(leaf, _PLAIN):
            raise TypeError(
                f"The function returned a {type(leaf).__name__}, which is neither tensor nor tree, and whose "
                "derivatives checkpoint cannot know: return tensors in dicts, lists or tuples"
            )
    tensors, rebuild = split(results)
    return tensors, [rebuild]


_PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
Function: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]


def _attached(function: Function, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give outputs, which were computed from constants, the derivatives of the function with respect to the tensors."""
    if torch.is_grad_enabled() and any(map(requires_grad, tensors)):
        apply: Any = _Checkpointed.apply
        return list(apply(function, len(outputs), *outputs, *map(fingerprint, outputs), *tensors))
    if forward_ad._current_level >= 0 and any(map(has_derivative, tensors)):  # forward mode alone keeps nothing
        again = function(tensors)
        check_repeated(map(fingerprint, outputs), again)
        return again
    return list(outputs)


class _Checkpointed(torch.autograd.Function):
    """`apply(f, n, *outputs, *fingerprints, *tensors)` is the n outputs, with the derivatives of f(tensors).

    The derivative is a checkpoint, too: torch.func.grad records it for higher derivatives, which may never be taken.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(_function: Function, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([tensor.clone() for tensor in tensors[:n]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, n, *tensors = inputs
        ctx.count = n
        ctx.differentiable = [i for i, out in enumerate(output) if is_differentiable(out)]
        ctx.mark_non_differentiable(*[out for out in output if not is_differentiable(out)])
        ctx.save_for_backward(*tensors[n:])
        if forward_ad._current_level >= 0:  # else they would live as long as the output
            ctx.save_for_forward(*tensors[n:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        function, differentiable, n = ctx.function, ctx.differentiable, len(cotangents)
        saved = [alive(tensor) for tensor in ctx.saved_tensors]
        first, tensors = saved[:n], saved[n:]
        asked = ctx.needs_input_grad[2 + 2 * n :]
        needed = [i for i, tensor in enumerate(tensors) if asked[i] and is_differentiable(tensor)]

        def transposed(given: Sequence[Tensor], first: Sequence[Tensor] | None = None) -> list[Tensor]:
            tensors, cotangents = given[: -len(differentiable)], given[-len(differentiable) :]
            moving = _moving(function, tensors, needed, differentiable, first)
            with torch.enable_grad():  # recurrent layers need it to be differentiable
                return pullback(moving, [tensors[i] for i in needed])(cotangents)

        given = [*tensors, *[cotangents[i] for i in differentiable]]
        grads = transposed([tensor.detach() for tensor in given], first)
        attached = replaced([None] * len(tensors), needed, _attached(transposed, grads, given))
        return (None, None, *[None] * 2 * n, *attached)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        n = ctx.count
        given = {i: t for i, t in enumerate(tangents[2 + 2 * n :]) if t is not None}
        with forward_mode():
            saved = [primal(tensor) for tensor in ctx.saved_tensors]
            first, tensors = saved[:n], saved[n:]
            needed = [i for i in given if is_differentiable(tensors[i])]
            moving = _moving(ctx.function, tensors, needed, ctx.differentiable, first)
            primals = [tensors[i] for i in needed]
            moves = pushforward(moving, primals, moving(primals))([given[i] for i in needed])
        return tuple(replaced([None] * n, ctx.differentiable, moves))


def _moving(
    function: Function,
    tensors: Sequence[Tensor],
    needed: Sequence[int],
    wanted: Sequence[int],
    first: Sequence[Tensor] | None,
) -> Function:
    """Return some of the outputs as a function of some of the tensors; `first` has the fingerprints of all outputs."""

    def moving(some: Sequence[Tensor]) -> list[Tensor]:
        outputs = function(replaced(tensors, needed, some))
        if first is not None:
            check_repeated(first, outputs)
        return [outputs[i] for i in wanted]

    return moving


class _Surroundings(NamedTuple):
    """The global state that a function depends on: random numbers, and torch.autocast.

    Attributes:
        states: of the random numbers of each device.
        autocast: for each type of device, whether torch.autocast is on, and its dtype.
    """

    states: dict[torch.device, Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> "_Surroundings":
        """Record the present state."""
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
        """Return to the recorded state within a `with`."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.now(self.states).restore)
            self.restore()
            for kind, (enabled, dtype) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def _devices(tensors: Sequence[Tensor]) -> set[torch.device]:
    """Return the devices of tensors, and those that are likely for tensors in a closure."""
    cuda: Any = torch.cuda
    current = [torch.device("cuda", cuda.current_device())] if cuda.is_initialized() else []
    return {torch.device("cpu"), *current, *[tensor.device for tensor in tensors if tensor.device.type != "meta"]}


def _random(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "cpu" else (device,)
