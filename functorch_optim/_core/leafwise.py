"""Transformations of a rule for one tensor, which is lifted to trees."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_optim._core.leaf import marked
from functorch_optim._core.links import Link
from functorch_optim._core.rule import EmptyState, Rule, unchanged
from functorch_optim._core.transformation import GradientTransformation, factory
from functorch_optim.tree import Tree


@factory
def leafwise(
    init: Callable[[Any], Any] | type | None,
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    scalars: Callable[..., Any] | None = None,
    *,
    carry: Callable[[], Any] | None = None,
    elementwise: bool = False,
    norms: bool = False,
    needs_params: bool = False,
    sparse: Literal["touched", "dense"] | None = None,
) -> GradientTransformation:
    """Lift a rule for one tensor to trees of tensors.

    The rule is run over all leaves in whatever way is fastest for them; it is given tensors or things that answer to
    torch functions and operators as tensors do. It must be pure: no in-place operation, no `.item()`, no branching on
    values; and it must take every number from `scalars`, so that one compiled kernel serves a whole run.

    Args:
        init: `init(p) -> state` makes the state for one parameter, a NamedTuple of tensors. Or the NamedTuple class
            itself: every field then starts at `zeros_like(p)`. None: the rule keeps no state.
        update: `update(g, state, p, s) -> (g, state)` transforms the gradient of one parameter, keeping its shape. `p`
            is None when the caller gave no parameters; `s` is the result of `scalars`, and `()` without it; `state` is
            `()` when the rule keeps none. An elementwise rule sees complex tensors as pairs of reals, `(..., 2)`;
            every rule sees float16 and bfloat16 as float32.
        scalars: `scalars(step) -> s` computes, once a step for all tensors, every number that the rule needs: 0-dim
            tensors or numbers in any tree. `step` is the number of this update, 1 at the first. It is a float where it
            is known, and a 0-dim float64 tensor under transforms and where something is compiled. Functions that take
            only tensors are given tensors: where scalars raise with a float, they are called again with a tensor. Use
            `fo.at(hyperparameter, step)` to evaluate hyperparameters. Its keyword-only parameters are extras that the
            rule declares. Three names are no extras but the tensors that the rule is about to be run on, for numbers
            like a global norm: `updates` and `params` are lists of tensors, and `states` is a NamedTuple with a list in
            each field, all in one order, as they are: complex ones complex, halves in half precision. A number may be a
            function of the dtype of the parameter, as machine epsilon is. None: the rule needs no numbers.
        carry: `carry() -> numbers` makes numbers that `scalars` carries from step to step: a NamedTuple of numbers or
            0-dim tensors, float64 in the state. It is then called as `scalars(step, carried) -> (s, carried)`.
        elementwise: whether every element is transformed by itself, so that tensors may be batched, split or flattened
            at will. Leave it False when the rule looks at shapes or reduces over elements.
        norms: whether the rule is elementwise but for norms of its tensor, which `fo.safe_norm` takes. On the CPU it is
            then run in blocks too, once for the norms and once for the results, and compiled with `fused=True`.
        needs_params: whether the rule uses `p`.
        sparse: the treatment of sparse gradients (`torch.sparse_coo`). "touched": run an elementwise rule on their
            entries, so that all others keep their state. "dense": make them dense. None: refuse them.

    Returns:
        Transformation whose state is a NamedTuple: `step` (0-dim int64, when there are scalars), the numbers that are
        carried, then the fields of the rule's state, each a tree like the parameters.

    Raises:
        ValueError: `carry` comes without `scalars`; `sparse` is none of the three, or "touched" with a rule that is not
            elementwise.

    Example:
        Sign descent with momentum, in the letters of its paper.

        >>> import functorch_optim as fo, torch
        >>> from typing import NamedTuple
        >>> class SignumState(NamedTuple):
        ...     momentum_buffer: torch.Tensor
        >>> def scale_by_signum(momentum=0.9):
        ...     def scalars(step):
        ...         return 1 - fo.at(momentum, step)
        ...     def update(g, state, p, weight):
        ...         m = torch.lerp(state.momentum_buffer, g, weight)
        ...         return torch.sign(m), SignumState(m)
        ...     return fo.leafwise(SignumState, update, scalars, elementwise=True)
        >>> tx = fo.chain(scale_by_signum(), fo.scale_by_learning_rate(0.1))
        >>> params = {"w": torch.zeros(2)}
        >>> updates, state = tx.update({"w": torch.tensor([3.0, -3.0])}, tx.init(params))
        >>> updates, state[0].step
        ({'w': tensor([-0.1000,  0.1000])}, tensor(1))
    """
    return of_rule(
        init,
        update,
        scalars,
        carry=carry,
        elementwise=elementwise,
        norms=norms,
        needs_params=needs_params,
        sparse=sparse,
    )


def of_rule(
    init: Callable[[Any], Any] | type | None,
    update: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    scalars: Callable[..., Any] | None = None,
    *,
    carry: Callable[[], Any] | None = None,
    sparse: Literal["touched", "dense"] | None = None,
    **options: Any,
) -> GradientTransformation:
    """Make a transformation of a rule; see `leafwise`, and `Rule` for further options."""
    state_type: Any = init if isinstance(init, type) else _returned(init)
    make_state: Any = init
    if isinstance(init, type):
        count = len(getattr(init, "_fields", ()))

        def make_state(p: Tensor) -> Any:
            return state_type(*[torch.zeros_like(p) for _ in range(count)])

    if scalars is not None and not callable(scalars):
        raise TypeError(f"scalars is a function of the step, got {scalars!r}; write scalars=lambda step: {scalars!r}")
    if carry is not None and scalars is None:
        raise ValueError("carry needs scalars(step, carried) -> (s, carried), which carries its numbers on")
    if sparse not in ("touched", "dense", None) or (sparse == "touched" and not options.get("elementwise")):
        raise ValueError(
            f"Invalid sparse: {sparse!r}; give 'touched', for an elementwise rule only, 'dense', or None to refuse"
        )
    rule = Rule(
        make_state,
        update,
        scalars,
        carry,
        sparse=sparse,
        state_type=state_type,
        carried_type=None if carry is None else _carried_type(carry),
        **options,
    )
    return GradientTransformation._of((Link(rule),), 0)


def _carried_type(carry: Callable[[], Any]) -> Any:
    """Find the NamedTuple that `carry` makes."""
    declared = _returned(carry)
    if declared is not None:
        return declared
    with marked():
        made = carry()
    if not hasattr(made, "_fields"):
        raise TypeError(
            f"carry must return a NamedTuple of numbers, got {made!r}. Write: class Carried(NamedTuple): total: Any, "
            "and carry=lambda: Carried(0.0)"
        )
    return type(made)


def _returned(function: Any) -> Any:
    """Return the NamedTuple that a function says it returns, or None."""
    declared = getattr(function, "__annotations__", {}).get("return")
    if isinstance(declared, str):  # as `from __future__ import annotations` leaves it; a trace has no __globals__
        declared = getattr(sys.modules.get(function.__module__), declared, None)
    return declared if hasattr(declared, "_fields") else None


@factory
def identity() -> GradientTransformation:
    """Pass updates through unchanged.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.identity()
        >>> tx.update({"w": torch.ones(1)}, tx.init({"w": torch.ones(1)}))
        ({'w': tensor([1.])}, EmptyState())
    """
    return leafwise(None, unchanged, elementwise=True, sparse="touched")


@factory
def stateless(function: Callable[[Tree, Tree], Tree]) -> GradientTransformation:
    """Make a transformation of a pure function of updates and parameters.

    Args:
        function: `function(updates, params) -> updates`, over whole trees. `params` is None when the caller gave none;
            an update is None where there is no gradient, which `fo.tree.map` passes over.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.stateless(lambda updates, params: fo.tree.map(torch.sign, updates))
        >>> tx.update({"w": torch.tensor([5.0])}, tx.init({"w": torch.ones(1)}))
        ({'w': tensor([1.])}, EmptyState())
    """

    def update(updates: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        return function(updates, params), state

    return GradientTransformation(lambda params: EmptyState(), update)
