"""L-BFGS: Newton's method, with an inverse Hessian that is estimated from the last steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._control import is_known, is_masked
from functorch_optim._core.checks import check_has_params, check_loss
from functorch_optim._core.hyperparameters import Hyperparameter, at, check, check_integer, check_number
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim._core.vector import common_dtype, flattened, unflattened
from functorch_optim.optimizers._limited_memory import PATIENCE, STRONG_WOLFE, Memory, Settings, minimize, new_memory
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved


@saved
class LBFGSState(NamedTuple):
    """The state of `lbfgs`, for n real numbers in all parameters (a complex number is two).

    Attributes:
        step: number of updates done: 0-dim int64 tensor.
        func_evals: number of evaluations done: 0-dim int64 tensor.
        n_iter: number of iterations done: 0-dim int64 tensor.
        d: last direction: (n,).
        t: last step length: 0-dim.
        old_dirs: y, differences of gradients, the newest last; rows without a pair are zero: (history_size, n).
        old_stps: s, differences of parameters, in the same order: (history_size, n).
        ro: 1 / y's, in the same order: (history_size,).
        H_diag: scale of the first inverse Hessian of the recursion: 0-dim.
        prev_flat_grad: gradient at the start of the last iteration: (n,).
        prev_loss: loss at the start of the last iteration: 0-dim.
    """

    step: Tensor
    func_evals: Tensor
    n_iter: Tensor
    d: Tensor
    t: Tensor
    old_dirs: Tensor
    old_stps: Tensor
    ro: Tensor
    H_diag: Tensor
    prev_flat_grad: Tensor
    prev_loss: Tensor


@factory
def lbfgs(
    lr: Hyperparameter = 1.0,
    max_iter: int = 20,
    max_eval: int | None = None,
    tolerance_grad: float = 1e-7,
    tolerance_change: float = 1e-9,
    history_size: int = 100,
    line_search_fn: str | None = None,
) -> GradientTransformation:
    """Minimize with L-BFGS: an update has many iterations, as a step of torch.optim.LBFGS has.

    An iteration at x with gradient g goes along d = -H g. H is the inverse Hessian that the pairs s, y of the last
    iterations imply; the two-loop recursion multiplies with it, where ro_i = 1 / y_i's_i and H_diag = y's / y'y of the
    newest pair:

        q <- -g
        for i from newest to oldest:    al_i = ro_i s_i'q;    q <- q - al_i y_i
        d <- H_diag q
        for i from oldest to newest:    be_i = ro_i y_i'd;    d <- d + (al_i - be_i) s_i
        x <- x + t d                    t = lr, or min(1, 1 / |g|_1) lr in the first iteration of all
        s = t d;   y = g_new - g        kept when y's > 1e-10

    An update ends after `max_iter` iterations or `max_eval` evaluations; when the largest element of |g| is at most
    `tolerance_grad`; when the largest element of |t d|, or the change of the loss, is within `tolerance_change`; and
    when the slope g'd is above -tolerance_change.

    `update(grads, state, params, *, value_fn, value=None)` needs the parameters and the loss as a function of them.
    `grads` and `value` are those at `params`; without `value`, the loss is evaluated there once more. A parameter
    whose gradient is None is held fixed, and the algorithm treats its gradient as zero.

    In `fo.Optimizer`, `value_fn` is called with a dict by name if the parameters have names, and else with a list.
    `opt.step(closure)` makes `value_fn` from the closure, as torch.optim.LBFGS does. For a loss that is differentiated,
    call `opt.step(closure, value_fn=loss)`. Inside of `masked` and `partition`, `value_fn` gets `MaskedNode()` in place
    of the other parameters, and must have their values from elsewhere.

    Args:
        lr: step length >= 0, or with a line search its first trial: number, 0-dim tensor, or schedule of the number of
            updates done.
        max_iter: largest number of iterations in an update, >= 1.
        max_eval: number of evaluations after which an update ends, >= 1. It is checked after an iteration, so there are
            at least two, unless the gradient is small at once. It also ends a line search, and the update stands still
            if the search has found no lower loss. None is 1.25 max_iter, except that the first line search may take 25
            evaluations to find a lower loss.
        tolerance_grad: see above, >= 0.
        tolerance_change: see above, >= 0. The tolerance of a line search is always 1e-9, as in torch.
        history_size: number of pairs that are kept, >= 1. The state has room for all from the start.
        line_search_fn: "strong_wolfe", or None for none.

    Raises:
        ValueError: a number is out of range, or `line_search_fn` is unknown.
        TypeError: a count is no integer.

    Same numbers as torch.optim.LBFGS, except that an additive update rounds the parameters once more. Badly curved
    problems amplify that. Further differences:

    - A line search shortens its step where loss or slope are not finite, as outside of a logarithm's domain. torch's
      goes on further out.
    - With `max_iter` below 20 and no `max_eval`, torch's update may stand still, and all updates after it. Here it goes
      on.
    - All numbers, and the loss, are computed in the widest dtype of the parameters (float32 at least).
    - A parameter without a gradient keeps its value even when the history would move it. Parameters may be empty.
    - An update may be differentiated. The derivative is that of its iterations and trials, with their number held
      fixed. If parameters require grad and no derivative is wanted, wrap `update` in `torch.no_grad()`.

    Put it first in a chain: it evaluates gradients itself, and these are not transformed.

    Inside of `torch.vmap` and `torch.compile` no loop can end early. Every update takes the time of `max_iter`
    iterations (with a line search, of `max_eval` evaluations; of at least 25 if it is None), each with `history_size`
    pairs: choose small numbers there. Rejected trials are differentiated there, too: if one has an infinite derivative,
    on the border of the loss's domain, the derivative of the update is NaN.

    Source: Liu & Nocedal, On the limited memory BFGS method for large scale optimization, Mathematical Programming 45,
    1989; Nocedal & Wright, Numerical Optimization, 2nd edition, algorithms 7.4 and 7.5, and 3.5 and 3.6 for the line
    search.

    Example:
        >>> import functorch_optim as fo, torch
        >>> def rosenbrock(params):
        ...     x, y = params["x"], params["y"]
        ...     return (1 - x) ** 2 + 100 * (y - x**2) ** 2
        >>> tx = fo.lbfgs(line_search_fn="strong_wolfe", max_iter=50)
        >>> params = {"x": torch.tensor(-1.0), "y": torch.tensor(2.0)}
        >>> grads, value = torch.func.grad_and_value(rosenbrock)(params)
        >>> updates, state = tx.update(grads, tx.init(params), params, value_fn=rosenbrock, value=value)
        >>> params = fo.apply_updates(params, updates)
        >>> params["x"].round(decimals=3), params["y"].round(decimals=3)
        (tensor(1.), tensor(1.))
    """
    check("learning rate", lr, trees=False)
    check_integer("max_iter", max_iter, 1)
    check_integer("max_eval", 1 if max_eval is None else max_eval, 1)
    check_integer("history_size", history_size, 1)
    check_number("tolerance_grad", tolerance_grad)
    check_number("tolerance_change", tolerance_change)
    if line_search_fn not in (None, STRONG_WOLFE):
        raise ValueError(f"Invalid line_search_fn: {line_search_fn!r}; only 'strong_wolfe' is supported, and None")
    patience = PATIENCE if max_eval is None else 0
    if max_eval is None:
        max_eval = max_iter * 5 // 4
    fixed = Settings(0.0, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn, patience)

    def init(params: Tree) -> LBFGSState:
        leaves = tree.flatten(params)[0]
        x = flattened(leaves, common_dtype(leaves))
        rows = x.new_zeros(history_size, x.numel())
        memory = new_memory(x)._replace(old_dirs=rows, old_stps=rows.clone(), ro=x.new_zeros(history_size))
        return LBFGSState(memory.n_iter.clone(), *memory)

    def update(
        grads: Tree, state: Any, params: Tree, *, value_fn: Callable[[Tree], Tensor], value: Any = None
    ) -> tuple[Tree, LBFGSState]:
        check_has_params("lbfgs", params, ", value_fn=loss")
        if not callable(value_fn):
            raise TypeError(f"value_fn must be a function, loss = value_fn(params), got a {type(value_fn).__name__}")
        leaves, structure = tree.flatten(params)
        grad_leaves = tree.flatten(grads)[0]
        dtype = common_dtype(leaves)
        x = flattened(leaves, dtype)
        _check_state(state, x, history_size)

        def loss_at(x: Tensor) -> Tensor:
            moved = unflattened(x, leaves)
            kept = [p if g is None else new for p, g, new in zip(leaves, grad_leaves, moved, strict=True)]
            return _loss(value_fn(tree.unflatten(structure, kept)), "value_fn must return", x)

        grad_and_loss_at = torch.func.grad_and_value(loss_at)
        pairs = zip(leaves, grad_leaves, strict=True)
        grad = flattened([torch.zeros_like(p) if p is not None and g is None else g for p, g in pairs], dtype)
        loss = loss_at(x) if value is None else _loss(value, "value must be", x)
        step = state.step + 1
        settings = fixed._replace(lr=at(lr, step.to(torch.float64)))
        new_x, memory = minimize(lambda x: grad_and_loss_at(x)[::-1], x, loss, grad, unpack(state, max_iter), settings)
        moves = unflattened(new_x - x, leaves)
        updates = [None if g is None else move for g, move in zip(grad_leaves, moves, strict=True)]
        return tree.unflatten(structure, updates), pack(step, memory, state)

    return GradientTransformation(init, update)


# The state: pairs in tensors with room for all of them. ---------------------------------------------------------------


def unpack(state: LBFGSState, max_iter: int) -> Memory:
    """Take the memory out of a state, with its pairs, or with those that there may be after `max_iter` iterations."""
    size, masked = state.ro.shape[0], is_masked()
    count = size
    if is_known(state.ro):
        count = int((state.ro != 0).sum())
        count = min(size, count + max_iter) if masked else count
    pairs = [rows[size - count :] for rows in (state.old_dirs, state.old_stps, state.ro)]
    old_dirs, old_stps, ro = pairs if masked else [rows.unbind() for rows in pairs]
    return Memory(*state[1:])._replace(old_dirs=old_dirs, old_stps=old_stps, ro=ro)


def pack(step: Tensor, memory: Memory, like: LBFGSState) -> LBFGSState:
    """Make a state from a memory.

    Args:
        step: number of updates done.
        memory: the memory that `minimize` returned.
        like: a state with the right shapes.
    """

    def padded(rows: Any, like: Tensor) -> Tensor:
        missing = like.shape[0] - len(rows)
        if isinstance(rows, tuple):
            return torch.stack([like.new_zeros(like.shape[1:])] * missing + list(rows))
        return torch.cat([like.new_zeros(missing, *like.shape[1:]), rows]) if missing else rows

    pairs = (memory.old_dirs, memory.old_stps, memory.ro)
    old_dirs, old_stps, ro = map(padded, pairs, (like.old_dirs, like.old_stps, like.ro))
    return LBFGSState(step, *memory._replace(old_dirs=old_dirs, old_stps=old_stps, ro=ro))


# Checks. --------------------------------------------------------------------------------------------------------------


def _loss(value: Any, must: str, x: Tensor) -> Tensor:
    check_loss(must, value)
    # The state keeps the loss, and must not keep a closure's graph together with it.
    loss: Tensor = value if torch.is_grad_enabled() else value.detach()
    return loss.to(x)


def _check_state(state: Any, x: Tensor, history_size: int) -> None:
    if not isinstance(state, LBFGSState):
        raise ValueError(
            f"The state of lbfgs is a {type(state).__name__}: it belongs to another transformation. "
            "Make it with the init of the transformation whose update is called: state = tx.init(params)"
        )
    expected = (history_size, x.numel())
    if state.old_dirs.shape != expected or state.old_dirs.dtype != x.dtype:
        raise ValueError(
            f"The state of lbfgs has a history of shape {tuple(state.old_dirs.shape)} and dtype "
            f"{state.old_dirs.dtype}, but the parameters and history_size make it {expected} and {x.dtype}: it "
            "belongs to other parameters or options; make it anew, with tx.init(params)"
        )
