"""A rule with two tensors in its state, as a program."""

from typing import NamedTuple

import torch

from functorch_optim._core.rule import Rule
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage


class Two(NamedTuple):
    """A state of two tensors."""

    a: torch.Tensor
    b: torch.Tensor


LIKE = torch.empty(0, dtype=torch.float64)
STATE = Two(LIKE, LIKE)


def recorded(update, numbers=(), state=STATE, like=LIKE):
    return record([Stage(Rule(None, update, elementwise=True))], [state], True, [numbers], like)
