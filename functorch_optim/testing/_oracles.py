"""Comparison with a reference: the algorithm of a paper, written a second time."""

from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.transformation import GradientTransformation, apply_updates
from functorch_optim.testing._comparison import assert_same
from functorch_optim.testing._problem import Problem, Subject, parameters, problems
from functorch_optim.testing._report import falsify
from functorch_optim.tree import Tree


def check_against(
    transformation: GradientTransformation | Callable[..., GradientTransformation],
    reference: Callable[..., Iterable[Any]],
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
    as_array: Callable[[Tensor], Any] = torch.clone,
    params: st.SearchStrategy[Tree] | None = None,
    tolerance: float = 1e-12,
    steps: int = 10,
    examples: int = 20,
) -> None:
    """Check that each step gives the same parameters as a reference, in float64.

    The gradients are random. They have several magnitudes, and some are zero.

    Args:
        transformation: a transformation, or a function that makes one.
        reference: `reference(p, grads, **hyperparameters)` returns, or yields, the parameter after each step. `p` is
            the parameter before the first step, and `grads` is the list of its gradients.
        hyperparameters: arguments of both, by name.
        whole: whether the reference is for all parameters at once. Then `p` and the parameters after a step are lists,
            and so are the gradients of a step.
        as_array: converts a tensor to the arrays of the reference; `numpy.asarray` for numpy.
        params: strategy for the parameters, tensors in float64; None: `trees(dtypes=[torch.float64])`.
        tolerance: relative to the largest number of a tensor, or of the inputs.
        steps: largest number of steps.
        examples: number of trees.

    Raises:
        PropertyError: the parameters differ. The message gives the step and the place, for the smallest tree that
            hypothesis finds.
        TypeError: no transformation is given or made, or `params` is no strategy for tensors in float64.

    Example:
        >>> import functorch_optim as fo
        >>> import torch
        >>> from functorch_optim import testing
        >>> def momentum(p, grads, lr, mu):
        ...     v = 0 * p
        ...     for g in grads:
        ...         v = mu * v + g
        ...         p = p - lr * v
        ...         yield p
        >>> testing.check_against(lambda lr, mu: fo.sgd(lr, mu), momentum, {"lr": 0.1, "mu": 0.9})

        A class of torch.optim is a reference too:

        >>> def torchs(p, grads, lr):
        ...     p = p.requires_grad_()
        ...     optimizer = torch.optim.Adam([p], lr=lr)
        ...     for g in grads:
        ...         p.grad = g
        ...         optimizer.step()
        ...         yield p.detach().clone()
        >>> testing.check_against(fo.adam, torchs, {"lr": 0.1})
    """
    make = (lambda: transformation) if isinstance(transformation, GradientTransformation) else transformation

    def against_reference(subject: Subject, problem: Problem) -> None:
        """Each step gives the parameters of the reference."""
        arrays = [[as_array(leaf) for leaf in tree.flatten(some)[0]] for some in (problem.params, *problem.history)]
        columns = [arrays] if whole else [[[leaf] for leaf in column] for column in zip(*arrays, strict=True)]
        runs = []
        for start, *grads in columns:
            given = (start, grads) if whole else (start[0], [g for [g] in grads])
            runs.append(list(reference(*given, **subject.given())))
        tx, params = subject(), problem.params
        state = tx.init(params)
        for k, grads in enumerate(problem.history):
            updates, state = tx.update(grads, state, params)
            params = apply_updates(params, updates)
            expected = [_after(k, run) for run in runs]
            expected = expected[0] if whole else expected
            places = zip_longest(tree.paths(params), tree.flatten(params)[0], expected)
            for path, p, e in places:
                what = f"after step {k + 1} the parameter {path!r}" if path else f"after step {k + 1} the parameter"
                assert_same(p, torch.as_tensor(e), what, subject.tolerance, problem.scale)

    subject, drawn = Subject(make, hyperparameters or {}, tolerance), parameters(params)
    subject()  # a mistake in the call raises its own error, and no PropertyError
    falsify(against_reference, subject, problems(drawn, most=steps), examples)


def _after(k: int, run: list[Any]) -> Any:
    if k >= len(run):
        raise AssertionError(f"the reference gives {len(run)} parameters, and none for step {k + 1}: one for each step")
    return run[k]
