"""Sharded tensors (DTensor): their local shards, whole tensors made of them, and numbers of all ranks.

Elementwise rules need no other rank: they run on the local shards as they would on any tensors. Other rules are given
whole tensors. A number of all ranks, such as a global norm, takes one collective for each mesh.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._execution.mode import Plain, as_plain

_MODULE = "torch.distributed.tensor"  # imported by those who make sharded tensors


class Layout(NamedTuple):
    """The places of a tensor's shards.

    Attributes:
        mesh: the ranks.
        placements: for each dimension of the mesh, Shard or Replicate.
        shape: of the whole tensor.
        stride: of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def shard(self, tensor: Tensor) -> Tensor:
        """Return the local shard of a tensor, sharded or whole, which is brought into this layout."""
        if not is_sharded(tensor):
            return self.cut(tensor)
        given: Any = tensor
        if given.device_mesh != self.mesh:
            return self.cut(given.full_tensor())
        if given.placements != self.placements:
            given = given.redistribute(placements=self.placements)
        return local(given)

    def joined(self, shard: Tensor) -> Tensor:
        """Return the sharded tensor that a local shard is of."""
        return _dtensor().from_local(  # type: ignore[no-any-return]
            shard, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def whole(self, shard: Tensor) -> Tensor:
        """Return the whole tensor, which all ranks then have."""
        return local(self.joined(shard).full_tensor())  # type: ignore[attr-defined]

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the local shard of a whole tensor that all ranks have."""
        everywhere = _dtensor().from_local(tensor, self.mesh, _replicated(self.mesh), run_check=False)
        return local(everywhere.redistribute(placements=self.placements))

    def places(self) -> Tensor:
        """Return the index of each element of the local shard in the flattened whole tensor: int64."""
        found = torch.zeros((), dtype=torch.int64, device=self.mesh.device_type)
        for d, length in enumerate(self.shape):
            along = torch.arange(length, device=self.mesh.device_type).reshape(-1, *[1] * (len(self.shape) - d - 1))
            found = found * length + self.cut(along.expand(self.shape))
        return found

    def of_shape(self, shape: Sequence[int]) -> Layout:
        """Return the layout of a tensor of another shape that is cut alike."""
        return Layout(self.mesh, self.placements, torch.Size(shape), _strides(shape))

    def of_vectors(self, length: int) -> Layout:
        """Return the layout of a tensor of vectors, one for each shard: the dimensions before are those of the mesh."""
        dims = [d for d, placement in enumerate(self.placements) if not placement.is_replicate()]
        placements = _replicated(self.mesh)
        for k, d in enumerate(dims):
            placements[d] = _module().Shard(k)
        shape = [*[self.mesh.shape[d] for d in dims], length]
        return Layout(self.mesh, tuple(placements), torch.Size(shape), _strides(shape))

    @property
    def chunked(self) -> list[int] | None:
        """List the dimensions of the mesh that cut the tensor as `torch.chunk` does, one after the other.

        Shards with strides, as those of FSDP over tensor parallelism, are chunks where the later dimensions cut first.
        None where they are no chunks.
        """
        dims = [d for d, placement in enumerate(self.placements) if not placement.is_replicate()]
        strided = [d for d in dims if type(self.placements[d]) is not _module().Shard]
        for d in strided:
            later = [e for e in dims if e > d and self.placements[e].dim == self.placements[d].dim]
            if getattr(self.placements[d], "split_factor", None) != math.prod([self.mesh.shape[e] for e in later]):
                return None
        return [d for d in dims if d not in strided] + strided[::-1]

    def cuts(self, dim: int) -> bool:
        """Tell whether a dimension of the tensor is cut."""
        return any(not placement.is_replicate() and placement.dim == dim for placement in self.placements)

    @property
    def largest(self) -> int:
        """Return the number of elements of the largest shard."""
        shape = list(self.shape)
        for placement, size in zip(self.placements, self.mesh.shape, strict=True):
            if not placement.is_replicate():
                shape[placement.dim] = -(-shape[placement.dim] // size)
        return math.prod(shape)

    @property
    def shards(self) -> int:
        """Return the number of shards."""
        sizes = zip(self.placements, self.mesh.shape, strict=True)
        return math.prod([size for placement, size in sizes if not placement.is_replicate()])

    @property
    def counts(self) -> bool:
        """Tell whether this rank's shard is the one that counts, of those that are equal on several ranks."""
        places = zip(self.placements, self.mesh.get_coordinate() or (), strict=False)
        return not any(placement.is_replicate() and coordinate for placement, coordinate in places)


def is_sharded(tensor: Any) -> bool:
    """Tell whether this is a DTensor."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def some_sharded(tensors: Sequence[Any]) -> bool:
    """Tell whether one of several tensors is sharded."""
    return not isinstance(tensors, Plain) and any(map(is_sharded, tensors))


def everywhere(tensor: Tensor, mesh: Any) -> Layout:
    """Return the layout of a tensor that is the same on all ranks of a mesh."""
    return Layout(mesh, tuple(_replicated(mesh)), tensor.shape, tensor.stride())


def layout_of(tensor: Any) -> Layout | None:
    """Return the layout of a sharded tensor; partial sums count as replicated."""
    if not is_sharded(tensor):
        return None
    placements = tensor.placements
    if any([placement.is_partial() for placement in placements]):  # noqa: C419
        [replicate, *_] = _replicated(tensor.device_mesh)
        placements = tuple([replicate if placement.is_partial() else placement for placement in placements])
    return Layout(tensor.device_mesh, placements, tensor.shape, tensor.stride())


def on_shards(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Compute an elementwise function that depends on places, of tensors of one shape; on the shards of sharded ones.

    Args:
        function: (*tensors, places) -> tensor. A place is the index of an element in the flattened whole tensor: int64.
        tensors: sharded as the first.
    """
    layout, first = layout_of(tensors[0]), tensors[0]
    if layout is None:
        return function(*tensors, torch.arange(first.numel(), device=first.device).reshape(first.shape))
    return layout.joined(function(*map(layout.shard, tensors), layout.places()))


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, sharded or the same on all ranks, sharded as another."""
    layout = layout_of(like)
    if layout is None or layout == layout_of(tensor):
        return tensor
    return layout.joined(layout.shard(tensor))


def local(tensor: Any) -> Tensor:
    """Return the local shard of a sharded tensor; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    shard = tensor.to_local() if torch.is_grad_enabled() and tensor.requires_grad else tensor._local_tensor
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


def is_of(shard: Any, tensor: Any) -> bool:
    """Tell whether this is the local shard of a sharded tensor."""
    return is_sharded(tensor) and tensor._local_tensor is shard


def over_ranks(
    tensors: Sequence[Tensor], of_some: Callable[[list[Tensor]], Tensor], combined: Callable[[Tensor], Tensor]
) -> Tensor:
    """Compute a number of all elements of tensors, sharded ones and others, by one collective for each mesh.

    Args:
        tensors: the tensors. The others are the same on all ranks.
        of_some: local tensors -> their number, 0-dim.
        combined: vector of numbers -> the number of all.
    """
    layouts = [layout_of(tensor) for tensor in tensors]
    meshes = {layout.mesh: layout.mesh for layout in layouts if layout is not None}
    plain = [tensor for tensor, layout in zip(tensors, layouts, strict=True) if layout is None]
    numbers = [of_some(plain).reshape(1)] if plain else []
    for mesh in meshes:
        own = [(t, layout) for t, layout in zip(tensors, layouts, strict=True) if layout and layout.mesh == mesh]
        shards = [(layout.shard(tensor), layout.counts) for tensor, layout in own]
        counted = [shard for shard, counts in shards if counts and shard.numel()]
        if not counted:  # all ranks take part in derivatives
            counted = [shard.flatten()[:0].sum() for shard, _ in shards]
        one = of_some(as_plain(counted)).reshape(1)
        numbers.append(gathered(one, mesh))
    number = combined(torch.cat([number.to(numbers[0].device) for number in numbers]))
    return summed_gradient(number, max(meshes, key=_size)) if number.requires_grad else number


def _size(mesh: Any) -> int:
    size: int = mesh.size()
    return size


def summed_gradient(number: Tensor, mesh: Any) -> Tensor:
    """Return a number whose derivative is the sum over the ranks of a mesh, each of which has its own shards."""
    everywhere = _dtensor().from_local(number, mesh, _replicated(mesh), run_check=False)
    return everywhere.to_local(grad_placements=_partial(mesh))  # type: ignore[no-any-return]


def gathered(numbers: Tensor, mesh: Any) -> Tensor:
    """Collect the numbers of all ranks of a mesh, along the first dimension."""
    shard = _module().Shard(0)
    each = _dtensor().from_local(numbers, mesh, [shard] * mesh.ndim, run_check=False)
    for done in reversed(range(mesh.ndim)):  # torch warns of two dimensions at once
        each = each.redistribute(placements=[shard] * done + _replicated(mesh)[done:])
    return local(each)


def _replicated(mesh: Any) -> list[Any]:
    return [_module().Replicate()] * mesh.ndim


def _partial(mesh: Any) -> list[Any]:
    return [_module().Partial()] * mesh.ndim


def _dtensor() -> Any:
    return _module().DTensor


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _module() -> Any:
    return sys.modules[_MODULE]
