"""Factories of transformations, and their hyperparameters in param groups."""

import difflib
import functools
import inspect
import numbers
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from functorch_optim import tree
from functorch_optim._core.hyperparameters import Live
from functorch_optim._core.parts import parts_of
from functorch_optim._core.recorded import Recorded
from functorch_optim._core.transformation import GradientTransformation, advice, shown

Factory = Callable[..., GradientTransformation]

# Annotations of hyperparameters that stay whole; as text under `from __future__ import annotations`.
_WHOLE = (bool, int, "bool", "int")


def name_of(transformation: Any) -> str:
    """Name a transformation or factory."""
    if isinstance(transformation, functools.partial):
        return name_of(transformation.func)
    return getattr(transformation, "__name__", None) or repr(transformation)


def parameters(factory: Factory) -> dict[str, inspect.Parameter]:
    """Return the parameters of a factory by name: its hyperparameters.

    Raises:
        TypeError: one has no name.
    """
    found = inspect.signature(factory).parameters
    for parameter in found.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{name_of(factory)} takes {parameter}, which has no name to be a hyperparameter; "
                "write lambda lr: chain(clip(1.0), sgd(lr)), or give the transformation itself"
            )
    return dict(found)


def defaults(transformation: Any, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that groups begin with.

    Raises:
        TypeError: `transformation` is neither transformation nor factory, or a hyperparameter is not one of its.
    """
    if isinstance(transformation, GradientTransformation):
        if hyperparameters:
            raise TypeError(
                f"{transformation!r} has its hyperparameters already; {', '.join(hyperparameters)} would not be used. "
                "Give a factory: Optimizer(params, adamw, lr=1e-3)"
            )
        return {}
    is_class = isinstance(transformation, type) and issubclass(transformation, torch.optim.Optimizer)
    if is_class or isinstance(transformation, Recorded) or not callable(transformation):
        raise TypeError(
            f"Optimizer needs a transformation or a factory of one, got {shown(transformation)}, which is not a "
            "GradientTransformation; write Optimizer(params, adamw(1e-3)) or Optimizer(params, adamw, lr=1e-3)"
            f"{_hint(transformation)}"
        )
    known = parameters(transformation)
    unknown = [name for name in hyperparameters if name not in known]
    if unknown:
        raise TypeError(f"{name_of(transformation)} has no hyperparameter {unknown[0]!r}; it has {', '.join(known)}")
    given = {name: parameter.default for name, parameter in known.items() if parameter.default is not parameter.empty}
    return {**given, **hyperparameters}


def _hint(given: Any) -> str:
    """Say how to correct a wrong transformation: a sentence, or nothing."""
    if isinstance(given, type):
        return f". {given.__name__} is a class of optimizers; fo.optim.{given.__name__}(params) is an optimizer already"
    if isinstance(given, Mapping):
        return ". The base class of optimizers, which takes a dict of defaults, is torch.optim.Optimizer or fo.optim's"
    if isinstance(given, Iterator):
        return ". The parameters come first"
    return advice(given)


def check_params_argument(params: Any) -> None:
    """Raise when a module, its method, or a dict by name, is given for the parameters of an optimizer.

    Raises:
        TypeError: it is.
    """
    if isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList):
        raise TypeError(
            f"Optimizer needs parameters, got a {type(params).__name__}, which is a module; write "
            "Optimizer(model.parameters(), adamw, lr=1e-3), or give model.named_parameters() to have names too"
        )
    if inspect.ismethod(params):
        raise TypeError(f"Optimizer needs parameters, got the method {params.__name__}; call it: {params.__name__}()")
    if isinstance(params, Mapping):
        raise TypeError(
            "Optimizer needs an iterable of parameters, of pairs of name and parameter, or of groups, got a dict; for "
            "a dict of parameters by name write Optimizer(params.items(), adamw, lr=1e-3)"
        )


def check_is_group(group: Mapping[str, Any]) -> None:
    """Raise when a dict is no param group, but one of parameters by name.

    Raises:
        KeyError: it is.
    """
    if "params" not in group:
        raise KeyError(
            f'A param group is a dict with the key "params", got one with {", ".join(map(repr, group))}; for a dict of '
            "parameters by name write Optimizer(params.items(), adamw, lr=1e-3)"
        )


def check_injects_nothing(transformation: GradientTransformation, factory: Factory) -> None:
    """Raise when a transformation keeps hyperparameters in its state that param groups hold already.

    Raises:
        TypeError: it does.
    """
    if any(link.rule.keeps is not None for link in transformation._links):
        raise TypeError(
            f"{name_of(factory)} keeps hyperparameters in the state, and param_groups hold them already, so that edits "
            "there would be ignored. Give Optimizer the factory without inject_hyperparams, or the transformation: "
            "Optimizer(params, inject_hyperparams(adamw)(lr=1e-3))"
        )


def parted(factory: Any, group: dict[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Part a param group as the factory wants it; the group itself where it wants nothing."""
    parts = parts_of(factory)
    return [group] if parts is None else parts.of(group, defaults)


def hyperparameters(factory: Factory, group: Mapping[str, Any]) -> dict[str, Any]:
    """Pick a factory's arguments from a param group."""
    return {name: group[name] for name in parameters(factory) if name in group}


def make(factory: Factory, group: Mapping[str, Any], live: bool) -> GradientTransformation:
    """Make the transformation of a param group.

    Args:
        factory: makes it of hyperparameters.
        group: holds them.
        live: whether to give functions for numbers, which read them from the group at every step. The same
            transformation then serves while a learning rate scheduler edits them, to values that a factory might refuse
            too. A number 0 stays one: it switches things off.

    Raises:
        TypeError: the group lacks a hyperparameter, or the factory does not return a transformation.
    """
    known = parameters(factory)
    given = hyperparameters(factory, group)
    missing = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if missing:
        raise TypeError(
            f"A param group lacks the hyperparameter {missing[0]!r} of {name_of(factory)}, which has no default; "
            f"write Optimizer(params, {name_of(factory)}, {missing[0]}=...)"
        )
    if live:
        for name, value in given.items():
            whole = isinstance(value, numbers.Integral) and known[name].annotation not in _WHOLE
            number = float(value) if whole else value  # torch.optim takes weight_decay=False too
            given[name] = _live(number, functools.partial(group.__getitem__, name))
    made = factory(**given)
    if not isinstance(made, GradientTransformation):
        raise TypeError(
            f"{name_of(factory)} returned a {type(made).__name__}, not a GradientTransformation; "
            "write a function of hyperparameters that returns, say, chain(...)"
        )
    check_injects_nothing(made, factory)
    return made


_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum")
"""Entries that torch's schedulers write into groups."""
_OF_GROUPS = ("params", "param_names", "name", "differentiable", "foreach", "fused", *_OF_SCHEDULERS)


def check_spelling(factory: Factory, group: Mapping[str, Any]) -> None:
    """Raise when a group has an entry that looks like a hyperparameter of the factory, and is none.

    Other entries belong to the program: those of torch's schedulers, of SAM, of layer-wise rates.

    Raises:
        TypeError: it has.
    """
    known = parameters(factory)
    for name in group:
        right = None if name in known or name in _OF_GROUPS else meant(str(name), known)
        if right is not None:
            raise TypeError(
                f"{name_of(factory)} has no hyperparameter {name!r}, which a param group gives; did you mean {right!r}"
                f"? It has {', '.join(known)}"
            )


def meant(name: str, known: Collection[str]) -> str | None:
    """Find the hyperparameter that a word looks like: by its letters, its first letters, or its initials."""
    stems = [right for right in known if name.endswith(f"_{right}") or name.startswith(f"{right}_")]
    for right in known:
        likeness = difflib.SequenceMatcher(None, name.lower(), right.lower()).ratio()
        if stems:  # lr_scale is an entry of the program, but lr_deccay is a misspelt lr_decay
            if right not in stems and likeness >= 0.85:
                return right
            continue
        initials = "".join([word[:1] for word in name.split("_")]), "".join([word[:1] for word in right.split("_")])
        alike = likeness >= 0.6 or sorted(name.split("_")) == sorted(right.split("_"))
        shortened = len(name) > 2 and right.startswith(name)
        if alike or shortened or (len(initials[0]) > 1 and initials[0] == right) or name == initials[1] != name[:1]:
            return right
    return None


def check_no_hyperparameters(group: Mapping[str, Any]) -> None:
    """Raise when a group gives hyperparameters to a transformation that has them already."""
    extra = [name for name in group if name not in _OF_GROUPS]
    if extra:
        raise ValueError(
            f"A param group gives {', '.join(extra)}, but the transformation has its hyperparameters already. "
            "Give a factory, Optimizer(groups, adamw, lr=1e-3), or use partition"
        )


def _live(value: Any, read: Callable[[], Any]) -> Any:
    if _is_number(value):
        return Live(read)
    if isinstance(value, list | tuple):
        return tuple([_live(item, functools.partial(_item, read, i)) for i, item in enumerate(value)])
    return value


def _item(read: Callable[[], Any], i: int) -> Any:
    return read()[i]


def _is_number(value: object) -> bool:
    if isinstance(value, numbers.Integral):
        return False
    return isinstance(value, numbers.Real) and value != 0  # NumPy's numbers too


_LIVE = object()  # stands for a live number in a snapshot


class Snapshot:
    """The contents of param groups, to notice edits: numbers and text by value, all else by identity.

    Args:
        groups: the param groups.
        live: whether numbers are read at every step, so that their edits need not be noticed.
    """

    def __init__(self, groups: list[dict[str, Any]], live: bool) -> None:
        self.live = live
        self.groups = list(groups)
        self.copies = _copied(groups, live)
        self.values = [(group, name, value) for group in groups for name, value in group.items()]
        self.lists = [(value, list(value)) for *_, value in self.values if isinstance(value, list)]
        containers = [value for *_, value in self.values if isinstance(value, dict | tuple)]
        self.fixed = not any(isinstance(part, list | dict) for value in containers for part in value)

    def is_of(self, groups: list[dict[str, Any]]) -> bool:
        """Tell whether these are the same groups, and nothing in them has been edited since."""
        # A group that is exchanged for an equal one is another: live numbers are read from the group itself.
        if len(groups) != len(self.groups) or not all(map(operator.is_, groups, self.groups)):
            return False
        untouched = (  # most often not even exchanged
            self.fixed
            and len(self.values) == sum(map(len, groups))
            and all(group.get(name, self) is value for group, name, value in self.values)
            and all(len(now) == len(then) and all(map(operator.is_, now, then)) for now, then in self.lists)
        )
        return untouched or _same(self.copies, groups, self.live)


def _copied(value: Any, live: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_copied(item, live) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item, live) for key, item in value.items()}
    return _LIVE if live and _is_number(value) else value


def _same(old: Any, new: Any, live: bool) -> bool:
    if old is _LIVE:
        return _is_number(new)
    if isinstance(old, list):
        if not isinstance(new, list | tuple) or len(old) != len(new):
            return False
        return all(map(operator.is_, old, new)) or all(_same(a, b, live) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict):
        keys = old.keys()
        return isinstance(new, dict) and keys == new.keys() and all(_same(old[key], new[key], live) for key in keys)
    if isinstance(old, bool | int | float | str):
        return type(old) is type(new) and old == new
    return old is new


def has_function(value: Any) -> bool:
    """Tell whether a hyperparameter is a function, a schedule say, or holds one."""
    return any(map(callable, tree.flatten(value)[0]))


def is_of_program(value: Any) -> bool:
    """Tell whether a hyperparameter is, or holds, a function, a transformation or a generator, which no file has."""
    return any(
        callable(leaf) or isinstance(leaf, GradientTransformation | torch.Generator) for leaf in tree.flatten(value)[0]
    )


def plain(value: Any) -> Any:
    """Turn numbers of numpy and the like into Python's; a function of a scheduler may return them."""
    return tree.map(_plain_number, value) if any(map(_is_foreign, tree.flatten(value)[0])) else value


def _plain_number(leaf: Any) -> Any:
    if not _is_foreign(leaf):
        return leaf
    kind = int if isinstance(leaf, numbers.Integral) else float if isinstance(leaf, numbers.Real) else complex
    return kind(leaf)


def _is_foreign(leaf: Any) -> bool:
    return isinstance(leaf, numbers.Complex) and type(leaf).__module__ != "builtins"
