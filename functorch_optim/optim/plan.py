"""How a transformation is run over a list of parameters, each with a state and a step count of its own."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import lift, tree
from functorch_optim.base import GradientTransformation
from functorch_optim.lift import Link
from functorch_optim.rule import Rule, TreeRule

State = dict[str, Any]


class Part(NamedTuple):
    """Which rules apply to a parameter, and under which keys its `state[p]` holds theirs.

    Attributes:
        links: indices of the rules that apply.
        keys: for each of them, the keys of its state.
        counted: whether any of them needs the step.
    """

    links: tuple[int, ...]
    keys: tuple[tuple[str, ...], ...]
    counted: bool

    @property
    def known(self) -> set[str]:
        """Return all keys."""
        return {key for keys in self.keys for key in keys} | ({"step"} if self.counted else set())


class Bucket(NamedTuple):
    """Parameters that are at the same step and take the same rules: they are run together.

    Attributes:
        step: number of updates done.
        part: the rules.
        fresh: those of them that have no state yet. They are at their first update, whatever the step.
    """

    step: float
    part: Part
    fresh: tuple[int, ...]


class Plan:
    """A transformation for a list of parameters.

    Args:
        transformation: the transformation.
        params: the parameters.
        names: their names, where they have some. Masks, labels and functions of the whole tree then see a dict by name;
            else the list.

    Raises:
        ValueError: masks or labels do not fit the parameters, or names are not unique where they are needed.
    """

    def __init__(
        self, transformation: GradientTransformation, params: Sequence[Tensor], names: Sequence[str] | None
    ) -> None:
        self.links = transformation._links
        self.params = list(params)
        self.names = names
        twice = [name for name, count in Counter(names or ()).items() if count > 1]
        if twice and any(link.where or isinstance(link.rule, TreeRule) for link in self.links):
            raise ValueError(
                f"Two parameters are named {twice[0]!r}, but {transformation!r} looks at parameters by name; "
                "give each a name of its own"
            )
        self.active = [self._active(link) for link in self.links]
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
        self, grads: list[Any], states: list[State], tree_states: dict[int, Any], extra: dict[str, Any]
    ) -> tuple[list[Any], list[State], dict[int, Any]]:
        """Compute updates and next states; change nothing.

        Args:
            grads: a gradient for each parameter, or None.
            states: what is known of `state[p]`, for each parameter; it is completed.
            tree_states: the states of functions of the whole tree, by link.
            extra: by name, what some transformation declares.

        Returns:
            An update for each parameter, or None; the next states of those that have one; and of the tree.
        """
        lift.check_updates(grads, self.params, self.path)
        updates, new_states, new_tree_states = list(grads), list(states), {}
        buckets: dict[Bucket, list[int]] = {}
        for i, g in enumerate(grads):
            if g is not None:
                bucket, new_states[i] = self._complete(i, states[i])
                buckets.setdefault(bucket, []).append(i)
        # Autograd must not see parameters that are later modified in place.
        params = [p.clone() for p in self.params] if torch.is_grad_enabled() else self.params

        k = 0
        for members in lift.passes(self.links) if buckets else ():
            links = range(k, k + len(members))
            if isinstance(members[0].rule, TreeRule):
                state = tree_states[k] if k in tree_states else self.initial_tree_state(k)
                updates, new_tree_states[k] = self._run_tree_rule(k, updates, state, params, extra)
            else:
                seen = [u for u, on in zip(updates, self.active[k], strict=True) if on and u is not None]
                for bucket, indices in buckets.items():
                    present = [i for i in indices if updates[i] is not None]
                    self._run_rules(bucket, links, present, updates, new_states, params, seen, extra)
            k += len(members)

        for bucket, indices in buckets.items():
            if bucket.part.counted:
                for i in indices:
                    step = new_states[i]["step"]
                    new_states[i]["step"] = torch.full_like(step, bucket.step + 1)
        return updates, new_states, new_tree_states

    def path(self, i: int) -> str:
        """Name a parameter for messages."""
        return str(i) if self.names is None else self.names[i]

    def initial_tree_state(self, k: int) -> Any:
        """Make the state of a function of the whole tree."""
        return lift.init([self.links[k]], self._arranged(self.params))[0]

    def check_state(self, i: int, state: State, known: set[str]) -> None:
        """Raise unless a loaded `state[p]` is one that this transformation makes.

        Args:
            i: index of the parameter.
            state: what was loaded.
            known: keys that are welcome though this transformation has no use for them.

        Raises:
            ValueError: a key is unknown, or a shape is wrong.
        """
        p, part = self.params[i], self.parts[i]
        foreign = [key for key in state if key not in part.known | known]
        if foreign:
            raise ValueError(
                f"The saved state of parameter {self.path(i)!r} has {foreign[0]!r}, which this transformation does not "
                f"keep; it keeps {', '.join(sorted(part.known)) or 'nothing'}. An optimizer of another kind saved it"
            )
        for k, keys in zip(part.links, part.keys, strict=True):
            for key in keys:
                if self.links[k].rule.elementwise and key in state and state[key].shape != p.shape:
                    raise ValueError(
                        f"The saved {key} of parameter {self.path(i)!r} has shape {tuple(state[key].shape)}, "
                        f"but the parameter has {tuple(p.shape)}; it was saved for another model"
                    )

    def _complete(self, i: int, state: State) -> tuple[Bucket, State]:
        """Add to a copy of `state[p]` what is not there yet, and find its bucket."""
        part, state = self.parts[i], dict(state)
        begun = any(key in state for keys in part.keys for key in keys)
        if part.counted and "step" not in state:
            # torch's SGD does not count: where it has left a buffer, it is past its first step.
            # On the CPU, whatever the default device: it is read at every step.
            state["step"] = torch.full((), float(begun), dtype=_step_dtype(), device="cpu")
        step = state["step"].item() if part.counted else 0.0
        fresh = []
        for k, keys in zip(part.links, part.keys, strict=True):
            missing = [key for key in keys if key not in state]
            if missing:
                rule: Any = self.links[k].rule
                initial = dict(zip(keys, rule.init_leaf(self.params[i]), strict=True))
                state.update({key: initial[key] for key in missing})
            if step > 0 and keys and len(missing) == len(keys):
                fresh.append(k)
        return Bucket(step, part, tuple(fresh)), state

    def _run_rules(
        self,
        bucket: Bucket,
        members: range,
        indices: list[int],
        updates: list[Any],
        states: list[State],
        params: list[Tensor],
        seen: list[Tensor],
        extra: dict[str, Any],
    ) -> None:
        """Run those rules among `members` that apply to these parameters; write into `updates` and `states`."""
        part = bucket.part
        chosen = [(k, keys) for k, keys in zip(part.links, part.keys, strict=True) if k in members]
        if not chosen or not indices:
            return
        now = torch.tensor(bucket.step + 1, dtype=torch.float64, device="cpu")
        first = torch.ones_like(now)
        columns, scalars = [], []
        for k, keys in chosen:
            fields = [[states[i][key] for i in indices] for key in keys]
            columns.append(self._state_type(k, params[indices[0]])(*fields) if keys else ())
            step = first if k in bucket.fresh else now
            scalars.append(lift.evaluate_scalars(self.links[k], step, extra, seen))
        new_updates, new_columns = lift.apply_rules(
            [self.links[k] for k, _ in chosen],
            [updates[i] for i in indices],
            columns,
            [params[i] for i in indices],
            scalars,
            lambda position: self.path(indices[position]),
        )
        for position, i in enumerate(indices):
            updates[i] = new_updates[position]
        for (_, keys), new_state in zip(chosen, new_columns, strict=True):
            for key, column in zip(keys, new_state, strict=True):
                for i, tensor in zip(indices, column, strict=True):
                    states[i][key] = tensor

    def _run_tree_rule(
        self, k: int, updates: list[Any], state: Any, params: list[Tensor], extra: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        leaves, structure = tree.flatten(self._arranged(updates))
        active = tree.flatten(self._arranged(self.active[k]))[0]
        new_leaves, new_state = lift.run_tree_rule(
            self.links[k], leaves, state, self._arranged(params), extra, structure, active
        )
        return self._listed(tree.unflatten(structure, new_leaves)), new_state

    def _active(self, link: Link) -> list[bool]:
        """Tell for each parameter whether a link is for it."""
        if not link.where:
            return [True] * len(self.params)
        arranged = self._arranged(self.params)
        return self._listed(tree.unflatten(tree.flatten(arranged)[1], link.active(arranged, len(self.params))))

    def _part(self, links: tuple[int, ...], p: Tensor) -> Part:
        fields = [getattr(self._state_type(k, p), "_fields", ()) for k in links]
        counts = Counter(field for some in fields for field in some)
        keys = [
            tuple([field if counts[field] == 1 else f"{k}.{field}" for field in some])
            for k, some in zip(links, fields, strict=True)
        ]
        return Part(links, tuple(keys), any(self.links[k].rule.scalars is not None for k in links))

    def _state_type(self, k: int, p: Tensor) -> Any:
        """Return the NamedTuple in which a rule keeps its state for one parameter."""
        if k not in self._state_types:
            rule: Any = self.links[k].rule
            # A rule that did not declare it is asked with a tensor that has no data.
            self._state_types[k] = rule.state_type or type(rule.init_leaf(torch.empty_like(p, device="meta")))
        return self._state_types[k]

    def _arranged(self, leaves: Sequence[Any]) -> Any:
        return list(leaves) if self.names is None else dict(zip(self.names, leaves, strict=True))

    def _listed(self, arranged: Any) -> list[Any]:
        return list(arranged) if self.names is None else [arranged[name] for name in self.names]


def _step_dtype() -> torch.dtype:
    """Return torch.optim's dtype of `step`: float32, unless the default is float64."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
