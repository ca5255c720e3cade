"""A torch.optim.Optimizer around any transformation."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core import saving
from functorch_optim._core.checks import check_params
from functorch_optim._core.links import nest
from functorch_optim._core.places import REST
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution import writing
from functorch_optim._execution.choose import check_options
from functorch_optim.optim import _factories as factories
from functorch_optim.optim import _helpers_of_torch as helpers
from functorch_optim.optim._evaluation import EvaluatingOptimizer
from functorch_optim.optim._migration import migrate
from functorch_optim.optim._plan import Plan, scalar, tree_keys
from functorch_optim.wrappers.injection import InjectingFactory
from functorch_optim.wrappers.monitoring import metrics


class Optimizer(EvaluatingOptimizer):
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
        differentiable: whether `step` is recorded by autograd, for derivatives through training. Parameters are then
            no leaves but, say, `p.clone()`, hyperparameters may be tensors, and `p.grad` has a graph. As in torch.optim
            parameters are written to in place: compute losses from `p.clone()`, or do all, the last `backward` too,
            within `torch.autograd.graph.allow_mutation_on_saved_tensors()`. The functional form needs no such care.
        foreach: True to use foreach kernels, as is done where parameters are not on the CPU; False not to.
        fused: True to compile a chain of elementwise transformations to one kernel, once, at the first step. Groups may
            override both.
        **hyperparameters: arguments of the factory, the defaults of all groups. A schedule is called with the number of
            steps that a parameter has had; it belongs to the program, not to the state, and is not saved.

    Raises:
        TypeError: `transformation` is neither; a hyperparameter is unknown or missing; a parameter is no tensor, or
            one of integers.
        ValueError: there are no parameters, or one comes twice, or one is no leaf; a hyperparameter is out of range.

    Learning rate schedulers look for `param_groups[i]["lr"]`. A transformation with one learning rate, a number, shows
    it there, and edits drive it. Where it is a schedule, or there are several or none, the groups have no `lr`, and an
    edit is an error at the next step. Other entries that a program adds to groups and to `state[p]` are kept, saved and
    loaded. `type(opt)(params, **opt.defaults)` makes another optimizer like it.

    The helpers of `torch.distributed.checkpoint.state_dict` make the state of a fresh optimizer by a step; here that
    makes the state with which parameters begin, and nothing else. They know no states of functions of the whole tree.

    `state[p]` holds the rule's state for p under torch's names, `step` among them; a parameter whose gradient is None
    is skipped, and its step does not count. Numbers of the whole tree, such as Prodigy's d, are one for all parameters,
    with a step of their own, as in the functional form. Differences from torch.optim: a parameter that comes twice in a
    group is an error, and an error while updates are computed leaves parameters and states as they were.

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

    _complete = True  # whether all groups are there

    def __init__(
        self,
        params: Iterable[Any],
        transformation: GradientTransformation | factories.Factory,
        *,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        **hyperparameters: Any,
    ) -> None:
        factories.check_params_argument(params)
        if isinstance(transformation, InjectingFactory):
            transformation = transformation.function  # param_groups hold its hyperparameters
        self._transformation = transformation
        self._complete = False
        defaults = factories.defaults(transformation, hyperparameters)
        options = {"differentiable": differentiable, "foreach": foreach, "fused": fused}
        check_options(options)
        super().__init__(params, {**defaults, **options})
        self.defaults["transformation"] = transformation  # so that type(opt)(params, **opt.defaults) makes another
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
        if isinstance(param_group, dict):
            factories.check_is_group(param_group)
            param_group.pop("transformation", None)  # of programs that put all arguments into groups
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), Tensor | set | None):
            param_group["params"] = list(param_group["params"])
            tensors = [param[1] if isinstance(param, tuple) else param for param in param_group["params"]]
            if len({id(tensor) for tensor in tensors}) != len(tensors):
                raise ValueError("Some parameters come more than once in a group; give each of them once")
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), set | None):
            parts = factories.parted(self._transformation, param_group, self.defaults)
            if parts[0] is not param_group:
                self._add_parts(parts)
                return
        if isinstance(self._transformation, GradientTransformation):
            factories.check_no_hyperparameters(param_group)
            if REST in self.__dict__.get("state", ()):
                raise ValueError(
                    "Parameters cannot be added once a transformation of the whole tree has made its state. Add them "
                    "before the first step, or use a factory: Optimizer(params, factory, **hyperparameters)"
                )
        elif isinstance(param_group, dict):
            factories.check_spelling(self._transformation, param_group)
        if isinstance(param_group, dict) and param_group.get("differentiable", False) > self.defaults["differentiable"]:
            raise ValueError("differentiable is for all groups: write Optimizer(..., differentiable=True)")
        if isinstance(param_group, dict):
            check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        param_group.pop("transformation", None)
        self.param_groups[-1] = self._with_rate(param_group)
        try:
            names = param_group.get("param_names", range(len(param_group["params"])))
            check_params(param_group["params"], lambda i: str(names[i]))
            if self._complete:  # while groups are added one by one, masks and labels of all cannot fit yet
                self._plan(self._number_of_trees - 1)
        except Exception:
            self.param_groups.pop()
            self.__dict__.pop("_plans", None)
            self.__dict__.pop("_steps", None)
            raise

    def _add_parts(self, parts: list[dict[str, Any]]) -> None:
        """Add several groups, or none of them."""
        before = len(self.param_groups)
        try:
            for part in parts:
                self.add_param_group(part)
        except Exception:
            del self.param_groups[before:]
            raise

    def migrate(self, transformation: GradientTransformation) -> saving.Loaded:
        """Go on with another transformation in mid-training: another chain, mask or partition.

        States that fit are kept, by parameter and name, each rule's whole or not at all; all others begin anew. A
        parameter has one step for all of its rules: it is kept if the state of any of them is.

        Args:
            transformation: the transformation to go on with.

        Returns:
            The entries that were kept (`taken`), begun anew (`begun`), and dropped (`left`).

        Raises:
            TypeError: it is no transformation; or the optimizer has a factory, whose groups are edited instead.
            ValueError: its masks or labels do not fit the parameters. Nothing has changed then.
            RuntimeError: the parameters are where they are to be evaluated.

        Example:
            >>> import functorch_optim as fo, torch
            >>> def training(frozen):
            ...     labels = {"weight": "keep" if frozen else "train", "bias": "train"}
            ...     return fo.partition({"train": fo.adam(0.1), "keep": fo.set_to_zero()}, labels)
            >>> model = torch.nn.Linear(2, 1)
            >>> opt = fo.Optimizer(model.named_parameters(), training(frozen=True))
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> opt.step()
            >>> opt.migrate(training(frozen=False)).taken
            ('bias.exp_avg', 'bias.exp_avg_sq', 'bias.step')
        """
        return migrate(self, transformation)

    def _step(self, closure: Any = None, **extra: Any) -> Any:
        if not self.state and not torch.compiler.is_compiling() and helpers.asks_for_a_state():
            for index in range(self._number_of_trees):
                self._begin(index, self._plan(index))
            return None
        return super()._step(closure, **extra)

    def _begin(self, index: int, plan: Plan) -> None:
        """Make the state with which parameters begin."""
        kept = writing.unshared(plan.params)
        for i, p in enumerate(plan.params):
            if p.grad is not None:
                _, completed = plan.completed(i, {})
                self.state[p] = {
                    key: kept(value) if isinstance(value, Tensor) else value for key, value in completed.items()
                }
        states = {key: plan.initial_tree_state(k) for k, key in tree_keys(index, plan).items()}
        states = {key: state for key, state in states.items() if tree.flatten(state)[0]}
        if states:
            self.state[REST] = {**self.state.get(REST, {}), **states}

    @property
    def metrics(self) -> dict[str, Tensor]:
        """The metrics of `monitor`: name -> 0-dim tensor, as `fo.metrics` returns it; zeros before the first step.

        With a factory and several groups, each name begins with the index of the group: "1.grad_norm".

        Raises:
            ValueError: there is no monitor in the transformation.
        """
        found: dict[str, Tensor] = {}
        for index in range(self._number_of_trees):
            plan = self._plan(index)
            states = self._tree_states(index, plan)
            every = [
                states.get(k, plan.initial_tree_state(k)) if k in plan.whole else () for k in range(len(plan.links))
            ]
            prefix = f"{index}." if self._number_of_trees > 1 else ""
            found.update({prefix + name: value for name, value in metrics(nest(plan.layout, every)).items()})
        return found

    @property
    def hyperparams(self) -> dict[str, Tensor]:
        """The hyperparameters that `inject_hyperparams` keeps in `state[p]`: name -> 0-dim tensor; empty without it.

        A name that several parts of a transformation have is preceded by their paths: "body.lr".
        """
        return {name: self._kept(k)[j] for name, (k, j) in self._injected().items()}

    def set_hyperparams(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Set hyperparameters that `inject_hyperparams` keeps, from the next step on, for all parameters.

        A parameter that is in no group at present has the new values when it returns. Hyperparameters whose names are
        preceded by paths are an exception.

        Args:
            values: numbers or 0-dim tensors by name, as in `hyperparams`.
            **named: further ones by keyword: `opt.set_hyperparams(lr=1e-4)`.

        Raises:
            KeyError: no hyperparameter of the name is kept.
            ValueError: a value is no number, or one that the factory refuses; or a hyperparameter is scheduled. Nothing
                is set then.
        """
        values, places = {**(values or {}), **named}, self._injected()
        plan, new = self._plan(0), dict[int, list[Tensor]]()
        for name, value in values.items():
            if name not in places:
                raise KeyError(
                    f"Nothing keeps the hyperparameter {name!r}; kept are {', '.join(places) or 'none'}. Write "
                    "Optimizer(params, inject_hyperparams(adamw)(lr=1e-3)); with a factory they are in param_groups"
                )
            k, j = places[name]
            rule: Any = plan.links[k].rule
            computed = getattr(rule.state_type, "_computed", "")
            if computed:
                raise ValueError(f"{name!r} cannot be set: {computed}")
            numbers = new.setdefault(k, self._kept(k))
            numbers[j] = tree.set({name: numbers[j]}, name, value)[name]
        for k, numbers in new.items():
            kept: Any = plan.links[k].rule.keeps
            kept.check(numbers)
        here = {*plan.params, REST}
        elsewhere = [own for p, own in self.state.items() if p not in here]
        for k, numbers in new.items():  # all of a link, so that no parameter lacks the others
            for i, keys in plan.sharing.get(k, ()):
                self.state[plan.params[i]].update(zip(keys, map(Tensor.clone, numbers), strict=False))
            # A parameter that returns to the groups may have more updates than all others, and then its numbers count.
            # Which link they are of is known where no other has the same names.
            names = plan.links[k].rule.counters[1:]
            if all(name in places for name in names):
                for own in elsewhere:
                    if own.keys() >= {*names}:
                        own.update(zip(names, map(Tensor.clone, numbers), strict=True))

    def _injected(self) -> dict[str, tuple[int, int]]:
        """Find the injected hyperparameters by name: the link that keeps each, and its number there."""
        if self._has_factory:
            return {}
        links = self._plan(0).links
        nested = nest(self._transformation._layout, range(len(links)))
        paths = dict(zip(tree.flatten(nested)[0], tree.paths(nested), strict=True))
        found = [
            (name, paths[k].rpartition(".")[0], (k, j))
            for k, link in enumerate(links)
            if link.rule.keeps is not None
            for j, name in enumerate(link.rule.counters[1:])
        ]
        names = [name for name, *_ in found]
        return {(name if names.count(name) == 1 else f"{path}.{name}"): place for name, path, place in found}

    def _kept(self, k: int) -> list[Tensor]:
        """Return the hyperparameters that a link keeps."""
        plan = self._plan(0)
        for i, part in enumerate(plan.parts):
            if k in part.links:
                own = self.state.get(plan.params[i], {})
                _, completed = plan.completed(i, own, plan.shared_numbers(self.state))
                return [completed[key] for key in part.carried[part.links.index(k)]]
        rule: Any = plan.links[k].rule
        return [scalar(number, torch.float64) for number in rule.carried()]

    def __repr__(self) -> str:
        name = type(self).__name__
        return super().__repr__().replace(f"{name} (", f"{name} of {factories.name_of(self._transformation)} (", 1)
