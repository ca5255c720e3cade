"""Ranger: RAdam with Lookahead."""

from __future__ import annotations

from functorch_optim._core.combine import chain
from functorch_optim._core.hyperparameters import Hyperparameter, check
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers.radam import radam
from functorch_optim.transforms.normalizing import centralize
from functorch_optim.wrappers.lookahead import lookahead


@factory
def ranger(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.95, 0.999),
    eps: Hyperparameter = 1e-5,
    weight_decay: Hyperparameter = 0.0,
    k: Hyperparameter = 6,
    alpha: Hyperparameter = 0.5,
    *,
    use_gc: bool = False,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
) -> GradientTransformation:
    """Ranger: RAdam's fast weights, and slow ones that follow them.

        g <- centralize(g)  if use_gc
        p <- p + radam(g)
        every k steps: slow <- slow + alpha (p - slow), p <- slow

    It is `lookahead(radam(...), k, alpha)`.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_radam`.
        eps: see `scale_by_radam`.
        weight_decay: >= 0. Unless it is the number 0, `update` needs the parameters.
        k: steps from one meeting of slow and fast weights to the next, >= 1.
        alpha: part of the way that the slow weights go, in [0, 1].
        use_gc: centralize gradients first, as `fo.centralize` does. The author's later versions do so.
        decoupled_weight_decay: decay as `adamw` does. False: an L2 penalty.
        maximize: ascend instead.

    Raises:
        ValueError: a number is out of range.

    While the variance of its step is unknown, it takes steps of momentum, as `fo.radam` does. Same numbers as
    pytorch_optimizer's with `degenerated_to_sgd=True`. Evaluate with the slow weights: see `fo.lookahead`.

    Source: Wright, https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer; Liu et al., arXiv:1908.03265; Zhang et
    al., arXiv:1907.08610.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.ranger(lr=0.1, k=2), torch.zeros(1)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     params, state = fo.step(tx, torch.ones(1), state, params)
        ...     print(params)
        tensor([-0.1000])
        tensor([-0.1000])
    """
    check("k", k, "value >= 1")
    check("alpha", alpha, "0 <= value <= 1")
    fast = radam(lr, betas, eps, weight_decay, decoupled_weight_decay, maximize=maximize)
    return lookahead(chain(centralize(), fast) if use_gc else fast, k, alpha)  # type: ignore[no-any-return]
