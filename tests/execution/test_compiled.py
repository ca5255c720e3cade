"""Steps under torch.compile."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch._dynamo.testing
from catalogue import assert_close
from torch._inductor.utils import run_and_get_code

import functorch_optim as fo

SIZE = 1 << 15
TX = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.exponential(0.1, 0.9)))


def problem(count=2, size=SIZE):
    params = [torch.randn(size) for _ in range(count)]
    return [torch.randn(size) for _ in range(count)], TX.init(params), params


def numbers_computed_apart(function, *arguments):
    """Count the maxima that are there for numbers, in what is compiled."""
    backend = torch._dynamo.testing.EagerAndRecordGraphs()
    result = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    targets = [node.target for graph in backend.graphs for node in graph.graph.nodes]
    return targets.count("amax"), result


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("size", [1, SIZE])
def test_numbers_are_computed_apart(size):
    arguments = problem(size=size)
    count, (params, state) = numbers_computed_apart(partial(fo.step, TX), *arguments)
    assert count > 0
    expected = fo.step(TX, *arguments)
    assert_close(params, expected[0], rtol=1e-5, atol=1e-6)
    assert_close(state, expected[1], rtol=1e-5, atol=1e-6)
    more = problem(count=6, size=size)
    assert numbers_computed_apart(partial(fo.step, TX), *more)[0] == count  # however many tensors there are


def test_steps_are_compiled_once():
    arguments = problem()
    compiled = torch.compile(partial(fo.step, TX), backend="aot_eager", fullgraph=True)
    grads, state, params = arguments
    expected = state, params
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            params, state = compiled(grads, state, params)
            expected = fo.step(TX, grads, *expected)[::-1]
    assert_close(params, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "rates"),
    [(lambda: fo.sgd({"w": 0.1, "b": 0.2}), (0.1, 0.2)), (lambda: fo.inject_hyperparams(fo.sgd)(lr=0.1), (0.1, 0.1))],
    ids=["tree", "kept"],
)
def test_steps_are_compiled_once_where_nothing_was_run_before(make, rates):
    """As in a new thread, whose local objects are empty."""
    tx, params, counter = make(), {"w": torch.ones(2), "b": torch.ones(1)}, torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(partial(fo.step, tx), backend=counter, fullgraph=True)

    def steps():
        state, moved = tx.init(params), params
        for _ in range(3):
            moved, state = compiled({name: torch.ones_like(p) for name, p in params.items()}, state, moved)
        return moved

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(steps).result()
    assert counter.frame_count == 1
    expected = {name: p - 3 * lr for (name, p), lr in zip(params.items(), rates, strict=True)}
    assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.sampled(pool="compiled")
def test_derivatives_and_batches_of_numbers_that_are_computed_apart():
    """A maximum of equal numbers has the derivative of one."""
    begin = torch.randn(3, dtype=torch.float64)

    def outcome(numbers):
        lr, beta2, eps = numbers
        params, tx = {"w": begin}, fo.adam(lr, (0.9, beta2), eps)
        state = tx.init(params)
        for _ in range(2):
            params, state = fo.step(tx, fo.tree.map(torch.sin, params), state, params)
        return params["w"].square().sum()

    numbers = torch.tensor([[0.1, 0.9, 1e-3], [0.2, 0.8, 1e-2]], dtype=torch.float64)
    second = torch.func.grad(lambda numbers: torch.func.grad(outcome)(numbers).sin().sum())
    for transformed in (torch.vmap(torch.func.grad(outcome)), torch.vmap(second)):
        count, result = numbers_computed_apart(transformed, numbers)
        assert count > 0
        assert_close(result, transformed(numbers), rtol=1e-12, atol=1e-13)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler for the default backend")
@pytest.mark.parametrize("size", [1 << 10, SIZE])
def test_no_power_is_computed_for_each_element(size):
    """Loops over elements are those up to the size of the tensor."""
    torch._dynamo.reset()
    tx = fo.scale_by_adam()
    params = torch.randn(size)
    compiled = torch.compile(tx.update, fullgraph=True)
    _, [code] = run_and_get_code(compiled, torch.randn(size), tx.init(params))
    loops = [loop for loop in code.split("for(int64_t")[1:] if f"<static_cast<int64_t>({size}L)" in loop]
    assert loops
    assert "pow(" in code
    assert not any("pow(" in loop for loop in loops)
