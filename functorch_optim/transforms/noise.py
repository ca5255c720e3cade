"""Noise: random numbers that are a function of the state."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import Hyperparameter, at, check
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution.representation import widened
from functorch_optim._execution.sharded import on_shards
from functorch_optim._numerics import double, safe_sqrt
from functorch_optim._random import at_step, key_of, mixed, normal
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved


@saved
class AddNoiseState(NamedTuple):
    """The state of `add_noise`, once for the tree.

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
        key: seed of the noise of all steps: 0-dim int64 tensor.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.add_noise(0.1, generator=5).init(torch.zeros(2))
        AddNoiseState(step=tensor(0), key=tensor(5))
    """

    step: Tensor
    key: Tensor


def add_noise(
    eta: Hyperparameter, gamma: Hyperparameter = 0.55, generator: torch.Generator | int | Tensor | None = None
) -> GradientTransformation:
    """Add Gaussian noise that becomes weaker: `g_t <- g_t + N(0, eta / t^gamma)`.

    The noise is a function of a key in the state, of the step, and of the place in the tree. So the same state gives
    the same noise, and a resumed training has the noise of an uninterrupted one. Under `torch.vmap` members with the
    same key have the same noise. For different noise, batch the key: `add_noise(0.1, generator=keys)`, or
    `state._replace(key=keys)`. Derivatives with respect to eta and gamma flow; the noise itself is a constant. Real and
    imaginary parts of complex tensors have separate noise, each of this variance.

    Args:
        eta: variance >= 0 of the noise of the first step: number, 0-dim tensor, or schedule.
        gamma: exponent >= 0 of its decay; 0 for none. The paper has 0.55.
        generator: source of the key, which is drawn once, when this function is called: a `torch.Generator`, or None
            for torch's own. Or the key itself: an integer, or a 0-dim tensor of int64.

    Returns:
        Transformation whose state is an `AddNoiseState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: `generator` is of another type; a number is a tree.

    The noise is computed by a hash of the key (SplitMix64), so that updates are pure. It is not that of `torch.randn`
    from the generator. Source: Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks,
    arXiv:1511.06807; Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.chain(fo.add_noise(eta=0.01, generator=0), fo.sgd(0.1))
        >>> params = torch.zeros(2)
        >>> state = tx.init(params)
        >>> first, again = [tx.update(params, state)[0] for _ in range(2)]
        >>> bool((first != 0).all()), torch.equal(first, again)
        (True, True)
    """
    key = key_of(generator, "add_noise(0.1, generator=0)")
    check("eta", eta, trees=False)
    check("gamma", gamma, trees=False)

    def init(params: Tree) -> AddNoiseState:
        device = tree.device_of(params)
        return AddNoiseState(
            torch.zeros((), dtype=torch.int64, device=device),
            torch.as_tensor(key, dtype=torch.int64, device=device).clone(),
        )

    def update(updates: Tree, state: AddNoiseState, params: Tree) -> tuple[Tree, AddNoiseState]:
        step = state.step + 1
        t = double(step)
        spread = safe_sqrt(at(eta, t) * t ** -at(gamma, t))
        key = at_step(state.key, step)
        leaves, structure = tree.flatten(updates)
        rules = [functools.partial(_noisy, spread=spread, key=mixed(key + i)) for i in range(len(leaves))]
        noisy = [None if g is None else on_shards(rule, g) for g, rule in zip(leaves, rules, strict=True)]
        return tree.unflatten(structure, noisy), AddNoiseState(step, state.key)

    made = GradientTransformation(init, update)
    made._call = (add_noise, (eta, gamma, key), {})  # with the key: the generator has changed
    return made


def _noisy(g: Tensor, places: Tensor, spread: Tensor, key: Tensor) -> Tensor:
    if g.is_complex():
        pairs = torch.stack([2 * places, 2 * places + 1], -1)
        return torch.view_as_complex(_noisy(torch.view_as_real(g.resolve_conj()), pairs, spread, key))
    wide = widened(g)
    noise = normal(key.to(g.device), places).to(wide.dtype)
    return (wide + spread.to(g.device, wide.dtype) * noise).to(g.dtype)
