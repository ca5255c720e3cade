"""Random trees of tensors: those of the test kit, with a dataclass among the nodes."""

from functools import partial
from typing import Any

import optree

from functorch_optim import testing
from functorch_optim.testing.strategies import Pair

__all__ = ["Layer", "Pair", "trees"]


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Layer:
    """A dataclass that is a node."""

    weight: Any
    bias: Any


trees = partial(testing.trees, nodes=(Layer,))
