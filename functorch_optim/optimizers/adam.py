"""Adam, AMSGrad, AdamW, and Adam for sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._numerics import debias, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import descent
from functorch_optim.tree import Tree


@leaf_state
class ScaleByAdamState(NamedTuple):
    """The state of `scale_by_adam` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


@leaf_state
class ScaleByAMSGradState(NamedTuple):
    """The state of `scale_by_adam(amsgrad=True)` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of g^2: like p.
        max_exp_avg_sq: largest v so far: like p.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor


class AdamScalars(NamedTuple):
    """The numbers of Adam at a step.

    Attributes:
        weight1: 1 - beta1.
        beta2: beta2.
        weight2: 1 - beta2.
        rate: sqrt(1 - beta2^t) / (1 - beta1^t), both corrections in one number, as at the end of the paper's section 2.
        eps: eps sqrt(1 - beta2^t), or eps alone for the lazy rule.
        t: the step, or one at which both corrections are 1.
        plain_eps: eps. It and t are for torch's own kernels, which correct for bias by themselves.
    """

    weight1: Any
    beta2: Any
    weight2: Any
    rate: Any
    eps: Any
    t: Any
    plain_eps: Any


_CORRECTED = 1e30
"""A step at which both corrections are 1."""


@factory
def scale_by_adam(
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    amsgrad: bool = False,
    *,
    lazy: bool = False,
    bias_correction: bool = True,
) -> GradientTransformation:
    """Divide the mean of gradients by the root of the mean of their squares.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        g <- m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    With amsgrad the root is of the largest v so far.

    Args:
        betas: decay rates of m and of v, in [0, 1): numbers, 0-dim tensors, or schedules.
        eps: added to the root, >= 0.
        amsgrad: divide by the largest v so far; torch takes the maximum before the correction, and so do we.
        lazy: accept sparse gradients, and run on the entries that they have; all others keep their means. eps is then
            not corrected, as at the end of the paper's section 2:
            m / (1 - beta1^t) sqrt(1 - beta2^t) / (sqrt(v) + eps).
        bias_correction: whether to correct m and v for their beginning at zero, as above. Without it,
            g <- m / (sqrt(v) + eps).

    Raises:
        ValueError: a number is out of range.
        RuntimeError: a gradient is sparse and the rule is not lazy.

    If v is zero, as for a unit that never fired, the derivative is finite and exact; torch.optim's is NaN there. At a
    tie of two v, amsgrad's derivative is half of each.

    Source: Kingma & Ba, arXiv:1412.6980, algorithm 1; AMSGrad: Reddi et al., arXiv:1904.09237, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.scale_by_adam()
        >>> updates, state = tx.update({"w": torch.tensor([3.0, -3.0])}, tx.init({"w": torch.zeros(2)}))
        >>> updates["w"].round(decimals=3), state.exp_avg["w"]
        (tensor([ 1., -1.]), tensor([ 0.3000, -0.3000]))
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> AdamScalars:
        beta1, beta2, e = at(betas[0], step), at(betas[1], step), at(eps, step)
        if not bias_correction:
            return AdamScalars(1 - beta1, beta2, 1 - beta2, 1.0, e, _CORRECTED, e)
        root = sqrt(debias(beta2, step))
        rate = root / debias(beta1, step)
        return AdamScalars(1 - beta1, beta2, 1 - beta2, rate, e * (1 if lazy else root), step, e)

    def moments(g: Tensor, state: Any, s: AdamScalars) -> tuple[Tensor, Tensor]:
        # The weight goes first: g * g overflows where g is greater than 1e19 in float32.
        return torch.lerp(state.exp_avg, g, s.weight1), s.beta2 * state.exp_avg_sq + s.weight2 * g * g

    def ratio(m: Tensor, v: Tensor, s: AdamScalars) -> Tensor:
        corrected: Tensor = s.rate * m / (safe_sqrt(v) + s.eps)
        return corrected

    def adam(g: Tensor, state: ScaleByAdamState, p: Tensor | None, s: AdamScalars) -> Any:
        m, v = moments(g, state, s)
        return ratio(m, v, s), ScaleByAdamState(m, v)

    def ams(g: Tensor, state: ScaleByAMSGradState, p: Tensor | None, s: AdamScalars) -> Any:
        m, v = moments(g, state, s)
        v_max = torch.maximum(state.max_exp_avg_sq, v)
        return ratio(m, v_max, s), ScaleByAMSGradState(m, v, v_max)

    sparse: Literal["touched"] | None = "touched" if lazy else None
    if amsgrad:
        return leafwise(ScaleByAMSGradState, ams, scalars, elementwise=True, sparse=sparse)
    return leafwise(ScaleByAdamState, adam, scalars, elementwise=True, sparse=sparse)


@factory
def adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    amsgrad: bool = False,
    *,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> GradientTransformation:
    """Adam: a step of about the learning rate for every element, whatever the scale of its gradient.

        g <- g + weight_decay p
        u = -lr scale_by_adam(g)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        weight_decay: L2 penalty >= 0. Unless it is the number 0, `update` needs the parameters.
        amsgrad: see `scale_by_adam`.
        maximize: ascend instead.
        decoupled_weight_decay: decay as `adamw` does.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.Adam. Source: Kingma & Ba, arXiv:1412.6980, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adam(lr=0.1)
        >>> updates, state = tx.update({"w": torch.tensor([3.0])}, tx.init({"w": torch.ones(1)}))
        >>> updates
        {'w': tensor([-0.1000])}
    """
    rule = scale_by_adam(betas, eps, amsgrad)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=decoupled_weight_decay, maximize=maximize)


@factory
def adamw(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
    amsgrad: bool = False,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """Adam with decoupled weight decay.

        u = -lr (scale_by_adam(g) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        weight_decay: factor >= 0; a step shrinks the parameters by lr * weight_decay. Unless it is the number 0,
            `update` needs the parameters.
        amsgrad: see `scale_by_adam`.
        mask: where parameters decay; see `add_decayed_weights`.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.AdamW. Source: Loshchilov & Hutter, arXiv:1711.05101, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.adamw(lr=0.1, weight_decay=0.5)
        >>> params = {"w": torch.ones(1)}
        >>> tx.update({"w": torch.tensor([3.0])}, tx.init(params), params)[0]
        {'w': tensor([-0.1500])}
    """
    rule = scale_by_adam(betas, eps, amsgrad)
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, mask=mask, maximize=maximize)


@factory
def sparse_adam(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adam for sparse gradients, such as those of `torch.nn.Embedding(sparse=True)`.

        u = -lr scale_by_adam(g, lazy=True)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    Same numbers as torch.optim.SparseAdam. It refuses gradients that are not sparse; here they count as having all
    entries.
    Source: Kingma & Ba, arXiv:1412.6980, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.sparse_adam(lr=0.1), torch.zeros(3)
        >>> grad = torch.sparse_coo_tensor([[1]], [5.0], (3,), check_invariants=True)
        >>> updates, state = tx.update(grad, tx.init(params))
        >>> fo.apply_updates(params, updates)
        tensor([ 0.0000, -0.1000,  0.0000])
    """
    return descent(scale_by_adam(betas, eps, lazy=True), lr=lr, weight_decay=0.0, maximize=maximize)
