"""Hypothesis strategies: parameters, gradients and hyperparameters."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from functorch_optim import tree
from functorch_optim.tree import Tree

SHAPES = ((), (0,), (1,), (3,), (2, 3), (3, 0, 2))
DTYPES = (torch.float32, torch.float64)
SCALES = (1.0, 1e-3, 1e3)


class Pair(NamedTuple):
    """A NamedTuple among the nodes of trees."""

    left: Any
    right: Any


@st.composite
def tensors(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Tensor:
    """Draw tensors of normal numbers: contiguous in memory, transposed, or with gaps.

    Args:
        draw: given by hypothesis.
        dtypes: to choose from; the first is the simplest.
        shapes: to choose from.

    Example:
        >>> import torch
        >>> from functorch_optim.testing import tensors
        >>> from hypothesis import find
        >>> find(tensors([torch.float64], [(2, 3)]), lambda x: not x.is_contiguous()).stride()
        (1, 2)
    """
    shape, dtype = draw(st.sampled_from(shapes)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return torch.randn(shape[::-1], dtype=dtype, generator=generator).permute(tuple(range(len(shape)))[::-1])
    if layout == "strided":
        return torch.randn((*shape, 2), dtype=dtype, generator=generator)[..., 0]
    return torch.randn(shape, dtype=dtype, generator=generator)


def trees(
    leaves: st.SearchStrategy[Any] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    missing: bool = False,
    max_leaves: int = 6,
    nodes: Sequence[type] = (),
) -> st.SearchStrategy[Tree]:
    """Draw parameters: a tensor, or any nesting of dicts, lists, tuples and NamedTuples, empty ones included.

    Args:
        leaves: strategy for the leaves; None: `tensors(dtypes, shapes)`.
        dtypes: dtypes of the tensors.
        shapes: shapes of the tensors; by default those of scalars, empty tensors and others.
        missing: whether leaves may be None.
        max_leaves: largest number of leaves, roughly.
        nodes: further types of nodes, of two children each, such as dataclasses.

    Returns:
        Strategy for `hypothesis.given`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from functorch_optim.testing import trees
        >>> from hypothesis import given
        >>> @given(params=trees())
        ... def test_nothing_moves_without_a_learning_rate(params):
        ...     tx = fo.sgd(0.0)
        ...     moved, _ = fo.step(tx, params, tx.init(params), params)
        ...     assert all(map(torch.equal, fo.tree.flatten(moved)[0], fo.tree.flatten(params)[0]))
        >>> test_nothing_moves_without_a_learning_rate()
    """
    keys = st.sampled_from(["a", "b", "c", "weight"])
    drawn = tensors(dtypes, shapes) if leaves is None else leaves

    def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts, lists = st.dictionaries(keys, children, max_size=3), st.lists(children, max_size=3)
        return st.one_of(
            dicts,
            dicts.map(OrderedDict),
            dicts.map(lambda items: defaultdict(list, items)),
            lists,
            lists.map(tuple),
            *[st.builds(node, children, children) for node in (Pair, *nodes)],
        )

    return st.recursive(drawn | st.none() if missing else drawn, containers, max_leaves=max_leaves)


@st.composite
def gradients(draw: st.DrawFn, params: Tree) -> Tree:
    """Draw a tree built like the parameters, of the same shapes and dtypes; numbers and memory layouts are new.

    Args:
        draw: given by hypothesis.
        params: tree of tensors; None stays None.

    Example:
        >>> import torch
        >>> from functorch_optim.testing import gradients
        >>> from hypothesis import find
        >>> find(gradients({"w": torch.zeros(2)}), lambda grads: True)["w"].shape
        torch.Size([2])
    """
    return tree.map(lambda leaf: draw(tensors([leaf.dtype], [tuple(leaf.shape)])), params)


@st.composite
def histories(draw: st.DrawFn, params: Tree, steps: int, *, missing: bool = True) -> list[Tree]:
    """Draw the gradients of some steps. They have several magnitudes, and some are exactly zero, or missing.

    Args:
        draw: given by hypothesis.
        params: tree of tensors.
        steps: number of steps.
        missing: whether gradients may be None.

    Example:
        >>> import torch
        >>> from functorch_optim.testing import histories
        >>> from hypothesis import find
        >>> history = find(histories(torch.zeros(2), 2), lambda history: history[0] is None)
        >>> len(history), history[0]
        (2, None)
    """
    kinds = st.sampled_from(["random", "random", "random", "zero", *["missing"] * missing])

    def some(leaf: Tensor, scale: float) -> Tensor | None:
        kind = draw(kinds)
        if kind == "missing":
            return None
        return torch.zeros_like(leaf) if kind == "zero" else scale * leaf

    scales = [draw(st.sampled_from(SCALES)) for _ in range(steps)]
    return [tree.map(lambda leaf: some(leaf, scale), draw(gradients(params))) for scale in scales]  # noqa: B023


def kinds_of(value: float) -> dict[str, float | Tensor | Callable[[Tensor], Tensor]]:
    """Return the three forms of a number: itself, a 0-dim float64 tensor, a schedule.

    Example:
        >>> sorted(kinds_of(0.1))
        ['number', 'schedule', 'tensor']
    """
    return {
        "number": value,
        "tensor": torch.tensor(value, dtype=torch.float64),
        "schedule": lambda step: value + 0 * step,
    }


def hyperparameters(values: Mapping[str, float]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw a form for each hyperparameter: a number, a 0-dim tensor, or a schedule.

    Args:
        values: name -> number.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from functorch_optim.testing import hyperparameters
        >>> from hypothesis import given
        >>> @given(numbers=hyperparameters({"lr": 0.5, "momentum": 0.9}))
        ... def test_any_kind_of_number(numbers):
        ...     tx, params = fo.sgd(**numbers), torch.ones(2)
        ...     updates, _ = tx.update(params, tx.init(params))
        ...     assert torch.equal(updates, -0.5 * params)
        >>> test_any_kind_of_number()
    """
    return st.fixed_dictionaries(
        {name: st.sampled_from(list(kinds_of(value).values())) for name, value in values.items()}
    )
