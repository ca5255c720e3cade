"""How a rule is run over many tensors: the only place that knows.

| way | when |
|---|---|
| tensor by tensor (`reference.py`) | always right: in what `torch.compile` traces, on tensor subclasses such as DTensor, for rules that need their tensor whole, and in all other cases |
| flat (`flat.py`) | elementwise rules on many small tensors that are differentiated or vmapped: once on all of them, end to end |
| recomputed (`recomputed.py`) | elementwise rules on large tensors that autograd differentiates: it saves what they are given, and they run again in backward |
| in blocks (`blocks.py`) | on the CPU, where nothing is differentiated: elementwise rules on large tensors, recorded as a program |
| foreach (`foreach.py`) | the same on small tensors and on other devices: each torch function is one kernel over a list of tensors |

Sparse updates are run as what they are: the values of some entries, each with its own state.
"""  # noqa: E501

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.rule import Rule
from functorch_optim._execution.blocks import in_blocks
from functorch_optim._execution.flat import can_join, flat
from functorch_optim._execution.foreach import foreach
from functorch_optim._execution.recomputed import can_recompute, recomputed
from functorch_optim._execution.reference import tensor_by_tensor
from functorch_optim._execution.representation import (
    Columns,
    as_it_is,
    as_reals,
    cast,
    each,
    like,
    map_columns,
    narrowed,
    widened,
    zip_columns,
)
from functorch_optim._execution.ways import can_batch, can_block

COMPILED_LARGE = 1 << 16
"""Elements of all tensors from which on it pays that a compiler computes numbers once; it takes time to compile."""


def run(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules, one after the other, on each of many tensors.

    Args:
        rules: the links of a chain.
        updates: one tensor for each parameter, at least one; all of one device and dtype. A sparse one comes alone.
        states: for each rule, its state for these parameters.
        params: the parameters, where they were given.
        scalars: for each rule, what its `scalars` returned: in any tree, numbers, 0-dim float64 tensors, and functions
            that make a number of the dtype of the parameters. For a parameter that comes alone, tensors may also have a
            number for each element.

    Returns:
        The transformed updates, and for each rule its new state.
    """
    if updates[0].layout == torch.sparse_coo:
        return _run_touched(rules, updates[0], states, params, scalars)
    eagerly = can_batch([*updates, *(params or ())], states, scalars)
    blockwise = eagerly and can_block(updates[0], scalars)
    one_program = blockwise and all(rule.elementwise for rule in rules)
    compiled_large = torch.compiler.is_compiling() and sum([update.numel() for update in updates]) >= COMPILED_LARGE
    widen = as_it_is if one_program else widened  # blocks are widened one at a time
    new_updates = each(widen, updates)
    new_states = [map_columns(widen, state) for state in states]
    wide_params = each(widen, params) if params is not None else None
    given = [*updates, *(params or ()), *[tensor for state in states for column in state for tensor in column]]
    versions = _versions(given) if eagerly else []
    for elementwise, members in groupby(range(len(rules)), key=lambda k: rules[k].elementwise):
        links = list(members)
        view = as_reals if elementwise and updates[0].is_complex() else as_it_is
        sample = widened(new_updates[0].new_empty(0)) if one_program else new_updates[0]
        converted = cast(sample, updates[0].dtype, to_number=eagerly, as_pairs=elementwise, once=compiled_large)
        arguments = (
            each(view, new_updates),
            [map_columns(view, new_states[k]) for k in links],
            each(view, wide_params) if wide_params is not None else None,
            tree.map(converted, [scalars[k] for k in links]),
        )
        way = tensor_by_tensor
        if elementwise and blockwise:
            way = in_blocks
        elif elementwise and eagerly and len(updates) > 1:
            way = foreach
        elif elementwise and can_join(*arguments):
            way = flat
        elif elementwise and can_recompute(*arguments):
            way = recomputed
        results, columns = way([rules[k] for k in links], *arguments)
        if not elementwise and any(new.shape != view(old).shape for new, old in zip(results, new_updates, strict=True)):
            new_updates = results  # it has not kept shapes, which is found there where paths are known
            break
        if view is as_reals:
            results = [like(new, old) for new, old in zip(results, new_updates, strict=True)]
            columns = [zip_columns(like, column, new_states[k]) for k, column in zip(links, columns, strict=True)]
        new_updates = results
        for k, column in zip(links, columns, strict=True):
            new_states[k] = column
    if eagerly and versions != _versions(given):
        names = ", ".join([rule.name for rule in rules])
        raise TypeError(f"A rule must not modify its arguments, but one of these did: {names}")
    return (
        [narrowed(new, old) for new, old in zip(new_updates, updates, strict=True)],
        [zip_columns(narrowed, new, old) for new, old in zip(new_states, states, strict=True)],
    )


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # tensors of inference mode have none
        return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _run_touched(
    rules: Sequence[Rule],
    update: Tensor,
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules on those entries of one tensor that its sparse update has."""
    indices = tuple(update.indices())

    def touched(dense: Tensor) -> Tensor:
        return dense[indices]

    def touched_numbers(scalar: Any) -> Any:
        each = isinstance(scalar, Tensor) and scalar.ndim > 0
        return touched(scalar.expand(update.shape)) if each else scalar

    [values], some = run(
        rules,
        [update.values()],
        [map_columns(touched, state) for state in states],
        [touched(p) for p in params] if params is not None else None,
        tree.map(touched_numbers, list(scalars)),
    )
    new_states = [
        zip_columns(lambda new, old: old.index_put(indices, new), new, old)
        for new, old in zip(some, states, strict=True)
    ]
    sparse = torch.sparse_coo_tensor(update.indices(), values, update.shape, is_coalesced=True, check_invariants=False)
    return [sparse], new_states
