"""Training composes with torch's transforms: derivatives of batches of tasks, of parameters and of hyperparameters."""

import shutil

import pytest
import torch
import torch._dynamo.testing
from catalogue import CATALOGUE, assert_close, hyperparameters, make_problem, rows, step
from derivatives import SMOOTH, OfVector, begun, make_data, make_network, training_of_tasks

import functorch_optim as fo
from functorch_optim.testing._properties.transforms import check_compiles_once, compiled

TASKS = 3


def training_of(row):
    """Return two steps of a row as a function of parameters, data and hyperparameters, and these."""
    training, arguments = begun(row, shifts=(0.0,) * 2)

    def train(params, data, numbers):
        return training({"params": params, "data": data, "hyperparameters": numbers})

    return train, arguments["params"], arguments["data"], arguments["hyperparameters"]


def stacked(trees):
    return fo.tree.map(lambda *leaves: torch.stack(leaves), *trees)


def picked(batch, i):
    return fo.tree.map(lambda leaf: leaf[i], batch)


def assert_equals(row, left, right):
    tolerance = 1e3 * row.tolerance  # derivatives are larger than what they are of
    assert_close(left, right, rtol=tolerance, atol=tolerance)


@pytest.mark.sampled(size=8)
@rows
def test_gradient_of_a_batch_of_tasks_with_shared_parameters_equals_a_loop(row):
    train, params, _, numbers = training_of(row)
    tasks = stacked([make_data() for _ in range(TASKS)])
    everything, each = (params, tasks, numbers), (None, 0, None)

    def total(*arguments):
        return torch.vmap(train, each)(*arguments).sum()

    def looped(params, tasks, numbers):
        return sum(train(params, picked(tasks, i), numbers) for i in range(TASKS))

    batched = torch.func.grad(total, (0, 1, 2))(*everything)
    assert_equals(row, batched, torch.func.grad(looped, (0, 1, 2))(*everything))
    # The other way round, a gradient for each task; and forward mode, outside and inside.
    by_task = torch.vmap(torch.func.grad(train, (0, 2)), each)(*everything)
    assert_equals(row, fo.tree.map(lambda leaf: leaf.sum(0), by_task), (batched[0], batched[2]))
    direction = fo.tree.map(torch.randn_like, everything)
    pairs = zip(fo.tree.flatten(batched)[0], fo.tree.flatten(direction)[0], strict=True)
    slope = sum((g * d).sum() for g, d in pairs)
    assert_equals(row, torch.func.jvp(total, everything, direction)[1], slope)
    by_task = torch.vmap(lambda *both: torch.func.jvp(train, both[:3], both[3:])[1], each + each)
    assert_equals(row, by_task(*everything, *direction).sum(), slope)


@pytest.mark.sampled
@rows
def test_gradients_of_a_batch_of_parameters_equal_a_loop(row):
    train, _, data, numbers = training_of(row)
    batch = stacked([make_network() for _ in range(TASKS)])
    loop = stacked([torch.func.grad(train)(picked(batch, i), data, numbers) for i in range(TASKS)])
    assert_equals(row, torch.vmap(torch.func.grad(train), (0, None, None))(batch, data, numbers), loop)
    total = torch.func.grad(lambda batch: torch.vmap(train, (0, None, None))(batch, data, numbers).sum())
    assert_equals(row, total(batch), loop)


@pytest.mark.sampled(size=8)
@hyperparameters
def test_derivatives_by_a_vector_of_hyperparameters_equal_a_loop(row, name):
    train, params, data, numbers = training_of(row)
    values = numbers[name] * torch.tensor([0.9, 1.01], dtype=torch.float64)

    def by_value(value):
        return train(params, data, {**numbers, name: value})

    one = torch.ones((), dtype=torch.float64)
    derivatives = [torch.func.jvp(torch.func.grad(by_value), (value,), (one,)) for value in values]
    loop, second = [torch.stack(several) for several in zip(*derivatives, strict=True)]
    assert_equals(row, torch.func.grad(lambda values: torch.vmap(by_value)(values).sum())(values), loop)
    assert_equals(row, torch.vmap(torch.func.grad(by_value))(values), loop)
    assert_equals(row, torch.func.jacfwd(torch.vmap(by_value))(values), loop.diag())
    assert_equals(row, torch.vmap(torch.func.hessian(by_value))(values), second)


@pytest.mark.sampled(size=48)
@rows
def test_autograd_goes_through_as_torch_func_does(row):
    """Leaves that require grad, as in a loop with `torch.autograd.grad(create_graph=True)`."""
    training, arguments = begun(row, shifts=(0.0,) * 2)
    function = OfVector(training, arguments)
    expected = torch.func.grad(function)(function.z)
    z = function.z.clone().requires_grad_()
    arguments = function.arguments(z)
    params, tx = arguments["params"], training.make(**arguments["hyperparameters"])
    state, structure = tx.init(params), fo.tree.flatten(params)[1]
    for _ in range(2):
        leaves = fo.tree.flatten(params)[0]
        grads = torch.autograd.grad(SMOOTH(params, arguments["data"]), leaves, create_graph=True)
        updates, state = step(
            tx, fo.tree.unflatten(structure, list(grads)), state, params, arguments["data"], objective=SMOOTH
        )
        params = fo.apply_updates(params, updates)
    training.outcome(params, state, arguments["data"]).backward()
    assert_equals(row, z.grad, expected)


# Compilation. ---------------------------------------------------------------------------------------------------------


def assert_compiles_once(row, compiled_gradient):
    """Compare a compiled gradient by parameters and hyperparameters, for three sets of them, without recompilation.

    The first state is that of `init`, whose links share a counter; the others are from `update`.
    """
    train, total, params, numbers, state = training_of_tasks(row)

    def arguments(params, numbers, state):
        for _ in range(3):
            xs = torch.randn(TASKS, 4, 2, dtype=torch.float64)
            yield params, numbers, state, xs
            params, state = train(params, numbers, state, xs[0])
            numbers = fo.tree.map(lambda number: 0.99 * number, numbers)

    check_compiles_once(
        torch.func.grad(total, (0, 1)),
        arguments(params, numbers, state),
        tolerance=1e-11,
        compile=lambda _: compiled_gradient(total),
    )


# Rows that are a part of others are compiled with them; some differ in the order of links or in numbers only.
PARTS = ("trace", "scale_by_a", "scale_by_r", "scale_by_nadam", "scale_by_learning_rate")
WHOLE = [
    row for row in CATALOGUE if not (row.name.startswith(PARTS) or row.name.endswith(("_decoupled", "_large_eps")))
]
# Those whose derivatives are compiled too: one of each kind, for it takes seconds.
KINDS = {"chain", "partition", "tree_transformation", "clip_by_global_norm_skip", "sgd_nesterov", "adamw_mask", "asgd"}
KINDS |= {"adafactor", "muon", "lbfgs", "reduce_on_plateau"}


@pytest.mark.sampled(size=3)
@pytest.mark.parametrize("row", [row for row in WHOLE if row.name not in KINDS], ids=lambda row: row.name)
def test_steps_compile_whole_and_once(row):
    compiled(row.subject, make_problem(missing=False))


@pytest.mark.sampled(size=2)
@pytest.mark.parametrize("row", [row for row in WHOLE if row.name in KINDS], ids=lambda row: row.name)
def test_compiles_whole_and_once(row):
    counter = torch._dynamo.testing.CompileCounter()
    assert_compiles_once(
        row, lambda total: torch.compile(torch.func.grad(total, (0, 1)), backend=counter, fullgraph=True)
    )
    assert counter.frame_count == 1


def by_autograd(function):
    """Return the same gradient of a function, from a backward pass through it."""

    def gradient(params, numbers, state, xs):
        leaves, structure = fo.tree.flatten((params, numbers))
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        loss = function(*fo.tree.unflatten(structure, leaves), state, xs)
        return fo.tree.unflatten(structure, torch.autograd.grad(loss, leaves))

    return gradient


@pytest.mark.sampled(pool="compiled")
def test_a_backward_pass_through_what_was_compiled():
    row = next(row for row in CATALOGUE if row.name == "adam")
    assert_compiles_once(row, lambda total: by_autograd(torch.compile(total, backend="aot_eager", fullgraph=True)))


@pytest.mark.sampled(pool="compiled")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler for the default backend")
def test_compiles_by_default():
    row = next(row for row in CATALOGUE if row.name == "adam")
    assert_compiles_once(row, lambda total: torch.compile(torch.func.grad(total, (0, 1)), fullgraph=True))


# What does not compose. -----------------------------------------------------------------------------------------------


def test_raising_needs_values():
    tx = fo.clip_by_global_norm(1.0, nonfinite="raise")

    def clipped(g):
        return tx.update(g, tx.init(g))[0]

    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(clipped)(torch.ones(2, 3))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(clipped, backend="eager", fullgraph=True)(torch.ones(3))
    assert torch.func.jacrev(clipped)(torch.ones(3)).isfinite().all()


def test_forward_mode_of_a_float32_number():
    tx = fo.adam(0.1)

    def moved(p):
        state = tx.init(p)
        for _ in range(2):
            updates, state = tx.update(p * p, state)
            p = p + updates
        return p

    _, slope = torch.func.jvp(moved, (torch.ones(()),), (torch.ones(()),))
    assert slope.dtype == torch.float32


def test_forward_mode_of_a_first_value_of_complex_states_of_which_one_is_empty():
    params = [torch.ones(2, dtype=torch.complex128), torch.ones(0, 3, dtype=torch.complex128)]

    def moved(lr):
        tx = fo.rprop(lr)
        return fo.step(tx, params, tx.init(params), params)[0][0].real.sum()

    one = torch.ones((), dtype=torch.float64)
    _, slope = torch.func.jvp(moved, (0.1 * one,), (one,))
    assert slope == torch.func.grad(moved)(0.1 * one) != 0


def test_a_condition_may_be_made_where_torch_compile_traces():
    def trained(lr):
        tx = fo.skip(fo.sgd(lr, 0.5), lambda step: step == 1)
        params = torch.ones(2)
        state = tx.init(params)
        for _ in range(3):
            params, state = fo.step(tx, params.sin(), state, params)
        return params.sum()

    gradient, lr = torch.func.grad(trained), torch.tensor(0.1)
    torch.testing.assert_close(torch.compile(gradient, backend="eager", fullgraph=True)(lr), gradient(lr))
