"""LAMB: Adam whose layers move in proportion to their size."""

from __future__ import annotations

import math
from collections.abc import Callable

from functorch_optim._core.combine import chain, masked
from functorch_optim._core.hyperparameters import Hyperparameter, check
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.optimizers.adam import scale_by_adam
from functorch_optim.transforms.decay import add_decayed_weights
from functorch_optim.transforms.normalizing import scale_by_trust_ratio
from functorch_optim.transforms.scaling import scale_by_learning_rate
from functorch_optim.tree import Tree


@factory
def lamb(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    *,
    trust_clip: Hyperparameter = math.inf,
    bias_correction: bool = True,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """LAMB, for large batches: Adam's direction, in steps of the learning rate relative to the norm of each tensor.

        r = scale_by_adam(g) + weight_decay p
        u = -lr r |p| / |r|,  or  -lr r  where |p| or |r| is zero

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: see `scale_by_adam`.
        eps: see `scale_by_adam`.
        weight_decay: decoupled, >= 0.
        trust_clip: largest ratio |p| / |r|, >= 0. timm's `trust_clip=True` is 1.0 here.
        bias_correction: whether to correct m and v. The last version of the paper does not; timm and optax do.
        mask: which parameters decay and are scaled by the ratio: a tree of bools, a prefix of one, or a function of
            the parameters; see `masked`. All others take Adam's step. Biases and norms are often left out. None: all.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `update` is called without parameters.

    For derivatives see `scale_by_trust_ratio`.

    Same numbers as optax.lamb. timm's Lamb clips the global norm first, unless `max_grad_norm=None`, and takes Adam's
    step where nothing decays, unless `always_adapt=True`.

    Source: You et al., arXiv:1904.00962, algorithm 2, without bounds on |p|.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.lamb(lr=0.1), torch.tensor([3.0, 4.0])
        >>> updates, state = tx.update(torch.tensor([1.0, -1.0]), tx.init(params), params)
        >>> updates.norm(), updates.sign()
        (tensor(0.5000), tensor([-1.,  1.]))
    """
    check("trust_clip", trust_clip)
    scaled = chain(add_decayed_weights(weight_decay), scale_by_trust_ratio(max_ratio=trust_clip))
    return uphill_or_down(
        scale_by_adam(betas, eps, bias_correction=bias_correction),
        scaled if mask is None else masked(scaled, mask),
        scale_by_learning_rate(lr),
        maximize=maximize,
    )
