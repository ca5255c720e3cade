"""Adafactor: second moments in factored form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory, of_rule
from functorch_optim._numerics import clamped_from_below, minimum, rms
from functorch_optim.optimizers._descent import check_real, uphill_or_down
from functorch_optim.tree import Tree
from functorch_optim.tree import map as tree_map


@leaf_state
class FactoredState(NamedTuple):
    """Adafactor's state for a parameter (..., n, m) of two dimensions or more.

    Attributes:
        row_var: R, running mean of the means of g^2 over columns: (..., n, 1).
        col_var: C, running mean of the means of g^2 over rows: (..., 1, m).
    """

    row_var: Tensor
    col_var: Tensor


@leaf_state
class UnfactoredState(NamedTuple):
    """Adafactor's state for a vector or a scalar.

    Attributes:
        variance: V, running mean of g^2: like p.
    """

    variance: Tensor


class AdafactorScalars(NamedTuple):
    """The numbers of Adafactor at a step.

    Attributes:
        weight: 1 - beta2_t = t^beta2_decay.
        rho: min(lr, 1 / sqrt(t)).
        eps1: of the estimate.
        eps2: smallest size of the parameters.
        d: clipping threshold.
        decay: lr weight_decay.
    """

    weight: Any
    rho: Any
    eps1: Any
    eps2: Any
    d: Any
    decay: Any


@factory
def adafactor(
    lr: Hyperparameter = 1e-2,
    beta2_decay: Hyperparameter = -0.8,
    eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
    d: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adafactor: adaptive as Adam, with the memory of a row and a column for each matrix.

        R <- beta2_t R + (1 - beta2_t) mean over columns of g^2,  beta2_t = 1 - t^beta2_decay
        C <- beta2_t C + (1 - beta2_t) mean over rows of g^2
        V = R C / max(mean(R), eps1)        for vectors and scalars: V <- beta2_t V + (1 - beta2_t) g^2
        w = g / sqrt(max(V, eps1^2))
        w <- w / max(1, RMS(w) / d)
        u = -min(lr, 1 / sqrt(t)) max(eps2, RMS(p)) w - lr weight_decay p

    Tensors of more than two dimensions are stacks of matrices, whose dimensions are the last two.

    Args:
        lr: largest relative step, >= 0, and the factor of weight decay: number, 0-dim tensor, or schedule.
        beta2_decay: exponent <= 0.
        eps: (eps1, eps2), >= 0. eps1 None: machine epsilon of the parameter's dtype.
        d: clipping threshold of the root mean square of a step, >= 1.
        weight_decay: decoupled, >= 0.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: a parameter is complex.

    The derivative of a maximum is that of its larger argument. At ties it is that of V, of RMS(w) / d and of RMS(p),
    and half of those of lr and of 1 / sqrt(t). A vector's first step has RMS(w) = 1, so with the default, d = 1, it
    counts as clipped.

    A NaN in the gradient of a vector stays in its element: if RMS(w) or RMS(p) is NaN, the maxima above are 1 and
    eps2. In a matrix it spreads, through the mean of R.

    Same numbers as torch.optim.Adafactor, with one exception: with eps1 None, torch uses the machine epsilon of the
    first parameter's dtype for all parameters. Differs from the paper as torch does: see its note on eps1 and lr.

    Source: Shazeer & Stern, arXiv:1804.04235, algorithms 4 and 5.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.adafactor(lr=0.1), torch.ones(2, 3)
        >>> updates, state = tx.update(torch.ones(2, 3), tx.init(params), params)
        >>> updates[0], fo.tree.get(state, "row_var").shape, fo.tree.get(state, "col_var").shape
        (tensor([-0.1000, -0.1000, -0.1000]), torch.Size([2, 1]), torch.Size([1, 3]))
    """
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise ValueError(f"Invalid eps: {eps!r}; give a pair, as in eps=(None, 1e-3)")
    eps1, eps2 = eps
    check("learning rate", lr)
    check("beta2_decay", beta2_decay, "value <= 0")
    check("epsilon1", 0.0 if eps1 is None else eps1)
    check("epsilon2", eps2)
    check("clipping threshold d", d, "value >= 1")
    check("weight_decay value", weight_decay)

    def scalars(step: Tensor) -> AdafactorScalars:
        return AdafactorScalars(
            weight=step ** at(beta2_decay, step),
            rho=minimum(step**-0.5, at(lr, step)),
            eps1=_machine_epsilon if eps1 is None else at(eps1, step),
            eps2=at(eps2, step),
            d=at(d, step),
            decay=at(lr, step) * at(weight_decay, step),
        )

    def step(g: Tensor, v: Tensor, p: Any, s: AdafactorScalars) -> Any:
        w = g * torch.rsqrt(torch.clamp_min(v, s.eps1 * s.eps1))
        w = w / clamped_from_below(rms(w) / s.d, 1)
        return -s.rho * clamped_from_below(rms(p), s.eps2) * w - s.decay * p

    def factored(g: Tensor, state: FactoredState, p: Any, s: AdafactorScalars) -> Any:
        r = torch.lerp(state.row_var, _mean(g * g, -1), s.weight)
        c = torch.lerp(state.col_var, _mean(g * g, -2), s.weight)
        v = (r / torch.clamp_min(_mean(r, -2), s.eps1)) @ c  # in this order nothing overflows
        return step(g, v, p, s), FactoredState(r, c)

    def unfactored(g: Tensor, state: UnfactoredState, p: Any, s: AdafactorScalars) -> Any:
        v = torch.lerp(state.variance, g * g, s.weight)
        return step(g, v, p, s), UnfactoredState(v)

    rules = {
        "factored": of_rule(_init_factored, factored, scalars, needs_params=True, turns=True),
        "unfactored": of_rule(_init_unfactored, unfactored, scalars, needs_params=True, turns=True),
    }
    return uphill_or_down(partition(rules, _kinds), maximize=maximize)


def _kinds(params: Tree) -> Tree:
    return tree_map(lambda p: "factored" if p.ndim > 1 else "unfactored", params)


def _init_factored(p: Tensor) -> FactoredState:
    check_real("Adafactor", p)
    return FactoredState(*[torch.zeros_like(p.sum(dim, keepdim=True)) for dim in (-1, -2)])


def _init_unfactored(p: Tensor) -> UnfactoredState:
    check_real("Adafactor", p)
    return UnfactoredState(torch.zeros_like(p))


def _machine_epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _mean(x: Tensor, dim: int) -> Tensor:
    return x.mean(dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)  # of nothing: 0
