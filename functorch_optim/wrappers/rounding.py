"""Parameters in half precision: float32 copies, compensated sums, and stochastic rounding, for any transformation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import HALF, check_has_params
from functorch_optim._core.combine import masked
from functorch_optim._core.links import Link
from functorch_optim._core.rule import Rule, leaf_state
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution.sharded import on_shards
from functorch_optim._numerics import DROPPED, cut, rounded, rounded_to
from functorch_optim._random import at_step, bits, key_of, mixed
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved
from functorch_optim.wrappers._wrapping import around, copied, wrapped, wrapper


@leaf_state
class MasterWeightsState(NamedTuple):
    """The state of `master_weights` for one parameter in half precision.

    Attributes:
        master: the parameter in float32.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.master_weights(fo.sgd(0.1)).init(torch.ones(1, dtype=torch.bfloat16))[1].master
        tensor([1.])
    """

    master: Tensor


@leaf_state
class KahanState(NamedTuple):
    """The state of `kahan` for one parameter in half precision.

    Attributes:
        compensation: the part of the sum of all updates that the parameter lacks: like p.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.kahan(fo.sgd(0.1)).init(torch.ones(1, dtype=torch.bfloat16))[1].compensation
        tensor([0.], dtype=torch.bfloat16)
    """

    compensation: Tensor


@saved
class StochasticRoundingState(NamedTuple):
    """The state of `stochastic_rounding`, once for the tree.

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
        key: seed of the random bits of all steps: 0-dim int64 tensor.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.stochastic_rounding(fo.sgd(0.1), generator=5).init(torch.zeros(2))[1]
        StochasticRoundingState(step=tensor(0), key=tensor(5))
    """

    step: Tensor
    key: Tensor


def master_weights(tx: Any) -> Any:
    """Train float32 copies m of parameters in half precision: the parameters are their rounding.

        m <- p where p is not round(m)
        m <- m + tx(g, m)
        p <- round(m)

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, all of it in float32, and a `MasterWeightsState`.
        Parameters in float32 or wider have no copy and are trained as `tx` does.

    Raises:
        TypeError: `tx` is neither a transformation nor a factory.
        ValueError: `tx` contains a wrapper that rounds, such as `kahan`.

    The training is that of float32 parameters whose gradients are taken at their rounding. Wrap it around the whole
    chain. An edit of the parameters from outside wins: where an element is not the rounding of its copy any more, it
    becomes the copy, and is trained on.

    `update` returns updates in float32, which `fo.apply_updates` adds to half precision. The sum is the rounded copy.
    (A step that takes an element to less than 2^-12 of itself may miss it by 2^-23 of the former value, and the next
    step takes that for an edit.) The copies are bit for bit a float32 training that runs on the same machine. By
    default torch's fused kernels run Adam and others in float32, whose last digits differ from those of other machines.
    Derivatives pass through rounding as through the identity.

    Source: Micikevicius et al., Mixed Precision Training, arXiv:1710.03740, section 3.1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.master_weights(fo.sgd(1.0)), torch.ones(1, dtype=torch.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     grads = torch.full((1,), 0.001, dtype=torch.bfloat16)
        ...     params, state = fo.step(tx, grads, state, params)
        >>> params, state[1].master
        (tensor([0.9961], dtype=torch.bfloat16), tensor([0.9970]))
    """
    return wrapped(tx, _master_weights, "master_weights(adamw(1e-3))")


@wrapper
def _master_weights(tx: GradientTransformation) -> GradientTransformation:
    links = [link._replace(dtypes=link.dtypes or _single) for link in tx._links]
    return _around(GradientTransformation._of(links, tx._layout), _of(_master))


def _master(dtype: torch.dtype) -> Rule:
    def hands(p: Tensor, state: MasterWeightsState) -> Tensor:
        return torch.where(p == rounded(state.master, dtype), state.master, p)

    def update(u: Tensor, state: MasterWeightsState, p: Tensor, s: tuple[()]) -> tuple[Tensor, MasterWeightsState]:
        master = hands(p, state) + u
        return _way(p, rounded(master, dtype)), MasterWeightsState(master)

    return _elementwise(lambda p: MasterWeightsState(copied(p)), update, MasterWeightsState, hands)


def kahan(tx: Any) -> Any:
    """Add updates to parameters in half precision by compensated summation: rounding errors are added later.

        u = tx(g) + c
        q = round(p + u),  c <- u - (q - p),  p <- q

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and a `KahanState`. Parameters in float32 or wider are
        trained as `tx` does.

    Raises:
        TypeError: `tx` is neither a transformation nor a factory.

    c is in the precision of the parameters, so that p and c together have about twice its digits, in half the memory of
    `master_weights`. The gradients and updates of `tx` are float32. Its states are like the parameters, unless
    `cast_states` makes them float32. The parameters may be edited from outside: c is less than the rounding of a step.
    `update` returns updates in float32, whose sum with the parameters is q. Wrap it around the whole chain.
    Derivatives pass through rounding as through the identity.

    Source: Zamirai et al., Revisiting BFloat16 Training, arXiv:2010.06192, algorithm 3; Kahan 1965. As in the package
    optimi, which computes u in half precision.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.kahan(fo.sgd(1.0)), torch.ones(1, dtype=torch.bfloat16)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     grads = torch.full((1,), 0.001, dtype=torch.bfloat16)
        ...     params, state = fo.step(tx, grads, state, params)
        >>> params, state[1].compensation
        (tensor([0.9961], dtype=torch.bfloat16), tensor([0.0009], dtype=torch.bfloat16))
    """
    return wrapped(tx, _kahan, "kahan(adamw(1e-3))")


@wrapper
def _kahan(tx: GradientTransformation) -> GradientTransformation:
    return _around(tx, _of(_compensated))


def _compensated(dtype: torch.dtype) -> Rule:
    def update(u: Tensor, state: KahanState, p: Tensor, s: tuple[()]) -> tuple[Tensor, KahanState]:
        u = u + state.compensation
        moved = _way(p, rounded(p + u, dtype))
        return moved, KahanState(u - moved)

    return _elementwise(lambda p: KahanState(torch.zeros_like(p)), update, KahanState)


def stochastic_rounding(tx: Any, generator: torch.Generator | int | Tensor | None = None) -> Any:
    """Round parameters in half precision up or down at random, so that the mean is the number before rounding.

        x = p + tx(g)
        p <- the next number above x with probability (x - below) / (above - below), else the next below

    Args:
        tx: transformation, its learning rate included; or a factory, then the result is a factory of the same
            hyperparameters.
        generator: source of the key of all random bits, which is drawn once, when this function is called: a
            `torch.Generator`, or None for torch's own. Or the key itself: an integer, or a 0-dim tensor of int64.

    Returns:
        Transformation whose state is a tuple: the state of `tx`, and a `StochasticRoundingState`. Parameters in float32
        or wider are trained as `tx` does.

    Raises:
        TypeError: `tx` is neither a transformation nor a factory, or `generator` is of another type.
        ValueError: `update` is called without the parameters.

    x is computed in float32. In bfloat16 the probabilities are exact; in float16 they are below 2^-14 in absolute value
    multiples of 2^-13. Numbers that need no rounding, infinite ones and NaN stay. The bits are a hash of the key in the
    state, of the step, and of the place in the tree, so that the same state gives the same numbers, and a resumed
    training goes on as if it had not stopped. Under `torch.vmap`, batch the key for different bits. The gradients and
    updates of `tx` are float32; its states are like the parameters. `update` returns updates in float32, whose sum with
    the parameters is exact. Wrap it around the whole chain. Derivatives pass through rounding as through the
    identity. The bits of sharded parameters (DTensor) are those of whole ones.

    Source: Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551; Zamirai et al., Revisiting
    BFloat16 Training, arXiv:2010.06192, algorithm 2.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.stochastic_rounding(fo.sgd(1.0), generator=0), torch.ones(1000, dtype=torch.bfloat16)
        >>> grads = torch.full((1000,), 0.001, dtype=torch.bfloat16)
        >>> params, state = fo.step(tx, grads, tx.init(params), params)
        >>> bool(((params == 1) | (params == 0.99609375)).all()), round(float(params.float().mean()), 3)
        (True, 0.999)
    """
    key = key_of(generator, "stochastic_rounding(adamw(1e-3), generator=0)")
    return wrapped(tx, _stochastic_rounding, "stochastic_rounding(adamw(1e-3))", generator=key)


@wrapper
def _stochastic_rounding(tx: GradientTransformation, generator: int | Tensor) -> GradientTransformation:
    def init(params: Tree) -> StochasticRoundingState:
        device = tree.device_of(params)
        return StochasticRoundingState(
            torch.zeros((), dtype=torch.int64, device=device),
            torch.as_tensor(generator, dtype=torch.int64, device=device).clone(),
        )

    def update(updates: Tree, state: StochasticRoundingState, params: Tree) -> tuple[Tree, StochasticRoundingState]:
        check_has_params("stochastic_rounding", params)
        step = state.step + 1
        key = at_step(state.key, step)
        leaves, structure = tree.flatten(updates)
        pairs = enumerate(zip(leaves, tree.flatten(params)[0], strict=True))
        moved = [u if u is None or p.dtype not in HALF else _at_random(p, u, mixed(key + i)) for i, (u, p) in pairs]
        return tree.unflatten(structure, moved), StochasticRoundingState(step, state.key)

    made = GradientTransformation(init, update)
    return around(tx, None, made, widens=True)


def _at_random(p: Tensor, u: Tensor, key: Tensor) -> Tensor:
    """Return the update after which a parameter is rounded up or down."""

    def update(p: Tensor, u: Tensor, places: Tensor) -> Tensor:
        x = p + u
        wide = x.detach()
        chance = bits(key.to(x.device), places, DROPPED[p.dtype]).to(torch.int32)
        near_zero = torch.floor(wide * 2.0**24 + chance * 2.0**-13) * 2.0**-24
        return _way(p, rounded_to(x, cut(wide, chance, near_zero, p.dtype)))

    return on_shards(update, p, u)


# The rules of wrappers that round are for parameters in half precision, and see updates in float32. -------------------


def _way(p: Tensor, new: Tensor) -> Tensor:
    """Return the update that leads from a parameter to its next value; an infinite one stays."""
    return torch.where(torch.isinf(p), 0.0, new - p)


def _elementwise(init: Any, update: Any, state_type: type, hands: Any = None) -> Rule:
    options: Any = {"elementwise": True, "needs_params": True, "sparse": "touched"}
    return Rule(init, update, state_type=state_type, hands=hands, **options)


def _of(rule: Any) -> GradientTransformation:
    """Make a transformation of a rule that depends on the dtype of the parameters."""
    link = Link(replace(rule(torch.float32), of_dtype={dtype: rule(dtype) for dtype in HALF}))
    return masked(GradientTransformation._of((link,), 0), _are_half)


def _are_half(params: Tree) -> Tree:
    """Mask: parameters in half precision."""
    return tree.map(lambda p: p.dtype in HALF, params)


def _around(tx: GradientTransformation, after: GradientTransformation) -> GradientTransformation:
    return around(tx, None, after, widens=True)


def _single(name: str) -> torch.dtype:
    return torch.float32
