"""Labels, masks, trees of numbers and param groups, by rules on paths, dimensions and modules."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from functorch_optim import tree
from functorch_optim._core.checks import check_is_param
from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import check_choice, check_number
from functorch_optim._core.naming import plain
from functorch_optim._core.transformation import GradientTransformation, check_transformation, shown
from functorch_optim.schedules import Schedule
from functorch_optim.transforms.zeros import set_to_zero
from functorch_optim.tree import Tree

_SHOWN = 20  # names in a message


class _Error:
    """The default of `label`: a parameter without a label is an error."""

    def __repr__(self) -> str:
        return "error"


_ERROR = _Error()


# Parameters. ----------------------------------------------------------------------------------------------------------


class _Parameter(NamedTuple):
    """A parameter, as rules see it.

    Attributes:
        path: its name: the first of them, for a module.
        paths: all of its names: those of all places where it is tied, with and without the prefixes of wrappers.
        tensor: the parameter.
        owners: for each place, the modules that it is in, from the outermost to its own; empty in a tree.
    """

    path: str
    paths: tuple[str, ...]
    tensor: Tensor
    owners: tuple[tuple[nn.Module, ...], ...]

    @property
    def trains(self) -> bool:
        """Whether a module trains it."""
        return not self.owners or self.tensor.requires_grad


class _Parameters(NamedTuple):
    """The parameters of a module or tree.

    Attributes:
        listed: all of them, those that do not require grad too.
        build: makes a tree like the parameters of a value for each.
        of_module: whether they are those of a module.
    """

    listed: list[_Parameter]
    build: Callable[[Sequence[Any]], Tree]
    of_module: bool


def _parameters(module_or_tree: Any, name: str) -> _Parameters:
    """List the parameters of a module or tree; `name` is the function that asks."""
    if isinstance(module_or_tree, nn.Module):
        return _of_module(module_or_tree)
    leaves, structure = tree.flatten(module_or_tree)
    paths = tree.paths(module_or_tree)
    if len(leaves) == 1 and leaves[0] is module_or_tree and not isinstance(module_or_tree, Tensor):
        raise TypeError(
            f"{name} needs a module or a tree of tensors, got a {type(module_or_tree).__name__}; write {name}(model, "
            f"...), or {name}(fo.params_of(model), ...)"
        )
    tied: dict[int, list[str]] = {}
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            check_is_param(leaf, i, paths.__getitem__)
            tied.setdefault(id(leaf), []).append(paths[i])
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]
    listed = [_Parameter(paths[i], tuple(tied[id(leaves[i])]), leaves[i], ()) for i in places]

    def build(values: Sequence[Any]) -> Tree:
        filled: list[Any] = [None] * len(leaves)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        return tree.unflatten(structure, filled)

    return _Parameters(listed, build, False)


def _of_module(module: nn.Module) -> _Parameters:
    modules = dict(module.named_modules(remove_duplicate=False))
    tied: dict[Tensor, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        tied.setdefault(p, []).append(name)

    def owners(name: str) -> tuple[nn.Module, ...]:
        parts = name.split(".")[:-1]
        return tuple([modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)])

    listed = [
        _Parameter(names[0], tuple(dict.fromkeys([*names, *map(plain, names)])), p, tuple(map(owners, names)))
        for p, names in tied.items()
    ]
    return _Parameters(listed, lambda values: dict(zip([p.path for p in listed], values, strict=True)), True)


# Rules. ---------------------------------------------------------------------------------------------------------------


def _terms(matcher: Any, parameters: _Parameters) -> list[Any]:
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


def _matches(term: Any, p: _Parameter) -> bool:
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


def _matched(matchers: Sequence[Any], parameters: _Parameters) -> list[list[_Parameter]]:
    """Find the parameters that each matcher matches.

    Raises:
        ValueError: a pattern matches nothing, or none of the terms of a matcher does.
    """
    matched, idle = [], []
    for matcher in matchers:
        found = [(term, [p for p in parameters.listed if _matches(term, p)]) for term in _terms(matcher, parameters)]
        matched.append([p for _, those in found for p in those])
        idle += [term for term, those in found if not those and (isinstance(term, str | re.Pattern) or not matched[-1])]
    if idle:
        paths = [path for p in parameters.listed for path in p.paths]
        raise ValueError(
            f"{_listed(map(shown, idle))} match{'es' if len(idle) == 1 else ''} no parameter"
            f"{''.join([_hint(term, paths) for term in idle])}. The parameters are {_listed(map(repr, paths))}"
        )
    return matched


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


def label(module_or_tree: Any, rules: Any, default: Any = _ERROR) -> Tree:
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
    parameters = _parameters(module_or_tree, "label")
    return parameters.build(_labels(parameters, _pairs(rules), default))


def _labels(parameters: _Parameters, rules: Sequence[tuple[Any, Any]], default: Any) -> list[Any]:
    found: dict[str, Any] = {}
    matched = _matched([matcher for matcher, _ in rules], parameters)
    for those, (_, name) in zip(matched, rules, strict=True):
        for p in those:
            found.setdefault(p.path, name)
    unmatched = [p.path for p in parameters.listed if p.path not in found]
    if unmatched and default is _ERROR:
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


# Masks, rates, groups and tables. -------------------------------------------------------------------------------------

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_BIAS = re.compile(r"bias[^.]*$")
_EMBEDDING = re.compile(r"embed[^.]*$|token$")
_EMBEDDING_WEIGHT = re.compile(r"embed[^.]*\.weight$")
_OF_HUGGING_FACE = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


def _is_plain_weight(p: _Parameter) -> bool:
    own = [owners[-1] for owners in p.owners]
    names = [_BIAS, _EMBEDDING] if own else [_BIAS, _EMBEDDING, _EMBEDDING_WEIGHT]
    of_type = any(isinstance(module, (*_NORMS, *_EMBEDDINGS)) for module in own)
    return not (p.tensor.ndim <= 1 or of_type or any(name.search(path) for name in names for path in p.paths))


def _decays_in_timm(p: _Parameter) -> bool:
    return p.tensor.ndim > 1 and not p.path.endswith(".bias")


def _decays_in_hugging_face(p: _Parameter) -> bool:
    in_norm = any(isinstance(owners[-1], nn.LayerNorm) for owners in p.owners)
    return not (in_norm or _OF_HUGGING_FACE.search(p.path.lower()))


_DECAYS = {None: _is_plain_weight, "timm": _decays_in_timm, "huggingface": _decays_in_hugging_face}


def weight_decay_mask(
    module_or_tree: Any, rule: Literal["timm", "huggingface"] | None = None, *, exclude: Any = ()
) -> Tree:
    """Tell which parameters decay: no decay on biases, norms and embeddings.

    Args:
        module_or_tree: module; or tree of tensors, whose paths are all that tells norms and embeddings.
        rule: None: all but parameters of less than two dimensions, of torch's norms and embeddings, and those whose
            last name has "bias" or "embed" in it or ends in "token": a position embedding or class token. In a tree
            also a weight that has "embed" in its name.
            "timm": all but parameters of less than two dimensions, and those whose name ends in ".bias"; and those
            that the module's method `no_weight_decay()` names, if it has one.
            "huggingface": all but parameters of `nn.LayerNorm`, and those with "bias", "layernorm" or "rmsnorm" in
            their name, or with a part of it that is "norm" or ends in "_norm".
        exclude: further parameters that do not decay: a matcher of `fo.label`.

    Returns:
        Tree of bools, True where a parameter decays, for `fo.masked`, `adamw(mask=...)` and `add_decayed_weights`. See
        `label` for its form. `fo.tree.map(lambda decays: 0.1 * decays, mask)` is a tree of numbers for `weight_decay`.

    Raises:
        ValueError: the rule is unknown; a pattern in `exclude` matches nothing.

    A tied embedding is an embedding, though the output layer has it for its weight.

    Sources: timm's `param_groups_weight_decay`; Trainer of Hugging Face's transformers.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> mask = fo.weight_decay_mask(model)
        >>> mask
        {'0.weight': False, '1.weight': True, '1.bias': False, '2.weight': False, '2.bias': False}
        >>> opt = fo.Optimizer(model.named_parameters(), fo.adamw(1e-3, weight_decay=0.1, mask=mask))
    """
    check_choice("rule", rule, *_DECAYS)
    parameters = _parameters(module_or_tree, "weight_decay_mask")
    excluded = _matched([exclude] if _terms(exclude, parameters) else [], parameters)
    out = {p.path for those in excluded for p in those}
    if rule == "timm":
        globs: Collection[str] = getattr(module_or_tree, "no_weight_decay", tuple)()
        out |= {p.path for p in parameters.listed if any(_matches(glob, p) for glob in globs)}
    return parameters.build([_DECAYS[rule](p) and p.path not in out for p in parameters.listed])


def layer_decay(
    module_or_tree: Any, layers: Any, decay: float = 0.75, *, lr: Any = 1.0, min_scale: float = 0.0
) -> Tree:
    r"""Make learning rates that are less for each layer that is farther from the output: layer-wise decay.

        lr_p = lr max(decay^(depth_max - depth_p), min_scale)

    Args:
        module_or_tree: module, all of whose parameters count for the depth, those that do not require grad too; or tree
            of tensors.
        layers: from the input to the output, a matcher of `fo.label` for each layer. A regular expression with
            groups, such as `re.compile(r"^blocks\.(\d+)\.")`, makes a layer for each number that its groups find. The
            first that matches wins.
        decay: factor from a layer to the one before it, in (0, 1].
        lr: learning rate of the last layer: number, 0-dim tensor, or schedule.
        min_scale: least factor, in [0, 1].

    Returns:
        Tree of learning rates, for the `lr` of any optimizer and for `fo.param_groups`. See `label` for its form.

    Raises:
        ValueError: a parameter is in no layer; a pattern matches nothing; a group finds no number; `decay` is out of
            range.

    timm gives the parameters that its patterns leave out to the last layer. Here they are an error.

    Source: Clark et al., ELECTRA, arXiv:2003.10555; Bao et al., BEiT, arXiv:2106.08254.

    Example:
        >>> import functorch_optim as fo, re, torch
        >>> model = torch.nn.ModuleDict({"stem": torch.nn.Linear(4, 4, bias=False), "head": torch.nn.Linear(4, 2)})
        >>> model["blocks"] = torch.nn.Sequential(torch.nn.Linear(4, 4, False), torch.nn.Linear(4, 4, False))
        >>> fo.layer_decay(model, ["stem.*", re.compile(r"^blocks\.(\d+)\."), "head.*"], 0.5, lr=0.1)
        {'stem.weight': 0.0125, 'head.weight': 0.1, 'head.bias': 0.1, 'blocks.0.weight': 0.025, 'blocks.1.weight': 0.05}
    """
    check_number("decay", decay, "0 < value <= 1")
    check_number("min_scale", min_scale, "0 <= value <= 1")
    parameters = _parameters(module_or_tree, "layer_decay")
    matchers = list(layers) if isinstance(layers, list | tuple) else [layers]
    rules = [(matcher, place) for place, matcher in enumerate(matchers)]
    places = zip(parameters.listed, _labels(parameters, rules, _ERROR), strict=True)
    keys = [(place, *_numbers(_terms(matchers[place], parameters), p)) for p, place in places]
    ordered = sorted(set(keys))
    scales = [max(decay ** (len(ordered) - 1 - depth), min_scale) for depth in range(len(ordered))]
    rate = Schedule.of(lr) if callable(lr) else lr
    rates = dict(zip(ordered, [rate * scale for scale in scales], strict=True))
    return parameters.build([rates[key] for key in keys])


def _numbers(terms: Sequence[Any], p: _Parameter) -> tuple[int, ...]:
    """Return the numbers that the groups of the first regular expression find that matches a parameter."""
    term = next(term for term in terms if _matches(term, p))
    if not isinstance(term, re.Pattern):
        return ()
    found = next(match for path in p.paths if (match := term.search(path)))
    for group in found.groups():
        if group is not None and not group.isdecimal():
            raise ValueError(
                f"The groups of {term.pattern!r} are to find the numbers of layers, and in {found.string!r} one finds "
                rf"{group!r}; write (\d+) for a number, and (?:...) for others"
            )
    return tuple([int(group) for group in found.groups() if group is not None])


def frozen(tx: GradientTransformation, module_or_tree: Any, matcher: Any) -> GradientTransformation:
    """Train with a transformation, but keep the parameters that match as they are, without a state for them.

    To freeze others, or none, in mid-training, go on with another `frozen`: `fo.migrate(tx, state, params)`, or
    `opt.migrate(tx)`. Parameters that stay keep their states.

    Args:
        tx: the transformation of those that are trained. Reductions such as a global norm see these alone.
        module_or_tree: module; or tree of tensors.
        matcher: of the frozen parameters, as in `fo.label`: `"encoder.*"`; or a tuple of these. `()`: none.

    Returns:
        Transformation whose state is a dict: "train" -> the state of `tx`, "frozen" -> nothing.

    Raises:
        ValueError: a pattern matches nothing.
        TypeError: `tx` is no transformation.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, False), torch.nn.Linear(1, 1, False))
        >>> params = fo.params_of(model)
        >>> tx = fo.frozen(fo.sgd(0.5), params, "0.*")
        >>> updates, state = tx.update(fo.tree.map(torch.ones_like, params), tx.init(params), params)
        >>> updates
        {'0.weight': tensor([[0.]]), '1.weight': tensor([[-0.5000]])}
        >>> state, loaded = fo.migrate(fo.frozen(fo.sgd(0.5), params, ()), state, params)
    """
    check_transformation(tx, "frozen(adamw(1e-3), model, 'encoder.*')")
    parameters = _parameters(module_or_tree, "frozen")
    rules = [(matcher, "frozen")] if _terms(matcher, parameters) else []
    return partition({"train": tx, "frozen": set_to_zero()}, parameters.build(_labels(parameters, rules, "train")))


def param_groups(module_or_tree: Any, **hyperparameters: Tree) -> list[dict[str, Any]]:
    """Make param groups of trees of hyperparameters: a group for the parameters whose values are all the same.

    Args:
        module_or_tree: module, whose parameters that do not require grad are left out; or tree of tensors.
        **hyperparameters: by name, a tree built like the parameters, or a prefix of one: a result of
            `fo.label`, `fo.layer_decay` or `fo.weight_decay_mask`. Where a value is None, the group has none.

    Returns:
        List of dicts for `fo.Optimizer` and all of torch.optim: `"params"` is a list of pairs of name and parameter.

    Raises:
        ValueError: a tree does not fit the parameters; or there is nothing to train.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> decays = fo.label(model, {"*.bias": 0.0}, default=0.1)
        >>> groups = fo.param_groups(model, weight_decay=decays)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight', '1.weight']), (0.0, ['0.bias', '1.bias'])]
        >>> opt = torch.optim.AdamW(groups, lr=1e-3)
    """
    parameters = _parameters(module_or_tree, "param_groups")
    columns = {name: _aligned(parameters, name, values) for name, values in hyperparameters.items()}
    groups: dict[Any, dict[str, Any]] = {}
    taken: set[int] = set()
    for i, p in enumerate(parameters.listed):
        if p.trains and id(p.tensor) not in taken:
            taken.add(id(p.tensor))
            values = {name: column[i] for name, column in columns.items() if column[i] is not None}
            key = tuple([(name, _key(value)) for name, value in values.items()])
            groups.setdefault(key, {"params": [], **values})["params"].append((p.path, p.tensor))
    if not groups:
        raise ValueError("There is nothing to train: no parameter requires grad. Call module.requires_grad_() first")
    return list(groups.values())


def _key(value: Any) -> Any:
    """Return a key that tells values apart: numbers and text by value, tensors and schedules by identity."""
    return value if isinstance(value, int | float | str) else id(value)


def label_table(module_or_tree: Any, **trees: Tree) -> str:
    """Show the labels: a line for each parameter.

    Args:
        module_or_tree: module; or tree of tensors.
        **trees: by the name of the column: labels, masks or numbers: a tree like the parameters, or a prefix of one.

    Returns:
        Table to print. All names of a tied parameter are in its line, and those that do not require grad are marked.

    Raises:
        ValueError: a tree does not fit the parameters.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> print(fo.label_table(model, decays=fo.weight_decay_mask(model)))
        parameter  shape   decays
        weight     (2, 4)  True
        bias       (2,)    False
    """
    parameters = _parameters(module_or_tree, "label_table")
    columns = [_aligned(parameters, name, values) for name, values in trees.items()]
    rows = [["parameter", "shape", *trees]]
    for i, p in enumerate(parameters.listed):
        others = [path for path in p.paths if plain(path) != plain(p.path)]
        name = " = ".join(dict.fromkeys([p.path, *others])) + ("" if p.trains else " (frozen)")
        rows.append([name, str(tuple(p.tensor.shape)), *[_short(column[i]) for column in columns]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(parameters: _Parameters, name: str, values: Tree) -> list[Any]:
    """Give each parameter its value."""
    numbered = parameters.build(range(len(parameters.listed)))
    found = tree.broadcast_prefix(values, numbered, f"The values of {name!r}")
    by_number = dict(zip(tree.flatten(numbered)[0], found, strict=True))
    return [by_number[number] for number in range(len(parameters.listed))]
