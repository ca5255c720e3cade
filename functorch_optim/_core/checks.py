"""Checks of trees, shapes and dtypes, whose errors name the path."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.stand_in import StandIn

Path = Callable[[int], str]
HALF = (torch.float16, torch.bfloat16)
SINGLE = (torch.float32, *HALF)
"""At most single precision."""


def check_params(leaves: Sequence[Any], path: Path) -> None:
    """Raise unless every leaf is a tensor that can be optimized, or None."""
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        check_is_param(leaf, i, path)
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"The parameter at {path(i)!r} has dtype {leaf.dtype}, which cannot be optimized; "
                "convert it with .float(), or leave it out of the tree"
            )
    check_precision(leaves, path)


def check_precision(params: Sequence[Any], path: Path) -> None:
    """Raise when a parameter is complex in half precision, for which torch lacks most functions."""
    for i, p in enumerate(params):
        if isinstance(p, Tensor) and p.dtype == torch.complex32:
            raise TypeError(
                f"The parameter at {path(i)!r} has dtype {p.dtype}, which cannot be optimized; "
                "convert it with .to(torch.complex64)"
            )


def check_is_param(leaf: Any, i: int, path: Path) -> None:
    """Raise unless a leaf of the parameters is a tensor."""
    if not isinstance(leaf, Tensor):
        raise TypeError(
            f"The parameter at {path(i) or 'the root'!r} is a {type(leaf).__name__}, not a tensor; "
            "give a tree of tensors. That of a module is params_of(model)"
        )


def check_inexact(name: str, leaves: Sequence[Any], path: Path, advice: str = "") -> None:
    """Raise unless every leaf is None or a floating-point or complex tensor; the message ends with the advice."""
    for i, leaf in enumerate(leaves):
        is_tensor = isinstance(leaf, Tensor)
        if not (leaf is None or (is_tensor and (leaf.is_floating_point() or leaf.is_complex()))):
            found = f"tensor of {leaf.dtype}" if is_tensor else type(leaf).__name__
            raise TypeError(
                f"{name} has a {found} at {path(i) or 'the root'!r}; it must be a tree of floating-point or complex "
                f"tensors{advice}"
            )


def check_updates(
    leaves: Sequence[Any],
    others: Sequence[Any] | None,
    path: Path,
    name: str = "the updates",
    other_name: str = "the parameter",
    wide: bool = False,
) -> None:
    """Raise unless every update is None or a tensor with the shape and dtype of its parameter, or of another update.

    Where they may be wide, those of parameters in half precision may be float32.
    """
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} have a {type(leaf).__name__} at {path(i)!r}, not a tensor")
        if others is None:
            continue
        other = others[i]
        if not isinstance(other, Tensor):
            what = "None" if other is None else f"a {type(other).__name__}"
            raise ValueError(f"{name} have a tensor at {path(i)!r}, but {other_name} there is {what}")
        same = leaf.dtype == other.dtype or (wide and leaf.dtype == torch.float32 and other.dtype in HALF)
        if leaf.shape != other.shape or not same:
            raise ValueError(
                f"{name} have shape {tuple(leaf.shape)} and dtype {leaf.dtype} at {path(i)!r}, but {other_name} there "
                f"has shape {tuple(other.shape)} and dtype {other.dtype}; they must be the same"
            )


def check_has_params(name: str, params: Any, extras: str = "") -> None:
    """Raise when `update` was called without the parameters; the call in the message ends with `extras`."""
    if params is None:
        raise ValueError(
            f"{name} needs the parameters, but update was called without them; call tx.update(updates, state, "
            f"params{extras})"
        )


def check_loss(must: str, value: Any) -> None:
    """Raise unless a value is a loss, a 0-dim tensor; `must` begins the message, as in "value must be"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{must} a loss, a 0-dim tensor, got a {type(value).__name__}")
    if value.ndim:
        raise ValueError(f"{must} a loss, a 0-dim tensor, got one of shape {tuple(value.shape)}; take the mean or sum")


def check_pair(what: str, first: str, returned: Any) -> None:
    """Raise unless an update function has returned a pair."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        found = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else f"a {type(returned).__name__}"
        found = "a tensor" if isinstance(returned, Tensor | StandIn) else found
        raise TypeError(f"{what} must return a pair, ({first}, state), but it returned {found}")


def check_own(rule: Any, state: Any) -> None:
    """Raise unless a state is one of this rule."""
    fields, leaf_type = getattr(state, "_fields", ()), getattr(type(state), "_leaf_type", None)
    count = len(rule.counters)
    if (
        not isinstance(state, tuple)
        or fields[:count] != rule.counters
        or fields[count:] != getattr(leaf_type, "_fields", ())
        or (rule.state_type is not None and rule.state_type is not leaf_type)
        or (rule.init is None and len(fields) > count)
    ):
        raise ValueError(
            f"The state of {rule.name} is a {type(state).__name__}: it belongs to another transformation. "
            "Make it with the init of the transformation whose update is called: state = tx.init(params)"
        )


def check_counters(rules: Sequence[Any], counters: Sequence[Tensor]) -> None:
    """Raise when a number that states hold once for all parameters is several."""
    names = [(rule.name, name) for rule in rules for name in rule.counters]
    for (rule, name), number in zip(names, counters, strict=True):
        if number.ndim != 0:
            raise ValueError(
                f"The {name} in the state of {rule} has shape {tuple(number.shape)}: a state that torch.vmap has "
                "batched is for an update inside of torch.vmap"
            )


def check_present(name: str, field: str, tensors: Sequence[Any], path: Path) -> None:
    """Raise when a leaf has an update but no state."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"The state's {field} for {name} has nothing at {path(i)!r}: the parameter was None or masked out in "
                "tx.init(params), and now there is an update for it. Masks must not change"
            )


def check_state(
    name: str, field: str, tensors: Sequence[Tensor], updates: Sequence[Tensor], path: Path, cast: bool
) -> None:
    """Raise unless the state of an elementwise rule has the shapes of the updates, and their dtypes or float32.

    A state that was cast may have any of at most single precision, if the update has.
    """
    for i, (tensor, update) in enumerate(zip(tensors, updates, strict=True)):
        precise = tensor.dtype in (SINGLE if cast else (torch.float32,)) and update.dtype in (SINGLE if cast else HALF)
        if tensor.shape != update.shape or not (tensor.dtype == update.dtype or precise):
            raise ValueError(
                f"The state's {field} for {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype} at "
                f"{path(i)!r}, but the update has shape {tuple(update.shape)} and dtype {update.dtype}. The state "
                "belongs to other parameters, or they were converted since: make it anew, with tx.init(params)"
            )


def check_kept(what: str, new: Sequence[Tensor], old: Sequence[Tensor], path: Path) -> None:
    """Raise unless a rule has kept shapes."""
    for i, (after, before) in enumerate(zip(new, old, strict=True)):
        if after.shape != before.shape:
            raise ValueError(
                f"{what} has shape {tuple(after.shape)} at {path(i)!r}, but the one before has {tuple(before.shape)}. "
                "A rule must keep shapes"
            )


def check_is_dict(what: str, saved: Any) -> None:
    """Raise when a saved part, which the message names, is no dict.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"The saved {what} is of type {type(saved).__name__}, where a dict belongs")
