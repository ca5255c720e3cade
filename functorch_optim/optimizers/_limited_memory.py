"""L-BFGS for one vector: its memory, its iterations, and the conversion of its memory from and to torch.optim.LBFGS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_optim._control import cond, same, select, while_loop
from functorch_optim.optimizers import _line_search as line_search
from functorch_optim.optimizers._line_search import Point

Evaluate: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x -> (loss, gradient): vector -> 0-dim tensor and vector, all of one dtype."""

STRONG_WOLFE = "strong_wolfe"
NARROW = 1e-9
"""A line search ends when no parameter changes by more than this, as in torch.optim; see `tolerance_change`."""


PATIENCE = 25
"""Evaluations that the first line search of an update may take to find a lower loss, if `max_eval` is less."""


class Settings(NamedTuple):
    """The hyperparameters of `lbfgs` in an update; its docstring explains the fields.

    `patience` is `PATIENCE`; or 0, if `max_eval` is a strict limit, as in torch.optim. Updates may then stand still.
    """

    lr: Tensor | float
    max_iter: int
    max_eval: int
    tolerance_grad: float
    tolerance_change: float
    history_size: int
    line_search_fn: str | None
    patience: int = 0


class Memory(NamedTuple):
    """The memory of L-BFGS.

    The fields are those of `LBFGSState`, except that `old_dirs`, `old_stps` and `ro` are tuples with an entry for each
    pair, the oldest first. Under vmap and compile the number of pairs must not depend on data. There they are stacked
    tensors with a row for each pair; rows with ro = 0 come first, and have no effect.
    """

    func_evals: Tensor
    n_iter: Tensor
    d: Tensor
    t: Tensor
    old_dirs: Any
    old_stps: Any
    ro: Any
    H_diag: Tensor
    prev_flat_grad: Tensor
    prev_loss: Tensor


def new_memory(x: Tensor) -> Memory:
    """Make an empty memory for vectors like `x`."""
    none = torch.zeros((), dtype=torch.int64, device=x.device)
    zero = x.new_zeros(())
    d, prev_flat_grad = torch.zeros_like(x), torch.zeros_like(x)
    return Memory(none, none.clone(), d, zero, (), (), (), torch.ones_like(zero), prev_flat_grad, zero.clone())


class _Run(NamedTuple):
    """An update between two evaluations.

    Attributes:
        going: whether an iteration has begun and not ended: 0-dim tensor of bool.
        x: start of the iteration.
        loss: loss at x.
        grad: gradient at x.
        memory: the memory, with the direction d of the next evaluation.
        search: the line search; `()` without one.
    """

    going: Tensor
    x: Tensor
    loss: Tensor
    grad: Tensor
    memory: Memory
    search: Any


def minimize(
    evaluate: Evaluate, x: Tensor, loss: Tensor, grad: Tensor, memory: Memory, settings: Settings
) -> tuple[Tensor, Memory]:
    """Run the iterations of one update; no argument is modified.

    A turn of the loop is one evaluation, in a line search or at the end of an iteration. Under vmap and compile loops
    cannot end early, and nested loops would evaluate many times more often.

    Args:
        evaluate: loss and gradient at a vector.
        x: first vector: (n,).
        loss: loss at x: 0-dim.
        grad: gradient at x: (n,).
        memory: the memory that the last call returned, or `new_memory(x)`.
        settings: hyperparameters.

    Returns:
        The vector at which the last iteration ended, and the memory.
    """
    searches = settings.line_search_fn == STRONG_WOLFE
    lr = settings.lr.to(x) if isinstance(settings.lr, Tensor) else x.new_full((), settings.lr)
    before = memory
    memory = memory._replace(func_evals=memory.func_evals + 1)

    def begin(run: _Run) -> _Run:
        """Begin an iteration: choose direction and step length, or stop if the direction is not downhill."""
        memory = _directed(run, lr, settings.history_size)
        gtd = run.grad.dot(memory.d)
        search = line_search.begin(run.loss, run.grad, gtd, memory.t) if searches else run.search
        return run._replace(going=~(gtd > -settings.tolerance_change), memory=memory, search=search)

    def turn(run: _Run) -> _Run:
        d = run.memory.d
        t = run.search.t if searches else run.memory.t
        # After the end of an update, points further along d may be outside of the function's domain.
        ahead = select(run.going, x_at(run, t), run.x)
        loss, grad = evaluate(ahead)
        run = run._replace(memory=run.memory._replace(func_evals=run.memory.func_evals + 1))
        if not searches:
            return end(run, ahead, t, loss, grad)
        point = Point(t, loss, grad, grad.dot(d))
        evaluations, is_first = run.memory.func_evals - before.func_evals, run.memory.n_iter - before.n_iter == 1
        is_last, until_lower = evaluations > settings.max_eval, is_first & (evaluations <= settings.patience)
        search = line_search.advance(run.search, point, run.loss, run.grad, _largest(d), is_last, NARROW, until_lower)
        run = run._replace(search=search)

        def arrive(run: _Run) -> _Run:
            t, loss, grad, _ = search.low
            return end(run, x_at(run, t), t, loss, grad)

        return cond(search.done, arrive, same, run)

    def end(run: _Run, x: Tensor, t: Tensor, loss: Tensor, grad: Tensor) -> _Run:
        """End an iteration: go to x, and begin another or stop."""
        memory = run.memory
        stops = (
            (memory.n_iter - before.n_iter == settings.max_iter)
            | (memory.func_evals - before.func_evals >= settings.max_eval)
            | (_largest(grad) <= settings.tolerance_grad)
            | (_largest(memory.d * t) <= settings.tolerance_change)
            | ((loss - memory.prev_loss).abs() < settings.tolerance_change)
        )
        run = _Run(~stops, x, loss, grad, memory._replace(t=t), run.search)
        return cond(run.going, begin, same, run)

    def x_at(run: _Run, t: Tensor) -> Tensor:
        return torch.addcmul(run.x, run.memory.d, t)

    search = line_search.begin(loss, grad, torch.zeros_like(loss), lr) if searches else ()
    run = _Run(~(_largest(grad) <= settings.tolerance_grad), x, loss, grad, memory, search)
    run = cond(run.going, begin, same, run)
    if searches:
        run = while_loop(lambda run: run.going, turn, run, max(settings.max_eval, settings.patience))
        return run.x, run.memory
    # The last iteration does not evaluate its last point.
    turns = min(settings.max_iter - 1, max(settings.max_eval - 1, 1))
    run = while_loop(lambda run: run.going, turn, run, turns)
    return select(run.going, x_at(run, run.memory.t), run.x), run.memory


def _directed(run: _Run, lr: Tensor, history_size: int) -> Memory:
    """Remember the last step, and choose direction and first step length of the next."""
    g, memory = run.grad, run.memory
    y = g - memory.prev_flat_grad
    s = memory.d * memory.t
    ys = y.dot(s)
    is_curved = ys > 1e-10

    def remember(memory: Memory) -> Memory:
        # If the pair is not kept, the divisors are 1.
        curvature, yy = torch.where(is_curved, ys, 1.0), torch.where(is_curved, y.dot(y), 1.0)
        return memory._replace(
            old_dirs=_pushed(memory.old_dirs, y, history_size),
            old_stps=_pushed(memory.old_stps, s, history_size),
            ro=_pushed(memory.ro, 1 / curvature, history_size),
            H_diag=curvature / yy,
        )

    memory = cond(is_curved, remember, same, memory)
    n_iter = memory.n_iter + 1
    size = g.abs().sum()
    is_long = (n_iter == 1) & (size > 1)
    t = cond(is_long, lambda lr: 1 / torch.where(is_long, size, 1.0) * lr, same, lr)
    return memory._replace(n_iter=n_iter, d=_direction(g, memory), t=t, prev_flat_grad=g, prev_loss=run.loss)


def _direction(g: Tensor, memory: Memory) -> Tensor:
    """Multiply -g with the inverse Hessian, by the two-loop recursion."""
    # addcmul is one pass over memory, and is also fastest for small vectors.
    pairs = list(zip(memory.old_dirs, memory.old_stps, memory.ro, strict=True))
    al = []
    q = -g
    for y, s, ro in reversed(pairs):
        al.append(s.dot(q) * ro)
        q = torch.addcmul(q, y, al[-1], value=-1)
    d = q * memory.H_diag
    for y, s, ro in pairs:
        be = y.dot(d) * ro
        d = torch.addcmul(d, s, al.pop() - be)
    return d


def _pushed(rows: Any, row: Tensor, history_size: int) -> Any:
    """Add the newest row, and drop the oldest when there are too many."""
    if isinstance(rows, tuple):
        return (*rows, row)[-history_size:]
    return torch.cat([rows[1:], row[None]])


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax() if x.numel() else x.sum()


# The state of torch.optim.LBFGS. --------------------------------------------------------------------------------------


def to_torch(memory: Memory, history_size: int) -> dict[str, Any]:
    """Write a memory in the form of torch.optim.LBFGS, the state of its first parameter.

    Args:
        memory: the memory that `minimize` returned, with tuples of pairs.
        history_size: number of pairs that the optimizer keeps.

    Returns:
        Dict of numbers, tensors and lists of them, from which torch.optim.LBFGS goes on with the same numbers.
    """
    counts = {"func_evals": int(memory.func_evals), "n_iter": int(memory.n_iter)}
    if not counts["n_iter"]:
        return counts  # torch has the rest only after the first iteration
    return {
        **counts,
        "d": memory.d,
        "t": float(memory.t),
        "old_dirs": list(memory.old_dirs),
        "old_stps": list(memory.old_stps),
        "ro": list(memory.ro),
        "al": [None] * history_size,  # torch writes every entry before it reads it
        "H_diag": memory.H_diag,
        "prev_flat_grad": memory.prev_flat_grad.clone(),  # torch changes it in place
        "prev_loss": float(memory.prev_loss),
    }


def from_torch(state: Mapping[str, Any], x: Tensor) -> Memory:
    """Read a memory from the state of torch.optim.LBFGS for its first parameter; see `to_torch`.

    Args:
        state: `optimizer.state[first_param]`.
        x: vector of all parameters; only its dtype, device and size matter.
    """
    memory = new_memory(x)
    memory = memory._replace(
        func_evals=memory.func_evals + state.get("func_evals", 0), n_iter=memory.n_iter + state.get("n_iter", 0)
    )
    if not state.get("n_iter", 0):
        return memory
    return memory._replace(
        d=state["d"].to(x),
        t=_number(state["t"], x),
        old_dirs=tuple([y.to(x) for y in state["old_dirs"]]),
        old_stps=tuple([s.to(x) for s in state["old_stps"]]),
        ro=tuple([_number(ro, x) for ro in state["ro"]]),
        H_diag=_number(state["H_diag"], x),
        prev_flat_grad=state["prev_flat_grad"].to(x, copy=True),
        prev_loss=_number(state["prev_loss"], x),
    )


def _number(value: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)
