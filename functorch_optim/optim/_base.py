"""The base of all stateful optimizers: the step of a torch.optim.Optimizer that a transformation makes."""

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from functorch_optim import tree
from functorch_optim._core import checks, saving
from functorch_optim._core.places import REST
from functorch_optim._core.rule import check_extras, with_loss
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution.choose import way_of
from functorch_optim.optim import _factories as factories
from functorch_optim.optim import _helpers_of_torch as helpers
from functorch_optim.optim import _matching as matching
from functorch_optim.optim._closure import Closure, check_closure
from functorch_optim.optim._loading import checked_state, copied
from functorch_optim.optim._matching import Manner
from functorch_optim.optim._parts import warn_of_parts
from functorch_optim.optim._plan import Plan, tree_keys
from functorch_optim.optim._rate import Group, Rate, rate_of
from functorch_optim.optim._step import PreparedStep

_used: "weakref.WeakSet[type]" = weakref.WeakSet()
"""Classes of which there has been an optimizer."""
_profiler_enabled: Any = torch._C._autograd._profiler_enabled


def watched(step: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.optim's hooks and the profiler see a step, where there are any.

    torch.optim.Optimizer does so at every step, which takes as long as the step of a small network.
    """
    hooked = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        seen = own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled()
        # A derived class may have a step of its own, which torch wraps and which calls this one. torch.optim then calls
        # hooks twice if there has been an optimizer of the base class itself, and so does this.
        kinds: Any = type(self).__mro__
        base = next(kind for kind in kinds if kind.step is wrapper) if seen else None
        return (hooked if base in _used else step)(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it
    return wrapper


class OptimizerBase(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose step is a transformation's update. It has no constructor of its own."""

    state: dict[Any, Any]  # type: ignore[assignment]

    def _patch_step_function(self) -> None:
        _used.add(type(self))
        super()._patch_step_function()

    _transformation: Any  # transformation, or factory of one
    _count: type | None = Tensor  # how `state[p]` keeps the step, see Plan
    _rounds = False  # whether the numbers that scalars carry on are rounded to the default dtype, whatever their own
    _evaluates = False  # whether there are `eval` and `train`
    _evaluating = False  # whether the parameters are where they are to be evaluated
    _may_warn = True  # before the first step
    _live = False  # whether the factory may be given functions that read numbers from the group at every step

    @watched
    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: clears gradients, evaluates the model, calls backward, and returns the loss. The loss is also what
                a transformation that declares the extra `value` is given. One that declares `value_fn` or `grad_fn`,
                the loss or its gradient as a function of the parameters, has the closure evaluated there; not with
                `differentiable=True`, where a closure cannot tell how its gradients depend on the parameters.
            **extra: keyword arguments that a transformation declares.

        Returns:
            The result of the closure, or None.

        Raises:
            RuntimeError: a gradient is sparse where that is not supported, or a parameter cannot be modified in place.
            TypeError: an extra that nothing declares, or one that is missing; `closure` is no function, or does not
                return a loss where one is needed.
        """
        if closure is not None:
            check_closure(closure)
        return self._step(closure, **extra)

    def _step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        if self._evaluating:
            raise RuntimeError("The parameters are where they are to be evaluated: call opt.train() before opt.step()")
        loss = None
        if closure is not None:
            _untraced(self._check_extras, closure, "the loss, to come", extra)
            with torch.enable_grad():
                loss = closure()
        _untraced(self._update, closure, loss, extra)
        return loss

    def _check_extras(self, closure: Callable[[], Any] | None, loss: Any, extra: dict[str, Any]) -> None:
        """Raise unless the extras are those that the transformation declares.

        Raises:
            TypeError: an extra is given that nothing declares, or not given that something needs.
        """
        plans = [self._plan(index) for index in range(self._number_of_trees)]
        given: dict[str, Any] = {}
        for plan in plans:
            given.update(self._extras(plan, closure, loss, extra))
        rules = [link.rule for plan in plans for link in plan.links]
        if closure is not None and loss is None and any("value" in rule.extras.missing(given) for rule in rules):
            raise TypeError(
                "The closure returned None, and the transformation needs the loss: end the closure with `return loss`"
            )
        check_extras(rules, given, "opt.step(closure), or opt.step(" if closure is None else "opt.step(closure, ")

    def _extras(
        self, plan: Plan, closure: Callable[[], Any] | None, loss: Any, extra: dict[str, Any]
    ) -> dict[str, Any]:
        """Add the closure's loss to the extras, where a transformation declares it."""
        value_fn = grad_fn = None
        if closure is not None and not self.defaults.get("differentiable", False):
            again = Closure(closure, plan.params, [p for group in self.param_groups for p in group["params"]])
            value_fn, grad_fn = again.value, again.grads
        return with_loss([link.rule for link in plan.links], extra, loss, value_fn, grad_fn)

    def _update(self, closure: Callable[[], Any] | None, loss: Any, extra: dict[str, Any]) -> None:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            if torch.cuda._initialized and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "A CUDA graph would repeat the numbers of this very step. Capture the functional step, whose "
                    "counter is on the device: params, state = fo.step(tx, grads, state, params)"
                )
            try:
                plans = [self._plan(index) for index in range(self._number_of_trees)]
            except (TypeError, ValueError):
                self._check_gradients()  # which torch looks at first
                raise
            asks = extra or any(plan.asks for plan in plans)
            if asks:
                self._check_extras(closure, loss, extra)
            # Everything is computed, or at least ready, before anything is changed.
            steps = [self._prepared(index, plan) for index, plan in enumerate(plans)]
            given = [self._extras(plan, closure, loss, extra) if asks else extra for plan in plans]
            outcomes = [step.compute(extras) for step, extras in zip(steps, given, strict=True)]
            for index, (step, outcome) in enumerate(zip(steps, outcomes, strict=True)):
                tree_states = step.commit(outcome, self.state)
                if tree_states:
                    keys = tree_keys(index, step.plan)
                    new = {keys[k]: new for k, new in tree_states.items()}
                    self.state[REST] = {**self.state.get(REST, {}), **new}

    def _prepared(self, index: int, plan: Plan) -> PreparedStep:
        """Prepare the step of a tree, or find it where the last one was like it."""
        prepared = self.__dict__.setdefault("_steps", {})
        known = prepared.get(index)
        tree_states = self._tree_states(index, plan) if plan.whole else {}
        if known is not None and known.plan is plan and known.fits(self.state, tree_states):
            return known  # type: ignore[no-any-return]
        self._check_gradients()
        if self._may_warn:
            warn_of_parts(plan)
            self._may_warn = False
        prepared.pop(index, None)
        group = self.param_groups[index] if self._has_factory else self.defaults
        step = PreparedStep(plan, self.state, tree_states, way_of(group), self._rounds)
        if step.adds:
            prepared[index] = step
        return step

    def _check_gradients(self) -> None:
        """Raise when a gradient is of a kind that this optimizer does not take."""

    def _tree_states(self, index: int, plan: Plan) -> dict[int, Any]:
        """Return the states of functions of the whole tree, by link."""
        saved = self.state.get(REST, {})
        return {k: saved[key] for k, key in tree_keys(index, plan).items() if key in saved}

    def _exported_tree_states(self, plan: Plan, states: list[Any]) -> dict[str, Any]:
        """Arrange the states of functions of the whole tree, given those of all links, as `state` keeps them."""
        kept = {key: states[k] for k, key in tree_keys(0, plan).items() if tree.flatten(states[k])[0]}
        return {REST: kept} if kept else {}

    @property
    def _has_factory(self) -> bool:
        return not isinstance(self._transformation, GradientTransformation)

    @property
    def _number_of_trees(self) -> int:
        return len(self.param_groups) if self._has_factory else 1

    def _plan(self, index: int) -> Plan:
        """Make the plan of a tree, or find it when nothing has changed since the last step."""
        plans = self.__dict__.setdefault("_plans", {})
        groups = [self.param_groups[index]] if self._has_factory else self.param_groups
        for gone in [number for number in plans if number >= self._number_of_trees]:
            del plans[gone]
            self.__dict__.get("_steps", {}).pop(gone, None)
        if index not in plans or not plans[index][0].is_of(groups):
            plans[index] = (factories.Snapshot(groups, self._live), self._new_plan(self._transformation, groups))
        plan: Plan = plans[index][1]
        return plan

    def _new_plan(self, transformation: Any, groups: list[dict[str, Any]], hyperparameters: Any = None) -> Plan:
        count = self._count
        if self._has_factory:
            hyperparameters = groups[0] if hyperparameters is None else hyperparameters
            transformation = factories.make(transformation, hyperparameters, self._live)
            if factories.has_function(list(factories.hyperparameters(self._transformation, hyperparameters).values())):
                count = Tensor if count is None else count  # a schedule needs to know
        params = [p for group in groups for p in group["params"]]
        names = [name for group in groups for name in group.get("param_names", ())] or None
        if not self._has_factory:
            by_name = names if len(set(names or ())) == len(params) else None
            transformation = self._rate.driven(transformation, groups, by_name)
        return Plan(transformation, params, names, count)

    @property
    def _rate(self) -> Rate:
        """Return the learning rate of the transformation, where there is no factory."""
        known = self.__dict__.get("_known_rate")
        if known is None or known[0] is not self._transformation:
            known = self.__dict__["_known_rate"] = self._transformation, rate_of(self._transformation)
        rate: Rate = known[1]
        return rate

    def _with_rate(self, group: dict[str, Any]) -> dict[str, Any]:
        """Show the learning rate of the transformation in a param group, or why it is not there."""
        if self._has_factory:
            return group
        if self._rate.value is not None:
            group.setdefault("lr", self._rate.value)
            return group
        without = Group({name: value for name, value in group.items() if name != "lr"})
        without.error = self._rate.error
        return without

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the hyperparameters in plain containers; `torch.load(weights_only=True)` takes them.

        Hyperparameters that are functions, schedules say, transformations or generators belong to the program and are
        left out.
        """
        with self.register_state_dict_post_hook(_make_plain, prepend=True):
            return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        kept = {"_transformation": self._transformation} if "_transformation" in self.__dict__ else {}
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" in state:  # unpickling
            super().__setstate__(state)
            return
        # torch's load_state_dict ends here, with nothing changed yet. Try the loaded state on a copy.
        state = {"state": self.state, "param_groups": self.param_groups, **state}  # missing entries stay
        candidate = type(self).__new__(type(self))
        candidate.__dict__.update({**self.__dict__, "_plans": {}, "_steps": {}})
        # The classes of torch.optim complete older param groups. Their care for older states is ours.
        super(OptimizerBase, candidate).__setstate__({**state, "state": defaultdict(dict)})
        for old, new in zip(self.param_groups, candidate.param_groups, strict=True):
            for name, value in old.items():
                new.setdefault(name, value)
        candidate.param_groups = [candidate._with_rate(group) for group in candidate.param_groups]
        loaded, manner = matching.unwrapped(state["state"])
        candidate.state.update(loaded)
        candidate._check_loaded(self, manner)
        self.__dict__.update({**candidate.__dict__, "_plans": {}, "_steps": {}})

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], *, strict: bool = True, cast: bool = False
    ) -> saving.Loaded | None:
        """Load a result of `state_dict`, or that of torch.optim's class; see there.

        Where the saved groups and these have `param_names`, parameters are found by name, in whatever order. Names may
        differ by the parts that torch.compile, DDP and FSDP add, such as `_orig_mod.` and `module.`. The optimizer
        keeps its own names. Tensors are copied: a dict in memory can be loaded as often as you like. A
        state that was saved between `eval` and `train` of an `fo.Optimizer` is loaded in that mode.

        Args:
            state_dict: checked before anything is changed. Entries that belong to the program, in groups and in the
                states of parameters, are loaded too.
            strict: whether all that was saved must have a place, and the other way round. With False, states that fit
                are loaded, by parameter and name, each rule's whole or not at all; all others begin anew. So the
                optimizer may be another one, or its parameters more or fewer where they have names. Hyperparameters
                stay as they are.
            cast: round a state that was saved in float32 for parameters in half precision, as torch.optim does. Else it
                stays in float32.

        Returns:
            None; with `strict=False` the entries that were taken, begun anew, and left out.

        Raises:
            ValueError: groups, names, keys, shapes or values are not those of this optimizer.
        """
        checks.check_is_dict("state dict", state_dict)
        state_dict, evaluating = matching.without_mode(helpers.lifted(state_dict))
        if evaluating and not self._evaluates:
            raise ValueError(
                "The state was saved while parameters were evaluated, and this optimizer has only those that are "
                "trained. Load it into an fo.Optimizer, call its train(), and save it again"
            )
        reports: list[saving.Loaded] = []

        def arrange(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            if not strict:
                plans = [self._plan(index) for index in range(self._number_of_trees)]
                state_dict, report = matching.fitting(self.param_groups, plans, state_dict)
                reports.append(report)
            found = matching.as_saved(optimizer, state_dict, Manner(strict, cast), takes_names=self._live)
            groups = list(found["param_groups"])  # torch.optim checks their number
            for i, (own, saved) in enumerate(zip(optimizer.param_groups, groups, strict=False)):
                groups[i] = _without_functions(own, saved)
            return {**found, "param_groups": groups}

        with self.register_load_state_dict_pre_hook(arrange):
            super().load_state_dict(state_dict)
        self._evaluating = evaluating
        return reports[-1] if reports else None

    def _check_loaded(self, former: "OptimizerBase", manner: Manner) -> None:
        """Complete a loaded state with the entries that it leaves out, check that it is this optimizer's, and copy it.

        Args:
            former: the optimizer as it was.
            manner: how to load it.
        """
        stray = [key for key in self.state if isinstance(key, int)]
        if stray:
            raise ValueError(f"The saved state has one for parameter {stray[0]}, but no saved param group has that")
        saved = self.state.get(REST, {})
        for name, one in [(REST, saved), *(saved.items() if isinstance(saved, dict) else ())]:
            checks.check_is_dict(f"state of functions of the whole tree, {name!r},", one)
        saved, tree_states = dict(saved), {}
        for index in range(self._number_of_trees):
            plan = self._plan(index)
            # After an edit, such as momentum set to 0, states hold entries that only the former hyperparameters need.
            others = [former._plan(index)]
            if self._has_factory:
                others.append(self._new_plan(self._transformation, [self.param_groups[index]], self.defaults))
            for i, p in enumerate(plan.params):
                if p in self.state:
                    known = [other.parts[i].known for other in others]
                    required = set.intersection(*known) if manner.strict else set()
                    checked = checked_state(
                        plan, i, self.state[p], set().union(*known), required, as_torch=self._live, cast=manner.cast
                    )
                    self.state[p] = copied(checked)
            for k, key in tree_keys(index, plan).items():
                initial = plan.initial_tree_state(k) if self.state else ()
                if tree.flatten(initial)[0]:
                    tree_states[key] = saving.load_state_dict(initial, saved.pop(key, {}))
        if saved:
            raise ValueError(
                f"The saved state has one for the function of the whole tree {next(iter(saved))}, which is not here; "
                "an optimizer of another kind saved it"
            )
        if tree_states:
            self.state[REST] = tree_states


def _untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as it is, also where torch.compile traces: plans and buckets are found from numbers there."""
    return _disabled(function, *args) if torch.compiler.is_compiling() else function(*args)


@_disable_dynamo
def _disabled(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _without_functions(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Leave out the entries of a saved group that stand for functions and the like: those stay the program's."""
    return {k: v for k, v in saved.items() if v is not None or not factories.is_of_program(own.get(k))}


def _make_plain(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for_helper = helpers.saves()
    for group in saved["param_groups"]:
        for name, value in list(group.items()):
            if not factories.is_of_program(value):
                group[name] = factories.plain(value)
            elif for_helper:
                group[name] = None  # torch's helper looks for every name
            else:
                del group[name]
    if REST in saved["state"]:
        saved["state"][REST] = {key: saving.state_dict(state) for key, state in saved["state"][REST].items()}
    if for_helper:
        helpers.lowered(optimizer, saved)
