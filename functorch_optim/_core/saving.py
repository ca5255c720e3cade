"""States as plain containers, to save and to load."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import check_choice
from functorch_optim._core.links import numbered
from functorch_optim._core.rule import EmptyState, StepState, step_dtype
from functorch_optim.tree import Tree

# What belongs to no parameter: steps, numbers that scalars carry on, states of functions of the whole tree.
REST = "transformation"


def state_dict(state: Tree, params: Tree = None, *, by: Literal["path", "index"] = "path") -> dict[str, Any]:
    """Turn a state into plain containers, which `torch.load(weights_only=True)` takes.

    Args:
        state: what `init` or `update` returned; any tree of tensors.
        params: the parameters, to have the state of each of them by itself, under torch.optim's names.
        by: with `params`, what to call each parameter: its dotted path, or its index in the order in which dicts were
            filled, as `model.named_parameters()` and torch.optim count.

    Returns:
        Without `params` a dict: dotted path in the state -> tensor. With `params` a dict of two:
        `"state"`: path or index -> {"step": ..., "exp_avg": ..., ...}, as in torch.optim's state dicts, and
        `"transformation"`: path in the state -> what belongs to no parameter.
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
        return _by_path(state)
    keys = _keys(params, by)
    places = _places(state, params)
    states: dict[Any, dict[str, Tensor]] = {key: {} for key in sorted(keys)}
    for place in places:
        for owner, name in zip(place.owners, place.names, strict=True):
            states[keys[owner]][name] = place.tensor
    _add_steps([place for place in places if place.of_all], list(states.values()))
    if by == "index":  # torch.optim modifies what it loads
        states = {key: {name: _copy(name, tensor) for name, tensor in own.items()} for key, own in states.items()}
    return {
        "state": {key: found for key, found in states.items() if found},
        REST: {place.path: place.tensor for place in places if place.shared},
    }


def load_state_dict(
    state: Tree, saved: Mapping[str, Any], params: Tree = None, *, by: Literal["path", "index"] = "path"
) -> Tree:
    """Build a state from a saved one.

    Args:
        state: a state of the same transformation for the same parameters, as `init` makes it.
        saved: what `state_dict` returned; with `by="index"`, the state dict of an optimizer too.
        params: the parameters, where `state_dict` was given them.
        by: as it was given to `state_dict`.

    Returns:
        State built like `state`, with the saved values in its own dtypes and on its own devices.

    Raises:
        TypeError: `state` is no tree of tensors, but an optimizer, say.
        ValueError: paths or shapes differ, or something is not what belongs there; the message names the first. Or an
            optimizer's state dict has parameters at different steps, where a state has one step; see `from_torch`.

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
    present = _by_path(state)
    check_is_dict("state", saved)
    loaded = saved if params is None else _gathered(_places(state, params), saved, _keys(params, by))
    for path in (*present, *loaded):
        if path not in loaded or path not in present:
            has, lacks = ("the state", "the saved one") if path in present else ("the saved state", "this one")
            raise ValueError(
                f"{has} has {path!r}, which {lacks} lacks; it was saved from another transformation or other parameters"
            )
    for path, leaf in present.items():
        if not isinstance(loaded[path], Tensor):
            raise ValueError(f"The saved {path!r} is {loaded[path]!r}, where a tensor belongs")
        if loaded[path].shape != leaf.shape:
            raise ValueError(
                f"The saved {path!r} has shape {tuple(loaded[path].shape)}, but the state's has {tuple(leaf.shape)}; "
                "it was saved from other parameters"
            )
        _check_values(path, loaded[path], leaf)
    leaves, structure = tree.flatten(state)
    values = zip(tree.paths(state), leaves, strict=True)
    return tree.unflatten(structure, [None if leaf is None else loaded[path].to(leaf) for path, leaf in values])


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
                f"{name}(state{saved}), where state = tx.init(params), or what tx.update returned"
            )


def check_is_dict(what: str, saved: Any) -> None:
    """Raise when what was saved, as what the message says, is no dict.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"The saved {what} is of type {type(saved).__name__}, where a dict belongs")


def _check_values(path: str, saved: Tensor, leaf: Tensor) -> None:
    """Raise when a saved tensor has values that the state's cannot have."""
    if saved.is_complex() > leaf.is_complex():
        raise ValueError(f"The saved {path!r} is {saved.dtype}, but the state's is {leaf.dtype}")
    if saved.is_meta or leaf.is_floating_point() or leaf.is_complex():
        return
    counts = path.rsplit(".", 1)[-1] == "step"
    wrong = saved[(saved.to(leaf.dtype) != saved) | (saved < 0) if counts else saved.to(leaf.dtype) != saved]
    if wrong.numel():
        what = "it is a count of updates" if counts else f"the state's is {leaf.dtype}"
        raise ValueError(f"The saved {path!r} is {wrong[0].item()}, but {what}")


def _by_path(state: Tree) -> dict[str, Tensor]:
    pairs = zip(tree.paths(state), tree.flatten(state)[0], strict=True)
    kept = [(path, leaf) for path, leaf in pairs if leaf is not None]
    found = dict(kept)
    if len(found) < len(kept):
        paths = [path for path, _ in kept]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"Two tensors of the state have the path {twice!r}; rename the keys that contain dots")
    return found


# A state by parameter. -----------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A tensor of a state.

    Attributes:
        path: dotted path in the state.
        tensor: what is there.
        owners: indices of the parameters whose it is.
        names: what it is called in the state of each of them.
        shared: whether it may be several parameters'.
        of_all: whether it is the step of a rule that keeps nothing else, so that nothing tells whose it is.
        idle: whether it is a number of a rule that is for none of the parameters.
    """

    path: str
    tensor: Tensor
    owners: Sequence[int]
    names: Sequence[str]
    shared: bool
    of_all: bool = False
    idle: bool = False


def _add_steps(places: list[_Place], states: list[dict[str, Tensor]]) -> None:
    """Give a step to parameters that no rule keeps more of."""
    bare = [state for state in states if "step" not in state] if places else []
    if bare and not all(torch.equal(place.tensor, places[0].tensor) for place in places):
        raise ValueError(
            f"Rules that keep nothing but their step are at different ones, {places[0].path!r} and others: the state "
            "does not tell which parameters are at which"
        )
    for state in bare:
        state["step"] = places[0].tensor


def _places(state: Tree, params: Tree) -> list[_Place]:
    """Find all tensors of a state, and whose they are."""
    paths, structure = tree.paths(params), tree.flatten(params)[1]
    everyone = range(len(paths))
    places = []
    counts: list[Counter[str]] = [Counter() for _ in everyone]
    for path, part in _parts(state, ""):
        counters, fields = _fields(part)
        if fields is None:
            places += [_Place(_dotted(path, inner), leaf, (), (), True) for inner, leaf in _by_path(part).items()]
            continue
        columns = {
            field: tree.flatten_up_to(
                structure, getattr(part, field), f"{_dotted(path, field)} in the state", params, "params"
            )
            for field in fields
        }
        owners = [i for i in everyone if any(isinstance(column[i], Tensor) for column in columns.values())]
        names = [{field: numbered(field, counts[i]) for field in (*fields, *counters[1:])} for i in owners]
        for field in counters:
            own = [named.get(field, field) for named in names]  # there is one step for all rules
            idle = bool(columns) and not owners
            places.append(_Place(_dotted(path, field), getattr(part, field), owners, own, True, not columns, idle))
        for field, column in columns.items():
            places += [
                _Place(_dotted(path, _dotted(field, paths[i])), column[i], (i,), (named[field],), False)
                for i, named in zip(owners, names, strict=True)
            ]
    return places


def _parts(state: Tree, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the states of the links of a chain, through nested chains and partitions."""
    if type(state) is tuple or type(state) is dict:
        items: Any = enumerate(state) if isinstance(state, tuple) else state.items()
        for key, child in items:
            yield from _parts(child, _dotted(path, key))
    else:
        yield path, state


def _fields(part: Any) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the fields of a rule's state: those that are there once, and those like the parameters; else None."""
    if isinstance(part, StepState | EmptyState):
        return part._fields, ()
    counters = getattr(type(part), "_counters", None)
    return ((), None) if counters is None else (counters, part._fields[len(counters) :])


def _gathered(places: list[_Place], saved: Mapping[str, Any], keys: list[Any]) -> dict[str, Tensor]:
    """Collect from what `state_dict` or an optimizer saved, by path in the state."""
    states, rest = saved.get("state", {}), saved.get(REST, {})
    check_is_dict("state", states)
    check_is_dict(f"state of functions of the whole tree, {REST!r},", rest)
    for key, own in states.items():
        check_is_dict(f"state of parameter {key!r}", own)
    unknown = [key for key in states if key not in keys]
    if unknown:
        raise ValueError(
            f"The saved state has the parameter {unknown[0]!r}; those here are {', '.join(map(repr, keys))}"
        )
    found: dict[str, Tensor] = dict(rest)
    for place in places:
        if place.idle:  # optimizers do not save it, and it changes nothing
            found.setdefault(place.path, place.tensor)
            continue
        owned = zip(place.owners, place.names, strict=True)
        owners = [(i, "step") for i in range(len(keys))] if place.of_all else list(owned)
        values = {keys[i]: states[keys[i]][name] for i, name in owners if name in states.get(keys[i], {})}
        if place.path in found or not values:
            continue
        if len({float(value) for value in values.values()} if place.shared else ()) > 1:
            at = ", ".join([f"{key!r}: {float(value)}" for key, value in values.items()])
            raise ValueError(
                f"The parameters are at different steps, or differ in {owners[0][1]}: {at}. Here all of them share it; "
                "from_torch(optimizer) makes a transformation that does not"
            )
        found[place.path] = torch.as_tensor(next(iter(values.values())))
    return found


def _keys(params: Tree, by: str) -> list[Any]:
    check_choice("by", by, "path", "index")
    keys: list[Any] = list(tree.paths(params) if by == "path" else tree.insertion_order(params))
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"Two parameters have the path {twice!r}; rename the keys with dots, or choose by='index'")
    return keys


def _copy(name: str, tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", step_dtype(), copy=True) if name == "step" else tensor.detach().clone()


def _dotted(path: str, key: Any) -> str:
    return f"{path}.{key}" if path and key != "" else f"{path}{key}"
