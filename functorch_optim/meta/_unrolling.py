"""Training as a function that can be differentiated."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import check_integer
from functorch_optim._core.rule import with_loss
from functorch_optim._core.transformation import GradientTransformation, apply_updates, check_transformation
from functorch_optim._core.vector import common_dtype
from functorch_optim.meta._capture import computed
from functorch_optim.meta._derivative import replaced, split
from functorch_optim.meta._rematerialization import checkpoint as checkpointed
from functorch_optim.tree import Tree


class Unrolled(NamedTuple):
    """What `unroll` returns.

    Attributes:
        params: the trained parameters.
        state: the transformation's state after the last step.
        losses: the loss of each batch, before its step: shape (steps,).

    Example:
        >>> import functorch_optim as fo, torch
        >>> trained = fo.meta.unroll(lambda w, x: (w - x) ** 2, fo.sgd(0.5), torch.tensor(0.0), torch.ones(2))
        >>> trained.params, trained.losses
        (tensor(1.), tensor([1., 0.]))
    """

    params: Tree
    state: Any
    losses: Tensor


def unroll(
    loss_fn: Callable[[Tree, Any], Any],
    transformation: GradientTransformation,
    params: Tree,
    batches: Iterable[Any],
    state: Any = None,
    *,
    first_order: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
    has_aux: bool = False,
) -> Any:
    """Train on one batch after the other, and keep what derivatives need.

        g = grad loss_fn(params, batch);    u, state = update(g, state, params);    params <- params + u

    The result is a function of everything that goes in: the parameters, the batches, the state, the hyperparameters of
    the transformation, and whatever `loss_fn` closes over. It can be differentiated in all of them, by autograd and by
    torch.func, batched by `torch.vmap`, and compiled whole.

    Args:
        loss_fn: `loss_fn(params, batch)`, a 0-dim tensor.
        transformation: makes updates of gradients. The extras `value` and `value_fn`, where it declares them, are the
            loss of the batch and the loss as a function of the parameters.
        params: tree of tensors to begin with.
        batches: each is given to `loss_fn` for one step: a list of tensors, say; a tensor, of which each step takes a
            slice of the first dimension; `zip(xs, ys)`; `range(steps)` where there is no data.
        state: the state to begin with, such as that of a former call. None: `transformation.init(params)`.
        first_order: whether gradients are taken for constants, as in first-order MAML: no second derivatives of
            `loss_fn` are needed then.
        truncate: gradients flow through this many steps at most: parameters and state are detached after each of as
            many steps. Sums of `losses` then have the gradient of truncated backpropagation; that of the final
            parameters comes from the steps since the last cut alone.
        checkpoint: whether to compute again, when a derivative is wanted, what the steps have computed, and keep
            parameters and state alone, of every `checkpoint` steps. True: of every square root of the number of steps,
            for memory that grows like it. The derivatives are the same. See `fo.meta.checkpoint`.
        has_aux: whether `loss_fn` returns a pair, the loss and a tree of something else.

    Returns:
        The trained parameters, the state, and the losses. With `has_aux` a pair: these, and a list of what else
        `loss_fn` returned, an entry for each batch.

    Raises:
        TypeError: `transformation` is none; `batches` cannot be iterated, or is a dict; `truncate` or `checkpoint` is
            no integer.
        ValueError: `truncate` or `checkpoint` is less than 1.
        RuntimeError: see `fo.meta.checkpoint`.

    Source: Maclaurin et al., Gradient-based Hyperparameter Optimization through Reversible Learning, arXiv:1502.03492;
    Finn et al., Model-Agnostic Meta-Learning, arXiv:1703.03400; Chen et al., Training Deep Nets with Sublinear Memory
    Cost, arXiv:1604.06174.

    Example:
        >>> import functorch_optim as fo, torch
        >>> def loss_fn(params, batch):
        ...     return ((params["w"] - batch) ** 2).sum()
        >>> def outer(lr):
        ...     trained = fo.meta.unroll(loss_fn, fo.sgd(lr), {"w": torch.zeros(1)}, torch.ones(3))
        ...     return trained.losses.sum()
        >>> torch.func.grad(outer)(torch.tensor(0.25))
        tensor(-3.)
    """
    check_transformation(transformation, "unroll(loss_fn, sgd(0.1), params, batches)")
    if truncate is not None:
        check_integer("truncate", truncate, 1)
    if not isinstance(checkpoint, bool):
        check_integer("checkpoint", checkpoint, 1)
    rules = [link.rule for link in transformation._links]
    searching = any("value_fn" in rule.extras.names for rule in rules)
    state = transformation.init(params) if state is None else state

    def segment(params: Tree, state: Any, batches: Sequence[Any], first: int) -> tuple[Tree, Any, list[Any]]:
        results = []
        for i, batch in enumerate(batches, start=first):
            if truncate is not None and i > 0 and i % truncate == 0:
                params, state = tree.stop_gradient((params, state))
            grads, result = _grad_and_value(loss_fn, params, batch, has_aux)
            grads = tree.stop_gradient(grads) if first_order else grads
            extra = {"value_fn": functools.partial(_loss, loss_fn, batch, has_aux)} if searching else {}
            updates, state = transformation.update(grads, state, params, **with_loss(rules, result[0], extra))
            params = apply_updates(params, updates)
            results.append(result)
        return params, state, results

    steps = _listed(batches)
    length = len(steps)
    if checkpoint:
        segment = checkpointed(segment)
        length = max(math.isqrt(len(steps)), 1) if checkpoint is True else checkpoint
    results: list[Any] = []
    for first in range(0, len(steps), max(length, 1)):
        params, state, some = segment(params, state, steps[first : first + length], first)
        results += some
    losses = [loss for loss, _ in results]
    stacked = torch.stack(losses) if losses else torch.zeros(0, dtype=common_dtype(tree.flatten(params)[0]))
    unrolled = Unrolled(params, state, stacked)
    return (unrolled, [aux for _, aux in results]) if has_aux else unrolled


def _listed(batches: Any) -> list[Any]:
    if isinstance(batches, Mapping) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"unroll needs batches, one for each step, got a {type(batches).__name__}; give a list of them, a tensor "
            "with a batch in each slice, zip(xs, ys), or range(steps)"
        )
    return list(batches)


def _loss(loss_fn: Callable[[Tree, Any], Any], batch: Any, has_aux: bool, params: Tree) -> Tensor:
    result: Any = loss_fn(params, batch)
    loss: Tensor = result[0] if has_aux else result
    return loss


def _grad_and_value(
    loss_fn: Callable[[Tree, Any], Any], params: Tree, batch: Any, has_aux: bool
) -> tuple[Tree, tuple[Tensor, Any]]:
    """Differentiate a loss with respect to the tensors of a tree; return what else there is too."""
    leaves, structure = tree.flatten(params)
    present = [i for i, leaf in enumerate(leaves) if leaf is not None]

    rest: list[Any] = []

    def loss(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        result = loss_fn(tree.unflatten(structure, replaced(leaves, present, tensors)), batch)
        value, aux = result if has_aux else (result, None)
        aux_tensors, rebuild = split(aux)
        rest[:] = [rebuild]
        return value, aux_tensors

    grads, (value, aux) = torch.func.grad_and_value(loss, has_aux=True)([leaves[i] for i in present])
    *known, value = computed([*grads, *aux, value])
    grads, aux = known[: len(present)], known[len(present) :]
    return tree.unflatten(structure, replaced([None] * len(leaves), present, grads)), (value, rest[0](aux))
