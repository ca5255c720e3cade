"""Buffers go from step to step as a module's own do: in turn, at once under vmap, compiled, and recomputed."""

import pytest
import torch
from catalogue import assert_close
from torch import nn
from torch.func import functional_call, grad, vmap

import functorch_optim as fo

X = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # tasks, steps, ...


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    return module, fo.stop_gradient(dict(module.named_parameters())), dict(module.named_buffers())


def loss_of(module):
    def loss(params, x, buffers):
        return functional_call(module, (params, buffers), (x,)).square().mean()

    return loss


@pytest.mark.parametrize("checkpoint", [False, True, 2])
@pytest.mark.parametrize("has_aux", [False, True])
def test_they_are_those_of_the_module_in_a_plain_loop(checkpoint, has_aux):
    module, params, buffers = network()
    before = fo.tree.map(torch.clone, buffers)
    loss = loss_of(module)

    def with_aux(params, x, buffers):
        return loss(params, x, buffers), {"mean": x.mean()}

    function = with_aux if has_aux else loss
    trained, *aux, carried = fo.meta.unroll(
        function, fo.sgd(0.1), params, X[0], checkpoint=checkpoint, has_aux=has_aux, buffers=buffers
    )
    assert_close(buffers, before)  # nothing of the caller's is modified
    assert len(aux[0] if has_aux else X[0]) == 3
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for x in X[0]:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    assert_close(carried, dict(module.named_buffers()))
    assert_close(trained.params, dict(module.named_parameters()))
    assert int(carried["1.num_batches_tracked"]) == 3


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("compiled", [False, True])
def test_every_task_of_a_vmap_has_its_own(compiled):
    """And the meta-gradient through what eval mode computes with them is that of tasks in turn."""
    module, params, buffers = network()
    loss = loss_of(module)

    def adapted(params, x):
        trained, carried = fo.meta.unroll(loss, fo.sgd(0.1), params, x, buffers=buffers)
        return trained.losses.sum() + loss(trained.params, x[0], carried), carried

    def at_once(params):
        losses, carried = vmap(adapted, (None, 0))(params, X)
        return losses.sum(), carried

    def in_turn(params):
        results = [adapted(params, x) for x in X]
        stacked = {name: torch.stack([carried[name] for _, carried in results]) for name in buffers}
        return sum(value for value, _ in results), stacked

    function = grad(at_once, has_aux=True)
    function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    assert_close(function(params), grad(in_turn, has_aux=True)(params))


def test_a_line_search_does_not_move_them():
    module, params, buffers = network()
    tx = fo.lbfgs(line_search_fn="strong_wolfe", max_iter=3)
    _, carried = fo.meta.unroll(loss_of(module), tx, params, X[0], buffers=buffers)
    assert int(carried["1.num_batches_tracked"]) == 3


def test_inner_loops_of_tasks_have_their_own():
    module, _, _ = network()
    loops = []
    for task in X:
        with fo.meta.inner_loop(module, fo.sgd(0.1)) as inner:
            for x in task:
                inner.step(inner(x).square().mean())
        loops.append(inner)
    _, params, buffers = network()
    for inner, task in zip(loops, X, strict=True):
        _, carried = fo.meta.unroll(loss_of(module), fo.sgd(0.1), params, task, buffers=buffers)
        assert_close(inner.buffers, carried)
