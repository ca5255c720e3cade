"""A transformation for a list of parameters, each with a state and a step count of its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import HALF, check_precision
from functorch_optim._core.initial import init, init_leaf
from functorch_optim._core.links import Link, numbered, select
from functorch_optim._core.rule import OF_TREE, TreeRule, step_dtype
from functorch_optim._core.transformation import GradientTransformation

State = dict[str, Any]


class Part(NamedTuple):
    """Which rules apply to a parameter, and under which keys its `state[p]` holds theirs.

    Attributes:
        links: indices of the rules that apply.
        keys: for each of them, the keys of its state.
        carried: for each of them, the keys of the numbers that its scalars carry on.
        steps: for each of them, the key of its step; None for a rule that does not count.
        shared: for links whose numbers are one for all parameters, the keys of these numbers.
        tree_steps: keys of steps of the whole tree, where the parameter has a step of its own beside it.
    """

    links: tuple[int, ...]
    keys: tuple[tuple[str, ...], ...]
    carried: tuple[tuple[str, ...], ...]
    steps: tuple[str | None, ...]
    shared: Mapping[int, tuple[str, ...]]
    tree_steps: frozenset[str]

    @property
    def counters(self) -> list[str]:
        """Return the keys of steps."""
        return list(dict.fromkeys([key for key in self.steps if key is not None]))

    @property
    def scalars(self) -> set[str]:
        """Return the keys of single numbers."""
        return {key for keys in self.carried for key in keys} | set(self.counters)

    @property
    def known(self) -> set[str]:
        """Return all keys."""
        return {key for keys in self.keys for key in keys} | self.scalars


class Position(NamedTuple):
    """Where a parameter is. Parameters at the same position are updated together.

    Attributes:
        steps: for each key of a step, the number of updates done.
        fresh: links that have no state yet, and so are at their first update, whatever the step.
        carried: links, and the numbers that their scalars carry on.
    """

    steps: tuple[tuple[str, float], ...]
    fresh: tuple[int, ...]
    carried: tuple[tuple[int, Any], ...]

    def step_of(self, part: Part, k: int) -> float:
        """Return how many updates a link has done."""
        if k in self.fresh or k not in part.links:
            return 0.0
        return dict(self.steps).get(part.steps[part.links.index(k)] or "", 0.0)


class Plan:
    """A transformation for a list of parameters.

    Args:
        transformation: the transformation.
        params: the parameters.
        names: their names, where they have some. Masks, labels and functions of the whole tree then see a dict by name;
            else the list.
        count: how `state[p]` keeps the step: as a Tensor or an int under "step", or, with None, not at all: a parameter
            is then past its first update once it has a state.

    Raises:
        ValueError: masks or labels do not fit the parameters, or names are not unique where they are needed.

    Attributes:
        transformation: the transformation.
        links: of the transformation.
        layout: how their states nest.
        params: the parameters in the order in which everything here is.
        structure: of their tree.
        active: for each link, whether it is for each parameter.
        parts: for each parameter, which rules apply to it.
        asks: whether some link declares an extra.
        whole: the links that are functions of the whole tree.
        of_tree: links whose numbers, and step, are those of the whole tree.
        sharing: links whose numbers are one for all parameters; for each, the parameters that keep them, and the keys.
    """

    def __init__(
        self,
        transformation: GradientTransformation,
        params: Sequence[Tensor],
        names: Sequence[str] | None,
        count: type | None = Tensor,
    ) -> None:
        self.transformation = transformation
        self.links, self.layout = transformation._links, transformation._layout
        self.names = names
        self.count = count
        self.whole = [k for k, link in enumerate(self.links) if isinstance(link.rule, TreeRule)]
        twice = [name for name, count in Counter(names or ()).items() if count > 1]
        if twice and any(link.where or isinstance(link.rule, TreeRule) for link in self.links):
            raise ValueError(
                f"Two parameters are named {twice[0]!r}, but {transformation!r} looks at parameters by name; "
                "give each a name of its own"
            )
        as_tree: Any = list(params) if names is None or twice else dict(zip(names, params, strict=True))
        self.params, self.structure = tree.flatten(as_tree)
        self._paths = tree.paths(as_tree)
        check_precision(self.params, self.path)
        try:
            self.active = select(self.links, as_tree)
        except ValueError as error:
            hint = "" if names else ". The parameters have no names here: give model.named_parameters() to see a dict"
            raise ValueError(f"{error}{hint}") from error
        self.asks = any(link.rule.extras.any or link.rule.extras.names - OF_TREE for link in self.links)
        self._state_types: dict[int, Any] = {}
        self.of_tree = _of_tree(self.links)
        parts: dict[tuple[int, ...], Part] = {}
        self.parts: list[Part] = []
        for i, p in enumerate(self.params):
            applying = tuple([k for k in range(len(self.links)) if self.active[k][i] and k not in self.whole])
            if applying not in parts:
                parts[applying] = self._part(applying, p)
            self.parts.append(parts[applying])
        self.sharing: dict[int, list[tuple[int, tuple[str, ...]]]] = {}
        for i, part in enumerate(self.parts):
            for k, keys in part.shared.items():
                self.sharing.setdefault(k, []).append((i, keys))

    def path(self, i: int) -> str:
        """Name a parameter for messages."""
        return self._paths[i]

    def initial_tree_state(self, k: int) -> Any:
        """Make the state of a function of the whole tree."""
        return init([self.links[k]], tree.unflatten(self.structure, self.params))[0]

    def as_kept(self, key: str, value: Any) -> Any:
        """Return a step, or a number that scalars carry on, as `state[p]` keeps it."""
        if key.split(".", maxsplit=1)[0] == "step" and self.count is int:
            return int(value)
        return value.reshape(()) if isinstance(value, Tensor) else scalar(value)

    def shared_numbers(self, states: Mapping[Any, State]) -> dict[int, list[Tensor]]:
        """Find the numbers that are one for all parameters, by link; none where no parameter has them yet.

        All parameters have the same, but in a state that was edited, or saved when each kept those of its own last
        update. Then those of the parameter with the most updates count. Where nobody has the step of the tree yet, it
        is that number of updates.
        """
        sharing = {i for users in self.sharing.values() for i, _ in users}
        own = {i: self.own_numbers(i, states.get(self.params[i], {})) for i in sharing}

        def rank(holder: tuple[int, tuple[str, ...]]) -> tuple[bool, float]:
            i, keys = holder
            state = states[self.params[i]]
            counts = [float(state.get(key) or 0) for key in self.parts[i].counters]
            return own[i].keys() >= {*keys}, max(counts, default=0.0)

        found = {}
        for k, users in self.sharing.items():
            rule = self.links[k].rule
            count = len(rule.counters[rule.counts :])
            holders = [(i, keys) for i, keys in users if own[i].keys() >= {*keys[:count]}]
            if holders:
                i, keys = furthest = max(holders, key=rank)
                found[k] = [own[i][key] if key in own[i] else scalar(rank(furthest)[1]) for key in keys]
        return found

    def own_numbers(self, i: int, state: State) -> State:
        """Return those numbers of a `state[p]` that are one for all parameters, as tensors that can be written.

        Args:
            i: index of the parameter.
            state: its `state[p]`.
        """
        part = self.parts[i]
        return {
            key: writable(state[key], None if key in part.counters else number_dtype(self.links[k]))
            for k, keys in part.shared.items()
            for key in keys
            if state.get(key) is not None
        }

    def completed(
        self, i: int, state: State, shared: Mapping[int, Sequence[Tensor]] | None = None
    ) -> tuple[Position, State]:
        """Find where a parameter is, and add to a copy of its `state[p]` the entries that are not there yet.

        Args:
            i: index of the parameter.
            state: its `state[p]`.
            shared: the numbers that are one for all parameters; see `shared_numbers`.
        """
        part, p, shared = self.parts[i], self.params[i], shared or {}
        state = {key: value for key, value in state.items() if value is not None}  # None is how buffers are reset
        begun = any(key in state for keys in part.keys for key in keys)
        for k, keys in part.shared.items():
            for key, number in zip(keys, shared.get(k, ()), strict=False):
                if key not in state or state[key] != number:
                    state[key] = number.clone()
        steps = []
        for key in part.counters:
            if key not in state and self.count is not None:
                # torch's SGD does not count: where it has left a buffer, it is past its first step.
                # On the CPU, whatever the default device: it is read at every step.
                state[key] = self.as_kept(key, float(begun and key not in part.tree_steps))
            elif key in state and self.count is not int:
                state[key] = writable(state[key])
            steps.append((key, float(state.get(key, begun))))
        fresh, carried = [], []
        for k, keys, carried_keys in zip(part.links, part.keys, part.carried, strict=True):
            link = self.links[k]
            rule: Any = link.rule
            for key, number in zip(carried_keys, rule.carried() if carried_keys else (), strict=True):
                dtype = number_dtype(link)
                state[key] = writable(state[key], dtype) if key in state else scalar(number, dtype)
            # Parameters with the same tensor that requires grad run together.
            numbers = shared[k][: len(carried_keys)] if k in shared else [state[key] for key in carried_keys]
            carried += [(k, number if number.requires_grad else number.item()) for number in numbers]
            missing = [key for key in keys if key not in state]
            if missing or any([state[key].dtype != p.dtype for key in keys]):  # noqa: C419
                initial = dict(zip(keys, init_leaf(link, p, lambda: self.path(i)), strict=True))
                state.update({key: initial[key] for key in missing})
                if keys and len(missing) == len(keys) and k not in shared:
                    fresh.append(k)
                for key in keys:
                    # The parameter was converted since, by module.to(dtype) say. More digits than it has are kept.
                    wanted = initial[key].dtype
                    if not (state[key].dtype == torch.float32 and wanted in HALF):
                        state[key] = state[key].to(wanted)
        return Position(tuple(steps), tuple(fresh), tuple(carried)), state

    def _part(self, links: tuple[int, ...], p: Tensor) -> Part:
        counts: Counter[str] = Counter()
        scopes: dict[Any, str] = {}

        def named(fields: Sequence[str]) -> tuple[str, ...]:
            return tuple([numbered(field, counts) for field in fields])

        keys, carried, steps = [], [], []
        for k in links:
            link = self.links[k]
            keys.append(named(getattr(self.state_type(k, p), "_fields", ())))
            carried.append(named(link.rule.counters[link.rule.counts :]))
            scope = tuple([k - back for back in link.when])  # links that are left out together share a step
            if link.rule.counts and scope not in scopes:
                scopes[scope] = numbered("step", counts)
            steps.append(scopes[scope] if link.rule.counts else None)
        # Numbers of the tree go with a step of the tree. It has a key of its own where other rules count for this
        # parameter alone.
        own = {step for k, step in zip(links, steps, strict=True) if k not in self.of_tree}
        beside: dict[str, str] = {}
        shared: dict[int, tuple[str, ...]] = {}
        for n, k in enumerate(links):
            step = steps[n]
            if k in self.of_tree and step is not None:
                if step in own:
                    steps[n] = step = beside.get(step) or beside.setdefault(step, numbered("step", counts))
                shared[k] = (*carried[n], step)
            elif k in self.of_tree or _is_kept(self.links[k].rule):
                shared[k] = carried[n]
        return Part(links, tuple(keys), tuple(carried), tuple(steps), shared, frozenset(beside.values()))

    def state_type(self, k: int, p: Tensor) -> Any:
        """Return the NamedTuple in which a rule keeps its state for one parameter."""
        if k not in self._state_types:
            rule: Any = self.links[k].rule
            # A rule that did not declare it is asked with a tensor that has no data.
            self._state_types[k] = rule.state_type or type(rule.init_leaf(torch.empty_like(p, device="meta")))
        return self._state_types[k]


def _of_tree(links: Sequence[Link]) -> set[int]:
    """Find the links whose scalars carry on numbers of the whole tree; and those that schedule hyperparameters of such.

    So these numbers are the same, whichever of the parameters have a gradient. They are those of rules that see the
    tree, and of gates: all parameters make their steps together.
    """
    gates = {k - back for k, link in enumerate(links) for back in link.when}
    seeing = {k for k, link in enumerate(links) if link.rule.carry is not None and (link.rule.sees_tree or k in gates)}
    return seeing | {k - back for k in seeing for back in links[k].reads}


def _is_kept(rule: Any) -> bool:
    """Tell whether a rule keeps hyperparameters that can be set; scheduled ones depend on the parameter's step."""
    return rule.keeps is not None and not hasattr(rule.state_type, "_computed")


def number_dtype(link: Link) -> torch.dtype:
    """Return the dtype in which `state[p]` keeps the numbers that the scalars of a link carry on."""
    rule: Any = link.rule
    return step_dtype() if rule.narrow else torch.float64


def scalar(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Make a single number of `state[p]`."""
    dtype = dtype or step_dtype()
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        return value.to(dtype)
    return torch.tensor(float(value), dtype=dtype, device="cpu")


def writable(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Return a number of `state[p]`, which a program may have exchanged, as a tensor that a step can write to."""
    if not isinstance(value, Tensor):
        return scalar(value, dtype)
    if dtype is not None and not value.is_floating_point():
        return value.to(dtype)
    return value.clone() if value.is_inference() else value


def tree_keys(index: int, plan: Plan) -> dict[int, str]:
    """Name the states of functions of the whole tree: by tree, and by number among them."""
    return {k: f"{index}.{number}" for number, k in enumerate(plan.whole)}
