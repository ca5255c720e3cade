"""Rules that match parameters, and the labels that they give."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from functorch_optim._core.transformation import shown
from functorch_optim._labels.parameters import Parameter, Parameters, parameters_of
from functorch_optim.tree import Tree

_SHOWN = 20  # names in a message


class _Error:
    """The default of `label`: a parameter without a label is an error."""

    def __repr__(self) -> str:
        return "error"


ERROR = _Error()


def label(module_or_tree: Any, rules: Any, default: Any = ERROR) -> Tree:
    r"""Give each parameter the label of the first rule that matches it.

    A label is any value: the name of a part of `fo.partition`, True and False for a mask, a number or schedule for a
    tree of hyperparameters.

    Args:
        module_or_tree: module; or tree of tensors.
        rules: dict from a matcher to a label, or a list of such pairs. The first that matches wins. A matcher is one
            of these, or a tuple of them, any of which may match:
            text: a glob for the whole path: `"*.bias"`, `"encoder.*"`; `*` stands for dots too.
            regular expression: `re.compile(r"\.bias$")`, searched for in the path.
            int or range: the number of dimensions: `1`, `range(0, 2)`.
            type of modules, or one of them: `nn.LayerNorm`, `model.head`: parameters in it, at any depth.
            function: `function(path, tensor) -> bool`.
        default: label of parameters that no rule matches. Without it they are an error.

    Returns:
        Tree of labels. That of a module is a dict by name, as `dict(module.named_parameters())`; parameters that do not
        require grad have labels, too. That of a tree is built like the tree, with None where it has None.

    Raises:
        ValueError: no rule matches a parameter, and there is no default; a pattern, or all of a rule, matches nothing.
            The message lists all of these.
        TypeError: neither a module nor a tree of tensors; or a rule has nothing to match by.

    A tied parameter is one parameter: a rule that matches any of its names matches it. The names that
    `torch.compile`, DDP and FSDP make match with and without their prefixes.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> fo.label(model, {torch.nn.LayerNorm: "norm", "*.bias": "bias", 2: "matrix"})
        {'0.weight': 'matrix', '0.bias': 'bias', '1.weight': 'norm', '1.bias': 'norm'}
        >>> fo.label(model, {"0.*": 1e-3}, default=1e-2)
        {'0.weight': 0.001, '0.bias': 0.001, '1.weight': 0.01, '1.bias': 0.01}
    """
    parameters = parameters_of(module_or_tree, "label")
    return parameters.build(labels_of(parameters, _pairs(rules), default))


def labels_of(parameters: Parameters, rules: Sequence[tuple[Any, Any]], default: Any) -> list[Any]:
    """Give each parameter the label of the first rule that matches it, or the default."""
    found: dict[str, Any] = {}
    by_rule = matched([matcher for matcher, _ in rules], parameters)
    for those, (_, name) in zip(by_rule, rules, strict=True):
        for p in those:
            found.setdefault(p.path, name)
    unmatched = [p.path for p in parameters.listed if p.path not in found]
    if unmatched and default is ERROR:
        raise ValueError(
            f"No rule matches {_listed(map(repr, unmatched))}. Add rules for them, or give the label of all others: "
            "label(model, rules, default=...)"
        )
    return [found.get(p.path, default) for p in parameters.listed]


def _pairs(rules: Any) -> list[tuple[Any, Any]]:
    pairs = list(rules.items()) if isinstance(rules, Mapping) else rules
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs
    ):
        raise TypeError(
            f"Rules are a dict or pairs of a matcher and a label, got {shown(rules)}; write "
            "label(model, {'*.bias': 'no_decay'}, default='decay')"
        )
    return [(matcher, name) for matcher, name in pairs]


def terms_of(matcher: Any, parameters: Parameters) -> list[Any]:
    """List the terms of a matcher: any of them may match.

    Raises:
        TypeError: one is nothing to match by.
    """
    terms = [*matcher] if isinstance(matcher, tuple | list | set | frozenset) else [matcher]
    for term in terms:
        of_module = isinstance(term, nn.Module) or (isinstance(term, type) and issubclass(term, nn.Module))
        if of_module and not parameters.of_module:
            raise TypeError(
                f"A rule matches by {shown(term)}, and a tree of tensors has no modules; give the module: "
                "label(model, rules)"
            )
        of_path_or_tensor = isinstance(term, str | re.Pattern | int | range) or callable(term)
        if isinstance(term, bool) or not (of_module or (of_path_or_tensor and not isinstance(term, type))):
            raise TypeError(
                f"A rule cannot match by {shown(term)}. Give a glob, '*.bias'; a regular expression, "
                r"re.compile(r'\.bias$'); a number of dimensions, 1 or range(0, 2); a type of modules, nn.LayerNorm; "
                "a module, model.head; a function of path and tensor; or a tuple of these"
            )
    return terms


def matches(term: Any, p: Parameter) -> bool:
    """Tell whether a term matches a parameter."""
    if isinstance(term, str):
        return any(fnmatch.fnmatchcase(path, term) for path in p.paths)
    if isinstance(term, re.Pattern):
        return any(term.search(path) for path in p.paths)
    if isinstance(term, int):
        return p.tensor.ndim == term
    if isinstance(term, range):
        return p.tensor.ndim in term
    if isinstance(term, type):
        return any(isinstance(module, term) for owners in p.owners for module in owners)
    if isinstance(term, nn.Module):
        return any(module is term for owners in p.owners for module in owners)
    return any(term(path, p.tensor) for path in p.paths)


def matched(matchers: Sequence[Any], parameters: Parameters) -> list[list[Parameter]]:
    """Find the parameters that each matcher matches.

    Raises:
        ValueError: a pattern matches nothing, or none of the terms of a matcher does.
    """
    results, idle = [], []
    for matcher in matchers:
        found = [(term, [p for p in parameters.listed if matches(term, p)]) for term in terms_of(matcher, parameters)]
        results.append([p for _, those in found for p in those])
        idle += [term for term, those in found if not those and (isinstance(term, str | re.Pattern) or not results[-1])]
    if idle:
        paths = [path for p in parameters.listed for path in p.paths]
        raise ValueError(
            f"{_listed(map(shown, idle))} match{'es' if len(idle) == 1 else ''} no parameter"
            f"{''.join([_hint(term, paths) for term in idle])}. The parameters are {_listed(map(repr, paths))}"
        )
    return results


def _hint(pattern: Any, paths: Sequence[str]) -> str:
    """Guess the meaning of a pattern without a match: a part of a sentence, or nothing."""
    if not isinstance(pattern, str):
        return ""
    wider = [f"{pattern}.*", f"*.{pattern}", f"*{pattern}*", pattern.removeprefix("*.")]
    meant = [glob for glob in wider if fnmatch.filter(paths, glob)] or difflib.get_close_matches(pattern, paths, 1)
    if meant:
        return f"; instead of {pattern!r}, {meant[0]!r} would"
    return f"; if {pattern!r} is a regular expression, write re.compile" if set(pattern) & set(r"\^$(|+") else ""


def _listed(texts: Iterable[str]) -> str:
    """List texts for a message, as many as can be read."""
    every = list(texts)
    more = f", and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more
