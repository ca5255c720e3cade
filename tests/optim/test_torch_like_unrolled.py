"""Training with the classes of torch.optim and differentiable=True, and what torch.optim's own make of it."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from derivatives import RELU, SMOOTH, STEPS, UNITS, OfVector, Training, error, errors, make_data, make_network
from stateful_training import Stateful, directly, gradient_of, is_right, reverse, second, without_a_graph, wrong
from torch_like_cases import MODULES, OPTIONS, RICHER, cases, factory_of

import functorch_optim as fo

pytestmark = [pytest.mark.usefixtures("double")]
each = pytest.mark.parametrize("name", OPTIONS)
LIVELY = {"eps": 1e-3, "betas": (0.8, 0.9), "alpha": 0.9, "lambd": 0.1, "d": 1.1}
"""In place of defaults that matter in the last digits only, or are where torch's constructors draw a line."""
ADDED = ("Adafactor", "Muon", "SparseAdam")  # torch.optim has them without `differentiable`


def matrices(params):
    return fo.tree.map(lambda p: p.ndim == 2, params)


def hyperparameters(name, options):
    """Return the hyperparameters of a class, and by path those that may be tensors: numbers, but not 0 or integers."""
    known = {}
    for key, parameter in inspect.signature(getattr(torch.optim, name)).parameters.items():
        if key not in ("params", "foreach", "capturable", "differentiable", "fused"):
            lively = LIVELY.get(key, parameter.default)
            default = lively if type(lively) is type(parameter.default) else parameter.default
            known[key] = options.get(key, default)
    known["lr"] = 0.1
    fixed = ("initial_accumulator_value",)  # torch.optim's constructor fills the state with it
    paths = zip(fo.tree.paths(known), fo.tree.flatten(known)[0], strict=True)
    return known, {path: torch.tensor(v) for path, v in paths if isinstance(v, float) and v and path not in fixed}


def filled(known, numbers):
    """Return hyperparameters with some of them replaced, by path."""
    leaves, structure = fo.tree.flatten(known)
    paths = fo.tree.paths(known)
    return fo.tree.unflatten(structure, [numbers.get(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


def both(name, options, module=fo.optim, tensors=None, dead=False):
    """Return training with a function and with a class, and their arguments.

    Args:
        name: of the class.
        options: its hyperparameters, where they are not the defaults.
        module: ours or torch's.
        tensors: which hyperparameters are arguments; None: all that may be tensors. The others are numbers.
        dead: whether a hidden unit never fires, and another stops.
    """
    known, numbers = hyperparameters(name, options)
    shifts = torch.zeros(7 if name == "RAdam" else STEPS, UNITS)  # RAdam begins as SGD does
    if dead:
        shifts[:, 0] = shifts[2:, 1] = -100.0
    training = {"loss": RELU if dead else SMOOTH, "shifts": tuple(shifts)}

    def make(**numbers):
        tx = factory_of(name)(**filled(known, numbers))
        return fo.partition({True: tx, False: fo.set_to_zero()}, matrices) if name == "Muon" else tx

    def make_optimizer(named, numbers):
        trained = [p for _, p in named if p.ndim == 2 or name != "Muon"]
        return getattr(module, name)(trained, differentiable=True, **filled(known, numbers))

    functional, stateful = Training(make, **training), Stateful(make_optimizer, **training)
    numbers = {path: number for path, number in numbers.items() if tensors is None or path in tensors}
    arguments = {"params": make_network(), "data": make_data(), "hyperparameters": numbers}

    def outcome(arguments):
        return functional.loss(functional.trained(arguments)[0], arguments["data"])

    return outcome, stateful, arguments


def deviation(function, gradient, outcome, arguments):
    """Return how far a gradient is from that of the functional form, relative to the derivative by each argument."""
    return max(errors(gradient, reverse(OfVector(outcome, arguments)), function.places).values())


# Ours. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=12)
@cases
def test_derivatives_are_those_of_the_functional_form_and_of_finite_differences(name, options):
    outcome, stateful, arguments = both(name, options)
    function, gradient = gradient_of(stateful, arguments)
    assert deviation(function, gradient, outcome, arguments) < 1e-12
    if name != "Muon":  # it rounds to bfloat16
        assert is_right(function, gradient)


@pytest.mark.sampled(size=24)
@cases
def test_derivatives_are_finite_and_right_where_units_are_dead(name, options):
    outcome, stateful, arguments = both(name, options, dead=True)
    function, gradient = gradient_of(stateful, arguments)
    assert gradient.isfinite().all()
    assert deviation(function, gradient, outcome, arguments) < 1e-12


@each
def test_second_derivatives(name):
    outcome, stateful, arguments = both(name, RICHER.get(name, {}))
    function = OfVector(stateful, arguments)
    expected = second(OfVector(outcome, arguments))
    assert max(errors(second(function), expected, function.places).values()) < 1e-10


@pytest.mark.sampled(size=4)
@each
def test_groups_and_gradients_that_are_missing(name):
    """A group of its own learning rate, a parameter whose gradients begin late, a step without any."""
    known, _ = hyperparameters(name, RICHER.get(name, {}))

    def make(named, numbers):
        [*some, other] = [p for _, p in named if p.ndim == 2 or name != "Muon"]
        groups = [{"params": [other], "lr": numbers["other lr"]}, *([{"params": some}] if some else [])]
        return getattr(fo.optim, name)(groups, **{**known, "lr": numbers["lr"]}, differentiable=True)

    _, stateful, arguments = both(name, {})
    missing = {0: ("hidden.weight", "output.bias"), 2: tuple(fo.tree.paths(arguments["params"]))}
    arguments["hyperparameters"] = {"lr": torch.tensor(0.1), "other lr": torch.tensor(0.05)}
    function, gradient = gradient_of(replace(stateful, make=make, missing=missing), arguments)
    assert gradient[function.places["hyperparameters.other lr"]] != 0
    if name != "Muon":
        assert wrong(function, gradient) == []


@each
def test_losses_of_the_parameters_themselves(name):
    """Where autograd keeps what is written to; an error of its own otherwise."""
    _, stateful, arguments = both(name, RICHER.get(name, {}))
    function, gradient = gradient_of(stateful, arguments)
    stateful = replace(stateful, give_gradients=directly)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_of(stateful, arguments)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        _, actual = gradient_of(stateful, arguments)
    assert max(errors(actual, gradient, function.places).values()) < 1e-12


@each
def test_a_derivative_that_is_cut_is_noticed(name):
    outcome, stateful, arguments = both(name, RICHER.get(name, {}))
    function, gradient = gradient_of(replace(stateful, give_gradients=without_a_graph), arguments)
    assert not is_right(function, gradient) or name == "Rprop"  # looks at signs alone
    assert deviation(function, gradient, outcome, arguments) > 0.01 or name == "Rprop"


@pytest.mark.parametrize(
    ("name", "options"), [("SparseAdam", {"eps": 1e-3}), ("Adagrad", {"eps": 1e-3}), ("SGD", {"momentum": 0.9})]
)
def test_sparse_gradients(name, options):
    """With a graph of their values; some entries come twice."""

    def trained(start, lr):
        p = start.clone()
        optimizer = getattr(fo.optim, name)([p], lr=lr, **options, differentiable=True)
        for i in range(4):
            entries = torch.tensor([[0, 2, 2]]) + i % 2
            p.grad = torch.sparse_coo_tensor(entries, p[entries[0]].sin(), p.shape)
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(trained, (torch.randn(4, 2, requires_grad=True), LR.clone().requires_grad_()))


LR = torch.tensor(0.1, dtype=torch.float64)


@pytest.mark.sampled(size=8)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ADDED])
def test_complex_parameters(name):
    def trained(start, lr):
        p = start.clone()
        optimizer = getattr(fo.optim, name)([p], **{**RICHER.get(name, {}), "lr": lr}, differentiable=True)
        for _ in range(2):
            loss = (p.clone() ** 3).abs().sum()
            [p.grad] = torch.autograd.grad(loss, p, create_graph=True)
            optimizer.step()
        return p

    start = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(trained, (start, LR.clone().requires_grad_()))


# Those that torch.optim has without it. -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADDED)
def test_the_argument_is_added(name):
    """By keyword, after torch's own; as an attribute of groups it is saved, copied, and loaded by both."""
    p = torch.ones(2, 2)
    parameters = inspect.signature(getattr(fo.optim, name)).parameters
    assert list(parameters) == [*inspect.signature(getattr(torch.optim, name)).parameters, "differentiable"]
    ours, theirs = [getattr(module, name)([p]) for module in MODULES]
    assert ours.defaults == theirs.defaults
    optimizer = getattr(fo.optim, name)([{"params": [2 * p.requires_grad_()]}], 0.1, differentiable=True)
    assert optimizer.param_groups[0]["differentiable"] is optimizer.defaults["differentiable"] is True
    optimizer.add_param_group({"params": [3 * p]})
    assert optimizer.param_groups[1]["differentiable"] is True
    optimizer.param_groups[0]["params"][0] = optimizer.param_groups[1]["params"][0] = p
    assert copy.deepcopy(optimizer).defaults["differentiable"] is True
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        getattr(fo.optim, name)([2 * p], differentiable=False)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(getattr(fo.optim, name)([p.detach()], differentiable=True).state_dict())


def test_lbfgs_says_how_to_do_it():
    with pytest.raises(TypeError, match=r"LBFGS takes no differentiable: .* Use Optimizer\(params, lbfgs, d"):
        fo.optim.LBFGS([torch.ones(2)], differentiable=True)


# torch.optim's. -------------------------------------------------------------------------------------------------------

# Derivatives by parameters and data; by the learning rate, a tensor; and by parameters where a unit is dead. Where
# torch mends one of them, the table is to be mended too.
RIGHT = "right right right"
OF_TORCH = {
    "SGD": [RIGHT, "wrong raises wrong", "wrong raises wrong", "wrong right wrong"],
    "Adam": ["right right nan", RIGHT, "raises raises raises", "right right nan"],
    "AdamW": ["right right nan", "raises raises raises"],
    "NAdam": ["right raises nan", "right raises right", "right raises nan"],
    "RAdam": ["right right nan", RIGHT, "right right nan"],
    "Adamax": ["raises raises raises", "raises raises raises"],
    "Adagrad": ["right raises nan", "right raises right", "right raises right"],
    "Adadelta": ["right raises right", "right raises right"],
    "RMSprop": ["right raises nan", "right raises right", "raises raises raises"],
    "Rprop": ["raises raises raises", "raises raises raises"],
    "ASGD": ["right zero right", "right zero right"],
}


def judged(name, options, module, tensors=(), dead=False):
    """Say what comes of derivatives by the learning rate, when it is a tensor, and else by parameters and data."""
    outcome, stateful, arguments = both(name, options, module, tensors, dead)
    function = OfVector(stateful, arguments)
    by = function.of("hyperparameters") if tensors else function.of("params", "data")
    try:
        gradient = reverse(function)[by]
    except (RuntimeError, TypeError):
        return "raises"
    if not gradient.isfinite().all():
        return "nan"
    expected = reverse(OfVector(outcome, arguments))[by]
    return "right" if error(gradient, expected) < 1e-9 else "wrong" if gradient.any() else "zero"


def judgement(name, options, module):
    kinds = {}, {"tensors": ("lr",)}, {"dead": True}
    return " ".join([judged(name, options, module, **kind) for kind in kinds])


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ADDED])
def test_torch_is_wrong_where_it_was_and_we_are_not(name):
    for options, expected in zip(OPTIONS[name], OF_TORCH[name], strict=True):
        found = [judgement(name, options, module) for module in MODULES]
        assert found == [RIGHT, expected], options
