"""Recomputed: of rules run on a large tensor, autograd saves the arguments, and nothing in between.

A step of Adam makes a dozen tensors like the parameter, and its derivative needs some of them. They can be had again
from the gradient and the two means, which are there anyway: the step before has returned them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._execution.blocks import BLOCK, InBlocks, empty_like, flat, layout_of
from functorch_optim._execution.mode import PLAIN, Mode
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage, tensor_by_tensor
from functorch_optim._execution.representation import Columns, make, map_columns

LARGE = 1 << 19
"""Elements from which on the memory counts: 2 MiB in single precision. Computing again takes a fifth longer there."""

Function = Callable[[Sequence[Tensor]], Sequence[Any]]


def can_recompute(
    mode: Mode, updates: list[Tensor], states: Sequence[Columns], params: list[Tensor] | None, scalars: Any
) -> bool:
    """Tell whether some tensors are large, and will be differentiated by autograd alone."""
    if mode != "recorded" or not any(states) or all(update.numel() < LARGE for update in updates):
        return False
    leaves = tree.flatten((updates, states, params, scalars))[0]
    return all(type(leaf) in PLAIN for leaf in leaves if isinstance(leaf, Tensor))


def recomputed(
    stages: Sequence[Stage],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run elementwise rules, one after the other, on one tensor after the other; on large ones again in backward.

    The last ones, where they have neither state nor numbers, do not: autograd saves nothing of a sum, as that of a
    parameter and its update, and would have to save the parameter to compute it again.
    """
    last = len(stages)
    while last > 0 and not states[last - 1] and not tree.flatten(scalars[last - 1])[0]:
        last -= 1
    needed = any(stage.rule.needs_params for stage in stages[:last])
    new_updates: list[Tensor] = []
    new_states: list[Columns] = [map_columns(None, state) for state in states]
    for i, update in enumerate(updates):
        one = [make(type(columns), [[column[i]] for column in columns]) for columns in states]
        p = [params[i]] if params is not None else None
        way = _saving_arguments if update.numel() >= LARGE else tensor_by_tensor
        new, some = way(stages[:last], [update], one[:last], p if needed else None, scalars[:last])
        new_updates += tensor_by_tensor(stages[last:], new, one[last:], p, scalars[last:])[0]
        for columns, more in zip(new_states, some, strict=False):
            for column, tensors in zip(columns, more, strict=True):
                column.extend(tensors)
    return new_updates, new_states


def _saving_arguments(stages: Sequence[Stage], *arguments: Any) -> tuple[list[Tensor], list[Columns]]:
    """Run rules on one tensor, as one function of all tensors among the arguments."""
    leaves, structure = tree.flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def function(tensors: Sequence[Tensor], way: Any = tensor_by_tensor) -> list[Tensor]:
        given = list(constants)
        for i, tensor in zip(places, tensors, strict=True):
            given[i] = tensor
        update, states = way(stages, *tree.unflatten(structure, given))
        return [*update, *[tensor for columns in states for column in columns for tensor in column]]

    outputs = _outputs(function, tensors)
    if outputs is None:
        return tensor_by_tensor(stages, *arguments)
    apply: Any = _Recomputed.apply
    known = [*tensors, *apply(function, outputs, *tensors)]
    found = iter([known[place] for place in outputs.places])
    update = next(found)
    return [update], [make(type(columns), [[next(found)] for _ in columns]) for columns in arguments[1]]


def _without_graph(
    stages: Sequence[Stage],
    updates: list[Tensor],
    states: Sequence[Columns],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
) -> tuple[list[Tensor], list[Columns]]:
    """Run rules in blocks, where numbers allow it."""
    leaves = tree.flatten(list(scalars))[0]
    numbers = [n.item() if isinstance(n, Tensor) and n.is_floating_point() and n.ndim == 0 else n for n in leaves]
    if updates[0].device.type != "cpu" or any(isinstance(n, Tensor) and n.ndim > 0 for n in numbers):
        return tensor_by_tensor(stages, updates, states, params, scalars)
    given = tree.unflatten(tree.flatten(list(scalars))[1], numbers)
    program = record(stages, states, params is not None, given, updates[0].new_empty(0))
    inputs = [updates, *([params] if params is not None else []), *[column for state in states for column in state]]
    outputs = iter(InBlocks(program).new(inputs, numbers))
    return next(outputs), [make(type(state), [next(outputs) for _ in state]) for state in states]


class _Outputs(NamedTuple):
    """The results of a function of tensors.

    Attributes:
        places: for each output, where it is among the arguments and, after them, the computed tensors.
        computed: which outputs are no arguments; of those that are one tensor, the first.
        constant: places among these of the tensors without a derivative.
    """

    places: list[int]
    computed: list[int]
    constant: list[int]


def _outputs(function: Function, tensors: Sequence[Tensor]) -> _Outputs | None:
    """Find the results of a function, by running it on one element; None when it is not to be run again.

    That is when it draws random numbers, or has derivatives by tensors that are no arguments; and when the arguments
    take more memory than autograd would.
    """
    device = tensors[0].device
    random: Any = torch.random if device.type == "cpu" else torch.get_device_module(device)
    which = () if device.type == "cpu" else (device,)
    constants = [tensor.detach().new_ones((1,) * min(tensor.ndim, 1)) for tensor in tensors]
    samples = [c.clone().requires_grad_(t.requires_grad) for c, t in zip(constants, tensors, strict=True)]
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes() if tensor.ndim > 0 else 0
        return tensor

    before = random.get_rng_state(*which)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        found = function(samples)
    closed_over = any(output.requires_grad for output in function(constants))
    if not torch.equal(before, random.get_rng_state(*which)):
        random.set_rng_state(before, *which)
        return None
    if closed_over or sum(saved.values()) <= sum([sample.nbytes for sample in samples if sample.ndim > 0]):
        return None
    known, computed, places = list(samples), list[int](), list[int]()
    for k, output in enumerate(found):
        if not any(output is one for one in known):
            known.append(output)
            computed.append(k)
        places.append(next(place for place, one in enumerate(known) if output is one))
    return _Outputs(places, computed, [n for n, k in enumerate(computed) if not found[k].requires_grad])


class _Recomputed(torch.autograd.Function):
    """`_Recomputed.apply(f, outputs, *tensors)` is the computed part of f(tensors)."""

    @staticmethod
    def forward(ctx: Any, function: Any, outputs: _Outputs, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = function(tensors, _without_graph)
        results = tuple([found[k] for k in outputs.computed])
        ctx.function, ctx.outputs = function, outputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[results[n] for n in outputs.constant])
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, needed, again = ctx.saved_tensors, ctx.needs_input_grad[2:], torch.is_grad_enabled()
        given = [k for k, cotangent in zip(ctx.outputs.computed, cotangents, strict=True) if cotangent is not None]
        plain = not again and not any(map(_is_wrapped, cotangents))

        def pulled(tensors: Sequence[Tensor]) -> Sequence[Any]:
            inputs = [_alias(t, on, plain) for t, on in zip(tensors[: len(saved)], needed, strict=True)]
            with torch.enable_grad():
                found = ctx.function(inputs)
            wanted = [tensor for tensor, on in zip(inputs, needed, strict=True) if on]
            return torch.autograd.grad(
                [found[k] for k in given], wanted, tensors[len(saved) :], create_graph=again, allow_unused=True
            )

        tensors = [*saved, *[cotangent for cotangent in cotangents if cotangent is not None]]
        found = iter(_block_by_block(pulled, tensors) if plain else pulled(tensors))
        return (None, None, *[next(found) if on else None for on in needed])


def _is_wrapped(tensor: Tensor | None) -> bool:
    """Tell whether a transform has wrapped a tensor; `is_grads_batched` has a kind of batches of its own."""
    functorch: Any = torch._C._functorch
    return tensor is not None and (
        functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    )


def _alias(tensor: Tensor, needed: bool, plain: bool) -> Tensor:
    """Return a tensor that stands for this one, and is another, so that one which is given twice is two arguments."""
    if plain:
        return tensor.detach().requires_grad_(needed)
    with torch.enable_grad():  # derivatives of the derivative may be wanted by all
        return tensor.view_as(tensor) if needed else tensor


def _block_by_block(function: Function, tensors: Sequence[Tensor]) -> Sequence[Any]:
    """Run a function on the CPU so that intermediate tensors stay in the cache; sum results that are one number."""
    first = tensors[0]
    alike = all(tensor.shape == first.shape for tensor in tensors if tensor.ndim > 0)
    if first.device.type != "cpu" or not alike or first.numel() <= BLOCK:
        return function(tensors)
    layout, results, places = layout_of(first), list[Any](), list[Any]()
    pieces = [torch.split(flat(tensor, layout), BLOCK) if tensor.ndim > 0 else None for tensor in tensors]
    for k in range(-(-first.numel() // BLOCK)):
        parts = function([t if some is None else some[k] for t, some in zip(tensors, pieces, strict=True)])
        if k == 0:
            results = [p if p is None else torch.zeros_like(p) if p.ndim == 0 else empty_like(p, layout) for p in parts]
            places = [r if r is None or r.ndim == 0 else torch.split(flat(r, layout), BLOCK) for r in results]
        for place, part in zip(places, parts, strict=True):
            if isinstance(place, Tensor):
                place.add_(part)
            elif place is not None:
                place[k].copy_(part)
    return results
