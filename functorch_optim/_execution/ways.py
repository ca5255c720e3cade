"""What the tensors allow."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_optim import tree
from functorch_optim._execution.representation import Columns

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that foreach ops and blocks take; others, such as DTensor, go tensor by tensor."""


def can_batch(tensors: list[Tensor], states: Sequence[Columns], scalars: Sequence[Any]) -> bool:
    """Tell whether tensors may be cut and put together: eagerly, plain ones, where no derivative is wanted."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    numbers = [leaf for leaf in tree.flatten(list(scalars))[0] if isinstance(leaf, Tensor)]
    everything = tensors + numbers + [tensor for columns in states for column in columns for tensor in column]
    if any(type(tensor) not in PLAIN for tensor in everything):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in everything))


def can_block(update: Tensor, scalars: Sequence[Any]) -> bool:
    """Tell whether tensors that may be batched may also be cut: on the CPU, where calls cost little."""
    numbers = [leaf for leaf in tree.flatten(list(scalars))[0] if isinstance(leaf, Tensor)]
    return update.device.type == "cpu" and all(number.ndim == 0 for number in numbers)
