"""Steps with fused kernels: how often they are compiled, and without a compiler."""

import functools
import math
import warnings

import pytest
import torch
from catalogue import assert_close, make_params
from step_cases import histories, run

import functorch_optim as fo
from functorch_optim._execution import fused


@pytest.mark.parametrize("fails", ["at_once", "when_called"])
def test_without_a_compiler_there_is_one_warning(monkeypatch, fails):
    def compile_it(function, **options):
        def called(*args):
            raise RuntimeError("There is no g++ here.\nAnd more.")

        return called() if fails == "at_once" else called

    monkeypatch.setattr(torch, "compile", compile_it)
    fused._compiled.cache_clear()

    def make_tx(bound):  # a program of its own, for nobody is told twice of one
        def update(g, state, p, s):
            return s * torch.clamp(g, max=bound), state

        return fo.chain(fo.leafwise(None, update, lambda step: -0.1 * step, elementwise=True), fo.trace(0.5))

    message = "fused=True needs torch.compile and a compiler that works here, .* RuntimeError: There is no g\\+\\+ here"
    params = make_params()
    history = list(histories(params, 5))
    for number, run_it in enumerate((step_by_step, with_an_optimizer)):
        tx = make_tx(10.0**number + len(fails))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            results = run_it(tx, params, history)
        assert len(seen) == 1
        with pytest.warns(UserWarning, match=message):
            warnings.warn_explicit(seen[0].message, None, seen[0].filename, seen[0].lineno)
        assert_close(results, run(fo.step, tx, params, history)[0], rtol=1e-12, atol=1e-12)
    fused._compiled.cache_clear()


def step_by_step(tx, params, history):
    return run(functools.partial(fo.step_, fused=True), tx, params, history)[0]


def with_an_optimizer(tx, params, history):
    params = fo.tree.map(lambda p: p.clone().requires_grad_(), params)
    leaves, structure = fo.tree.flatten(params)
    optimizer = fo.Optimizer(leaves, tx, fused=True)
    for grads in history:
        for p, g in zip(leaves, fo.tree.flatten(grads)[0], strict=True):
            p.grad = g.clone()
        optimizer.step()
    return fo.tree.unflatten(structure, [p.detach() for p in leaves])


def test_a_schedule_does_not_compile_again(compiled):
    graphs, calls = compiled
    tx = fo.chain(fo.clip_by_global_norm(1.0, nonfinite="skip"), fo.adamw(fo.schedules.warmup_cosine(0.1, 10, 100)))
    params = make_params()
    history = list(histories(params, 100))
    results = run(functools.partial(fo.step_, fused=True), tx, params, history)
    assert len(graphs) == 1
    assert len(calls) >= 100
    assert_close(results, run(fo.step, tx, params, history), rtol=1e-10, atol=1e-10)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("factory", [fo.adamw, fo.nadam, fo.rmsprop])
def test_a_scheduler_does_not_compile_again(factory, compiled):
    graphs, calls = compiled
    results = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.Linear(40, 5)).double()
        optimizer = fo.Optimizer(model.parameters(), factory, lr=0.1, fused=is_fused)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        for _ in range(100):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            scheduler.step()
        results.append([p.detach() for p in model.parameters()])
    assert len(graphs) == 1
    assert len(calls) >= 100
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


NORMS = {  # and how many functions are compiled: one for each level of norms, and one for the results
    "lamb": (fo.lamb(0.1, weight_decay=0.1), 2),
    "stable_adamw": (fo.stable_adamw(0.1, weight_decay=0.1), 2),
    "novograd": (fo.novograd(0.1, weight_decay=0.1), 2),
    "cautious": (fo.cautious(fo.adamw(0.1)), 2),
    "several": (fo.chain(*[fo.clip_by_norm(0.7, norm_type=p) for p in (1.0, 2.0, 3.5, math.inf)]), 5),
}


def large_and_small(dtype):
    params = {**make_params(dtype), "large": torch.randn(150, 300, dtype=dtype)}
    return params, [fo.tree.map(torch.randn_like, params) for _ in range(3)]


@pytest.mark.parametrize(("tx", "count"), NORMS.values(), ids=NORMS)
def test_norms_of_large_tensors_are_compiled(tx, count, compiled):
    graphs, calls = compiled
    params, history = large_and_small(torch.float64)
    results = run(functools.partial(fo.step_, fused=True), tx, params, history)
    assert len(graphs) == count
    assert len(calls) == count * (1 + len(history))
    assert_close(results, run(fo.step, tx, params, history), rtol=1e-10, atol=1e-10)


def test_groups_may_choose(compiled):
    graphs, _ = compiled
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "fused": True, "momentum": 0.9}]
    optimizer = fo.Optimizer(groups, fo.sgd, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(3)
        optimizer.step()
    assert len(graphs) == 1
    torch.testing.assert_close(params[0].detach(), torch.full((3,), 0.7))
    torch.testing.assert_close(params[1].detach(), torch.full((3,), 1 - 0.1 * (1 + 1.9 + 2.71)))


def test_fused_kernels_of_the_default_compiler():
    """Large tensors and small ones, in another order of memory too, with a flag among the numbers."""
    fused._compiled.cache_clear()
    tx = fo.chain(fo.clip_by_global_norm(1.0, nonfinite="skip"), fo.adamw(fo.schedules.linear(0.1, 0.0, 10), eps=1e-3))
    params = {**make_params(torch.float32), "large": torch.randn(150, 200), "turned": torch.randn(150, 200).t()}
    history = [fo.tree.map(torch.randn_like, params) for _ in range(3)]
    history[1]["large"] = torch.randn(200, 150).t()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = run(functools.partial(fo.step_, fused=True), tx, params, history)
    assert_close(results, run(fo.step, tx, params, history), rtol=1e-5, atol=1e-6)


@pytest.mark.sampled(size=1)
@pytest.mark.parametrize("name", NORMS)
def test_norms_by_the_default_compiler(name):
    fused._compiled.cache_clear()
    params, history = large_and_small(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = run(functools.partial(fo.step_, fused=True), NORMS[name][0], params, history)
    assert_close(results, run(fo.step, NORMS[name][0], params, history), rtol=1e-5, atol=1e-6)
