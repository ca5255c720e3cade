"""Lowering the scale on a plateau: the numbers of torch's scheduler, and all transforms of torch."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

import functorch_optim as fo
from functorch_optim.transforms.plateau import ReduceOnPlateauState, reduce_on_plateau


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def scales(tx, values):
    """Return what each update is multiplied by, and the state at the end."""
    one = double([1.0])
    state, scaled = tx.init(one), []
    for value in values:
        update, state = tx.update(one, state, value=value)
        scaled.append(update)
    return torch.cat(scaled), state


def torchs(values, lr=1.0, **arguments):
    """Return the learning rate of each step, and the scheduler at the end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, lrs = ReduceLROnPlateau(optimizer, **arguments), []
    for value in values:
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(value)
    return double(lrs), scheduler, optimizer.param_groups[0]["lr"]


NUMBERS = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 0.9, 0.95, 1.0, 1.05, 1.1, 2.0, math.nan, math.inf, -math.inf])
METRICS = st.lists(NUMBERS | st.floats(-2, 2), max_size=40)
ARGUMENTS = st.fixed_dictionaries(
    {
        "factor": st.sampled_from([0.0, 0.1, 0.5, 0.9]),
        "patience": st.integers(0, 3),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1, 1.0, 2.0]),
        "cooldown": st.integers(0, 3),
        "mode": st.sampled_from(["min", "max"]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "eps": st.sampled_from([0.0, 1e-8, 0.05, 0.2]),
    }
)
LEAST = st.sampled_from([0.0, 0.05, 0.3, 1.0, 2.0])


@given(METRICS, ARGUMENTS, LEAST)
def test_equals_torch(metrics, arguments, least):
    if arguments["threshold_mode"] == "rel":  # of negative values torch compares something else
        metrics = [abs(metric) for metric in metrics]
    expected, scheduler, lr = torchs(metrics, min_lr=least, **arguments)
    scaled, state = scales(reduce_on_plateau(min_scale=least, **arguments), metrics) if metrics else (double([]), None)
    assert torch.equal(scaled, expected)
    if state is not None:
        bad, cooling = scheduler.num_bad_epochs, scheduler.cooldown_counter
        assert [field.item() for field in state] == [lr, scheduler.best, bad, cooling]


@given(st.lists(st.sampled_from([0.5, 0.9, 1.0, 1.1]), min_size=30, max_size=60), ARGUMENTS, LEAST)
def test_equals_torch_on_plateaus(metrics, arguments, least):
    """Values that seldom improve: many reductions, and all that follows them."""
    expected, *_ = torchs(metrics, min_lr=least, **arguments)
    assert torch.equal(scales(reduce_on_plateau(min_scale=least, **arguments), metrics)[0], expected)
    if expected.unique().numel() > 1:
        # Negative control: the comparison would notice patience for one value more.
        more = {**arguments, "patience": arguments["patience"] + 1}
        assert not torch.equal(scales(reduce_on_plateau(min_scale=least, **more), metrics)[0], expected)


@given(METRICS, ARGUMENTS, LEAST)
def test_to_minimize_is_to_maximize_the_negative(metrics, arguments, least):
    """So values that are all negative have torch's numbers too: those of the other mode."""
    arguments = {**arguments, "threshold": min(arguments["threshold"], 0.5)}  # inf (1 - 1) is NaN: torch never improves
    other = {**arguments, "mode": {"min": "max", "max": "min"}[arguments["mode"]], "min_scale": least}
    if metrics:
        negative = scales(reduce_on_plateau(**other), [-metric for metric in metrics])[0]
        assert torch.equal(negative, scales(reduce_on_plateau(min_scale=least, **arguments), metrics)[0])
        sizes = [abs(metric) for metric in metrics]
        expected, *_ = torchs(sizes, min_lr=least, **arguments)
        assert torch.equal(scales(reduce_on_plateau(**other), [-size for size in sizes])[0], expected)


def test_negative_values_that_slowly_get_worse_are_not_better():
    worse = [-1.0 + 5e-5 * i for i in range(12)]
    tx = reduce_on_plateau(0.5, patience=3)
    scaled, state = scales(tx, worse)
    assert scaled[-1] == 0.25
    assert state.best == -1.0
    assert set(torchs(worse, factor=0.5, patience=3)[0].tolist()) == {1.0}  # where torch's never ends
    assert scales(tx, [-1.0 - 2e-4 * i for i in range(12)])[0].tolist() == [1.0] * 12
    crossing, state = scales(tx, [0.5, 0.0, -0.5, -0.5, -0.5, -0.5, -0.5, -0.5])
    assert crossing.tolist() == [1.0] * 7 + [0.5]
    assert state.best == -0.5


def test_a_value_lowers_the_scale_of_the_updates_after_its_own():
    scaled, _ = scales(reduce_on_plateau(0.5, patience=0), [1.0, 1.0, 1.0, 0.5])
    assert scaled.tolist() == [1.0, 1.0, 0.5, 0.25]


def test_relative_to_the_learning_rate():
    """Limits that torch gives in learning rates are divided by it; powers of two, so that nothing is rounded."""
    metrics = [1.0] * 20
    expected, *_ = torchs(metrics, lr=0.25, factor=0.5, patience=1, min_lr=2**-8, eps=2**-20)
    scaled, _ = scales(reduce_on_plateau(0.5, 1, min_scale=2**-6, eps=2**-18), metrics)
    assert torch.equal(0.25 * scaled, expected)


@given(
    st.lists(st.sampled_from([0.5, 0.9, 1.0, 1.1]), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_once_an_epoch(metrics, n, patience, cooldown):
    """What the docstring says to do when there are n updates in each epoch of torch's."""
    expected, *_ = torchs(metrics, factor=0.5, patience=patience, cooldown=cooldown)
    tx = reduce_on_plateau(0.5, (patience + 1) * n - 1, cooldown=cooldown * n)
    scaled, _ = scales(tx, [metric for metric in metrics for _ in range(n)])
    assert torch.equal(scaled[::n], expected)


# Hyperparameters. -----------------------------------------------------------------------------------------------------


METRIC = [3.0, 2.0, 2.0, 2.5, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9, 1.9]
NUMERIC = {"factor": 0.5, "patience": 1, "threshold": 0.125, "cooldown": 1, "min_scale": 0.125, "eps": 0.0625}


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_as_arguments_change_nothing_and_may_be_batched(name, dtype):
    def run(x):
        return scales(reduce_on_plateau(**{**NUMERIC, name: x}), METRIC)

    expected, state = run(NUMERIC[name])
    for given_as in (torch.tensor(NUMERIC[name], dtype=dtype), torch.tensor([NUMERIC[name]]).sum()):
        scaled, other = run(given_as)
        assert torch.equal(scaled, expected)
        assert [(field.dtype, field.item()) for field in other] == [(field.dtype, field.item()) for field in state]
    batch = [NUMERIC[name], 0, 3 if name in ("patience", "cooldown") else NUMERIC[name] / 2]
    batched = torch.vmap(lambda x: run(x)[0])(torch.tensor(batch, dtype=dtype))
    assert torch.equal(batched, torch.stack([run(x)[0] for x in batch]))


@pytest.mark.parametrize("name", NUMERIC)
def test_derivatives(name):
    """By what the scale is made of; the numbers that are only compared have derivative zero."""
    numbers = {name: double(float(number)) for name, number in NUMERIC.items()}
    numbers |= {"factor": double(0.45), "patience": double(1.5), "cooldown": double(1.5)}  # away from where it jumps

    def run(x):
        return scales(reduce_on_plateau(**{**numbers, name: x}), METRIC)[0]

    x, h = numbers[name], 1e-4
    forward, reverse = torch.func.jacfwd(run)(x), torch.func.jacrev(run)(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-14, atol=0)
    torch.testing.assert_close(forward, (run(x + h) - run(x - h)) / (2 * h), rtol=1e-7, atol=1e-9)
    assert forward.any() == (name in ("factor", "min_scale"))


def test_no_graph_of_the_value_is_kept():
    tx = reduce_on_plateau()
    params = double([1.0]).requires_grad_()
    _, state = tx.update(params.detach(), tx.init(params), value=params.square().sum())
    assert not any(field.requires_grad for field in state)


# Trees, and transformed functions. ------------------------------------------------------------------------------------


def test_any_tree_and_dtype():
    updates = {
        "half": torch.randn(3).bfloat16(),
        "single": torch.randn(()),
        "complex": [torch.randn(2, dtype=torch.complex64), torch.randn((), dtype=torch.complex64)],
        "sparse": torch.eye(2).to_sparse(),
        "none": None,
        "empty": torch.zeros(0),
    }
    tx = reduce_on_plateau(1 / 3, 0)
    state = tx.init(updates)
    for value in (1.0, 1.0, 1.0):
        scaled, state = tx.update(updates, state, value=value)
    before, structure = fo.tree.flatten(updates)
    after, new_structure = fo.tree.flatten(scaled)
    assert structure == new_structure
    for x, y in zip(before, after, strict=True):
        if x is not None:
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            expected = x.to_dense() if x.is_sparse else x
            expected = (expected.to(torch.promote_types(x.dtype, torch.float32)) / 3).to(x.dtype)
            torch.testing.assert_close(y.to_dense() if y.is_sparse else y, expected, rtol=1e-6, atol=0)


def test_halves_are_rounded_once():
    x = torch.randn(1000).bfloat16()
    tx = reduce_on_plateau(0.7, 0)
    _, state = tx.update(x, tx.init(x), value=1.0)
    _, state = tx.update(x, state, value=1.0)
    assert torch.equal(tx.update(x, state, value=1.0)[0], (0.7 * x.float()).bfloat16())


def test_in_chains_masks_and_the_optimizer():
    tx = fo.chain(fo.sgd(0.5), fo.masked(reduce_on_plateau(0.5, 0), {"a": True, "b": False}))
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params, state, params, value=1.0)
    assert updates == {"a": torch.tensor([-0.25]), "b": torch.tensor([-0.5])}

    w = torch.ones(1, requires_grad=True)
    optimizer = fo.Optimizer([w], fo.chain(fo.sgd(0.5), reduce_on_plateau(0.5, 0)))
    for expected in (0.5, 0.0, -0.25, -0.375):
        w.grad = torch.ones(1)
        optimizer.step(value=1.0)
        assert w.item() == expected
    w.grad = torch.ones(1)
    optimizer.step(lambda: torch.tensor(0.5))  # the loss that a closure returns is the value
    assert w.item() == -0.4375


def test_vmap_equals_a_loop():
    """Several runs with losses of their own."""
    tx = reduce_on_plateau(0.5, 1, cooldown=1)
    losses = torch.randint(0, 4, (5, 20), generator=torch.Generator().manual_seed(0)) / 4

    def run(losses):
        scaled, state = scales(tx, losses)
        return scaled, tuple(state)

    batched = torch.vmap(run)(losses)
    for i, row in enumerate(losses):
        for x, y in zip(fo.tree.flatten(batched)[0], fo.tree.flatten(run(row))[0], strict=True):
            assert torch.equal(x[i], y)


def test_compiles_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tx = reduce_on_plateau(0.5, 1, cooldown=1)
    compiled = torch.compile(lambda g, state, value: tx.update(g, state, value=value), backend=backend, fullgraph=True)
    g = double([1.0])
    state = other = tx.init(g)
    for value in map(double, METRIC):
        update, state = compiled(g, state, value)
        expected, other = tx.update(g, other, value=value)
        assert torch.equal(update, expected)
        assert isinstance(state, ReduceOnPlateauState)
        assert state == other
    assert len(graphs) == 1


def test_state_and_arguments_are_not_modified():
    tx, g = reduce_on_plateau(0.5, 0), double([1.0])
    state = tx.init(g)
    before = [field.clone() for field in state]
    tx.update(g, state, value=1.0)
    assert list(state) == before
    assert [(field.shape, field.dtype) for field in state] == [((), torch.float64)] * 2 + [((), torch.int64)] * 2


def test_prints_and_pickles():
    tx = reduce_on_plateau(0.5, patience=1, mode="max")
    assert repr(tx) == "reduce_on_plateau(0.5, patience=1, mode='max')"
    copy = pickle.loads(pickle.dumps(tx))
    assert torch.equal(scales(copy, METRIC)[0], scales(tx, METRIC)[0])
    state = scales(tx, METRIC)[1]
    assert pickle.loads(pickle.dumps(state)) == state
    assert fo.load_state_dict(tx.init(double([1.0])), fo.state_dict(state)) == state


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *[({name: math.nan}, ValueError, f"Invalid {name}: nan; it needs") for name in NUMERIC],
        *[({name: -1}, ValueError, f"Invalid {name}: -1; it needs") for name in NUMERIC],
        *[
            ({name: lambda step: 1}, TypeError, f"Invalid {name}: .* is a function; give a number, or")
            for name in NUMERIC
        ],
        *[({name: "1"}, TypeError, f"Invalid {name}: '1' is a str; give a number") for name in NUMERIC],
        ({"factor": 1.0}, ValueError, "Invalid factor: 1.0; it needs 0 <= value < 1"),
        ({"patience": 1.5}, ValueError, "Invalid patience: 1.5; it needs a whole number"),
        ({"cooldown": math.inf}, ValueError, "Invalid cooldown: inf; it needs a whole number"),
        ({"mode": "least"}, ValueError, "Invalid mode: 'least'; choose 'min' or 'max'"),
        ({"threshold_mode": "none"}, ValueError, "Invalid threshold_mode: 'none'; choose 'rel' or 'abs'"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        reduce_on_plateau(**arguments)


def test_errors_of_the_value():
    tx, g = reduce_on_plateau(), double([1.0])
    with pytest.raises(TypeError, match="reduce_on_plateau needs the extra 'value'"):
        tx.update(g, tx.init(g))
    with pytest.raises(ValueError, match=r"looks at one number, got a value of shape \(2,\); give their mean"):
        tx.update(g, tx.init(g), value=torch.ones(2))
    assert torch.equal(tx.update(g, tx.init(g), value=torch.ones(1, 1))[0], g)


@pytest.mark.parametrize("value", ["0.5", None, [1.0]])
def test_a_value_that_is_no_number(value):
    tx = fo.reduce_on_plateau()
    message = f"reduce_on_plateau needs a number as value, got a {type(value).__name__}; call tx.update"
    with pytest.raises(TypeError, match=message):
        tx.update(torch.ones(1), tx.init(torch.ones(1)), value=value)
