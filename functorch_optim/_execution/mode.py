"""How torch treats tensors at present; a call of this library asks once."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Mode: TypeAlias = Literal["compiled", "transformed", "watched", "recorded", "plain"]
"""compiled: torch.compile traces; transformed: by torch.func, in forward mode, or by make_fx; watched: by another
dispatch mode, such as FlopCounterMode; recorded: autograd records operations that need derivatives; plain: none."""

PLAIN = (Tensor, torch.nn.Parameter)
PLAIN_TYPES = frozenset(PLAIN)
"""The types of tensors that all machines take; others go tensor by tensor; of a DTensor the local shard is taken."""


def current() -> Mode:
    """Ask torch for the mode."""
    if torch.compiler.is_compiling():
        return "compiled"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "transformed"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "watched" if get_proxy_mode() is None else "transformed"
    return "recorded" if torch.is_grad_enabled() else "plain"


@contextmanager
def lasting() -> Iterator[None]:
    """Make tensors that may be written to at any time; those made in inference mode may be written to only there."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Switch torch.autocast off for a type of device; a step within it would round the products of matrices."""
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def is_plain(mode: Mode, tensors: Sequence[Any]) -> bool:
    """Tell whether tensors may be cut, put together and overwritten: plain ones, of which no derivative is wanted."""
    if mode in ("compiled", "transformed", "watched"):
        return False
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if any(type(tensor) not in PLAIN for tensor in tensors):
        return False
    return mode == "plain" or not any(tensor.requires_grad for tensor in tensors)


def wants_derivatives(tensors: Sequence[Any]) -> bool:
    """Tell whether derivatives with respect to tensors are recorded, or carried along."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


class Plain(list[Tensor]):
    """A list of tensors that may be given to foreach kernels: of one dtype, plain, and without derivatives.

    Attributes:
        fuses: whether the user wants compiled functions.
    """

    fuses = False


def as_plain(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors as a list that may be given to foreach kernels, where that is so."""
    alike = len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
    mode = current()
    return Plain(tensors) if alike and mode in ("plain", "recorded") and is_plain(mode, tensors) else tensors
