"""State dicts brought into the form of an optimizer: parameters found by name, and fitting entries picked."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from functorch_optim._core import checks, saving
from functorch_optim._core.naming import indices_of, names_of, same_names
from functorch_optim._core.places import REST, fits
from functorch_optim.optim._loading import fitting_state
from functorch_optim.optim._plan import Plan, tree_keys

# Through torch.optim's load_state_dict. ------------------------------------------------------------------------------


class Manner(NamedTuple):
    """How states are loaded.

    Attributes:
        strict: whether the state of a parameter must be whole.
        cast: whether to round numbers that were saved in a wider dtype.
    """

    strict: bool = True
    cast: bool = False


class _AsSaved:
    """A wrapper that torch.optim's load_state_dict does not look into; it would cast all numbers to p.dtype."""

    def __init__(self, it: Any, manner: Manner) -> None:
        self.it, self.manner = it, manner


def as_saved(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], manner: Manner, *, takes_names: bool
) -> dict[str, Any]:
    """Arrange a state dict as the groups of an optimizer are, and keep torch from looking into its states.

    Args:
        optimizer: loads it.
        state_dict: the saved dict.
        manner: for `unwrapped` to return.
        takes_names: see `arranged`.
    """
    _check_parts(state_dict)
    groups = arranged(optimizer.param_groups, state_dict["param_groups"], takes_names)
    states = renamed(optimizer.param_groups, state_dict)
    wrapped = {key: _AsSaved(value, manner) for key, value in states.items()}
    return {**state_dict, "state": wrapped, "param_groups": groups}


def _check_parts(saved: Mapping[str, Any]) -> None:
    """Raise when a dict is not the state dict of an optimizer, but that of a model, say, or of several parts."""
    if saved.keys().isdisjoint(("state", "param_groups")):
        found = ", ".join(map(repr, [*saved][:4])) + (", ..." if len(saved) > 4 else "") or "nothing"
        raise KeyError(
            f"The state dict of an optimizer has 'state' and 'param_groups', but this one has {found}. Give a result "
            "of opt.state_dict(), which may be a part of what was saved"
        )
    checks.check_is_dict("state", saved["state"])


def unwrapped(states: Mapping[Any, Any]) -> tuple[dict[Any, Any], Manner]:
    """Return the states that `as_saved` has wrapped, and how to load them."""
    manners = [value.manner for value in states.values() if isinstance(value, _AsSaved)]
    found = {key: value.it if isinstance(value, _AsSaved) else value for key, value in states.items()}
    return found, manners[0] if manners else Manner()


MODE = "train_mode"
"""The entry of saved groups that says whether the parameters are those that are trained; schedulefree's name."""


def without_mode(state_dict: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Take the mode out of the groups of a state dict.

    Returns:
        The state dict, and whether it was saved while parameters were evaluated.
    """
    groups = state_dict.get("param_groups")
    named = isinstance(groups, list | tuple) and all(isinstance(group, Mapping) for group in groups)
    if not named or not any(MODE in group for group in groups or ()):
        return state_dict, False
    plain = [{name: value for name, value in group.items() if name != MODE} for group in groups or ()]
    return {**state_dict, "param_groups": plain}, any(group.get(MODE) is False for group in groups or ())


# By name. ------------------------------------------------------------------------------------------------------------


def arranged(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], takes_names: bool
) -> list[dict[str, Any]]:
    """Bring saved groups into the order of these, by name where both have names.

    Args:
        groups: of the optimizer.
        saved: of a state dict.
        takes_names: whether an optimizer without names takes the saved ones, as torch.optim's do.

    Returns:
        Groups whose `params` are the saved indices, each where its parameter is, and whose names are the optimizer's.

    Raises:
        ValueError: names differ by more than wrappers; or groups have other parameters than they had.
    """
    own, theirs = names_of(groups), names_of(saved)
    if own is None or theirs is None or own == theirs or len(groups) != len(saved):  # torch has an error for the last
        kept = [dict(group) for group in saved]
        for own_group, new in zip(groups, kept, strict=False):
            if "param_names" in own_group:
                new["param_names"] = own_group["param_names"]
            elif not takes_names:
                new.pop("param_names", None)
        return kept
    found = same_names(own, theirs)
    missing = [name for name in own if name not in found] + [name for name in theirs if name not in found.values()]
    if missing:
        sides = ("This optimizer", "the saved state"), ("The saved state", "this optimizer")
        (has, lacks), others = (sides[0], theirs) if missing[0] in own else (sides[1], own)
        raise ValueError(
            f"{has} has the parameter {missing[0]!r}, which {lacks} lacks; that has {', '.join(others)}. Rename them "
            "in saved['param_groups'][i]['param_names'], or delete those entries to load by order; strict=False loads "
            "those whose names are the same"
        )
    indices = dict(zip(theirs, indices_of(saved), strict=True))
    homes = {name: i for i, group in enumerate(saved) for name in group["param_names"]}
    ordered = []
    for i, group in enumerate(groups):
        names = [found[name] for name in group["param_names"]]
        places = {homes[name] for name in names} or {i}
        home = saved[min(places)]
        if len(places) > 1 or len(home["params"]) != len(names):
            raise ValueError(
                f"The parameters {', '.join(group['param_names'])} are one group here, but the saved groups are "
                f"{[list(group['param_names']) for group in saved]}; make the groups that were saved, or give "
                "strict=False"
            )
        order = [indices[name] for name in names]
        ordered.append({**home, "params": order, "param_names": list(group["param_names"])})
    return ordered


def renamed(groups: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the saved states, with the names of the optimizer in the states of functions of the whole tree.

    Raises:
        ValueError: parameters are in another order by name, where a function of the whole tree may have put them in a
            row.
    """
    states, own, theirs = saved["state"], names_of(groups), names_of(saved["param_groups"])
    whole = states.get(REST)
    if own is None or theirs is None or own == theirs or not isinstance(whole, Mapping):
        return dict(states)
    found = {theirs: own for own, theirs in same_names(own, theirs).items()}
    if [found[name] for name in sorted(found)] != sorted(found.values()):
        raise ValueError(
            "The names of the parameters come in another order than when the state was saved, and the functions of the "
            "whole tree see them in that order; give the parameters the names that they had"
        )
    return {**states, REST: {key: _with_names(state, found) for key, state in whole.items()}}


def _with_names(state: Any, found: Mapping[str, str]) -> Any:
    """Put other names of parameters into the paths of a state."""
    if not isinstance(state, Mapping):
        return state
    paths = {}
    for path, value in state.items():
        ends = [name for name in found if path == name or path.endswith(f".{name}")]
        name = max(ends, key=len, default="")
        paths[path[: len(path) - len(name)] + found.get(name, "")] = value
    return paths


# Entries that fit. ----------------------------------------------------------------------------------------------------


def fitting(
    groups: Sequence[Mapping[str, Any]], plans: Sequence[Plan], saved: Mapping[str, Any]
) -> tuple[dict[str, Any], saving.Loaded]:
    """Pick the entries of a state dict that fit an optimizer.

    Args:
        groups: of the optimizer.
        plans: for each of its trees.
        saved: the state dict.

    Returns:
        A state dict of this optimizer, with its own groups, and the entries that were taken.

    Raises:
        ValueError: there are other numbers of parameters than were saved, and no names to tell which are which.
    """
    _check_parts(saved)
    states, params = renamed(groups, saved), indices_of(groups)
    places, theirs = _places(groups, saved["param_groups"])
    names = names_of(groups) or [str(number) for number in range(len(params))]
    numbers = {p: number for number, p in enumerate(params)}
    new: dict[Any, Any] = {}
    taken: list[str] = []
    begun: list[str] = []
    for plan in plans:
        for i, p in enumerate(plan.params):
            number = numbers[p]
            own = states.get(places[number], {})
            checks.check_is_dict(f"state of parameter {names[number]!r}", own)
            kept, anew = fitting_state(plan, i, own)
            if kept:
                new[number] = kept
            taken += [f"{names[number]}.{key}" for key in kept]
            begun += [f"{names[number]}.{key}" for key in anew]
    trees, known = states.get(REST, {}), {}
    checks.check_is_dict(f"state of functions of the whole tree, {REST!r},", trees)
    for index, plan in enumerate(plans):
        for k, key in tree_keys(index, plan).items():
            initial, tree_state = saving.state_dict(plan.initial_tree_state(k)), trees.get(key, {})
            whole_fits = initial.keys() == tree_state.keys() and all(
                fits(tree_state[path], leaf) for path, leaf in initial.items()
            )
            known[key] = tree_state if whole_fits else initial
            (taken if whole_fits else begun).extend([f"{REST}.{key}.{path}" for path in initial])
    if any(known.values()) and new | trees:
        new[REST] = known
    used = {place: new.get(number, {}) for number, place in enumerate(places)}
    used[REST] = {key for key, state in known.items() if state is trees.get(key)}
    left = [
        f"{theirs.get(place, place)}.{key}"
        for place, own in states.items()
        for key in own
        if key not in used.get(place, {})
    ]
    own_groups = []
    for group in groups:  # tensors and functions stay where they are, as all that a saved group lacks
        plain = {name: value for name, value in group.items() if isinstance(value, bool | int | float | str | tuple)}
        own_groups.append({**plain, "params": [numbers[p] for p in group["params"]]})
    return {**saved, "state": new, "param_groups": own_groups}, saving.Loaded(tuple(taken), tuple(begun), tuple(left))


def _places(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], dict[Any, str]]:
    """Find the saved index of each parameter, None where there is none; and the saved names by index."""
    own, theirs, indices = names_of(groups), names_of(saved), indices_of(saved)
    if own is None or theirs is None:
        sizes = [[len(group["params"]) for group in some] for some in (groups, saved)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The saved groups have {sizes[1]} parameters and these {sizes[0]}, and without names nothing tells "
                "which are which; give model.named_parameters() to the optimizer that saves and to the one that loads"
            )
        return indices, {}
    found, known = same_names(own, theirs), dict(zip(theirs, indices, strict=True))
    return [known.get(found.get(name, "")) for name in own], dict(zip(indices, theirs, strict=True))
