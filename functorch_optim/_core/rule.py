"""A rule: an optimizer's algorithm for one tensor, and the state it keeps for it."""

import inspect
from collections import namedtuple
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.leaf import Mark, marked
from functorch_optim.tree._structure import constant, exported, saved


@saved
class EmptyState(NamedTuple):
    """The state of a transformation that keeps none."""


@saved
class StepState(NamedTuple):
    """The state of a transformation that only counts.

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
    """

    step: Tensor


class Extras(NamedTuple):
    """The keyword-only parameters of a function.

    Attributes:
        names: their names.
        any: whether the function takes `**anything` besides.
        required: those that have no default.
    """

    names: frozenset[str]
    any: bool
    required: frozenset[str]

    def wanted(self, given: dict[str, Any]) -> dict[str, Any]:
        """Pick the arguments that the function takes."""
        return dict(given) if self.any else {name: given[name] for name in self.names if name in given}

    def missing(self, given: Collection[str]) -> frozenset[str]:
        """Name the parameters that have no default and were not given."""
        return self.required - frozenset(given) - OF_TREE  # the lift gives those


OF_TREE = frozenset({"updates", "params", "states"})
"""Keyword arguments of scalars that are no extras: all tensors that the rule is about to be run on."""

_NO_EXTRAS = Extras(frozenset(), False, frozenset())

DECLARED: set[str] = set()
"""The names of all fields that the state of some rule has."""


def extras_of(function: Any) -> Extras:
    """Read a function's extras off its signature."""
    code = getattr(function, "__code__", None)
    if code is not None and not (code.co_kwonlyargcount or code.co_flags & inspect.CO_VARKEYWORDS):
        return _NO_EXTRAS
    if code is not None:  # torch.compile cannot trace inspect.signature
        if code.co_flags & inspect.CO_VARKEYWORDS and hasattr(function, "__wrapped__"):
            return extras_of(function.__wrapped__)  # a decorator that passes everything on
        names = frozenset(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])
        # The defaults of a function that was made in a trace cannot be read there.
        optional = names if torch.compiler.is_compiling() else frozenset(function.__kwdefaults__ or ())
        return Extras(names, bool(code.co_flags & inspect.CO_VARKEYWORDS), names - optional)
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    required = frozenset([p.name for p in parameters if p.default is p.empty])
    return Extras(frozenset([p.name for p in parameters]), takes_any, required)


@dataclass(frozen=True)
class Rule:
    """The arguments of `fo.leafwise`; its docstring explains the fields."""

    init: Callable[[Tensor], Any] | None
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]]
    scalars: Callable[..., Any] | None = None
    carry: Callable[[], Any] | None = None
    elementwise: bool = False
    norms: bool = False  # whether it is elementwise but for norms of its tensor, which `safe_norm` and `rms` take
    needs_params: bool = False
    sparse: Literal["touched", "dense"] | None = None
    stacks: bool = False  # whether torch.vmap may run it on many tensors of one shape
    state_type: type | None = None  # the NamedTuple that holds the state of one tensor, where it was declared
    carried_type: Any = None  # the NamedTuple that `carry` makes
    hold: Callable[[Any, Any, Any, Any], Any] | None = None  # of a gate: the next state at a step that it leaves out
    hands: Callable[[Any, Any], Any] | None = None  # of a wrapper: (p, state) -> the parameter for the links inside
    evaluate: Callable[[Any, Any], Any] | None = None  # (p, state) -> the parameters to evaluate with
    narrow: bool = False  # whether optimizers keep the carried numbers in float32, as torch.optim does
    lr: Any = None  # the learning rate that its update is multiplied by
    turns: bool = False  # whether its update goes against the given one, as descent does
    decays: bool = False  # whether its update has weight decay in it, which is off where the number `decay` is 0
    keeps: Any = None  # of a keeper: the key under which links read its numbers; its `check` refuses some
    of_rate: Callable[[Any, bool], "Rule"] | None = None  # (lr of the chain, whether it comes before) -> the rule
    of_dtype: Mapping[torch.dtype, "Rule"] | None = field(default=None, hash=False)  # rules for parameters of a dtype
    wrapper: str = ""  # the name of the wrapper that it is a part of

    extras: "Extras" = field(init=False)  # the arguments of `scalars` besides the step
    sees_tree: bool = field(init=False)  # whether the scalars depend on all tensors of the tree, as a global norm does
    counts: bool = field(init=False)  # whether the state holds the step; a gate carries it on instead
    counters: tuple[str, ...] = field(init=False)  # fields that the state holds once for all tensors

    def __post_init__(self) -> None:
        extras = _NO_EXTRAS if self.scalars is None else extras_of(self.scalars)
        counts = self.scalars is not None and self.hold is None
        own = getattr(self.carried_type, "_fields", ())
        for name, value in (
            ("extras", extras),
            ("sees_tree", not extras.names.isdisjoint(OF_TREE)),
            ("counts", counts),
            ("counters", ("step", *own) if counts else own),
        ):
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """Return the name of the function that made the rule, for messages."""
        if self.wrapper:
            return self.wrapper
        if self.update is unchanged:
            return "identity" if self.scalars is None else _name(self.scalars)
        return _name(self.update)

    def of(self, dtype: Any) -> Any:
        """Return the rule for parameters of a dtype."""
        return self if self.of_dtype is None else self.of_dtype.get(dtype, self)

    def init_leaf(self, p: Tensor) -> Any:
        """Make the state for one parameter; an elementwise rule sees a complex one as pairs of reals."""
        if self.init is None:
            return ()
        pairs = self.elementwise and p.is_complex()
        state = self.init(torch.view_as_real(p.resolve_conj()) if pairs else p)
        if state is None or (state and not hasattr(state, "_fields")):
            raise TypeError(
                f"The init of the rule {self.name} returned {state!r}, and a state is a NamedTuple of tensors. "
                "Write: class MyState(NamedTuple): momentum_buffer: Tensor"
            )
        if not pairs:
            return state
        return type(state)(*map(_as_complex, state)) if state else state

    def carried(self) -> Any:
        """Make the numbers that scalars carry on, before the first update."""
        if self.carry is None:
            return ()
        with marked():
            numbers = self.carry()
        self.check_shared(numbers)
        return numbers

    def check_shared(self, numbers: Sequence[Any]) -> None:
        """Raise when a number that is kept once for all parameters differs between them.

        Raises:
            TypeError: it does.
        """
        for name, number in zip(self.carried_type._fields, numbers, strict=True):
            if isinstance(number, Mark):
                raise TypeError(
                    f"{self.name} keeps {name} once for all parameters, so the hyperparameters that it depends on "
                    "cannot be trees. Give each part of the parameters a transformation of its own, with partition"
                )


def unchanged(g: Any, state: Any, p: Any, s: Any) -> Any:
    """Return the gradient and the state: the update of a rule that changes nothing."""
    return g, state


ADD = Rule(None, lambda u, state, p, s: (p + u, state), elementwise=True, needs_params=True, sparse="touched")
"""The last rule of a step: it makes of an update the new parameter."""


@dataclass(frozen=True)
class TreeRule:
    """A transformation given as two functions of whole trees.

    Attributes:
        init: params -> state.
        update: (updates, state, params, **extras) -> (updates, state).
        wraps: the transformations that `update` passes its `**extras` on to; None for those that it closes over.
        wrapper: the name of the wrapper that it is a part of.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    wraps: tuple[Any, ...] | None = None
    wrapper: str = ""

    # Fields of a rule for one tensor that this one lacks.
    scalars: ClassVar[None] = None
    carry: ClassVar[None] = None
    hold: ClassVar[None] = None
    hands: ClassVar[None] = None
    evaluate: ClassVar[None] = None
    lr: ClassVar[None] = None
    turns: ClassVar[bool] = False
    decays: ClassVar[bool] = False
    keeps: ClassVar[None] = None
    of_rate: ClassVar[None] = None
    of_dtype: ClassVar[None] = None
    counters: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    norms: ClassVar[bool] = False
    needs_params: ClassVar[bool] = False
    sees_tree: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Return the name of the function that made the transformation, for messages."""
        return self.wrapper or _name(self.update)

    @property
    def extras(self) -> "Extras":
        """The keyword arguments of `update`, and of the transformations that it wraps."""
        own = extras_of(self.update)
        wraps = () if not own.any else _closed_over(self.update) if self.wraps is None else self.wraps
        if not wraps:
            return own
        inner = [link.rule.extras for tx in wraps for link in tx._links]
        names = frozenset([name for some in inner for name in some.names]) - OF_TREE
        required = frozenset([name for some in inner for name in some.missing(own.names)])
        return Extras(own.names | names, any([some.any for some in inner]), own.required | required)  # noqa: C419


@constant  # torch.compile cannot look into closures
def _closed_over(update: Any) -> tuple[Any, ...]:
    """List the transformations that a function closes over."""
    contents = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
    return tuple([value for value in contents if "_links" in getattr(value, "__dict__", ())])


def _name(update: Any) -> str:
    return str(getattr(update, "__qualname__", type(update).__name__)).split(".")[0].lstrip("_")


def check_extras(rules: Sequence[Any], extras: dict[str, Any], call: str) -> None:
    """Raise when an extra was given that no rule declares, or one is missing that a rule needs.

    Args:
        rules: of the chain.
        extras: by name.
        call: the user's call, up to the extras.
    """
    function = call.partition("(")[0].rpartition(".")[2]
    declared = [rule.extras for rule in rules]
    names = {name for some in declared for name in some.names} - OF_TREE
    for name in extras:
        if name not in names and not any(some.any for some in declared):
            known = ", ".join(sorted(names)) or "none"
            raise TypeError(
                f"{function} got the extra {name!r}, which nothing in the chain declares; declared are: {known}. "
                "A transformation declares an extra as a keyword-only parameter of its update or scalars"
            )
    for rule, some in zip(rules, declared, strict=True):
        for name in sorted(some.missing(extras)):
            raise TypeError(f"{rule.name} needs the extra {name!r}; call {call}{name}=...)")


def with_loss(
    rules: Sequence[Any],
    extras: dict[str, Any],
    value: Any,
    value_fn: Callable[..., Any] | None = None,
    grad_fn: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Add a loop's knowledge of the loss to the extras, where a rule declares it and the caller gave none.

    Args:
        rules: of the chain.
        extras: those of the caller.
        value: the loss; given to rules that take any extra, too. None: there is none.
        value_fn: params -> loss, if the loop can evaluate it.
        grad_fn: params -> gradients, likewise.
    """
    declared = [rule.extras for rule in rules]
    names = {name for some in declared for name in some.names}
    if any([some.any for some in declared]):  # noqa: C419
        names.add("value")
    known = {"value": value, "value_fn": value_fn, "grad_fn": grad_fn}
    return {**{name: given for name, given in known.items() if name in names and given is not None}, **extras}


def leaf_state(state_type: type, carried: type | None = None) -> type:
    """Declare a NamedTuple as the state that a rule keeps for one tensor.

    The state for a tree is then a NamedTuple of the same name, whose fields are trees like the parameters, with `step`
    before them when the rule has scalars. Undeclared NamedTuples work as well; only the declaration allows a
    transformation to be made for the first time inside a function that `torch.compile` traces, `torch.export.save` to
    write its states, and `torch.load` to read them as weights.

    Args:
        state_type: NamedTuple class, one field for each tensor of the state.
        carried: NamedTuple class of the numbers that the rule's scalars carry on, where there are any; see `leafwise`.

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
    make_type: Any = namedtuple
    counted = ("step", *getattr(carried, "_fields", ()))
    DECLARED.update(fields, counted)
    lifted = dict(getattr(state_type, "_lifted", {}))
    for counters in ((), ("step",), counted, counted[1:]):
        if counters in lifted:
            continue
        tree_type: Any = make_type(state_type.__name__, (*counters, *fields))
        tree_type.__module__ = state_type.__module__
        tree_type.__doc__ = state_type.__doc__
        tree_type._leaf_type = state_type
        tree_type._counters = counters
        tree_type.__reduce__ = _reduce
        lifted[counters] = exported(tree_type)
    torch.serialization.add_safe_globals([state_type, _rebuild])
    setattr(state_type, "_lifted", lifted)  # noqa: B010 - mypy knows no such attribute
    return state_type


def tree_state_type(state_type: Any, counters: tuple[str, ...]) -> Any:
    """Return the NamedTuple that holds the states of a whole tree of tensors.

    Args:
        state_type: the NamedTuple for one tensor; tuple where nothing is kept for each.
        counters: fields that are kept once for all tensors.
    """
    if state_type is tuple and counters in ((), ("step",)):
        return StepState if counters else EmptyState
    if state_type is tuple:
        state_type = EmptyState
    if counters not in getattr(state_type, "_lifted", {}):
        carried = [name for name in counters if name != "step"]
        leaf_state(state_type, namedtuple("Carried", carried) if counters else None)
    return state_type._lifted[counters]


def _reduce(state: Any) -> tuple[Any, ...]:
    # The class was made here and cannot be imported, but the one it was made from can.
    return _rebuild, (type(state)._leaf_type, type(state)._counters, tuple(state))


def _rebuild(state_type: Any, counters: tuple[str, ...], fields: tuple[Any, ...]) -> Any:
    return tree_state_type(state_type, counters)(*fields)


def step_dtype() -> torch.dtype:
    """Return torch.optim's dtype of `step`: float32, unless the default is float64."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _as_complex(pairs: Tensor) -> Tensor:
    """Make pairs of reals complex. In torch 2.13 only a copy of an empty tensor has a tangent that can be complex."""
    return torch.view_as_complex(pairs if pairs.numel() else pairs.clone(memory_format=torch.contiguous_format))
