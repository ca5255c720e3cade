"""The functional form: links over trees, prepared once for each form of the arguments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_counters, check_is_param, check_own, check_updates
from functorch_optim._core.leaves import Leaves, Outcome
from functorch_optim._core.links import Link, nest, select, unnest
from functorch_optim._core.numbers import Bucket, read_number
from functorch_optim._core.prepare import Prepared
from functorch_optim._core.rule import ADD, check_extras
from functorch_optim._execution import mode as modes
from functorch_optim._execution.choose import Way
from functorch_optim._execution.sharded import is_sharded
from functorch_optim.tree import Tree

_KEPT = 8
"""Forms that a transformation keeps for each way of calling it."""


class Call(NamedTuple):
    """A call of a transformation, taken apart.

    Attributes:
        form: of the arguments.
        state: as it was given.
        listed: the leaves of the states of all rules, in the order that the places of `form` count.
        leaves: the leaves that the links are run over.
        outcome: the results of the links.
    """

    form: "_Form"
    state: Any
    listed: list[Any]
    leaves: Leaves
    outcome: Outcome

    def new_state(self) -> Any:
        """Build the next state."""
        return self.form.state(self.form.new_leaves(self), self)


def call(
    transformation: Any,
    updates: Tree,
    state: Any,
    params: Tree,
    extra: dict[str, Any],
    *,
    adds: bool = False,
    way: Way = None,
    overwrites: bool = False,
) -> Call:
    """Run a transformation.

    Args:
        transformation: with its links, layout and forms.
        updates: tree of tensors.
        state: as `init` or the last call returned it.
        params: tree of tensors, or None.
        extra: the keyword arguments of `update`.
        adds: whether updates are added to the parameters.
        way: the user's choice of how to run.
        overwrites: whether parameters and state are given up.
    """
    mode, whole = modes.current(), transformation._whole
    traced = mode == "compiled"
    states = unnest(transformation._layout, state) if whole or traced else []
    rules = [s for k, s in enumerate(states) if k not in whole] if states else state
    trees = (updates, rules) if params is None else (updates, rules, params)
    flat = _in_trace(*trees) if traced else [tree.flatten(one) for one in trees]
    form = _form(transformation, trees, flat, states, (mode, adds, way, overwrites))
    listed = flat[1][0]
    leaves = form.leaves([some for some, _ in flat], states)
    prepared = form.prepared or form.prepare(leaves, listed, updates if params is None else params)
    if extra or prepared.asks:
        in_place = "step_(tx, grads, state, params, " if overwrites else "step(tx, grads, state, params, "
        called = in_place if adds else "tx.update(updates, state, params, "
        check_extras([link.rule for link in prepared.links], extra, called)
    bucket = form.bucket(len(leaves.updates), listed, mode in ("plain", "recorded"))
    return Call(form, state, listed, leaves, prepared.run(leaves, [bucket], extra))


def _in_trace(updates: Tree, rules: Sequence[Any], *params: Tree) -> list[tuple[list[Any], Any]]:
    """List updates, states and parameters as deep as needed: to number all leaves takes long to trace."""
    fields = [field for state in rules for field in state]
    kinds = _Fields([(type(state), len(state)) for state in rules])
    return [([updates], None if params else tree.flatten(updates)[1]), (fields, kinds), *map(tree.flatten, params)]


class _Fields(NamedTuple):
    """The structure of states of which the fields are listed.

    Attributes:
        kinds: of each state, its type and the number of its fields.
    """

    kinds: list[tuple[Any, int]]

    def unflatten(self, fields: Sequence[Any]) -> list[Any]:
        """Build the states of these fields."""
        remaining = iter(fields)
        return [kind(*[next(remaining) for _ in range(count)]) for kind, count in self.kinds]


class _Places(NamedTuple):
    """The places of leaves in a list.

    Attributes:
        each: for each leaf its place; for one that is missing, the object that stands there.
        together: the same as a slice, where they follow each other.
    """

    each: list[Any]
    together: slice | None

    @classmethod
    def of(cls, each: list[Any]) -> "_Places":
        """Note the places of leaves."""
        first = each[0] if each else 0
        follow = type(first) is int and each == list(range(first, first + len(each)))
        return cls(each, slice(first, first + len(each)) if follow else None)

    def read(self, leaves: list[Any]) -> list[Any]:
        """Return the leaves at these places."""
        if self.together is not None:
            return leaves[self.together]
        return [leaves[i] if type(i) is int else i for i in self.each]

    def write(self, leaves: list[Any], new: Sequence[Any]) -> None:
        """Put leaves in these places."""
        if self.together is not None:
            leaves[self.together] = new
        else:
            for i, leaf in zip(self.each, new, strict=True):
                if type(i) is int:
                    leaves[i] = leaf


class _Subtree(NamedTuple):
    """The place of a tree in a list.

    Attributes:
        place: the place.
        structure: of another tree, which it is built like.
        name: of the tree, for messages.
        like: the other tree.
    """

    place: int
    structure: Any
    name: str
    like: Tree

    def read(self, listed: list[Any]) -> list[Any]:
        """Return the leaves of the tree."""
        return _aligned(self.structure, listed[self.place], self.name, self.like)

    def write(self, listed: list[Any], new: Sequence[Any]) -> None:
        """Put a tree of these leaves in its place."""
        listed[self.place] = tree.unflatten(self.structure, new)


class _Part(NamedTuple):
    """The places of the state of one link.

    Attributes:
        counts: whether it begins with the step.
        numbers: those of the numbers that are there once for all parameters, the step among them.
        fields: those of its other fields, which are trees like the parameters.
        leaf_type: the NamedTuple for one parameter.
    """

    counts: bool
    numbers: list[int]
    fields: list[_Places | _Subtree]
    leaf_type: Any


class _Form:
    """A form of arguments: the places of everything among their leaves, and the run that was prepared for it.

    Args:
        transformation: with its links and layout.
        trees: updates, the states of all rules, and parameters where there are some.
        flat: the leaves and the structure of each of them.
        states: of all links, in a trace or where some are functions of the whole tree.
        how: mode, whether updates are added, the user's choice of how to run, and whether arguments are given up.
    """

    def __init__(
        self,
        transformation: Any,
        trees: Sequence[Tree],
        flat: Sequence[tuple[list[Any], Any]],
        states: list[Any],
        how: tuple[Any, ...],
    ) -> None:
        self.own, self.whole, self.layout = transformation._links, transformation._whole, transformation._layout
        mode, adds, *_ = self.how = how
        traced = mode == "compiled"
        self.links = (*self.own, Link(ADD)) if adds else self.own
        last = -1 if len(trees) > 2 else 0
        like, self.structure, self.states = trees[last], flat[last][1], flat[1][1]
        structure, listed = self.structure, flat[1][0]

        def places(numbered: Any, given: Tree, name: str) -> _Places | _Subtree:
            """Find the places of the leaves of a tree that is built like the parameters; raise where it is not."""
            if traced:
                return _Subtree(numbered, structure, name, like)
            try:
                return _Places.of(structure.flatten_up_to(numbered))
            except ValueError:
                return _Places.of(_aligned(structure, given, name, like))  # raises

        self.updates = places(0 if traced else flat[0][1].unflatten(range(len(flat[0][0]))), trees[0], "updates")
        given, numbered = trees[1], self.states.unflatten(range(len(listed)))
        if not states:
            given, numbered = (unnest(self.layout, some) for some in (given, numbered))
        remaining = zip(given, numbered, strict=True)
        self.by_link = bool(states)
        self.parts = [
            None if k in self.whole else _part(link, *next(remaining), places) for k, link in enumerate(self.own)
        ]
        found = [(k, part) for k, part in enumerate(self.parts) if part is not None]
        self.fields = [(k, part.leaf_type, part.fields) for k, part in found if part.fields]
        self.numbers = [(k, j, place) for k, part in found for j, place in enumerate(part.numbers)]
        self.labels = [] if traced else _labels(self.own)
        self.prepared: Prepared | None = None

    def prepare(self, leaves: Leaves, listed: list[Any], like: Tree) -> Prepared:
        """Check arguments of this form, and prepare the run.

        Args:
            leaves: that the links are run over.
            listed: the leaves of the states of all rules.
            like: the parameters; updates where there are none.
        """
        structure, count = self.structure, len(leaves.updates)  # the function below is kept, and must hold no tensors

        def path(i: int) -> str:
            return tree.paths(tree.unflatten(structure, range(count)))[i]

        for i, p in enumerate(leaves.params or ()):
            if p is not None and leaves.updates[i] is not None:
                check_is_param(p, i, path)
        only_added = all([link.rule is ADD for link in self.own])  # noqa: C419
        check_updates(leaves.updates, leaves.params, path, wide=only_added)
        check_counters([link.rule for link in self.own], [listed[place] for _, _, place in self.numbers])
        mode, _, way, overwrites = self.how
        active = select(self.links, like)
        self.prepared = Prepared(self.links, structure, path, leaves, active, mode, way, overwrites)
        return self.prepared

    def is_labelled(self) -> bool:
        """Tell whether no label was edited since."""
        return not self.labels or all([tree.flatten(labels)[0] == then for labels, then in self.labels])  # noqa: C419

    def leaves(self, flat: list[list[Any]], states: list[Any]) -> Leaves:
        """Find the leaves that the links are run over.

        Args:
            flat: the leaves of updates, the states of all rules, and parameters.
            states: of all links, where some are functions of the whole tree.
        """
        columns: list[Any] = [()] * len(self.links)
        for k, leaf_type, fields in self.fields:
            columns[k] = leaf_type(*[places.read(flat[1]) for places in fields])
        for k in self.whole:
            columns[k] = states[k]
        return Leaves(self.updates.read(flat[0]), flat[2] if len(flat) > 2 else None, columns)

    def bucket(self, count: int, listed: list[Any], known: bool) -> Bucket:
        """Read the steps of all leaves and the numbers that are carried on: as floats where they are known."""
        steps: list[Any] = [None] * len(self.links)
        carried: list[tuple[Any, ...]] = [()] * len(self.links)
        last, read = None, None
        for k, j, place in self.numbers:
            part: Any = self.parts[k]
            number = listed[place]
            if j or not part.counts:
                carried[k] = (*carried[k], read_number(number, known))
            else:
                last, read = number, read if number is last else read_number(number, known, 1)
                steps[k] = read
        return Bucket(range(count), steps, carried)

    def new_leaves(self, made: Call) -> list[Any]:
        """Arrange the results of links as the leaves of the states of all rules."""
        leaves, outcome = list(made.listed), made.outcome
        columns, carried, due = outcome.columns, outcome.carried[0], outcome.due[0]
        counted: list[tuple[Tensor, Any, Tensor]] = []
        for k, j, place in self.numbers:
            part: Any = self.parts[k]
            if due[k] is not False or self.links[k].rule.hold is not None:
                old = leaves[place]
                counts = part.counts and j == 0
                leaves[place] = _counted(old, due[k], counted) if counts else _kept(carried[k][j - part.counts], old)
        for k, _, fields in self.fields:
            if columns[k] is not made.leaves.columns[k]:
                for places, column in zip(fields, columns[k], strict=True):
                    places.write(leaves, column)
        return leaves

    def state(self, leaves: list[Any], made: Call) -> Any:
        """Build the state of these leaves; functions of the whole tree have made theirs."""
        rules = self.states.unflatten(leaves)
        if not self.by_link:
            return rules
        remaining, columns = iter(rules), made.outcome.columns
        return nest(self.layout, [columns[k] if k in self.whole else next(remaining) for k in range(len(self.parts))])


def _aligned(structure: Any, given: Tree, name: str, like: Tree) -> list[Any]:
    """Flatten a tree like the parameters, whose structure is given.

    Raises:
        ValueError: it is built differently.
    """
    try:
        return tree.flatten_up_to(structure, given, name, like, "params")
    except ValueError as error:
        if name != "updates" or type(given) is type(like) or (isinstance(given, dict) and isinstance(like, dict)):
            raise
        listed = isinstance(given, tuple | list) and all(u is None or isinstance(u, Tensor) for u in given)
        hint = (
            "Of a list of gradients a tree is made by dict(zip(params, grads))"
            if listed and isinstance(like, dict)
            else "The order is tx.update(updates, state, params), which returns a pair: updates, state = tx.update(...)"
        )
        raise ValueError(f"{error} {hint}") from None


def _form(
    transformation: Any,
    trees: Sequence[Tree],
    flat: Sequence[tuple[list[Any], Any]],
    states: list[Any],
    how: tuple[Any, ...],
) -> _Form:
    """Find the form of arguments, with the run that was prepared for it; or prepare it."""
    if how[0] == "compiled":
        return _Form(transformation, trees, flat, states, how)
    tensors = [leaf for some, _ in flat for leaf in some]
    structures = [structure for _, structure in flat]
    types: list[Any] = list(map(type, tensors))
    if not modes.PLAIN_TYPES.issuperset(types):  # there may be None, or anything wrong
        tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        types += [(t.device_mesh, t.placements) for t in tensors if is_sharded(t)]
    kinds = [(t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in tensors]
    forms = transformation._forms.get(how, ())
    for key, form in forms:
        if key == (kinds, types, structures) and form.is_labelled():
            return form  # type: ignore[no-any-return]
    form = _Form(transformation, trees, flat, states, how)
    transformation._forms[how] = (((kinds, types, structures), form), *forms[: _KEPT - 1])
    return form


def _labels(links: Sequence[Link]) -> list[tuple[Tree, list[Any]]]:
    trees = {id(one.labels): one.labels for link in links for one in link.where if not callable(one.labels)}
    return [(labels, tree.flatten(labels)[0]) for labels in trees.values()]


def _part(link: Link, state: Any, numbered: Any, places: Callable[..., _Places | _Subtree]) -> _Part:
    """Find the places of the state of a link.

    Args:
        link: the link.
        state: of the link.
        numbered: the same, numbers in place of its leaves.
        places: finds the places of the leaves of a field.

    Raises:
        ValueError: it is not one of this link, or not for this tree.
    """
    check_own(link.rule, state)
    count, leaf_type = len(link.rule.counters), getattr(type(state), "_leaf_type", None)
    trees = zip(state._fields[count:] if state else (), numbered[count:], state[count:], strict=True)
    found = [places(n, given, f"the state's {name}") for name, n, given in trees]
    return _Part(link.rule.counts, list(numbered[:count]), found, leaf_type)


def _counted(step: Tensor, ran: Any, counted: list[tuple[Tensor, Any, Tensor]]) -> Tensor:
    """Add one to a counter; links that share theirs share it afterwards too."""
    for old, also, new in counted:
        if old is step and also is ran:
            return new
    counted.append((step, ran, step + (1 if ran is True else ran)))
    return counted[-1][2]


def _kept(new: Any, old: Tensor) -> Tensor:
    """Return a number that is carried on as the state has it."""
    return new.to(old) if isinstance(new, Tensor) else torch.tensor(new, dtype=old.dtype, device=old.device)
