"""Prepare, then run: links over leaves.

Everything that depends on the form of the leaves alone is found out once: which of them each pass takes together, the
program of a group, the machine that runs it. The functional and the stateful forms both call `Prepared.run`.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from functorch_optim import tree
from functorch_optim._control import is_known
from functorch_optim._core import checks
from functorch_optim._core.checks import Path
from functorch_optim._core.injected import reading
from functorch_optim._core.leaf import DiffersError, Leaf, marked, numbers_for
from functorch_optim._core.links import Link
from functorch_optim._core.rule import ADD, TreeRule
from functorch_optim._execution.choose import Way
from functorch_optim._execution.group import Group
from functorch_optim._execution.mode import Mode, Plain, is_plain
from functorch_optim._execution.reference import Held, Masked, Stage
from functorch_optim._execution.representation import make
from functorch_optim._numerics import where
from functorch_optim.tree import MaskedNode, Tree

Step = float | Tensor
Condition = bool | Tensor
"""Whether something is so: a bool, or a tensor where it is not known."""
Ready = Callable[[], None]
NOT_WITH_FLOATS = (DiffersError, TypeError, AttributeError, ArithmeticError, ValueError)
"""Errors of scalars that floats cannot compute, or that differ between leaves."""


class Leaves(NamedTuple):
    """What links are run over.

    Attributes:
        updates: for each leaf, a tensor or None.
        params: the parameters; None when they were not given.
        columns: for each link, its state: the NamedTuple of its rule with a list, an entry a leaf, in each field. For a
            function of the whole tree, its state as it is.
    """

    updates: list[Any]
    params: list[Any] | None
    columns: list[Any]


class Bucket(NamedTuple):
    """Leaves that have had the same number of updates.

    Attributes:
        members: their indices.
        steps: for each link, the number of this update, 1 at the first; None for a link that does not count.
        carried: for each link, the numbers that its scalars carry on: floats, or 0-dim tensors.
    """

    members: Sequence[int]
    steps: list[Step | None]
    carried: Sequence[tuple[Step, ...]]


class Outcome(NamedTuple):
    """What a run has made of leaves.

    Attributes:
        updates: for each leaf an update, or the new parameter if the last link adds; None where nothing moves, or where
            it is left to `ready`.
        columns: new states, as in `Leaves`.
        carried: for each bucket and link, the numbers to carry on.
        due: for each bucket and link, whether it was run: True, False, or a condition that is not known.
        ready: what overwrites the parameters and states that were given up.
        computed: whether there is more than that: updates, or new states.
    """

    updates: list[Any]
    columns: list[Any]
    carried: list[list[tuple[Step, ...]]]
    due: list[list[Condition]]
    ready: list[Ready]
    computed: bool


class Prepared:
    """Links, made ready for leaves of one form.

    Args:
        links: of the transformation.
        structure: of the tree whose leaves they are run over.
        path: names a leaf, for messages.
        leaves: some of this form; none of their tensors is kept.
        active: for each link, whether it is for each leaf.
        mode: how torch treats tensors.
        way: the user's choice of how to run.
        overwrites: whether parameters and states are given up.
        keeps: whether these are always the same tensors, so that what was found out of them may be kept.
    """

    def __init__(
        self,
        links: Sequence[Link],
        structure: Any,
        path: Path,
        leaves: Leaves,
        active: list[list[bool]],
        mode: Mode,
        way: Way = None,
        overwrites: bool = False,
        keeps: bool = False,
    ) -> None:
        self.keeps = keeps
        self.links, self.structure, self.path, self.active = links, structure, path, active
        self.mode, self.way, self.overwrites = mode, way, overwrites
        self.passes = _passes(links)
        self.plain = mode in ("plain", "recorded") and is_plain(mode, _tensors(leaves))
        self.alone = structure is not None and tree.is_leaf(tree.unflatten(structure, range(len(leaves.updates))))
        self.extras = [link.rule.extras for link in links]
        self.asks = any(extras.any or extras.names - {"updates"} for extras in self.extras)
        self.shapes = [None if u is None else u.shape for u in leaves.updates]
        self.last = [_is_last(links, k) for k in range(len(links))]
        self.vanishing = any(isinstance(link.rule, TreeRule) or link.rule.hold is not None for link in links)
        self.groups: dict[Any, list[LeafGroup]] = {}
        self.used: dict[tuple[int, int], list[int]] = {}
        self.differs: set[int] = set()  # links whose numbers differ between leaves
        self.takes_tensors: set[int] = set()  # links whose scalars cannot compute with floats
        self.simple = [_of_step(link, extras) for link, extras in zip(links, self.extras, strict=True)]
        for p in leaves.params or () if way == "fused" else ():
            if isinstance(p, Tensor) and p.is_meta:
                _device_dtype_check_for_fused(p)  # raises torch.optim's error
        self._check(leaves)

    def _check(self, leaves: Leaves) -> None:
        """Raise unless states are those of the links, for these leaves."""
        for link, active, columns in zip(self.links, self.active, leaves.columns, strict=True):
            rule = link.rule
            here = [i for i, u in enumerate(leaves.updates) if u is not None and active[i]]
            if not here or isinstance(rule, TreeRule):
                continue
            if leaves.params is None and rule.needs_params:
                raise ValueError(
                    f"{rule.name} needs the parameters, but update was called without them; "
                    "call tx.update(updates, state, params)"
                )

            def path(k: int, here: list[int] = here) -> str:
                return self.path(here[k])

            for field, column in zip(getattr(columns, "_fields", ()), columns, strict=True):
                tensors = [column[i] for i in here]
                checks.check_present(rule.name, field, tensors, path)
                if rule.elementwise:
                    updates = [leaves.updates[i] for i in here]
                    checks.check_state(rule.name, field, tensors, updates, path)

    def run(self, leaves: Leaves, buckets: Sequence[Bucket], extras: dict[str, Any]) -> Outcome:
        """Run links one after the other; no argument is modified.

        Args:
            leaves: of the form that this was made for.
            buckets: all leaves that have an update, each in one bucket.
            extras: the keyword arguments of `update`.
        """
        updates, columns = list(leaves.updates), list(leaves.columns)
        carried = [list(bucket.carried) for bucket in buckets]
        due: list[list[Condition]] = [[True] * len(self.links) for _ in buckets]
        ready: list[Ready] = []
        computed = False
        for members in self.passes:
            first, last = self.links[members[0]].rule, members is self.passes[-1]
            if isinstance(first, TreeRule):
                with self._reading(members[0], carried[0] if carried else []):
                    updates, columns[members[0]] = self._run_tree_rule(members[0], leaves, updates, columns, extras)
                computed = True
                continue
            seen = self._seen(members[0], updates) if first.sees_tree else []
            for number, bucket in enumerate(buckets):
                used = self.used.get((members[0], number)) or self._used(members, number, bucket)
                scalars = self._numbers(used, bucket, extras, seen, carried[number], due[number])
                for group, numbers in self._groups(members, number, bucket, updates, scalars):
                    overwrite = (
                        group.ready(updates, leaves.params, columns, numbers) if self.overwrites and last else None
                    )
                    if overwrite is not None:
                        ready.append(overwrite)
                    else:
                        computed = True
                        group.compute(updates, leaves.params, columns, numbers)
        return Outcome(updates, columns, carried, due, ready, computed)

    def _used(self, members: Sequence[int], number: int, bucket: Bucket) -> list[int]:
        """Find the links of a pass whose numbers are needed: for some leaf, or to be carried on."""
        here = [i for i in bucket.members if self.shapes[i] is not None]
        used = [k for k in members if bucket.carried[k] or any(self.active[k][i] for i in here)]
        self.used[members[0], number] = used
        return used

    # The numbers of a step. -------------------------------------------------------------------------------------------

    def _numbers(
        self,
        members: Sequence[int],
        bucket: Bucket,
        extras: dict[str, Any],
        seen: list[Tensor],
        carried: list[tuple[Step, ...]],
        due: list[Condition],
    ) -> dict[int, Any]:
        """Compute the numbers of the links that run at this step; write into `carried` and `due`."""
        found: dict[int, Any] = {}
        for k in members:
            simple = self.simple[k]
            if simple is not None:
                try:
                    found[k] = simple(bucket.steps[k])
                    continue
                except NOT_WITH_FLOATS:
                    pass  # computed again below, with tensors or leaf by leaf; other errors are the user's
            self._add_numbers(k, found, bucket, extras, seen, carried, due)
        return found

    def _add_numbers(
        self,
        k: int,
        found: dict[int, Any],
        bucket: Bucket,
        extras: dict[str, Any],
        seen: list[Tensor],
        carried: list[tuple[Step, ...]],
        due: list[Condition],
    ) -> None:
        """Compute the numbers of a link, if it runs at this step."""
        link = self.links[k]
        rule: Any = link.rule
        is_open: Condition = True
        for back in link.when:
            is_open = _both(is_open, due[k - back])
        due[k] = is_open
        if is_open is False:
            return
        scalars: Any = ()
        if rule.scalars is not None:
            with self._reading(k, carried):
                scalars, new = self._evaluated(k, bucket, extras, seen)
            carried[k] = _chosen(is_open, new, carried[k])
        if rule.hold is not None:  # of a gate, `due` is what it says to the links inside
            scalars, gate = scalars
            gate = _as_known(gate)
            due[k] = _both(is_open, gate)
            scalars = Held(scalars) if gate is False else scalars
        is_known = is_open is True and isinstance(due[k], bool)
        found[k] = scalars if is_known else Masked(scalars, is_open, due[k])

    def _reading(self, k: int, carried: Sequence[tuple[Step, ...]]) -> AbstractContextManager[None]:
        """Let a link read the numbers that keepers keep for it."""
        backs = self.links[k].reads
        if not backs or not carried:
            return nullcontext()
        return reading({self.links[k - back].rule.keeps: carried[k - back] for back in backs})

    def _evaluated(
        self, k: int, bucket: Bucket, extras: dict[str, Any], seen: list[Tensor]
    ) -> tuple[Any, tuple[Step, ...]]:
        """Compute the numbers of a link, and those that it carries on."""
        rule: Any = self.links[k].rule
        wanted = self.extras[k].wanted(extras) if self.extras[k].names or self.extras[k].any else {}
        if rule.sees_tree:
            wanted["updates"] = seen
        if k not in self.differs:
            try:
                return self._called(k, bucket, wanted)
            except DiffersError:
                self.differs.add(k)
                self.simple[k] = None
        return self._by_leaf(k, bucket, wanted)

    def _called(self, k: int, bucket: Bucket, wanted: dict[str, Any]) -> tuple[Any, tuple[Step, ...]]:
        """Call the scalars of a link: with floats where the step is known, if they can compute with floats."""
        rule, step, carried = self.links[k].rule, bucket.steps[k], bucket.carried[k]
        if k not in self.takes_tensors and not isinstance(step, Tensor):
            try:
                return _split(rule, step, carried, wanted)
            except DiffersError:
                raise
            except (ArithmeticError, ValueError):  # 1 / 0, say, which is inf in torch
                pass
            except (
                TypeError,
                AttributeError,
            ):  # functions of tensors alone; what fails with tensors, too, raises below
                found = _split(rule, _wide(step), tuple(map(_as_tensor, carried)), wanted)
                self.takes_tensors.add(k)
                self.simple[k] = None
                return found
        return _split(rule, _wide(step), tuple(map(_as_tensor, carried)), wanted)

    def _by_leaf(self, k: int, bucket: Bucket, wanted: dict[str, Any]) -> tuple["Shares", tuple[Step, ...]]:
        """Compute the numbers of a link for each leaf; those with equal hyperparameters share theirs."""
        rule: Any = self.links[k].rule
        if rule.carry is not None:
            with marked():
                rule.check_shared(self._called(k, bucket, wanted)[1])
        numbered = tree.unflatten(self.structure, range(len(self.active[k])))
        prefixes = tree.Prefixes(numbered, "the values of a hyperparameter")
        shares: dict[Any, tuple[list[int], Any]] = {}
        read: list[Tree] | None = None
        carried = bucket.carried[k]
        for i in bucket.members:
            if not self.active[k][i] or self.shapes[i] is None:
                continue
            key = None if read is None else _equal([prefixes.of(values)[i] for values in read])
            if key is not None and key in shares:
                shares[key][0].append(i)
                continue
            now: list[Tree] = []
            value = functools.partial(_value_for, prefixes, i)
            path = functools.partial(self.path, i)
            leaf = Leaf(value, path, self.shapes[i], self.alone, rule.elementwise)  # type: ignore[arg-type]
            with numbers_for(leaf, now):
                found, carried = self._called(k, bucket, wanted)
            read = now
            shares[_equal([prefixes.of(values)[i] for values in read])] = ([i], found)
        return Shares(list(shares.values())), carried

    def _seen(self, k: int, updates: list[Any]) -> list[Tensor]:
        """List the tensors that a link which sees the tree is about to transform."""
        chosen = [u for u, on in zip(updates, self.active[k], strict=True) if on and u is not None]
        seen = [u.coalesce().values() if u.layout == torch.sparse_coo else u for u in chosen]
        alike = self.plain and len({(u.dtype, u.device) for u in seen}) == 1
        return Plain(seen) if alike else seen

    # Groups of leaves. ------------------------------------------------------------------------------------------------

    def _groups(
        self, members: Sequence[int], number: int, bucket: Bucket, updates: list[Any], scalars: dict[int, Any]
    ) -> list[tuple["LeafGroup", list[Any]]]:
        """Find the groups of leaves that are run together, and the numbers for each."""
        static = None if self.vanishing or self.differs else (members[0], number)
        if static in self.groups:
            return [(group, [scalars[k] for k in group.applying]) for group in self.groups[static]]
        running = tuple([(k, isinstance(s, Held)) for k, s in scalars.items()])
        key: Any = (number, running)
        if self.vanishing:
            key = (*key, tuple([u is None for u in updates]))
        if not self.differs.isdisjoint(members):
            return self._shared_groups(key, running, bucket.members, updates, scalars)
        if key not in self.groups:
            self.groups[key] = self._parted(running, bucket.members, updates)
        if static is not None:
            self.groups[static] = self.groups[key]
        return [(group, [scalars[k] for k in group.applying]) for group in self.groups[key]]

    def _shared_groups(
        self, key: Any, running: Any, members: Sequence[int], updates: list[Any], scalars: dict[int, Any]
    ) -> list[tuple["LeafGroup", list[Any]]]:
        """Find groups of leaves whose numbers are the same."""
        place: dict[int, dict[int, int]] = {
            k: {i: n for n, (some, _) in enumerate(s.shares) for i in some}
            for k, s in scalars.items()
            if isinstance(s, Shares)
        }
        parts: dict[Any, list[int]] = {}
        for i in members:
            parts.setdefault(tuple([where.get(i) for where in place.values()]), []).append(i)
        found = []
        for indices in parts.values():
            own = (*key, tuple(indices))
            if own not in self.groups:
                self.groups[own] = self._parted(running, indices, updates)
            for group in self.groups[own]:
                first = group.indices[0]
                numbers = [scalars[k].shares[place[k][first]][1] if k in place else scalars[k] for k in group.applying]
                found.append((group, numbers))
        return found

    def _parted(
        self, running: Sequence[tuple[int, bool]], members: Sequence[int], updates: list[Any]
    ) -> list["LeafGroup"]:
        """Part leaves by the links that apply to them, and by dtype and device."""
        parts: dict[Any, list[int]] = {}
        for i in members:
            u = updates[i]
            if u is not None:
                applying = tuple([one for one in running if self.active[one[0]][i]])
                still = any(holds and self.last[k] for k, holds in applying)
                if still:  # nothing moves, so that there is nothing to add
                    applying = tuple([one for one in applying if self.links[one[0]].rule is not ADD])
                alone = i if u.layout != torch.strided else None
                if applying:
                    parts.setdefault((applying, still, u.device, u.dtype, alone), []).append(i)
        return [
            LeafGroup(self, [k for k, _ in applying], indices, updates, still)
            for (applying, still, *_), indices in parts.items()
        ]

    def _run_tree_rule(
        self, k: int, leaves: Leaves, updates: list[Any], columns: list[Any], extras: dict[str, Any]
    ) -> tuple[list[Any], Any]:
        """Run a function of the whole tree on those leaves that it is for."""
        link, active = self.links[k], self.active[k]
        rule: Any = link.rule

        def arranged(some: Sequence[Any]) -> Tree:
            on_all = not link.where
            return tree.unflatten(
                self.structure, [leaf if on or on_all else MaskedNode() for leaf, on in zip(some, active, strict=True)]
            )

        given = arranged(updates)
        params = leaves.params
        if link.inside:
            params = getattr(columns[k + link.inside], self.links[k + link.inside].rule.hands or "")
        pair = rule.update(
            given, columns[k], None if params is None else arranged(params), **self.extras[k].wanted(extras)
        )
        checks.check_pair(f"The update of {rule.name}", "updates", pair)
        returned, new_state = pair
        old_leaves, structure = tree.flatten(given)
        name = f"the updates from {rule.name}"
        new_leaves = tree.flatten_up_to(structure, returned, name, given, "updates")
        checks.check_updates(new_leaves, old_leaves, lambda i: tree.paths(given)[i], name, "the one it was given")
        if not link.where:
            return list(new_leaves), new_state
        remaining = iter(new_leaves)
        return [next(remaining) if on else u for on, u in zip(active, updates, strict=True)], new_state


class LeafGroup:
    """Leaves that are run together, by the same links.

    Args:
        prepared: what they are a part of.
        applying: the links.
        indices: of the leaves.
        updates: of all leaves.
        still: whether nothing moves.
    """

    def __init__(
        self, prepared: "Prepared", applying: list[int], indices: list[int], updates: list[Any], still: bool
    ) -> None:
        self.applying, self.indices, self.still = applying, indices, still
        self.whole = indices == list(range(len(updates)))
        links = [prepared.links[k] for k in applying]
        stages = [Stage(link.rule, _source(links, applying, n)) for n, link in enumerate(links)]  # type: ignore[arg-type]
        first, path = updates[indices[0]], prepared.path
        self.is_sparse = first.layout != torch.strided
        self.to_dense = self.is_sparse and _wants_dense(
            [stage.rule for stage in stages], first, lambda: path(indices[0])
        )
        self.group = Group(
            stages,
            first.to_dense() if self.to_dense else first,
            lambda k: path(indices[k]),
            prepared.mode,
            prepared.plain,
            prepared.way,
            still,
            prepared.keeps,
        )

    def ready(
        self, updates: list[Any], params: list[Any] | None, columns: list[Any], scalars: list[Any]
    ) -> Ready | None:
        """Get ready to overwrite parameters and states; None where that cannot be done. Their updates are then None."""
        if params is None:
            return None
        some = self._picked(updates)
        if self.group.bound is not None:  # which holds parameters and states
            overwrite = self.group.overwrite(some, [], [], scalars)
        else:
            overwrite = self.group.overwrite(some, self._picked(params), self._states(columns), scalars)
        if overwrite is not None:
            for i in self.indices:
                updates[i] = None
        return overwrite

    def compute(self, updates: list[Any], params: list[Any] | None, columns: list[Any], scalars: list[Any]) -> None:
        """Run the links on these leaves; write into `updates`, and replace lists of `columns`."""
        states = self._states(columns)
        mine = None if params is None else self._picked(params)
        new, new_states = self.group.compute(self._picked(updates), mine, states, scalars)
        for k, state in zip(self.applying, new_states, strict=True):
            if state:
                columns[k] = state if self.whole else self._placed(columns[k], state)
        for n, i in enumerate(self.indices):
            updates[i] = None if new is None else new[n]

    def _picked(self, column: list[Any]) -> list[Any]:
        picked = list(column) if self.whole else [column[i] for i in self.indices]
        return [u.to_dense() if u.layout == torch.sparse_coo else u for u in picked] if self.to_dense else picked

    def _states(self, columns: list[Any]) -> list[Any]:
        if self.whole:
            return [columns[k] for k in self.applying]
        return [make(type(columns[k]), [self._picked(column) for column in columns[k]]) for k in self.applying]

    def _placed(self, columns: Any, state: Any) -> Any:
        """Return columns with the states of these leaves in their places."""
        placed = make(type(columns), [list(column) for column in columns])
        for column, new in zip(placed, state, strict=True):
            for i, tensor in zip(self.indices, new, strict=True):
                column[i] = tensor
        return placed


def _source(links: Sequence[Link], applying: list[int], n: int) -> tuple[int, str] | None:
    """Find the wrapper whose state holds the parameters of a link."""
    if not links[n].inside:
        return None
    place = applying.index(applying[n] + links[n].inside)
    return place, links[place].rule.hands or ""


def _wants_dense(rules: Sequence[Any], update: Tensor, path: Callable[[], str]) -> bool:
    """Tell whether a rule wants a sparse update to be dense.

    Raises:
        RuntimeError: a rule refuses it.
    """
    if update.layout != torch.sparse_coo:
        raise RuntimeError(
            f"The gradient of {path()!r} has layout {update.layout}; of sparse ones only torch.sparse_coo is supported"
        )
    for rule in rules:
        if rule.sparse is None:
            raise RuntimeError(
                f"{rule.name} does not support sparse gradients, but that of {path()!r} has layout {update.layout}; "
                "give update.to_dense(), or use sparse_adam, adagrad or sgd with gradients of layout torch.sparse_coo"
            )
    return any(rule.sparse == "dense" for rule in rules)


class Shares(NamedTuple):
    """Numbers that differ between leaves: lists of leaves, and the numbers of each list."""

    shares: list[tuple[list[int], Any]]


def _as_known(gate: Condition) -> Condition:
    """Return a condition as a bool where that waits for nothing, as under torch.func.grad: then one branch runs."""
    if isinstance(gate, bool) or not is_known(gate) or gate.device.type != "cpu":
        return gate
    return gate if torch._C._len_torch_dispatch_stack() > 0 else bool(gate)


def _of_step(link: Link, extras: Any) -> Callable[[Any], Any] | None:
    """Return the function of the step alone that makes the numbers of a link; None where there is none."""
    rule: Any = link.rule
    if rule.scalars is None and not link.when:
        return _nothing
    own = link.when or link.reads or rule.hold or rule.carry or extras.names or extras.any
    return None if own else rule.scalars


def _nothing(step: Any) -> tuple[()]:
    return ()


def _both(one: Condition, other: Condition) -> Condition:
    if isinstance(one, bool):
        return other if one else False
    return one & other


def _chosen(condition: Condition, new: tuple[Step, ...], old: tuple[Step, ...]) -> tuple[Step, ...]:
    if condition is True:
        return new
    return tuple([where(condition, n, o) for n, o in zip(new, old, strict=True)])


def _split(rule: Any, step: Any, carried: tuple[Any, ...], wanted: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Call the scalars of a rule; return its numbers, and those that it carries on."""
    if rule.carry is None:
        return rule.scalars(step, **wanted), carried
    scalars, new = rule.scalars(step, rule.carried_type(*carried), **wanted)
    return scalars, tuple(new)


def _wide(number: Any) -> Any:
    """Return a number as a float64 tensor."""
    if isinstance(number, Tensor):
        return number.to(torch.float64)
    return None if number is None else torch.tensor(number, dtype=torch.float64, device="cpu")


def _as_tensor(number: Any) -> Tensor:
    return number if isinstance(number, Tensor) else torch.tensor(number, dtype=torch.float64, device="cpu")


def _value_for(prefixes: tree.Prefixes, i: int, values: Tree) -> Any:
    return prefixes.of(values)[i]


def _equal(values: list[Any]) -> Any:
    """Return a key that hyperparameters share which are equal numbers, or the same tensors or functions."""
    return tuple([(type(v), v if isinstance(v, int | float) else id(v)) for v in values])


def _passes(links: Sequence[Link]) -> list[list[int]]:
    """Split links into passes, by index; what sees the whole tree begins a new one."""
    groups: list[list[int]] = []
    for k, link in enumerate(links):
        if not groups or link.rule.sees_tree or isinstance(links[groups[-1][0]].rule, TreeRule):
            groups.append([])
        groups[-1].append(k)
    return groups


def _is_last(links: Sequence[Link], k: int) -> bool:
    """Tell whether only the addition to the parameters comes after a gate and the links inside."""
    return all(k in [j - back for back in links[j].when] or links[j].rule is ADD for j in range(k + 1, len(links)))


def _tensors(leaves: Leaves) -> list[Any]:
    columns = [
        column for state in leaves.columns if isinstance(state, tuple) for column in state if isinstance(column, list)
    ]
    return [*leaves.updates, *(leaves.params or ()), *[tensor for column in columns for tensor in column]]
