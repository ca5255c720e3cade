"""Adafactor: second moments in factored form."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import (
    Hyperparameter,
    at,
    check,
    check_choice,
    check_integer,
    is_zero,
)
from functorch_optim._core.leafwise import leafwise, of_rule
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import clamped_from_below, minimum, rms
from functorch_optim.optimizers._descent import check_real, uphill_or_down
from functorch_optim.optimizers._factored import LAST, estimate, excess, inverse_root, running_means
from functorch_optim.transforms.momentum import ema
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
    """Adafactor's state for a vector or a scalar, and for other parameters that are not factored.

    Attributes:
        variance: V, running mean of g^2: like p.
    """

    variance: Tensor


class AdafactorScalars(NamedTuple):
    """The numbers of Adafactor at a step.

    Attributes:
        weight: 1 - beta2_t = t^beta2_decay.
        rho: relative step.
        eps1: of the estimate.
        eps2: smallest size of the parameters.
        d: clipping threshold.
        decay: of weights; of alpha or of the whole step.
    """

    weight: Any
    rho: Any
    eps1: Any
    eps2: Any
    d: Any
    decay: Any


@factory
def adafactor(
    lr: Hyperparameter | None = 1e-2,
    beta2_decay: Hyperparameter = -0.8,
    eps: tuple[Hyperparameter | None, Hyperparameter] = (None, 1e-3),
    d: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    *,
    beta1: Hyperparameter | None = None,
    scale_parameter: bool = True,
    relative_step: bool = True,
    warmup_init: bool = False,
    factored: bool = True,
    min_dim_size_to_factor: int | None = None,
    add_eps: bool = False,
    decay: Literal["lr", "step", "independent"] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """Adafactor: adaptive as Adam, with the memory of a row and a column for each matrix.

        R <- beta2_t R + (1 - beta2_t) mean over columns of g^2,  beta2_t = 1 - t^beta2_decay
        C <- beta2_t C + (1 - beta2_t) mean over rows of g^2
        V = R C / max(mean(R), eps1)        for vectors and scalars: V <- beta2_t V + (1 - beta2_t) g^2
        w = g / sqrt(max(V, eps1^2))
        w <- w / max(1, RMS(w) / d)
        alpha = min(lr, 1 / sqrt(t)) max(eps2, RMS(p))
        u = -alpha w - lr weight_decay p

    Tensors of more than two dimensions are stacks of matrices, whose dimensions are the last two.

    Args:
        lr: largest relative step, >= 0, and the factor of weight decay: number, 0-dim tensor, or schedule. None: 1e-2;
            see `decay`.
        beta2_decay: exponent <= 0.
        eps: (eps1, eps2), >= 0. eps1 None: machine epsilon of the parameter's dtype; 1e-30 with `add_eps`.
        d: clipping threshold of the root mean square of a step, >= 1. math.inf: none.
        weight_decay: decoupled, >= 0.
        beta1: decay rate in [0, 1) of momentum, M <- beta1 M + (1 - beta1) alpha w in the place of alpha w. None: no
            momentum, and no memory for it.
        scale_parameter: multiply steps by the size of the parameter. False: alpha is the relative step.
        relative_step: bound the relative step by 1 / sqrt(t). False: it is lr, which must be given.
        warmup_init: bound the relative step by 1e-6 t, too.
        factored: False: keep V for matrices, too.
        min_dim_size_to_factor: None: factor the last two dimensions. An integer, as in optax: factor the two largest
            dimensions, if both are at least this; otherwise keep V.
        add_eps: add eps1 to g^2, as T5 and optax do, in place of both maxima with eps1.
        decay: the factor of weight decay: "lr", as in torch; "step", alpha, as in T5; or "independent",
            nothing, as in optax. None: "lr" where there is one and a relative step, as in torch, and else "step".
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `lr` is missing without `relative_step`; `warmup_init` comes without
            `relative_step`; `update` is called without parameters and needs them.
        TypeError: a parameter is complex.

    The derivative of a maximum is that of its larger argument. At ties it is that of V, of RMS(w) / d and of RMS(p),
    and half of those of lr and of 1 / sqrt(t). A vector's first step has RMS(w) = 1, so with the default, d = 1, it
    counts as clipped.

    A NaN in the gradient of a vector stays in its element: if RMS(w) or RMS(p) is NaN, the maxima above are 1 and
    eps2. In a matrix it spreads, through the mean of R. In float16, squares of gradients above 256 are infinite, and
    later steps NaN, as torch's; `cast_states(adafactor(lr))` keeps R, C and V in float32.

    Same numbers as torch.optim.Adafactor, with two exceptions: with eps1 None, torch uses the machine epsilon of the
    first parameter's dtype for all parameters; and where eps1^2 is too small for the dtype, zero gradients make torch's
    steps NaN. Differs from the paper as torch does: see its note on eps1 and lr. Other packages have other defaults:

        transformers (T5)     adafactor(None, eps=(1e-30, 1e-3), add_eps=True)
        the same with an lr   adafactor(lr, eps=(1e-30, 1e-3), add_eps=True, relative_step=False, scale_parameter=False)
        optax                 adafactor(lr, eps=(1e-30, 1e-3), add_eps=True, relative_step=False,
                                        min_dim_size_to_factor=128, decay="independent")

    Momentum is the mean of steps with their learning rates, as in both of these: a changed lr acts only after some
    steps.

    Source: Shazeer & Stern, arXiv:1804.04235, algorithms 4 and 5.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.adafactor(lr=0.1), torch.ones(2, 3)
        >>> updates, state = tx.update(torch.ones(2, 3), tx.init(params), params)
        >>> updates[0], fo.tree.get(state, "row_var").shape, fo.tree.get(state, "col_var").shape
        (tensor([-0.1000, -0.1000, -0.1000]), torch.Size([2, 1]), torch.Size([1, 3]))
    """
    eps1, eps2 = _pair(eps, add_eps)
    check("learning rate", 0.0 if lr is None else lr)
    check("beta2_decay", beta2_decay, "value <= 0")
    check("clipping threshold d", d, "value >= 1")
    check("weight_decay value", weight_decay)
    check("beta1", 0.0 if beta1 is None else beta1, "0 <= value < 1")
    check_choice("decay", decay, "lr", "step", "independent", None)
    if min_dim_size_to_factor is not None:
        check_integer("min_dim_size_to_factor", min_dim_size_to_factor, 0)
    if not relative_step and (lr is None or warmup_init):
        missing = "lr" if lr is None else "no warmup_init"
        raise ValueError(
            f"With relative_step=False adafactor needs {missing}; write adafactor(1e-3, relative_step=False)"
        )
    largest = 1e-2 if lr is None else lr
    dims_of = functools.partial(_dims_of, factored, min_dim_size_to_factor)
    decays = not is_zero(weight_decay)
    by = decay or ("lr" if lr is not None and relative_step else "step")

    def relative(step: Tensor) -> Any:
        """Return the relative step, rho."""
        bound = at(largest, step)
        if not relative_step:
            return bound
        return minimum(step**-0.5, minimum(bound, 1e-6 * step) if warmup_init else bound)

    def scaled(rho: Any, p: Any, least: Any) -> Any:
        """Return rho, times the size of the parameter if so asked."""
        return rho * clamped_from_below(rms(p), least) if scale_parameter else rho

    def shrinkage(step: Tensor) -> Any:
        part = at(largest, step) if by == "lr" else relative(step) if by == "step" else 1.0
        return part * at(weight_decay, step)

    def shrunk(u: Tensor, p: Any, part: Any, least: Any) -> Tensor:
        """Subtract the decay of the parameter from its update."""
        decayed: Tensor = u - (scaled(part, p, least) if by == "step" else part) * p
        return decayed

    def scalars(step: Tensor) -> AdafactorScalars:
        return AdafactorScalars(
            weight=step ** at(beta2_decay, step),
            rho=relative(step),
            eps1=_machine_epsilon if eps1 is None else at(eps1, step),
            eps2=at(eps2, step),
            d=at(d, step),
            decay=shrinkage(step),
        )

    def squares(g: Tensor, s: AdafactorScalars) -> Tensor:
        return g * g + s.eps1 if add_eps else g * g

    def moved(g: Tensor, v: Tensor, p: Any, s: AdafactorScalars) -> Tensor:
        w = g * inverse_root(v, 0.0 if add_eps else s.eps1 * s.eps1)
        u: Tensor = scaled(-s.rho, p, s.eps2) / excess(w, s.d) * w
        return shrunk(u, p, s.decay, s.eps2) if decays and beta1 is None else u

    def of_matrix(g: Tensor, state: FactoredState, p: Any, s: AdafactorScalars) -> Any:
        dims = dims_of(g) or LAST
        r, c = running_means(*state, squares(g, s), s.weight, dims)
        return moved(g, estimate(r, c, 0.0 if add_eps else s.eps1, dims), p, s), FactoredState(r, c)

    def of_vector(g: Tensor, state: UnfactoredState, p: Any, s: AdafactorScalars) -> Any:
        v = torch.lerp(state.variance, squares(g, s), s.weight)
        return moved(g, v, p, s), UnfactoredState(v)

    def kinds(params: Tree) -> Tree:
        return tree_map(lambda p: "factored" if dims_of(p) else "unfactored", params)

    def init_factored(p: Tensor) -> FactoredState:
        check_real("Adafactor", p)
        return FactoredState(*[torch.zeros_like(p.sum(dim, keepdim=True)) for dim in reversed(dims_of(p) or LAST)])

    options: Any = {"needs_params": scale_parameter or decays, "turns": True, "decays": decays and beta1 is None}
    rules = {
        "factored": of_rule(init_factored, of_matrix, scalars, **options),
        "unfactored": of_rule(_init_unfactored, of_vector, scalars, **options),
    }
    if beta1 is None:
        return uphill_or_down(partition(rules, kinds), maximize=maximize)
    links = [partition(rules, kinds), ema(beta1, debias=False)]
    if decays:  # after momentum, which is that of steps alone

        def shrink(u: Tensor, state: Any, p: Any, s: Any) -> Any:
            return shrunk(u, p, *s), state

        def parts(step: Tensor) -> Any:
            return shrinkage(step), at(eps2, step)

        whole = by == "step" and scale_parameter
        links.append(leafwise(None, shrink, parts, elementwise=not whole, needs_params=True))
    return uphill_or_down(*links, maximize=maximize)


def _pair(eps: Any, add_eps: bool) -> tuple[Any, Any]:
    """Return both eps; None: the machine epsilon of a dtype."""
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise ValueError(f"Invalid eps: {eps!r}; give a pair, as in eps=(None, 1e-3)")
    eps1, eps2 = eps
    if eps1 is None and add_eps:
        eps1 = 1e-30
    check("epsilon1", 0.0 if eps1 is None else eps1)
    check("epsilon2", eps2)
    return eps1, eps2


def _dims_of(factored: bool, min_dim_size_to_factor: int | None, p: Tensor) -> tuple[int, int] | None:
    """Return the dimensions of the rows and columns of a parameter; None: it is not factored."""
    if not factored or p.ndim < 2:
        return None
    if min_dim_size_to_factor is None:
        return LAST
    small, large = sorted(range(p.ndim), key=lambda dim: p.shape[dim])[-2:]
    return (min(small, large), max(small, large)) if p.shape[small] >= min_dim_size_to_factor else None


def _init_unfactored(p: Tensor) -> UnfactoredState:
    check_real("Adafactor", p)
    return UnfactoredState(torch.zeros_like(p))


def _machine_epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
