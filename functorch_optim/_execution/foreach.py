"""Foreach: each torch function of an elementwise rule is one kernel over a list of tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.checks import HALF
from functorch_optim._core.rule import Rule
from functorch_optim._execution.reference import applied
from functorch_optim._execution.representation import Columns, make
from functorch_optim._execution.tensor_list import TensorList
from functorch_optim._execution.ways import can_batch
from functorch_optim._numerics import safe_norm


def norms(tensors: list[Tensor], p: float) -> list[Tensor]:
    """Take the p-norm of each of many tensors; see `safe_norm`."""
    plain = tensors and all(t.dtype == tensors[0].dtype and t.layout == torch.strided and t.numel() for t in tensors)
    if not plain or tensors[0].is_complex() or not can_batch(tensors, (), ()):
        return [safe_norm(tensor, p) for tensor in tensors]
    dtype = torch.float32 if tensors[0].dtype in HALF else tensors[0].dtype
    return list(torch._foreach_norm(tensors, p, dtype=dtype))


def foreach(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, on lists of tensors that answer like one."""
    g = TensorList(updates)
    p = TensorList(params) if params is not None else None
    new_states: list[Columns] = []
    for rule, columns, s in zip(rules, states, scalars, strict=True):
        state = make(type(columns), [TensorList(column) for column in columns])
        g, state = applied(rule, g, state, p, s)
        new_states.append(make(type(columns), [tensor_list.tensors for tensor_list in state]))
    return g.tensors, new_states
