"""The learning rate of the next update, whatever it is, in both forms."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import at, is_tree
from functorch_optim._core.injected import reading
from functorch_optim._core.links import Link, nest, unnest
from functorch_optim._core.transformation import GradientTransformation, check_transformation
from functorch_optim.optim._base import OptimizerBase
from functorch_optim.tree import Tree


def learning_rate(of: Any, state: Tree = None, path: str = "") -> Any:
    """Return the learning rate that the next update will use: a number, a schedule's value, a hyperparameter.

        fo.learning_rate(tx, state)
        fo.learning_rate(opt)

    Args:
        of: transformation; or an optimizer, of this library or of torch.optim.
        state: the result of `tx.init` or of the last step; None for an optimizer.
        path: which one, where there are several: dotted path in the state, `"body"`; with hyperparameters in
            `param_groups`, the index of the group, `"1"`.

    Returns:
        0-dim float64 tensor, which has derivatives where the rate has them, on the device of the state: nothing waits
        for it. A tree of these where the learning rate is a tree.

    Raises:
        ValueError: there is no learning rate, or there are several; the message has their paths.
        TypeError: `of` is neither a transformation nor an optimizer.

    It is the `lr` of `scale_by_learning_rate`, `asgd`, and of all that is made of them; for an optimizer with
    hyperparameters in `param_groups`, the `lr` of a group. Clipping, a plateau and other factors are not in it.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.sgd(fo.schedules.linear(1.0, 0.0, 4)), torch.zeros(1)
        >>> params, state = fo.step(tx, torch.ones(1), tx.init(params), params)
        >>> fo.learning_rate(tx, state)
        tensor(0.7500, dtype=torch.float64)
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> fo.learning_rate(fo.Optimizer([weight], fo.adam, lr=0.5))
        tensor(0.5000, dtype=torch.float64)
    """
    if isinstance(of, torch.optim.Optimizer):
        if isinstance(of, OptimizerBase) and not of._has_factory:
            found = _of_plan(of)
        else:
            found = {str(n): _of_group(of, group) for n, group in enumerate(of.param_groups) if "lr" in group}
    else:
        check_transformation(of, "learning_rate(tx, state), or learning_rate(optimizer)")
        found = _of_state(of, state)
    chosen = {place: rate for place, rate in found.items() if not path or place == path or place.startswith(f"{path}.")}
    values = list(chosen.values())
    same = values and all(isinstance(value, Real) and value == values[0] for value in values)
    if not chosen or (len(chosen) > 1 and not same):
        places = ", ".join(map(repr, found)) or "nowhere"
        what = f"are {len(chosen)} learning rates" if chosen else "is no learning rate"
        raise ValueError(f"There {what}{f' in {path!r}' if path else ''}; they are at: {places}. Give one as path=...")
    return tree.map(_as_number, values[0])


def _of_state(tx: GradientTransformation, state: Tree) -> dict[str, Any]:
    states = unnest(tx._layout, state)
    counted: list[Any] = [link.rule.counters and part for link, part in zip(tx._links, states, strict=True)]

    def done(k: int) -> Any:
        return counted[k][0].to(torch.float64)

    def kept(k: int) -> Sequence[Any]:
        numbers: Sequence[Any] = counted[k][1 : len(tx._links[k].rule.counters)]
        return numbers

    return _rates(tx, tx._links, done, kept)


def _of_plan(optimizer: OptimizerBase) -> dict[str, Any]:
    plan = optimizer._plan(0)
    shared = plan.shared_numbers(optimizer.state)

    def where(k: int) -> tuple[Any, Any, Any]:
        i = next((i for i, part in enumerate(plan.parts) if k in part.links), 0)
        position, completed = plan.completed(i, optimizer.state.get(plan.params[i], {}), shared)
        return plan.parts[i], position, completed

    def done(k: int) -> float:
        part, position, _ = where(k)
        return float(position.step_of(part, k))

    def kept(k: int) -> Sequence[Any]:
        part, _, completed = where(k)
        return [completed[key] for key in part.carried[part.links.index(k)]] if k in part.links else []

    used = {k for part in plan.parts for k in part.links}
    return _rates(optimizer._transformation, plan.links, done, kept, used)


def _of_group(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Any:
    lr = group["lr"]
    if not callable(lr) and not is_tree(lr):
        return lr
    steps = [float(optimizer.state[p]["step"]) for p in group["params"] if "step" in optimizer.state.get(p, ())]
    return _value(lr, max(steps, default=0.0) + 1.0)


def _rates(
    tx: GradientTransformation,
    links: Sequence[Link],
    done: Callable[[int], Any],
    kept: Callable[[int], Sequence[Any]],
    used: Any = None,
) -> dict[str, Any]:
    """Compute the learning rates of links at the next update, by path."""
    nested = nest(tx._layout, range(len(links)))
    place = dict(zip(tree.flatten(nested)[0], tree.paths(nested), strict=True))
    found = {}
    for k, link in enumerate(links):
        rule: Any = link.rule
        if rule.lr is None or (used is not None and k not in used):
            continue
        numbers: dict[Any, Any] = {}
        for back in link.reads:  # scheduled ones are computed for the next update
            keeper: Any = links[k - back].rule
            carried = keeper.carried_type(*kept(k - back))
            with reading(numbers):
                numbers[keeper.keeps] = keeper.scalars(done(k - back) + 1, carried)[1]
        with reading(numbers):
            found[place[k]] = _value(rule.lr, done(k) + 1)
    return found


def _value(lr: Any, step: Any) -> Any:
    return tree.map(lambda one: at(one, step), lr) if is_tree(lr) else at(lr, step)


def _as_number(rate: Any) -> Tensor:
    return rate.to(torch.float64) if isinstance(rate, Tensor) else torch.tensor(rate, dtype=torch.float64, device="cpu")
