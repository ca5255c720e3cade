"""Updates that torch.export exports. As a program it runs exported ones: arguments are pairs of files.

The first of a pair has the arguments, and is given the results; the second is the exported program.
"""

import sys
from typing import NamedTuple

import torch
from torch import nn

import functorch_optim as fo


@fo.leaf_state
class TotalState(NamedTuple):
    total: torch.Tensor


def summed(state_type):
    """Add up all gradients, in a state of this type."""

    def update(g, state, p, numbers):
        return state.total + g, state_type(state.total + g)

    return fo.leafwise(lambda p: state_type(torch.zeros_like(p)), update)


CASES = {
    "chain": fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10))),
    "masked": fo.masked(fo.adam(0.1), {"w": True, "b": False}),
    "partition": fo.partition({"a": fo.adam(0.1), "b": fo.muon(0.1)}, {"w": "b", "b": "a"}),
    "accumulate": fo.accumulate(fo.adam(0.1), 2),
    "quantized": fo.quantized(fo.adam(0.1)),
    "own": fo.chain(summed(TotalState), fo.sgd(0.1)),
}


class Step(nn.Module):
    """A functional step as a module, as torch.export takes it."""

    def __init__(self, tx):
        super().__init__()
        self.tx = tx

    def forward(self, grads, state, params):
        return fo.step(self.tx, grads, state, params)


class StepOfSaved(Step):
    """A step whose state comes and goes as a state dict."""

    def forward(self, grads, saved, params):
        params, state = super().forward(grads, fo.load_state_dict(self.tx.init(params), saved), params)
        return params, fo.state_dict(state)


def arguments_of(tx):
    """Return (grads, state, params) after a step."""
    params = {"w": torch.linspace(-1, 1, 12).reshape(4, 3), "b": torch.ones(3)}
    grads = fo.tree.map(torch.cos, params)
    params, state = fo.step(tx, grads, tx.init(params), params)
    return fo.tree.map(torch.sin, grads), state, params


if __name__ == "__main__":
    import export_cases  # noqa: F401 - the states have the name of the module, and not that of a program

    for arguments, file in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        torch.save(torch.export.load(file).module()(*torch.load(arguments)), arguments)
