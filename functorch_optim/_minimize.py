"""Full-batch training until the gradient is small."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._control import is_known, while_loop
from functorch_optim._core.checks import check_loss
from functorch_optim._core.hyperparameters import check_integer, check_number
from functorch_optim._core.rule import with_loss
from functorch_optim._core.transformation import GradientTransformation, apply_updates, check_transformation
from functorch_optim.meta._derivative import Tensors, split
from functorch_optim.optimizers.lbfgs import lbfgs
from functorch_optim.tree import Tree


class Minimized(NamedTuple):
    """The result of `minimize`.

    Attributes:
        params: last parameters: tree like `x0`.
        value: fn(params): 0-dim.
        grad_norm: largest element of |gradient| at `params`: 0-dim.
        steps: number of updates: 0-dim int64 tensor.
        converged: whether `grad_norm` is at most `tol`, and `value` is not NaN: 0-dim tensor of bool.
        history: fn at the beginning and after each update: (steps + 1,); inside of `torch.vmap` and `torch.compile`
            (max_steps + 1,), with NaN after the last.
        state: state of the transformation after the last update.

    Example:
        >>> import functorch_optim as fo, torch
        >>> found = fo.minimize(lambda x: (x - 1) ** 2, torch.tensor(0.0), fo.sgd(0.5))
        >>> found.params, found.steps, found.history
        (tensor(1.), tensor(1), tensor([1., 0.]))

    Its text, when it is printed, leaves `history` and `state` out.
    """

    params: Tree
    value: Tensor
    grad_norm: Tensor
    steps: Tensor
    converged: Tensor
    history: Tensor
    state: Any

    def __repr__(self) -> str:
        fields = [f"{name}={getattr(self, name)!r}" for name in self._fields[: self._fields.index("history")]]
        return f"Minimized({', '.join(fields)}, ...)"


class _Run(NamedTuple):
    """A minimization between two updates; trees are tuples of their tensors."""

    params: tuple[Tensor, ...]
    state: tuple[Tensor, ...]
    value: Tensor
    grads: tuple[Tensor, ...]
    grad_norm: Tensor
    steps: Tensor
    history: Tensor


def minimize(
    fn: Callable[[Tree], Tensor],
    x0: Tree,
    tx: GradientTransformation | None = None,
    *,
    tol: float = 1e-5,
    max_steps: int = 100,
) -> Minimized:
    """Minimize a function: update until the largest element of |gradient| is at most `tol`.

        while max |g| > tol and steps < max_steps:
            u, state = update(g, state, x, value=fn(x), value_fn=fn);    x <- x + u;    g = grad fn(x)

    Args:
        fn: function of the parameters alone, which returns a 0-dim tensor. It may close over data.
        x0: first parameters: tree of tensors.
        tx: transformation. None: `lbfgs(tolerance_grad=tol, tolerance_change=0.0, line_search_fn="strong_wolfe")`,
            whose updates are up to 20 iterations each. If it declares the extras `value`, `value_fn` and `grad_fn`, it
            is given the loss, the function, and its gradient.
        tol: see above, >= 0, in units of the gradient.
        max_steps: largest number of updates, >= 1. Each takes one evaluation of `fn` and its gradient, besides those
            of `tx`.

    Returns:
        `Minimized`. A run that does not converge raises no error: look at `converged`. A run also ends when the value
        or the gradient is NaN.

    Raises:
        TypeError: `fn` is no function or does not return a tensor; or `tx` is no transformation.
        ValueError: `fn` returns more than a number, or a number is out of range.

    `torch.vmap` can batch it over data, first parameters, or hyperparameters of `tx`. Under `torch.vmap` and
    `torch.compile` all `max_steps` updates are computed: choose a small number there. Derivatives are those of the
    updates, and need memory for each update; `meta.custom_root` has those of the minimum, at the cost of one linear
    system. If parameters or data require grad and no derivative is wanted, call it in `torch.no_grad()`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([3.0, 5.0, 7.0])
        >>> fit = fo.minimize(
        ...     lambda w: (x @ w["slope"] + w["bias"] - y).square().mean(),
        ...     {"slope": torch.zeros(1), "bias": torch.zeros(())},
        ... )
        >>> fit.params["slope"].round(decimals=3), fit.params["bias"].round(decimals=3), fit.converged
        (tensor([2.]), tensor(1.), tensor(True))
    """
    if not callable(fn):
        raise TypeError(f"minimize needs a function of the parameters, got a {type(fn).__name__}")
    check_number("tol", tol)
    check_integer("max_steps", max_steps, 1)
    if tx is None:
        tx = lbfgs(tolerance_grad=tol, tolerance_change=0.0, line_search_fn="strong_wolfe")
    check_transformation(tx, "minimize(loss, params, adam(0.1))")
    rules = [link.rule for link in tx._links]
    state, (tensors, as_params) = tx.init(x0), split(x0)
    state_tensors, as_state = split(state)

    def evaluated(params: Tensors) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        def loss(some: list[Tensor]) -> Tensor:
            value = fn(as_params(some))
            check_loss("The function to minimize must return", value)
            return value

        grads, value = torch.func.grad_and_value(loss)(list(params))
        sizes = [g.detach().abs().amax() for g in grads if g.numel()]
        return value, tuple(grads), torch.stack(sizes).amax() if sizes else torch.zeros_like(value)

    def grad_fn(params: Tree) -> Tree:
        tensors, rebuild = split(params)
        return rebuild(torch.func.grad(lambda some: fn(rebuild(some)))(list(tensors)))

    def update(run: _Run) -> _Run:
        params = as_params(run.params)
        given = with_loss(rules, {}, run.value, fn, grad_fn)
        updates, state = tx.update(as_params(run.grads), as_state(run.state), params, **given)
        moved = tuple(split(apply_updates(params, updates))[0])
        value, grads, grad_norm = evaluated(moved)
        steps = run.steps + 1
        is_now = torch.arange(max_steps + 1, device=steps.device) == steps
        history = torch.where(is_now, value.detach(), run.history)
        return _Run(moved, tuple(split(state)[0]), value, grads, grad_norm, steps, history)

    value, grads, grad_norm = evaluated(tensors)
    start = value.detach()
    history = torch.cat([start[None], torch.full_like(start, torch.nan).expand(max_steps)])
    steps = torch.zeros((), dtype=torch.int64, device=value.device)
    run = _Run(tuple(tensors), tuple(state_tensors), value, grads, grad_norm, steps, history)
    run = while_loop(lambda run: (run.grad_norm > tol) & ~run.value.isnan(), update, run, max_steps)
    history = run.history[: int(run.steps) + 1] if is_known(run.grad_norm) else run.history
    params, converged = as_params(run.params), (run.grad_norm <= tol) & ~run.value.isnan()
    return Minimized(params, run.value, run.grad_norm, run.steps, converged, history, as_state(run.state))
