"""A rule: an optimizer's algorithm for one tensor, and the state it keeps for it."""

from collections import namedtuple
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor


class EmptyState(NamedTuple):
    """The state of a transformation that keeps none."""


class StepState(NamedTuple):
    """The state of a transformation that only counts.

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
    """

    step: Tensor


class Rule(NamedTuple):
    """What `fo.leafwise` was told; its docstring explains the fields."""

    init: Callable[[Tensor], Any] | None
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    scalars: Callable[..., Any] | None
    elementwise: bool
    needs_params: bool
    state_type: type | None  # the NamedTuple that holds the state of one tensor, where it was declared

    @property
    def extras(self) -> frozenset[str]:
        """Names of what `scalars` wants to be told besides the step."""
        return keyword_only(self.scalars) if self.scalars is not None else frozenset()

    def missing(self, extras: Collection[str]) -> frozenset[str]:
        """Name the extras that have no default and are not among these."""
        absent = self.extras - {"updates"} - set(extras)
        return absent.difference(self.scalars.__kwdefaults__ or ()) if absent else absent  # type: ignore[union-attr]

    @property
    def sees_tree(self) -> bool:
        """Tell whether the scalars depend on all updates of the tree, as a global norm does."""
        return "updates" in self.extras

    def init_leaf(self, p: Tensor) -> Any:
        """Make the state for one parameter."""
        return self.init(p) if self.init is not None else ()


def keyword_only(function: Callable[..., Any]) -> frozenset[str]:
    """Name the keyword-only parameters of a plain function."""
    code = function.__code__  # not inspect.signature: torch.compile cannot trace that
    first = code.co_argcount
    return frozenset(code.co_varnames[first : first + code.co_kwonlyargcount])


def leaf_state(state_type: type) -> type:
    """Declare a NamedTuple as the state that a rule keeps for one tensor.

    The state for a tree is then a NamedTuple of the same name, whose fields are trees like the parameters, with `step`
    before them when the rule has scalars. Undeclared NamedTuples work as well; the declaration is what allows a
    transformation to be made for the first time inside a function that `torch.compile` traces.

    Args:
        state_type: NamedTuple class, one field for each tensor of the state.

    Returns:
        The same class.

    Raises:
        TypeError: the class is no NamedTuple, or has a field named `step`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from typing import NamedTuple
        >>> @fo.leaf_state
        ... class MeanState(NamedTuple):
        ...     exp_avg: torch.Tensor
    """
    fields = getattr(state_type, "_fields", None)
    if fields is None:
        raise TypeError(
            f"The state of a rule must be a NamedTuple, got {state_type.__name__}. "
            "Write: class MyState(NamedTuple): momentum_buffer: Tensor"
        )
    if "step" in fields:
        raise TypeError(
            f"{state_type.__name__} has a field 'step', but the step is counted for all tensors at once: "
            "leave it out and use the argument of scalars(step)"
        )
    for lifted, names in (("counted", ("step", *fields)), ("uncounted", fields)):
        tree_type: Any = namedtuple(state_type.__name__, names)  # type: ignore[misc]  # noqa: PYI024
        tree_type.__module__ = state_type.__module__
        tree_type.__doc__ = state_type.__doc__
        tree_type.leaf_type = state_type
        tree_type.__reduce__ = _reduce
        setattr(state_type, lifted, tree_type)
    return state_type


def tree_state_type(state_type: Any, counted: bool) -> Any:
    """Return the NamedTuple that holds the states of a whole tree of tensors."""
    if state_type is tuple:
        return StepState if counted else EmptyState
    if getattr(state_type, "counted", None) is None:
        leaf_state(state_type)
    return state_type.counted if counted else state_type.uncounted


def _reduce(state: Any) -> tuple[Any, ...]:
    # The class was made here and cannot be imported, but the one it was made from can.
    return _rebuild, (type(state).leaf_type, "step" in state._fields, tuple(state))


def _rebuild(state_type: Any, counted: bool, fields: tuple[Any, ...]) -> Any:
    return tree_state_type(state_type, counted)(*fields)
