"""fo.minimize: its end, its results, and its behaviour under transforms of torch."""

import pytest
import torch

import functorch_optim as fo

F64 = torch.float64
X, Y = torch.randn(30, 3, dtype=F64), torch.randn(30, dtype=F64)
START = {"w": torch.zeros(3, dtype=F64), "rest": [torch.zeros((), dtype=F64), None]}


def least_squares(params, y=Y):
    return (X @ params["w"] + params["rest"][0] - y).square().mean()


def solution(y=Y):
    return torch.linalg.lstsq(torch.cat([X, torch.ones(30, 1, dtype=F64)], 1), y).solution


def numbers(params):
    return torch.cat([params["w"], params["rest"][0][None]])


CHAIN = fo.chain(fo.clip_by_global_norm(5.0), fo.adam(0.1))


@pytest.mark.parametrize(("tx", "max_steps"), [(None, 100), (fo.sgd(0.3, 0.5), 2000), (CHAIN, 4000)])
def test_ends_at_the_minimum_and_tells_so(tx, max_steps):
    found = fo.minimize(least_squares, START, tx, tol=1e-8, max_steps=max_steps)
    assert (numbers(found.params) - solution()).abs().max() < 1e-7
    assert found.params["rest"][1] is None
    assert found.converged
    assert 0 < found.steps < max_steps
    assert found.history.shape == (found.steps + 1,)
    assert found.history[0] == least_squares(START)
    assert found.history[-1] == found.value == least_squares(found.params)
    w, bias = torch.func.grad(least_squares)({"w": found.params["w"], "rest": found.params["rest"][:1]}).values()
    assert found.grad_norm == max(w.abs().max(), bias[0].abs()) <= 1e-8


def test_is_the_loop_that_one_would_write():
    tx = fo.chain(fo.adam(0.1), fo.reduce_on_plateau(patience=0))
    found = fo.minimize(least_squares, START, tx, tol=0.0, max_steps=7)
    params, state, values = START, tx.init(START), [least_squares(START)]
    for _ in range(7):
        grads, value = torch.func.grad_and_value(lambda w: least_squares({**params, **w}))({"w": params["w"]})
        bias = torch.func.grad(lambda b: least_squares({**params, "rest": [b, None]}))(params["rest"][0])
        updates, state = tx.update({**grads, "rest": [bias, None]}, state, params, value=value)
        params = fo.apply_updates(params, updates)
        values.append(least_squares(params))
    torch.testing.assert_close(numbers(found.params), numbers(params), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.history, torch.stack(values), rtol=1e-12, atol=0)
    assert fo.tree.get(found.state, "num_bad_epochs") == fo.tree.get(state, "num_bad_epochs")
    assert not found.converged
    assert found.steps == 7


def test_a_long_history_is_not_printed():
    found = fo.minimize(lambda x: (x - 1) ** 2, torch.tensor(0.0), fo.sgd(0.5))
    assert repr(found).startswith("Minimized(params=tensor(1.), value=tensor(0.), ")
    assert repr(found).endswith("converged=tensor(True), ...)")


def test_a_start_at_the_minimum_takes_no_step_and_nan_ends():
    there = torch.ones(2, dtype=F64)
    found = fo.minimize(lambda x: (x - 1).square().sum(), there)
    assert (found.steps, found.converged, found.history.tolist()) == (0, True, [0.0])
    lost = fo.minimize(lambda x: x.log().sum(), there, fo.sgd(1.5), max_steps=50)
    assert lost.steps == 1  # 1 - 1.5 is negative
    assert not lost.converged
    assert lost.value.isnan()


@pytest.mark.parametrize(("tx", "max_steps"), [(fo.lbfgs(max_iter=5, history_size=4, lr=0.1), 6), (fo.sgd(0.3), 40)])
def test_a_batch_of_problems_equals_a_loop(tx, max_steps):
    ys = torch.stack([Y, 2 * Y, 0 * Y])  # the last is at its minimum

    def fitted(y):
        return fo.minimize(lambda params: least_squares(params, y), START, tx, tol=1e-2, max_steps=max_steps)

    batched = torch.vmap(lambda y: numbers_of(fitted(y)))(ys)
    for i, y in enumerate(ys):
        one = fitted(y)
        for name, value in numbers_of(one).items():
            together = batched[name][i]
            if name == "history":
                assert together[len(value) :].isnan().all()
                together = together[: len(value)]
            torch.testing.assert_close(together, value, rtol=1e-9, atol=1e-12)
    assert batched["steps"].unique().numel() > 1


def numbers_of(found):
    return {**found._asdict(), "params": numbers(found.params), "state": torch.zeros(())}


def test_derivatives_are_those_of_the_updates_and_by_custom_root_those_of_the_minimum():
    def rate(lr):
        return fo.minimize(least_squares, START, fo.sgd(lr), max_steps=5).value

    lr = torch.tensor(0.05, dtype=F64)
    h = 1e-5
    slope = (rate(lr + h) - rate(lr - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(rate)(lr), slope, rtol=1e-6, atol=0)

    @fo.meta.custom_root(torch.func.grad(lambda w, y: (X @ w - y).square().mean()))
    def fit(w, y):
        return fo.minimize(lambda w: (X @ w - y).square().mean(), w, tol=1e-10).params

    jacobian = torch.func.jacrev(fit, 1)(torch.zeros(3, dtype=F64), Y)
    torch.testing.assert_close(jacobian, torch.linalg.pinv(X), rtol=1e-8, atol=1e-10)


@pytest.mark.sampled(pool="compiled")
def test_compiles_whole():
    def fitted(x0):
        return fo.minimize(lambda x: (x - 2).square().sum(), x0, fo.sgd(0.25), tol=1e-1, max_steps=8)

    x0 = torch.zeros(3)
    plain, compiled = fitted(x0), torch.compile(fitted, backend="eager", fullgraph=True)(x0)
    for name in ("params", "value", "grad_norm", "steps", "converged"):
        torch.testing.assert_close(getattr(compiled, name), getattr(plain, name))
    assert plain.steps < 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.minimize(3.0, Y), TypeError, "needs a function of the parameters, got a float"),
        (lambda: fo.minimize(lambda y: y, Y), ValueError, r"must return a loss, .*one of shape \(30,\); take"),
        (lambda: fo.minimize(lambda y: 1.0, Y), TypeError, "must return a loss, a 0-dim tensor, got a float"),
        (lambda: fo.minimize(torch.sum, Y, fo.sgd), TypeError, r"call it: minimize\(loss, params, adam\(0.1\)\)"),
        (lambda: fo.minimize(torch.sum, Y, tol=-1.0), ValueError, "Invalid tol: -1.0; it needs value >= 0"),
        (lambda: fo.minimize(torch.sum, Y, max_steps=0), ValueError, "Invalid max_steps: 0; it needs an integer >= 1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
