"""Adam-mini: Adam with one learning rate for each block of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.combine import partition
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_betas
from functorch_optim._core.leafwise import leafwise
from functorch_optim._core.rule import leaf_state
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype
from functorch_optim._numerics import debias, safe_sqrt, sqrt
from functorch_optim.optimizers._descent import check_real, descent
from functorch_optim.tree import Tree

Block: TypeAlias = Literal["row", "tensor", "element"] | int
"""The elements that share a second moment; an integer is a number of attention heads."""


@leaf_state
class AdamMiniState(NamedTuple):
    """The state of `adam_mini` for one parameter.

    Attributes:
        exp_avg: m, running mean of g: like p.
        exp_avg_sq: v, running mean of the means of g^2 over blocks: (), (rows,), (heads,), or like p; float32 at least.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


class AdamMiniScalars(NamedTuple):
    """The numbers of Adam-mini at a step: the weights of new values, both corrections, and eps."""

    weight1: Any
    beta2: Any
    weight2: Any
    rate: Any
    root: Any
    eps: Any


@factory
def adam_mini(
    lr: Hyperparameter = 1e-3,
    betas: tuple[Hyperparameter, Hyperparameter] = (0.9, 0.999),
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
    block: Block | Callable[[Tensor], Block] | Tree = "row",
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Adam-mini: AdamW with one second moment for each block of a parameter, in half of Adam's memory.

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) mean of g^2 over the block
        u = -lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p)

    Args:
        lr: learning rate >= 0: number, 0-dim tensor, or schedule.
        betas: decay rates of m and of v, in [0, 1).
        eps: added to the root, >= 0.
        weight_decay: decoupled, >= 0. Unless it is the number 0, `update` needs the parameters.
        block: the elements that share a second moment.
            "row": each index of the first dimension: an output of a layer, a token; an element of a vector.
            "tensor": the whole parameter.
            "element": each element: this is AdamW.
            An integer: each attention head, of which so many are along the first dimension.
            A function of a parameter that returns one of these.
            A tree of these like the parameters, or a prefix of one; `fo.label` makes one of names.
        maximize: ascend instead; parameters still shrink.

    Raises:
        ValueError: a number is out of range; `block` is none of these; or a parameter cannot be parted into so many
            heads.
        TypeError: a parameter is complex.

    The authors choose by name: heads for queries and keys, the tensor for norms, rows for other matrices, and elements
    for biases, which are the rows of a vector. For a model with eight heads that is

        block = fo.label(model, {("*q_proj.weight", "*k_proj.weight"): 8, torch.nn.LayerNorm: "tensor"}, default="row")

    With a tree of blocks, the state of the rule is a dict: block, as a string -> state.

    Source: Zhang et al., Adam-mini: Use Fewer Learning Rates To Gain More, arXiv:2406.16793, algorithm 1.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.adam_mini(lr=0.1), torch.zeros(2, 2)
        >>> updates, state = tx.update(torch.tensor([[3.0, 4.0], [5.0, 5.0]]), tx.init(params))
        >>> updates, fo.tree.get(state, "exp_avg_sq").shape
        (tensor([[-0.0849, -0.1131],
                [-0.1000, -0.1000]]), torch.Size([2]))
    """
    check_betas(betas)
    check("epsilon value", eps)

    def scalars(step: Tensor) -> AdamMiniScalars:
        beta1, beta2 = at(betas[0], step), at(betas[1], step)
        root = sqrt(debias(beta2, step))
        return AdamMiniScalars(1 - beta1, beta2, 1 - beta2, 1 / debias(beta1, step), root, at(eps, step))

    def update(g: Tensor, state: AdamMiniState, p: Any, s: AdamMiniScalars) -> Any:
        m = torch.lerp(state.exp_avg, g, s.weight1)
        v = s.beta2 * state.exp_avg_sq + s.weight2 * _means(g * g, state.exp_avg_sq.shape)
        divisor = safe_sqrt(v) / s.root + s.eps
        return _divided(s.rate * m, divisor), AdamMiniState(m, v)

    def of(block: Any) -> GradientTransformation:
        def init(p: Tensor) -> AdamMiniState:
            check_real("Adam-mini", p)
            shape = _shape(block(p) if callable(block) else block, p)
            return AdamMiniState(torch.zeros_like(p), p.new_zeros(shape, dtype=common_dtype([p])))

        return leafwise(init, update, scalars)

    if tree.is_leaf(block):
        if not callable(block):
            _check_block(block)
        rule = of(block)
    else:
        blocks = tree.flatten(block)[0]
        for path, one in zip(tree.paths(block), blocks, strict=True):
            if one is not None:
                _check_block(one, f" at {path!r}")
        rule = partition({str(one): of(one) for one in blocks if one is not None}, tree.map(str, block))
    return descent(rule, lr=lr, weight_decay=weight_decay, decoupled=True, maximize=maximize)


def _check_block(block: Any, where: str = "") -> None:
    if block not in ("row", "tensor", "element") and (type(block) is not int or block < 1):
        raise ValueError(
            f"Invalid block{where}: {block!r}; choose 'row', 'tensor', 'element', or a number of heads, or give a tree "
            "or a function of a parameter that returns one of these"
        )


def _shape(block: Any, p: Tensor) -> tuple[int, ...]:
    """Return the shape of the second moments: one for each block."""
    _check_block(block)
    if block == "element" or (block == "row" and p.ndim == 0):
        return p.shape
    if block == "tensor":
        return ()
    if block != "row" and (p.ndim == 0 or p.shape[0] % block):
        raise ValueError(
            f"A parameter of shape {tuple(p.shape)} cannot be parted into {block} heads along its first dimension; "
            "give block='row', or a tree that has heads for queries and keys alone"
        )
    return (p.shape[0] if block == "row" else block,)


def _means(x: Tensor, shape: torch.Size) -> Tensor:
    """Take the mean over each block; of nothing: 0."""
    parts = _in_blocks(x, shape)
    return x if x.shape == shape else parts.sum(-1) / max(parts.shape[-1], 1)


def _divided(x: Tensor, by: Tensor) -> Tensor:
    """Divide each block by its number."""
    return x / by if x.shape == by.shape else (_in_blocks(x, by.shape) / by.unsqueeze(-1)).reshape(x.shape)


def _in_blocks(x: Tensor, shape: torch.Size) -> Tensor:
    """Put the elements of each block into the last dimension."""
    return x.reshape(*shape, x.numel() // max(shape.numel(), 1))
