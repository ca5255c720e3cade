"""The form in which a rule is given a tensor, and the way back.

Elementwise rules see complex tensors as pairs of reals, as torch.optim does; others see them as they are. float16 and
bfloat16 tensors are computed in float32 and rounded once at the end, as torch's fused kernels do.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_optim._core.checks import HALF

Columns: TypeAlias = Any
"""State of one rule for many tensors: its NamedTuple with a list, one entry a tensor, in each field."""


def widened(tensor: Tensor) -> Tensor:
    """Return halves in single precision."""
    return tensor.float() if tensor.dtype in HALF else tensor


def narrowed(tensor: Tensor, like: Tensor) -> Tensor:
    """Round to the dtype of another tensor."""
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def as_reals(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of reals."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def as_it_is(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


def each(function: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Apply a function to every tensor."""
    return tensors if function is as_it_is else [function(tensor) for tensor in tensors]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Make pairs of reals complex again."""
    if other.is_complex() and not tensor.is_complex():
        return torch.view_as_complex(tensor.contiguous())
    return tensor


def cast(given: Tensor, original: torch.dtype, to_number: bool, as_pairs: bool) -> Callable[[Any], Any]:
    """Return a function that turns a scalar into the number that rules compute with.

    Where torch.compile traces, each number is computed once. Its compiler would compute `beta ** step` again for every
    eight elements, in double precision, which takes twelve times as long as the rest of Adam.

    Args:
        given: a tensor as rules are given it.
        original: the dtype that it had.
        to_number: whether to make python numbers of tensors, on the CPU, where that waits for nothing.
        as_pairs: whether complex tensors are pairs of reals.
    """
    dtype = given.real.dtype if given.is_complex() else given.dtype
    compiled = torch.compiler.is_compiling()

    def converted(scalar: Any) -> Any:
        if callable(scalar):
            scalar = scalar(original)
        if isinstance(scalar, bool):  # a condition, for torch.where
            return torch.tensor(scalar, device=given.device)
        if not isinstance(scalar, Tensor):
            # A 0-dim float32 tensor times a python float has a float64 tangent under torch.func.jvp (torch 2.13).
            moving = forward_ad._current_level >= 0 and isinstance(scalar, float)
            return torch.full((), scalar, dtype=dtype, device=given.device) if moving else scalar
        if as_pairs and given.is_complex() and scalar.ndim > 0:  # one for each element, which is two reals here
            scalar = scalar.unsqueeze(-1)
        on_cpu = scalar.device.type == "cpu"
        if not scalar.is_floating_point():  # a condition stays one
            return scalar.to(given.device, non_blocking=on_cpu)
        if to_number and on_cpu and scalar.ndim == 0:
            return scalar.item()
        scalar = scalar.to(given.device, dtype, non_blocking=on_cpu)
        # The maximum of equal numbers, which torch's compiler gives a loop of its own; of fewer it may unroll it.
        return scalar.expand(16).amax() if compiled and scalar.ndim == 0 else scalar

    return converted


# States of many tensors: a NamedTuple of lists. ----------------------------------------------------------------------


def make(state_type: Any, fields: Sequence[Any]) -> Any:
    """Make a state of its fields."""
    return state_type(*fields) if fields else ()


def row(columns: Columns, i: int) -> Any:
    """Return the state of one tensor."""
    return make(type(columns), [column[i] for column in columns])


def map_columns(function: Callable[[Tensor], Tensor] | None, columns: Columns) -> Columns:
    """Apply a function to every tensor; without one, make empty columns."""
    return make(type(columns), [each(function, column) if function else [] for column in columns])


def zip_columns(function: Callable[[Tensor, Tensor], Tensor], columns: Columns, others: Columns) -> Columns:
    """Apply a function to every pair of tensors."""
    pairs = zip(columns, others, strict=True)
    return make(type(others), [[function(a, b) for a, b in zip(some, more, strict=True)] for some, more in pairs])
