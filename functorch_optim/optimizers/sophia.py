"""Sophia: momentum divided by curvature, and clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._control import cond, same
from functorch_optim._core.checks import check_has_params
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas, check_integer
from functorch_optim._core.rule import extras_of
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._execution.representation import narrowed, widened
from functorch_optim.optimizers._curvature import hutchinson
from functorch_optim.optimizers._descent import check_real, descent
from functorch_optim.optimizers._whole import like
from functorch_optim.transforms.momentum import ema
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved


@saved
class SophiaState(NamedTuple):
    """The state of `sophia`, besides the momentum.

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
        hessian: h, running mean of the estimates of the diagonal: a tree like the parameters, float32 at least.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.sophia().init(torch.zeros(2))[1]
        SophiaState(step=tensor(0), hessian=tensor([0., 0.]))
    """

    step: Tensor
    hessian: Tree


@factory
def sophia(
    lr: Hyperparameter = 1e-4,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.965, 0.99),
    rho: Hyperparameter = 0.04,
    weight_decay: Hyperparameter = 0.1,
    *,
    hessian: Callable[..., Tree] | None = None,
    every: int = 10,
    eps: Hyperparameter = 1e-15,
    at_first: bool = False,
) -> GradientTransformation:
    """Sophia: a Newton step with a diagonal that is estimated now and then, no element longer than lr.

        m <- beta1 m + (1 - beta1) g
        every k steps: h <- beta2 h + (1 - beta2) hessian(p, batch)
        u = -lr (clip(m / max(rho h, eps), -1, 1) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates of m and of h, in [0, 1).
        rho: the smaller, the more elements are clipped; > 0. In the paper 0.01 with `hutchinson`, 0.05 with
            `gauss_newton_bartlett`.
        weight_decay: decoupled, >= 0.
        hessian: `hessian(params, batch)` returns an estimate of the diagonal of the Hessian, a tree like the
            parameters: `fo.hutchinson(loss_fn)`, `fo.gauss_newton_bartlett(logits_fn)`, or a function of yours. If it
            has the keyword-only parameters `step` or `value_fn`, it is given the number of the update, and the extra.
            None: `fo.hutchinson(generator=0)` of the extra `value_fn`, which must then be given.
        every: k >= 1, steps from one estimate to the next.
        eps: least divisor, >= 0. By a divisor of 0 the step is a sign.
        at_first: estimate at the first step too, as algorithm 3 of the paper does. As in the authors' program the
            first estimate is that of step k + 1 otherwise, and until then h is 0 and the steps are signs.

    Returns:
        Transformation whose state is a tuple; in it is a `SophiaState`.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.
        TypeError: a parameter is complex; beta2, rho or eps is a tree; there is neither `hessian` nor `value_fn`.

    `update(grads, state, params, *, batch=None, value_fn=None)` declares two extras: the batch of the estimate, and the
    loss as a function of the parameters, which `fo.meta.unroll` and `fo.minimize` give. In `fo.Optimizer` write
    `opt.step(closure, batch=batch)` or `opt.step(closure, value_fn=loss)`: a closure alone has no second derivatives.
    There params is a dict by name if the parameters have names, and else a list.

    Eagerly, nothing is estimated in the steps between. In `torch.vmap` and `torch.compile` each step makes an estimate.
    Derivatives flow through estimates; those of elements that are clipped are zero.

    Studies by others do not confirm its advantage: in a comparison of tuned optimizers for language models it falls
    behind AdamW, or is unstable, in long runs (Semenov et al., arXiv:2509.01440). optax's divides by the h of the step
    before, and corrects m. Source: Liu et al., Sophia, arXiv:2305.14342, algorithm 3.

    Example:
        >>> import functorch_optim as fo, torch
        >>> loss = lambda params, batch: (batch * params**2).sum()
        >>> tx = fo.sophia(0.1, (0.0, 0.0), 1.0, 0.0, hessian=fo.hutchinson(loss, generator=0), at_first=True)
        >>> params, batch = torch.tensor([0.5, 3.0]), torch.tensor([1.0, 3.0])
        >>> fo.step(tx, torch.func.grad(loss)(params, batch), tx.init(params), params, batch=batch)[0]
        tensor([0.4500, 2.9000])
    """
    check_betas(betas)
    check("beta2", betas[1], "0 <= value < 1", trees=False)
    check("rho", rho, "value > 0", trees=False)
    check("epsilon value", eps, trees=False)
    check_integer("every", every, 1)
    needs_loss = hessian is None
    diagonal = hutchinson(generator=0) if hessian is None else hessian
    if not callable(diagonal):
        raise TypeError(
            f"hessian is a function of parameters and batch, got {hessian!r}; write hessian=hutchinson(loss)"
        )
    takes = extras_of(diagonal)

    def init(params: Tree) -> SophiaState:
        def zeros(p: Tensor) -> Tensor:
            check_real("Sophia", p)
            return torch.zeros_like(widened(p))

        step = torch.zeros((), dtype=torch.int64, device=tree.device_of(params))
        return SophiaState(step, tree.map(zeros, params))

    def update(
        updates: Tree,
        state: SophiaState,
        params: Tree,
        *,
        batch: Any = None,
        value_fn: Callable[[Tree], Tensor] | None = None,
    ) -> tuple[Tree, SophiaState]:
        check_has_params("sophia", params, ", batch=batch")
        if needs_loss and not callable(value_fn):
            raise TypeError(
                "sophia needs the loss: sophia(hessian=hutchinson(loss_fn)) and batch=batch, or the loss as a function "
                "of the parameters, tx.update(updates, state, params, value_fn=loss)"
            )
        step = state.step + 1
        t = step.to(torch.float64)
        weight = 1 - at(betas[1], t)
        h, structure = tree.flatten(state.hessian)
        kept = [i for i, (one, m) in enumerate(zip(h, tree.flatten(updates)[0], strict=True)) if m is not None]

        def estimated(old: Any) -> Any:
            found = diagonal(params, batch, **takes.wanted({"step": step, "value_fn": value_fn}))
            new = tree.flatten_up_to(structure, found, "the Hessian", state.hessian, "the parameters")
            return [torch.lerp(one, new[i].to(one), like(weight, one)) for i, one in zip(kept, old, strict=True)]

        due = (step % every == 1 % every) & (step > (0 if at_first else 1))
        changed = dict(zip(kept, cond(due, estimated, same, [h[i] for i in kept]), strict=True))
        hessian = tree.unflatten(structure, [changed.get(i, one) for i, one in enumerate(h)])

        def clipped(m: Tensor, h: Tensor) -> Tensor:
            wide = widened(m)
            divisor = torch.clamp_min(like(at(rho, t), h) * h, like(at(eps, t), h))
            ratio = torch.where(divisor == 0, torch.sign(wide), wide / divisor.masked_fill(divisor == 0, 1))
            return narrowed(torch.clamp(ratio, -1, 1), m)

        return tree.map(clipped, updates, hessian), SophiaState(step, hessian)

    rules = [ema(betas[0], debias=False), GradientTransformation(init, update)]
    return descent(*rules, lr=lr, weight_decay=weight_decay, decoupled=True)
