"""Uses of labels: decay, layer-wise learning rates, frozen parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import nn

from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import check, check_choice, check_number
from functorch_optim._core.transformation import GradientTransformation, check_transformation
from functorch_optim._labels.matching import ERROR, labels_of, matched, matches, terms_of
from functorch_optim._labels.parameters import Parameter, parameters_of
from functorch_optim.schedules import Schedule
from functorch_optim.transforms.zeros import set_to_zero
from functorch_optim.tree import Tree

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_BIAS = re.compile(r"bias[^.]*$")
_EMBEDDING = re.compile(r"embed[^.]*$|token$")
_EMBEDDING_WEIGHT = re.compile(r"embed[^.]*\.weight$")
_OF_HUGGING_FACE = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


def _is_plain_weight(p: Parameter) -> bool:
    own = [owners[-1] for owners in p.owners]
    names = [_BIAS, _EMBEDDING] if own else [_BIAS, _EMBEDDING, _EMBEDDING_WEIGHT]
    of_type = any(isinstance(module, (*_NORMS, *_EMBEDDINGS)) for module in own)
    return not (p.tensor.ndim <= 1 or of_type or any(name.search(path) for name in names for path in p.paths))


def _decays_in_timm(p: Parameter) -> bool:
    return p.tensor.ndim > 1 and not p.path.endswith(".bias")


def _decays_in_hugging_face(p: Parameter) -> bool:
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
    parameters = parameters_of(module_or_tree, "weight_decay_mask")
    excluded = matched([exclude] if terms_of(exclude, parameters) else [], parameters)
    out = {p.path for those in excluded for p in those}
    if rule == "timm":
        globs: Collection[str] = getattr(module_or_tree, "no_weight_decay", tuple)()
        out |= {p.path for p in parameters.listed if any(matches(glob, p) for glob in globs)}
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
        ValueError: a parameter is in no layer; a pattern matches nothing; a group finds no number; a number is out of
            range.
        TypeError: `lr` is neither a number nor a tensor nor a schedule.

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
    check("learning rate", lr, trees=False)
    parameters = parameters_of(module_or_tree, "layer_decay")
    matchers = list(layers) if isinstance(layers, list | tuple) else [layers]
    rules = [(matcher, place) for place, matcher in enumerate(matchers)]
    places = zip(parameters.listed, labels_of(parameters, rules, ERROR), strict=True)
    keys = [(place, *_numbers(terms_of(matchers[place], parameters), p)) for p, place in places]
    ordered = sorted(set(keys))
    scales = [max(decay ** (len(ordered) - 1 - depth), min_scale) for depth in range(len(ordered))]
    rate = Schedule.of(lr) if callable(lr) else lr
    rates = dict(zip(ordered, [rate * scale for scale in scales], strict=True))
    return parameters.build([rates[key] for key in keys])


def _numbers(terms: Sequence[Any], p: Parameter) -> tuple[int, ...]:
    """Return the numbers that the groups of the first regular expression find that matches a parameter."""
    term = next(term for term in terms if matches(term, p))
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
    parameters = parameters_of(module_or_tree, "frozen")
    rules = [(matcher, "frozen")] if terms_of(matcher, parameters) else []
    return partition({"train": tx, "frozen": set_to_zero()}, parameters.build(labels_of(parameters, rules, "train")))
