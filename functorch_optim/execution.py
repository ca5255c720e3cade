"""How a rule is run over many tensors: the only place that knows.

Two ways, chosen from what the tensors are:

- tensor by tensor: right everywhere, and the reference for the other. It runs inside `torch.func` transforms, in
  functions that `torch.compile` traces, wherever a gradient is wanted, on tensor subclasses such as DTensor, and for
  rules that need their tensor whole.
- foreach: eagerly and without grad, a list of tensors that answers like one tensor turns each torch op of an
  elementwise rule into one `torch._foreach_*` call.

Elementwise rules see complex tensors as pairs of reals, as torch.optim does; others see them as they are. float16 and
bfloat16 tensors are computed in float32 and rounded once at the end, as torch's fused kernels do. Sparse updates are
run as what they are: the values of some entries, each with its own state.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_optim import tree
from functorch_optim.checks import HALF
from functorch_optim.rule import Rule
from functorch_optim.tensor_list import TensorList

_CreationMeta: Any = torch._C._autograd.CreationMeta
_creation_meta: Any = torch._C._autograd._get_creation_meta

PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that foreach ops take; others, such as DTensor, go tensor by tensor."""

Columns: TypeAlias = Any
"""State of one rule for many tensors: its NamedTuple with a list, one entry a tensor, in each field."""


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
    eagerly = _can_batch([*updates, *(params or ())], states, scalars)
    new_updates = [_widened(update) for update in updates]
    new_states = [_map_columns(_widened, state) for state in states]
    wide_params = [_widened(param) for param in params] if params is not None else None
    given = [*updates, *(params or ()), *[tensor for state in states for column in state for tensor in column]]
    versions = [tensor._version for tensor in given if not tensor.is_inference()] if eagerly else []
    for elementwise, members in groupby(range(len(rules)), key=lambda k: rules[k].elementwise):
        links = list(members)
        view = _as_reals if elementwise else _as_it_is
        cast = _cast(new_updates[0], updates[0].dtype, to_number=eagerly, as_pairs=elementwise)
        way = _foreach if eagerly and elementwise and len(updates) > 1 else _tensor_by_tensor
        results, columns = way(
            [rules[k] for k in links],
            [view(update) for update in new_updates],
            [_map_columns(view, new_states[k]) for k in links],
            [view(param) for param in wide_params] if wide_params is not None else None,
            [tree.map(cast, scalars[k]) for k in links],
        )
        new_updates = [_like(new, old) for new, old in zip(results, new_updates, strict=True)]
        for k, column in zip(links, columns, strict=True):
            new_states[k] = _zip_columns(_like, column, new_states[k])
    if eagerly and versions != [tensor._version for tensor in given if not tensor.is_inference()]:
        names = ", ".join([rule.name for rule in rules])
        raise TypeError(f"A rule must not modify its arguments, but one of these did: {names}")
    return (
        [_narrowed(new, old) for new, old in zip(new_updates, updates, strict=True)],
        [_zip_columns(_narrowed, new, old) for new, old in zip(new_states, states, strict=True)],
    )


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
        [_map_columns(touched, state) for state in states],
        [touched(p) for p in params] if params is not None else None,
        tree.map(touched_numbers, list(scalars)),
    )
    new_states = [
        _zip_columns(lambda new, old: old.index_put(indices, new), new, old)
        for new, old in zip(some, states, strict=True)
    ]
    sparse = torch.sparse_coo_tensor(update.indices(), values, update.shape, is_coalesced=True, check_invariants=False)
    return [sparse], new_states


def add_(params: list[Tensor], updates: list[Tensor]) -> None:
    """Add updates to parameters in place."""
    sparse = any(update.layout != torch.strided for update in updates)
    if sparse or torch.is_grad_enabled() or not _can_batch([*params, *updates], (), ()):
        for p, u in zip(params, updates, strict=True):
            p.add_(u)
    elif params:
        torch._foreach_add_(params, updates)


def is_room_for(old: Any, new: Any) -> bool:
    """Tell whether a tensor may be overwritten by another, which holds no graph."""
    return (
        type(old) in PLAIN
        and type(new) in PLAIN
        and old is not new
        and (old.shape, old.dtype, old.device, old.layout) == (new.shape, new.dtype, new.device, new.layout)
        and not (old.requires_grad or new.requires_grad or old.is_inference())
        and not any(stride == 0 and size > 1 for stride, size in zip(old.stride(), old.shape, strict=True))
    )


def copy_(old: list[Tensor], new: list[Tensor]) -> None:
    """Overwrite tensors, of any dtypes and devices, by others like them."""
    if old:
        torch._foreach_copy_(old, new)


def check_writable(params: list[Tensor], path: Callable[[int], str]) -> None:
    """Raise when a parameter cannot be added to in place.

    Raises:
        RuntimeError: autograd forbids it, or elements of the parameter share memory.
    """
    for i, p in enumerate(params):
        if torch.is_grad_enabled() and p.is_leaf and p.requires_grad:
            raise RuntimeError(
                f"The parameter {path(i)!r} is a leaf that requires grad: with differentiable=True it cannot be "
                "updated in place. Give a copy that autograd knows: p.clone()"
            )
        if torch.is_grad_enabled() and p._is_view() and _creation_meta(p) != _CreationMeta.DEFAULT:
            raise RuntimeError(
                f"The parameter {path(i)!r} is a view that autograd forbids to write to, as those from split, chunk "
                "and unbind are: give p.clone()"
            )
        if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
            raise RuntimeError(f"Elements of the parameter {path(i)!r} share memory, as after expand: give p.clone()")


def unshared(given: list[Any]) -> Callable[[Any], Any]:
    """Return a function that clones a tensor that shares memory with a given one, which is about to change."""
    plain = [tensor for tensor in given if type(tensor) in PLAIN and tensor.layout == torch.strided]
    starts = {tensor.data_ptr() for tensor in plain}
    storages = {tensor.untyped_storage().data_ptr() for tensor in plain}

    def unshare(tensor: Any) -> Any:
        if type(tensor) not in PLAIN or tensor.layout != torch.strided:
            return tensor
        view = tensor._is_view() and tensor.untyped_storage().data_ptr() in storages
        return tensor.clone() if view or tensor.data_ptr() in starts else tensor

    return unshare


def unmodified(params: list[Tensor]) -> list[Tensor]:
    """Return parameters that may be modified in place while autograd remembers what was computed from these."""
    return [p.clone() for p in params] if torch.is_grad_enabled() else params


def _tensor_by_tensor(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    new_updates: list[Tensor] = []
    new_states: list[Columns] = [_map_columns(None, state) for state in states]
    for i, update in enumerate(updates):
        p = params[i] if params is not None else None
        for k, rule in enumerate(rules):
            update, new_state = _applied(rule, update, _row(states[k], i), p, scalars[k])  # noqa: PLW2901
            for column, tensor in zip(new_states[k], new_state, strict=True):
                column.append(tensor)
        new_updates.append(update)
    return new_updates, new_states


def _foreach(
    rules: Sequence[Rule],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    g = TensorList(updates)
    p = TensorList(params) if params is not None else None
    new_states: list[Columns] = []
    for rule, columns, s in zip(rules, states, scalars, strict=True):
        state = _make(type(columns), [TensorList(column) for column in columns])
        g, state = _applied(rule, g, state, p, s)
        new_states.append(_make(type(columns), [tensor_list.tensors for tensor_list in state]))
    return g.tensors, new_states


# States of many tensors: a NamedTuple of lists. ----------------------------------------------------------------------


def _make(state_type: Any, fields: Sequence[Any]) -> Any:
    return state_type(*fields) if fields else ()


def _row(columns: Columns, i: int) -> Any:
    return _make(type(columns), [column[i] for column in columns])


def _map_columns(function: Callable[[Tensor], Tensor] | None, columns: Columns) -> Columns:
    """Apply a function to every tensor; without one, make empty columns."""
    return _make(type(columns), [[function(tensor) for tensor in column] if function else [] for column in columns])


# What a rule is given, and what is made of what it returns. ----------------------------------------------------------


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in HALF else tensor


def _narrowed(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor if tensor.dtype == like.dtype else tensor.to(like.dtype)


def _as_reals(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    """Make pairs of reals complex again."""
    if like.is_complex() and not tensor.is_complex():
        return torch.view_as_complex(tensor.contiguous())
    return tensor


def _zip_columns(function: Callable[[Tensor, Tensor], Tensor], columns: Columns, others: Columns) -> Columns:
    pairs = zip(columns, others, strict=True)
    return _make(type(others), [[function(a, b) for a, b in zip(some, more, strict=True)] for some, more in pairs])


def _applied(rule: Rule, g: Any, state: Any, p: Any, s: Any) -> tuple[Any, Any]:
    """Run a rule, and check what it returns."""
    returned = rule.update(g, state, p, s)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(f"The rule of {rule.name} must return a pair, (update, state), but it returned {returned!r}")
    if not isinstance(returned[1], tuple) or len(returned[1]) != len(state):
        raise TypeError(
            f"The rule of {rule.name} must return a state like the one it was given, with "
            f"{', '.join(getattr(state, '_fields', ())) or 'no fields'}, but it returned {returned[1]!r}"
        )
    return returned


def _cast(like: Tensor, original: torch.dtype, to_number: bool, as_pairs: bool) -> Callable[[Any], Any]:
    dtype = like.real.dtype if like.is_complex() else like.dtype

    def cast(scalar: Any) -> Any:
        if callable(scalar):
            scalar = scalar(original)
        if not isinstance(scalar, Tensor):
            # A 0-dim float32 tensor times a python float has a float64 tangent under torch.func.jvp (torch 2.13).
            moving = forward_ad._current_level >= 0 and isinstance(scalar, float)
            return torch.full((), scalar, dtype=dtype, device=like.device) if moving else scalar
        if as_pairs and like.is_complex() and scalar.ndim > 0:  # one for each element, which is two reals here
            scalar = scalar.unsqueeze(-1)
        on_cpu = scalar.device.type == "cpu"
        if not scalar.is_floating_point():  # a condition stays one
            return scalar.to(like.device, non_blocking=on_cpu)
        if to_number and on_cpu and scalar.ndim == 0:
            return scalar.item()  # on the CPU this waits for nothing, and foreach ops take numbers best
        return scalar.to(like.device, dtype, non_blocking=on_cpu)

    return cast


# Which way. ----------------------------------------------------------------------------------------------------------


def _can_batch(tensors: list[Tensor], states: Sequence[Columns], scalars: Sequence[Any]) -> bool:
    """Tell whether foreach ops may run: eagerly, on plain tensors, where no derivative is wanted."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if forward_ad._current_level >= 0:
        return False
    numbers = [leaf for leaf in tree.flatten(list(scalars))[0] if isinstance(leaf, Tensor)]
    everything = tensors + numbers + [tensor for columns in states for column in columns for tensor in column]
    if any(type(tensor) not in PLAIN for tensor in everything):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in everything))
