"""L-BFGS, the functional form: torch.optim.LBFGS's numbers, its states, trees and errors."""

import itertools

import pytest
import torch
from lbfgs_problems import (
    DOUBLE,
    FEW,
    WOLFE,
    Ours,
    Theirs,
    complex_quadratic,
    few,
    largest_deviation,
    leaves_of,
    log_barrier,
    make,
    network,
    options,
    quadratic,
    rosenbrock,
    train,
)

import functorch_optim as fo
from functorch_optim.optimizers.lbfgs import LBFGSState, lbfgs
from functorch_optim.testing._copies import through_a_file, through_pickle

# Numbers. -------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@options
@pytest.mark.parametrize("problem", [rosenbrock, quadratic, network, complex_quadratic])
def test_equals_torch(problem, options):
    # Each update rounds the parameters once more than torch does, and the curvature of small steps amplifies that.
    iterations = options.get("max_iter", 20)
    assert largest_deviation(Ours, problem, options, max(1, 20 // iterations)) < 1e-12
    if problem is not network:  # which diverges exponentially while it converges
        assert largest_deviation(Ours, problem, options, max(2, 60 // iterations), counted=False) < 1e-6


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"lr": 0.1000001, "max_iter": 3}, {"lr": 0.1, "max_iter": 3}),
        ({"lr": 0.1, "max_iter": 3}, {"lr": 0.1, "max_iter": 4}),
        ({"max_iter": 6, "history_size": 2, **WOLFE}, {"max_iter": 6, "history_size": 3, **WOLFE}),
        ({"max_iter": 6, "max_eval": 5, **WOLFE}, {"max_iter": 6, "max_eval": 6, **WOLFE}),
        ({"max_iter": 6, "lr": 0.1}, {"max_iter": 6, "lr": 0.1, **WOLFE}),
        ({"tolerance_grad": 1e-2}, {"tolerance_grad": 1e-7}),
        ({"tolerance_change": 1e-2}, {"tolerance_change": 1e-9}),
    ],
)
def test_the_comparison_can_fail(ours, theirs):
    assert largest_deviation(Ours, rosenbrock, ours, 3, torch_options=theirs) > 1e-10


@pytest.mark.parametrize("options", [{}, WOLFE, {"max_iter": 4, "history_size": 2, **WOLFE}])
def test_equals_torch_in_single_precision(options):
    params = make(rosenbrock, torch.float32)
    ours, theirs = Ours(rosenbrock, params, **options), Theirs(rosenbrock, params, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.params["x"], theirs.params["x"].detach(), rtol=1e-3, atol=1e-3)
    assert all(field.dtype in (torch.float32, torch.int64) for field in ours.state)


def test_equals_torch_with_mixed_dtypes():
    params = {"a": torch.tensor([2.0, -1.0]), "b": torch.tensor([0.5, 3.0], **DOUBLE)}

    def problem(params):
        return rosenbrock({"x": torch.cat([params["a"].double(), params["b"]])})

    ours = Ours(problem, params, max_iter=5, **WOLFE)
    theirs = Theirs(problem, params, max_iter=5, **WOLFE)
    for _ in range(4):
        ours.step()
        theirs.step()
    assert (ours.params["a"].dtype, ours.params["b"].dtype) == (torch.float32, torch.float64)
    assert ours.state.d.dtype == torch.float64
    for name, leaf in ours.params.items():  # torch rounds the float32 parameters after every iteration, we at the end
        torch.testing.assert_close(leaf, theirs.params[name].detach(), rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_float32():
    ours = Ours(quadratic_of_16_bits, {"x": torch.ones(3, dtype=torch.bfloat16)}, **WOLFE)
    ours.step()
    assert ours.state.d.dtype == torch.float32
    assert ours.params["x"].tolist() == [2.0, 2.0, 2.0]


def quadratic_of_16_bits(params):
    return (params["x"].float() - 2).square().sum()


def test_without_a_line_search_it_goes_on_with_nan_as_torch_does():
    params, options = make(log_barrier), {"lr": 20.0}
    ours, theirs = Ours(log_barrier, params, **options), Theirs(log_barrier, params, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.params["x"], theirs.params["x"].detach(), rtol=1e-9, atol=0, equal_nan=True)
        assert ours.state.n_iter == theirs.state["n_iter"]
        assert ours.state.func_evals == theirs.state["func_evals"]
    assert ours.state.prev_loss.isnan()


@pytest.mark.parametrize("options", [{}, {"lr": 20.0, "max_iter": 4}, {"lr": 1e4}, {"max_iter": 1}])
def test_a_line_search_turns_back_where_the_loss_is_not_finite(options):
    ours = Ours(log_barrier, make(log_barrier), **options, **WOLFE)
    losses = [log_barrier(ours.params)]
    for _ in range(20):
        ours.step()
        losses.append(log_barrier(ours.params))
    assert all(after <= before for before, after in itertools.pairwise(losses))
    torch.testing.assert_close(ours.params["x"], torch.full((2,), 0.1, **DOUBLE), rtol=1e-3, atol=0)


@pytest.mark.parametrize("outside", [torch.nan, torch.inf, -torch.inf])
def test_a_trial_outside_of_the_domain_is_halved(outside):
    """The loss is (x - 1)^2 up to 1.5; its first trial, from 0 along 2, is lr."""

    def loss(x):
        tried.append(float(x.detach()))
        return torch.where(x > 1.5, outside, (x - 1) ** 2)

    def best(lr):
        tried.clear()
        x = torch.zeros((), **DOUBLE)
        tx = lbfgs(lr, line_search_fn="strong_wolfe", max_iter=1)
        return tx.update(torch.func.grad(loss)(x), tx.init(x), x, value_fn=loss, value=torch.ones((), **DOUBLE))[0]

    tried = []
    assert float(best(torch.tensor(16.0))) == 1.0
    assert tried == [0.0, 16.0, 8.0, 4.0, 2.0, 1.0]
    assert best(torch.tensor(1.25)) == 1.25  # a trial within is taken as ever


@pytest.mark.parametrize("problem", [rosenbrock, "least squares"])
def test_one_iteration_an_update_moves_where_torch_stands_still(problem):
    x, y = torch.randn(30, 4, **DOUBLE), 0.1 * torch.randn(30, **DOUBLE)
    params = {"x": torch.tensor([-1.2, 1.0], **DOUBLE)} if problem is rosenbrock else {"x": torch.zeros(4, **DOUBLE)}
    loss = problem if problem is rosenbrock else lambda params: (x @ params["x"] - y).square().sum()
    ours, theirs = [kind(loss, params, max_iter=1, **WOLFE) for kind in (Ours, Theirs)]
    start, values = loss(params), []
    for _ in range(20):
        ours.step()
        theirs.step()
        values.append(loss(ours.params))
    assert values == sorted(values, reverse=True)
    assert values[0] < start
    assert torch.equal(theirs.params["x"], params["x"])
    if problem is not rosenbrock:
        torch.testing.assert_close(ours.params["x"], torch.linalg.lstsq(x, y).solution, rtol=1e-6, atol=1e-6)


def test_the_history_is_torchs():
    ours, theirs = (kind(rosenbrock, make(rosenbrock), max_iter=3, lr=0.02, history_size=4) for kind in (Ours, Theirs))
    for _ in range(4):
        ours.step()
        theirs.step()
        count = len(theirs.state["ro"])
        assert count > 0
        for name in ("old_dirs", "old_stps", "ro"):
            rows = getattr(ours.state, name)
            torch.testing.assert_close(rows[4 - count :], torch.stack(theirs.state[name]), rtol=1e-9, atol=1e-12)
            assert not rows[: 4 - count].any()
    assert count == 4


# Purity, states and trees. --------------------------------------------------------------------------------------------


@few
def test_modifies_no_argument_and_keeps_structure(options):
    params = make(network)
    tx = lbfgs(**options)
    state = tx.init(params)
    for _ in range(4):
        grads, value = torch.func.grad_and_value(network)(params)
        given = leaves_of((params, grads, state, value))
        before = [(leaf.clone(), leaf._version) for leaf in given]
        updates, new_state = tx.update(grads, state, params, value_fn=network, value=value)
        for leaf, (content, version) in zip(given, before, strict=True):
            assert leaf._version == version
            assert torch.equal(leaf, content)
        for old, new in ((params, updates), (state, new_state)):
            assert fo.tree.flatten(old)[1] == fo.tree.flatten(new)[1]
            assert [(a.shape, a.dtype) for a in leaves_of(old)] == [(a.shape, a.dtype) for a in leaves_of(new)]
        params, state = fo.apply_updates(params, updates), new_state


@few
def test_a_saved_state_goes_on_with_the_same_numbers(options):
    params, state = train(make(rosenbrock), options)
    loaded = fo.load_state_dict(lbfgs(**options).init(params), through_a_file(fo.state_dict(state)))
    expected, result = (train(params, options, state=s) for s in (state, loaded))
    assert all(torch.equal(a, b) for a, b in zip(leaves_of(expected), leaves_of(result), strict=True))
    assert isinstance(through_pickle(state), LBFGSState)


def test_prints_and_pickles():
    tx = lbfgs(0.5, line_search_fn="strong_wolfe")
    assert repr(tx) == repr(through_pickle(tx)) == "lbfgs(0.5, line_search_fn='strong_wolfe')"


def test_the_loss_is_evaluated_as_often_as_torch_does_and_the_first_time_only_without_a_value():
    calls = []

    def counted(params):
        calls.append(1)
        return rosenbrock(params)

    params = make(rosenbrock)
    grads, value = torch.func.grad_and_value(rosenbrock)(params)
    for some in FEW:
        tx = lbfgs(**some)
        results = []
        for extra, more in (({"value": value}, -1), ({}, 0)):
            calls.clear()
            updates, state = tx.update(grads, tx.init(params), params, value_fn=counted, **extra)
            assert len(calls) == int(state.func_evals) + more
            results.append(updates["x"])
        assert torch.equal(*results)


def test_parameters_without_gradient_stay_and_none_is_nothing():
    def problem(params):
        return rosenbrock({"x": torch.stack([params["a"], params["fixed"], params["b"]])})

    params = {name: torch.tensor(value, **DOUBLE) for name, value in (("a", 0.3), ("fixed", 0.7), ("b", -0.5))}
    fixed = params["fixed"]
    theirs = Theirs(lambda p: problem({**p, "fixed": fixed}), {"a": params["a"], "b": params["b"]}, **WOLFE)
    tx = lbfgs(**WOLFE)
    params["none"] = None
    state = tx.init(params)
    for _ in range(2):
        grads = {**torch.func.grad(problem)({k: v for k, v in params.items() if v is not None}), "fixed": None}
        updates, state = tx.update({**grads, "none": None}, state, params, value_fn=problem)
        assert updates["fixed"] is None
        assert updates["none"] is None
        params = fo.apply_updates(params, updates)
        theirs.step()
    assert params["fixed"] == 0.7
    for name in ("a", "b"):
        torch.testing.assert_close(params[name], theirs.params[name].detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("params", [{}, {"x": None}, {"x": torch.zeros(0, 3)}])
@few
def test_without_elements_nothing_happens(params, options):
    tx = lbfgs(**options)
    updates, state = tx.update(params, tx.init(params), params, value_fn=lambda params: torch.zeros(()))
    assert fo.tree.flatten(updates)[1] == fo.tree.flatten(params)[1]
    assert (int(state.step), int(state.n_iter)) == (1, 0)


def test_learning_rates_are_numbers_tensors_or_schedules():
    params = make(rosenbrock)

    def trained(lr, updates=2):
        return train(params, {"lr": lr, "max_iter": 3}, updates=updates)[0]["x"]

    assert torch.equal(trained(0.02), trained(torch.tensor(0.02, **DOUBLE)))
    assert torch.equal(trained(0.02), trained(lambda count: 0.02))
    assert torch.equal(trained(lambda count: 0.02 / (1 + count), updates=1), trained(0.02, updates=1))
    assert not torch.allclose(trained(lambda count: 0.02 / (1 + count)), trained(0.02))


def test_chains_with_others():
    params = make(rosenbrock)
    grads, value = torch.func.grad_and_value(rosenbrock)(params)
    alone, half = lbfgs(**WOLFE), fo.chain(lbfgs(**WOLFE), fo.scale(0.5))
    expected, _ = alone.update(grads, alone.init(params), params, value_fn=rosenbrock, value=value)
    updates, state = half.update(grads, half.init(params), params, value_fn=rosenbrock, value=value)
    assert torch.equal(updates["x"], 0.5 * expected["x"])
    assert isinstance(state[0], LBFGSState)


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0; it needs value >= 0"),
        ({"lr": "fast"}, TypeError, r"Invalid learning rate: 'fast' is a str"),
        ({"max_iter": 0}, ValueError, r"Invalid max_iter: 0; it needs an integer >= 1"),
        ({"max_iter": 2.0}, TypeError, r"Invalid max_iter: 2\.0 is a float; give an integer >= 1"),
        ({"max_iter": True}, TypeError, r"Invalid max_iter: True is a bool"),
        ({"max_eval": 0}, ValueError, r"Invalid max_eval: 0; it needs an integer >= 1"),
        ({"history_size": 0}, ValueError, r"Invalid history_size: 0; it needs an integer >= 1"),
        ({"history_size": None}, TypeError, r"Invalid history_size: None is a NoneType; give an integer >= 1"),
        ({"tolerance_grad": -1e-3}, ValueError, r"Invalid tolerance_grad: -0\.001; it needs value >= 0"),
        ({"tolerance_change": torch.ones(())}, TypeError, r"Invalid tolerance_change: tensor\(1\.\) is a Tensor"),
        ({"line_search_fn": "armijo"}, ValueError, r"Invalid line_search_fn: 'armijo'; only 'strong_wolfe' is supp"),
    ],
)
def test_bad_hyperparameters_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        lbfgs(**options)


def test_bad_calls_are_errors():
    params = {"x": torch.ones(3)}
    tx = lbfgs()
    state = tx.init(params)
    with pytest.raises(TypeError, match="lbfgs needs the extra 'value_fn'"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match="lbfgs needs the parameters, but update was called without them"):
        tx.update(params, state, value_fn=rosenbrock)
    with pytest.raises(TypeError, match=r"value_fn must be a function, loss = value_fn\(params\), got a Tensor"):
        tx.update(params, state, params, value_fn=torch.ones(()))
    with pytest.raises(ValueError, match=r"value_fn must return a loss, a 0-dim tensor, got one of shape \(3,\)"):
        tx.update(params, state, params, value_fn=lambda params: params["x"])
    with pytest.raises(TypeError, match="value_fn must return a loss, a 0-dim tensor, got a tuple"):
        tx.update(params, state, params, value_fn=lambda params: (rosenbrock(params), None))
    with pytest.raises(TypeError, match="value must be a loss, a 0-dim tensor, got a float"):
        tx.update(params, state, params, value_fn=rosenbrock, value=1.0)
    with pytest.raises(ValueError, match="The state of lbfgs is a tuple: it belongs to another transformation"):
        tx.update(params, (), params, value_fn=rosenbrock)
    with pytest.raises(ValueError, match=r"a history of shape \(100, 3\) and dtype torch.float32, but .* \(7, 3\)"):
        lbfgs(history_size=7).update(params, state, params, value_fn=rosenbrock)
    larger = {"x": torch.ones(4)}
    with pytest.raises(ValueError, match=r"make it \(100, 4\) and torch.float32: it belongs to other parameters"):
        tx.update(larger, state, larger, value_fn=rosenbrock)
