"""Properties that every torch.optim.Optimizer of this library should have, and the check of all of them."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from functorch_optim import tree
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.optim import _wrapper as wrapper
from functorch_optim.testing._comparison import assert_same, tensors_of
from functorch_optim.testing._copies import through_a_file, through_pickle
from functorch_optim.testing._derivatives import OfVector, assert_equal_differences, differences
from functorch_optim.testing._problem import Problem, Subject, double_by_default, standard
from functorch_optim.testing._report import reported, to_check

Pair: TypeAlias = tuple[list[Tensor], Optimizer]
Property: TypeAlias = Callable[[Subject, Problem], None]


def new(subject: Subject, values: Sequence[Tensor], changed: Mapping[str, Any] | None = None) -> Pair:
    """Make parameters with these values, and an optimizer of them."""
    own = [value.detach().clone().requires_grad_() for value in values]
    return own, subject.make(own, **subject.given(changed))


def give(problem: Problem, own: list[Tensor], given: list[Any]) -> None:
    """Give parameters the gradients of a step."""
    for p, g in zip(own, problem.gradients([p.detach() for p in own], given), strict=True):
        p.grad = g


def train(problem: Problem, pair: Pair, which: slice = slice(None)) -> list[Tensor]:
    """Take some of the steps of a problem; return the parameters after them."""
    own, optimizer = pair
    for given in problem.history[which]:
        give(problem, own, given)
        optimizer.step()
    return [p.detach().clone() for p in own]


def parts(problem: Problem) -> list[Problem]:
    """Divide the parameters into two problems."""
    return [
        Problem(problem.params[part], [given[part] for given in problem.history]) for part in (slice(1), slice(1, None))
    ]


def same(subject: Subject, actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Raise unless parameters are the same."""
    assert_same(actual, expected, f"{what} the parameter", subject.tolerance)


FIRST, REST = slice(2), slice(2, None)


def interface(subject: Subject, problem: Problem) -> None:
    """It is a `torch.optim.Optimizer`, of the parameters that it is given, and `step` returns None."""
    own, optimizer = new(subject, problem.params)
    if not isinstance(optimizer, Optimizer):
        raise AssertionError(f"it makes a {type(optimizer).__name__}")
    given = [p for group in optimizer.param_groups for p in group["params"]]
    if [id(p) for p in given] != [id(p) for p in own]:
        raise AssertionError("the parameters in its param_groups are others than it was given")
    if (result := optimizer.step()) is not None:
        raise AssertionError(f"step() returns {result!r}")


def functional_form(subject: Subject, problem: Problem) -> None:
    """Its steps are those of its functional form, where there is one."""
    if subject.functional is not None:
        expected = problem.train(subject.functional(**subject.given()))[0]
        same(subject, train(problem, new(subject, problem.params)), expected, "compared with the functional form")


def groups(subject: Subject, problem: Problem) -> None:
    """A param group may have hyperparameters of its own: two groups train as two optimizers do."""
    one, other = parts(problem)
    for path, value in subject.numbers.items():
        changed = subject.given({path: 0.9 * value})
        name = path.partition(".")[0]
        own = [value.detach().clone().requires_grad_() for value in problem.params]
        both = [{"params": own[:1]}, {"params": own[1:], name: changed[name]}]
        trained = train(problem, (own, subject.make(both, **subject.given())))
        alone = train(one, new(subject, one.params)), train(other, new(subject, other.params, {path: 0.9 * value}))
        same(subject, trained, alone[0] + alone[1], f"with another {name} in the second group")


def edits(subject: Subject, problem: Problem) -> None:
    """Hyperparameters live in `param_groups`: an edit takes effect at the next step."""
    for path, value in subject.numbers.items():
        edited, pair = subject.given({path: 0.9 * value}), new(subject, problem.params)
        values, name = train(problem, pair, FIRST), path.partition(".")[0]
        saved = copy.deepcopy(pair[1].state_dict())
        for group in pair[1].param_groups:
            group[name] = edited[name]
        other = new(subject, values, {path: 0.9 * value})
        other[1].load_state_dict({**saved, "param_groups": other[1].state_dict()["param_groups"]})
        expected = train(problem, other, REST)
        same(subject, train(problem, pair, REST), expected, f"after param_groups have got another {name}")


def schedulers(subject: Subject, problem: Problem) -> None:
    """A learning rate scheduler of torch drives it."""
    scheduled, by_hand = new(subject, problem.params), new(subject, problem.params)
    scheduler = lr_scheduler.ExponentialLR(scheduled[1], gamma=0.5)
    for k in range(len(problem.history)):
        step = slice(k, k + 1)
        actual, expected = train(problem, scheduled, step), train(problem, by_hand, step)
        same(subject, actual, expected, f"with a scheduler, after step {k + 1},")
        scheduler.step()
        for group in by_hand[1].param_groups:
            group["lr"] = group["lr"] * 0.5


def missing_gradients(subject: Subject, problem: Problem) -> None:
    """A parameter whose `grad` is None stays as it is, and so does its state."""
    own, optimizer = new(subject, problem.params)
    before = train(problem, (own, optimizer), FIRST)
    give(problem, own, problem.history[2])
    own[1].grad = None
    state = tree.map(torch.clone, tensors_of(dict(optimizer.state[own[1]])))
    optimizer.step()
    assert_same(own[1].detach(), before[1], "a parameter without a gradient", 0.0, 0.0)
    assert_same(tensors_of(dict(optimizer.state[own[1]])), state, "the state of a parameter without a gradient", 0.0)


def zero_grad(subject: Subject, problem: Problem) -> None:
    """`zero_grad` removes gradients, or sets them to zero."""
    own, optimizer = new(subject, problem.params)
    for set_to_none in (False, True):
        give(problem, own, problem.history[0])
        optimizer.zero_grad(set_to_none=set_to_none)
        if not all(p.grad is None if set_to_none else p.grad is not None and not p.grad.any() for p in own):
            raise AssertionError(f"after zero_grad(set_to_none={set_to_none}) a gradient is {own[0].grad}")


def closure(subject: Subject, problem: Problem) -> None:
    """A closure is called, with gradients enabled; `step` returns its loss, and moves parameters as without one."""
    own, optimizer = new(subject, problem.params)
    expected = train(problem, new(subject, problem.params))
    for given in problem.history:
        losses = []

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = problem.loss(own, given)  # noqa: B023
            if not loss.requires_grad:
                raise AssertionError("the closure is called with gradients disabled; use torch.enable_grad()")
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss)  # noqa: B023
            return loss

        with torch.no_grad():
            take: Any = optimizer.step  # mypy expects a closure that returns a float
            result = take(evaluate)
        if not losses or result is not losses[0]:
            raise AssertionError(f"step(closure) returns {result!r}, where the closure returned {losses}")
    same(subject, [p.detach() for p in own], expected, "with a closure")


def saving(subject: Subject, problem: Problem) -> None:
    """Its state dict goes through `torch.load(weights_only=True)`, and another optimizer goes on with it."""
    pair = new(subject, problem.params)
    values = train(problem, pair, FIRST)
    other = new(subject, values)
    other[1].load_state_dict(through_a_file(pair[1].state_dict()))
    resumed = train(problem, other, REST)
    same(subject, resumed, train(problem, pair, REST), "after its state was saved and loaded")


def deepcopy(subject: Subject, problem: Problem) -> None:
    """A deep copy trains on by itself."""
    _check_copy(subject, problem, copy.deepcopy)


def pickles(subject: Subject, problem: Problem) -> None:
    """It goes through pickle, and trains on.

    Skip it for a lambda, which Python cannot pickle.
    """
    _check_copy(subject, problem, through_pickle)


def _check_copy(subject: Subject, problem: Problem, make_copy: Callable[[Pair], Pair]) -> None:
    pair = new(subject, problem.params)
    before = train(problem, pair, FIRST)
    copied = make_copy(pair)
    trained = train(problem, copied, REST)
    same(subject, [p.detach() for p in pair[0]], before, "after its copy has trained on")
    same(subject, trained, train(problem, pair, REST), "of the copy")


def add_param_group(subject: Subject, problem: Problem) -> None:
    """Parameters that are added in mid-training train as with an optimizer of their own."""
    one, other = parts(problem)
    own, optimizer = new(subject, one.params)
    train(one, (own, optimizer), FIRST)
    added = [value.detach().clone().requires_grad_() for value in other.params]
    optimizer.add_param_group({"params": added})
    trained = train(problem, (own + added, optimizer), REST)
    expected = train(one, new(subject, one.params)) + train(other, new(subject, other.params), REST)
    same(subject, trained, expected, "after add_param_group")


def differentiable(subject: Subject, problem: Problem) -> None:
    """With `differentiable=True`, where it is offered, derivatives through its steps equal finite differences.

    For `fo.Optimizer` this includes derivatives with respect to hyperparameters.
    """
    try:
        optimizer = subject.make([torch.zeros(2, requires_grad=True)], **subject.given(), differentiable=True)
    except TypeError:
        return
    numbers = subject.numbers if isinstance(optimizer, wrapper.Optimizer) else {}

    def trained(arguments: Any) -> Tensor:
        own = [p.clone() for p in arguments["parameters"]]
        made = subject.make(own, **subject.given(arguments["hyperparameters"]), differentiable=True)
        for given in arguments["gradients"]:
            for p, g in zip(own, given, strict=True):
                p.grad = g * (1 + p.clone().cos() / 2)
            made.step()
        return torch.stack([p.sin().sum() for p in own]).sum()

    values = {path: torch.tensor(value, dtype=torch.float64) for path, value in numbers.items()}
    arguments = {"parameters": problem.params, "gradients": list(problem.history), "hyperparameters": values}
    function = OfVector(trained, arguments)
    z = function.z.clone().requires_grad_()
    [gradient] = torch.autograd.grad(function(z), z)

    def value(z: Tensor) -> Tensor:
        return function(z.clone().requires_grad_()).detach()

    assert_equal_differences(gradient, differences(value, function.z, batched=False), function)


OPTIMIZER_PROPERTIES: dict[str, Property] = {
    check.__name__: check
    for check in (
        interface,
        functional_form,
        groups,
        edits,
        schedulers,
        missing_gradients,
        zero_grad,
        closure,
        saving,
        deepcopy,
        pickles,
        add_param_group,
        differentiable,
    )
}
"""In the order in which they are checked."""


def check_optimizer_class(
    make: Callable[..., Optimizer],
    hyperparameters: Mapping[str, Any] | None = None,
    *,
    transformation: Callable[..., GradientTransformation] | None = None,
    skip: Collection[str] = (),
    tolerance: float = 1e-12,
) -> None:
    """Check that an optimizer works with torch's training loops, schedulers and checkpoints.

    The properties are listed in `functorch_optim.testing.OPTIMIZER_PROPERTIES`, name -> function:

    | name | property |
    |---|---|
    | `interface` | a `torch.optim.Optimizer` of the parameters given |
    | `functional_form` | steps equal those of `transformation` |
    | `groups`, `edits` | hyperparameters live in `param_groups` |
    | `schedulers` | drive the learning rate |
    | `missing_gradients`, `zero_grad`, `closure` | as in torch.optim |
    | `saving`, `deepcopy`, `pickles` | a copy goes on with the same numbers |
    | `add_param_group` | in mid-training |
    | `differentiable` | derivatives through steps, if the class has that option |

    Args:
        make: class, or function: `make(params, **hyperparameters)`.
        hyperparameters: arguments by name, any tree. The floats among them are checked as hyperparameters: they must be
            in `param_groups` under their names.
        transformation: factory of the functional form, with the same hyperparameters; None: it is not compared.
        skip: names of properties that are not checked; `schedulers` where there is no `lr`.
        tolerance: relative tolerance for rounding in float64.

    Raises:
        PropertyError: a property does not hold. The message names the property, and the place and size of the
            difference.
        ValueError: `skip` has a name that is no property.

    Example:
        >>> from functools import partial
        >>> import functorch_optim as fo
        >>> from functorch_optim import testing
        >>> make = partial(fo.Optimizer, transformation=fo.adamw)
        >>> testing.check_optimizer_class(make, {"lr": 0.1, "eps": 1e-3}, transformation=fo.adamw)
    """
    subject = Subject(make, hyperparameters or {}, tolerance, transformation)
    for name in to_check(OPTIMIZER_PROPERTIES, skip):
        problem = standard(steps=4).restructured(list)
        with double_by_default(), reported(OPTIMIZER_PROPERTIES[name], problem):
            OPTIMIZER_PROPERTIES[name](subject, problem)
