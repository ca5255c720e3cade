"""Hyperparameters in the state: to read and set them between steps, to learn and to save them."""

from __future__ import annotations

import functools
import inspect
from collections import namedtuple
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args

from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import Hyperparameter, at, at_first, is_tree
from functorch_optim._core.injected import number_of
from functorch_optim._core.leafwise import identity, of_rule
from functorch_optim._core.links import shift
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, check_transformation
from functorch_optim.schedules import Schedule


@leaf_state
class HyperparamsState(NamedTuple):
    """The hyperparameters that `inject_hyperparams` keeps: `step`, then a field for each, a 0-dim float64 tensor.

    `fo.tree.get(state, "lr")` reads one, `fo.tree.set(state, "lr", 1e-4)` sets one. The entries of a tuple or tree have
    fields of their own: `betas_0`, `betas_1`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.inject_hyperparams(fo.sgd)(lr=0.5).init(torch.zeros(1))["hyperparams"]
        HyperparamsState(step=tensor(0), lr=tensor(0.5000, dtype=torch.float64))
    """


@leaf_state
class ScheduledHyperparamsState(NamedTuple):
    """The scheduled hyperparameters: `step`, then a field for each: its value in the last update, or else in the first.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.inject_hyperparams(fo.sgd)(lr=fo.schedules.linear(0.5, 0.0, 10))
        >>> tx.init(torch.zeros(1))["scheduled"]
        ScheduledHyperparamsState(step=tensor(0), lr=tensor(0.5000, dtype=torch.float64))
    """


_WHY = "its schedule computes it anew at every step. To set it, give inject_hyperparams a number instead"
setattr(ScheduledHyperparamsState, "_computed", _WHY)  # noqa: B010 - mypy knows no such attribute; `fo.tree.set` does


class _Injected(Schedule):
    """A hyperparameter that is read from a state: a schedule that looks at the state and not at the step."""

    __slots__ = ("_name",)

    def __init__(self, name: str, keeper: Any, index: int, initial: Any) -> None:
        super().__init__(lambda step: number_of(keeper, index, initial))
        self._name = name

    def at_number(self, step: Any) -> Any:
        """Read the number; see `Schedule.at_number`."""
        return self._function(step)

    def __repr__(self) -> str:
        return f"<injected {self._name}>"


_Keep = Callable[[str, Any], Any]
"""A function of the name of a hyperparameter and its value."""


class InjectingFactory:
    """A factory whose transformations keep their hyperparameters in the state; see `inject_hyperparams`."""

    def __init__(self, function: Callable[..., GradientTransformation], static: Collection[str]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.static = function, tuple(static)
        self.__name__ = f"inject_hyperparams({getattr(function, '__name__', None) or repr(function)})"

    def __repr__(self) -> str:
        return self.__name__

    def __reduce__(self) -> tuple[Any, ...]:
        return InjectingFactory, (self.function, self.static)

    def __call__(self, *args: Any, **kwargs: Any) -> GradientTransformation:
        """Make a transformation; see `inject_hyperparams`."""
        check_transformation(self.function(*args, **kwargs), f"{self!r}(lr=1e-3)")  # and all that the factory checks

        def check(numbers: Mapping[str, float]) -> None:
            bound = self._bound(args, kwargs, lambda name, number: numbers[name], lambda name, schedule: schedule)
            self.function(*bound.args, **bound.kwargs)

        kept, scheduled = _Keeper(HyperparamsState, check), _Keeper(ScheduledHyperparamsState, check)
        bound = self._bound(args, kwargs, kept.keep, scheduled.keep)
        self._check(kept, scheduled)
        try:
            made = self.function(*bound.args, **bound.kwargs)
        except TypeError as error:
            plain = [name for name in (*kept.numbers, *scheduled.numbers) if f"<injected {name}>" in str(error)]
            if not plain:
                raise
            raise TypeError(
                f"{error}. {self.function.__name__} takes no schedule there, so its state cannot hold it; write "
                f"inject_hyperparams({self.function.__name__}, static={tuple(plain)!r})"
            ) from error
        links = [*kept.transformation()._links, *scheduled.transformation()._links]
        keepers = [n for n, link in enumerate(links) if link.rule.keeps is not None]
        for k, link in enumerate(made._links, start=len(links)):
            links.append(link._replace(reads=(*[k - n for n in keepers], *link.reads)))
        layout = {"hyperparams": 0, "scheduled": 1, "inner": shift(made._layout, 2)}
        injected = GradientTransformation._of(links, layout)
        injected._call = (self, args, kwargs)
        return injected

    def _bound(self, args: Any, kwargs: Any, keep: _Keep, schedule: _Keep) -> inspect.BoundArguments:
        """Return the arguments, with others in the places of numbers and schedules: the results of functions."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        given = inspect.signature(self.function).bind(*args, **kwargs).arguments
        for name, parameter in inspect.signature(self.function).parameters.items():
            value = bound.arguments[name]
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = {
                    key: one if key in self.static else self._split(key, one, parameter, True, keep, schedule)
                    for key, one in value.items()
                }
            elif name not in self.static and parameter.kind is not parameter.VAR_POSITIONAL:
                bound.arguments[name] = self._split(name, value, parameter, name in given, keep, schedule)
        return bound

    def _split(
        self, name: str, value: Any, parameter: inspect.Parameter, is_given: bool, keep: _Keep, schedule: _Keep
    ) -> Any:
        """Return an argument with others in the places of its numbers and schedules."""
        declared = _is_hyperparameter(parameter.annotation)
        if not (is_given or declared):
            return value

        def injected(path: str, leaf: Any) -> Any:
            full = name + "".join([c if c.isalnum() else "_" for c in (f"_{path}" if path else "")])
            if isinstance(leaf, Schedule) or (declared and callable(leaf)):
                return schedule(full, leaf)
            if isinstance(leaf, Tensor):
                if leaf.ndim > 0 or leaf.is_complex():
                    raise ValueError(
                        f"{self!r} cannot keep {full}, a tensor of shape {tuple(leaf.shape)} and dtype {leaf.dtype}: "
                        f"it keeps real numbers. If it shall not be kept, write static=({name!r},)"
                    )
                return keep(full, leaf)
            is_whole = isinstance(leaf, Integral) and not (declared or parameter.annotation in (float, "float"))
            if isinstance(leaf, bool) or not isinstance(leaf, Real) or is_whole or not (is_given or leaf != 0):
                return leaf
            return keep(full, float(leaf))

        if not is_tree(value):
            return injected("", value)
        leaves, structure = tree.flatten(value)
        return tree.unflatten(structure, [injected(*pair) for pair in zip(tree.paths(value), leaves, strict=True)])

    def _check(self, kept: _Keeper, scheduled: _Keeper) -> None:
        """Raise unless there are hyperparameters, whose names differ."""
        if not kept.numbers and not scheduled.numbers:
            raise TypeError(f"{self!r} was given no number to keep in the state; write {self!r}(lr=1e-3), say")
        names = [*kept.names, *scheduled.names]
        for name in names:
            if names.count(name) > 1 or name == "step":
                raise ValueError(f"{self!r} cannot name a hyperparameter {name!r}, a name that the state has already")


class _Keeper:
    """The numbers of a link that keeps them, and the key under which other links read them.

    Args:
        state_type: of the link.
        check: raises when the factory refuses numbers, by name.
    """

    def __init__(self, state_type: type, check: Callable[[Mapping[str, float]], None]) -> None:
        self.state_type, self._checked = state_type, check
        self.numbers: dict[str, Any] = {}
        self.names: list[str] = []

    def keep(self, name: str, number: Any) -> _Injected:
        """Keep a number, and return its reader."""
        self.names.append(name)
        self.numbers[name] = number
        initial = at_first(number)
        return _Injected(name, self, len(self.numbers) - 1, initial)

    def check(self, numbers: Sequence[Tensor]) -> None:
        """Raise the error of the factory when it refuses these numbers."""
        self._checked({name: number.item() for name, number in zip(self.numbers, numbers, strict=True)})

    def __deepcopy__(self, memo: Any) -> _Keeper:
        return self  # the functions that read it are not copied either

    def transformation(self) -> GradientTransformation:
        """Make the link."""
        if not self.numbers:
            return identity()
        make_type: Any = namedtuple
        numbers, carried_type = list(self.numbers.values()), make_type("Carried", list(self.numbers))

        def carry() -> Any:
            return carried_type(*map(at_first, numbers))

        def scalars(step: Tensor, kept: Any) -> Any:
            if self.state_type is ScheduledHyperparamsState:
                return (), carried_type(*[at(number, step) for number in numbers])
            return (), kept

        def inject_hyperparams(g: Tensor, state: Any, p: Tensor | None, s: Any) -> Any:
            return g, state

        return of_rule(
            self.state_type,
            inject_hyperparams,
            scalars,
            carry=carry,
            elementwise=True,
            sparse="touched",
            keeps=self,
        )


def _is_hyperparameter(annotation: Any) -> bool:
    """Tell whether a parameter is declared as a hyperparameter, or as a tuple of them."""
    declared = annotation == Hyperparameter or Hyperparameter in get_args(annotation)
    return declared or (isinstance(annotation, str) and "Hyperparameter" in annotation)


def inject_hyperparams(
    factory: Callable[..., GradientTransformation], *, static: Collection[str] = ()
) -> Callable[..., GradientTransformation]:
    """Keep the hyperparameters of a factory in the state, where they are read, set, learned, vmapped and saved.

        tx = inject_hyperparams(adamw)(lr=1e-3)
        fo.tree.get(state, "lr")
        state = fo.tree.set(state, "lr", 1e-4)

    Kept are the numbers, 0-dim tensors and schedules that the factory is given; and those defaults, other than 0, of
    parameters that are annotated as `fo.Hyperparameter`, which all of this library are. An integer is kept where the
    annotation says that it is a hyperparameter or a float. A number 0 that is given is kept, and so switches nothing
    off. The numbers are float64, as all scalars are computed: 0.999 is no longer 0.999 in bfloat16, and the updates are
    those of the factory itself, to the last bit.

    Args:
        factory: function of hyperparameters that returns a transformation: of this library, or your own, which treats
            its hyperparameters as it would treat schedules: passes them on, computes with them by arithmetic, or
            evaluates them by `fo.at`.
        static: names of parameters that are not kept.

    Returns:
        Factory with the same parameters. The state of its transformations is a dict: "hyperparams", a
        `fo.HyperparamsState`; "scheduled", a `fo.ScheduledHyperparamsState`, or `EmptyState()` without any; "inner",
        the state of the transformation.

    Raises:
        TypeError: `factory` is no function; it has no parameter of a name in `static`; or, when the result is called,
            nothing was given to keep, or the factory takes no schedule where a number would be kept.
        ValueError: a number is out of range; a tensor is no real number; a name is the state's.

    The factory is called when the transformation is made, and not at every step. A scheduled hyperparameter is computed
    from its schedule; `fo.tree.set` of it is an error. `fo.Optimizer` keeps the hyperparameters of a factory in
    `param_groups`, so there `Optimizer(params, inject_hyperparams(adamw), lr=1e-3)` is the same as with `adamw`.
    Around a transformation, it keeps the numbers in `state[p]`; `opt.hyperparams` and `opt.set_hyperparams` read and
    set them. optax.inject_hyperparams casts to the dtype of the parameters, and overwrites an edit of a scheduled one.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.inject_hyperparams(fo.sgd)(lr=0.5), torch.zeros(1)
        >>> state = tx.init(params)
        >>> state = fo.tree.set(state, "lr", 0.25)
        >>> params, state = fo.step(tx, torch.ones(1), state, params)
        >>> params, fo.tree.get(state, "lr")
        (tensor([-0.2500]), tensor(0.2500, dtype=torch.float64))
    """
    if isinstance(factory, GradientTransformation) or not callable(factory):
        raise TypeError(
            f"inject_hyperparams takes a function that makes a transformation, got {factory!r}; write "
            "inject_hyperparams(adamw)(lr=1e-3)"
        )
    static = (static,) if isinstance(static, str) else static
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [name for name in static if name not in parameters and not takes_any]
    if unknown:
        raise TypeError(f"The factory has no parameter {unknown[0]!r} to be static; it has {', '.join(parameters)}")
    return InjectingFactory(factory, static)
