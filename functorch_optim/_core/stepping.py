"""Steps: an update, and what it does to the parameters, in one pass."""

import functools
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core import lift
from functorch_optim._core.checks import check_updates
from functorch_optim._core.layout import nest, unnest
from functorch_optim._core.links import Link
from functorch_optim._core.passes import Donations
from functorch_optim._core.rule import EmptyState, check_extras
from functorch_optim._core.transformation import GradientTransformation, check_transformation
from functorch_optim._execution import writing
from functorch_optim._execution.in_place import ADD, InPlace, check_options, way_of
from functorch_optim._execution.ways import PLAIN
from functorch_optim.tree import Tree

_ADD = Link(ADD)


def step(tx: GradientTransformation, grads: Tree, state: Any, params: Tree, **extra: Any) -> tuple[Tree, Any]:
    """Update parameters; no argument is modified.

    The same as `update` and `apply_updates`, in one pass over the parameters, and without the updates in memory.

    Args:
        tx: transformation.
        grads: tree of gradients; None leaves a parameter as it is.
        state: what `tx.init` or the last step returned.
        params: tree of tensors.
        **extra: by name, what some transformation in the chain declares, such as `value`.

    Returns:
        New parameters, and the next state.

    Raises:
        ValueError, TypeError: as `update` does.

    Half-precision parameters are rounded once, after the update has been added.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.sgd(0.1)
        >>> params = {"w": torch.ones(2)}
        >>> params, state = fo.step(tx, {"w": torch.ones(2)}, tx.init(params), params)
        >>> params
        {'w': tensor([0.9000, 0.9000])}
    """
    links, states = _links(tx, state, params, extra)
    new, new_states = lift.update(links, grads, states, params, extra)
    leaves, structure = tree.flatten(params)
    moved = tree.flatten_up_to(structure, new, "updates", params, "params")
    return (
        tree.unflatten(structure, [p if q is None else q for p, q in zip(leaves, moved, strict=True)]),
        nest(tx._layout, new_states[:-1]),
    )


@torch.no_grad()
def step_(
    tx: GradientTransformation,
    grads: Tree,
    state: Any,
    params: Tree,
    *,
    fused: bool | None = None,
    foreach: bool | None = None,
    **extra: Any,
) -> tuple[Tree, Any]:
    """Update parameters in place: they and the state are given up, and must not be used any more but as returned.

    So nothing is allocated but what a block of elements needs, as with jax.jit's donated arguments. What can fail for
    the arguments' sake fails before anything is written.

    Half-precision parameters are rounded once by elementwise transformations; the updates of others, `muon` say, are
    rounded before they are added.

    Args:
        tx: transformation.
        grads: tree of gradients; None leaves a parameter as it is.
        state: what `tx.init` or the last step returned.
        params: tree of tensors.
        fused: True compiles the whole chain to one kernel, once; elementwise transformations then run at the speed of
            memory. None or False: block by block on the CPU, and with foreach kernels elsewhere.
        foreach: True for foreach kernels, False for none.
        **extra: by name, what some transformation in the chain declares, such as `value`.

    Returns:
        Parameters, in the tensors that were given, and the next state, in its tensors where that is possible.

    Raises:
        ValueError, TypeError: as `update` does; or the next state is built differently than this one.
        RuntimeError: it is called inside of a function that torch.func or torch.compile transforms, which wants `step`;
            or a parameter cannot be written to, or is given under two names.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adam(0.1)
        >>> params = {"w": torch.ones(2)}
        >>> state = tx.init(params)
        >>> params, state = fo.step_(tx, {"w": torch.ones(2)}, state, params)
        >>> params
        {'w': tensor([0.9000, 0.9000])}
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "step_ writes in place, which torch.func and torch.compile cannot transform; call the pure one inside: "
            "params, state = step(tx, grads, state, params)"
        )
    options = {"fused": fused, "foreach": foreach}
    check_options(options)
    links, states = _links(tx, state, params, extra)
    leaves, structure = tree.flatten(params)
    gradients = tree.flatten_up_to(structure, grads, "updates", params, "params")
    check_updates(gradients, leaves, lambda i: tree.paths(params)[i])
    moving = [i for i, g in enumerate(gradients) if g is not None]
    for check in (writing.check_writable, writing.check_apart):
        check([leaves[i] for i in moving], lambda k: tree.paths(params)[moving[k]])
    donations = Donations(functools.partial(InPlace, way=way_of(options)))
    # The last link of the chain is added by what is donated.
    computed, new_states = lift.update(links[:-1], grads, states[:-1], params, extra, donations)
    updates = tree.flatten_up_to(structure, computed, "updates", params, "params")
    new_state = nest(tx._layout, new_states)
    kept = writing.unshared([*leaves, *gradients, *[t for t in tree.flatten(state)[0] if isinstance(t, Tensor)]])
    updates = [u if u is None else kept(u) for u in updates]
    old_tensors, state_structure = tree.flatten(state)
    new_tensors = tree.flatten_up_to(state_structure, new_state, "the next state", state, "the one given")
    new_tensors = [new if new is old else kept(new) for old, new in zip(old_tensors, new_tensors, strict=True)]
    for overwrite in donations.ready():
        overwrite()
    added = [i for i, u in enumerate(updates) if u is not None]
    writing.add_([leaves[i] for i in added], [updates[i] for i in added])
    pairs = list(zip(old_tensors, new_tensors, strict=True))
    rooms = list({(id(o), id(n)): (o, n) for o, n in pairs if writing.is_room_for(o, n)}.values())
    starts = {leaf.data_ptr() for leaf in leaves if type(leaf) in PLAIN}
    taken = any(old.data_ptr() in starts for old, _ in rooms if old.numel())
    if taken or writing.share_memory([], [old for old, _ in rooms]):  # as init may have given p, or one tensor twice
        return params, tree.unflatten(state_structure, new_tensors)
    writing.copy_([old for old, _ in rooms], [new for _, new in rooms])
    return params, tree.unflatten(state_structure, [o if writing.is_room_for(o, n) else n for o, n in pairs])


def _links(tx: GradientTransformation, state: Any, params: Tree, extra: dict[str, Any]) -> tuple[list[Link], list[Any]]:
    """Return the links of a transformation and their states, and the one that adds updates to parameters."""
    check_transformation(tx, "step(sgd(0.1), grads, state, params)")
    if params is None:
        raise ValueError("A step needs the parameters: params, state = step(tx, grads, state, params)")
    check_extras([link.rule for link in tx._links], extra)
    return [*tx._links, _ADD], [*unnest(tx._layout, state), EmptyState()]
