"""A torch.optim.Optimizer around any transformation."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from functorch_optim import checkpoint, execution, tree
from functorch_optim.base import GradientTransformation, check_extras
from functorch_optim.checks import check_params
from functorch_optim.optim import factories
from functorch_optim.optim.plan import Plan, step_dtype
from functorch_optim.rule import TreeRule

# The key in `state` of what belongs to no parameter: the states of functions of the whole tree.
TREE = "transformation"


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
        differentiable: whether `step` is recorded by autograd, and parameters may be non-leaf tensors. It adds to
            them in place: compute losses from `p.clone()`, as with torch.optim. The functional form needs no such care.
        **hyperparameters: arguments of the factory, the defaults of all groups. A schedule is called with the number of
            steps that a parameter has had; it belongs to the program, not to the state, and is not saved.

    Raises:
        TypeError: `transformation` is neither; a hyperparameter is unknown or missing; a parameter is no tensor, or
            one of integers.
        ValueError: there are no parameters, or one comes twice, or one is no leaf; a hyperparameter is out of range.

    Learning rate schedulers need the form with a factory: they look for `param_groups[i]["lr"]`.

    `state[p]` holds the rule's state for p under torch's names, `step` among them; a parameter whose gradient is None
    is skipped, and its step does not count. Differences from torch.optim: a parameter that comes twice in a group is an
    error, and an error while updates are computed leaves parameters and states as they were.

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

    state: dict[Any, Any]  # type: ignore[assignment]

    def __init__(
        self,
        params: Iterable[Any],
        transformation: GradientTransformation | factories.Factory,
        *,
        differentiable: bool = False,
        **hyperparameters: Any,
    ) -> None:
        self._transformation = transformation
        self._plans: dict[int, tuple[Any, Plan]] = {}
        self._complete = False
        defaults = factories.defaults(transformation, hyperparameters)
        super().__init__(params, {**defaults, "differentiable": differentiable})
        self._complete = True
        for index in range(self._number_of_trees):
            self._plan(index)

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
            factories.check_no_hyperparameters(param_group)
            if TREE in self.__dict__.get("state", ()):
                raise ValueError(
                    "Parameters cannot be added once a transformation of the whole tree has made its state. Add them "
                    "before the first step, or use a factory: Optimizer(params, factory, **hyperparameters)"
                )
        if isinstance(param_group, dict) and param_group.get("differentiable", False) > self.defaults["differentiable"]:
            raise ValueError("differentiable is for all groups: write Optimizer(..., differentiable=True)")
        super().add_param_group(param_group)
        try:
            names = param_group.get("param_names", range(len(param_group["params"])))
            check_params(param_group["params"], lambda i: str(names[i]))
            if self._complete:  # while groups are added one by one, masks and labels of all cannot fit yet
                self._plan(self._number_of_trees - 1)
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
            RuntimeError: a gradient is sparse, or a parameter cannot be modified in place.
            TypeError: an extra that nothing declares.
        """
        links = [link for index in range(self._number_of_trees) for link in self._plan(index).links]
        wants_value = any(link.rule.extras.any or "value" in link.rule.extras.names for link in links)
        loss = None
        if closure is not None:
            check_extras(links, {**({"value": None} if wants_value else {}), **extra})
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            plans = [self._plan(index) for index in range(self._number_of_trees)]
            if loss is not None and wants_value:
                extra.setdefault("value", loss)
            check_extras(links, extra)
            # Everything is computed before anything is changed.
            results = [self._compute(index, plan, extra) for index, plan in enumerate(plans)]
            for plan, (updates, states, tree_states) in zip(plans, results, strict=True):
                moved = [i for i, update in enumerate(updates) if update is not None]
                execution.add_([plan.params[i] for i in moved], [updates[i] for i in moved])
                for p, state in zip(plan.params, states, strict=True):
                    if state:
                        self.state[p].update(state)
                if tree_states:
                    self.state[TREE] = {**self.state.get(TREE, {}), **tree_states}
        return loss

    def _compute(
        self, index: int, plan: Plan, extra: dict[str, Any]
    ) -> tuple[list[Any], list[dict[str, Any]], dict[str, Any]]:
        """Compute the updates of a tree and its next states; change nothing."""
        saved = self.state.get(TREE, {})
        keys = _tree_keys(index, plan)
        known = {k: saved[key] for k, key in keys.items() if key in saved}
        updates, states, tree_states = plan.update([self.state.get(p, {}) for p in plan.params], known, extra)
        moved = [i for i, update in enumerate(updates) if update is not None]
        execution.check_writable([plan.params[i] for i in moved], lambda position: plan.path(moved[position]))
        kept = execution.unshared([*plan.params, *[p.grad for p in plan.params]])
        return (
            [kept(update) for update in updates],
            [{key: kept(value) for key, value in state.items()} for state in states],
            {keys[k]: tree.map(kept, state) for k, state in tree_states.items() if tree.flatten(state)[0]},
        )

    @property
    def _has_factory(self) -> bool:
        return not isinstance(self._transformation, GradientTransformation)

    @property
    def _number_of_trees(self) -> int:
        return len(self.param_groups) if self._has_factory else 1

    def _plan(self, index: int) -> Plan:
        """Make the plan of a tree, or find it when nothing has changed since the last step."""
        groups = [self.param_groups[index]] if self._has_factory else self.param_groups
        known = self._plans.get(index)
        if known is not None and factories.same(known[0], groups):
            return known[1]
        transformation: Any = self._transformation
        if self._has_factory:
            transformation = factories.make(transformation, groups[0])
        params = [p for group in groups for p in group["params"]]
        names = [name for group in groups for name in group.get("param_names", ())]
        plan = Plan(transformation, params, names or None)
        self._plans[index] = (factories.snapshot(groups), plan)
        return plan

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the hyperparameters in plain containers; `torch.load(weights_only=True)` takes them.

        Hyperparameters that are functions, schedules say, belong to the program and are left out.
        """
        with self.register_state_dict_post_hook(_make_plain, prepend=True):
            return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_transformation": self._transformation, "_plans": {}, "_complete": True}

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
        state: dict[Any, Any] = loaded["state"]
        saved = dict(state.get(TREE, {}))
        tree_states = {}
        for index in range(self._number_of_trees):
            plan = candidate._plan(index)
            # After an edit, such as momentum set to 0, states hold what only the former hyperparameters need.
            others = [self._plan(index)]
            if self._has_factory:
                transformation: Any = self._transformation
                others.append(Plan(factories.make(transformation, self.defaults), plan.params, plan.names))
            for i, p in enumerate(plan.params):
                if p in state:
                    if "step" in state[p]:
                        state[p]["step"] = torch.as_tensor(state[p]["step"], dtype=step_dtype())
                    plan.check_state(i, state[p], set().union(*[other.parts[i].known for other in others]))
            for k, key in _tree_keys(index, plan).items():
                initial = plan.initial_tree_state(k) if state else ()
                if tree.flatten(initial)[0]:
                    tree_states[key] = checkpoint.load_state_dict(initial, saved.pop(key, {}))
        if saved:
            raise ValueError(
                f"The saved state has one for the function of the whole tree {next(iter(saved))}, which is not here; "
                "an optimizer of another kind saved it"
            )
        if tree_states:
            state[TREE] = tree_states
        self._plans = {}
        return {**loaded, "param_groups": groups}

    def __repr__(self) -> str:
        name = type(self).__name__
        return super().__repr__().replace(f"{name} (", f"{name} of {factories.name_of(self._transformation)} (", 1)


def _tree_keys(index: int, plan: Plan) -> dict[int, str]:
    """Name the states of functions of the whole tree: by tree, and by number among them."""
    whole = [k for k, link in enumerate(plan.links) if isinstance(link.rule, TreeRule)]
    return {k: f"{index}.{number}" for number, k in enumerate(whole)}


def _make_plain(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        for name in [name for name, value in group.items() if factories.has_function(value)]:
            del group[name]
    if TREE in saved["state"]:
        saved["state"][TREE] = {key: checkpoint.state_dict(state) for key, state in saved["state"][TREE].items()}
