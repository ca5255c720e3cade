"""From a live torch.optim optimizer to the functional form, and back."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import optim, tree
from functorch_optim._core import initial, saving
from functorch_optim._core.checks import check_updates
from functorch_optim._core.combine import partition
from functorch_optim._core.links import nest, unnest
from functorch_optim._core.rule import Rule, TreeRule
from functorch_optim._core.transformation import GradientTransformation, shown
from functorch_optim._core.vector import common_dtype, flattened
from functorch_optim._execution import writing
from functorch_optim.optim import _factories as factories
from functorch_optim.optim._base import OptimizerBase
from functorch_optim.optim._lbfgs import whole_bounds
from functorch_optim.optim._loading import checked_state, exported_state
from functorch_optim.optim._plan import Plan
from functorch_optim.optimizers._limited_memory import Memory
from functorch_optim.optimizers._limited_memory import from_torch as memory_from_torch
from functorch_optim.optimizers._limited_memory import to_torch as memory_to_torch
from functorch_optim.optimizers.lbfgs import LBFGSState, lbfgs, pack, unpack
from functorch_optim.tree import MaskedNode, Tree


def from_torch(optimizer: torch.optim.Optimizer) -> tuple[GradientTransformation, Tree, Any]:
    """Turn a live optimizer into a transformation, parameters and state that go on where it is.

    Args:
        optimizer: of a class of torch.optim or `fo.optim`, or derived from one; or a `fo.Optimizer`.

    Returns:
        tx: the transformation with the hyperparameters as they are now. Where groups differ, or parameters have had
            different numbers of updates, it is a `partition`, with a label for each such set.
        params: copies of the parameters, detached: a dict by name where the optimizer has names, else a list.
        state: copies of the states. SGD, Muon and LBFGS of torch.optim do not count: the step here is 1 where there is
            a buffer, else 0.

    Raises:
        TypeError: it is no optimizer, or its class is not known.
        ValueError: a hyperparameter is out of range; or parameters have had different numbers of updates, or carry
            different numbers on, and something looks at them together: a norm, say, or a `fo.Optimizer` that was given
            a transformation.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = torch.optim.Adam(model.named_parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> tx, params, state = fo.from_torch(opt)
        >>> grads = fo.tree.map(torch.ones_like, params)
        >>> updates, state = tx.update(grads, state, params)
        >>> fo.to_torch(opt, fo.apply_updates(params, updates), state)
        >>> opt.state[model.bias]["step"]
        tensor(2.)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"from_torch needs a live optimizer, got {shown(optimizer)}; "
            "write from_torch(torch.optim.Adam(model.named_parameters()))"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        return _lbfgs_from_torch(optimizer)
    originals = _params(optimizer)
    leaves, structure = tree.flatten(originals)
    places = {id(p): i for i, p in enumerate(leaves)}
    sets = _sets(optimizer)
    labels: list[Any] = [None] * len(leaves)
    for label, one in enumerate(sets):
        for p in one.states:
            labels[places[id(p)]] = str(label)
    transformations = {str(label): one.transformation for label, one in enumerate(sets)}
    tx = sets[0].transformation if len(sets) == 1 else partition(transformations, tree.unflatten(structure, labels))
    params = tree.map(_copy, originals)
    states = initial.init(tx._links, params)
    offset = 0
    for one in sets:
        for k, link in enumerate(one.plan.links):
            if isinstance(link.rule, Rule):
                states[offset + k] = _link_state(one, k, states[offset + k], places, structure)
            elif k in one.tree_states:
                states[offset + k] = tree.map(_copy, one.tree_states[k])
        offset += len(one.plan.links)
    return tx, params, nest(tx._layout, states)


def to_torch(optimizer: torch.optim.Optimizer, params: Tree, state: Any) -> None:
    """Write parameters and state into a live optimizer: the way back from `from_torch`.

    Args:
        optimizer: the one that `from_torch` was given, or one that was made in the same way.
        params: parameters, built as `from_torch` returned them. They are copied.
        state: the state of the transformation. It is copied.

    Raises:
        TypeError: the class of the optimizer is not known.
        ValueError: parameters or state do not fit the optimizer.
        RuntimeError: a parameter of the optimizer cannot be written to. Nothing is changed after an error.

    A parameter whose step is 0 gets no state, as torch.optim has it. (The functional form has one step for all that are
    updated together, with or without a gradient.) The hyperparameters of the optimizer stay.

    Example:
        See `from_torch`.

        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        >>> tx, params, state = fo.from_torch(opt)
        >>> updates, state = tx.update([torch.ones(1)], state, params)
        >>> fo.to_torch(opt, fo.apply_updates(params, updates), state)
        >>> p.data, opt.state[p]
        (tensor([0.9000]), {'momentum_buffer': tensor([1.])})
    """
    originals = _params(optimizer)
    leaves, structure = tree.flatten(originals)
    values = tree.flatten_up_to(structure, params, "params", originals, "the optimizer's parameters")
    check_updates(values, leaves, lambda i: tree.paths(originals)[i], "the params")
    if isinstance(optimizer, torch.optim.LBFGS):
        new_states = _lbfgs_to_torch(optimizer, state)
    else:
        saved = saving.state_dict(state, params)["state"]
        by_param = {p: saved.get(path, {}) for p, path in zip(leaves, tree.paths(params), strict=True)}
        new_states = {}
        for plan, transformation, _ in _plans(optimizer):
            one = isinstance(optimizer, OptimizerBase) and not optimizer._has_factory
            links = unnest(transformation._layout, state) if one else []
            for i, p in enumerate(plan.params):
                if by_param[p].get("step", 1) > 0 or p in optimizer.state:
                    new_states[p] = exported_state(plan, i, {**by_param[p], **_numbers(plan, i, links)})
            if isinstance(optimizer, OptimizerBase) and one:
                new_states.update(optimizer._exported_tree_states(plan, links))
    with torch.no_grad():
        writing.check_writable(leaves, lambda i: tree.paths(originals)[i])
        for p, value in zip(leaves, values, strict=True):
            p.copy_(value)
    for key, new in new_states.items():
        optimizer.state[key] = tree.map(_copy, new) if isinstance(key, str) else new


Numbers = dict[int, tuple[float, list[Any]]]
"""For each link, its step, and the numbers that its scalars carry on."""


class _Set(NamedTuple):
    """Parameters of one plan that can be updated together: each link has the same numbers for all of its parameters.

    Attributes:
        transformation: the transformation.
        plan: of the transformation.
        numbers: of the links.
        states: for each parameter, its index in the plan, and its `state[p]`.
        tree_states: the states of functions of the tree.
    """

    transformation: GradientTransformation
    plan: Plan
    numbers: Numbers
    states: dict[Tensor, tuple[int, dict[str, Any]]]
    tree_states: dict[int, Any]

    def fits(self, numbers: Numbers) -> bool:
        """Tell whether a parameter with these numbers can be updated with the others."""
        return all(self.numbers.get(k, number) == number for k, number in numbers.items())

    @property
    def step(self) -> float:
        """Return the number of updates that were done."""
        return max([step for step, _ in self.numbers.values()], default=0.0)


def _plans(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Plan, GradientTransformation, dict[int, Any]]]:
    """Yield a plan for each tree of the optimizer, its transformation, and the states of functions of the tree."""
    kind: Any = optimizer
    if not isinstance(optimizer, OptimizerBase):
        names = [base.__name__ for base in type(optimizer).__mro__ if base.__module__.startswith("torch.optim")]
        kind = next((getattr(optim, name) for name in names if name in optim.__all__ and name != "Optimizer"), None)
        if kind is None:
            raise TypeError(
                f"{type(optimizer).__name__} is no optimizer of torch.optim, so its algorithm is not known here; make "
                "the transformation yourself, and its state with tx.init(params)"
            )
    if isinstance(optimizer, OptimizerBase) and not optimizer._has_factory:
        plan = optimizer._plan(0)
        yield plan, plan.transformation, optimizer._tree_states(0, plan)
        return
    for index, group in enumerate(optimizer.param_groups):
        transformation = factories.make(kind._transformation, _hyperparameters(group), live=False)
        plan = Plan(transformation, group["params"], group.get("param_names"), kind._count)
        known = optimizer._tree_states(index, plan) if isinstance(optimizer, OptimizerBase) else {}
        yield plan, transformation, known


def _sets(optimizer: torch.optim.Optimizer) -> list[_Set]:
    sets: list[_Set] = []
    for plan, transformation, tree_states in _plans(optimizer):
        found: list[_Set] = []
        shared = plan.shared_numbers(optimizer.state)
        for i, p in enumerate(plan.params):
            given = optimizer.state.get(p, {})
            position, state = plan.completed(i, checked_state(plan, i, given, set(given)), shared)
            part = plan.parts[i]
            numbers: Numbers = {
                k: (position.step_of(part, k), [number for link, number in position.carried if link == k])
                for k in part.links
            }
            one = next((one for one in found if one.fits(numbers)), None)
            if one is None:
                one = _Set(transformation, plan, {}, {}, tree_states)
                found.append(one)
            one.numbers.update(numbers)
            one.states[p] = (i, state)
        is_one = isinstance(optimizer, OptimizerBase) and not optimizer._has_factory
        if len(found) > 1 and (is_one or any(isinstance(k.rule, TreeRule) or k.rule.sees_tree for k in plan.links)):
            counts = [[f"{one.numbers[k][0]:g}" for one in found if k in one.numbers] for k in range(len(plan.links))]
            steps = next((some for some in counts if len(set(some)) > 1), None)
            where = "numbers that rules carry on" if steps is None else f"steps, {', '.join(steps)}"
            raise ValueError(
                f"The parameters are at different {where}, but {transformation!r} looks at all of them together, "
                "or is one for all: it cannot be parted"
            )
        sets += found
    return sets


def _link_state(one: _Set, k: int, initial: Any, places: dict[int, int], structure: Any) -> Any:
    """Make the state of a link as the parameters of a set have it, from the one that `init` made."""
    links = one.plan.links
    step, carried = one.numbers.get(k, (one.step, []))
    counters: list[Any] = [int(step)] * links[k].rule.counts + carried
    columns: list[list[Any]] = []
    for p, (i, state) in one.states.items():
        part = one.plan.parts[i]
        if k in part.links:
            keys = part.keys[part.links.index(k)]
            columns = columns or [[MaskedNode()] * len(places) for _ in keys]
            for column, key in zip(columns, keys, strict=True):
                column[places[id(p)]] = _copy(state[key])
    count = len(one.plan.links[k].rule.counters)
    numbers = [
        torch.as_tensor(new, dtype=old.dtype, device=old.device)
        for new, old in zip(counters, initial[:count], strict=False)
    ]
    trees = [tree.unflatten(structure, column) for column in columns] or initial[count:]
    return type(initial)(*numbers, *trees)


def _numbers(plan: Plan, i: int, links: list[Any]) -> dict[str, Tensor]:
    """Collect a parameter's numbers from the states of links. A state of numbers alone does not name its parameters.

    Args:
        plan: of one transformation for all parameters.
        i: index of the parameter.
        links: the states of its links; none where there are several transformations.
    """
    part, found = plan.parts[i], dict[str, Tensor]()
    for k, carried, step in zip(part.links, part.carried, part.steps, strict=True) if links else ():
        rule: Any = plan.links[k].rule
        named = dict(zip(carried, rule.counters[rule.counts :], strict=True))
        if step in part.tree_steps:
            named[str(step)] = "step"
        found.update({key: getattr(links[k], name) for key, name in named.items() if hasattr(links[k], name)})
    return found


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """Copy tensors among the hyperparameters: a scheduler may edit them in place."""
    return {name: _copy(value) if isinstance(value, Tensor) else value for name, value in group.items()}


def _params(optimizer: torch.optim.Optimizer) -> Any:
    """Return the parameters themselves: a dict by name, or a list."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    for what, keys in (("parameters", list(map(id, params))), ("names", names)):
        if len(set(keys)) < len(keys):
            raise ValueError(
                f"The optimizer has {what} that come more than once, which a tree of parameters cannot have; "
                "give each of them once"
            )
    return dict(zip(names, params, strict=True)) if names else params


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


# L-BFGS: one vector, in the order of the optimizer there and of the tree here. -------------------------------------


def _lbfgs_from_torch(optimizer: torch.optim.LBFGS) -> tuple[GradientTransformation, Tree, Any]:
    [group] = optimizer.param_groups
    tx = factories.make(lbfgs, {**_hyperparameters(group), **whole_bounds(group)}, live=False)
    params = tree.map(_copy, _params(optimizer))
    x = flattened(group["params"], common_dtype(group["params"])).detach()
    memory = memory_from_torch(optimizer.state.get(group["params"][0], {}), x)
    step = torch.zeros((), dtype=torch.int64, device=x.device)
    return tx, params, pack(step, _arranged(memory, _order(optimizer)), tx.init(params))


def _lbfgs_to_torch(optimizer: torch.optim.LBFGS, state: Any) -> dict[Any, Any]:
    [group] = optimizer.param_groups
    if not isinstance(state, LBFGSState) or state.d.numel() != len(_order(optimizer)):
        raise ValueError(
            "The state is not one of lbfgs for these parameters; give the state from from_torch, or from an update"
        )
    back = torch.argsort(_order(optimizer))
    memory = _arranged(unpack(state, group["max_iter"]), back)
    return {group["params"][0]: memory_to_torch(memory, group["history_size"])}


def _order(optimizer: torch.optim.Optimizer) -> Tensor:
    """List the places in the optimizer's vector in the order of the tree's."""
    originals = _params(optimizer)
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [p.numel() * (2 if p.is_complex() else 1) for p in params]
    pieces = torch.split(torch.arange(sum(sizes), device=params[0].device), sizes)
    by_param = dict(zip(map(id, params), pieces, strict=True))
    return torch.cat([by_param[id(p)] for p in tree.flatten(originals)[0]])


def _arranged(memory: Memory, order: Tensor) -> Memory:
    def arrange(vector: Tensor) -> Tensor:
        return vector[order]

    return memory._replace(
        d=arrange(memory.d),
        prev_flat_grad=arrange(memory.prev_flat_grad),
        old_dirs=tuple(map(arrange, memory.old_dirs)),
        old_stps=tuple(map(arrange, memory.old_stps)),
    )
