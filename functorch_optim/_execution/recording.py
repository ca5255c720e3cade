"""The recording of programs: rules are run on names in place of tensors, and their calls are written down."""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.rule import ADD, Rule
from functorch_optim._core.stand_in import StandIn
from functorch_optim._execution.program import NORMS, Instruction, Name, Program, name_of, needed
from functorch_optim._execution.reference import Stage, applied


def record(stages: Sequence[Stage], states: Sequence[Any], with_params: bool, scalars: Any, like: Tensor) -> Program:
    """Run rules on names instead of tensors, and write down their calls.

    Args:
        stages: elementwise rules.
        states: for each, any instance of the NamedTuple that holds its state.
        with_params: whether parameters are given.
        scalars: the numbers of a step, for each rule. A condition that is a bool is known: `torch.where` takes a side.
        like: a tensor of the dtype and device that all have.

    Raises:
        TypeError, AttributeError: a rule breaks the conditions of `leafwise`.
    """
    leaves, structure = tree.flatten(list(scalars))
    kinds = tuple([_kind(scalar) for scalar in leaves])
    handing = [stage.source[1] for stage in stages if stage.source]
    algorithms = [_identity(function) for function in [*[stage.rule.update for stage in stages], *handing]]
    sources = tuple([(stage.source and stage.source[0], stage.recalls) for stage in stages])
    key = (tuple(algorithms), sources, tuple(map(len, states)), with_params, structure, kinds, like.dtype, like.device)
    known = None if None in algorithms else _recorded.get(key)
    if known is not None:
        return known
    recording = _Recording(like)
    given: list[Any] = [recording.input("g")]
    p = recording.input("p") if with_params else None
    symbols = []
    for k, (stage, state) in enumerate(zip(stages, states, strict=True)):
        held = _held(stage.rule, like) if state else ()
        fields = [recording.input(f"x{k}_{j}", j in held) for j in range(len(state))]
        symbols.append(type(state)(*fields) if state else ())
    numbers = tree.map(recording.number, list(scalars))
    outputs: list[Any] = []
    for stage, s in zip(stages, numbers, strict=True):
        recording.takes_norms = stage.rule.norms
        new, new_state = applied(stage, given, symbols, p, s)
        given.append(new)
        outputs += new_state
    program = recording.finished(stages[-1].rule, [given[-1], *outputs])
    if None not in algorithms:
        while len(_recorded) >= _LARGEST:
            _recorded.pop(next(iter(_recorded)), None)
        _recorded[key] = program
    return program


def record_terms(terms: Callable[..., Any], count: int, numbers: Sequence[Any], like: Tensor) -> Program:
    """Run an elementwise function of tensors and numbers on names, and write down its calls.

    Args:
        terms: the function; it returns a tensor, or several.
        count: of the tensors.
        numbers: behind the tensors.
        like: a tensor of the dtype and device that all have.
    """
    recording = _Recording(like)
    tensors = [recording.input(f"x{j}") for j in range(count)]
    results = terms(*tensors, *map(recording.number, numbers))
    names = tuple([result.name for result in (results if isinstance(results, tuple) else (results,))])
    kept = needed(recording.instructions, names)
    of_numbers = tuple(recording.numbers)
    return Program(tuple(recording.inputs), of_numbers, kept, names, like.dtype, like.device, updates=False)


def _held(rule: Rule, like: Tensor) -> list[int]:
    """List the fields of a rule's state that are one number for each tensor."""
    if not rule.norms:
        return []
    return [j for j, field in enumerate(rule.init_leaf(like.new_zeros(_LENGTH))) if field.ndim == 0]


_LARGEST = 256
_recorded: dict[Any, Program] = {}
"""Programs of rules that are made anew again and again: functions with the same code, that close over the same things,
compute the same."""


def _identity(value: Any, depth: int = 3) -> Any:
    """Return a key that functions share which have the same code and close over the same things; None if unsure."""
    if isinstance(value, bool | int | float | str | NoneType | torch.dtype):
        return type(value), value
    if not isinstance(value, FunctionType) or depth == 0:
        return None
    try:
        cells = [_identity(cell.cell_contents, depth - 1) for cell in value.__closure__ or ()]
    except ValueError:  # a cell that is still empty
        return None
    defaults = [_identity(default, depth - 1) for default in (*(value.__defaults__ or ()), *_keywords(value))]
    if None in cells or None in defaults:
        return None
    return _Same(value.__code__), _Same(value.__globals__), tuple(cells), tuple(defaults)


class _Same:
    """Equal to another of the very same object; equal code of other modules may mean something else."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.it is self.it

    def __hash__(self) -> int:
        return id(self.it)


def _keywords(function: FunctionType) -> list[Any]:
    return list((function.__kwdefaults__ or {}).values())


def _kind(scalar: Any) -> Any:
    if isinstance(scalar, Tensor):
        return type(scalar), scalar.dtype, scalar.device
    return scalar if isinstance(scalar, bool) else type(scalar)


class _Symbol(StandIn):
    """A name that answers like a tensor, by writing down the calls on it.

    Args:
        recording: where they are written.
        name: the name.
        sample: a value of its kind.
        known: its value, of a condition that is known.
    """

    def __init__(self, recording: "_Recording", name: Name, sample: Any, known: bool | None = None) -> None:
        self.recording, self.name, self.sample, self.known = recording, name, sample, known

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Write down a call."""
        symbols = [value for value in _values(args, kwargs or {}) if isinstance(value, _Symbol)]
        return symbols[0].recording.call(function, tuple(args), kwargs or {})

    def __getattr__(self, name: str) -> Any:
        """Answer a method or property of Tensor."""
        if name in ("device", "dtype"):
            return getattr(self.sample, name)
        if name not in _OF_SHAPES:
            try:
                return super().__getattr__(name)
            except AttributeError:
                pass
        raise AttributeError(
            f"An elementwise rule must not look at .{name}; {self.recording.remedy('declare it with')}"
        )

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(f"An elementwise rule must not pick elements; {self.recording.remedy('declare it with')}")

    def __bool__(self) -> bool:
        raise TypeError("A rule must not branch on values: use torch.where(condition, a, b)")

    def __float__(self) -> float:
        raise TypeError("A rule must not look at values: a number that it needs is computed in scalars(step)")


_LENGTH = 5
"""Of samples: more than one element, so that a sum over all does not look like them."""
_OF_VALUES = {"lt", "le", "gt", "ge", "eq", "ne", "equal", "allclose", "is_nonzero"}
_OF_SHAPES = {"shape", "ndim", "dim", "size", "numel", "nelement", "stride", "item", "tolist", "ndimension"}


class _Recording:
    """A program in the making. Each call is tried on samples of a few elements, which tell dtypes and shapes."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.inputs: list[Name] = []
        self.numbers: list[Name] = []
        self.instructions: list[Instruction] = []
        self.sums: dict[Any, _Symbol] = {}
        self.takes_norms = False

    def remedy(self, declare: str = "declare") -> str:
        """Say what to do about a rule that is not elementwise."""
        return "leave norms=True out" if self.takes_norms else f"{declare} elementwise=False"

    def input(self, name: str, is_number: bool = False) -> _Symbol:
        self.inputs.append(Name(f"n_{name}" if is_number else name))
        return _Symbol(self, self.inputs[-1], self.like.new_ones(() if is_number else _LENGTH))

    def number(self, value: Any) -> _Symbol:
        self.numbers.append(Name(f"n{len(self.numbers)}{_mark(value)}"))
        if isinstance(value, bool):
            return _Symbol(self, self.numbers[-1], torch.tensor(value, device=self.like.device), known=value)
        return _Symbol(self, self.numbers[-1], value)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = name_of(function)
        if (name.endswith("_") and not name.endswith("__")) and name.strip("_") not in ("and", "or"):
            raise TypeError(f"A rule must not modify its arguments: use {name.strip('_')}() in place of {name}()")
        if "out" in kwargs:
            raise TypeError(f"A rule must not modify its arguments: call {name} without out")
        values = list(_values(args, kwargs))
        if any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise TypeError("A tensor that requires grad is a number of the rule: compute it in scalars(step)")
        several = f"An elementwise rule cannot use {name}, of several tensors in one; {self.remedy()}"
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, tuple | list)]
        if any(isinstance(item, _Symbol) for value in lists for item in value):
            raise TypeError(several)
        sample = function(*map(_sample, args), **{key: _sample(value) for key, value in kwargs.items()})
        if isinstance(sample, bool) and name in _OF_VALUES:
            raise TypeError(f"A rule must not look at values, as {name} does: compute such numbers in scalars(step)")
        if isinstance(sample, tuple | list):
            raise TypeError(several)
        if not isinstance(sample, Tensor | int | float) or isinstance(sample, bool):
            return sample  # its dtype and device are those of all
        elements = sample if isinstance(sample, Tensor) and sample.ndim > 0 else None
        dtype = None if elements is None else elements.dtype
        if function in NORMS and self.takes_norms:
            pass
        elif elements.shape != (_LENGTH,) if elements is not None else any(map(_differs, values)):
            raise TypeError(f"An elementwise rule must keep shapes, which {name} does not; {self.remedy()}")
        place = None if elements is None else elements.data_ptr()
        seen = [v for v in values if _differs(v) and v.sample.data_ptr() == place]
        if seen and seen[0].sample.dtype == dtype:
            return seen[0]  # such as detach: in a kernel, views would change when the value is overwritten
        if seen:
            function = _copying(function)
        if name == "where" and len(args) == 3 and isinstance(args[0], _Symbol) and args[0].known is not None:
            side = args[1] if args[0].known else args[2]
            if _differs(side) and side.sample.dtype == dtype:
                return side
        result = Name(f"{'v' if dtype else 'n_'}{len(self.instructions)}{'' if dtype else _mark(sample)}")
        written = tuple([_written(value) for value in args])
        written_kwargs = tuple([(key, _written(value)) for key, value in kwargs.items()])
        is_sum = name in ("add", "__add__") and not kwargs and all(isinstance(value, Name) for value in written)
        if is_sum and written in self.sums:  # the new parameters: a link that looks at them makes the sum of ADD too
            return self.sums[written]
        self.instructions.append(Instruction(function, written, written_kwargs, result, dtype))
        symbol = _Symbol(self, result, sample)
        if is_sum:
            self.sums[written] = symbol
        return symbol

    def finished(self, rule: Rule, outputs: list[Any]) -> Program:
        names, name = [], rule.name
        kept = ["g", *[name for name in self.inputs if name not in ("g", "p")]]
        for output, like in zip(outputs, kept, strict=True):
            dims = 0 if like.startswith("n") else 1
            if not isinstance(output, _Symbol) or getattr(output.sample, "ndim", -1) != dims:
                raise TypeError(f"The rule of {name} must return tensors like those it was given, got {output!r}")
            if output.sample.dtype != self.like.dtype:
                raise TypeError(
                    f"The rule of {name} must keep dtypes: it was given {self.like.dtype} and returned "
                    f"{output.sample.dtype}"
                )
            names.append(output.name)
        return Program(
            tuple(self.inputs),
            tuple(self.numbers),
            needed(self.instructions, names),
            tuple(names),
            self.like.dtype,
            self.like.device,
            rule is ADD,
        )


def _values(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        yield from value if isinstance(value, tuple | list) else (value,)


def _sample(value: Any) -> Any:
    return value.sample if isinstance(value, _Symbol) else value


def _differs(value: Any) -> bool:
    return isinstance(value, _Symbol) and isinstance(value.sample, Tensor) and value.sample.ndim > 0


def _mark(number: Any) -> str:
    flag = isinstance(number, bool) or (isinstance(number, Tensor) and number.dtype == torch.bool)
    return "_flag" if flag else ""


def _copying(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def copied(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs).clone()

    return copied


def _written(value: Any) -> Any:
    return value.name if isinstance(value, _Symbol) else value
