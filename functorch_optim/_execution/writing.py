"""Writing to tensors that are there."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from functorch_optim._execution.mode import PLAIN
from functorch_optim._execution.sharded import is_sharded, layout_of, local

_CreationMeta: Any = torch._C._autograd.CreationMeta
_creation_meta: Any = torch._C._autograd._get_creation_meta


def is_plain_type(tensor: Tensor) -> bool:
    """Tell whether this is a tensor, and none of a class derived from it."""
    return type(tensor) in PLAIN


def can_overwrite(updates: list[Tensor], columns: Sequence[list[Tensor]]) -> bool:
    """Tell whether parameters and states can be overwritten while updates are read."""
    written = [tensor for column in columns for tensor in column]
    everything = [*updates, *written]
    if (
        any(map(Tensor.is_inference, written))
        or any(map(Tensor.is_conj, everything))
        or any(map(Tensor.is_neg, everything))
    ):
        return False
    if any([tensor.layout != torch.strided for tensor in everything]):  # noqa: C419
        return False
    if all(map(Tensor.is_contiguous, everything)) and _are_apart(everything):
        return True
    return not any(map(is_expanded, written)) and not share_memory(updates, written)


def _are_apart(tensors: Sequence[Tensor]) -> bool:
    """Tell whether contiguous tensors have no memory in common."""
    spans = sorted([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.nbytes])
    return all([start + size <= after for (start, size), (after, _) in pairwise(spans)])  # noqa: C419


def is_room_for(old: Any, new: Any) -> bool:
    """Tell whether a tensor may be overwritten by another, which holds no graph."""
    if is_sharded(old) and is_sharded(new) and old is not new:
        return not new.requires_grad and layout_of(old) == layout_of(new) and is_room_for(local(old), local(new))
    return (
        type(old) in PLAIN
        and type(new) in PLAIN
        and old is not new
        and (old.shape, old.dtype, old.device, old.layout) == (new.shape, new.dtype, new.device, new.layout)
        and not (old.requires_grad or new.requires_grad or old.is_inference())
        and not is_expanded(old)
    )


def is_expanded(tensor: Tensor) -> bool:
    """Tell whether elements of a tensor share memory, as after expand."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return shared and tensor.numel() > 0


def copy_(old: list[Tensor], new: list[Tensor]) -> None:
    """Overwrite tensors, of any dtypes and devices, by others like them."""
    if old:
        torch._foreach_copy_(list(map(local, old)), list(map(local, new)))
        torch.autograd.graph.increment_version([tensor for tensor in old if is_sharded(tensor)])


def check_writable(params: list[Tensor], path: Callable[[int], str]) -> None:
    """Raise when a parameter cannot be added to in place.

    Raises:
        RuntimeError: autograd or inference mode forbids it, or elements of the parameter share memory.
    """
    for i, p in enumerate(params):
        if torch.is_grad_enabled() and p.is_leaf and p.requires_grad:
            raise RuntimeError(
                f"The parameter {path(i)!r} is a leaf that requires grad: with differentiable=True it cannot be "
                "updated in place. Give a copy that autograd knows: p.clone()"
            )
        if torch.is_grad_enabled() and p._is_view() and _creation_meta(p) != _CreationMeta.DEFAULT:
            raise RuntimeError(
                f"The parameter {path(i)!r} is a view that autograd forbids to write to, as those from split, chunk "
                "and unbind are: give p.clone()"
            )
        if p.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"The parameter {path(i)!r} was made in inference mode, and can only be written to there: step within "
                "torch.inference_mode(), or give p.clone()"
            )
        if is_expanded(p):
            raise RuntimeError(f"Elements of the parameter {path(i)!r} share memory, as after expand: give p.clone()")


def check_apart(params: list[Tensor], path: Callable[[int], str]) -> None:
    """Raise when two parameters begin at the same place: an addition to one would change the other too.

    Raises:
        RuntimeError: they do.
    """
    places: dict[int, int] = {}
    for i, p in enumerate(params):
        if type(p) in PLAIN and p.numel() and not p.is_meta:
            first = places.setdefault(p.data_ptr(), i)
            if first != i:
                raise RuntimeError(
                    f"The parameters {path(first)!r} and {path(i)!r} share memory, so that both of their updates would "
                    "be added to it: leave one of them out, as named_parameters() does, or give p.clone()"
                )


def unshared(given: list[Any]) -> Callable[[Any], Any]:
    """Return a function that clones a tensor that shares memory with a given one, which is about to change."""
    shards = list(map(local, given))
    plain = [tensor for tensor in shards if type(tensor) in PLAIN and tensor.layout == torch.strided]
    starts = {tensor.data_ptr() for tensor in plain}
    storages = {tensor.untyped_storage().data_ptr() for tensor in plain}

    def unshare(tensor: Any) -> Any:
        shard = local(tensor)
        if type(shard) not in PLAIN or shard.layout != torch.strided:
            return tensor
        view = shard._is_view() and shard.untyped_storage().data_ptr() in storages
        return tensor.clone() if view or shard.data_ptr() in starts else tensor

    return unshare


def unmodified(params: list[Tensor]) -> list[Tensor]:
    """Return parameters that may be modified in place while autograd remembers results of these."""
    return [p.clone() for p in params] if torch.is_grad_enabled() else params


def share_memory(read: list[Tensor], written: list[Tensor]) -> bool:
    """Tell whether tensors that are to be written, or one of them and one that is to be read, have memory in common."""

    def extent(tensor: Tensor) -> tuple[int, int]:
        start = tensor.data_ptr()
        span = sum([(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)])
        return start, start + (span + 1) * tensor.element_size()

    extents = [(*extent(tensor), True) for tensor in written if tensor.numel()]
    extents += [(*extent(tensor), False) for tensor in read if tensor.numel()]
    end, end_of_written = -1, -1
    for start, stop, is_written in sorted(extents):
        if start < end_of_written or (is_written and start < end):
            return True
        end = max(end, stop)
        end_of_written = max(end_of_written, stop if is_written else -1)
    return False


def versions(tensors: list[Tensor]) -> list[int]:
    """List how often tensors were written to."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [tensor._version for tensor in tensors if not tensor.is_inference()]
