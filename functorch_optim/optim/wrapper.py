"""A torch.optim.Optimizer around any transformation."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from functorch_optim import checkpoint, execution, lift, tree
from functorch_optim.base import GradientTransformation, check_extras
from functorch_optim.optim.plan import Part, Plan


class Optimizer(torch.optim.Optimizer):
    """Train with a transformation through torch.optim's interface: a real `torch.optim.Optimizer`.

    There are two forms. With a transformation, all parameters in all groups are one tree, and the groups hold no
    hyperparameters:

        Optimizer(model.parameters(), chain(clip_by_global_norm(1.0), adamw(schedule)))

    With a factory, a function that makes a transformation of its hyperparameters, these live in `param_groups`: groups
    may override them, learning rate schedulers drive them, and edits take effect at the next step. Every group is a
    tree of its own:

        Optimizer(model.parameters(), adamw, lr=1e-3)

    Args:
        params: tensors, (name, tensor) pairs, or dicts of a group each, as torch.optim takes them. Masks and labels in
            the transformation see a dict by name where there are names, and else a list.
        transformation: transformation, or factory.
        differentiable: whether `step` is recorded by autograd, and parameters may be non-leaf tensors.
        **hyperparameters: arguments of the factory, the defaults of all groups. A schedule is called with the number of
            steps that a parameter has had; it belongs to the program, not to the state, and is not saved.

    Raises:
        TypeError: `transformation` is neither; a hyperparameter is unknown or missing; a parameter is no tensor, or
            one of integers.
        ValueError: there are no parameters, or one comes twice, or one is no leaf; a hyperparameter is out of range.

    `state[p]` holds the rule's state for p under torch's names, `step` among them; a parameter whose gradient is None
    is skipped, and its step does not count. Differences from torch.optim: a parameter that comes twice in a group is an
    error, and a step that raises has changed nothing.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fo.Optimizer(model.parameters(), fo.adamw, lr=0.1)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=1, gamma=0.5)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> scheduler.step()
        >>> opt.param_groups[0]["lr"], sorted(opt.state[model.bias])
        (0.05, ['exp_avg', 'exp_avg_sq', 'step'])
    """

    def __init__(
        self,
        params: Iterable[Any],
        transformation: GradientTransformation | Callable[..., GradientTransformation],
        *,
        differentiable: bool = False,
        **hyperparameters: Any,
    ) -> None:
        self._transformation = transformation
        self._plans: dict[int, tuple[Any, Plan]] = {}
        defaults = _defaults(transformation, hyperparameters)
        super().__init__(params, {**defaults, "differentiable": differentiable})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: dict with "params", and hyperparameters that this group overrides.

        Raises:
            TypeError, ValueError: as the constructor does; nothing is added then.
        """
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), Tensor | set | None):
            param_group["params"] = list(param_group["params"])
            tensors = [param[1] if isinstance(param, tuple) else param for param in param_group["params"]]
            if len({id(tensor) for tensor in tensors}) != len(tensors):
                raise ValueError("Some parameters come more than once in a group; give each of them once")
            if isinstance(self._transformation, GradientTransformation):
                _check_group_without_hyperparameters(param_group)
        if isinstance(self._transformation, GradientTransformation) and self._tree_states():
            raise ValueError(
                "Parameters cannot be added once a transformation of the whole tree has made its state. Add them "
                "before the first step, or use a factory: Optimizer(params, factory, **hyperparameters)"
            )
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            lift.check_params(group["params"], lambda i: group.get("param_names", range(i + 1))[i])
            self._plan(len(self.param_groups) - 1 if self._is_factory else 0)
        except Exception:
            self.param_groups.pop()
            self._plans.clear()
            raise

    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model again, calls backward, and returns the loss. The loss is also what a
                transformation that declares the extra `value` is given.
            **extra: by name, what some transformation declares.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse.
            TypeError: an extra that nothing declares.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        differentiable = self.defaults["differentiable"]
        with torch.set_grad_enabled(differentiable):
            trees = range(len(self.param_groups) if self._is_factory else 1)
            plans = [self._plan(index) for index in trees]
            if loss is not None and "value" not in extra and any(_declares(plan, "value") for plan in plans):
                extra["value"] = loss
            # Everything is computed before anything is changed.
            computed = [self._compute(index, plan, extra) for index, plan in zip(trees, plans, strict=True)]
            for params, updates, states, tree_states in computed:
                execution.add_(params, updates)
                self.state.update(states)
                if tree_states:
                    everything: dict[Any, Any] = self.state
                    everything["transformation"] = {**self._tree_states(), **tree_states}
        return loss

    @property
    def _is_factory(self) -> bool:
        return not isinstance(self._transformation, GradientTransformation)

    def _tree_states(self) -> dict[str, Any]:
        """Return the states of transformations of the whole tree, which belong to no parameter."""
        states: dict[str, Any] = self.__dict__.get("state", {}).get("transformation", {})
        return states

    def _plan(self, index: int) -> Plan:
        """Make the plan of a tree, or find it when its hyperparameters are those of the last step."""
        groups = [self.param_groups[index]] if self._is_factory else self.param_groups
        values = [[(name, value) for name, value in group.items() if name != "params"] for group in groups]
        counts = [len(group["params"]) for group in groups]
        known = self._plans.get(index)
        if known is not None and known[0][1] == counts and _same(known[0][0], values):
            return known[1]
        transformation: Any = self._transformation
        if self._is_factory:
            given = {name: groups[0][name] for name in _parameters(transformation) if name in groups[0]}
            missing = [name for name, p in _parameters(transformation).items() if p.default is p.empty]
            missing = [name for name in missing if name not in given]
            if missing:
                raise TypeError(
                    f"Group {index} lacks the hyperparameter {missing[0]!r}, which has no default; "
                    f"write Optimizer(params, factory, {missing[0]}=...)"
                )
            transformation = transformation(**given)
            if not isinstance(transformation, GradientTransformation):
                raise TypeError(
                    f"{self._transformation!r} returned a {type(transformation).__name__}, not a "
                    "GradientTransformation; write a function of hyperparameters that returns, say, chain(...)"
                )
        params = [p for group in groups for p in group["params"]]
        names = [name for group in groups for name in group.get("param_names", ())]
        plan = Plan(transformation, params, names or None)
        self._plans[index] = ((values, counts), plan)
        return plan

    def _compute(
        self, index: int, plan: Plan, extra: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor], dict[Any, Any], dict[str, Any]]:
        """Compute the updates of a tree and its next states; change nothing."""
        check_extras(plan.links, extra)
        updates: list[Any] = [p.grad for p in plan.params]
        present = [i for i, g in enumerate(updates) if g is not None]
        if not present:
            return [], [], {}, {}
        if any(updates[i].layout != torch.strided for i in present):
            raise RuntimeError("Sparse gradients are not supported by this transformation; use dense ones")
        lift.check_updates(updates, plan.params, plan.path)
        entries = {i: self._entry(plan, i) for i in present}
        tree_states: dict[str, Any] = {}
        buckets: dict[tuple[float, Part], list[int]] = {}
        for i in present:
            step = entries[i]["step"].item() if plan.parts[i].counted else 0.0
            buckets.setdefault((step, plan.parts[i]), []).append(i)

        k = 0
        for members in lift.passes(plan.links):
            if plan.is_tree_rule(k):
                key = f"{index}.{k}"
                state = self._tree_states().get(key, plan.initial_tree_state(k))
                updates, state = plan.run_tree_rule(k, updates, state, extra)
                if tree.flatten(state)[0]:
                    tree_states[key] = state
            else:
                links = range(k, k + len(members))
                seen = {
                    j: [updates[i] for i in present if plan.active[j] is None or plan.active[j][i]]
                    for j in links
                    if plan.links[j].rule.sees_tree
                }
                for (step, part), some in buckets.items():
                    self._run_rules(plan, part, links, some, step, updates, entries, seen, extra)
            k += len(members)

        steps = torch.tensor([step + 1 for step, _ in buckets], dtype=torch.get_default_dtype())
        for ((_, part), some), new_step in zip(buckets.items(), steps.unbind(), strict=True):
            for i in some:
                if part.counted:
                    entries[i]["step"] = new_step.to(entries[i]["step"], copy=True)
        states = {plan.params[i]: entry for i, entry in entries.items() if entry}
        return [plan.params[i] for i in present], [updates[i] for i in present], states, tree_states

    def _entry(self, plan: Plan, i: int) -> dict[str, Any]:
        """Return a copy of `state[p]`, completed with what is not there yet."""
        p, part = plan.params[i], plan.parts[i]
        entry = dict(self.state.get(p, ()))
        if part.counted and "step" not in entry:
            entry["step"] = torch.zeros((), dtype=_step_dtype())
        for k, keys in zip(part.links, part.keys, strict=True):
            if any(key not in entry for key in keys):
                initial = plan.links[k].rule.init_leaf(p)  # type: ignore[union-attr]
                for key, tensor in zip(keys, initial, strict=True):
                    entry.setdefault(key, tensor)
        return entry

    def _run_rules(
        self,
        plan: Plan,
        part: Part,
        members: range,
        indices: list[int],
        step: float,
        updates: list[Any],
        entries: dict[int, dict[str, Any]],
        seen: dict[int, list[Tensor]],
        extra: dict[str, Any],
    ) -> None:
        """Run those rules among `members` that apply to these parameters; write into `updates` and `entries`."""
        chosen = [(k, keys) for k, keys in zip(part.links, part.keys, strict=True) if k in members]
        if not chosen:
            return
        links = [plan.links[k] for k, _ in chosen]
        number = torch.tensor(step + 1, dtype=torch.float64)
        states = []
        for k, keys in chosen:
            columns = [[entries[i][key] for i in indices] for key in keys]
            states.append(plan.state_type(k, plan.params[indices[0]])(*columns) if keys else ())
        new_updates, new_states = lift.apply_rules(
            links,
            [updates[i] for i in indices],
            states,
            [plan.params[i] for i in indices],
            [lift.evaluate_scalars(plan.links[k], number, extra, seen.get(k, [])) for k, _ in chosen],
            lambda position: plan.path(indices[position]),
        )
        for position, i in enumerate(indices):
            updates[i] = new_updates[position]
        for (_, keys), new_state in zip(chosen, new_states, strict=True):
            for key, column in zip(keys, new_state, strict=True):
                for i, tensor in zip(indices, column, strict=True):
                    entries[i][key] = tensor

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the hyperparameters in plain containers; `torch.load(weights_only=True)` takes them.

        Hyperparameters that are functions, schedules say, belong to the program and are left out.
        """
        saved = super().state_dict()
        saved["param_groups"] = [
            {name: value for name, value in group.items() if not callable(value)} for group in saved["param_groups"]
        ]
        if "transformation" in saved["state"]:
            saved["state"]["transformation"] = {
                key: checkpoint.state_dict(state) for key, state in saved["state"]["transformation"].items()
            }
        return saved

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_transformation": self._transformation, "_plans": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict ends here, with nothing changed yet; unpickling begins here.
        if "_transformation" not in state:
            state = self._checked(state)
        super().__setstate__(state)

    def _checked(self, loaded: dict[str, Any]) -> dict[str, Any]:
        """Complete a loaded state with what it leaves out, and check that it is this optimizer's."""
        groups = [
            {**{name: value for name, value in old.items() if name not in new}, **new}
            for old, new in zip(self.param_groups, loaded["param_groups"], strict=True)
        ]
        candidate = type(self).__new__(type(self))
        candidate.__dict__.update({**self.__dict__, "param_groups": groups, "_plans": {}})
        state = loaded["state"]
        plans = [candidate._plan(index) for index in range(len(groups) if self._is_factory else 1)]
        for plan in plans:
            for i, p in enumerate(plan.params):
                _check_entry(plan, i, state.get(p, {}))
        if "transformation" in state:
            state["transformation"] = {
                f"{index}.{k}": checkpoint.load_state_dict(
                    plans[index].initial_tree_state(k), state["transformation"][f"{index}.{k}"]
                )
                for index, k in [map(int, key.split(".")) for key in state["transformation"]]
            }
        self._plans = {}
        return {**loaded, "param_groups": groups}

    def __repr__(self) -> str:
        name = getattr(self._transformation, "__name__", repr(self._transformation))
        return super().__repr__().replace(f"{type(self).__name__} (", f"{type(self).__name__} of {name} (", 1)


def _step_dtype() -> torch.dtype:
    """Return torch.optim's dtype of `step`: float32, unless the default is float64."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(factory).parameters
    for parameter in parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{getattr(factory, '__name__', factory)} takes {parameter}, which has no name to be a hyperparameter; "
                "write lambda lr: chain(clip(1.0), sgd(lr)), or give the transformation itself"
            )
    return dict(parameters)


def _defaults(transformation: Any, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that groups begin with."""
    if isinstance(transformation, GradientTransformation):
        if hyperparameters:
            raise TypeError(
                f"{transformation!r} has its hyperparameters already; {', '.join(hyperparameters)} would not be used. "
                "Give a factory: Optimizer(params, adamw, lr=1e-3)"
            )
        return {}
    if not callable(transformation):
        raise TypeError(
            f"Optimizer needs a transformation or a factory of one, got {transformation!r}; "
            "write Optimizer(params, adamw(1e-3)) or Optimizer(params, adamw, lr=1e-3)"
        )
    parameters = _parameters(transformation)
    unknown = [name for name in hyperparameters if name not in parameters]
    if unknown:
        raise TypeError(
            f"{transformation.__name__} has no hyperparameter {unknown[0]!r}; it has {', '.join(parameters)}"
        )
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **hyperparameters}


def _check_group_without_hyperparameters(group: dict[str, Any]) -> None:
    extra = [name for name in group if name not in ("params", "param_names", "name", "differentiable")]
    if extra:
        raise ValueError(
            f"A parameter group gives {', '.join(extra)}, but the transformation has its hyperparameters already. "
            "Give a factory, Optimizer(groups, adamw, lr=1e-3), or use partition"
        )


def _check_entry(plan: Plan, i: int, entry: Any) -> None:
    """Raise unless a loaded `state[p]` is one that this transformation makes."""
    p, part = plan.params[i], plan.parts[i]
    known = {key: plan.links[k] for k, keys in zip(part.links, part.keys, strict=True) for key in keys}
    foreign = [key for key in entry if key not in known and not (key == "step" and part.counted)]
    if foreign:
        raise ValueError(
            f"The saved state of parameter {plan.path(i)!r} has {foreign[0]!r}, which this transformation does not "
            f"keep; it keeps {', '.join(['step', *known])}. It was saved by an optimizer of another kind"
        )
    for key, link in known.items():
        if key in entry and link.rule.elementwise and entry[key].shape != p.shape:
            raise ValueError(
                f"The saved {key} of parameter {plan.path(i)!r} has shape {tuple(entry[key].shape)}, "
                f"but the parameter has {tuple(p.shape)}; it was saved for another model"
            )


def _declares(plan: Plan, extra: str) -> bool:
    return any(link.rule.extras is not None and extra in link.rule.extras for link in plan.links)


def _same(old: Any, new: Any) -> bool:
    """Compare hyperparameters: numbers and text by value, all else, tensors too, by identity."""
    if isinstance(old, list | tuple):
        return type(old) is type(new) and len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, bool | int | float | str):
        return type(old) is type(new) and old == new
    return old is new
