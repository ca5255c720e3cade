"""The entries of states by path and by parameter, and of saved states likewise."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_is_dict
from functorch_optim._core.hyperparameters import check_choice
from functorch_optim._core.links import numbered
from functorch_optim._core.naming import indices_of, names_of, same_names
from functorch_optim._core.rule import EmptyState, StepState
from functorch_optim.tree import Tree

REST = "transformation"
"""The key of entries that belong to no parameter: steps, numbers carried on, states of functions of the whole tree."""


class Place(NamedTuple):
    """A tensor of a state.

    Attributes:
        link: the number of its rule.
        path: dotted path in the state.
        tensor: the entry.
        owners: indices of the parameters whose it is.
        names: its name in the state of each of them.
        shared: whether it may be several parameters'.
        of_all: whether it is the step of a rule that keeps nothing else, so that nothing tells whose it is.
        idle: whether it is a number of a rule that is for none of the parameters.
    """

    link: int
    path: str
    tensor: Tensor
    owners: Sequence[int]
    names: Sequence[str]
    shared: bool
    of_all: bool = False
    idle: bool = False


def add_steps(places: list[Place], states: list[dict[str, Tensor]]) -> None:
    """Give a step to parameters that no rule keeps more of."""
    bare = [state for state in states if "step" not in state] if places else []
    if bare and not all(torch.equal(place.tensor, places[0].tensor) for place in places):
        raise ValueError(
            f"Rules that keep nothing but their step are at different ones, {places[0].path!r} and others: the state "
            "does not tell which parameters are at which"
        )
    for state in bare:
        state["step"] = places[0].tensor


def places_of(state: Tree, params: Tree) -> list[Place]:
    """Find all tensors of a state, and whose they are."""
    paths, structure = tree.paths(params), tree.flatten(params)[1]
    everyone = range(len(paths))
    places = []
    counts: list[Counter[str]] = [Counter() for _ in everyone]
    for link, (path, part) in enumerate(state_parts(state)):
        counters, fields = _fields(part)
        if fields is None:
            places += [Place(link, _dotted(path, inner), leaf, (), (), True) for inner, leaf in by_path(part).items()]
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
            idle, of_all = bool(columns) and not owners, field == "step" and not columns
            tensor = getattr(part, field)
            places.append(Place(link, _dotted(path, field), tensor, owners, own, True, of_all, idle))
        for field, column in columns.items():
            places += [
                Place(link, _dotted(path, _dotted(field, paths[i])), column[i], (i,), (named[field],), False)
                for i, named in zip(owners, names, strict=True)
            ]
    return places


def state_parts(state: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the states of the links of a chain, through nested chains and partitions."""
    if type(state) is tuple or type(state) is dict:
        items: Any = enumerate(state) if isinstance(state, tuple) else state.items()
        for key, child in items:
            yield from state_parts(child, _dotted(path, key))
    else:
        yield path, state


def _fields(part: Any) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the fields of a rule's state: those that are there once, and those like the parameters; else None."""
    if isinstance(part, StepState | EmptyState):
        return part._fields, ()
    counters = getattr(type(part), "_counters", None)
    return ((), None) if counters is None else (counters, part._fields[len(counters) :])


def _saved_states(saved: Mapping[str, Any]) -> tuple[Mapping[Any, Any], Mapping[str, Any]]:
    """Return the saved entries of each parameter, and those of none."""
    states, rest = saved.get("state", {}), saved.get(REST, {})
    check_is_dict("state", states)
    check_is_dict(f"state of functions of the whole tree, {REST!r},", rest)
    for key, own in states.items():
        check_is_dict(f"state of parameter {key!r}", own)
    return states, rest


def gathered(places: list[Place], saved: Mapping[str, Any], keys: list[Any]) -> dict[str, Tensor]:
    """Collect saved entries, of a state or of an optimizer, by path in the state."""
    states, rest = _saved_states(saved)
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
        if place.path not in found and values:
            found[place.path] = _agreed(values, owners[0][1]) if place.shared else next(iter(values.values()))
    return found


def _agreed(values: Mapping[Any, Any], name: str) -> Tensor:
    """Return the number that parameters share.

    Raises:
        ValueError: theirs differ.
    """
    if len({float(value) for value in values.values()}) > 1:
        at = ", ".join([f"{key!r}: {float(value)}" for key, value in values.items()])
        raise ValueError(
            f"The parameters are at different steps, or differ in {name}: {at}. Here all of them share it; "
            "from_torch(optimizer) makes a transformation that does not"
        )
    number: Tensor = _number(next(iter(values.values())))
    return number


def fitting_by_path(state: Tree, saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Pick the entries that fit: of each rule all or none."""
    found: dict[str, Tensor] = {}
    for path, part in state_parts(state):
        own = {_dotted(path, inner): leaf for inner, leaf in by_path(part).items()}
        if all(fits(saved.get(inner), leaf) for inner, leaf in own.items()):
            found.update({inner: saved[inner] for inner in own})
    return found


def fitting(places: list[Place], saved: Mapping[str, Any], keys: list[Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Pick the entries that fit: of each rule and parameter all or none; and name the rest."""
    states, rest = _saved_states(saved)
    found: dict[str, Tensor] = {}
    used: set[tuple[Any, str]] = set()
    for _, link in groupby(places, key=lambda place: place.link):
        rows = list(link)
        own = [place for place in rows if not place.shared]
        if not own and (not all(place.of_all for place in rows) or len(rows) > 1):  # it belongs to no parameter
            if all(fits(rest.get(place.path), place.tensor) for place in rows):
                found.update({place.path: rest[place.path] for place in rows})
            continue
        pairs = [(place, i, name) for place in rows for i, name in zip(place.owners, place.names, strict=True)]
        pairs += [(place, i, "step") for place in rows if place.of_all for i in range(len(keys))]
        partial = {i for place, i, name in pairs if not fits(_number(states.get(keys[i], {}).get(name)), place.tensor)}
        for place in rows:
            names = {keys[i]: name for one, i, name in pairs if one is place and i not in partial}
            values = {key: states[key][name] for key, name in names.items()}
            used.update(names.items())
            if values:
                name = next(iter(names.values()))
                found[place.path] = _agreed(values, name) if place.shared else next(iter(values.values()))
    shared = {name for own in states.values() for name in own}
    left = [_dotted(str(key), name) for key, own in states.items() for name in own if (key, name) not in used]
    left += [path for path in rest if path not in found and path.rsplit(".", 1)[-1] not in shared]
    return found, left


def _number(value: Any) -> Any:
    """Make a tensor of a number, as optimizers keep their steps."""
    return torch.as_tensor(value, device="cpu") if isinstance(value, int | float) else value


def saved_keys(params: Tree, by: str, saved: Mapping[str, Any]) -> list[Any]:
    """List the saved keys of the parameters: by name where both have names."""
    keys, paths = keys_of(params, by), tree.paths(params)
    if by == "path":
        states = saved.get("state", {})
        found = same_names(keys, [*states]) if all(isinstance(key, str) for key in states) else {}
        return [found.get(key, key) for key in keys]
    groups = saved.get("param_groups", ())
    names = names_of(groups) or ()
    found = same_names(paths, names)
    indices = dict(zip(names, indices_of(groups) if names else (), strict=True))
    return [indices[found[path]] for path in paths] if len(found) == len(paths) else keys


def keys_of(params: Tree, by: str) -> list[Any]:
    check_choice("by", by, "path", "index")
    keys: list[Any] = list(tree.paths(params) if by == "path" else tree.insertion_order(params))
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"Two parameters have the path {twice!r}; rename the keys with dots, or choose by='index'")
    return keys


def _dotted(path: str, key: Any) -> str:
    return f"{path}.{key}" if path and key != "" else f"{path}{key}"


def by_path(state: Tree) -> dict[str, Tensor]:
    pairs = zip(tree.paths(state), tree.flatten(state)[0], strict=True)
    kept = [(path, leaf) for path, leaf in pairs if leaf is not None]
    found = dict(kept)
    if len(found) < len(kept):
        paths = [path for path, _ in kept]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"Two tensors of the state have the path {twice!r}; rename the keys that contain dots")
    return found


def fits(saved: Any, leaf: Tensor) -> bool:
    """Tell whether something that was saved can stand in the place of a tensor."""
    return isinstance(saved, Tensor) and saved.shape == leaf.shape and saved.is_complex() <= leaf.is_complex()
