"""Monitoring: the norms of gradients and updates, and their ratio to the weights, kept in the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_has_params
from functorch_optim._core.combine import named_chain
from functorch_optim._core.places import state_parts
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._execution.foreach import norms
from functorch_optim._execution.mode import as_plain
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved
from functorch_optim.wrappers._wrapping import wrapped, wrapper


@saved
class GradientMetrics(NamedTuple):
    """The metrics of the gradients of the last update: 0-dim tensors, zero before the first one.

    Attributes:
        grad_norm: norm of all gradients together.
        grad_norms: tree like the parameters, the norm of each gradient; `()` unless `per_layer`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.monitor(fo.sgd(0.1)).init(torch.ones(2))["gradients"]
        GradientMetrics(grad_norm=tensor(0.), grad_norms=())
    """

    grad_norm: Tensor
    grad_norms: Tree


@saved
class UpdateMetrics(NamedTuple):
    """The metrics of the last update: 0-dim tensors, zero before the first one.

    Attributes:
        update_norm: norm of all updates together.
        update_ratio: that norm, divided by the norm of all parameters before the update.
        update_norms: tree like the parameters, the norm of each update; `()` unless `per_layer`.
        update_ratios: tree like the parameters, the ratio of each; `()` unless `per_layer`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.monitor(fo.sgd(0.1)).init(torch.ones(2))["updates"].update_ratio
        tensor(0.)
    """

    update_norm: Tensor
    update_ratio: Tensor
    update_norms: Tree
    update_ratios: Tree


def monitor(tx: Any, *, per_layer: bool = False) -> Any:
    """Keep the norms of gradients and updates of a transformation in its state; the updates are the same.

        grad_norm = |g|,  update_norm = |u|,  update_ratio = |u| / |p|

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters. The gradients are
            those that it is given: outside of a chain with clipping, they are not clipped yet.
        per_layer: whether to keep these numbers for each parameter too.

    Returns:
        Transformation whose state is a dict: "gradients", a `fo.GradientMetrics`; "inner", the state of `tx`;
        "updates", a `fo.UpdateMetrics`. `fo.metrics(state)` and `opt.metrics` return the numbers by name.

    Raises:
        TypeError: `tx` is neither a transformation nor a factory.
        ValueError: `update` is called without the parameters.

    The structure of the state is the same from the start. Norms are taken in the precision of the parameters, float32
    at least, and stay on their device. A gradient that is missing adds nothing, and the numbers of its layer stay.
    Where a parameter is zero and its update is not, the ratio is inf; where both are, it is zero. At a step that a
    wrapper inside leaves out, nothing is updated, and the numbers of updates stay.

    The norms are functions of the whole tree, so a monitored step is no longer one kernel that overwrites parameters.
    It takes about ten times as long as AdamW alone: `python -m benchmarks --only wrappers`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.monitor(fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.5)))
        >>> params = {"w": torch.tensor([6.0, 8.0])}
        >>> params, state = fo.step(tx, {"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
        >>> fo.metrics(state)
        {'grad_norm': tensor(5.), 'update_norm': tensor(0.5000), 'update_ratio': tensor(0.0500)}
    """
    return wrapped(tx, _monitor, "monitor(adamw(1e-3))", per_layer=per_layer)


def metrics(state: Tree) -> dict[str, Tensor]:
    """Return the metrics in a state by name, ready to be logged.

    Args:
        state: of a transformation with `monitor` in it.

    Returns:
        Name -> 0-dim tensor: "grad_norm", "update_norm", "update_ratio"; with `per_layer` also "grad_norm/layer.weight"
        and so on. With several monitors, each name begins with the path of its monitor in the state: "body.grad_norm".
        The tensors are those of the state: nothing waits for a device before they are read.

    Raises:
        ValueError: nothing in the state is a monitor's.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> tx = fo.monitor(fo.sgd(0.1), per_layer=True)
        >>> _, state = fo.step(tx, params, tx.init(params), params)
        >>> [name for name in fo.metrics(state)]
        ['grad_norm', 'grad_norm/w', 'update_norm', 'update_norm/w', 'update_ratio', 'update_ratio/w']
    """
    kept = [(path, part) for path, part in state_parts(state) if isinstance(part, GradientMetrics | UpdateMetrics)]
    if not kept:
        raise ValueError(
            "Nothing in the state is a monitor's; write tx = monitor(adamw(1e-3)), and state = tx.init(params)"
        )
    several = len(kept) > 2
    found: dict[str, Tensor] = {}
    for path, part in kept:
        prefix = f"{path.rpartition('.')[0]}." if several else ""
        for name in [name for name in part._fields if not name.endswith("s")]:
            found[prefix + name] = getattr(part, name)
            layers = getattr(part, f"{name}s")
            pairs = zip(tree.paths(layers), tree.flatten(layers)[0], strict=True)
            found.update({f"{prefix}{name}/{layer}": number for layer, number in pairs if number is not None})
    return found


@wrapper
def _monitor(tx: GradientTransformation, per_layer: bool) -> GradientTransformation:
    return named_chain(gradients=_gradients(per_layer), inner=tx, updates=_updates(per_layer))


@factory
def _gradients(per_layer: bool) -> GradientTransformation:
    def init(params: Tree) -> GradientMetrics:
        found: GradientMetrics = _zeros(GradientMetrics, params, per_layer)
        return found

    def update(updates: Tree, state: GradientMetrics, params: Tree) -> tuple[Tree, GradientMetrics]:
        each = _norms(updates, params)
        new = GradientMetrics(_total(each), each if per_layer else ())
        return updates, _kept(new, state, updates)

    return GradientTransformation(init, update)


@factory
def _updates(per_layer: bool) -> GradientTransformation:
    def init(params: Tree) -> UpdateMetrics:
        found: UpdateMetrics = _zeros(UpdateMetrics, params, per_layer)
        return found

    def update(updates: Tree, state: UpdateMetrics, params: Tree) -> tuple[Tree, UpdateMetrics]:
        each, weights = _norms(updates, params), _norms(params, params)
        total = _total(each)
        ratio = _ratio(total, _total(weights))
        layers = (each, tree.map(_ratio, each, weights)) if per_layer else ((), ())
        return updates, _kept(UpdateMetrics(total, ratio, *layers), state, updates)

    return GradientTransformation(init, update)


def _zeros(kind: Any, params: Tree, per_layer: bool) -> Any:
    def zeros(name: str) -> Any:
        each = tree.zeros_like(_norms(params, params))  # tensors of its own for each field
        return (each if per_layer else ()) if name.endswith("s") else tree.norm(each)

    return kind(*map(zeros, kind._fields))


def _norms(updates: Tree, params: Tree) -> Tree:
    """Take the norm of each tensor; None where it is missing."""
    check_has_params("monitor", params)
    leaves, structure = tree.flatten(updates)
    present = [u.coalesce().values() if u.layout == torch.sparse_coo else u for u in leaves if u is not None]
    taken = iter(norms(as_plain(present), 2.0))
    return tree.unflatten(structure, [None if u is None else next(taken) for u in leaves])


def _total(each: Tree) -> Tensor:
    """Take the norm of norms."""
    present = [norm for norm in tree.flatten(each)[0] if norm is not None]
    if not present:
        return torch.zeros((), device="cpu")
    return tree.norm(torch.stack([norm.to(present[0].device, torch.float64) for norm in present]))


def _ratio(update: Tensor, weight: Tensor) -> Tensor:
    zero = weight == 0
    return torch.where(zero, torch.where(update == 0, 0.0, torch.inf).to(update), update / weight.masked_fill(zero, 1))


def _kept(new: Any, old: Any, updates: Tree) -> Any:
    """Return numbers in the dtypes of the state; the old ones where there was no update."""
    if all(u is None for u in tree.flatten(updates)[0]):
        return old
    return tree.map(lambda before, after: before if after is None else after.to(before), old, new)
