"""The subjects of checks, and the problems that they are run on."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.transformation import GradientTransformation, apply_updates
from functorch_optim.testing._comparison import assert_same, tensors_of
from functorch_optim.testing.strategies import gradients, histories, trees
from functorch_optim.tree import Tree


@dataclass(frozen=True)
class Subject:
    """A transformation, as a factory and its arguments.

    Attributes:
        make: takes the hyperparameters by name, returns a transformation. For an optimizer class, `make(params, ...)`.
        hyperparameters: its arguments, any tree. The floats among them are hyperparameters: they may be replaced by
            tensors and schedules. All other values are passed on as they are.
        tolerance: relative tolerance for rounding in float64.
        functional: factory of the functional form of an optimizer class.

    Example:
        >>> import functorch_optim as fo
        >>> from functorch_optim.testing import Subject
        >>> subject = Subject(fo.adam, {"lr": 0.1, "betas": (0.9, 0.99)})
        >>> list(subject.numbers), subject({"betas.1": 0.5})
        (['betas.0', 'betas.1', 'lr'], adam(lr=0.1, betas=(0.9, 0.5)))
    """

    make: Callable[..., Any]
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-12
    functional: Callable[..., GradientTransformation] | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """The floats among the hyperparameters, by path."""
        leaves = zip(tree.paths(dict(self.hyperparameters)), self._leaves, strict=True)
        return {path: leaf for path, leaf in leaves if isinstance(leaf, float)}

    def given(self, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the hyperparameters.

        Args:
            changed: path of a hyperparameter -> its replacement.
        """
        own = dict(self.hyperparameters)
        pairs = zip(tree.paths(own), self._leaves, strict=True)
        given: dict[str, Any] = tree.unflatten(
            tree.flatten(own)[1], [(changed or {}).get(path, leaf) for path, leaf in pairs]
        )
        return given

    def __call__(self, changed: Mapping[str, Any] | None = None) -> GradientTransformation:
        """Make the transformation; see `given`.

        Raises:
            TypeError: the result of `make` is no transformation.
        """
        made = self.make(**self.given(changed))
        if not isinstance(made, GradientTransformation):
            raise TypeError(
                f"{made!r} is no GradientTransformation; give one, or a function that makes one, such as fo.adam. "
                "An optimizer class is for check_optimizer_class"
            )
        return made

    @property
    def _leaves(self) -> list[Any]:
        return tree.flatten(dict(self.hyperparameters))[0]


@dataclass(frozen=True)
class Problem:
    """Parameters, and a loss for each of some steps.

    Attributes:
        params: tree of tensors.
        history: for each step, a tree like the parameters that its loss depends on, None where there is no gradient.
        extra: further keyword arguments of `update`. `value`, the loss, and `value_fn`, the loss as a function of the
            parameters, need not be given. A transformation gets those that it declares.

    Example:
        >>> import functorch_optim as fo, torch
        >>> from functorch_optim.testing import Problem
        >>> problem = Problem(torch.zeros(2), [torch.ones(2), torch.ones(2)])
        >>> params, state = problem.train(fo.sgd(1.0))
        >>> params
        tensor([-2.5354, -2.5354])
    """

    params: Tree
    history: Sequence[Tree]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def loss(self, params: Tree, given: Tree) -> Tensor:
        """Return the loss of a step: the sum of g (p + sin(p) / 2), so that gradients are like g, and depend on p."""
        leaves, structure = tree.flatten(params)
        others = tree.flatten_up_to(structure, given, "gradients", params, "params")
        products = [_product(p, g) for p, g in zip(leaves, others, strict=True) if g is not None]
        return sum(products, torch.zeros((), dtype=torch.float64))

    def gradients(self, params: Tree, given: Tree) -> Tree:
        """Return the gradients of a step; None where `given` is None."""
        leaves, structure = tree.flatten(params)
        others = tree.flatten_up_to(structure, given, "gradients", params, "params")
        present = [i for i, g in enumerate(others) if g is not None]

        def loss_of(some: list[Tensor]) -> Tensor:
            moved = dict(zip(present, some, strict=True))
            return self.loss(tree.unflatten(structure, [moved.get(i, p) for i, p in enumerate(leaves)]), given)

        grads = torch.func.grad(loss_of)([leaves[i] for i in present]) if present else []
        found = dict(zip(present, grads, strict=True))
        return tree.unflatten(structure, [found.get(i) for i in range(len(leaves))])

    def extras(self, tx: GradientTransformation, params: Tree, given: Tree) -> dict[str, Any]:
        """Make the keyword arguments that the update of a transformation declares."""
        offered: dict[str, Callable[[], Any]] = {
            "value": lambda: self.loss(params, given),
            "value_fn": lambda: lambda params: self.loss(params, given),
        }
        declared = {name for link in tx._links for name in link.rule.extras.names}
        return {**{name: make() for name, make in offered.items() if name in declared}, **self.extra}

    def update(self, tx: GradientTransformation, state: Any, params: Tree, given: Tree) -> tuple[Tree, Any]:
        """Update once; return updates and state."""
        return tx.update(self.gradients(params, given), state, params, **self.extras(tx, params, given))

    def step(self, tx: GradientTransformation, state: Any, params: Tree, given: Tree) -> tuple[Tree, Any]:
        """Take a step; return parameters and state."""
        updates, state = self.update(tx, state, params, given)
        return apply_updates(params, updates), state

    def train(self, tx: GradientTransformation, state: Any = None) -> tuple[Tree, Any]:
        """Take all steps; return parameters and state.

        Args:
            tx: transformation.
            state: first state; None: the result of `init`.
        """
        params, state = self.params, tx.init(self.params) if state is None else state
        for given in self.history:
            params, state = self.step(tx, state, params, given)
        return params, state

    @property
    def scale(self) -> float:
        """The largest number in it, at least 1."""
        found = [leaf for leaf in tensors_of([self.params, list(self.history)]).values() if leaf.numel()]
        return max([1.0, *[leaf.abs().max().item() for leaf in found]])

    def restructured(self, build: Callable[[list[Any]], Tree]) -> "Problem":
        """Put the same leaves into other trees, which `build` makes from a list of them."""
        leaves, structure = tree.flatten(self.params)
        history = [tree.flatten_up_to(structure, given, "gradients", self.params, "params") for given in self.history]
        return replace(self, params=build(leaves), history=[build(given) for given in history])

    def map(self, function: Callable[..., Any]) -> "Problem":
        """Apply a function to every tensor of it."""
        return replace(
            self,
            params=tree.map(function, self.params),
            history=[tree.map(function, given) for given in self.history],
        )

    def __str__(self) -> str:
        return "\n".join(
            [f"params = {_shortened(self.params)}"]
            + [f"gradients of step {k + 1}: {_shortened(given)}" for k, given in enumerate(self.history)]
        )


def _product(p: Tensor, g: Tensor) -> Tensor:
    if p.is_complex():
        return _product(p.real, g.real) + _product(p.imag, g.imag)
    return (g * (p + p.sin() / 2)).sum()


def _shortened(some: Tree) -> str:
    text = repr(some)
    return text if len(text) <= 500 else f"{text[:500]}..."


def has_elements(params: Tree) -> bool:
    """Tell whether there is a number in a tree."""
    return any(leaf.numel() for leaf in tensors_of(params).values())


def parameters(given: st.SearchStrategy[Tree] | None) -> st.SearchStrategy[Tree]:
    """Return a strategy for parameters in float64 with at least one number.

    Args:
        given: the user's strategy; None: `trees`.

    Raises:
        TypeError: it is no strategy, or a tensor that it draws has another dtype.
    """
    drawn = trees(dtypes=[torch.float64]) if given is None else given
    if not isinstance(drawn, st.SearchStrategy):
        raise TypeError(
            f"params is a {type(drawn).__name__}; give a hypothesis strategy, for a single tree "
            "params=hypothesis.strategies.just(tree)"
        )
    return drawn.map(_in_double).filter(has_elements)


def _in_double(params: Tree) -> Tree:
    for path, leaf in tensors_of(params).items():
        if leaf.dtype != torch.float64:
            raise TypeError(
                f"The strategy params draws {leaf.dtype} at {path!r}; give float64, which other dtypes are made of"
            )
    return params


@st.composite
def problems(
    draw: st.DrawFn,
    params: st.SearchStrategy[Tree],
    *,
    missing: bool = False,
    extra: Mapping[str, Any] | None = None,
    most: int = 3,
) -> Problem:
    """Draw parameters and gradients of some steps.

    Args:
        draw: given by hypothesis.
        params: strategy for the parameters, see `parameters`.
        missing: whether gradients may be None.
        extra: see `Problem`.
        most: largest number of steps.
    """
    drawn = draw(params)
    history = draw(histories(drawn, draw(st.integers(1, most)), missing=missing))
    return Problem(drawn, history, extra or {})


@st.composite
def moderate(draw: st.DrawFn, params: st.SearchStrategy[Tree], extra: Mapping[str, Any] | None = None) -> Problem:
    """Draw parameters and gradients of three steps, all of one magnitude, so that finite differences are accurate."""
    drawn = draw(params)
    return Problem(drawn, [draw(gradients(drawn)) for _ in range(3)], extra or {})


def standard(steps: int = 3, extra: Mapping[str, Any] | None = None) -> Problem:
    """Make a problem of a matrix, a vector and a number."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    params = {"layer": {"weight": randn(2, 2), "bias": randn(2)}, "scale": randn()}
    return Problem(params, [tree.map(lambda p: randn(*p.shape), params) for _ in range(steps)], extra or {})


def awkward(missing: bool, extra: Mapping[str, Any] | None = None) -> Problem:
    """Make a problem of the cases that are easily forgotten.

    It has a tensor without elements, a tensor with gaps in memory, gradients that are zero, and missing gradients.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    params = {"layer": {"weight": randn(3, 4)[:, ::2], "bias": randn(2)}, "rest": [randn(), randn(0, 3), randn(2)]}
    history = [tree.map(lambda p: randn(*p.shape), params) for _ in range(3)]
    history[1]["layer"]["weight"] = torch.zeros(3, 2, dtype=torch.float64)
    if missing:
        history[1]["layer"]["bias"] = history[1]["rest"][2] = None
    return Problem(params, history, extra or {})


@contextlib.contextmanager
def double_by_default() -> Iterator[None]:
    """Make float64 the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_same_training(
    trained: tuple[Tree, Any], expected: tuple[Tree, Any], what: str, subject: Subject, problem: Problem
) -> None:
    """Compare the parameters and states of two ways to train; see `assert_same`."""
    for name, one, other in zip(("parameter", "state"), trained, expected, strict=True):
        assert_same(one, other, f"{what} the {name}", subject.tolerance, problem.scale)
