"""The functional form: links over trees, prepared once for each form of the arguments."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_is_param, check_params, check_updates
from functorch_optim._core.leaves import Leaves, Outcome
from functorch_optim._core.links import Link, select, unnest
from functorch_optim._core.numbers import Bucket, read_number
from functorch_optim._core.prepare import Prepared
from functorch_optim._core.rule import ADD, TreeRule, check_extras, tree_state_type
from functorch_optim._execution import mode as modes
from functorch_optim._execution.choose import Way
from functorch_optim._execution.sharded import is_sharded
from functorch_optim._numerics import wide_device
from functorch_optim.tree import MaskedNode, Tree

_KEPT = 8
"""Forms that a transformation keeps for each way of calling it."""


def init(links: Sequence[Link], params: Tree) -> list[Any]:
    """Make the state of each link."""
    leaves, structure = tree.flatten(params)
    check_params(leaves, lambda i: tree.paths(params)[i])
    tensors = [leaf for leaf in leaves if leaf is not None]
    step = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    states = []
    for link, active in zip(links, select(links, params), strict=True):
        rule = link.rule
        if isinstance(rule, TreeRule):
            masked = [leaf if on else MaskedNode() for leaf, on in zip(leaves, active, strict=True)]
            states.append(rule.init(tree.unflatten(structure, masked) if link.where else params))
            continue
        leaf_states = [
            init_leaf(link, p, functools.partial(_path, params, i)) if on and p is not None else None
            for i, (p, on) in enumerate(zip(leaves, active, strict=True))
        ]
        state_type = next((type(state) for state in leaf_states if state is not None), rule.state_type or tuple)
        fields = [
            tree.unflatten(structure, [MaskedNode() if state is None else state[field] for state in leaf_states])
            for field in range(len(getattr(state_type, "_fields", ())))
        ]
        carried = [_own(value, step.device) for value in rule.carried()]
        states.append(tree_state_type(state_type, rule.counters)(*([step] if rule.counts else []), *carried, *fields))
    return states


def _own(number: Tensor | float, device: torch.device) -> Tensor:
    """Make a number of the state, which is no hyperparameter that the user may change in place."""
    device = wide_device(device)
    if isinstance(number, Tensor):
        return number.to(device, torch.float64).clone()
    return torch.tensor(number, dtype=torch.float64, device=device)


def _path(params: Tree, i: int) -> str:
    return tree.paths(params)[i]


def init_leaf(link: Link, p: Tensor, path: Callable[[], str]) -> Any:
    """Make the state of a link for one parameter; let errors name it."""
    try:
        return link.init_leaf(p)
    except (TypeError, ValueError) as error:
        raise type(error)(f"At {path()!r}: {error}") from error


class Call(NamedTuple):
    """A call of a transformation, taken apart.

    Attributes:
        structure: of the tree of parameters, or of updates where there are none.
        leaves: the leaves that the links are run over.
        parts: the parts of the states of links.
        states: of each link, as they were given.
        outcome: the results of the links.
    """

    structure: Any
    leaves: Leaves
    parts: "_Parts"
    states: list[Any]
    outcome: Outcome


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
    like = updates if params is None else params
    like_leaves, structure = tree.flatten(like)
    update_leaves, param_leaves = like_leaves, None
    if params is not None:
        param_leaves = like_leaves
        update_leaves = _aligned(structure, updates, params)
    states = unnest(transformation._layout, state)
    mode = modes.current()
    forms = transformation._forms if mode != "compiled" else None
    parts = _parts(transformation, states, forms)
    columns: list[Any] = [()] * (len(states) + adds)
    tensors = [*update_leaves, *(param_leaves or ())]
    for k, start, leaf_type, names in parts.trees:
        lists = [
            tree.flatten_up_to(structure, field, f"the state's {name}", like, "params")
            for name, field in zip(names, states[k][start:], strict=True)
        ]
        columns[k] = leaf_type(*lists)
        for column in lists:
            tensors += column
    for k in parts.whole:
        columns[k] = states[k]
    numbers = [states[k][j] for k, j in parts.numbers]
    leaves = Leaves(update_leaves, param_leaves, columns)
    how = (mode, adds, way, overwrites)
    prepared = _prepared(transformation, like, structure, leaves, tensors, numbers, how, forms)
    if extra or prepared.asks:
        in_place = "step_(tx, grads, state, params, " if overwrites else "step(tx, grads, state, params, "
        called = in_place if adds else "tx.update(updates, state, params, "
        check_extras([link.rule for link in prepared.links], extra, called)
    bucket = _bucket(prepared, parts, numbers, mode in ("plain", "recorded"))
    return Call(structure, leaves, parts, states, prepared.run(leaves, [bucket], extra))


def _aligned(structure: Any, updates: Tree, params: Tree) -> list[Any]:
    """Flatten updates like the parameters.

    Raises:
        ValueError: they are built differently.
    """
    try:
        return tree.flatten_up_to(structure, updates, "updates", params, "params")
    except ValueError as error:
        if type(updates) is type(params) or (isinstance(updates, dict) and isinstance(params, dict)):
            raise
        listed = isinstance(updates, tuple | list) and all(u is None or isinstance(u, Tensor) for u in updates)
        hint = (
            "Of a list of gradients a tree is made by dict(zip(params, grads))"
            if listed and isinstance(params, dict)
            else "The order is tx.update(updates, state, params), which returns a pair: updates, state = tx.update(...)"
        )
        raise ValueError(f"{error} {hint}") from None


class _Parts(NamedTuple):
    """The parts of the states of all links.

    Attributes:
        each: the part of each link; None for a function of the whole tree.
        trees: for each link that has some: its index, where its fields begin, the NamedTuple for one parameter, and the
            names of the fields.
        whole: the links that are functions of the whole tree.
        numbers: the numbers that are there once for all parameters: the link, and which field.
    """

    each: list["_Part | None"]
    trees: list[tuple[int, int, Any, tuple[str, ...]]]
    whole: list[int]
    numbers: list[tuple[int, int]]


class _Part(NamedTuple):
    """The parts of the state of one link.

    Attributes:
        counts: whether it begins with the step.
        counters: how many numbers are there once for all parameters, the step among them.
        names: of its fields, which are trees like the parameters.
        leaf_type: the NamedTuple for one parameter.
    """

    counts: bool
    counters: int
    names: tuple[str, ...]
    leaf_type: Any


def _parts(transformation: Any, states: Sequence[Any], forms: dict[Any, Any] | None) -> _Parts:
    """Find the parts of the states of all links.

    Raises:
        ValueError: a state is not one of its link.
    """
    types, parts = (None, None) if forms is None else forms.get("parts", (None, None))
    if parts is None or types != list(map(type, states)):
        each = [_part(link, state) for link, state in zip(transformation._links, states, strict=True)]
        found = [(k, part) for k, part in enumerate(each) if part is not None]
        parts = _Parts(
            each,
            [(k, part.counters, part.leaf_type, part.names) for k, part in found if part.names],
            [k for k, part in enumerate(each) if part is None],
            [(k, j) for k, part in found for j in range(part.counters)],
        )
        if forms is not None:
            forms["parts"] = list(map(type, states)), parts
    return parts


def _prepared(
    transformation: Any,
    like: Tree,
    structure: Any,
    leaves: Leaves,
    tensors: list[Any],
    numbers: list[Tensor],
    how: tuple[Any, ...],
    forms: dict[Any, Any] | None,
) -> Prepared:
    """Find the run that was prepared for arguments of this form, or prepare it."""
    types: list[Any] = []
    kinds: list[Any] = []
    if forms is not None:
        tensors = [*tensors, *numbers]
        types = list(map(type, tensors))
        if not modes.PLAIN_TYPES.issuperset(types):  # there may be None, MaskedNode(), or anything wrong
            tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
            types += [(t.device_mesh, t.placements) for t in tensors if is_sharded(t)]
        kinds = [(t.shape, t.dtype, t.device, t.layout, t.requires_grad) for t in tensors]
        for known in forms.get(how, ()):
            if known.kinds == kinds and known.types == types and known.structure == structure and known.is_labelled():
                return known.prepared  # type: ignore[no-any-return]
    mode, adds, way, overwrites = how
    count = len(leaves.updates)  # the function below is kept, and must hold no tensors

    def path(i: int) -> str:
        return tree.paths(tree.unflatten(structure, range(count)))[i]

    for i, p in enumerate(leaves.params or ()):
        if p is not None and leaves.updates[i] is not None:
            check_is_param(p, i, path)
    only_added = all([link.rule is ADD for link in transformation._links])  # noqa: C419
    check_updates(leaves.updates, leaves.params, path, wide=only_added)
    _check_counters(transformation._links, numbers)
    links = (*transformation._links, Link(ADD)) if adds else transformation._links
    active = select(links, like)
    prepared = Prepared(links, structure, path, leaves, active, mode, way, overwrites)
    if forms is not None:
        form = _Form(structure, types, kinds, _labels(links), prepared)
        forms[how] = (form, *forms.get(how, ())[: _KEPT - 1])
    return prepared


def _check_counters(links: Sequence[Link], counters: list[Tensor]) -> None:
    """Raise when a number that states hold once for all parameters is several."""
    names = [(link.rule.name, name) for link in links for name in link.rule.counters]
    for (rule, name), number in zip(names, counters, strict=True):
        if number.ndim != 0:
            raise ValueError(
                f"The {name} in the state of {rule} has shape {tuple(number.shape)}: a state that torch.vmap has "
                "batched is for an update inside of torch.vmap"
            )


class _Form(NamedTuple):
    """A form of arguments, and the run that was prepared for it.

    Attributes:
        structure: of the tree.
        types: of all leaves.
        kinds: of all tensors.
        labels: trees of labels, and the labels in them.
        prepared: the links.
    """

    structure: Any
    types: list[Any]
    kinds: list[Any]
    labels: list[tuple[Tree, list[Any]]]
    prepared: Prepared

    def is_labelled(self) -> bool:
        """Tell whether no label was edited since."""
        return not self.labels or all([tree.flatten(labels)[0] == then for labels, then in self.labels])  # noqa: C419


def _labels(links: Sequence[Link]) -> list[tuple[Tree, list[Any]]]:
    trees = {id(one.labels): one.labels for link in links for one in link.where if not callable(one.labels)}
    return [(labels, tree.flatten(labels)[0]) for labels in trees.values()]


def _part(link: Link, state: Any) -> _Part | None:
    """Find the parts of the state of a link.

    Raises:
        ValueError: it is not one of this link.
    """
    rule: Any = link.rule
    if isinstance(rule, TreeRule):
        return None
    fields = getattr(state, "_fields", ())
    leaf_type = getattr(type(state), "_leaf_type", None)
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

    return _Part(rule.counts, count, fields[count:], leaf_type)


def _bucket(prepared: Prepared, parts: _Parts, numbers: Sequence[Tensor], known: bool) -> Bucket:
    """Read the steps and the numbers that are carried on: as floats where they are known."""
    steps: list[Any] = [None] * len(prepared.links)
    carried: list[tuple[Any, ...]] = [()] * len(prepared.links)
    last, read = None, None
    for (k, j), number in zip(parts.numbers, numbers, strict=True):
        part: Any = parts.each[k]
        if j or not part.counts:
            carried[k] = (*carried[k], read_number(number, known))
        else:
            last, read = number, read if number is last else read_number(number, known, 1)
            steps[k] = read
    return Bucket(range(len(prepared.numbers.shapes)), steps, carried)


def new_states(links: Sequence[Link], made: Call) -> list[Any]:
    """Arrange the results of links as states like those that were given."""
    outcome = made.outcome
    due, carried = outcome.due[0], outcome.carried[0]
    counted: list[tuple[Tensor, Any, Tensor]] = []
    states = []
    for k, (part, old) in enumerate(zip(made.parts.each, made.states, strict=True)):
        new = outcome.columns[k]
        if part is None:
            states.append(new)
        elif not (part.counters or part.names) or (due[k] is False and links[k].rule.hold is None):
            states.append(old)
        else:
            counters = [_counted(old[0], due[k], counted)] if part.counts else []
            counters += [_kept(n, o) for n, o in zip(carried[k], old[part.counts : part.counters], strict=True)]
            if new is made.leaves.columns[k]:
                fields = old[part.counters :]
            else:
                fields = [tree.unflatten(made.structure, column) for column in new]
            states.append(type(old)(*counters, *fields))
    return states


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
