"""Numbers: hyperparameters of other kinds, and their precision."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_optim import tree
from functorch_optim.testing._comparison import tensors_of
from functorch_optim.testing._problem import Problem, Subject, assert_same_training, double_by_default
from functorch_optim.testing.strategies import kinds_of
from functorch_optim.tree import Tree


def tensors(subject: Subject, problem: Problem) -> None:
    """A hyperparameter may be a 0-dim tensor: results equal those of the number, and states have the same structure."""
    expected = problem.train(subject())
    for path, value in subject.numbers.items():
        trained = problem.train(subject({path: kinds_of(value)["tensor"]}))
        assert_same_training(trained, expected, f"with a tensor for {path!r} of {value},", subject, problem)


def schedules(subject: Subject, problem: Problem) -> None:
    """A hyperparameter may be a function of the number of updates done: each step equals that with the returned number.

    Skip it for a transformation whose hyperparameters cannot change.
    """
    for path, value in subject.numbers.items():
        tx, params = subject({path: lambda done: value * 0.9**done}), problem.params  # noqa: B023
        state = tx.init(params)
        for k, given in enumerate(problem.history):
            number = torch.tensor(value * 0.9**k, dtype=torch.float64)
            expected = problem.step(subject({path: number}), state, params, given)
            params, state = problem.step(tx, state, params, given)
            what = f"with a schedule for {path!r}, which is {number.item():.6g} after {k} updates,"
            assert_same_training((params, state), expected, what, subject, problem)


def used_hyperparameters(subject: Subject, problem: Problem) -> None:
    """Each hyperparameter matters: with half its value, or with a thousand times it, training ends elsewhere.

    A hyperparameter that is taken and forgotten passes all other checks. Skip this one if a hyperparameter matters only
    to parameters or gradients of another kind. 0 is replaced by 0.1, since half of 0 is 0. All steps are taken three
    times, for hyperparameters that matter only later.
    """
    problem = replace(problem, history=[*problem.history] * 3)
    expected = tensors_of(problem.train(subject()))

    def is_same(path: str, value: float) -> bool:
        trained = tensors_of(problem.train(subject({path: torch.tensor(value, dtype=torch.float64)})))
        pairs = [(trained.get(name), leaf) for name, leaf in expected.items()]
        return all(a is not None and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)

    for path, value in subject.numbers.items():
        if all(is_same(path, other) for other in (value / 2 or 0.1, 1e3 * value or 0.1)):
            raise AssertionError(
                f"the hyperparameter {path!r} is not used: parameters and states are the same with half of {value} and "
                "with a thousand times it; if it only matters at other values, check it at one of these"
            )


def double_precision(subject: Subject, problem: Problem) -> None:
    """In training in float64 nothing is computed in less: no bias correction is rounded to float32.

    `0.999 ** count` is float32 if `count` is a tensor of integers, and so is `torch.tensor(0.999)`. The training is
    compared with a training in which every new tensor is float64; after three steps all counters jump to 1000. Skip it
    for a transformation that computes in lower precision on purpose.
    """
    for link in subject()._links:
        _check_scalars(link.rule)

    def trained() -> tuple[Tree, Any]:
        tx = subject()
        params, state = problem.train(tx)
        late = tree.map(lambda leaf: torch.full_like(leaf, 1000) if _is_counter(leaf) else leaf, state)
        for given in problem.history:
            params, late = problem.step(tx, late, params, given)
        return params, late

    expected = trained()
    with double_by_default(), _InDouble():  # type: ignore[no-untyped-call]
        wider = trained()
    rounded = tree.map(lambda leaf, like: leaf.to(like.dtype), wider, expected)
    what = "a number on the way is not float64: compared with the same all in float64"
    assert_same_training(expected, rounded, what, subject, problem)


def _is_counter(leaf: Tensor) -> bool:
    return leaf.ndim == 0 and leaf.dtype in (torch.int64, torch.int32)


def _check_scalars(rule: Any) -> None:
    """Check the dtypes of a rule's scalars."""
    if rule.scalars is None or not rule.extras.names <= {"updates"}:
        return
    extras = {"updates": [torch.ones(2)]} if rule.sees_tree else {}
    carried = [torch.tensor(0.5, dtype=torch.float64) for _ in rule.counters[rule.counts :]]
    arguments = [rule.carried_type(*carried)] if carried else []
    scalars = rule.scalars(torch.tensor(2.0, dtype=torch.float64), *arguments, **extras)
    for path, leaf in tensors_of(scalars).items():
        if leaf.is_floating_point() and leaf.dtype != torch.float64:
            at = f" at {path!r}" if path else ""
            raise AssertionError(f"the scalars of {rule.name}{at} are {leaf.dtype}: keep the dtype of `step`, float64")


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which new tensors are float64, whatever floating dtype is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        low = (torch.float32, torch.float16, torch.bfloat16)
        asked = {name: torch.float64 if value in low else value for name, value in (kwargs or {}).items()}
        return func(*args, **asked)
