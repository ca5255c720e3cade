"""No pass over memory that changes nothing, and none more than the calls of a program need."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_optim as fo
from functorch_optim._core.rule import Rule
from functorch_optim._execution.blocks import InBlocks
from functorch_optim._execution.foreach import Foreach
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage
from functorch_optim._numerics import or_one


def counted(monkeypatch, name, *owners):
    calls = []
    for owner in owners:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, m=method, **options: calls.append(name) or m(*args, **options))
    return calls


def optimizer(tx):
    p = torch.randn(300, 300, requires_grad=True)
    p.grad = torch.randn_like(p)
    return fo.Optimizer([p], tx)


@pytest.mark.parametrize(("weight_decay", "copies"), [(0.0, 0), (0.1, 1)])
def test_weight_decay_of_zero_before_a_rule_that_sees_the_tree_makes_no_copy(monkeypatch, weight_decay, copies):
    opt = optimizer(fo.dog(weight_decay=weight_decay))
    opt.step()
    calls = counted(monkeypatch, "new", InBlocks, Foreach)
    opt.step()
    assert len(calls) == copies
    assert opt.state_dict()["state"][0]["step"] == 2  # it counts all the same


def test_links_that_change_nothing_may_stand_alone():
    g = [torch.randn(3)]
    tx = fo.chain(fo.identity(), fo.clip_by_global_norm(1e-3), fo.identity())
    alone = fo.clip_by_global_norm(1e-3)
    assert torch.equal(tx.update(g, tx.init(g))[0][0], alone.update(g, alone.init(g))[0][0])
    [same], _ = fo.identity().update(g, fo.identity().init(g))
    assert torch.equal(same, g[0])


@pytest.mark.parametrize(("tx", "used"), [(fo.dog(), 0), (fo.sgd(0.1), 1), (fo.sgd(0.1, momentum=0.9), 1)])
def test_a_product_and_sgd_is_no_kernel_after_another(monkeypatch, tx, used):
    opt = optimizer(tx)
    opt.step()
    calls = counted(monkeypatch, "_fused_sgd_", torch)
    opt.step()
    assert len(calls) == used


def test_a_root_that_nobody_differentiates_is_one_call(monkeypatch):
    x = torch.tensor([0.0, 4.0, -1.0, torch.nan])
    expected = fo.safe_sqrt(x.clone().requires_grad_()).detach()
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda *args: pytest.fail("the root of a constant is masked"))
    torch.testing.assert_close(fo.safe_sqrt(x), expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(pytest.fail.Exception, match="is masked"):
        torch.func.grad(fo.safe_sqrt)(torch.tensor(0.0))


def test_a_traced_root_has_the_derivative_zero_at_zero():
    graph = make_fx(fo.safe_sqrt)(torch.tensor(1.0))
    assert torch.func.grad(graph)(torch.tensor(0.0)) == 0
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.tensor(0.0), torch.tensor(1.0))
        assert forward_ad.unpack_dual(fo.safe_sqrt(dual)).tangent == 0
    assert torch.func.vmap(torch.func.grad(fo.safe_sqrt))(torch.tensor([0.0, 4.0])).tolist() == [0.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("machine", [InBlocks, lambda program: Foreach(program, [])])
def test_one_for_zero_has_the_bits_of_the_function(machine, dtype):
    like = torch.empty(0, dtype=dtype)
    rule = Rule(None, lambda g, state, p, s: (or_one(g) / or_one(or_one(g) - 1), state), elementwise=True)
    program = record([Stage(rule)], [()], False, [()], like)
    x = torch.tensor([0.0, -0.0, 1.0, -2.0, 1e-40, -1e-40, torch.inf, -torch.inf, torch.nan, 0.3], dtype=dtype)
    [[found]] = machine(program).new([[x]], [])
    torch.testing.assert_close(found, rule.update(x, (), None, ())[0], rtol=0, atol=0, equal_nan=True)
