"""Transformations by name, and from the lines of text and the dicts of configuration files."""

from __future__ import annotations

import ast
import difflib
import fnmatch
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from functorch_optim import schedules
from functorch_optim._core.combine import chain
from functorch_optim._core.transformation import GradientTransformation, shown
from functorch_optim.optim._factories import meant

_PLACES = ("functorch_optim.optimizers.", "functorch_optim.transforms.", "functorch_optim.wrappers.")
_COMBINE = "functorch_optim._core.combine"
_ANY = ("Any", "typing.Any")  # the annotation of wrappers, which take factories too
_EXAMPLE = "clip_by_global_norm(1.0) | adamw(lr=warmup_cosine(1e-3, 100, 1000))"


# The names. -----------------------------------------------------------------------------------------------------------


def _makes_transformations(name: str, thing: Any) -> bool:
    if name == "identity":
        return True
    if not inspect.isfunction(thing) or not (thing.__module__.startswith(_PLACES) or thing.__module__ == _COMBINE):
        return False
    returned = str(inspect.signature(thing).return_annotation)
    return "GradientTransformation" in returned or returned in _ANY


def _library() -> dict[str, Callable[..., Any]]:
    """Return the functions that have a name: those that make transformations, and schedules.

    A schedule that is called as a transformation is has `schedules.` before its name.
    """
    public = sys.modules["functorch_optim"]  # which is complete by now
    found = {name: vars(public)[name] for name in public.__all__ if _makes_transformations(name, vars(public)[name])}
    for name in schedules.__all__:
        if inspect.isfunction(vars(schedules)[name]):
            found[f"schedules.{name}" if name in found else name] = vars(schedules)[name]
    return found


class _Names(list[str]):
    """A list of names that prints with signatures and descriptions."""

    def __repr__(self) -> str:
        known = _library()
        return "\n".join([f"{name}{_arguments(known[name])}\n    {_summary(known[name])}" for name in self])


def _arguments(function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function).parameters.values()
    return str(inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters]))


def _summary(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def names(pattern: str = "*") -> list[str]:
    """List the names that `fo.get` knows: optimizers, transformations, wrappers and schedules.

    Args:
        pattern: a glob for the name: `"*adam*"`, `"clip*"`.

    Returns:
        List of the names, in alphabetical order. It prints with the hyperparameters of each and one line about it.

    Example:
        >>> import functorch_optim as fo
        >>> fo.names("adamw")
        adamw(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, *, mask=None, maximize=False)
            Adam with decoupled weight decay.
        >>> list(fo.names("clip*"))
        ['clip', 'clip_by_block_rms', 'clip_by_global_norm', 'clip_by_norm']
    """
    return _Names(sorted(fnmatch.filter(_library(), pattern)))


def _find(name: str) -> Callable[..., Any]:
    """Find the function of a name.

    Raises:
        KeyError: nothing has the name; the message has the nearest.
    """
    known = _library()
    known |= {f"schedules.{schedule}": vars(schedules)[schedule] for schedule in schedules.__all__}
    if name in known:
        return known[name]
    word = name.lower().removeprefix("schedules.")
    near = difflib.get_close_matches(word, known, 8, 0.5)
    near.sort(key=lambda other: other[:3] != word[:3])  # most words begin right
    hint = f"did you mean {' or '.join(map(repr, near[:3]))}? " if near else ""
    raise KeyError(f"No optimizer, transformation or schedule has the name {name!r}; {hint}fo.names() lists all")


# Configuration files. -------------------------------------------------------------------------------------------------


def get(spec: Any) -> Any:
    """Find an optimizer by name, or make one of a line of text or a dict, as in a configuration file.

        fo.get("adamw")                                        the function fo.adamw
        fo.get("clip(1.0) | adamw(lr=cosine(1e-3, 1000))")     a transformation: clip, then adamw
        fo.get({"name": "adamw", "lr": 1e-3})                  a transformation
        fo.get({"clip": 1.0, "adamw": {"lr": 1e-3}})           a chain, in this order

    Args:
        spec: a name, see `fo.names`, gives the function of the library.
            A line of text with calls gives their results; `|` makes a chain. Arguments are numbers, text in quotes,
            True, False, None, tuples, lists, dicts, names of the library, and calls. `swa` is a wrapper and a
            schedule: `swa(sgd(0.1), 1000)` is the first, `swa(0.1, 0.05)` and `schedules.swa` the second. Nothing else
            is read, and nothing is executed but functions of this library.
            A dict with `"name"` is a call with its other entries as arguments.
            Any other dict is a chain: name -> arguments: a dict by keyword, a list by position, one value, or None.
            A list is a chain of such texts and dicts.
            Within a dict, arguments may be dicts with `"name"`, text with a call such as `"cosine(1e-3, 1000)"`, and
            text that is a number, for YAML 1.1 reads 1e-3 as text.

    Returns:
        For a name a function, to call or to give to `fo.Optimizer(params, fo.get("adamw"), lr=1e-3)`; for all else a
        transformation, or the schedule of a text.

    Raises:
        KeyError: a name is unknown; the message has the nearest.
        ValueError: the text cannot be read, or a hyperparameter is out of range.
        TypeError: an argument is unknown or missing, or a part between `|` is no transformation.

    The text of a transformation, `repr(tx)`, makes the transformation again, as far as its arguments are numbers, text,
    schedules and transformations.

    Example:
        >>> import functorch_optim as fo
        >>> fo.get("clip_by_global_norm(1.0) | adamw(lr=warmup_cosine(1e-3, 100, 1000))")
        chain(clip_by_global_norm(1.0), adamw(lr=warmup_cosine(0.001, 100, 1000)))
        >>> fo.get({"clip_by_global_norm": 1.0, "adamw": {"lr": {"name": "cosine", "value": 1e-3, "total_iters": 100}}})
        chain(clip_by_global_norm(1.0), adamw(lr=cosine(value=0.001, total_iters=100)))
        >>> fo.get("adamw") is fo.adamw
        True
    """
    if isinstance(spec, str):
        return _read(spec)
    if isinstance(spec, Mapping):
        parts = [_made(spec)] if "name" in spec else [_with(name, arguments) for name, arguments in spec.items()]
    elif isinstance(spec, Sequence):
        parts = [part if isinstance(part, GradientTransformation) else get(part) for part in spec]
    else:
        raise TypeError(
            f"get takes a name, a line of text, a dict or a list, got {shown(spec)}; write get({_EXAMPLE!r})"
        )
    if not parts:
        raise ValueError(f"There is nothing in {spec!r}; write get({_EXAMPLE!r})")
    return parts[0] if len(parts) == 1 else chain(*parts)


def _made(spec: Mapping[str, Any]) -> Any:
    """Call the function that a dict names with its other entries."""
    return _called(_find(str(spec["name"])), [], {key: _value(value) for key, value in spec.items() if key != "name"})


def _with(name: Any, arguments: Any) -> Any:
    """Call the function of a name with arguments as a dict has them."""
    function, value = _find(str(name)), _value(arguments)
    if isinstance(arguments, Mapping) and "name" not in arguments:
        return _called(function, [], value)
    if isinstance(value, list | tuple):
        return _called(function, value, {})
    return _called(function, [] if value is None else [value], {})


def _value(value: Any) -> Any:
    """Evaluate an argument in a dict."""
    if isinstance(value, Mapping):
        return _made(value) if "name" in value else {key: _value(item) for key, item in value.items()}
    if isinstance(value, str):
        return _read(value) if "(" in value else _number(value)
    if isinstance(value, tuple):
        return tuple([_value(item) for item in value])
    return [_value(item) for item in value] if isinstance(value, Sequence) else value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _called(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function of the library.

    Raises:
        TypeError: it has no parameter of a name; the message has the nearest. Or an argument is missing, or only makes
            schedules.
    """
    signature = inspect.signature(function)
    parameters = signature.parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for name in kwargs:
            if name not in parameters:
                right = meant(name, parameters)
                hint = f"did you mean {right!r}? " if right is not None else ""
                raise TypeError(
                    f"{function.__name__} has no argument {name!r}; {hint}Its arguments are {', '.join(parameters)}"
                )
    for value in (*args, *kwargs.values()):
        if inspect.isfunction(value) and value in vars(schedules).values():
            raise TypeError(f"{value.__name__} needs its own arguments to be a schedule: {value.__name__}(...)")
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        around = (
            "it goes around a transformation, as in ema_weights(adamw(1e-3), 0.999). " if "tx" in parameters else ""
        )
        raise TypeError(
            f"{function.__name__} is called wrongly: {error}; {around}Its arguments are {', '.join(parameters)}"
        ) from None
    return function(*args, **kwargs)


# Text. ----------------------------------------------------------------------------------------------------------------


def _read(text: str) -> Any:
    """Read a line of text."""
    try:
        made = _evaluated(ast.parse(f"({text.strip()}\n)", mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} cannot be read: {error.msg}; write get({_EXAMPLE!r})") from None
    if not isinstance(made, GradientTransformation) and not callable(made):
        raise ValueError(f"{text!r} is no transformation, schedule or name of one; write get({_EXAMPLE!r})")
    return made


def _evaluated(node: ast.expr) -> Any:
    """Return the value of an expression; the same reading of Python as `ast.literal_eval`, and calls by name.

    Raises:
        ValueError: it is of another kind.
    """
    match node:
        case ast.Constant(value=int() | float() | str() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()) | ast.Name(id="inf") as operand):
            return -_evaluated(operand)
        case ast.Tuple(elts=items):
            return tuple([_evaluated(item) for item in items])
        case ast.List(elts=items):
            return [_evaluated(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {_evaluated(key): _evaluated(value) for key, value in zip(keys, values, strict=True) if key}
        case ast.Name(id="inf"):
            return math.inf
        case ast.Name(id=name):
            return _find(name)
        case ast.Attribute(value=ast.Name(id="schedules"), attr=name):
            return _find(f"schedules.{name}")
        case ast.Call(func=function, args=args, keywords=keywords) if all(keyword.arg for keyword in keywords):
            called = _evaluated(function)
            if not callable(called):
                raise ValueError(f"{ast.unparse(function)!r} cannot be called: it is no function")
            given = {str(keyword.arg): _evaluated(keyword.value) for keyword in keywords}
            values = [_evaluated(arg) for arg in args]
            if isinstance(function, ast.Name) and isinstance([*values, given.get("value")][0], int | float):
                called = vars(schedules).get(function.id, called)  # swa(0.1, 0.05), as a schedule prints
            return _called(called, values, given)
        case ast.BinOp(op=ast.BitOr()):
            return chain(*[_evaluated(part) for part in _piped(node)])
    raise ValueError(
        f"{ast.unparse(node)!r} cannot be read: it may have numbers, text in quotes, True, False, None, tuples, lists, "
        f"dicts, and calls of functions of this library, joined by |; as in {_EXAMPLE!r}"
    )


def _piped(node: ast.expr) -> list[ast.expr]:
    """List the parts between | in order."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_piped(node.left), *_piped(node.right)]
    return [node]
