"""Training as a function that can be differentiated."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import check_loss
from functorch_optim._core.hyperparameters import check_integer
from functorch_optim._core.rule import with_loss
from functorch_optim._core.transformation import GradientTransformation, apply_updates, check_transformation
from functorch_optim._core.vector import common_dtype
from functorch_optim.meta._capture import computed
from functorch_optim.meta._derivative import replaced, split
from functorch_optim.meta._exact import exact_derivatives
from functorch_optim.meta._rematerialization import checkpoint as checkpointed
from functorch_optim.tree import Tree


class Unrolled(NamedTuple):
    """The result of `unroll`.

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
    loss_fn: Callable[..., Any],
    transformation: GradientTransformation,
    params: Tree,
    batches: Iterable[Any],
    state: Any = None,
    *,
    first_order: bool = False,
    truncate: int | None = None,
    checkpoint: bool | int = False,
    has_aux: bool = False,
    buffers: Tree = None,
) -> Any:
    """Train on one batch after the other, as a differentiable function.

        g = grad loss_fn(params, batch);    u, state = update(g, state, params);    params <- params + u

    The result is a function of the parameters, the batches, the state, the hyperparameters of the transformation, and
    the tensors that `loss_fn` closes over. It can be differentiated with respect to all of them, by autograd and by
    torch.func, batched by `torch.vmap`, and compiled whole.

    Args:
        loss_fn: `loss_fn(params, batch)`, a 0-dim tensor; with `buffers`, `loss_fn(params, batch, buffers)`.
        transformation: makes updates from gradients. If it declares the extras `value`, `value_fn` and `grad_fn`, it
            is given the loss of the batch, and that loss and its gradient as functions of the parameters.
        params: tree of tensors to begin with.
        batches: an iterable with one batch for each step: a list of tensors; a tensor, of which each step takes a
            slice of the first dimension; `zip(xs, ys)`; `range(steps)` where there is no data. `[(x, y)] * steps` has
            the same pair for every step. A call uses an iterator up: make a new one for the next call.
        state: the state to begin with, such as that of a former call. None: `transformation.init(params)`.
        first_order: whether gradients are constants, as in first-order MAML. Then no second derivatives of `loss_fn`
            are needed. Derivatives with respect to parameters, state and hyperparameters of the transformation still
            flow through the steps. Batches and tensors that `loss_fn` closes over, such as the strength of an
            augmentation, act through gradients alone: `losses` has derivatives with respect to them, and the trained
            parameters have derivative 0. To learn them, leave it False.
        truncate: gradients flow through this many steps at most: parameters and state are detached each time after
            this many steps. Sums of `losses` then have the gradient of truncated backpropagation; that of the final
            parameters comes from the steps since the last cut alone.
        checkpoint: number of steps between two checkpoints. Only parameters and state at checkpoints are kept, and the
            steps in between are computed again when a derivative is wanted. True: the square root of the number of
            steps, so that memory grows like it. The derivatives are the same. See `fo.meta.checkpoint`.
        has_aux: whether `loss_fn` returns a pair, the loss and a tree of anything else.
        buffers: tree of further tensors that one step hands to the next, such as `dict(module.named_buffers())` with
            the running statistics of BatchNorm. `loss_fn` is given copies, and may modify them in place, as modules do;
            the next step begins with the modified ones. Under `torch.vmap` every task has its own. None: there are
            none.

    Returns:
        The trained parameters, the state, and the losses. With `has_aux` a tuple: these, and a list of the second
        results of `loss_fn`, one for each batch. With `buffers` a tuple, too; its last entry are the last buffers.

    Raises:
        TypeError: `transformation` is no transformation; `batches` cannot be iterated, or is a dict, or a tuple that
            looks like one batch, such as a pair of tensors; `truncate` or `checkpoint` is no integer.
        ValueError: `loss_fn` returns more than a number; `truncate` or `checkpoint` is less than 1; `batches` is an
            iterator that has been used up.
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
    state = transformation.init(params) if state is None else state
    if not first_order:  # first derivatives are right
        loss_fn = exact_derivatives()(loss_fn)

    def segment(
        params: Tree, state: Any, buffers: Tree, batches: Sequence[Any], first: int
    ) -> tuple[Tree, Any, Tree, list[Any]]:
        results = []
        for i, batch in enumerate(batches, start=first):
            if truncate is not None and i > 0 and i % truncate == 0:
                params, state, buffers = tree.stop_gradient((params, state, buffers))
            grads, loss, aux, carried = _grad_and_value(loss_fn, params, batch, buffers, has_aux)
            grads = tree.stop_gradient(grads) if first_order else grads
            value_fn = functools.partial(_loss, loss_fn, batch, buffers, has_aux)
            grad_fn = functools.partial(_grads, loss_fn, batch, buffers, has_aux, first_order)
            extras = with_loss(rules, {}, loss, value_fn, grad_fn)
            updates, state = transformation.update(grads, state, params, **extras)
            params, buffers = apply_updates(params, updates), carried
            results.append((loss, aux))
        return params, state, buffers, results

    steps = _listed(batches)
    length = len(steps)
    if checkpoint:
        segment = checkpointed(segment)
        length = max(math.isqrt(len(steps)), 1) if checkpoint is True else checkpoint
    results: list[Any] = []
    carried = buffers
    for first in range(0, len(steps), max(length, 1)):
        params, state, carried, some = segment(params, state, carried, steps[first : first + length], first)
        results += some
    losses = [loss for loss, _ in results]
    dtype, device = common_dtype(tree.flatten(params)[0]), tree.device_of(params)
    stacked = torch.stack(losses) if losses else torch.zeros(0, dtype=dtype, device=device)
    returned: tuple[Any, ...] = (Unrolled(params, state, stacked),)
    returned += ([aux for _, aux in results],) if has_aux else ()
    returned += (carried,) if buffers is not None else ()
    return returned if len(returned) > 1 else returned[0]


def _listed(batches: Any) -> list[Any]:
    if isinstance(batches, Mapping) or not hasattr(batches, "__iter__"):
        raise TypeError(
            f"unroll needs batches, one for each step, got a {type(batches).__name__}; give a list of them, a tensor "
            "with a batch in each slice, zip(xs, ys), or range(steps)"
        )
    listed = list(batches)
    if isinstance(batches, tuple) and _is_one_batch(batches):
        shapes = ", ".join([str(tuple(part.shape)) for part in batches if isinstance(part, Tensor)])
        raise TypeError(
            f"unroll needs batches, one for each step, got a tuple of tensors of shapes {shapes}, which looks like one "
            "batch. Give [batch] for one step, [batch] * steps for more, zip(xs, ys) for a step with each pair of "
            "slices, or a list where each tensor is a batch"
        )
    if not listed and not hasattr(batches, "__len__"):
        raise ValueError(
            f"unroll got a {type(batches).__name__} without batches: an iterator is used up by its first use. Make it "
            "anew for every call, as zip(xs, ys) does, or make a list of it once"
        )
    return listed


def _is_one_batch(batches: tuple[Any, ...]) -> bool:
    """Tell whether a tuple is a NamedTuple, a pair of tensors, or made of tensors that differ in form."""
    if not all(isinstance(part, Tensor) for part in batches):
        return hasattr(batches, "_fields")
    forms = {(part.dtype, part.ndim, tuple(part.shape[1:])) for part in batches}
    return hasattr(batches, "_fields") or len(batches) == 2 or len(forms) > 1


def _called(
    loss_fn: Callable[..., Any], params: Tree, batch: Any, buffers: Tree, has_aux: bool
) -> tuple[Tensor, Any, Tree]:
    """Return the loss, the second result if there is one, and the buffers after the call."""
    if buffers is None:
        result = loss_fn(params, batch)
    else:
        # The sum with a zero from all arguments is a copy; it is batched if torch.vmap batches any argument.
        inputs = [leaf for leaf in tree.flatten((params, batch))[0] if isinstance(leaf, Tensor)]
        zero = sum([leaf.new_zeros((), dtype=torch.float32) for leaf in inputs], torch.zeros((), device="cpu"))
        buffers = tree.map(lambda buffer: buffer + zero.to(buffer), buffers)
        result = loss_fn(params, batch, buffers)
    value, aux = result if has_aux else (result, None)
    check_loss("loss_fn must return", value)
    return value, aux, buffers


def _loss(loss_fn: Callable[..., Any], batch: Any, buffers: Tree, has_aux: bool, params: Tree) -> Tensor:
    return _called(loss_fn, params, batch, buffers, has_aux)[0]


def _grads(
    loss_fn: Callable[..., Any], batch: Any, buffers: Tree, has_aux: bool, first_order: bool, params: Tree
) -> Tree:
    grads = _grad_and_value(loss_fn, params, batch, buffers, has_aux)[0]
    return tree.stop_gradient(grads) if first_order else grads


def _grad_and_value(
    loss_fn: Callable[..., Any], params: Tree, batch: Any, buffers: Tree, has_aux: bool
) -> tuple[Tree, Tensor, Any, Tree]:
    """Differentiate a loss with respect to the tensors of a tree; return its further results too."""
    leaves, structure = tree.flatten(params)
    present = [i for i, leaf in enumerate(leaves) if leaf is not None]

    rest: list[Any] = []

    def loss(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        given = tree.unflatten(structure, replaced(leaves, present, tensors))
        value, *others = _called(loss_fn, given, batch, buffers, has_aux)
        others_tensors, rebuild = split(others)
        rest[:] = [rebuild]
        return value, others_tensors

    grads, (value, others) = torch.func.grad_and_value(loss, has_aux=True)([leaves[i] for i in present])
    *known, value = computed([*grads, *others, value])
    grads, others = known[: len(present)], known[len(present) :]
    aux, carried = rest[0](others)
    return tree.unflatten(structure, replaced([None] * len(leaves), present, grads)), value, aux, carried
