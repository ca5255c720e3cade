"""Hyperparameters wherever numbers are wanted, and things that print and pickle as the call that made them."""

import copy
import math
import operator
import pickle

import pytest
import torch

import functorch_optim as fo
from functorch_optim import schedules
from functorch_optim._core.hyperparameters import at, check, check_betas, is_zero

pytestmark = pytest.mark.smoke


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def halving(count):
    return 0.5**count


STEP = double(3.0)


# at. ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0.1, 0, 3, -2.5, math.inf])
def test_a_number_stays_a_number(number):
    for value in (at(number, STEP), at(lambda count: number, STEP)):
        assert value == number
        assert type(value) is float


@pytest.mark.parametrize(
    "tensor",
    [
        double(0.1),
        torch.tensor(0.1),
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.tensor(3),
        torch.tensor([0.1]),
        torch.tensor([[3]]),
    ],
    ids=repr,
)
def test_a_tensor_of_one_element_becomes_0_dim_float64(tensor):
    for value in (at(tensor, STEP), at(lambda count: tensor, STEP)):
        assert (value.shape, value.dtype) == ((), torch.float64)
        assert value == tensor.item()


@pytest.mark.parametrize("schedule", [halving, schedules.exponential(1.0, 0.5), schedules.Schedule(halving)])
def test_a_schedule_is_called_with_the_number_of_updates_done(schedule):
    value = at(schedule, STEP)
    assert (value.shape, value.dtype) == ((), torch.float64)
    assert value == 0.25  # at the third update, two are done
    assert at(schedule, double(1.0)) == 1.0


def test_gradients_flow():
    for function in (
        lambda x: at(x, STEP),
        lambda x: at(x.float(), STEP),
        lambda x: at(x.reshape(1), STEP),
        lambda x: at(lambda count: x / 2 * count, STEP),
        lambda x: at(x * schedules.constant(1.0), STEP),
    ):
        assert torch.func.grad(function)(double(0.5)) == 1.0
        assert torch.vmap(function)(double([0.5, 1.0])).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("tensor", [torch.ones(2), torch.ones(2, 1), torch.ones(0)], ids=repr)
def test_a_tensor_of_several_elements_is_for_one_parameter_alone(tensor):
    params = {"w": torch.ones(2), "b": torch.ones(2)}
    message = r"A hyperparameter is one number, got a tensor of shape \(.*\)\..*torch.vmap"
    for hyperparameter in (tensor, lambda count: tensor):
        tx = fo.scale(hyperparameter)
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params))
        alone = torch.ones(2, *tensor.shape)
        assert torch.equal(tx.update(alone, tx.init(alone))[0], alone)
    with pytest.raises(ValueError, match=r"Invalid learning rate: a tensor of shape \(.*\); it needs one number"):
        fo.lbfgs(tensor)


def test_at_compiles():
    compiled = torch.compile(lambda x, step: (at(x, step), at(halving, step)), backend="eager", fullgraph=True)
    assert compiled(torch.tensor([0.5]), STEP) == (0.5, 0.25)


# is_zero. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hyperparameter", "switched_off"),
    [
        (0, True),
        (0.0, True),
        (-0.0, True),
        (1e-300, False),
        (math.nan, False),
        (torch.tensor(0.0), False),  # never inspected: it may be learned
        (schedules.constant(0.0), False),
        (lambda count: 0.0, False),
    ],
)
def test_is_zero(hyperparameter, switched_off):
    assert is_zero(hyperparameter) is switched_off


# check. ---------------------------------------------------------------------------------------------------------------


ALLOWED = {
    "value >= 0": ([0, 0.0, 1, 0.5, 1e300, math.inf], [-1, -1e-300, -math.inf, math.nan]),
    "value > 0": ([1, 1e-300, math.inf], [0, 0.0, -0.0, -1, math.nan]),
    "0 <= value < 1": ([0, 0.0, 0.5, math.nextafter(1, 0)], [1, 1.0, -1e-300, math.inf, math.nan]),
    "0 <= value <= 1": ([0, 0.5, 1, 1.0], [math.nextafter(1, 2), -1e-300, math.nan]),
    "a number": ([0, -1.5, math.inf, -math.inf], [math.nan]),
}


@pytest.mark.parametrize(
    ("allowed", "value"), [(allowed, value) for allowed, (good, _) in ALLOWED.items() for value in good]
)
def test_numbers_that_are_allowed(allowed, value):
    check("momentum", value, allowed)


@pytest.mark.parametrize(
    ("allowed", "value"), [(allowed, value) for allowed, (_, bad) in ALLOWED.items() for value in bad]
)
def test_numbers_that_are_not(allowed, value):
    with pytest.raises(ValueError, match=f"^Invalid momentum: {value}; it needs {allowed}$"):
        check("momentum", value, allowed)


def test_check_wants_numbers_that_are_not_negative_by_default():
    check("learning rate", 0.0)
    with pytest.raises(ValueError, match="^Invalid learning rate: -0.1; it needs value >= 0$"):
        check("learning rate", -0.1)


@pytest.mark.parametrize("allowed", ALLOWED)
@pytest.mark.parametrize(
    "value",
    [torch.tensor(math.nan), torch.tensor(-1.0), torch.tensor(2), torch.ones(3), torch.empty((), device="meta")],
    ids=repr,
)
def test_tensors_are_never_inspected(allowed, value):
    check("momentum", value, allowed)  # a meta tensor has no value to look at
    check("momentum", lambda count: value, allowed)


@pytest.mark.parametrize("value", ["0.1", None, True, False, 1j], ids=repr)
def test_things_that_are_no_hyperparameters(value):
    with pytest.raises(
        TypeError, match=f"^Invalid momentum: .* is a {type(value).__name__}; give a number, a 0-dim tensor"
    ):
        check("momentum", value)


@pytest.mark.parametrize("betas", [(0.9, 0.999), [0, 0.5], (torch.tensor(2.0), schedules.constant(0.9)), (halving, 0)])
def test_betas(betas):
    check_betas(betas)


@pytest.mark.parametrize("betas", [0.9, None, (0.9,), (0.9, 0.9, 0.9), "ab", {0.9, 0.8}, torch.ones(2)], ids=repr)
def test_betas_must_be_a_pair(betas):
    with pytest.raises(ValueError, match=r"^Invalid betas: .*; give 2 numbers, as in betas=\(0.9, 0.999\)"):
        check_betas(betas)


@pytest.mark.parametrize(("betas", "index"), [((1.0, 0.9), 0), ((0.9, 1.0), 1), ((-0.1, 1.0), 0), ((0.9, math.nan), 1)])
def test_betas_must_be_less_than_one(betas, index):
    with pytest.raises(
        ValueError, match=f"^Invalid beta parameter at index {index}: {betas[index]}; it needs 0 <= value < 1"
    ):
        check_betas(betas)


def test_betas_must_be_numbers():
    with pytest.raises(TypeError, match="^Invalid beta parameter at index 1: '0.9' is a str"):
        check_betas((0.9, "0.9"))


# Printing and pickling. -----------------------------------------------------------------------------------------------


def sign(updates, params):
    return fo.tree.map(torch.sign, updates)


def not_vectors(params):
    return fo.tree.map(lambda p: p.ndim != 1, params)


@fo.factory
def clipped(lr, max_norm=1.0, *, inner=fo.sgd):
    """Make a factory as users do."""
    return fo.chain(fo.clip_by_global_norm(max_norm), inner(lr))


MADE = {
    "sgd(0.1)": fo.sgd(0.1),
    "sgd(lr=0.1, momentum=0.9)": fo.sgd(lr=0.1, momentum=0.9),
    "adam(linear(0.1, 0.0, 100), betas=(0.9, 0.99))": fo.adam(schedules.linear(0.1, 0.0, 100), betas=(0.9, 0.99)),
    "scale(tensor(0.5000))": fo.scale(torch.tensor(0.5)),
    "scale_by_schedule(halving)": fo.scale_by_schedule(halving),
    "stateless(sign)": fo.stateless(sign),
    "chain()": fo.chain(),
    "chain(clip(1.0), chain(trace(0.9), sgd(0.1)))": fo.chain(fo.clip(1.0), fo.chain(fo.trace(0.9), fo.sgd(0.1))),
    "named_chain(clip=clip(1.0), sgd=sgd(0.1))": fo.named_chain(clip=fo.clip(1.0), sgd=fo.sgd(0.1)),
    "named_chain(('a', identity()))": fo.named_chain(("a", fo.identity())),
    "masked(trace(0.9), not_vectors)": fo.masked(fo.trace(0.9), not_vectors),
    "masked(trace(0.9), {'w': True, 'b': False})": fo.masked(fo.trace(0.9), {"w": True, "b": False}),
    "partition({'x': sgd(0.1), 'y': adam()}, {'w': 'x', 'b': 'y'})": fo.partition(
        {"x": fo.sgd(0.1), "y": fo.adam()}, {"w": "x", "b": "y"}
    ),
    "clipped(0.1)": clipped(0.1),
    "clipped(lr=halving, max_norm=2.0, inner=adam)": clipped(lr=halving, max_norm=2.0, inner=fo.adam),
    "chain(clipped(0.1), scale(mul(2, constant(0.5))))": fo.chain(clipped(0.1), fo.scale(2 * schedules.constant(0.5))),
}
of_each = pytest.mark.parametrize(("text", "tx"), MADE.items(), ids=MADE)


def trained(tx):
    """Return the parameters and the state after some steps."""
    params = {"w": torch.tensor([[1.0, -2.0]]), "b": torch.tensor([3.0])}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        params = fo.apply_updates(params, updates)
    return params, state


@of_each
def test_prints_as_the_call_that_made_it(text, tx):
    assert repr(tx) == text
    names = {**vars(operator), **vars(schedules), **vars(fo), **globals(), "tensor": torch.tensor}
    assert repr(eval(text, names)) == text


@of_each
@pytest.mark.parametrize(
    "copied", [lambda tx: pickle.loads(pickle.dumps(tx)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_copies_do_the_same(text, tx, copied):
    copy_of_tx = copied(tx)
    assert repr(copy_of_tx) == text
    torch.testing.assert_close(trained(copy_of_tx), trained(tx), rtol=0, atol=0)


def test_a_factory_keeps_its_name_and_docstring():
    assert clipped.__name__ == "clipped"
    assert clipped.__doc__ == "Make a factory as users do."
    assert isinstance(clipped(0.1), fo.GradientTransformation)


def test_functions_and_classes_print_by_name():
    tx = fo.GradientTransformation(lambda params: (), lambda updates, state, params: (updates, state))
    assert repr(tx).startswith("GradientTransformation(<lambda>, <lambda>)")
    assert repr(fo.factory(lambda kind: fo.identity())(torch.Tensor)) == "<lambda>(Tensor)"
