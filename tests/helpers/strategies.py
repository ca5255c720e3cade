"""Random trees of tensors, those of the test kit with a dataclass among the nodes; and links of random chains."""

from functools import partial
from typing import Any

import optree
import torch
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim.testing.strategies import Pair

__all__ = ["LINKS", "Layer", "Pair", "trees"]


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Layer:
    """A dataclass that is a node."""

    weight: Any
    bias: Any


trees = partial(testing.trees, nodes=(Layer,))


def not_scalars(params):
    return fo.tree.map(lambda p: p.ndim > 0, params)


LINKS = st.sampled_from(
    [
        fo.identity(),
        fo.scale(-0.7),
        fo.maximize(),
        fo.zero_nans(),
        fo.clip(0.5),
        fo.clip_by_norm(0.5),
        fo.clip_by_global_norm(0.5),
        fo.add_decayed_weights(0.1),
        fo.scale_by_schedule(fo.schedules.cosine(1.0, 3)),
        fo.trace(0.8, 0.1),
        fo.trace(0.8, nesterov=True),
        fo.scale_by_adam(eps=1e-3),
        fo.scale_by_adam(eps=1e-3, amsgrad=True),
        fo.scale_by_adadelta(eps=1e-3),
        fo.sgd(0.1, 0.9),
        fo.adamw(0.1, eps=1e-3),
        fo.stateless(lambda updates, params: fo.tree.map(torch.sin, updates)),
        fo.masked(fo.trace(0.9), not_scalars),
        fo.partition({True: fo.chain(fo.clip_by_global_norm(0.5), fo.sgd(0.1)), False: fo.adam(0.1)}, not_scalars),
    ]
)
