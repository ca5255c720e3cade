"""Transforms: torch.vmap, derivatives and torch.compile."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.testing._comparison import assert_same
from functorch_optim.testing._derivatives import OfVector, assert_finite, check_first_derivatives
from functorch_optim.testing._problem import Problem, Subject, assert_same_training
from functorch_optim.testing._report import first_line
from functorch_optim.tree import Tree

VALUES = (
    "it takes a value out of a tensor (.item(), float(), bool(), `if x > 0`), which is not there yet when it is "
    "batched or compiled; use torch.where, and tensors for numbers"
)
FACTORS = torch.tensor([1.0, -0.5], dtype=torch.float64)


def vmap_parameters(subject: Subject, problem: Problem) -> None:
    """`torch.vmap` over parameters, states and gradients equals a loop; and over gradients alone.

    The first is an ensemble; the second are tasks with shared parameters.
    """
    batch = problem.map(lambda leaf: torch.stack([factor * leaf for factor in FACTORS.to(leaf.dtype)]))
    tx = subject()

    def single(state: Any, params: Tree, given: Tree) -> tuple[Tree, Any]:
        return problem.step(tx, state, params, given)

    with explained("vmap"):
        params, state = batch.params, torch.vmap(tx.init)(batch.params)
        for given in batch.history:
            params, state = torch.vmap(single)(state, params, given)
    for i in range(len(FACTORS)):
        expected = batch.map(lambda leaf: leaf[i]).train(tx)  # noqa: B023
        one = tree.map(lambda leaf: leaf[i], (params, state))  # noqa: B023
        assert_same_training(one, expected, f"by vmap, in slice {i},", subject, batch)

    def trained(history: list[Tree]) -> tuple[Tree, Any]:
        return replace(problem, history=history).train(tx)

    with explained("vmap"):
        tasks = torch.vmap(trained)(list(batch.history))
    for i in range(len(FACTORS)):
        expected = trained([tree.map(lambda leaf: leaf[i], given) for given in batch.history])  # noqa: B023
        one = tree.map(lambda leaf: leaf[i], tasks)  # noqa: B023
        assert_same_training(one, expected, f"by vmap over gradients, in slice {i},", subject, batch)


def vmap_hyperparameters(subject: Subject, problem: Problem) -> None:
    """`torch.vmap` over each hyperparameter equals a loop."""
    for path, value in subject.numbers.items():
        values = value * torch.tensor([0.9, 1.01], dtype=torch.float64)

        def trained(number: Tensor) -> list[Tensor]:
            return tree.flatten(problem.train(subject({path: number}))[0])[0]  # noqa: B023

        with explained("vmap"):
            batch = torch.vmap(trained)(values)
        for i, number in enumerate(values):
            what = f"by vmap over {path!r}, where it is {number.item():.6g}, the parameter"
            paths = tree.paths(problem.params)
            for place, one, expected in zip(paths, batch, trained(number), strict=True):
                assert_same(one[i], expected, f"{what} {place!r}", subject.tolerance, problem.scale)


def derivatives(subject: Subject, problem: Problem) -> None:
    """Derivatives through training, by parameters, gradients and hyperparameters, equal finite differences.

    `torch.func.grad`, `jacfwd` and `jvp` give the same. The check finds tensors that are detached on the way, such as a
    momentum or a hyperparameter. Choose values at which a hyperparameter matters: `eps=1e-3` rather than 1e-8. Skip it
    for a transformation that is not differentiable on purpose.
    """
    check_first_derivatives(OfVector(*_training(subject, problem)))


def finite_derivatives(subject: Subject, problem: Problem) -> None:
    """Derivatives are finite where gradients are zero, as for a unit that never fired.

    The derivative of `torch.sqrt` is infinite at zero; `fo.safe_sqrt` and `fo.safe_norm` have none there.
    """
    still = replace(problem, history=[tree.map(torch.zeros_like, given) for given in problem.history])
    assert_finite(OfVector(*_training(subject, still)))


def _training(subject: Subject, problem: Problem) -> tuple[Callable[[Any], Tensor], Tree]:
    """Return training as a function of its inputs, and the inputs."""

    def trained(arguments: Any) -> Tensor:
        given = Problem(arguments["parameters"], arguments["gradients"], problem.extra)
        params, _ = given.train(subject(arguments["hyperparameters"]))
        return torch.stack([leaf.sin().sum() for leaf in tree.flatten(params)[0]]).sum()

    numbers = {path: torch.tensor(value, dtype=torch.float64) for path, value in subject.numbers.items()}
    return trained, {"parameters": problem.params, "gradients": list(problem.history), "hyperparameters": numbers}


def compiled(subject: Subject, problem: Problem) -> None:
    """`torch.compile(fullgraph=True)` gives the same, and does not compile again at the second step."""
    tx = subject()

    def update(grads: Tree, state: Any, params: Tree, given: Tree) -> tuple[Tree, Any]:
        return tx.update(grads, state, params, **problem.extras(tx, params, given))

    with explained("torch.compile"):
        check_compiles_once(update, _updates(tx, problem), subject.tolerance, problem.scale)


def _updates(tx: GradientTransformation, problem: Problem) -> Iterator[tuple[Tree, Any, Tree, Tree]]:
    """Yield the arguments of each step."""
    params, state = problem.params, tx.init(problem.params)
    for given in problem.history:
        yield problem.gradients(params, given), state, params, given
        params, state = problem.step(tx, state, params, given)


def check_compiles_once(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    tolerance: float = 1e-12,
    scale: float = 1.0,
    *,
    compile: Callable[..., Any] | None = None,  # noqa: A002 - torch's name
) -> None:
    """Raise unless a function gives the same when it is compiled, for all these arguments, without compiling again.

    Args:
        function: function of trees that returns a tree.
        arguments: the arguments of its calls, one after the other.
        tolerance: see `assert_same`.
        scale: see `assert_same`.
        compile: function -> compiled function; None: by `torch.compile(fullgraph=True, backend="eager")`.

    Raises:
        AssertionError: the results differ.
        torch._dynamo.exc.TorchDynamoException: it cannot be compiled, or is compiled again.
    """
    torch.compiler.reset()
    made = torch.compile(function, fullgraph=True, backend="eager") if compile is None else compile(function)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for given in arguments:
            assert_same(made(*given), function(*given), "what is compiled", tolerance, scale)


@contextlib.contextmanager
def explained(transform: str) -> Iterator[None]:
    """Let errors of a transform name their most common cause."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        if isinstance(error, torch._dynamo.exc.RecompileError):
            why = (
                "it is compiled anew at a later step, because a python value has changed: count with a 0-dim tensor in "
                "the state, not with an int"
            )
        else:
            why = f"it cannot be transformed; mostly because {VALUES}"
        raise AssertionError(f"by {transform}: {why}. {type(error).__name__}: {first_line(error)}") from error
