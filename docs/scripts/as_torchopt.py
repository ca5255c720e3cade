"""functorch_optim for programs that were written for TorchOpt: `import as_torchopt as torchopt`."""

from typing import NamedTuple

import torch

import functorch_optim as fo


class Transformation(NamedTuple):
    tx: fo.GradientTransformation

    def init(self, params):
        return self.tx.init(params)

    def update(self, updates, state, *, params=None, inplace=True, **extra):
        leaves, structure = fo.tree.flatten(updates)
        if params is not None:  # a list may come with a tuple of gradients
            updates = fo.tree.unflatten(fo.tree.flatten(params)[1], leaves)
        updates, new = self.tx.update(updates, state, params, **extra)
        if inplace:  # programs may go on with the state that they gave
            new = overwrite(state, new)
        return fo.tree.unflatten(structure, fo.tree.flatten(updates)[0]), new


def apply_updates(params, updates, *, inplace=True):
    new = fo.apply_updates(params, updates)
    return overwrite(params, new) if inplace else new


@torch.no_grad()
def overwrite(old, new):
    new = fo.tree.map(torch.clone, new)  # they may share memory
    return fo.tree.map(lambda old, new: old.copy_(new), old, new)


def __getattr__(name):  # adam, sgd, chain, ...
    def make(*args, **kwargs):
        tx = getattr(fo, name)(*[arg.tx if isinstance(arg, Transformation) else arg for arg in args], **kwargs)
        return Transformation(tx)

    return make
