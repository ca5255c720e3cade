"""Rules on large tensors run again in backward: everything is the same, except the memory."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from catalogue import CATALOGUE, assert_close, loss, make_params, rows, step
from torch.utils.checkpoint import checkpoint

import functorch_optim as fo
from functorch_optim._execution import choose
from functorch_optim._execution import recomputed as module

F64 = torch.float64


@pytest.fixture
def again(monkeypatch):
    """Take every tensor for a large one, in blocks of two elements, and count; or none, when the fixture is told so."""
    calls, apply, can_recompute = Counter(), module._Recomputed.apply, choose.can_recompute
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "BLOCK", 2)
    monkeypatch.setattr(choose, "can_join", lambda *args: False)
    monkeypatch.setattr(module._Recomputed, "apply", lambda *args: calls.update(["apply"]) or apply(*args))
    calls.on = lambda on: monkeypatch.setattr(choose, "can_recompute", can_recompute if on else lambda *args: False)
    return calls


def both_ways(again, function):
    """Call a function while rules run again in backward, and while they do not."""
    again.on(True)
    ours = function()
    again.on(False)
    before = again.total()
    expected = function()
    assert again.total() == before
    return ours, expected


def grads_of(output, inputs, **options):
    return torch.autograd.grad(output, inputs, allow_unused=True, materialize_grads=True, **options)


# Everything is the same. ----------------------------------------------------------------------------------------------


@pytest.mark.sampled
@rows
def test_values_and_derivatives_of_first_and_second_order(row, again):
    begin, x = make_params(), torch.randn(3, dtype=F64)
    leaves, structure = fo.tree.flatten(begin)

    def results():
        wanted = [leaf.clone().requires_grad_() for leaf in leaves]
        numbers = {n: torch.tensor(v, dtype=F64, requires_grad=True) for n, v in row.hyperparameters.items()}
        tx, params = row(**numbers), fo.tree.unflatten(structure, wanted)
        state = tx.init(params)
        for _ in range(2):
            grads = grads_of(loss(params, x), fo.tree.flatten(params)[0], create_graph=True)
            updates, state = step(tx, fo.tree.unflatten(structure, list(grads)), state, params, x)
            params = fo.apply_updates(params, updates)
        kept = [leaf for leaf in fo.tree.flatten(state)[0] if leaf.requires_grad]
        outcome = loss(params, x) + sum(leaf.sin().sum() for leaf in kept)
        inputs = [*wanted, *numbers.values()]
        first = grads_of(outcome, inputs, create_graph=True)
        # Once without a graph: then it is done block by block.
        return (
            outcome,
            grads_of(outcome, inputs, retain_graph=True),
            first,
            grads_of(sum(map(torch.sum, first)), inputs),
        )

    tolerance = 1e3 * row.tolerance
    assert_close(*both_ways(again, results), rtol=tolerance, atol=tolerance)


def of(row_name):
    return next(row for row in CATALOGUE if row.name == row_name)


def test_rows_that_are_run_again(again):
    again.on(True)
    used = set()
    for row in CATALOGUE:
        again.clear()
        numbers = {n: torch.tensor(v, dtype=F64, requires_grad=True) for n, v in row.hyperparameters.items()}
        params = fo.tree.map(torch.Tensor.requires_grad_, make_params())
        tx = row(**numbers)
        step(tx, fo.tree.map(lambda p: 2 * p, params), tx.init(params), params)
        used |= {row.name} if again else set()
    assert used >= {"adam", "adamw", "adadelta", "nadam", "radam", "rmsprop", "adagrad", "chain", "scale_by_adam"}
    assert not used & {"sgd", "scale", "clip", "clip_by_norm", "lbfgs", "adafactor_epsilon"}


def problem(*sizes, learned=True):
    g = [torch.randn(size, dtype=F64, requires_grad=True) for size in sizes]
    lr = torch.tensor(0.1, dtype=F64, requires_grad=learned)
    return g, lr, fo.adam(lr, eps=1e-3)


def once_more(tx, g, state=None):
    """Return the second update, which depends on all that the first one left."""
    _, state = tx.update(g, tx.init(g) if state is None else state)
    return tx.update(g, state)


def test_a_second_derivative_by_what_the_first_is_not_taken_of(again):
    def results():
        torch.manual_seed(0)
        g, lr, tx = problem(5)
        updates, _ = once_more(tx, g)
        (by_lr,) = torch.autograd.grad(updates[0].square().sum(), lr, create_graph=True)
        return torch.autograd.grad(by_lr, [lr, *g])

    assert_close(*both_ways(again, results))


def test_one_tensor_as_several_arguments(again):
    def results():
        torch.manual_seed(0)
        (g,), _, tx = problem(5)
        state = tx.init(g)
        state = (*state[:-2], state[-2]._replace(exp_avg=g, exp_avg_sq=g * g), state[-1])
        update, state = tx.update(g, state)
        out = update.sum() + fo.tree.get(state, "exp_avg").square().sum()
        return torch.autograd.grad(out, g, create_graph=True), torch.autograd.grad(out, g)

    assert_close(*both_ways(again, results))
    assert again


def test_a_jacobian_at_once(again):
    def results():
        torch.manual_seed(0)
        (g,), lr, tx = problem(5)
        update, _ = once_more(tx, g)
        one = lambda row: torch.autograd.grad(update, [g, lr], row, retain_graph=True)
        rows, at_once = torch.eye(5, dtype=F64), torch.vmap(one)(torch.eye(5, dtype=F64))
        assert_close(at_once, torch.autograd.grad(update, [g, lr], rows, retain_graph=True, is_grads_batched=True))
        return at_once

    assert_close(*both_ways(again, results))
    assert again


def test_forward_over_what_is_run_again(again):
    """The cotangent is dual: the derivative is linear in it."""

    def results():
        torch.manual_seed(0)
        (g,), _, tx = problem(5)
        update, _ = once_more(tx, g)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(update), torch.arange(5.0, dtype=F64))
            (grad,) = torch.autograd.grad(update, g, dual)
            return tuple(torch.autograd.forward_ad.unpack_dual(grad))

    assert_close(*both_ways(again, results))
    assert again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "gaps"])
def test_dtypes_and_layouts(dtype, layout, again):
    def arranged(x):
        return {"contiguous": x, "transposed": x.mT.contiguous().mT, "gaps": torch.stack([x, x], -1)[..., 0]}[layout]

    def results():
        torch.manual_seed(0)
        g = [arranged(torch.randn(3, 5, dtype=dtype)).requires_grad_() for _ in range(2)]
        _, _, tx = problem(1)
        updates, state = once_more(tx, g)
        out = sum(leaf.abs().sum() for leaf in [*updates, *fo.tree.get(state, "exp_avg")])
        return updates, torch.autograd.grad(out, g)

    tolerance = torch.finfo(dtype).eps * 8
    assert_close(*both_ways(again, results), rtol=tolerance, atol=tolerance)
    assert again


def test_a_hyperparameter_for_each_element(again):
    def results():
        torch.manual_seed(0)
        params = {"a": torch.randn(2, 3, dtype=F64), "b": torch.randn(3, dtype=F64, requires_grad=True)}
        lr = {"a": torch.rand(2, 3, dtype=F64, requires_grad=True), "b": torch.rand(1, dtype=F64, requires_grad=True)}
        tx = fo.chain(fo.scale(lr), fo.scale_by_adam(eps=1e-3))
        updates, _ = once_more(tx, params)
        return torch.autograd.grad(sum(u.square().sum() for u in updates.values()), [*lr.values(), params["b"]])

    assert_close(*both_ways(again, results))
    assert again


# What depends on nothing stays so, and what is the same tensor. -------------------------------------------------------


class TwoState(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


def returning(function):
    """Make a transformation of a rule that would have a lot saved."""

    def update(g, state, p, s):
        return function(torch.tanh(torch.exp(torch.sin(g) * state.first)), g, state, s)

    return fo.leafwise(TwoState, update, lambda step: torch.tensor(0.5, dtype=F64), elementwise=True)


def test_what_is_returned_is_what_a_rule_returns(again):
    again.on(True)
    g = torch.randn(4, dtype=F64, requires_grad=True)
    tx = returning(lambda x, g, state, s: (x, TwoState(x, state.second)))
    state = tx.init(g)
    state = state._replace(first=torch.ones(4, dtype=F64))
    update, new = tx.update(g, state)
    assert again
    assert new.second is state.second
    assert new.first is update
    assert not new.second.requires_grad
    tx = returning(lambda x, g, state, s: (x, TwoState(g, s * state.second + 1)))
    update, new = tx.update(g, state)
    assert new.first is g
    assert update.requires_grad
    assert not new.second.requires_grad


def test_what_has_no_derivative_keeps_no_graph(again):
    """First order: gradients are constants, so means have no derivative, and nothing is linked from step to step."""
    again.on(True)
    g, _, tx = problem(5)
    updates, state = once_more(tx, [g[0].detach()])
    assert updates[0].requires_grad
    assert not fo.tree.get(state, "exp_avg")[0].requires_grad
    assert not again


# When. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(pool="long")
def test_when_rules_run_again(again, monkeypatch):
    again.on(True)
    (g,), _, tx = problem(5)

    def is_used(tx=tx, g=g, transform=lambda function: function):
        again.clear()
        transform(lambda g: once_more(tx, g)[0])(g)
        return bool(again)

    assert is_used()
    assert is_used(fo.adam(0.1))
    assert not is_used(g=g.detach(), tx=fo.adam(0.1))
    assert not is_used(transform=torch.no_grad())
    assert not is_used(fo.sgd(0.1, momentum=0.9))  # autograd saves nothing of it
    assert is_used(returning(lambda x, g, state, s: (x, TwoState(x, x))))
    assert not is_used(transform=lambda f: torch.func.vjp(f, g)[1] and (lambda g: None))
    assert not is_used(g=g.detach(), transform=lambda f: lambda g: torch.func.jvp(f, (g,), (g,)))
    assert not is_used(transform=lambda f: torch.compile(f, backend="eager"))
    with torch.autograd.forward_ad.dual_level():
        assert not is_used()
    monkeypatch.setattr(module, "LARGE", 6)
    assert not is_used()
    monkeypatch.setattr(module, "LARGE", 5)
    assert is_used()


def test_random_rules_run_once(again):
    """And see the same numbers as if it had not been tried whether they do."""
    tx = returning(lambda x, g, state, s: (x * torch.randn_like(g), TwoState(x, x)))

    def results():
        torch.manual_seed(0)
        g = torch.randn(4, dtype=F64, requires_grad=True)
        update, _ = once_more(tx, g, tx.init(g)._replace(first=torch.ones(4, dtype=F64)))
        return update, torch.autograd.grad(update.sum(), g)

    assert_close(*both_ways(again, results))
    assert not again


def test_derivatives_by_what_a_rule_closes_over(again):
    weight = torch.tensor(2.0, dtype=F64, requires_grad=True)
    tx = returning(lambda x, g, state, s: (weight * x, TwoState(x, x)))

    def results():
        g = torch.ones(4, dtype=F64, requires_grad=True)
        updates, _ = once_more(tx, g, tx.init(g)._replace(first=torch.ones(4, dtype=F64)))
        return torch.autograd.grad(updates.sum(), [weight, g])

    assert_close(*both_ways(again, results))
    assert not again


# Memory, hooks, versions. ---------------------------------------------------------------------------------------------


def saved_by(function):
    """Count the bytes that autograd saves, of storages, and return what the function returns."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outcome = function()
    return sum(storage.nbytes() for storage in storages.values()), outcome


def in_two_parts(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("take", [in_two_parts, fo.step], ids=lambda take: take.__name__)
def test_only_the_means_are_saved_of_a_step(take, learned, again):
    size = 1000

    def steps(count):
        g, _, tx = problem(size, learned=learned)
        state, params = tx.init(g), g
        for _ in range(count):
            params, state = take(tx, g, state, params)
        return params

    ours, others = both_ways(again, lambda: saved_by(lambda: steps(4))[0] - saved_by(lambda: steps(2))[0])
    assert ours / 2 < 8 * size * 2.1
    assert others / 2 > 8 * size * 4


def test_what_is_saved_must_not_be_modified(again):
    again.on(True)
    for which in range(3):
        (g,), lr, tx = problem(5)
        g = g * 2
        _, state = tx.update(g, tx.init(g))
        updates, _ = tx.update(g, state)
        saved = [g, fo.tree.get(state, "exp_avg"), fo.tree.get(state, "exp_avg_sq")]
        saved[which].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(updates.sum(), lr)
    assert again


def test_results_may_be_written_to(again):
    again.on(True)
    (g,), _, tx = problem(5)
    update, state = once_more(tx, g)
    expected = torch.autograd.grad(3 * update.sum(), g, retain_graph=True)
    for leaf in (update, fo.tree.get(state, "exp_avg")):
        leaf.mul_(3)
    assert_close(torch.autograd.grad(update.sum(), g), expected)


def test_the_graph_is_freed_as_others_are(again):
    again.on(True)
    (g,), _, tx = problem(5)
    update, _ = once_more(tx, g)
    torch.autograd.grad(update.sum(), g)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(update.sum(), g)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_within_torch_checkpoint(use_reentrant, again):
    def results():
        torch.manual_seed(0)
        (g,), _, tx = problem(5, learned=False)
        update = checkpoint(lambda g: once_more(tx, g)[0], g, use_reentrant=use_reentrant)
        return torch.autograd.grad(update.sum(), g) if not use_reentrant else (update.sum().backward(), g.grad)[1]

    assert_close(*both_ways(again, results))
    assert again


def test_hooks_see_what_is_saved(again):
    """On the CPU say, while the graph waits."""
    again.on(True)
    (g,), _, tx = problem(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        update, _ = once_more(tx, g)
    expected, _ = once_more(tx, g)
    assert_close(torch.autograd.grad(update.sum(), g), torch.autograd.grad(expected.sum(), g))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_blocks_of_a_derivative(size, again):
    """A number's derivative is summed over all of them."""
    again.on(True)
    (g,), lr, tx = problem(size)
    update, _ = once_more(tx, g)
    first = torch.autograd.grad(update.square().sum(), [lr, g], retain_graph=True)
    whole = torch.autograd.grad(update.square().sum(), [lr, g], create_graph=True)
    assert_close(first, whole)
