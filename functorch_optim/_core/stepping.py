"""Steps: the update and its addition to the parameters in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core import functional
from functorch_optim._core.functional import Call
from functorch_optim._core.links import unnest
from functorch_optim._core.transformation import GradientTransformation, check_transformation
from functorch_optim._execution import writing
from functorch_optim._execution.choose import check_options, way_of
from functorch_optim._execution.mode import PLAIN
from functorch_optim._execution.sharded import local
from functorch_optim.tree import Tree


def step(tx: GradientTransformation, grads: Tree, state: Any, params: Tree, **extra: Any) -> tuple[Tree, Any]:
    """Update parameters; no argument is modified.

    The same as `update` and `apply_updates`, in one pass over the parameters, and without the updates in memory.

    Args:
        tx: transformation.
        grads: tree of gradients; None leaves a parameter as it is.
        state: the result of `tx.init` or of the last step.
        params: tree of tensors.
        **extra: keyword arguments that a transformation in the chain declares, such as `value`.

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
    _check(tx, params)
    made = functional.call(tx, grads, state, params, extra, adds=True)
    leaves = zip(made.leaves.params or [], made.outcome.updates, strict=True)
    moved = [p if new is None else new for p, new in leaves]
    return tree.unflatten(made.form.structure, moved), made.new_state()


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

    Only the memory of a block of elements is allocated, as with jax.jit's donated arguments. All that can fail for
    the arguments' sake fails before anything is written.

    Half-precision parameters are rounded once by elementwise transformations; the updates of others, `muon` say, are
    rounded before they are added.

    Args:
        tx: transformation.
        grads: tree of gradients; None leaves a parameter as it is.
        state: the result of `tx.init` or of the last step.
        params: tree of tensors.
        fused: True compiles the whole chain to one kernel, once; elementwise transformations then run at the speed of
            memory. None or False: block by block on the CPU, and with foreach kernels elsewhere.
        foreach: True for foreach kernels, False for none.
        **extra: keyword arguments that a transformation in the chain declares, such as `value`.

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
    _check(tx, params)
    made = functional.call(tx, grads, state, params, extra, adds=True, way=way_of(options), overwrites=True)
    _check_writable(made, params)
    listed = made.form.new_leaves(made)  # takes memory, and so comes before anything is written
    if made.outcome.computed:
        return params, _overwrite(made, made.form.state(listed, made))
    for overwrite in made.outcome.ready:
        overwrite()
    return params, _count(made, listed)


def _check_writable(made: Call, params: Tree) -> None:
    """Raise when a parameter that moves cannot be written to, or is there twice."""
    moving = [i for i, g in enumerate(made.leaves.updates) if g is not None]
    some: list[Tensor] = [(made.leaves.params or [])[i] for i in moving]
    starts = [p.data_ptr() for p in some if type(p) in PLAIN and p.numel()]
    usual = all(map(Tensor.is_contiguous, some)) and not any(map(Tensor.is_inference, some))
    if len(set(starts)) < len(some) or not usual:
        for check in (writing.check_writable, writing.check_apart):
            check(some, lambda k: tree.paths(params)[moving[k]])


def _count(made: Call, listed: list[Any]) -> Any:
    """Count a step that has overwritten all else; return the state, in the old tensors where that is possible."""
    pairs = [(made.listed[place], listed[place]) for _, _, place in made.form.numbers]
    rooms = _rooms(pairs)
    if not all([new is old or id(old) in rooms for old, new in pairs]):  # noqa: C419
        return made.form.state(listed, made)
    for old, new in rooms.values():
        old.copy_(new)
    return made.state


def _rooms(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
    """Find the old tensors that can hold a new one, by identity.

    A tensor that stands in several places can, if all of them get the same new one. Links share a counter until a gate
    leaves some of them out.
    """
    news: dict[int, set[int]] = {}
    for old, new in pairs:
        news.setdefault(id(old), set()).add(id(new))
    return {
        id(old): (old, new)
        for old, new in pairs
        if new is not old and len(news[id(old)]) == 1 and writing.is_room_for(old, new)
    }


def _overwrite(made: Call, state: Any) -> Any:
    """Overwrite parameters and states; return the state, in the old tensors where that is possible."""
    leaves, outcome = made.leaves, made.outcome
    old_tensors, structure = tree.flatten(made.state)
    new_tensors = tree.flatten_up_to(structure, state, "the next state", made.state, "the one given")
    kept = writing.unshared([*(leaves.params or []), *leaves.updates, *old_tensors])
    new_tensors = [new if new is old else kept(new) for old, new in zip(old_tensors, new_tensors, strict=True)]
    moved = [(p, kept(u)) for p, u in zip(leaves.params or [], outcome.updates, strict=True) if u is not None]
    for overwrite in outcome.ready:
        overwrite()
    for p, u in moved:
        p.copy_(u)
    rooms = _rooms(list(zip(old_tensors, new_tensors, strict=True)))
    olds = [old for old, _ in rooms.values()]
    written = [local(tensor) for tensor in [*(leaves.params or []), *olds] if tensor is not None]
    if not writing.can_overwrite([], [written]):
        return tree.unflatten(structure, new_tensors)  # init gave p, or one tensor twice
    writing.copy_(olds, [new for _, new in rooms.values()])
    return tree.unflatten(
        structure, [o if id(o) in rooms else n for o, n in zip(old_tensors, new_tensors, strict=True)]
    )


def _check(tx: GradientTransformation, params: Tree) -> None:
    check_transformation(tx, "step(sgd(0.1), grads, state, params)")
    if params is None:
        raise ValueError("A step needs the parameters: params, state = step(tx, grads, state, params)")


def eval_params(tx: GradientTransformation, state: Any, params: Tree) -> Tree:
    """Return the parameters to evaluate with, where a wrapper trains at others.

    Args:
        tx: transformation, with a wrapper that keeps two sets of weights: `ema_weights`, `swa`, `polynomial_average`,
            `lookahead`, `schedule_free` or `gpa`, masked or not; or `asgd`. Of several, the outermost counts.
        state: the result of the last step.
        params: the parameters that are trained.

    Returns:
        Tree like `params`. Parameters that no wrapper is for are returned as they are.

    Raises:
        ValueError: nothing in `tx` has parameters to evaluate with.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.schedule_free(fo.sgd(1.0)), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     params, state = fo.step(tx, torch.ones(1), state, params)
        >>> params, fo.eval_params(tx, state, params)
        (tensor([-1.5500]), tensor([-1.5000]))
    """
    check_transformation(tx, "eval_params(schedule_free(sgd(1.0)), state, params)")
    found = [(link.rule, part) for link, part in zip(tx._links, unnest(tx._layout, state), strict=True)]
    found = [(rule, part) for rule, part in found if rule.evaluate is not None]
    if not found:
        raise ValueError(
            f"Nothing in {tx!r} has parameters to evaluate with; write tx = ema_weights(adamw(1e-3), decay=0.999), or "
            "another wrapper that keeps two sets of weights"
        )
    leaves, structure = tree.flatten(params)
    chosen = list(leaves)
    for rule, part in found:
        fields = part[len(rule.counters) :]
        columns = [tree.flatten_up_to(structure, field, "the state", params, "params") for field in fields]
        evaluate: Any = rule.evaluate
        for i, (p, *row) in enumerate(zip(leaves, *columns, strict=True)):
            if isinstance(row[0], Tensor):
                new = evaluate(p, type(part)._leaf_type(*row)).to(p.dtype)
                chosen[i] = new.clone() if any(new is kept for kept in row) else new  # `step_` overwrites the state
    return tree.unflatten(structure, chosen)
