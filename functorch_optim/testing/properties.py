"""Properties that every transformation should have, a function each, and the check of all of them.

`PROPERTIES` lists them, in the order in which they are checked. A property takes what is checked and a problem that it
is run on, and raises where it does not hold.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeAlias
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_optim import execution, tree
from functorch_optim.base import GradientTransformation, apply_updates
from functorch_optim.execution import blocks
from functorch_optim.optim.wrapper import Optimizer
from functorch_optim.saving import load_state_dict, state_dict
from functorch_optim.stepping import step, step_
from functorch_optim.testing.comparison import assert_same, kind, tensors_of, unmodified
from functorch_optim.testing.copies import through_a_file, through_pickle
from functorch_optim.testing.derivatives import OfVector, assert_finite, check_first_derivatives
from functorch_optim.testing.problem import Problem, Subject, awkward, double_by_default, problems, standard
from functorch_optim.testing.report import falsify, first_line, reported, to_check
from functorch_optim.testing.strategies import kinds_of
from functorch_optim.tree import Tree

VALUES = (
    "it takes a value out of a tensor (.item(), float(), bool(), `if x > 0`), which is not there yet when it is "
    "batched or compiled; use torch.where, and tensors for numbers"
)


# What is done to trees. -----------------------------------------------------------------------------------------------


def pure(subject: Subject, problem: Problem) -> None:
    """`update` modifies nothing that it is given, and gives the same when it is called again.

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

    Skip it for a transformation that is for real numbers only.
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
    """Compare all but numbers."""
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
    """Names and order of the leaves do not matter: those of a tree give what the same ones give in another order.

    Skip it for a transformation that tells parameters apart by their names.
    """
    places = tree.paths(problem.params)

    def renamed(listed: list[Any]) -> Tree:
        return {f"{len(listed) - i:04}": (leaf,) for i, leaf in enumerate(listed)}

    expected = tree.flatten(problem.train(subject())[0])[0]
    trained = problem.restructured(renamed).train(subject())[0]
    for path, (p,), e in zip(places, trained.values(), expected, strict=True):
        what = f"the parameter {path!r}, with leaves renamed and in reverse order,"
        assert_same(p, e, what, subject.tolerance, problem.scale)


# Numbers. -------------------------------------------------------------------------------------------------------------


def tensors(subject: Subject, problem: Problem) -> None:
    """A hyperparameter may be a 0-dim tensor: it gives what the number gives, and states of the same structure."""
    expected = problem.train(subject())
    for path, value in subject.numbers.items():
        trained = problem.train(subject({path: kinds_of(value)["tensor"]}))
        _assert_same_training(trained, expected, f"with a tensor for {path!r} of {value},", subject, problem)


def schedules(subject: Subject, problem: Problem) -> None:
    """A hyperparameter may be a function of the number of updates done: each step is that with the number it returns.

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
            _assert_same_training((params, state), expected, what, subject, problem)


def double_precision(subject: Subject, problem: Problem) -> None:
    """In training in float64 nothing is computed in less: no bias correction is rounded to float32.

    `0.999 ** count` is float32 where `count` is a tensor of integers, and so is `torch.tensor(0.999)`. What is trained
    is compared with itself where float32 is not to be had; after three steps all counters jump to 1000. Skip it for
    a transformation that means to compute in lower precision.
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
    _assert_same_training(expected, rounded, what, subject, problem)


def _is_counter(leaf: Tensor) -> bool:
    return leaf.ndim == 0 and leaf.dtype in (torch.int64, torch.int32)


def _check_scalars(rule: Any) -> None:
    """Look at the numbers of a rule themselves."""
    if rule.scalars is None or not rule.extras.names <= {"updates"}:
        return
    extras = {"updates": [torch.ones(2)]} if rule.sees_tree else {}
    carried = [torch.tensor(0.5, dtype=torch.float64) for _ in rule.counters[1:]]
    arguments = [rule.carried_type(*carried)] if carried else []
    scalars = rule.scalars(torch.tensor(2.0, dtype=torch.float64), *arguments, **extras)
    for path, leaf in tensors_of(scalars).items():
        if leaf.is_floating_point() and leaf.dtype != torch.float64:
            at = f" at {path!r}" if path else ""
            raise AssertionError(f"the scalars of {rule.name}{at} are {leaf.dtype}: keep the dtype of `step`, float64")


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where float64 is made whatever floating dtype is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        low = (torch.float32, torch.float16, torch.bfloat16)
        asked = {name: torch.float64 if value in low else value for name, value in (kwargs or {}).items()}
        return func(*args, **asked)


def _assert_same_training(
    trained: tuple[Tree, Any], expected: tuple[Tree, Any], what: str, subject: Subject, problem: Problem
) -> None:
    for name, one, other in zip(("parameter", "state"), trained, expected, strict=True):
        assert_same(one, other, f"{what} the {name}", subject.tolerance, problem.scale)


# Ways. ----------------------------------------------------------------------------------------------------------------


def saving(subject: Subject, problem: Problem) -> None:
    """States go through `fo.state_dict`, `torch.load(weights_only=True)` and pickle, and training goes on the same."""
    params, state = problem.train(subject())
    loaded = load_state_dict(subject().init(problem.params), through_a_file(state_dict(state)))
    assert_same(loaded, state, "the state that was saved and loaded", 0.0, 0.0)
    assert_same(through_pickle(state), state, "the state that was pickled", 0.0, 0.0)
    onwards = replace(problem, params=params)
    trained, expected = onwards.train(subject(), loaded), onwards.train(subject(), state)
    _assert_same_training(trained, expected, "after loading", subject, problem)


def ways(subject: Subject, problem: Problem) -> None:
    """It gives the same tensor by tensor, in blocks, by foreach kernels, and where autograd records it.

    In blocks in float64, float32 and bfloat16.
    """
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        given = problem.map(lambda leaf: leaf.to(dtype))  # noqa: B023
        with mock.patch.object(execution, "can_batch", return_value=False):
            expected = given.train(subject())
        with mock.patch.object(blocks, "SMALL", 0):  # tensors as small as these would go through foreach kernels
            _assert_same_training(given.train(subject()), expected, f"in blocks, in {dtype},", subject, given)
    with mock.patch.object(execution, "can_block", return_value=False):
        _assert_same_training(problem.train(subject()), expected, "by foreach kernels", subject, problem)
    recorded = problem.map(lambda leaf: leaf.detach().requires_grad_())
    _assert_same_training(recorded.train(subject()), expected, "recorded", subject, problem)


def steps(subject: Subject, problem: Problem) -> None:
    """`fo.step`, and `fo.step_` in place, blockwise or by foreach kernels, do what `update` and `apply_updates` do."""
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
        _assert_same_training((params, state), expected, f"by {name}", subject, problem)


def stateful(subject: Subject, problem: Problem) -> None:
    """`fo.Optimizer` trains as the functional form does, in every form, and keeps its state through a checkpoint.

    Skip it for a transformation with a mask or labels that are a tree, and no function of one.
    """
    expected = tree.flatten(problem.train(subject())[0])[0]
    listed = problem.restructured(list)
    if not listed.params:
        return  # torch.optim takes no empty list
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


# Transforms. ----------------------------------------------------------------------------------------------------------

FACTORS = torch.tensor([1.0, -0.5], dtype=torch.float64)


def vmap_parameters(subject: Subject, problem: Problem) -> None:
    """`torch.vmap` over parameters, states and gradients equals a loop; and over gradients alone.

    The first is an ensemble; the second are tasks with shared parameters.
    """
    if not tree.flatten(problem.params)[0]:
        return  # torch.vmap takes no arguments without tensors
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
        _assert_same_training(one, expected, f"by vmap, in slice {i},", subject, batch)

    def trained(history: list[Tree]) -> tuple[Tree, Any]:
        return replace(problem, history=history).train(tx)

    with explained("vmap"):
        tasks = torch.vmap(trained)(list(batch.history))
    for i in range(len(FACTORS)):
        expected = trained([tree.map(lambda leaf: leaf[i], given) for given in batch.history])  # noqa: B023
        one = tree.map(lambda leaf: leaf[i], tasks)  # noqa: B023
        _assert_same_training(one, expected, f"by vmap over gradients, in slice {i},", subject, batch)


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

    `torch.func.grad`, `jacfwd` and `jvp` give the same. What is detached on the way is noticed: a momentum, say, or a
    hyperparameter, at a value at which it matters: `eps=1e-3` rather than 1e-8. Skip it for a transformation that is
    not differentiable on purpose.
    """
    check_first_derivatives(OfVector(*_training(subject, problem)))


def finite_derivatives(subject: Subject, problem: Problem) -> None:
    """Derivatives are finite where gradients are zero, as those of a unit are that never fired.

    The derivative of `torch.sqrt` is infinite at zero; `fo.safe_sqrt` and `fo.safe_norm` have none there.
    """
    still = replace(problem, history=[tree.map(torch.zeros_like, given) for given in problem.history])
    assert_finite(OfVector(*_training(subject, still)))


def _training(subject: Subject, problem: Problem) -> tuple[Callable[[Any], Tensor], Tree]:
    """Return training as a function of everything it depends on, and that."""

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
    compile: Callable[..., Any] | None = None,  # noqa: A002 - it is torch's name
) -> None:
    """Raise unless a function gives the same when it is compiled, for all these arguments, without compiling again.

    Args:
        function: of trees; returns one.
        arguments: to call it with, one after the other.
        tolerance: see `assert_same`.
        scale: see there.
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
    """Let errors of a transform say what mostly makes them."""
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


# All of them. ---------------------------------------------------------------------------------------------------------

Property: TypeAlias = Callable[[Subject, Problem], None]

COMPLETE: tuple[Property, ...] = (pure, kept, complex_parameters, vmap_parameters, vmap_hyperparameters, stateful)
"""Run on trees that hypothesis draws, and shrinks to the smallest that breaks one."""

INCOMPLETE: tuple[Property, ...] = (
    missing_gradients,
    leaves,
    tensors,
    schedules,
    double_precision,
    saving,
    ways,
    steps,
)
"""Run on such trees, where some gradients are missing, unless `missing_gradients` is skipped."""

SLOW: tuple[Property, ...] = (derivatives, finite_derivatives, compiled)
"""Run on one tree, for they take long."""

PROPERTIES: dict[str, Property] = {check.__name__: check for check in (*COMPLETE, *INCOMPLETE, *SLOW)}


def check_transformation(
    transformation: GradientTransformation | Callable[..., GradientTransformation],
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    skip: Collection[str] = (),
    params: st.SearchStrategy[Tree] | None = None,
    extra: Mapping[str, Any] | None = None,
    tolerance: float = 1e-12,
    examples: int = 10,
) -> None:
    """Check everything that this library promises of its own transformations, of yours.

    The properties are listed in `functorch_optim.testing.PROPERTIES`, name -> function; `help` explains each of them:

    | name | what is checked |
    |---|---|
    | `pure` | nothing is modified, nothing kept outside of the state |
    | `kept` | structure, shapes and dtypes stay, in three dtypes |
    | `complex_parameters` | the same for complex numbers, or a TypeError |
    | `vmap_parameters`, `vmap_hyperparameters` | equal a loop |
    | `stateful` | `fo.Optimizer` trains the same, with a checkpoint |
    | `missing_gradients` | None leaves a parameter and its state alone |
    | `leaves` | their names and order do not matter |
    | `tensors`, `schedules` | may stand for numbers, with the same result |
    | `double_precision` | nothing is computed in less than float64 |
    | `saving` | through `state_dict`, `torch.load(weights_only=True)`, pickle |
    | `ways` | tensor by tensor, in blocks, by foreach kernels, recorded by autograd |
    | `steps` | `fo.step` and `fo.step_` |
    | `derivatives` | reverse and forward mode, against finite differences |
    | `finite_derivatives` | also where gradients are zero |
    | `compiled` | whole, and once |

    Args:
        transformation: a transformation; or, to have its hyperparameters checked too, a function that makes one.
        hyperparameters: arguments of that function by name, any tree. The floats among them are checked as
            hyperparameters; choose values at which all of them matter, such as `eps=1e-3`.
        skip: names of properties that it need not have.
        params: strategy for the parameters, tensors in float64, for a transformation that is for certain trees;
            `hypothesis.strategies.just({...})` for a single one. None: `trees(dtypes=[torch.float64])`.
        extra: what `update` declares by keyword, besides `value`, the loss, and `value_fn`, a function of the
            parameters, which are there.
        tolerance: of rounding in float64, relative.
        examples: how many trees each property is tried on.

    Raises:
        PropertyError: a property does not hold. The message says which, what differs where, and for the smallest tree
            that hypothesis finds.
        ValueError: a name in `skip` is none of a property.

    Example:
        >>> import functorch_optim as fo
        >>> from functorch_optim import testing
        >>> testing.check_transformation(fo.sgd, {"lr": 0.1, "momentum": 0.9}, skip={"compiled"}, examples=2)
        >>> def detached(lr):
        ...     def update(g, state, p, lr):
        ...         return -lr.detach() * g if isinstance(lr, torch.Tensor) else -lr * g, state
        ...     return fo.leafwise(None, update, lambda step: fo.at(lr, step))
        >>> testing.check_transformation(detached, {"lr": 0.1}, examples=2)
        Traceback (most recent call last):
        ...
        functorch_optim.testing.report.PropertyError: ...
    """
    make = (lambda: transformation) if isinstance(transformation, GradientTransformation) else transformation
    subject = Subject(make, hyperparameters or {}, tolerance)
    for name in to_check(PROPERTIES, skip):
        check = PROPERTIES[name]
        missing = check in INCOMPLETE and "missing_gradients" not in skip
        if check not in SLOW:
            first = awkward(missing, extra) if params is None else None
            falsify(check, subject, problems(params, missing=missing, extra=extra), examples, first)
        elif params is None:
            with reported(check, standard(extra=extra)) as problem:
                check(subject, problem)
        else:
            falsify(check, subject, problems(params, extra=extra, least=3), 1)
