"""States as plain containers, to save and to load."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._control import known_values
from functorch_optim._core.checks import HALF, check_is_dict
from functorch_optim._core.places import (
    REST,
    add_steps,
    by_path,
    fitting,
    fitting_by_path,
    gathered,
    keys_of,
    places_of,
    saved_keys,
)
from functorch_optim._core.rule import step_dtype
from functorch_optim._execution.sharded import local, placed
from functorch_optim.tree import Tree


def state_dict(state: Tree, params: Tree = None, *, by: Literal["path", "index"] = "path") -> dict[str, Any]:
    """Turn a state into plain containers, which `torch.load(weights_only=True)` takes.

    Args:
        state: the result of `init` or `update`; any tree of tensors.
        params: the parameters, to have the state of each of them by itself, under torch.optim's names.
        by: with `params`, the name of each parameter: its dotted path, or its index in the order in which dicts were
            filled, as `model.named_parameters()` and torch.optim count.

    Returns:
        Without `params` a dict: dotted path in the state -> tensor. With `params` a dict of two:
        `"state"`: path or index -> {"step": ..., "exp_avg": ..., ...}, as in torch.optim's state dicts, and
        `"transformation"`: path in the state -> an entry that belongs to no parameter.
        The tensors are those of the state, not copies; with `by="index"` they are copies, and each parameter has a step
        of its own, on the CPU and in torch.optim's dtype. None is left out.

    Raises:
        TypeError: `state` is no tree of tensors, but an optimizer, say.
        ValueError: two tensors have the same path, as under the keys "a.b" and "a" -> "b"; or the state is of other
            parameters.

    With `by="index"`, `optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})`
    takes it into `fo.Optimizer`, `fo.optim` and torch.optim; but for the states of functions of the whole tree, such as
    `reduce_on_plateau` and `lbfgs`, which `to_torch` writes.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.zeros(1)}
        >>> state = fo.trace(0.9).init(params)
        >>> fo.state_dict(state)
        {'step': tensor(0), 'momentum_buffer.w': tensor([0.])}
        >>> fo.state_dict(state, params)["state"]
        {'w': {'step': tensor(0), 'momentum_buffer': tensor([0.])}}
    """
    _check_is_state(state, "state_dict")
    if params is None:
        return by_path(state)
    keys = keys_of(params, by)
    places = places_of(state, params)
    states: dict[Any, dict[str, Tensor]] = {key: {} for key in sorted(keys)}
    for place in places:
        for owner, name in zip(place.owners, place.names, strict=True):
            states[keys[owner]][name] = place.tensor
    add_steps([place for place in places if place.of_all], list(states.values()))
    if by == "index":  # torch.optim modifies the dict that it loads
        states = {key: {name: _copy(name, tensor) for name, tensor in own.items()} for key, own in states.items()}
    return {
        "state": {key: found for key, found in states.items() if found},
        REST: {place.path: place.tensor for place in places if place.shared},
    }


class Loaded(NamedTuple):
    """The outcome of a load with `strict=False`.

    Attributes:
        taken: paths of entries that have their saved values; those of `fo.Optimizer` are of a parameter and a key.
        begun: paths of the entries that begin anew.
        left: saved entries that have no place here.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"w": torch.zeros(1)}
        >>> saved = fo.state_dict(fo.trace(0.9).init(params))
        >>> fo.load_state_dict(fo.scale_by_adam().init(params), saved, strict=False)[1].left
        ('step', 'momentum_buffer.w')
    """

    taken: tuple[str, ...]
    begun: tuple[str, ...]
    left: tuple[str, ...]


@overload
def load_state_dict(
    state: Tree,
    saved: Mapping[str, Any],
    params: Tree = ...,
    *,
    by: Literal["path", "index"] = ...,
    strict: Literal[True] = ...,
    cast: bool = ...,
) -> Tree: ...


@overload
def load_state_dict(
    state: Tree,
    saved: Mapping[str, Any],
    params: Tree = ...,
    *,
    by: Literal["path", "index"] = ...,
    strict: Literal[False],
    cast: bool = ...,
) -> tuple[Tree, Loaded]: ...


def load_state_dict(
    state: Tree,
    saved: Mapping[str, Any],
    params: Tree = None,
    *,
    by: Literal["path", "index"] = "path",
    strict: bool = True,
    cast: bool = False,
) -> Tree:
    """Build a state from a saved one.

    Args:
        state: a state of the same transformation for the same parameters, as `init` makes it.
        saved: the result of `state_dict`; with `by="index"`, the state dict of an optimizer too. Where that has names
            and `params` the same ones, parameters are found by name. Names may differ by the prefixes that
            torch.compile, DDP and FSDP make.
        params: the parameters, where `state_dict` was given them.
        by: as it was given to `state_dict`.
        strict: whether each saved entry must have a place, and each place an entry. With False, those that fit are
            loaded: of each rule and parameter all or none, by parameter and name if `params` are given, so that the
            chain may be another one, and else by path. A rule's step is loaded with its tensors.
        cast: round numbers saved in float32 where `state` has half precision. Else it stays in float32.

    Returns:
        State built like `state`, on its devices and in its dtypes, except for float32 in place of half precision. The
        saved values are copied. With `strict=False` a pair: this state, and `Loaded`, the paths that were
        taken, begun anew, and left out.

    Raises:
        TypeError: `state` is no tree of tensors, but an optimizer, say.
        ValueError: paths or shapes differ, or an entry is of a wrong kind; the message names the first. Or an
            optimizer's state dict has parameters at different steps, where a state has one step; see `from_torch`.

    While a function is traced, values are unknown, and only shapes and dtypes are checked.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.trace(0.9), {"w": torch.ones(1)}
        >>> _, state = tx.update({"w": torch.ones(1)}, tx.init(params))
        >>> fo.load_state_dict(tx.init(params), fo.state_dict(state)).momentum_buffer
        {'w': tensor([1.])}
        >>> fo.load_state_dict(tx.init(params), fo.state_dict(state, params), params).momentum_buffer
        {'w': tensor([1.])}
    """
    _check_is_state(state, "load_state_dict")
    present = by_path(state)
    check_is_dict("state", saved)
    if params is None:
        loaded = saved if strict else fitting_by_path(state, saved)
        left = [path for path in saved if path not in loaded]
    else:
        places, keys = places_of(state, params), saved_keys(params, by, saved)
        loaded, left = (gathered(places, saved, keys), []) if strict else fitting(places, saved, keys)
    for path in (*present, *loaded) if strict else ():
        if path not in loaded or path not in present:
            has, lacks = ("the state", "the saved one") if path in present else ("the saved state", "this one")
            raise ValueError(
                f"{has} has {path!r}, which {lacks} lacks; it was saved from another transformation or other parameters"
            )
    for path in present if strict else loaded:
        _check_saved(path, loaded[path], present[path])
    leaves, structure = tree.flatten(state)
    new = [
        _like(leaf, loaded[path], cast) if leaf is not None and path in loaded else leaf
        for path, leaf in zip(tree.paths(state), leaves, strict=True)
    ]
    begun = [path for path in present if path not in loaded]
    made = tree.unflatten(structure, new)
    return made if strict else (made, Loaded(tuple(loaded), tuple(begun), tuple(left)))


def migrate(tx: Any, state: Tree, params: Tree) -> tuple[Tree, Loaded]:
    """Go on with another transformation in mid-training: another chain, mask or partition.

    Args:
        tx: the transformation to go on with.
        state: of the former one.
        params: the parameters.

    Returns:
        A state of `tx`, which has from `state` all that fits, and the rest as `init` makes it; and `Loaded`, which says
        the paths that were taken and begun anew. See `load_state_dict` with `strict=False`.

    Raises:
        ValueError: the state is of other parameters; or rules whose steps differ would have to share one.

    Each rule has one step for all of its parameters. So a parameter that joins an Adam at step 1000 is at step 1001,
    with moments of zero, and its first updates are not corrected for bias: give newcomers a label of their own in the
    partition, or use `fo.Optimizer`, which counts for each parameter.

    Example:
        Unfreeze the body of a network:

        >>> import functorch_optim as fo, torch
        >>> def training(labels):
        ...     return fo.partition({"train": fo.adam(0.1), "keep": fo.set_to_zero()}, labels)
        >>> params = {"body": torch.zeros(1), "head": torch.zeros(1)}
        >>> tx = training({"body": "keep", "head": "train"})
        >>> params, state = fo.step(tx, fo.tree.map(torch.ones_like, params), tx.init(params), params)
        >>> tx = training("train")
        >>> state, loaded = fo.migrate(tx, state, params)
        >>> state["train"][1].exp_avg
        {'body': tensor([0.]), 'head': tensor([0.1000])}
        >>> loaded.begun
        ('train.1.exp_avg.body', 'train.1.exp_avg_sq.body')
    """
    return load_state_dict(tx.init(params), state_dict(state, params), params, strict=False)


def kept_dtype(saved: torch.dtype, initial: torch.dtype) -> torch.dtype:
    """Return the dtype in which a state goes on: its own where that is more precise and steps keep it.

    Args:
        saved: the dtype that it was saved in.
        initial: the dtype that it begins with. Steps keep float32 where that is float16 or bfloat16.
    """
    return torch.float32 if initial in HALF and saved in (torch.float32, torch.float64) else initial


def _check_is_state(state: Tree, name: str) -> None:
    """Raise unless this is a functional state.

    Raises:
        TypeError: it is not.
    """
    saved = "" if name == "state_dict" else ", saved"
    if isinstance(state, torch.optim.Optimizer | torch.nn.Module):
        arguments = "" if name == "state_dict" else "saved"
        raise TypeError(
            f"{name} is for states of transformations, got a {type(state).__name__}, which has a method for it: "
            f"call its .{name}({arguments})"
        )
    for path, leaf in zip(tree.paths(state), tree.flatten(state)[0], strict=True):
        if leaf is not None and not isinstance(leaf, Tensor):
            at = f"at {path!r}" if path else "for the whole state"
            raise TypeError(
                f"{name} is for trees of tensors, got a {type(leaf).__name__} {at}; write "
                f"{name}(state{saved}), where state = tx.init(params), or a result of tx.update"
            )


def _check_saved(path: str, saved: Any, leaf: Tensor) -> None:
    """Raise when a saved entry does not fit its place."""
    if not isinstance(saved, Tensor):
        raise ValueError(f"The saved {path!r} is {saved!r}, where a tensor belongs")
    if saved.shape != leaf.shape:
        raise ValueError(
            f"The saved {path!r} has shape {tuple(saved.shape)}, but the state's has {tuple(leaf.shape)}; "
            "it was saved from other parameters"
        )
    _check_values(path, local(saved), leaf)


def _like(leaf: Tensor, saved: Tensor, cast: bool) -> Tensor:
    """Copy a saved tensor to where that of the state is, without loss of precision unless it is to be cast."""
    return placed(saved, leaf).to(leaf.device, leaf.dtype if cast else kept_dtype(saved.dtype, leaf.dtype), copy=True)


def _check_values(path: str, saved: Tensor, leaf: Tensor) -> None:
    """Raise when a saved tensor has values that the state's cannot have."""
    if saved.is_complex() > leaf.is_complex():
        raise ValueError(f"The saved {path!r} is {saved.dtype}, but the state's is {leaf.dtype}")
    values = None if saved.is_meta else known_values(saved)
    if values is None or leaf.is_floating_point() or leaf.is_complex():
        return
    counts = path.rsplit(".", 1)[-1] == "step"
    rounded = values.to(leaf.dtype) != values
    wrong = values[rounded | (values < 0) if counts else rounded]
    if wrong.numel():
        what = "it is a count of updates" if counts else f"the state's is {leaf.dtype}"
        raise ValueError(f"The saved {path!r} is {wrong[0].item()}, but {what}")


def _copy(name: str, tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", step_dtype(), copy=True) if name == "step" else tensor.detach().clone()
