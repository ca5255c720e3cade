"""The memory of tensors that are alive, whoever keeps them: python, an autograd graph, a transform of torch.func."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Alive(TorchDispatchMode):
    """Counts what is made inside of it and is still there.

    Attributes:
        bytes: of all tensors; those that share memory count once.
        peak: the largest number of bytes so far.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._storages = {}

    def __len__(self):
        """Return the number of tensors that do not share memory."""
        return len(self._storages)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._storages:
                self._add(storage)
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()

        def forget(_):
            self.bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, forget)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(function):
    """Return the largest number of bytes that tensors made by a call have at one time."""
    with Alive() as alive:
        function()
    return alive.peak
