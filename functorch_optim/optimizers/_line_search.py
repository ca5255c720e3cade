"""The line search of L-BFGS: a step length that satisfies the strong Wolfe conditions.

    f(x + t d) <= f(x) + c1 t g'd      the loss falls enough
    |g(x + t d)'d| <= -c2 g'd          the slope has become flat enough

It is written as a state machine of single evaluations, so that each turn of a loop takes one evaluation. `begin` sets
the first trial. `advance` takes loss and slope at the trial, and sets the next trial or ends the search.

A trial with a loss or slope that is not finite is outside of the function's domain. It counts as a trial with an
infinite loss, so that the search turns back and halves the step. torch.optim goes on further out.

Source: Nocedal & Wright, Numerical Optimization, 2nd edition, algorithms 3.5 (bracketing) and 3.6 (zoom), in the
version of minFunc and torch.optim.LBFGS.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_optim._control import cond, same, select
from functorch_optim._numerics import safe_sqrt

C1, C2 = 1e-4, 0.9


class Point(NamedTuple):
    """An evaluation on the line.

    Attributes:
        t: step length.
        f: loss at x + t d.
        g: gradient there: vector.
        gtd: g'd, the slope there.
    """

    t: Tensor
    f: Tensor
    g: Tensor
    gtd: Tensor


class Search(NamedTuple):
    """A line search between two trials. All fields are 0-dim tensors, except the gradients of the points.

    Attributes:
        t: step length of the next trial.
        gtd: slope at the start.
        low: while bracketing, the trial before; while zooming, the better end of the bracket; when done, the result.
        high: the other end of the bracket.
        low_first: whether `low` is the older end. torch.optim resolves ties by it.
        trials: number of evaluations so far.
        zooming: whether a bracket has been found.
        lagging: whether the last trial was close to an end of the bracket.
        done: whether `low` is the result.
    """

    t: Tensor
    gtd: Tensor
    low: Point
    high: Point
    low_first: Tensor
    trials: Tensor
    zooming: Tensor
    lagging: Tensor
    done: Tensor


def begin(f: Tensor, g: Tensor, gtd: Tensor, t: Tensor) -> Search:
    """Begin a search.

    Args:
        f: loss at the start.
        g: gradient at the start.
        gtd: slope at the start.
        t: first trial.
    """
    start = Point(torch.zeros_like(t), f, g, gtd)
    no = torch.zeros((), dtype=torch.bool, device=t.device)
    trials = torch.zeros((), dtype=torch.int64, device=t.device)
    return Search(t, gtd, start, start, no, trials, no, no, no)


def advance(
    search: Search,
    new: Point,
    f: Tensor,
    g: Tensor,
    d_norm: Tensor,
    is_last: Tensor,
    tolerance_change: float,
    until_lower: Tensor | None = None,
) -> Search:
    """Continue a search with an evaluation at `search.t`.

    Args:
        search: the search before this evaluation.
        new: the evaluation.
        f: loss at the start.
        g: gradient at the start.
        d_norm: largest element of |d|.
        is_last: whether no further evaluation may follow.
        tolerance_change: the search ends when no parameter changes by more than this over the bracket.
        until_lower: whether further evaluations may follow in spite of `is_last` until a lower loss is found.

    Returns:
        The search; when it is done, `low` is the point to go to.
    """
    new = _bounded(new, f.isfinite() & search.gtd.isfinite())
    if until_lower is not None:
        is_lower = (new.f < f) | (search.zooming & (search.low.f < f))
        is_last = is_last & (is_lower | ~until_lower)
    enough = f + C1 * new.t * search.gtd
    flat = new.gtd.abs() <= -C2 * search.gtd

    def bracket(search: Search) -> Search:
        previous = search.low
        high = (new.f > enough) | ((search.trials > 1) & (new.f >= previous.f))
        done = is_last | (~high & flat)
        zooming = ~done & (high | (new.gtd >= 0))
        start = Point(torch.zeros_like(new.t), f, g, search.gtd)
        other = select(is_last, start, select(zooming, previous, new))
        low_first = other.f <= new.f
        low, high_point = select(low_first, (other, new), (new, other))
        t = cond(done | zooming, same, lambda t: _extrapolated(previous, new), search.t)
        return search._replace(t=t, low=low, high=high_point, low_first=low_first, zooming=zooming, done=done)

    def zoom(search: Search) -> Search:
        low, high = search.low, search.high
        worse = (new.f > enough) | (new.f >= low.f)

        def replace_high(search: Search) -> Search:
            stays = select(search.low_first, low.f <= new.f, ~(new.f <= low.f))
            ends = select(stays, (low, new), (new, low))
            return search._replace(low=ends[0], high=ends[1], low_first=search.low_first == stays)

        def replace_low(search: Search) -> Search:
            passed = new.gtd * (high.t - low.t) >= 0  # the minimum lies between the old low and the new
            return search._replace(low=new, high=select(~flat & passed, low, high))

        search = cond(worse, replace_high, replace_low, search)
        return search._replace(done=is_last | (~worse & flat))

    def narrow(search: Search) -> Search:
        is_small = (search.high.t - search.low.t).abs() * d_norm < tolerance_change
        return cond(is_small, lambda search: search._replace(done=is_small), _with_trial, search)

    search = cond(search.zooming, zoom, bracket, search)
    search = search._replace(trials=search.trials + 1)
    return cond(search.zooming & ~search.done, narrow, same, search)


def _bounded(new: Point, begins_well: Tensor) -> Point:
    """Give a trial outside of the domain an infinite loss, unless the search begins outside, too."""
    fails = begins_well & ~(new.f.isfinite() & new.gtd.isfinite())
    nowhere = Point(new.t, torch.full_like(new.f, torch.inf), torch.zeros_like(new.g), torch.zeros_like(new.gtd))
    return select(fails, nowhere, new)


def _extrapolated(previous: Point, new: Point) -> Tensor:
    """Step further, to the minimum of a cubic, but at most 10 times as far."""
    return _cubic_minimum(previous, new, new.t + 0.01 * (new.t - previous.t), new.t * 10)


def _with_trial(search: Search) -> Search:
    """Try the minimum of a cubic next; if it is too close to an end of the bracket, move it a tenth away from it."""
    left, right = torch.minimum(search.low.t, search.high.t), torch.maximum(search.low.t, search.high.t)
    t = _cubic_minimum(search.low, search.high, left, right)
    eps = 0.1 * (right - left)
    is_close = torch.minimum(right - t, t - left) < eps
    moves = is_close & (search.lagging | (t >= right) | (t <= left))
    moved = select((t - right).abs() < (t - left).abs(), right - eps, left + eps)
    return search._replace(t=select(moves, moved, t), lagging=is_close & ~moves)


def _cubic_minimum(p: Point, q: Point, smallest: Tensor, largest: Tensor) -> Tensor:
    """Find the minimum of the cubic with the losses and slopes of two points; the middle if it has no minimum.

        d1 = g1 + g2 - 3 (f1 - f2) / (t1 - t2)
        d2 = sqrt(d1^2 - g1 g2)
        t = t2 - (t2 - t1) (g2 + d2 - d1) / (g2 - g1 + 2 d2)      for t1 <= t2

    Source: Nocedal & Wright, equation 3.59.
    """
    (t1, g1), (t2, g2) = select(p.t <= q.t, ((p.t, p.gtd), (q.t, q.gtd)), ((q.t, q.gtd), (p.t, p.gtd)))
    gap = p.t - q.t
    # torch divides a number by a tensor like this; a true division rounds otherwise.
    rise = p.f - q.f
    is_bounded = rise.isfinite()
    d1 = p.gtd + q.gtd - 3 * rise.masked_fill(~is_bounded, 0) * gap.masked_fill(gap == 0, 1).reciprocal()
    square = d1 * d1 - g1 * g2
    exists = is_bounded & (square >= 0)
    d2 = safe_sqrt(square.masked_fill(~exists, 0))
    top, bottom = g2 + d2 - d1, g2 - g1 + 2 * d2
    # On a straight line the minimum is at infinity, and is clamped: the derivative must not be inf * 0.
    infinite = (t2 - (t2 - t1) * (top / bottom)).detach()
    minimum = t2 - (t2 - t1) * (top / bottom.masked_fill(bottom == 0, 1))
    t = torch.where(bottom == 0, infinite, minimum).clamp(smallest, largest)
    return torch.where(exists, t, (smallest + largest) / 2)
