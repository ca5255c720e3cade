"""fo.Optimizer with differentiable steps: derivatives through training, and what is around them."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from catalogue import CATALOGUE, rows
from derivatives import RELU, UNITS, OfVector, begun, differences, errors
from memory import Alive
from stateful_training import (
    Stateful,
    by_backward,
    directly,
    gradient_of,
    is_right,
    reverse,
    second,
    without_a_graph,
    wrong,
)

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file, through_pickle

pytestmark = [pytest.mark.usefixtures("double")]
F64 = {"dtype": torch.float64}
DEAD = torch.zeros(4, UNITS, **F64)
DEAD[:, 0] = DEAD[2:, 1] = -100.0  # a unit that never fires, and one that stops


def as_transformation(named, make, numbers):
    return fo.Optimizer(named, make(**numbers), differentiable=True)


def as_factory(named, make, numbers):
    def factory(**given):
        return make(**given)

    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in numbers]
    factory.__signature__ = inspect.Signature(names)
    return fo.Optimizer(named, factory, differentiable=True, **numbers)


IN_GROUPS = [row for row in CATALOGUE if not row.keeps_hyperparameters]
cells = pytest.mark.parametrize(
    ("row", "form"),
    [pytest.param(row, as_transformation, id=f"transformation-{row.name}") for row in CATALOGUE]
    + [pytest.param(row, as_factory, id=f"factory-{row.name}") for row in IN_GROUPS],
)


def both(row, form=as_factory, **options):
    """Return training in the functional and in the stateful way, and their arguments."""
    functional, arguments = begun(row, **options)
    links = functional.make(**arguments["hyperparameters"])._links
    extras = {name for link in links for name in link.rule.extras.names} & {"value", "value_fn"}

    def make(named, numbers):
        return form(named, functional.make, numbers)

    def outcome(arguments):
        return functional.loss(functional.trained(arguments)[0], arguments["data"])

    return outcome, Stateful(make, functional.loss, functional.shifts, extras=frozenset(extras)), arguments


def named(name):
    return next(row for row in CATALOGUE if row.name == name)


# Exact. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@cells
def test_derivatives_are_those_of_the_functional_form_and_of_finite_differences(row, form):
    """The former by each argument, and by each argument test_derivatives.py compares them with finite differences."""
    outcome, stateful, arguments = both(row, form)
    function, gradient = gradient_of(stateful, arguments)
    expected = reverse(OfVector(outcome, arguments))
    assert max(errors(gradient, expected, function.places).values()) < row.tolerance
    assert is_right(function, gradient)


@pytest.mark.sampled
@pytest.mark.parametrize("row", IN_GROUPS, ids=lambda row: row.name)
def test_derivatives_are_finite_and_right_where_units_are_dead(row):
    outcome, stateful, arguments = both(row, loss=RELU, shifts=tuple(DEAD))
    function, gradient = gradient_of(stateful, arguments)
    expected = reverse(OfVector(outcome, arguments))
    assert gradient.isfinite().all()
    assert max(errors(gradient, expected, function.places).values()) < row.tolerance


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw", "chain", "partition", "lbfgs"])
def test_second_derivatives(name):
    outcome, stateful, arguments = both(named(name))
    function = OfVector(stateful, arguments)
    expected = second(OfVector(outcome, arguments))
    assert max(errors(second(function), expected, function.places).values()) < 1e-10


@pytest.mark.sampled
@rows
def test_derivatives_with_numbers_for_hyperparameters(row):
    """States that have no derivative themselves are kept where autograd remembers them."""
    outcome, stateful, arguments = both(row, as_transformation)
    function, gradient = gradient_of(stateful, {**arguments, "hyperparameters": {}})
    expected = reverse(OfVector(outcome, {**arguments, "hyperparameters": {}}))
    assert max(errors(gradient, expected, function.places).values()) < row.tolerance


def test_a_derivative_that_is_cut_is_noticed():
    """A negative control: gradients without a graph; and steps that are not recorded are refused."""
    _, stateful, arguments = both(named("sgd_nesterov"))
    function, gradient = gradient_of(replace(stateful, give_gradients=without_a_graph), arguments)
    assert wrong(function, gradient) == list(function.places)
    assert not is_right(function, gradient)
    optimizer_of = lambda named, numbers: fo.Optimizer(named, fo.sgd, **numbers)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        gradient_of(replace(stateful, make=optimizer_of), arguments)


# Torch's pattern. -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_by_backward():
    _, stateful, arguments = both(named("chain"))
    function, gradient = gradient_of(stateful, arguments)
    _, actual = gradient_of(replace(stateful, give_gradients=by_backward), arguments)
    assert max(errors(actual, gradient, function.places).values()) < 1e-12


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "chain"])
def test_losses_of_the_parameters_themselves(name):
    """An error of autograd, unless it keeps what is written to."""
    _, stateful, arguments = both(named(name))
    function, gradient = gradient_of(stateful, arguments)
    direct = replace(stateful, give_gradients=directly)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_of(direct, arguments)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        _, actual = gradient_of(direct, arguments)
    assert max(errors(actual, gradient, function.places).values()) < 1e-12


def test_groups_of_their_own_hyperparameters():
    def make(named, numbers):
        groups = [
            {"params": named[:2], "lr": numbers["lr"], "betas": (numbers["beta"], 0.99)},
            {"params": named[2:], "lr": numbers["other lr"], "weight_decay": numbers["weight_decay"], "maximize": True},
        ]
        return fo.Optimizer(groups, fo.adamw, eps=1e-3, differentiable=True)

    _, stateful, arguments = both(named("adamw"))
    values = {"lr": 0.1, "beta": 0.8, "other lr": 0.05, "weight_decay": 0.2}
    numbers = {name: torch.tensor(value, **F64) for name, value in values.items()}
    function, gradient = gradient_of(replace(stateful, make=make), {**arguments, "hyperparameters": numbers})
    assert wrong(function, gradient) == []
    assert all(gradient[place].any() for place in function.places.values())


@pytest.mark.sampled(size=2)
@pytest.mark.parametrize("name", ["sgd_momentum", "adam_amsgrad", "nadam", "chain", "tree_transformation"])
def test_gradients_that_are_missing(name):
    """A parameter whose gradients begin late, one without any, and a step without any."""
    _, stateful, arguments = both(named(name))
    everything = fo.tree.paths(arguments["params"])
    missing = {0: ("hidden.bias", "output.bias"), 1: ("output.bias",), 2: tuple(everything), 3: ("output.bias",)}
    function, gradient = gradient_of(replace(stateful, missing=missing), arguments)
    assert wrong(function, gradient) == []
    assert all(gradient[place].any() for path, place in function.places.items() if path.startswith("params"))


def test_parameters_that_are_views_of_one_tensor():
    """What is written to them is written to it, with its derivatives."""
    lr, start = torch.tensor(0.1, requires_grad=True), torch.linspace(0.5, 1.0, 3, requires_grad=True)
    flat = start.clone()
    pieces = flat[:1], flat[1:]
    optimizer = fo.Optimizer(pieces, fo.adam, lr=lr, eps=1e-3, differentiable=True)
    for _ in range(2):
        loss = (torch.cat(pieces) * DATA).sin().sum()
        for p, gradient in zip(pieces, torch.autograd.grad(loss, pieces, create_graph=True), strict=True):
            p.grad = gradient
        optimizer.step()
    [actual], [expected] = [torch.autograd.grad(q.cos().sum(), lr) for q in (flat, trained(lr)[0])]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_a_leaf_that_requires_grad_is_refused():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = fo.Optimizer([("weight", p)], fo.adam, differentiable=True)
    with pytest.raises(RuntimeError, match=r"'weight' is a leaf that requires grad: .* that autograd knows: p.clone()"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert not optimizer.state


def test_torch_warns_of_a_gradient_that_was_forgotten():
    """And nobody where it was not: all other tests turn warnings into errors."""
    p = torch.ones(2, requires_grad=True).clone()
    with pytest.warns(UserWarning, match="The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"):
        fo.Optimizer([p], fo.adam, differentiable=True).step()


# Copies, and the end of a graph. --------------------------------------------------------------------------------------


def step(p, optimizer, data):
    """Take a step that works with and without a graph before it."""
    weights = p.clone().requires_grad_()
    [p.grad] = torch.autograd.grad((weights * data).sin().sum(), weights, create_graph=True)
    optimizer.step()


def trained(lr, steps=2):
    p = torch.linspace(0.5, 1.0, 3, requires_grad=True).clone()
    optimizer = fo.Optimizer([p], fo.adam, lr=lr, eps=1e-3, differentiable=True)
    for _ in range(steps):
        step(p, optimizer, DATA)
    return p, optimizer


def cut(optimizer):
    """Forget how parameters and states were computed, as docs/meta-learning.md shows."""
    optimizer.state.update({p: fo.stop_gradient(state) for p, state in optimizer.state.items()})
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.detach_()
    optimizer.zero_grad()


DATA = torch.tensor([1.0, 2.0, 3.0], **F64)


def test_copies_have_the_values():
    """By pickle and state dict, not by deepcopy, which torch refuses; and no graph comes out of a file."""
    p, optimizer = trained(torch.tensor(0.1, requires_grad=True))
    with pytest.raises(RuntimeError, match="graph leaves.* support the deepcopy protocol"):
        copy.deepcopy(optimizer)
    twin = through_pickle(optimizer)
    [q] = twin.param_groups[0]["params"]
    with pytest.raises(RuntimeError, match="is a leaf that requires grad"):
        step(q, twin, DATA)
    loaded, fresh = trained(0.1, steps=0)
    loaded.detach_().copy_(p.detach())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    cut(optimizer)
    copied = copy.deepcopy(optimizer)
    for some, others in ((fresh, loaded), (copied, copied.param_groups[0]["params"][0])):
        step(others, some, DATA)
        assert some.param_groups[0]["lr"] == 0.1
    step(p, optimizer, DATA)
    torch.testing.assert_close(loaded, p, rtol=1e-14, atol=0)
    torch.testing.assert_close(copied.param_groups[0]["params"][0], p, rtol=0, atol=0)


def test_a_state_that_is_loaded_keeps_its_graph_and_tensors_in_groups_are_copied():
    lr = torch.tensor(0.1, requires_grad=True)
    p, optimizer = trained(lr)
    _, other = trained(0.2, steps=0)
    other.param_groups[0]["params"][0] = p
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == lr
    assert other.param_groups[0]["lr"] is not lr  # as in torch.optim
    other.param_groups[0]["lr"] = lr
    for _ in range(2):
        step(p, other, DATA)
    [actual], [expected] = [torch.autograd.grad(q.sum(), lr) for q in (p, trained(lr, steps=4)[0])]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_derivatives_after_a_cut_are_those_of_what_comes_after():
    lr = torch.tensor(0.1, requires_grad=True)

    def after(lr, before):
        p, optimizer = trained(before)
        cut(optimizer)
        assert not any(tensor.requires_grad for tensor in (p, *optimizer.state[p].values()))
        optimizer.param_groups[0]["lr"] = lr
        for _ in range(2):
            step(p, optimizer, DATA)
        return p.sum()

    [actual] = torch.autograd.grad(after(lr, lr), lr)
    [expected] = differences(lambda z: after(z[0], 0.1).detach(), lr.detach().reshape(1), batched=False)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    [whole] = torch.autograd.grad(trained(lr, steps=4)[0].sum(), lr)
    assert abs(whole - expected) > 0.1 * abs(expected)


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("is_cut", [True, False])
def test_memory_stays_flat_where_the_graph_is_cut(is_cut):
    """100 outer steps of two inner ones, by the number of tensors that are alive; without the cut they pile up."""
    log_lr = torch.tensor(-3.0, requires_grad=True)
    outer = torch.optim.SGD([log_lr], lr=0.001)
    counts = {}
    with Alive() as alive:
        p, optimizer = trained(0.1, steps=1)
        for i in range(100 if is_cut else 30):
            optimizer.param_groups[0]["lr"] = log_lr.exp()
            for _ in range(2):
                step(p, optimizer, DATA)
            outer.zero_grad()
            p.cos().sum().backward(inputs=[log_lr], retain_graph=not is_cut)
            outer.step()
            if is_cut:
                cut(optimizer)
            counts[i] = (len(alive), alive.bytes)
    assert log_lr.grad.isfinite()
    assert log_lr.grad != 0
    assert (counts[10] == counts[max(counts)]) == is_cut
