"""Cautious updates: only elements that go with the gradient move."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import check_choice
from functorch_optim._core.links import Link
from functorch_optim._core.rule import Rule, TreeRule
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution.representation import as_reals, like
from functorch_optim._numerics import mean_norm, safe_norm
from functorch_optim.wrappers._wrapping import inserted, wrapped, wrapper


def cautious(tx: Any, scaling: Literal["mean", "count"] = "mean", *, descends: bool | None = None) -> Any:
    """Keep only those elements of a direction u that have the sign of the gradient g, and enlarge them.

        k = 1 where u g > 0, else 0
        u <- u k / max(mean(k), 1e-3)      "mean"
        u <- u k n / (sum(k) + 1)          "count"

    For each tensor; n is the number of its elements. Of a transformation with a learning rate, u is the update before
    the learning rate and decoupled weight decay, which are not masked: `cautious(adamw(lr))` is
    `chain(cautious(scale_by_adam()), add_decayed_weights(wd), scale_by_learning_rate(lr))`. The trust ratio of `lamb`
    is that of the masked u, as in timm. In a partition each part has its own u and g.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        scaling: how the elements that are kept are enlarged. "mean" as in the authors' code for AdamW and in timm,
            "count" as in the paper and in the authors' Lion.
        descends: whether the update of `tx` goes downhill, against the gradient. None: found out. An optimizer that is
            one rule, such as `rprop`, descends, and otherwise the links before a learning rate, or all of a
            transformation without one, goes with the gradient. Say so for one that descends by other means, such as
            `lbfgs`.

    Returns:
        Transformation with the state of `tx`, in which that of the last link of the direction is a pair, unless this
        link decays the parameters itself, as `adamp` does.

    Raises:
        ValueError: `scaling` is neither of the two; or the direction ends in a rule that decays the parameters itself,
            as `adamp` does, behind links with a state.
        TypeError: `tx` is neither a transformation nor a factory.

    To derivatives the mask is a constant. g is the update that `tx` is given at its place in the chain, after
    `maximize` and the gates of wrappers such as `accumulate`. `muon` is masked after its orthogonalization, and not
    before, as in the authors' code. Real and imaginary parts of complex tensors are masked separately.

    Source: Liang et al., Cautious Optimizers, arXiv:2411.16085, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.cautious(fo.sgd(0.1, momentum=0.9)), torch.zeros(2)
        >>> state = tx.init(params)
        >>> for g in (1.0, 1.0), (1.0, -0.5):
        ...     updates, state = tx.update(torch.tensor(g), state, params)
        >>> updates
        tensor([-0.3800, -0.0000])
    """
    check_choice("scaling", scaling, "mean", "count")
    return wrapped(tx, _cautious, "cautious(adamw(1e-3))", scaling=scaling, descends=descends)


@wrapper
def _cautious(tx: GradientTransformation, scaling: str, descends: bool | None) -> GradientTransformation:
    for begin, end, down, of in reversed(_directions(tx._links, descends)):
        link, last = tx._links[of], tx._links[end - 1]
        if end > begin and isinstance(last.rule, Rule) and last.rule.decays:
            before = [one.rule for one in tx._links[begin : end - 1]]
            if not all([_is_stateless(rule) and not rule.needs_params for rule in before]):  # noqa: C419
                raise ValueError(
                    f"cautious masks no weight decay, and that of {last.rule.name} is in its rule, behind "
                    f"{before[0].name}: write chain(..., cautious({last.rule.name}(...))), or give weight_decay=0"
                )
            rule = _without_decay(last.rule, _mask(scaling, last.rule.turns))
            links = [*tx._links[: end - 1], last._replace(rule=rule), *tx._links[end:]]
            tx = GradientTransformation._of(links, tx._layout)
            continue
        rule = Rule(None, _alone(_mask(scaling, down)), norms=True, needs_params=True, sparse="dense")
        when = tuple([end - (of - back) for back in link.when])
        tx = inserted(tx, end, Link(rule, link.where, when, recalls=end - begin))
    return tx


class _Direction(NamedTuple):
    """Links that make a direction of a gradient.

    Attributes:
        begin: the first one.
        end: the one after the last.
        down: whether the direction goes against the gradient.
        of: a link that is for the same leaves and steps.
    """

    begin: int
    end: int
    down: bool
    of: int


def _directions(links: Sequence[Link], descends: bool | None) -> list[_Direction]:
    """Find the links before the learning rate of each part; all, where there is none."""
    found: dict[int, _Direction] = {}
    for k, link in enumerate(links if descends is None else ()):
        begin = k
        while begin and _is_part(links[begin - 1], link):
            begin -= 1
        rule = link.rule
        multiplies = isinstance(rule, Rule) and rule.init is None and not rule.needs_params
        if (rule.lr is None and not rule.turns) or (rule.lr is None and multiplies and k == begin):
            continue  # the latter is `maximize`
        if begin in found and not (
            _is_sign(links[found[begin].of].rule) and link.where == links[found[begin].of].where
        ):
            continue  # as is a change of sign before a learning rate
        end = k + 1
        if multiplies:  # and the links before it may be decay, and scale with it
            first = k
            while first > begin and _is_stateless(links[first - 1].rule):
                first -= 1
            end = next((j for j in range(first, k) if links[j].rule.needs_params), k)
        turns = [one.rule.turns for one in links[begin:end] if len(one.where) == len(link.where)]
        found[begin] = _Direction(_after_gates(links, begin, k), end, sum(turns) % 2 == 1, k)
    if found or not links:
        return list(found.values())
    last = len(links) - 1
    down = sum([link.rule.turns for link in links if not link.where]) % 2 == 1 if descends is None else descends
    return [_Direction(_after_gates(links, 0, last), last + 1, down, last)]


def _is_part(link: Link, of: Link) -> bool:
    """Tell whether a link is for some of the leaves of another, and for no others."""
    return len(link.where) >= len(of.where) and all(map(operator.is_, link.where, of.where))


def _is_sign(rule: Rule | TreeRule) -> bool:
    """Tell whether a rule is `maximize` or `scale`, which may stand for a learning rate."""
    return rule.lr is None and isinstance(rule, Rule) and rule.init is None


def _is_stateless(rule: Rule | TreeRule) -> bool:
    return isinstance(rule, Rule) and rule.init is None and (rule.elementwise or rule.norms)


def _after_gates(links: Sequence[Link], begin: int, k: int) -> int:
    """Find the place where link k is given the gradient: behind the gates that it is inside of."""
    return max([begin, *[k - back + 1 for back in links[k].when]])


def _mask(scaling: str, down: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the function of u and g, real ones, that keeps the elements of u which go with g, or down, against it."""

    def mask(u: Tensor, g: Tensor) -> Tensor:
        same = torch.sign(u) * torch.sign(g)  # of signs, for a product may be too small for its dtype
        k = torch.clamp_min(-same if down else same, 0).detach()  # faster than a choice, which guesses wrong
        if scaling == "mean":
            return u * k / torch.clamp_min(mean_norm(k), 1e-3)
        return u * k * safe_norm(torch.ones_like(u), 1) / (safe_norm(k, 1) + 1)

    return mask


def _alone(mask: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Make the update of a rule that masks the update of the links before it."""

    def cautious(u: Tensor, state: Any, g: Tensor, s: Any) -> tuple[Tensor, Any]:
        return like(mask(as_reals(u), as_reals(g)), u), state

    return cautious


def _without_decay(rule: Rule, mask: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """Mask the update of a rule that decays the parameters by itself, all but the decay."""
    whole = rule.update

    @functools.wraps(whole)
    def update(g: Tensor, state: Any, p: Tensor, s: Any) -> tuple[Tensor, Any]:
        given = as_reals(g), type(state)(*map(as_reals, state)), as_reals(p)  # as elementwise rules are given them
        u, new = whole(*given, s)
        direction, _ = whole(*given, s._replace(decay=0.0))
        masked = mask(direction, given[0]) + (u - direction)
        return like(masked, g), type(new)(*map(like, new, state))

    return replace(rule, update=update, elementwise=False, norms=rule.elementwise or rule.norms)
