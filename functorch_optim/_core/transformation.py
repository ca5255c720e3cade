"""Gradient transformations: pure (init, update) pairs over trees of tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, ParamSpec

import torch

from functorch_optim import tree
from functorch_optim._core import functional, initial
from functorch_optim._core.links import Link, nest
from functorch_optim._core.recorded import Recorded
from functorch_optim._core.rule import ADD, EmptyState, TreeRule
from functorch_optim.tree import Tree

_P = ParamSpec("_P")
_OF_OPTIMIZERS = (*vars(torch.optim.Optimizer), "state", "param_groups", "defaults", "get", "items")  # of a dict, too


class GradientTransformation(Recorded):
    """Transform gradients into updates: a pure pair of functions, `init, update = tx`.

    Make one from two functions over whole trees, or with `fo.leafwise` from a rule for one tensor. Transformations are
    immutable, print as the call that made them, and pickle when their arguments do.

    Args:
        init: `init(params) -> state`. The state is any tree of tensors.
        update: `update(updates, state, params, *, name, ...) -> (updates, state)`. It must not modify its arguments.
            `params` is None when the caller gave none, and so is the update of a leaf without a gradient, whose state
            must stay: `fo.tree.map(lambda m, g: m if g is None else m + g, state, updates)`. Its keyword-only
            parameters are the extras it declares. With `**extra` it declares what the transformations in `wraps` do,
            to which it passes them on; where it wraps none, it takes any.
        wraps: the transformation, or the tuple of them, that `update` calls with its `**extra`. None: those that
            `update` closes over.

    Example:
        >>> import functorch_optim as fo, torch
        >>> def init(params):
        ...     return ()
        >>> def update(updates, state, params):
        ...     return fo.tree.map(torch.sign, updates), state
        >>> tx = fo.chain(fo.GradientTransformation(init, update), fo.scale_by_learning_rate(0.1))
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> updates, state = tx.update({"w": torch.tensor([5.0, -5.0])}, tx.init(params))
        >>> updates
        {'w': tensor([-0.1000,  0.1000])}
    """

    def __init__(
        self,
        init: Callable[[Tree], Any],
        update: Callable[..., tuple[Tree, Any]],
        *,
        wraps: GradientTransformation | tuple[GradientTransformation, ...] | None = None,
    ) -> None:
        for name, function in (("init", init), ("update", update)):
            if not callable(function):
                raise TypeError(
                    f"GradientTransformation needs two functions, but {name} is a {type(function).__name__}; "
                    "write GradientTransformation(init, update)"
                )
        inner = (wraps,) if isinstance(wraps, GradientTransformation) else wraps
        for one in inner or ():
            check_transformation(one, "GradientTransformation(init, update, wraps=sgd(0.1))")
        self._links: tuple[Link, ...] = (Link(TreeRule(init, update, inner)),)
        self._layout: Any = 0
        self._whole = [0]
        self._forms: dict[Any, Any] = {}  # prepared runs, by the form of the arguments
        self._call = (GradientTransformation, (init, update), {} if wraps is None else {"wraps": wraps})

    @classmethod
    def _of(cls, links: Sequence[Link], layout: Any) -> GradientTransformation:
        """Make a transformation of links whose states nest as the indices in `layout` do."""
        made = cls.__new__(cls)
        made._links = tuple(links)
        made._layout = layout
        made._whole = [k for k, link in enumerate(made._links) if isinstance(link.rule, TreeRule)]
        made._forms = {}
        made._call = (cls._of, (links, layout), {})
        return made

    def init(self, params: Tree) -> Any:
        """Make the state for these parameters.

        Args:
            params: tree of floating-point or complex tensors; None where a parameter is missing.

        Returns:
            The state: a NamedTuple of tensors and trees of them for each rule; a tuple of states for a chain; a dict of
            states for named parts.

        Raises:
            TypeError: a leaf is no tensor, or a tensor of integers.
            ValueError: a mask or the labels of a partition do not fit the parameters.
        """
        return nest(self._layout, initial.init(self._links, params))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
        """Transform updates, gradients at first; no argument is modified.

        Args:
            updates: tree of tensors built like the parameters; None where there is no gradient: that parameter and its
                state stay as they are. The step counts for the whole tree, so that the bias correction of a parameter
                whose gradients begin late is that of a late step; `fo.Optimizer` counts for each parameter.
            state: the result of `init` or of the last `update`.
            params: the parameters; may be left out when nothing in the chain needs them.
            **extra: keyword arguments that a transformation in the chain declares, such as `value`.

        Returns:
            Updates to add to the parameters (see `fo.apply_updates`), and the next state. They may share memory with
            each other and with the arguments: do not modify them in place.

        Raises:
            ValueError: trees, shapes or dtypes do not match; `params` is missing; the state is another's.
            TypeError: an extra that nothing declares, or one that is missing.
        """
        made = functional.call(self, updates, state, params, extra)
        leaves = [
            torch.zeros_like(g) if u is None and g is not None else u  # a step that is left out
            for u, g in zip(made.outcome.updates, made.leaves.updates, strict=True)
        ]
        return tree.unflatten(made.form.structure, leaves), made.new_state()

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """Unpack as a pair: init, update = tx."""
        return iter((self.init, self.update))

    def __getattr__(self, name: str) -> Any:
        """Raise: there is no such attribute. Who looks for an optimizer's is told where they are."""
        where = (
            ". A transformation has init and update; an object with step, param_groups and the rest of "
            "torch.optim's interface, is fo.Optimizer(params, transformation). torch.optim.Optimizer, which is "
            "fo.optim.Optimizer too, takes a dict of defaults"
        )
        hint = where if name in _OF_OPTIMIZERS else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}", name=name, obj=self)


def check_transformation(transformation: Any, example: str) -> None:
    """Raise unless this is a transformation; `example` is a call that would be right."""
    if not isinstance(transformation, GradientTransformation):
        how = "call it" if callable(transformation) and not isinstance(transformation, Recorded) else "as in"
        raise TypeError(
            f"{shown(transformation)} is not a GradientTransformation; {how}: {example}{advice(transformation)}"
        )


def shown(value: Any) -> str:
    """Name a function or class, or print a short object, for messages."""
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) < 80 and "\n" not in text else f"This {type(value).__name__}"


def advice(value: Any) -> str:
    """Say how to correct a wrong transformation, where its kind tells: a sentence, or nothing."""
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, torch.optim.Optimizer):
        return f". {kind.__name__} is a class of optimizers; transformations are made by functions such as adam"
    if isinstance(value, Recorded):
        return (
            ". A schedule is given as a learning rate, adamw(schedule), or updates are scaled by it, "
            "scale_by_learning_rate(schedule) or scale_by_schedule(schedule)"
        )
    if isinstance(value, list | tuple) and any(isinstance(item, GradientTransformation) for item in value):
        return ". Unpack a list: chain(*transformations)"
    return ""


def factory(function: Callable[_P, GradientTransformation]) -> Callable[_P, GradientTransformation]:
    """Let transformations that `function` makes print and pickle as the call that made them.

    Args:
        function: takes hyperparameters and returns a transformation.

    Example:
        >>> import functorch_optim as fo
        >>> @fo.factory
        ... def clipped_sgd(lr, max_norm=1.0):
        ...     return fo.chain(fo.clip_by_global_norm(max_norm), fo.sgd(lr))
        >>> clipped_sgd(0.1)
        clipped_sgd(0.1)
    """

    @functools.wraps(function)
    def make(*args: _P.args, **kwargs: _P.kwargs) -> GradientTransformation:
        try:
            made = function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            hint = "" if torch.compiler.is_compiling() else _mistake(function, args, kwargs)
            if not hint:
                raise
            inner = error.__cause__  # of a factory inside, which has added its own hint
            first = inner if inner is not None and str(error).startswith(str(inner)) else error
            raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{first}{hint}") from first
        named = GradientTransformation._of(made._links, made._layout)
        named._call = (make, args, kwargs)
        return named

    return make


def _mistake(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Name a likely mistake in the arguments of a factory, beyond an error of its own."""
    name = function.__name__
    if args and _are_params(args[0]):
        return (
            f". {name} takes hyperparameters, and its init the parameters: tx = {name}(...); state = tx.init(params). "
            f"As in torch.optim is Optimizer(model.parameters(), {name}, lr=1e-3)"
        )
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return f". Its arguments are {', '.join(inspect.signature(function).parameters)}"
    return ""


def _are_params(value: Any) -> bool:
    """Tell whether this could be the first argument of torch.optim's classes."""
    values = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(values, list | tuple):
        return any(isinstance(item, torch.nn.Parameter) for item in values)
    return isinstance(values, GeneratorType | torch.nn.Module)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Add updates to parameters and return new parameters.

    Args:
        params: tree of tensors.
        updates: tree built like it; None leaves a parameter as it is.

    Returns:
        Tree like `params`, of the same dtypes.

    Raises:
        ValueError: trees, shapes or dtypes do not match.
        TypeError: an update is no tensor.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.apply_updates({"w": torch.ones(2)}, {"w": torch.tensor([0.5, -1.0])})
        {'w': tensor([1.5000, 0.0000])}
    """
    made = functional.call(_ADDED, updates, EmptyState(), params, {})
    leaves = zip(made.leaves.params or [], made.outcome.updates, strict=True)
    return tree.unflatten(made.form.structure, [p if new is None else new for p, new in leaves])


_ADDED = GradientTransformation._of((Link(ADD),), 0)
