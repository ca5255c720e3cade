"""SGLD: gradient descent with noise, which samples."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.rule import StepState
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._execution.representation import widened
from functorch_optim._execution.sharded import placed
from functorch_optim._numerics import safe_sqrt
from functorch_optim.optimizers._descent import uphill_or_down
from functorch_optim.optimizers._whole import like
from functorch_optim.transforms.decay import add_decayed_weights
from functorch_optim.tree import Tree


@factory
def sgld(
    lr: Hyperparameter = 1e-3,
    temperature: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    *,
    generator: torch.Generator | None = None,
    maximize: bool = False,
) -> GradientTransformation:
    """Stochastic gradient Langevin dynamics: with a loss that is a negative log-density, its iterates are samples.

        g <- g + weight_decay p
        u = -lr / 2 g + sqrt(lr temperature) n,  n ~ N(0, 1)

    Noise comes from `generator`, drawn in the order of the leaves; or it is given, with which an update is a pure
    function: `tx.update(grads, state, params, noise=noise)`, a tree like the parameters of standard normal numbers.
    The real and the imaginary part of a complex parameter have noise of this variance each. So complex noise is
    `2**0.5 * torch.randn_like(p)`.

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        temperature: of the density that is sampled, >= 0.
        weight_decay: L2 penalty >= 0: the precision of a Gaussian prior.
        generator: where noise is drawn from, on the device of the parameters. It changes with every draw. For sharded
            parameters (DTensor) all ranks draw the whole noise, and need generators with one seed.
        maximize: ascend: the loss is a log-density.

    Raises:
        ValueError: a number is out of range; there is neither noise nor a generator; or the noise is not like the
            parameters.
        TypeError: `generator` is no generator.

    Source: Welling & Teh, Bayesian learning via stochastic gradient Langevin dynamics, ICML 2011, equation 4.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.sgld(lr=0.04), torch.zeros(2)
        >>> tx.update(torch.ones(2), tx.init(params), params, noise=torch.tensor([0.0, 1.0]))[0]
        tensor([-0.0200,  0.1800])
    """
    check("learning rate", lr, trees=False)
    check("temperature", temperature, trees=False)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Invalid generator: {generator!r}; give a torch.Generator, as in "
            "sgld(generator=torch.Generator().manual_seed(0))"
        )

    def init(params: Tree) -> StepState:
        leaves = [leaf for leaf in tree.flatten(params)[0] if leaf is not None]
        return StepState(torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None))

    def update(updates: Tree, state: StepState, params: Tree, *, noise: Tree = None) -> tuple[Tree, StepState]:
        if noise is None and generator is None:
            raise ValueError(
                "sgld needs noise: give sgld(generator=torch.Generator().manual_seed(0)), or the noise itself, "
                "tx.update(updates, state, params, noise=...)"
            )
        step = state.step + 1
        t = step.to(torch.float64)
        rate = at(lr, t)
        scale = safe_sqrt(torch.as_tensor(rate * at(temperature, t), dtype=torch.float64, device=t.device))

        def moving(g: Tensor, n: Tensor) -> Tensor:
            wide = widened(g)
            moved: Tensor = like(scale, wide) * n.to(wide) - like(0.5 * rate, wide) * wide
            return moved.to(g.dtype)

        if noise is None:
            noise = tree.map(_drawn, updates)
        else:
            _check_noise(noise, updates)
        return tree.map(moving, updates, noise), StepState(step)

    def _drawn(g: Tensor) -> Tensor:
        dtype = torch.promote_types(g.dtype, torch.float32)
        numbers = torch.randn(g.shape, generator=generator, dtype=dtype, device=g.device)
        # torch's complex numbers have variance 1/2 in each of their parts.
        return placed(2**0.5 * numbers if g.is_complex() else numbers, g)

    return uphill_or_down(add_decayed_weights(weight_decay), GradientTransformation(init, update), maximize=maximize)


def _check_noise(noise: Tree, updates: Tree) -> None:
    """Raise unless there is a number of noise for each of the gradients."""
    leaves, structure = tree.flatten(updates)
    given = tree.flatten_up_to(structure, noise, "noise", updates, "the gradients")
    for path, g, n in zip(tree.paths(updates), leaves, given, strict=True):
        if g is None or (isinstance(n, Tensor) and n.shape == g.shape and n.is_complex() == g.is_complex()):
            continue
        found = f"shape {tuple(n.shape)} and dtype {n.dtype}" if isinstance(n, Tensor) else f"type {type(n).__name__}"
        raise ValueError(
            f"The noise at {path or 'the root'!r} has {found}, and the gradient there has shape {tuple(g.shape)} and "
            f"dtype {g.dtype}; write noise=tree.map(torch.randn_like, params)"
            + (", times 2**0.5 where they are complex" if g.is_complex() else "")
        )
