"""The lift: from rules for one tensor to transformations of whole trees.

A transformation is a sequence of links. Neighbouring rules are run as one pass over the leaves; a function of the whole
tree, or a rule whose scalars depend on the whole tree, begins a new pass. Missing gradients, masked leaves and trees
that do not match are dealt with here, once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import execution, tree
from functorch_optim.rule import Rule, TreeRule, tree_state_type
from functorch_optim.tree import MaskedNode, Tree


class Selection(NamedTuple):
    """The leaves that bear a label.

    Attributes:
        labels: tree of labels, a prefix of the parameters; or a function of the parameters that returns one.
        label: the label that selects.
        known: all labels that may occur; None when any may.
    """

    labels: Any
    label: Any
    known: tuple[Any, ...] | None

    def select(self, params: Tree) -> list[bool]:
        """Tell for each leaf of `params` whether it is selected."""
        labels = self.labels(params) if callable(self.labels) else self.labels
        leaves = tree.broadcast_prefix(labels, params, "the labels")
        for i, leaf in enumerate(leaves):
            if self.known is not None and not any(leaf is label or leaf == label for label in self.known):
                raise ValueError(
                    f"The label {leaf!r} at {tree.paths(params)[i]!r} is unknown; "
                    f"known are {', '.join(map(repr, self.known))}"
                )
        return [leaf == self.label for leaf in leaves]


class Link(NamedTuple):
    """One link of a chain: a rule, and the leaves that it is for.

    Attributes:
        rule: what is done.
        where: selections that a leaf must pass, all of them; none means every leaf.
    """

    rule: Rule | TreeRule
    where: tuple[Selection, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the function that made the rule, for messages."""
        return str(getattr(self.rule.update, "__qualname__", "the transformation")).split(".")[0]

    def active(self, params: Tree, count: int) -> list[bool]:
        """Tell for each of `count` leaves of `params` whether this link is for it."""
        masks = [selection.select(params) for selection in self.where]
        return [all(mask[i] for mask in masks) for i in range(count)]


def init(links: Sequence[Link], params: Tree) -> list[Any]:
    """Make the state of each link."""
    leaves, structure = tree.flatten(params)
    check_params(leaves, lambda i: tree.paths(params)[i])
    tensors = [leaf for leaf in leaves if leaf is not None]
    step = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    states = []
    for link in links:
        active = [on and leaf is not None for on, leaf in zip(link.active(params, len(leaves)), leaves, strict=True)]
        if isinstance(link.rule, TreeRule):
            states.append(link.rule.init(_masked(leaves, active, structure) if link.where else params))
            continue
        leaf_states = [link.rule.init_leaf(p) if on else None for p, on in zip(leaves, active, strict=True)]
        state_type = next((type(state) for state in leaf_states if state is not None), link.rule.state_type or tuple)
        trees = [
            tree.unflatten(structure, [MaskedNode() if state is None else state[field] for state in leaf_states])
            for field in range(len(getattr(state_type, "_fields", ())))
        ]
        counter = () if link.rule.scalars is None else (step,)
        states.append(tree_state_type(state_type, bool(counter))(*counter, *trees))
    return states


def update(
    links: Sequence[Link], updates: Tree, states: Sequence[Any], params: Tree, extras: dict[str, Any]
) -> tuple[Tree, list[Any]]:
    """Run every link, neighbouring rules in one pass."""
    leaves, structure = tree.flatten(updates)
    param_leaves = None
    if params is not None:
        param_leaves = tree.flatten_up_to(structure, params, "params", updates, "updates")
    check_updates(leaves, param_leaves, lambda i: tree.paths(updates)[i])
    like = updates if params is None else params
    counters: list[tuple[Tensor, Tensor]] = []
    new_states: list[Any] = []
    for members in passes(links):
        some_states = states[len(new_states) : len(new_states) + len(members)]
        rule = members[0].rule
        if isinstance(rule, TreeRule):
            active = members[0].active(like, len(leaves))
            leaves, state = run_tree_rule(members[0], leaves, some_states[0], params, extras, structure, active)
            new_states.append(state)
        else:
            leaves, more = _run_pass(members, leaves, some_states, param_leaves, extras, structure, like, counters)
            new_states += more
    return tree.unflatten(structure, leaves), new_states


def passes(links: Sequence[Link]) -> list[list[Link]]:
    """Split links into passes: a function of the tree alone, neighbouring rules together."""
    groups: list[list[Link]] = []
    for link in links:
        if not groups or link.rule.sees_tree or isinstance(groups[-1][0].rule, TreeRule):
            groups.append([])
        groups[-1].append(link)
    return groups


def run_tree_rule(
    link: Link, leaves: list[Any], state: Any, params: Tree, extras: dict[str, Any], structure: Any, active: list[bool]
) -> tuple[list[Any], Any]:
    """Run a function of the whole tree on those leaves that it is for."""
    rule: Any = link.rule
    wanted = extras if rule.extras is None else {name: extras[name] for name in rule.extras if name in extras}
    updates = tree.unflatten(structure, leaves)
    if link.where:
        updates = _masked(leaves, active, structure)
        params = None if params is None else _masked(structure.flatten_up_to(params), active, structure)
    new_updates, new_state = rule.update(updates, state, params, **wanted)
    old_leaves, masked_structure = tree.flatten(updates)
    name = f"the updates from {link.name}"
    new_leaves = tree.flatten_up_to(masked_structure, new_updates, name, updates, "updates")
    check_updates(new_leaves, old_leaves, lambda i: tree.paths(updates)[i], name, "the one it was given")
    remaining = iter(new_leaves)
    return [next(remaining) if on else leaf for on, leaf in zip(active, leaves, strict=True)], new_state


def _masked(leaves: list[Any], active: list[bool], structure: Any) -> Tree:
    return tree.unflatten(structure, [leaf if on else MaskedNode() for leaf, on in zip(leaves, active, strict=True)])


def _run_pass(
    links: Sequence[Link],
    leaves: list[Any],
    states: Sequence[Any],
    params: list[Any] | None,
    extras: dict[str, Any],
    structure: Any,
    like: Tree,
    counters: list[tuple[Tensor, Tensor]],
) -> tuple[list[Any], list[Any]]:
    columns = [_columns(link, state, structure, like) for link, state in zip(links, states, strict=True)]
    active = [
        [on and leaf is not None for on, leaf in zip(link.active(like, len(leaves)), leaves, strict=True)]
        for link in links
    ]
    steps = [
        _count(state.step, counters) if link.rule.scalars else None for link, state in zip(links, states, strict=True)
    ]
    scalars = [
        evaluate_scalars(link, step, extras, [leaf for leaf, on in zip(leaves, some, strict=True) if on])
        for link, step, some in zip(links, steps, active, strict=True)
    ]

    new_leaves = list(leaves)
    new_columns = [[list(column) for column in some] for some in columns]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in range(len(leaves)):
        groups.setdefault(tuple(k for k in range(len(links)) if active[k][i]), []).append(i)
    for ks, members in groups.items():
        if not ks:
            continue
        some_updates, some_states = apply_rules(
            [links[k] for k in ks],
            [leaves[i] for i in members],
            [_take(columns[k], members) for k in ks],
            [params[i] for i in members] if params is not None else None,
            [scalars[k] for k in ks],
            lambda position, members=members: tree.paths(like)[members[position]],  # type: ignore[misc]
        )
        for position, i in enumerate(members):
            new_leaves[i] = some_updates[position]
            for k, some_state in zip(ks, some_states, strict=True):
                for new_column, some_column in zip(new_columns[k], some_state, strict=True):
                    new_column[i] = some_column[position]

    new_states = []
    for state, step, some in zip(states, steps, new_columns, strict=True):
        counter = () if step is None else (step,)
        new_states.append(type(state)(*counter, *[tree.unflatten(structure, column) for column in some]))
    return new_leaves, new_states


def _count(step: Tensor, counters: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Add one to a counter; the links of a chain share theirs, before and after."""
    for old, new in counters:
        if old is step:
            return new
    counters.append((step, step + 1))
    return counters[-1][1]


def _columns(link: Link, state: Any, structure: Any, like: Tree) -> Any:
    """Turn the state of a link, trees in a NamedTuple, into lists in the NamedTuple that the rule knows."""
    rule: Any = link.rule
    counted = rule.scalars is not None
    fields = getattr(state, "_fields", None)
    leaf_type = getattr(type(state), "leaf_type", None)
    if (
        fields is None
        or (fields[:1] == ("step",)) != counted
        or (rule.state_type is not None and rule.state_type is not leaf_type and rule.init is not None)
        or (rule.init is None and leaf_type is not None)
    ):
        raise ValueError(
            f"The state of {link.name} is a {type(state).__name__}: it belongs to another transformation. "
            "Make it with the init of the transformation whose update is called: state = tx.init(params)"
        )
    columns = [
        tree.flatten_up_to(structure, field, f"the state's {name}", like, "params")
        for name, field in zip(fields[counted:], state[counted:], strict=True)
    ]
    return leaf_type(*columns) if leaf_type is not None else ()


def _take(columns: Any, members: list[int]) -> Any:
    return type(columns)(*[[column[i] for i in members] for column in columns]) if columns else ()


# What the functional lift and the stateful wrapper share. ------------------------------------------------------------


def evaluate_scalars(link: Link, step: Tensor | None, extras: dict[str, Any], updates: list[Tensor]) -> Any:
    """Compute the numbers that a rule needs at this step.

    Args:
        link: the link of a rule.
        step: number of this update, 1 at the first: 0-dim tensor; None when the rule has no scalars.
        extras: everything that was given to `update` by keyword.
        updates: what the rule is about to transform, for a rule that sees the tree.
    """
    rule: Any = link.rule
    if rule.scalars is None or step is None:
        return ()
    wanted = {name: extras[name] for name in rule.extras if name in extras}
    if rule.sees_tree:
        wanted["updates"] = updates
    return rule.scalars(step.to(torch.float64), **wanted)


def apply_rules(
    links: Sequence[Link],
    updates: list[Tensor],
    states: Sequence[Any],
    params: list[Tensor] | None,
    scalars: Sequence[Any],
    path: Callable[[int], str],
) -> tuple[list[Tensor], list[Any]]:
    """Run rules over tensors, and check that they returned what they were given the shape of."""
    for k, link in enumerate(links):
        if params is None and link.rule.needs_params:
            raise ValueError(
                f"{link.name} needs the parameters, but update was called without them; "
                "call tx.update(updates, state, params)"
            )
        if link.rule.elementwise:
            for name, column in _fields(states[k]):
                _check_shapes(
                    f"The state's {name} for {link.name}", column, "the update", updates, path,
                    "The state belongs to other parameters: make it with tx.init(params)",
                )  # fmt: skip
    rules: list[Any] = [link.rule for link in links]
    new_updates, new_states = execution.run(rules, updates, states, params, scalars)
    advice = "A rule must keep shapes, and what it computes from other shapes is not what its author meant"
    for link, old_state, new_state in zip(links, states, new_states, strict=True):
        for (name, old), (_, new) in zip(_fields(old_state), _fields(new_state), strict=True):
            _check_shapes(f"The state's {name} after {link.name}", new, "the one before", old, path, advice)
    names = ", ".join([link.name for link in links])
    _check_shapes(f"The update after {names}", new_updates, "the one before", updates, path, advice)
    return new_updates, new_states


def _fields(state: Any) -> list[tuple[str, Any]]:
    return list(zip(getattr(state, "_fields", ()), state, strict=True))


def _check_shapes(
    what: str, tensors: list[Tensor], what_else: str, others: list[Tensor], path: Callable[[int], str], advice: str
) -> None:
    for i, (tensor, other) in enumerate(zip(tensors, others, strict=True)):
        if tensor.shape != other.shape:
            raise ValueError(
                f"{what} has shape {tuple(tensor.shape)} at {path(i)!r}, but {what_else} has {tuple(other.shape)}. "
                f"{advice}"
            )


def check_params(leaves: Sequence[Any], path: Callable[[int], str]) -> None:
    """Raise unless every leaf is a tensor that can be optimized, or None."""
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"The parameter at {path(i)!r} is a {type(leaf).__name__}, not a tensor; "
                "convert it with torch.as_tensor, or take it out of the tree"
            )
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise TypeError(
                f"The parameter at {path(i)!r} has dtype {leaf.dtype}, which cannot be optimized; "
                "convert it with .float(), or leave it out of the tree"
            )


def check_updates(
    leaves: Sequence[Any],
    others: Sequence[Any] | None,
    path: Callable[[int], str],
    name: str = "the updates",
    other_name: str = "the parameter",
) -> None:
    """Raise unless every update is None or a tensor with the shape and dtype of its parameter, or of another update."""
    for i, leaf in enumerate(leaves):
        if leaf is None:
            continue
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} have a {type(leaf).__name__} at {path(i)!r}, not a tensor")
        if others is None:
            continue
        other = others[i]
        if not isinstance(other, Tensor):
            what = "None" if other is None else f"a {type(other).__name__}"
            raise ValueError(f"{name} have a tensor at {path(i)!r}, but {other_name} there is {what}")
        if leaf.shape != other.shape or leaf.dtype != other.dtype:
            raise ValueError(
                f"{name} have shape {tuple(leaf.shape)} and dtype {leaf.dtype} at {path(i)!r}, but {other_name} there "
                f"has shape {tuple(other.shape)} and dtype {other.dtype}; they must be the same"
            )
