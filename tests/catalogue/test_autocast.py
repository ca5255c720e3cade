"""A step inside of `torch.autocast` has the precision of its parameters; autocast is for models and their losses."""

import pytest
import torch
from catalogue import CATALOGUE, assert_close, loss, make_params

import functorch_optim as fo
from functorch_optim._core.rule import TreeRule

# Functions of whole trees are the user's, or call the user's loss: there autocast is as the user has it.
OF_LEAVES = [row for row in CATALOGUE if not any(isinstance(link.rule, TreeRule) for link in row()._links)]


def updated(tx, grads, state, params, **extra):
    updates, state = tx.update(grads, state, params, **extra)
    return fo.apply_updates(params, updates), state


def trained(tx, take, autocast):
    torch.manual_seed(0)
    params, x = make_params(torch.float32), torch.randn(3)
    state = tx.init(params)
    asks = any("value" in link.rule.extras.names for link in tx._links)
    for _ in range(3):
        grads, value = torch.func.grad_and_value(loss)(params, x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            params, state = take(tx, grads, state, params, **({"value": value} if asks else {}))
    return params, state


@pytest.mark.sampled
@pytest.mark.parametrize("row", OF_LEAVES, ids=lambda row: row.name)
def test_a_step_does_not_depend_on_autocast(row):
    for take in (updated, fo.step, fo.step_):
        assert_close(trained(row(), take, True), trained(row(), take, False), rtol=0, atol=0)


@pytest.mark.sampled(pool="compiled")
def test_a_compiled_step_does_not_depend_on_autocast():
    tx, compiled = fo.shampoo(0.1, eps=0.1), torch.compile(updated, backend="eager", fullgraph=True)
    assert_close(trained(tx, compiled, True), trained(tx, updated, False), rtol=1e-4, atol=1e-4)


def test_a_step_of_an_optimizer_does_not_depend_on_autocast():
    trained = []
    for autocast in (True, False):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.eye(6, 5))
        opt = fo.Optimizer([p], fo.soap, lr=0.1)
        for _ in range(4):
            p.grad = torch.randn(6, 5)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                opt.step()
        trained.append(p.detach())
    assert torch.equal(*trained)


def test_the_loss_that_a_step_evaluates_has_the_users_autocast():
    dtypes = []

    def value_fn(params):
        dtypes.append((params @ params).dtype)
        return params.square().sum()

    params = torch.ones(2, 2)
    tx = fo.sam(fo.sgd(0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fo.step(tx, params, tx.init(params), params, value_fn=value_fn)
    assert dtypes == [torch.bfloat16]
