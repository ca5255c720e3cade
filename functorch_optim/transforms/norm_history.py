"""Clipping by the past norms of the gradients: the bound follows the training."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import (
    Hyperparameter,
    at,
    check,
    check_choice,
    check_integer,
)
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import double, minimum, safe_sqrt, where
from functorch_optim.transforms.clipping import finite_norm
from functorch_optim.transforms.scaling import scaled
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved


class ZClipCarried(NamedTuple):
    """The numbers that ZClip's scalars carry on.

    Attributes:
        num_norms: number of finite norms so far.
        mean: mu.
        var: sigma^2.
    """

    num_norms: Any
    mean: Any
    var: Any


class ZClipState(NamedTuple):
    """The state of `zclip`: `step`, and statistics of the norms. It keeps nothing for single parameters."""


leaf_state(ZClipState, ZClipCarried)


@factory
def zclip(
    alpha: Hyperparameter = 0.97,
    z_thresh: Hyperparameter = 2.5,
    max_grad_norm: Hyperparameter | None = 1.0,
    eps: Hyperparameter = 1e-6,
    warmup_steps: int = 25,
    mode: Literal["zscore", "percentile"] = "zscore",
    clip_option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling",
    clip_factor: Hyperparameter = 1.0,
    skip_update_on_spike: bool = False,
) -> GradientTransformation:
    """Clip gradients whose norm is a spike, by the mean and variance of the norms before (ZClip).

        n = |g|, over the whole tree;  z = (n - mu) / (sigma + eps)
        n* = clip_factor (mu + z_thresh sigma / (z / z_thresh))  if z > z_thresh,  else  n
        mu <- alpha mu + (1 - alpha) n*
        sigma^2 <- alpha sigma^2 + (1 - alpha) (n* - mu)^2,  with the new mu
        g <- g min(1, c / (n + eps)),  c = min(n*, max_grad_norm)

    In the first `warmup_steps` updates no norm is a spike, and mu and sigma^2 are the mean and variance of all norms
    so far. A norm that is NaN or infinite changes no statistic and does not count; its updates are not changed.

    Derivatives flow through the norm, the bound and the statistics. The decision whether a norm is a spike is a
    constant to them.

    Args:
        alpha: decay rate of mu and sigma^2, in [0, 1): number, 0-dim tensor, or schedule.
        z_thresh: number of standard deviations > 0 above which a norm is a spike.
        max_grad_norm: further bound >= 0 of every norm; None for none.
        eps: added to sigma and to the norm, >= 0.
        warmup_steps: number of norms >= 1 in the first mean and variance.
        mode: "zscore", as above; "percentile": a norm is a spike above mu + z_thresh sigma, and n* is this bound.
        clip_option: n* of a spike in the mode "zscore": "adaptive_scaling", as above, or "mean", which is mu.
        clip_factor: factor >= 0 of n* with "adaptive_scaling".
        skip_update_on_spike: whether a spike changes no statistic.

    Returns:
        Transformation whose state has `step`, `num_norms`, `mean` and `var`, once for the tree.

    Raises:
        ValueError: a number is out of range, or a word is none of those above.
        TypeError: `warmup_steps` is no integer; a number other than `max_grad_norm` is a tree, and the statistics are
            one for all parameters.

    Source: Kumar et al., ZClip: Adaptive Spike Mitigation for LLM Pre-Training, arXiv:2504.02507, algorithm 1, and
    further arguments of their code.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.zclip(warmup_steps=3, max_grad_norm=None)
        >>> state = tx.init(torch.zeros(1))
        >>> for g in (1.0, 2.0, 1.5, 100.0):
        ...     updates, state = tx.update(torch.tensor([g]), state)
        >>> updates
        tensor([1.5106])
    """
    check("alpha", alpha, "0 <= value < 1", trees=False)
    check("z_thresh", z_thresh, "value > 0", trees=False)
    if max_grad_norm is not None:
        check("max_grad_norm", max_grad_norm)
    check("eps", eps, trees=False)
    check_integer("warmup_steps", warmup_steps, 1)
    check_choice("mode", mode, "zscore", "percentile")
    check_choice("clip_option", clip_option, "adaptive_scaling", "mean")
    check("clip_factor", clip_factor, trees=False)

    def bound(n: Any, mean: Any, var: Any, step: Any) -> tuple[Any, Any]:
        """Tell whether a norm is a spike, and return the norm that a spike is cut to."""
        sigma, thresh = safe_sqrt(var), at(z_thresh, step)
        if mode == "percentile":
            return n > mean + thresh * sigma, mean + thresh * sigma
        above, least = n - mean, thresh * (sigma + at(eps, step))
        spike = above > least  # z > z_thresh; sigma and eps may be zero
        if clip_option == "mean":
            return spike, mean
        return spike, at(clip_factor, step) * (mean + thresh * sigma * least / where(spike, above, 1.0))

    def scalars(step: Tensor, carried: ZClipCarried, *, updates: list[Tensor]) -> Any:
        n, finite = finite_norm(updates, 2.0, step)
        count, mean, var = carried.num_norms + 1, carried.mean, carried.var
        warm = count > warmup_steps
        spike, cut = bound(n, mean, where(warm, var, 1.0), step)
        spike = spike & warm
        kept = where(spike, cut, n)
        # In the warm-up all norms have the same weight, in an incremental mean and variance.
        a = where(warm, at(alpha, step), 1 - 1 / count)
        new_mean = a * mean + (1 - a) * kept
        deviation = where(warm, kept - new_mean, kept - mean)
        new_var = a * var + (1 - a) * deviation * (kept - new_mean)
        largest = kept if max_grad_norm is None else minimum(kept, at(max_grad_norm, step))
        changes = finite & ((spike ^ True) if skip_update_on_spike else True)
        numbers = ZClipCarried(
            where(finite, count, carried.num_norms), where(changes, new_mean, mean), where(changes, new_var, var)
        )
        # An update within the bound is not divided by its norm plus eps.
        fits = n <= largest
        factor = where(fits, 1.0, largest / where(fits, 1.0, n + at(eps, step)))
        return where(finite, factor, 1.0), numbers

    def update(g: Tensor, state: Any, p: Tensor | None, factor: Any) -> Any:
        return factor * g, state

    def carry() -> ZClipCarried:
        return ZClipCarried(0.0, 0.0, 0.0)

    return leafwise(ZClipState, update, scalars, carry=carry, elementwise=True, sparse="touched")


@saved
class AutoClipState(NamedTuple):
    """The state of `autoclip`, once for the tree.

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
        num_norms: number of norms so far that were finite: 0-dim int64 tensor.
        norms: the latest of them, in a ring: float64 tensor, `(window,)`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.autoclip(10.0, window=2).init(torch.zeros(2)).norms
        tensor([0., 0.], dtype=torch.float64)
    """

    step: Tensor
    num_norms: Tensor
    norms: Tensor


@factory
def autoclip(
    percentile: Hyperparameter = 10.0, window: int = 1000, *, eps: Hyperparameter = 0.0
) -> GradientTransformation:
    """Clip gradients to a percentile of the norms so far, that of this step included (AutoClip).

        c = percentile of |g_1|, ..., |g_t|;  g <- g min(1, c / (|g| + eps)), |g| over the whole tree

    Percentiles are interpolated linearly, as numpy's. Derivatives flow through the norms of this and earlier steps, and
    through the percentile; the order of the norms is a constant to them. A norm that is NaN or infinite is not kept,
    and its updates are not changed.

    Args:
        percentile: number in [0, 100]: number, 0-dim tensor, or schedule.
        window: number >= 1 of the latest norms that are kept. The paper keeps all.
        eps: number >= 0 added to the norm; 1e-6 gives the numbers of `torch.nn.utils.clip_grad_norm_`.

    Returns:
        Transformation whose state is an `AutoClipState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `window` is no integer, or a number is a tree.

    Source: Seetharaman et al., AutoClip: Adaptive Gradient Clipping for Source Separation Networks, arXiv:2007.14469.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.autoclip(percentile=50)
        >>> state = tx.init(torch.zeros(1))
        >>> for g in (1.0, 2.0, 30.0):
        ...     updates, state = tx.update(torch.tensor([g]), state)
        >>> updates
        tensor([2.])
    """
    check("percentile", percentile, "0 <= value <= 100", trees=False)
    check_integer("window", window, 1)
    check("eps", eps, trees=False)

    def init(params: Tree) -> AutoClipState:
        device = tree.device_of(params)
        return AutoClipState(
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
            torch.zeros(window, dtype=torch.float64, device=device),
        )

    def update(updates: Tree, state: AutoClipState, params: Tree) -> tuple[Tree, AutoClipState]:
        step = state.step + 1
        given = [u for u in tree.flatten(updates)[0] if u is not None]
        t = double(step)
        norm, finite = finite_norm(given, 2.0, t)
        places = torch.arange(window, device=state.norms.device)
        here = (places == state.num_norms % window) & finite
        norms = torch.where(here, norm, state.norms)
        count = state.num_norms + finite
        largest = _quantile(norms, torch.clamp(count, max=window), at(percentile, t) / 100)
        fits = (norm <= largest) | (finite ^ True)
        factor = where(fits, 1.0, largest / where(fits, 1.0, norm + at(eps, t)))
        return tree.map(lambda g: scaled(g, factor), updates), AutoClipState(step, count, norms)

    return GradientTransformation(init, update)


def _quantile(ring: Tensor, count: Tensor, part: Any) -> Tensor:
    """Return a quantile of the first `count` numbers of a ring, interpolated; 0 of none."""
    filled = torch.arange(len(ring), device=ring.device) < count
    ordered = torch.where(filled, ring, torch.inf).sort().values
    place = part * torch.clamp(count - 1, min=0).to(torch.float64)
    below = torch.floor(place)
    indices = torch.stack([below, torch.minimum(below + 1, count - 1)]).clamp(min=0).to(torch.int64)
    # Without any number, the first place is still infinite.
    lower, upper = torch.where(count > 0, ordered.gather(0, indices), 0.0)
    return torch.lerp(lower, upper, place - below)
