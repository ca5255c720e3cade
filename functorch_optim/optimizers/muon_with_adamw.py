"""Muon for the matrices of hidden layers and AdamW for all other parameters, in one call."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from functorch_optim import tree
from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import Hyperparameter, check, check_each
from functorch_optim._core.parts import Parts, in_parts
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers._newton_schulz import JORDAN, Coefficients
from functorch_optim.optimizers.adam import adamw
from functorch_optim.optimizers.muon import muon
from functorch_optim.tree import Tree

Route: TypeAlias = Callable[[str, Tensor], str] | nn.Module | Tree | None

_LABELS = ("muon", "adamw")
_OUTER = re.compile(
    r"(^|[._])(emb|embed|embedder|embedding|embeddings|wte|wpe|tok|token|tokens|vocab|unembed|unembedding|head|heads|"
    r"classifier|logits|bias)([._\d]|$)|^(fc|out|output)\.",
    re.IGNORECASE,
)


def muon_route(name: str, tensor: Tensor) -> Literal["muon", "adamw"]:
    """Tell by name and dimensions which optimizer a parameter gets from `muon_with_adamw`.

    Args:
        name: path of the parameter, such as "blocks.0.attn.q_proj.weight".
        tensor: the parameter.

    Returns:
        "adamw" for a tensor of fewer than two dimensions, and where a word of the name is one for embeddings, heads or
        biases: embed, embedding, emb, wte, wpe, tok, token, vocab, head, heads, classifier, logits, bias and the like;
        or where the name begins with "fc.", "out." or "output.". "muon" otherwise.

    Example:
        >>> import functorch_optim as fo, torch
        >>> [fo.muon_route(name, torch.zeros(4, 4)) for name in ("blocks.0.mlp.weight", "lm_head.weight")]
        ['muon', 'adamw']
    """
    return "adamw" if tensor.ndim < 2 or _OUTER.search(name) else "muon"


def _route_in(module: nn.Module) -> Callable[[str, Tensor], str]:
    """Route the parameters of a module by its submodules."""
    named = list(module.named_parameters(remove_duplicate=False))
    outer = {
        p
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag)
        for p in part.parameters(recurse=False)
    }
    outer.update([p for _, p in named if p.ndim > 1][-1:])  # the last layer
    outer.update([p for name, p in named if muon_route(name, p) == "adamw"])  # tied ones have several names
    labels = {name: "adamw" if p in outer else "muon" for name, p in named}

    def route(name: str, tensor: Tensor) -> str:
        if name not in labels:
            raise ValueError(
                f"The route is a {type(module).__name__}, which has no parameter {name!r}; give the parameters by "
                "name: Optimizer(model.named_parameters(), muon_with_adamw, route=model), or init(params_of(model))"
            )
        return labels[name]

    return route


def _labelled(route: Route) -> Any:
    """Turn a route into labels for `partition`, or into a function of the parameters."""
    if isinstance(route, nn.Module):
        route = _route_in(route)
    one: Any = muon_route if route is None else route
    if not tree.is_leaf(one) or not callable(one):
        return one

    def labels(params: Tree) -> Tree:
        leaves, structure = tree.flatten(params)
        named = zip(tree.paths(params), leaves, strict=True)
        return tree.unflatten(structure, [None if p is None else one(name, p) for name, p in named])

    return labels


def _parted(group: dict[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Part a param group into one for Muon and one for AdamW, whose `lr` is the learning rate of each."""
    given = {**defaults, **group}
    route, adamw_lr = given["route"], given["adamw_lr"]
    if isinstance(route, str) and (adamw_lr is None or ("lr" in group and "adamw_lr" not in group)):
        return [group] if adamw_lr is None else [{**group, "adamw_lr": None}]
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    names = [p[0] if isinstance(p, tuple) else str(i) for i, p in enumerate(params)]
    tensors = [p[1] if isinstance(p, tuple) else p for p in params]
    labels = _labelled(route)
    if isinstance(labels, Mapping):  # of all groups
        chosen = [labels.get(name) for name in names]
    elif callable(labels):
        found = labels(dict(zip(names, tensors, strict=True)))
        chosen = [found[name] for name in names]
    else:
        chosen = [labels] * len(names)
    for name, label in zip(names, chosen, strict=True):
        if label not in _LABELS:
            raise ValueError(
                f"The route of {name!r} is {label!r}; let it be 'muon' or 'adamw'. A route is a function of name and "
                "tensor, a module, or a dict of all names"
            )
    own: dict[str, dict[str, Any]] = {"muon": {}, "adamw": {}}
    if adamw_lr is not None:
        own["adamw"]["lr"] = adamw_lr
    if given["adamw_weight_decay"] is not None:
        own["adamw"]["weight_decay"] = given["adamw_weight_decay"]
    parts = []
    for label in _LABELS:
        members = [p for p, one in zip(params, chosen, strict=True) if one == label]
        if members:
            shared = {"params": members, "route": label, "adamw_lr": None, "adamw_weight_decay": None}
            parts.append({**group, **shared, **own[label]})
    return parts or [{**group, "params": params, "route": "muon", "adamw_lr": None}]


@factory
@in_parts(Parts(_parted, ("lr", "adamw_lr")))
def muon_with_adamw(
    lr: Hyperparameter = 0.02,
    adamw_lr: Hyperparameter | None = 3e-4,
    weight_decay: Hyperparameter = 0.0,
    momentum: Hyperparameter = 0.95,
    nesterov: bool = True,
    ns_coefficients: Coefficients = JORDAN,
    eps: Hyperparameter = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: Literal["original", "match_rms_adamw", "unit_rms"] | None = None,
    *,
    adamw_betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.95),
    adamw_eps: Hyperparameter = 1e-10,
    adamw_weight_decay: Hyperparameter | None = None,
    route: Route = None,
    flatten: bool | None = None,
    ns_dtype: torch.dtype | None = torch.bfloat16,
    maximize: bool = False,
) -> GradientTransformation:
    """Train a whole model: the matrices of hidden layers with Muon, all other parameters with AdamW.

        partition({"muon": muon(lr, ...), "adamw": adamw(adamw_lr, ...)}, labels by route)

    Args:
        lr: learning rate of Muon, >= 0: number, 0-dim tensor, or schedule.
        adamw_lr: that of AdamW. None: the same, as with adjust_lr_fn="match_rms_adamw".
        weight_decay: of Muon, decoupled, >= 0.
        momentum: see `scale_by_muon`.
        nesterov: see `scale_by_muon`.
        ns_coefficients: see `scale_by_muon`.
        eps: see `scale_by_muon`.
        ns_steps: see `scale_by_muon`.
        adjust_lr_fn: see `scale_by_muon`.
        adamw_betas: see `scale_by_adam`.
        adamw_eps: see `scale_by_adam`.
        adamw_weight_decay: of AdamW. None: that of Muon.
        route: which parameter gets which. None: `muon_route`, by name and number of dimensions. A module: by its
            parts, so that embeddings, the last layer and parameters tied to them get AdamW too, whatever their names. A
            function (name, tensor) -> "muon" or "adamw". A tree of these words like the parameters, or a prefix of one.
        flatten: see `scale_by_muon`.
        ns_dtype: see `scale_by_muon`.
        maximize: ascend instead; parameters still shrink.

    Returns:
        Transformation whose state is a dict: "muon" and "adamw".

    Raises:
        ValueError: a number is out of range; a route is neither word, or does not fit the parameters; Muon is given a
            vector.
        TypeError: Muon is given a complex parameter.

    `Optimizer(model.named_parameters(), muon_with_adamw, lr=0.02, adamw_lr=3e-4)` parts each of its groups in two, for
    Muon and for AdamW. Each has its learning rate under "lr", so that torch's schedulers drive both.

    Defaults are those of Jordan's MuonWithAuxAdam. Source: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> opt = fo.Optimizer(model.named_parameters(), fo.muon_with_adamw, lr=0.02, adamw_lr=1e-3, route=model)
        >>> [(group["route"], group["lr"], group["param_names"]) for group in opt.param_groups]
        [('muon', 0.02, ['0.weight']), ('adamw', 0.001, ['0.bias', '2.weight', '2.bias'])]
    """
    check("adamw_lr", 0.0 if adamw_lr is None else adamw_lr)
    check_each("adamw_betas", adamw_betas, ("0 <= value < 1",) * 2, "(0.9, 0.95)")
    check("adamw_eps", adamw_eps)
    check("adamw_weight_decay", 0.0 if adamw_weight_decay is None else adamw_weight_decay)
    own_lr = lr if adamw_lr is None else adamw_lr
    own_decay = weight_decay if adamw_weight_decay is None else adamw_weight_decay
    matrices = muon(
        lr,
        weight_decay,
        momentum,
        nesterov,
        ns_coefficients,
        eps,
        ns_steps,
        adjust_lr_fn,
        flatten=flatten,
        ns_dtype=ns_dtype,
        maximize=maximize,
    )
    others = adamw(own_lr, adamw_betas, adamw_eps, own_decay, maximize=maximize)
    return partition({"muon": matrices, "adamw": others}, _labelled(route))
