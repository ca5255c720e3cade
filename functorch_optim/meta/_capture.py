"""Finding, and replacing, the tensors that a function closes over."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from functorch_optim import tree
from functorch_optim._core.checks import HALF
from functorch_optim.meta._derivative import has_derivative, requires_grad

_functorch = torch._C._functorch
_LOOKS = {getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad_fn", "grad")}


class Capture(TorchFunctionMode):
    """Collects the tensors that a function closes over, if vmap batches them or a derivative is wanted of them.

    Such a tensor is an argument of a torch function, and no torch function inside has computed it. The function is
    given a constant in its place, and so autograd records nothing.

    Attributes:
        found: tensors, in the order in which they were met, and whether a derivative is wanted of each.
        others: other tensors from outside, weakly, and their versions.
    """

    def __init__(self, inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        """Begin with the arguments of the function, and with the constants that it is given in their place."""
        super().__init__()
        self.found: list[tuple[Tensor, bool]] = []
        self.others: list[tuple[weakref.ref[Tensor], int]] = []
        self._constants: dict[int, Tensor] = {}
        self._known = {id(constant) for constant in constants}
        self._originals = {id(constant): tensor for constant, tensor in zip(constants, inputs, strict=True)}
        self._kept = list(constants)  # so that no other tensor can have the id of one
        self._level = current_level()
        self._begin = _sequence_number()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, with constants in place of tensors from outside."""
        if function in _LOOKS:  # these must answer for the tensors, and not for the constants
            return function(*[self._originals.get(id(arg), arg) for arg in args])
        if function is not computed:
            args, kwargs = _replaced(self._constant, args, kwargs or {})
        result = function(*args, **(kwargs or {}))
        _replaced(self._know, (result,), {})
        return result

    def constants(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of the function as constants, tensors from outside too.

        Raises:
            RuntimeError: a result has a derivative. It must come from a tensor that was not found.
        """
        outputs = [self._constant(output) for output in outputs]
        for output in outputs:
            base = at_level(output, self._level)
            if has_derivative(base) and not (requires_grad(base) and self._is_inner(base)):
                self._fail(output)
        return outputs

    def _know(self, tensor: Tensor) -> Tensor:
        self._known.add(id(tensor))
        return tensor

    def _constant(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._known:
            return tensor
        if id(tensor) in self._constants:
            return self._constants[id(tensor)]
        base = at_level(tensor, self._level)
        if base is tensor and (has_derivative(tensor) or is_batched(tensor)):
            if requires_grad(tensor) and any(number >= self._begin for number in _numbers(tensor)):
                self._fail(tensor)  # computed from something that was not found
            constant = tensor.detach()
            self.found.append((tensor, has_derivative(tensor)))
            self._constants[id(tensor)] = self._know(constant)
            self._originals[id(constant)] = tensor
            return constant
        if base is not tensor and id(base) not in self._known and has_derivative(base):
            self._fail(base)  # a transform has wrapped it
        if not (_functorch.is_functorch_wrapped_tensor(tensor) or tensor.is_inference()):
            self.others.append((weakref.ref(tensor), tensor._version))
        return self._know(tensor)

    def _is_inner(self, tensor: Tensor) -> bool:
        """Tell whether all tensors that autograd knows a tensor to depend on were made inside of the function."""
        for value in _unwrapped(tensor):
            if value.requires_grad and value.grad_fn is None and id(value) not in self._known:
                return False
        nodes: list[Any] = [value.grad_fn for value in _unwrapped(tensor) if value.grad_fn is not None]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            variable = getattr(node, "variable", None)
            if (node._sequence_nr() < self._begin) if variable is None else (id(variable) not in self._known):
                return False
            following = {parent for parent, _ in node.next_functions if parent is not None} - seen
            seen |= following
            nodes += following
        return True

    def _fail(self, tensor: Tensor) -> None:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} that the function closes over, or has computed from one, is "
            "given to a transform such as torch.func.grad, or comes from an autograd.Function, where checkpoint cannot "
            "see it: make what the function closes over an argument"
        )


class Substitute(TorchFunctionMode):
    """Puts other tensors in place of those that `Capture` found."""

    def __init__(self, found: Sequence[tuple[Tensor, bool]], others: Sequence[Tensor]) -> None:
        """Hold the tensors that were found, and a substitute for each."""
        super().__init__()
        self._found = found
        self._others = {id(tensor): other for (tensor, _), other in zip(found, others, strict=True)}
        self._met: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function with the substitutes."""
        args, kwargs = _replaced(self._other, args, kwargs or {})
        return function(*args, **kwargs)

    def others(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the results of the function, with the substitutes.

        Raises:
            RuntimeError: a tensor was not met this time.
        """
        outputs = [self._other(output) for output in outputs]
        for tensor, needed in self._found:
            if needed and id(tensor) not in self._met:
                raise RuntimeError(
                    f"A tensor of shape {tuple(tensor.shape)} was there when the function ran first, and not when it "
                    "ran again for the derivative: it must be a pure function, and make no tensor that requires grad"
                )
        return outputs

    def _other(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._others:
            return tensor
        self._met.add(id(tensor))
        return self._others[id(tensor)]


def check_unchanged(others: Sequence[tuple["weakref.ref[Tensor]", int]]) -> None:
    """Raise when a tensor from outside has been changed since `Capture` met it."""
    for reference, version in others:
        tensor = reference()
        if tensor is not None and tensor._version != version:
            raise RuntimeError(
                f"A tensor of shape {tuple(tensor.shape)} that the function closes over was changed in place before "
                "the derivative was taken, for which the function runs again: change it afterwards, or give a copy"
            )


def fingerprint(tensor: Tensor) -> Tensor:
    """Return two numbers that identify a tensor: a product with fixed weights, and the norm."""
    x = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    x = x.to(torch.float32 if x.dtype in HALF else x.dtype if x.is_floating_point() else torch.float64)
    x = x.flatten().nan_to_num(1.0, 2.0, -2.0)  # NaN is like NaN
    weights = torch.arange(1.0, 1 + x.numel(), dtype=x.dtype, device=x.device).sin()
    return torch.stack([(x * weights).sum(), torch.linalg.vector_norm(x)])


def check_repeated(first: Iterable[Tensor], again: Sequence[Tensor]) -> None:
    """Raise when the second results of a function do not match the fingerprints of its first results.

    The same computation may round differently where threads add up in another order. Therefore a difference of the
    square root of the precision, relative to the norm, is allowed.
    """
    for old, tensor in zip(first, again, strict=True):
        new = fingerprint(tensor)
        tolerance = torch.finfo(tensor.dtype if tensor.is_floating_point() else new.dtype).eps ** 0.5
        if _holds((new - old).abs() > tolerance * old[1]):
            raise RuntimeError(
                f"A result of shape {tuple(tensor.shape)} has other values now that the function runs again for the "
                "derivative, which would be wrong. It must do the same both times: draw random numbers from torch's "
                "default generators, or give them as arguments, and until the derivative is taken leave as they are "
                "the mode of modules (train, eval) and the Python values that the function reads"
            )


def _holds(condition: Tensor) -> bool:
    """Tell whether a condition holds anywhere, including all batches of torch.vmap."""
    *_, condition = _unwrapped(condition)
    with torch._C._DisableFuncTorch():
        return condition.device.type != "meta" and bool(condition.any())


def computed(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors that a transform has computed, and tell `Capture`, which sees only torch functions."""
    if has_torch_function(tensors):
        known: list[Tensor] = handle_torch_function(computed, tensors, tensors)
        return known
    return tensors


def current_level() -> int:
    """Count the levels of torch.func that are entered."""
    interpreter = _functorch.peek_interpreter_stack()
    return 0 if interpreter is None else interpreter.level()


def at_level(tensor: Tensor, level: int) -> Tensor:
    """Take a tensor out of deeper levels of torch.func."""
    return next(value for value in _unwrapped(tensor) if _functorch.maybe_get_level(value) <= level)


def is_batched(tensor: Tensor) -> bool:
    """Tell whether torch.vmap batches a tensor, at any level."""
    return any(_functorch.is_batchedtensor(value) for value in _unwrapped(tensor))


def _unwrapped(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor, and the tensors that it wraps, level by level."""
    yield tensor
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def _numbers(tensor: Tensor) -> list[int]:
    """Number the nodes with which autograd has recorded a tensor, at each level."""
    nodes: list[Any] = [value.grad_fn for value in _unwrapped(tensor)]
    return [node._sequence_nr() for node in nodes if node is not None]


def _sequence_number() -> int:
    """Number the next node that autograd makes."""
    with torch.enable_grad():
        node: Any = torch.ones((), requires_grad=True).view_as(torch.ones(())).grad_fn
    number: int = node._sequence_nr()
    return number


def _replaced(function: Callable[[Tensor], Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Apply a function to every tensor among arguments."""

    def leaf(arg: Any) -> Any:
        return function(arg) if isinstance(arg, Tensor) else arg

    def replaced(arg: Any) -> Any:
        return tree.map(leaf, arg) if isinstance(arg, list | tuple | dict) else leaf(arg)

    return tuple([replaced(arg) for arg in args]), {name: replaced(arg) for name, arg in kwargs.items()}
