"""QK-Clip: MuonClip's addition to Muon, which keeps the logits of attention bounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import check_number
from functorch_optim.tree import Tree

_QUERY = ("q_proj", "q_proj_weight", "query", "wq", "to_q", "q_lin", "q")
_KEY = ("k_proj", "k_proj_weight", "key", "wk", "to_k", "k_lin", "k")
_FUSED = ("in_proj_weight", "in_proj_bias", "qkv", "qkv_proj", "Wqkv")


def qk_clip(
    params: Tree,
    max_logits: Tensor | Sequence[float] | float | Mapping[str, Any],
    tau: float | Tensor = 100.0,
    *,
    alpha: float = 0.5,
    query: Sequence[str] = _QUERY,
    key: Sequence[str] = _KEY,
    fused: Sequence[str] = _FUSED,
    rotary: Sequence[str] = (),
) -> Tree:
    """Scale the query and key weights of the heads whose largest logit is more than tau.

        gamma = min(1, tau / S)  for each head
        W_q <- gamma^alpha W_q,  W_k <- gamma^(1 - alpha) W_k

    Args:
        params: tree of tensors, after the step.
        max_logits: S, for each head the largest q k / sqrt(d) of the batch, as the forward pass has seen it: a vector
            or list, or one number for all heads. Of a model with several attentions: a dict from the path of each to
            its S. An S that is not finite, or at most tau, changes nothing.
        tau: largest logit, > 0: number or 0-dim tensor.
        alpha: the part of queries, a number in [0, 1].
        query: names of query projections: parts of a path below the attention. Biases are scaled too. Their first
            dimension is heads, or heads times the size of a head.
        key: names of key projections. Where there are fewer key heads, each serves as many queries: it is scaled for
            the least clipped of them, and the queries make up for the rest.
        fused: names of projections with three parts: the rows of queries, keys and values, as in
            torch.nn.MultiheadAttention.
        rotary: names of query projections that are multiplied by gamma, for their keys are shared by all heads, as in
            multi-head latent attention.

    Returns:
        Tree like `params`, with new tensors where something is scaled, and the given ones elsewhere.

    Raises:
        ValueError: tau or alpha is out of range; there is no query or key below a path, or more than one; the number of
            heads does not divide the rows.

    A function of parameters and no transformation, for it needs S. It is differentiable, and runs under torch.func.

    Source: Kimi Team, Kimi K2, arXiv:2507.20534, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = {"attn": {"q_proj": torch.ones(2, 3), "k_proj": torch.ones(2, 3)}}
        >>> clipped = fo.qk_clip(params, {"attn": torch.tensor([400.0, 50.0])}, tau=100.0)
        >>> clipped["attn"]["q_proj"]
        tensor([[0.5000, 0.5000, 0.5000],
                [1.0000, 1.0000, 1.0000]])
    """
    if not isinstance(tau, Tensor):
        check_number("tau", tau, "value > 0")
    check_number("alpha", alpha, "0 <= value <= 1")
    leaves, structure = tree.flatten(params)
    paths = tree.paths(params)
    by_path = max_logits if isinstance(max_logits, Mapping) else {"": max_logits}
    by_path = _as_tensors(by_path)
    for path, logits in zip(tree.paths(by_path), tree.flatten(by_path)[0], strict=True):
        below = {i: name[len(path) :].strip(".").split(".") for i, name in enumerate(paths) if _is_below(name, path)}
        found = {
            role: [i for i, parts in below.items() if not {*parts}.isdisjoint(words)]
            for role, words in {"query": query, "key": key, "fused": fused, "rotary": rotary}.items()
        }
        found["query"] = [i for i in found["query"] if i not in found["rotary"]]
        _check_found(path, found, leaves, [paths[i] for i in below])
        gamma = _gamma(logits.reshape(-1), tau)
        for role in ("query", "key", "rotary"):
            for i in found[role]:
                where = paths[i]
                of_query, of_key = _factors(gamma, alpha, _key_heads(leaves, found, gamma, where))
                factor = {"query": of_query, "key": of_key, "rotary": gamma}[role]
                leaves[i] = _scaled(leaves[i], factor, where)
        for i in found["fused"]:
            if leaves[i].shape[0] % 3:
                raise ValueError(f"{paths[i]!r} has {leaves[i].shape[0]} rows: not as many queries, keys and values")
            q, k, v = leaves[i].chunk(3)
            of_query, of_key = _factors(gamma, alpha, gamma.numel())
            leaves[i] = torch.cat([_scaled(q, of_query, paths[i]), _scaled(k, of_key, paths[i]), v])
    return tree.unflatten(structure, leaves)


def _as_tensors(logits: Any) -> Any:
    """Return logits as a tensor, and a dict of them, by path, as a dict of tensors."""
    if isinstance(logits, Mapping):
        return {path: _as_tensors(some) for path, some in logits.items()}
    return logits if isinstance(logits, Tensor) else torch.as_tensor(logits, device="cpu")


def _is_below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _check_found(path: str, found: dict[str, list[int]], leaves: list[Any], names: list[str]) -> None:
    matrices = {role: [i for i in some if leaves[i].ndim > 1] for role, some in found.items()}
    count = len(matrices["query"]), len(matrices["key"]), len(matrices["fused"])
    if count not in ((1, 1, 0), (0, 0, 1)):
        raise ValueError(
            f"Below {path!r} there are {count[0]} query, {count[1]} key and {count[2]} fused projections, and an "
            f"attention has one of each, or a fused one; there are {', '.join(names) or 'no parameters'}. Give a dict, "
            "path of the attention -> max_logits, and other names by query=, key= and fused="
        )


def _gamma(logits: Tensor, tau: float | Tensor) -> Tensor:
    over = torch.isfinite(logits) & (logits > tau)
    return torch.where(over, tau / torch.where(over, logits, torch.ones_like(logits)), torch.ones_like(logits))


def _key_heads(leaves: list[Any], found: dict[str, list[int]], gamma: Tensor, where: str) -> int:
    """Count the heads of keys."""
    rows = [next(leaves[i].shape[0] for i in found[role] if leaves[i].ndim > 1) for role in ("query", "key")]
    heads = gamma.numel()
    keys: int = rows[1] * heads // rows[0] if rows[0] else 0
    if keys > heads or (heads > 1 and (keys == 0 or heads % keys or rows[0] % heads or rows[1] % keys)):
        raise ValueError(f"max_logits has {heads} heads, which do not fit the {rows[0]} rows of queries at {where!r}")
    return max(keys, 1)


def _factors(gamma: Tensor, alpha: float, key_heads: int) -> tuple[Tensor, Tensor]:
    """Return the factors of queries and keys: for each head, gamma together."""
    of_group = gamma.reshape(key_heads, -1)
    least = of_group.amax(1, keepdim=True)
    return (of_group * least ** (alpha - 1)).reshape(-1), (least ** (1 - alpha)).reshape(-1)


def _scaled(p: Tensor, factor: Tensor, where: str) -> Tensor:
    heads = factor.numel()
    if p.shape[0] % heads:
        raise ValueError(f"max_logits has {heads} heads, which do not divide the {p.shape[0]} rows of {where!r}")
    rows = factor.to(p.device).repeat_interleave(p.shape[0] // heads)
    return (p * rows.reshape(-1, *[1] * (p.ndim - 1))).to(p.dtype)
