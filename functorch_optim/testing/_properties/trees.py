"""Trees: nothing is modified, and structures stay."""

from typing import Any

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.transformation import apply_updates
from functorch_optim.testing._comparison import assert_same, kind, tensors_of, unmodified
from functorch_optim.testing._problem import Problem, Subject
from functorch_optim.tree import Tree


def pure(subject: Subject, problem: Problem) -> None:
    """`update` modifies none of its arguments, and a second call returns the same.

    Nothing may be kept outside of the state: not in a closure, not in an attribute.
    """
    tx, params = subject(), problem.params
    with unmodified(parameter=params):
        state = tx.init(params)
    for given in problem.history:
        grads, extras = problem.gradients(params, given), problem.extras(tx, params, given)
        with unmodified(parameter=params, gradient=grads, state=state):
            updates, new_state = tx.update(grads, state, params, **extras)
            others = tree.map(lambda p: 2 * p + 1, params)
            problem.step(tx, tx.init(others), others, given)
            again = tx.update(grads, state, params, **extras)
        for name, second, first in (("updates", again[0], updates), ("state", again[1], new_state)):
            same_again = f"the {name} of the same call, made again,"
            assert_same(second, first, same_again, subject.tolerance, problem.scale)
        params, state = apply_updates(params, updates), new_state


def kept(subject: Subject, problem: Problem) -> None:
    """Updates have the structure, shapes and dtypes of the gradients, and so has each state those of the one before.

    States are made of tensors, in containers that torch.func knows. In float64, float32 and bfloat16.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _check_kept(subject, problem.map(lambda leaf: leaf.to(dtype)))  # noqa: B023


def complex_parameters(subject: Subject, problem: Problem) -> None:
    """Complex parameters work too, or `init` refuses them with a TypeError.

    Skip it for a transformation of real numbers only.
    """
    waves = problem.map(lambda leaf: torch.complex(leaf, leaf.flip(0) if leaf.ndim else -leaf))
    try:
        subject().init(waves.params)
    except TypeError as refusal:
        if "complex" not in str(refusal):
            raise
    else:
        _check_kept(subject, waves)


def _check_kept(subject: Subject, problem: Problem) -> None:
    tx, params = subject(), problem.params
    state = tx.init(params)
    _check_state(state)
    for given in problem.history:
        grads = problem.gradients(params, given)
        updates, new_state = tx.update(grads, state, params, **problem.extras(tx, params, given))
        _check_state(new_state)
        _assert_alike(updates, grads, "the updates")
        _assert_alike(new_state, state, "the state")
        params, state = apply_updates(params, updates), new_state


def _check_state(state: Any) -> None:
    for path, leaf in zip(tree.paths(state), tree.flatten(state)[0], strict=True):
        if not isinstance(leaf, Tensor):
            raise AssertionError(
                f"the state has a {type(leaf).__name__} at {path!r}, {leaf!r}, where a tensor belongs: keep numbers as "
                "0-dim tensors, such as torch.zeros((), dtype=torch.int64), or every step compiles anew"
            )
    seen = {id(leaf) for leaf in torch.utils._pytree.tree_leaves(state)}
    for path, leaf in tensors_of(state).items():
        if id(leaf) not in seen:
            raise AssertionError(
                f"the state's {path!r} is in a container that torch.func does not see into; use dicts, tuples, lists "
                "and NamedTuples"
            )


def _assert_alike(actual: Tree, expected: Tree, what: str) -> None:
    """Compare structures, shapes and dtypes, and not the numbers."""
    leaves, structure = tree.flatten(actual)
    expected_leaves, expected_structure = tree.flatten(expected)
    if structure != expected_structure:
        raise AssertionError(
            f"{what} changes its structure: {tree.first_difference(expected, actual, 'the former', 'the new one')}"
        )
    for path, a, e in zip(tree.paths(expected), leaves, expected_leaves, strict=True):
        if (a is None) != (e is None) or (a is not None and kind(a) != kind(e)):
            was, now = ("None" if leaf is None else kind(leaf) for leaf in (e, a))
            raise AssertionError(f"{what} at {path!r} was of {was}, and is of {now}")


def missing_gradients(subject: Subject, problem: Problem) -> None:
    """A gradient that is None leaves the parameter and its state alone.

    Skip it for a transformation that is never given None; then no other property is run with missing gradients.
    `fo.Optimizer` gives None for parameters without `grad`.
    """
    tx, params, state = subject(), problem.params, subject().init(problem.params)
    places, structure = tree.paths(params), tree.flatten(params)[1]
    for given in problem.history:
        updates, new_state = problem.update(tx, state, params, given)
        grads = dict(zip(places, structure.flatten_up_to(given), strict=True))
        after = tensors_of(new_state)
        for path, leaf in tensors_of(state).items():
            owners = [place for place in places if place == path or path.endswith(f".{place}")]
            owner = max(owners, key=len, default=None)
            if owner is not None and grads[owner] is None and (leaf.is_floating_point() or leaf.is_complex()):
                what = f"the state's {path!r}, of a parameter without a gradient,"
                if path not in after:
                    raise AssertionError(f"{what} is gone")
                assert_same(after[path], leaf, what, 0.0, 0.0)
        params, state = apply_updates(params, updates), new_state


def leaves(subject: Subject, problem: Problem) -> None:
    """Names and order of the leaves do not matter: the same leaves give the same in another order.

    Skip it for a transformation that treats parameters by their names.
    """
    places = tree.paths(problem.params)

    def renamed(listed: list[Any]) -> Tree:
        return {f"{len(listed) - i:04}": (leaf,) for i, leaf in enumerate(listed)}

    expected = tree.flatten(problem.train(subject())[0])[0]
    trained = problem.restructured(renamed).train(subject())[0]
    for path, (p,), e in zip(places, trained.values(), expected, strict=True):
        what = f"the parameter {path!r}, with leaves renamed and in reverse order,"
        assert_same(p, e, what, subject.tolerance, problem.scale)
