"""How a transformation is run over a list of parameters, each with a state and a step count of its own."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core import lift, passes
from functorch_optim._core.checks import HALF, check_updates
from functorch_optim._core.known import Known
from functorch_optim._core.layout import numbered
from functorch_optim._core.links import Link, select
from functorch_optim._core.passes import Bucket, Donations, Leaves
from functorch_optim._core.rule import Rule, TreeRule, step_dtype
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution import writing

State = dict[str, Any]


class Part(NamedTuple):
    """Which rules apply to a parameter, and under which keys its `state[p]` holds theirs.

    Attributes:
        links: indices of the rules that apply.
        keys: for each of them, the keys of its state.
        carried: for each of them, the keys of the numbers that its scalars carry on.
        counted: whether any of them needs the step.
    """

    links: tuple[int, ...]
    keys: tuple[tuple[str, ...], ...]
    carried: tuple[tuple[str, ...], ...]
    counted: bool

    @property
    def scalars(self) -> set[str]:
        """Return the keys of single numbers."""
        return {key for keys in self.carried for key in keys} | ({"step"} if self.counted else set())

    @property
    def known(self) -> set[str]:
        """Return all keys."""
        return {key for keys in self.keys for key in keys} | self.scalars


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
        links: of the transformation.
        params: the parameters in the order in which everything here is.
        active: for each link, whether it is for each parameter.
        parts: for each parameter, which rules apply to it.
        asks: whether some link declares an extra.
    """

    def __init__(
        self,
        transformation: GradientTransformation,
        params: Sequence[Tensor],
        names: Sequence[str] | None,
        count: type | None = Tensor,
    ) -> None:
        self.links = transformation._links
        self.names = names
        self.count = count
        twice = [name for name, count in Counter(names or ()).items() if count > 1]
        if twice and any(link.where or isinstance(link.rule, TreeRule) for link in self.links):
            raise ValueError(
                f"Two parameters are named {twice[0]!r}, but {transformation!r} looks at parameters by name; "
                "give each a name of its own"
            )
        self._tree: Any = list(params) if names is None or twice else dict(zip(names, params, strict=True))
        self.params, self._structure = tree.flatten(self._tree)
        self._paths = tree.paths(self._tree)
        try:
            self.active = select(self.links, self._tree)
        except ValueError as error:
            hint = "" if names else ". The parameters have no names here: give model.named_parameters() to see a dict"
            raise ValueError(f"{error}{hint}") from error
        self.stepped = False
        self.steady: Any = None
        self.asks = any(link.rule.extras.any or link.rule.extras.names - {"updates"} for link in self.links)
        self._state_types: dict[int, Any] = {}
        rules = [k for k, link in enumerate(self.links) if isinstance(link.rule, Rule)]
        parts: dict[tuple[int, ...], Part] = {}
        self.parts: list[Part] = []
        for i, p in enumerate(self.params):
            applying = tuple([k for k in rules if self.active[k][i]])
            if applying not in parts:
                parts[applying] = self._part(applying, p)
            self.parts.append(parts[applying])

    def update(
        self,
        states: list[State],
        tree_states: dict[int, Any],
        extra: dict[str, Any],
        donations: Donations | None = None,
    ) -> tuple[list[Any], list[State], dict[int, Any]]:
        """Compute updates and next states; change nothing.

        Args:
            states: what is known of `state[p]`, for each parameter; what is missing is filled in, in copies.
            tree_states: the states of functions of the whole tree, by link.
            extra: by name, what some transformation declares.
            donations: see `passes.run`.

        Returns:
            An update for each parameter, or None; the next states of those that have one; and of the tree.
        """
        grads: list[Any] = [p.grad for p in self.params]
        check_updates(grads, self.params, self.path)
        states = list(states)
        params = writing.unmodified(self.params)
        groups: dict[Any, list[int]] = {}
        for i, g in enumerate(grads):
            if g is not None:
                position, states[i] = self.completed(i, states[i], params[i])
                groups.setdefault(position, []).append(i)
        if not groups:
            return grads, states, {}
        for k, link in enumerate(self.links):
            if isinstance(link.rule, TreeRule) and k not in tree_states:
                tree_states = {**tree_states, k: self._initial(link, params)}
        columns = [self._columns(k, grads, states, tree_states) for k in range(len(self.links))]
        leaves = Leaves(self._structure, self.path, params, self.active)
        known = donations is not None and not torch.compiler.is_compiling()
        buckets = [
            Bucket(members, self.steps(step, fresh, known), self._carried(states[members[0]], self.parts[members[0]]))
            for (step, fresh, _), members in groups.items()
        ]
        if donations is not None:
            donations.buckets = [(members, 1 + step * (not fresh)) for (step, fresh, _), members in groups.items()]
        updates, columns, carried = passes.run(self.links, leaves, buckets, grads, columns, extra, donations)
        for members, numbers in zip(groups.values(), carried, strict=True):
            for i in members:
                part, state = self.parts[i], states[i]
                if "step" in state:
                    state["step"] = state["step"] + 1
                for k, keys, carried_keys in zip(part.links, part.keys, part.carried, strict=True):
                    state.update({key: column[i] for key, column in zip(keys, columns[k], strict=True)})
                    state.update({key: n.clone() for key, n in zip(carried_keys, numbers[k], strict=True)})
        new_tree_states = {k: columns[k] for k, link in enumerate(self.links) if isinstance(link.rule, TreeRule)}
        return updates, states, new_tree_states

    def path(self, i: int) -> str:
        """Name a parameter for messages."""
        return self._paths[i]

    def initial_tree_state(self, k: int) -> Any:
        """Make the state of a function of the whole tree."""
        return self._initial(self.links[k], self.params)

    def _initial(self, link: Link, params: list[Tensor]) -> Any:
        return lift.init([link], tree.unflatten(self._structure, params))[0]

    def as_kept(self, key: str, value: Any) -> Any:
        """Return the step, or a number that scalars carry on, as `state[p]` keeps it."""
        if key == "step" and self.count is int:
            return int(value)
        return value.reshape(()) if isinstance(value, Tensor) else _scalar(value)

    def completed(self, i: int, state: State, p: Tensor) -> tuple[Any, State]:
        """Add to a copy of `state[p]` what is not there yet.

        Returns:
            Where the parameter is: the number of updates done; the links that have no state yet, and so are at their
            first update, whatever the step; and the numbers that scalars carry on. Parameters for which all of that is
            the same are updated together. And the state.
        """
        part = self.parts[i]
        state = {key: value for key, value in state.items() if value is not None}  # None is how buffers are reset
        begun = any(key in state for keys in part.keys for key in keys)
        if part.counted and "step" not in state and self.count is not None:
            # torch's SGD does not count: where it has left a buffer, it is past its first step.
            # On the CPU, whatever the default device: it is read at every step.
            state["step"] = self.as_kept("step", float(begun))
        fresh, carried = [], []
        for k, keys, carried_keys in zip(part.links, part.keys, part.carried, strict=True):
            rule: Any = self.links[k].rule
            for key, number in zip(carried_keys, rule.carried() if carried_keys else (), strict=True):
                state.setdefault(key, _scalar(number))
                carried.append((k, state[key] if state[key].requires_grad else state[key].item()))
            missing = [key for key in keys if key not in state]
            if missing:
                initial = dict(zip(keys, lift.init_leaf(rule, p, lambda: self.path(i)), strict=True))
                state.update({key: initial[key] for key in missing})
                if len(missing) == len(keys):
                    fresh.append(k)
            if any(state[key].dtype != p.dtype for key in keys):
                initial = dict(zip(keys, lift.init_leaf(rule, p, lambda: self.path(i)), strict=True))
                for key, like in initial.items():
                    # The parameter was converted since, by module.to(dtype) say. More digits than it has are kept.
                    if not (state[key].dtype == torch.float32 and like.dtype in HALF):
                        state[key] = state[key].to(like.dtype)
        step = float(state.get("step", begun)) if part.counted else 0.0
        return (step, tuple(fresh), tuple(carried)), state

    def _carried(self, state: State, part: Part) -> list[tuple[Tensor, ...]]:
        """Collect the numbers that the scalars of each link carry on."""
        keys = dict(zip(part.links, part.carried, strict=True))
        return [tuple([state[key] for key in keys.get(k, ())]) for k in range(len(self.links))]

    def _columns(self, k: int, grads: list[Any], states: list[State], tree_states: dict[int, Any]) -> Any:
        """Collect the state of one link over all parameters."""
        if isinstance(self.links[k].rule, TreeRule):
            return tree_states[k]
        users = [i for i, part in enumerate(self.parts) if k in part.links and grads[i] is not None]
        if not users:
            return ()
        state_type = self.state_type(k, self.params[users[0]])
        columns: list[list[Any]] = [[None] * len(states) for _ in getattr(state_type, "_fields", ())]
        for i in users:
            for column, key in zip(columns, self.parts[i].keys[self.parts[i].links.index(k)], strict=True):
                column[i] = states[i][key]
        return state_type(*columns) if columns else ()

    def steps(self, step: float, fresh: tuple[int, ...] = (), known: bool = True) -> list[Any]:
        """Return for each link the number of the next update.

        Args:
            step: number of updates done.
            fresh: links that are at their first, whatever that is.
            known: whether it may be computed with in python.
        """
        first, now = Known(1.0), Known(step + 1)
        numbers = [first if k in fresh else now for k in range(len(self.links))]
        return [
            None if link.rule.scalars is None else number if known else number.tensor
            for link, number in zip(self.links, numbers, strict=True)
        ]

    def _part(self, links: tuple[int, ...], p: Tensor) -> Part:
        counts: Counter[str] = Counter()

        def named(fields: Sequence[str]) -> tuple[str, ...]:
            return tuple([numbered(field, counts) for field in fields])

        keys, carried = [], []
        for k in links:
            keys.append(named(getattr(self.state_type(k, p), "_fields", ())))
            carried.append(named(self.links[k].rule.counters[1:]))
        return Part(links, tuple(keys), tuple(carried), any(self.links[k].rule.counters for k in links))

    def state_type(self, k: int, p: Tensor) -> Any:
        """Return the NamedTuple in which a rule keeps its state for one parameter."""
        if k not in self._state_types:
            rule: Any = self.links[k].rule
            # A rule that did not declare it is asked with a tensor that has no data.
            self._state_types[k] = rule.state_type or type(rule.init_leaf(torch.empty_like(p, device="meta")))
        return self._state_types[k]


def _scalar(value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        return value.to(step_dtype())
    return torch.tensor(float(value), dtype=step_dtype(), device="cpu")
