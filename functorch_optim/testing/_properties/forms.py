"""Forms: saved and loaded, tensor by tensor or together, pure, in place or stateful, the results are the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core import prepare
from functorch_optim._core.saving import load_state_dict, state_dict
from functorch_optim._core.stepping import step, step_
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution import choose
from functorch_optim._execution.blocks import InBlocks
from functorch_optim._execution.foreach import Foreach
from functorch_optim._execution.program import Program
from functorch_optim._execution.reduced import Reduced
from functorch_optim.optim._wrapper import Optimizer
from functorch_optim.testing._comparison import assert_same, unmodified
from functorch_optim.testing._copies import through_a_file, through_pickle
from functorch_optim.testing._problem import Problem, Subject, assert_same_training, double_by_default
from functorch_optim.tree import Tree


def saving(subject: Subject, problem: Problem) -> None:
    """States go through `fo.state_dict`, `torch.load(weights_only=True)` and pickle, and training goes on the same."""
    params, state = problem.train(subject())
    loaded = load_state_dict(subject().init(problem.params), through_a_file(state_dict(state)))
    assert_same(loaded, state, "the state that was saved and loaded", 0.0, 0.0)
    assert_same(through_pickle(state), state, "the state that was pickled", 0.0, 0.0)
    onwards = replace(problem, params=params)
    trained, expected = onwards.train(subject(), loaded), onwards.train(subject(), state)
    assert_same_training(trained, expected, "after loading", subject, problem)


_MACHINES: dict[str, Callable[..., Any]] = {
    "in blocks": lambda program, numbers: InBlocks(program),
    "by foreach kernels": Foreach,
}


def ways(subject: Subject, problem: Problem) -> None:
    """It gives the same tensor by tensor, in blocks, by foreach kernels, and where autograd records it.

    The first three are run in float64, float32 and bfloat16.
    """
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        given = problem.map(lambda leaf: leaf.to(dtype))  # noqa: B023

        def rounded(training: Tree) -> Tree:
            """Round numbers of the whole tree as what they were computed from."""
            return tree.map(lambda leaf: leaf.to(dtype) if leaf.dtype == torch.float64 else leaf, training)  # noqa: B023

        with mock.patch.object(prepare, "is_plain", return_value=False):
            expected = rounded(given.train(subject()))
        for name, machine in _MACHINES.items():

            def chosen(program: Program, sizes: Any, numbers: Any, *_: Any) -> Any:
                return Reduced(program) if program.takes_norms else machine(program, numbers)  # noqa: B023

            with mock.patch.object(choose, "machine", chosen):
                trained = rounded(given.train(subject()))
            assert_same_training(trained, expected, f"{name}, in {dtype},", subject, given)
    recorded = problem.map(lambda leaf: leaf.detach().requires_grad_())
    assert_same_training(recorded.train(subject()), expected, "recorded", subject, problem)


def steps(subject: Subject, problem: Problem) -> None:
    """`fo.step`, and `fo.step_` in place, blockwise or by foreach kernels, equal `update` and `apply_updates`."""
    expected = problem.train(subject())
    runs: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "fo.step": (step, {}),
        "fo.step_": (step_, {}),
        "fo.step_(foreach=True)": (step_, {"foreach": True}),
    }
    for name, (take, options) in runs.items():
        own, tx = problem.map(torch.clone), subject()
        params, state = own.params, tx.init(own.params)
        for given in own.history:
            grads, extras = own.gradients(params, given), own.extras(tx, params, given)
            rest = {} if take is step_ else {"parameter": params, "state": state}
            with unmodified(gradient=grads, **rest):
                params, state = take(tx, grads, state, params, **options, **extras)
        assert_same_training((params, state), expected, f"by {name}", subject, problem)


def stateful(subject: Subject, problem: Problem) -> None:
    """`fo.Optimizer` trains as the functional form does, in every form, and keeps its state through a checkpoint.

    Skip it for a transformation whose mask or labels are a tree, and not a function of one.
    """
    expected = tree.flatten(problem.train(subject())[0])[0]
    listed = problem.restructured(list)
    with double_by_default():  # fo.Optimizer keeps the numbers that scalars carry on in it, as torch.optim does
        trained = _trained_by_optimizer(subject, listed)
    for path, p, e in zip(tree.paths(problem.params), trained, expected, strict=True):
        assert_same(p, e, f"by fo.Optimizer the parameter {path!r}", subject.tolerance, problem.scale)


def _trained_by_optimizer(subject: Subject, listed: Problem) -> list[Tensor]:
    own, optimizer = _optimizer(subject(), listed.params)
    for k, given in enumerate(listed.history):
        params = [p.detach() for p in own]
        for p, g in zip(own, listed.gradients(params, given), strict=True):
            p.grad = g
        optimizer.step(**listed.extras(subject(), params, given))
        if k == 0:
            saved = through_a_file(optimizer.state_dict())
            own, optimizer = _optimizer(subject(), own)
            optimizer.load_state_dict(saved)
    return [p.detach() for p in own]


def _optimizer(tx: GradientTransformation, values: list[Tensor]) -> tuple[list[Tensor], Optimizer]:
    own = [value.detach().clone().requires_grad_() for value in values]
    return own, Optimizer(own, tx)
