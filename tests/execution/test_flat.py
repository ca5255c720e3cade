"""Small tensors that are differentiated are joined, and nothing else is different."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from catalogue import CATALOGUE, assert_close, rows, train
from derivatives import OfVector, begun, continued
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad

import functorch_optim as fo
from functorch_optim._execution import choose
from functorch_optim._execution import flat as module


class MeanState(NamedTuple):
    mean: torch.Tensor


SHAPES = [(3,), (2, 2), (), (3,), (2, 2), (0, 2), (1,)]


@pytest.fixture
def joined(monkeypatch):
    """Join what there is, and count; or nothing, when the fixture is told so."""
    calls, flat, can_join = Counter(), module.flat, choose.can_join
    monkeypatch.setattr(module, "MANY", 2)
    monkeypatch.setattr(module, "flat", lambda *args: calls.update(["flat"]) or flat(*args))
    calls.join = lambda on: monkeypatch.setattr(choose, "can_join", can_join if on else lambda *args: False)
    return calls


def both_ways(joined, function):
    """Call a function while tensors are joined, and while they are not."""
    joined.join(on=True)
    ours = function()
    joined.join(on=False)
    before = joined.total()
    expected = function()
    assert joined.total() == before
    return ours, expected


def has_state(row):
    """Tell whether some elementwise rule of a row has a state: without one a rule does too little for copies to pay.

    `quantized` and `offload` run a transformation inside, and its rules have states.
    """
    params = {"a": torch.ones(2), "b": torch.ones(2, 2), "c": torch.ones(3), "d": torch.ones(2, 2)}
    states = [(link.rule, link.rule.init_leaf(params["b"])) for link in row()._links if hasattr(link.rule, "init_leaf")]
    return row.name in ("quantized", "offload") or any(rule.elementwise and state for rule, state in states)


# Everything is the same. ----------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize(
    ("row", "start"),
    [pytest.param(row, begun, id=row.name) for row in CATALOGUE]
    + [pytest.param(row, continued, id=f"{row.name}-continued") for row in CATALOGUE if has_state(row)],
)
def test_values_and_derivatives_of_first_and_second_order(row, start, joined):
    before = {"before": (0.0,) * 4} if start is continued else {}  # RAdam is another from the sixth step on
    function = OfVector(*start(row, shifts=(0.0,) * 2, **before))
    tolerance = {"rtol": 1e3 * row.tolerance, "atol": 1e3 * row.tolerance}

    def results():
        gradient, direction = torch.func.grad(function), torch.linspace(1, 2, len(function.z)).double()
        return {
            "value": function(function.z),
            "reverse": gradient(function.z),
            "forward": torch.func.jvp(function, (function.z,), (direction,))[1],
            "forward over reverse": torch.func.jvp(gradient, (function.z,), (direction,))[1],
            "reverse over reverse": torch.func.grad(lambda z: gradient(z) @ direction)(function.z),
        }

    assert_close(*both_ways(joined, results), **tolerance)
    assert bool(joined) == has_state(row)


@pytest.mark.sampled
@rows
def test_batches_of_parameters_and_of_tasks(row, joined):
    batch, xs = [{name: torch.randn(3, *shape).double() for name, shape in zip("abcdefg", SHAPES, strict=True)}] * 2
    tolerance = {"rtol": row.tolerance, "atol": row.tolerance}

    def loss(params, x):
        return sum((leaf * factor).square().sum() for leaf, factor in zip(params.values(), x.values(), strict=True))

    def two_steps(params, x):
        tx = row()
        state = tx.init(params)
        for _ in range(2):
            extras = {"value": loss(params, x), "value_fn": lambda params: loss(params, x)}
            names = {name for link in tx._links for name in link.rule.extras.names}
            given = {name: extras[name] for name in names & extras.keys()}
            updates, state = tx.update(torch.func.grad(loss)(params, x), state, params, **given)
            params = fo.apply_updates(params, updates)
        return params, state

    def results():
        shared = {name: leaf[0] for name, leaf in batch.items()}
        return torch.vmap(two_steps)(batch, xs), torch.vmap(two_steps, (None, 0))(shared, xs)

    assert_close(*both_ways(joined, results), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128])
def test_dtypes(dtype, joined):
    params = {name: torch.randn(shape, dtype=dtype) for name, shape in zip("abcdefg", SHAPES, strict=True)}
    grads = fo.tree.map(torch.randn_like, params)
    tx = fo.adamw(0.1)

    def results():
        def moved(grads):
            updates, state = tx.update(grads, tx.init(params), params)
            leaves = fo.tree.flatten((updates, fo.tree.get(state, "exp_avg")))[0]
            return sum(leaf.abs().sum().float() for leaf in leaves), updates

        gradient, updates = torch.func.grad(moved, has_aux=True)(grads)
        assert all(leaf.dtype == dtype for leaf in fo.tree.flatten((gradient, updates))[0])
        return gradient, updates

    assert_close(*both_ways(joined, results), rtol=0, atol=0)
    assert joined


def test_duals_without_torch_func(joined):
    params = [torch.randn(shape).double() for shape in SHAPES]
    lr, tangents = torch.tensor(0.1, dtype=torch.float64), [torch.randn_like(p) for p in params]

    def results():
        with forward_ad.dual_level():
            tx = fo.adam(forward_ad.make_dual(lr, torch.ones_like(lr)))
            grads = [forward_ad.make_dual(p, t) for p, t in zip(params, tangents, strict=True)]
            updates, _ = tx.update(grads, tx.init(params))
            return [tuple(forward_ad.unpack_dual(update)) for update in updates]

    assert_close(*both_ways(joined, results), rtol=0, atol=0)
    assert joined


def test_backward_of_backward(joined):
    begin = [torch.randn(shape).double() for shape in SHAPES]

    def results():
        leaves = [p.clone().requires_grad_() for p in begin]
        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        params, tx = leaves, fo.adam(rate)
        state = tx.init(params)
        for _ in range(3):
            grads = torch.autograd.grad(sum(p.sin().sum() for p in params), params, create_graph=True)
            params, state = fo.step(tx, list(grads), state, params)
        first = torch.autograd.grad(sum(p.square().sum() for p in params), [*leaves, rate], create_graph=True)
        return first, torch.autograd.grad(sum(g.sin().sum() for g in first), [*leaves, rate])

    assert_close(*both_ways(joined, results), rtol=1e-12, atol=1e-13)
    assert joined["flat"] == 3


# What is joined, and what not. ----------------------------------------------------------------------------------------


def nodes(outputs):
    """Count the nodes of the graph that autograd has made."""
    seen, pending = set(), [output.grad_fn for output in outputs]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [node for node, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("shapes", [[(2, 2)] * 8, [(n,) for n in range(8)]], ids=["alike", "vectors"])
def test_there_is_no_node_for_each_tensor_but_where_it_comes_in(shapes, joined):
    def count(shapes):
        params = [torch.ones(shape, requires_grad=True) for shape in shapes]
        tx = fo.adam(0.1)
        updates, state = tx.update(params, tx.init(params))
        return nodes([*updates, *fo.tree.get(state, "exp_avg")])

    ours, others = both_ways(joined, lambda: (count(shapes), count(2 * shapes)))
    assert ours[1] - ours[0] == len(shapes)  # one leaf each
    assert others[1] - others[0] > 8 * len(shapes)


def is_joined(joined, tx, params, transform=lambda function: function):
    joined.clear()
    transform(lambda params: tx.update(params, tx.init(params), params)[0])(params)
    return bool(joined)


def weighted(weight):
    """Make a rule whose number may be several."""

    def update(g, state, p, s):
        return s * g, MeanState(state.mean + s * g)

    return fo.leafwise(MeanState, update, lambda step: weight, elementwise=True)


@pytest.mark.sampled(pool="long")
def test_when_tensors_are_joined(joined, monkeypatch):
    joined.join(on=True)
    tx, params = fo.adam(0.1), [torch.ones(2), torch.ones(3)]

    def graded(count):
        return [torch.ones(2, requires_grad=True) for _ in range(count)]

    assert is_joined(joined, tx, graded(2))
    assert not is_joined(joined, tx, graded(1))
    assert not is_joined(joined, tx, params)  # in blocks, for there is no derivative
    assert not is_joined(joined, fo.sgd(0.1), graded(2))
    assert not is_joined(joined, fo.chain(fo.adam(0.1), fo.clip_by_norm(1.0)), params)
    assert not is_joined(joined, fo.adam([0.1, 0.2]), graded(2))
    assert not is_joined(joined, weighted(torch.ones(2)), graded(2))
    assert is_joined(joined, weighted(torch.ones(())), graded(2))
    assert not is_joined(joined, tx, [torch.ones(module.SMALL + 1, requires_grad=True) for _ in range(2)])
    assert is_joined(joined, tx, params, lambda f: lambda p: torch.func.jvp(f, (p,), (p,)))
    assert is_joined(joined, tx, [p.expand(2, -1) for p in params], torch.vmap)
    assert not is_joined(joined, tx, params, lambda f: torch.compile(f, backend="eager"))
    monkeypatch.setattr(module, "MANY", 3)
    assert not is_joined(joined, tx, graded(2))
    assert is_joined(joined, tx, graded(3))


def test_large_tensors_stay_where_they_are(joined, monkeypatch):
    monkeypatch.setattr(module, "SMALL", 3)
    params = [torch.randn(shape, requires_grad=True) for shape in ((2,), (4,), (3,), (2, 3), (1,), (2, 2))]
    tx = fo.adam(0.1)
    assert_close(*both_ways(joined, lambda: tx.update(params, tx.init(params))), rtol=0, atol=0)
    assert joined["flat"] == 1


class Subclass(torch.Tensor):
    """A tensor of another type."""


def test_what_differs_is_not_joined(joined):
    """It would become alike: an update would depend on more, or be batched, and have to be returned so."""
    joined.join(on=True)
    constant, wanted = torch.ones(2), torch.ones(2, requires_grad=True)
    updates, _ = fo.adam(0.1).update([constant, wanted], fo.adam(0.1).init([constant, wanted]))
    assert [update.requires_grad for update in updates] == [False, True]

    def shared(a, b):
        tx = fo.adam(0.1)
        return tx.update({"a": a, "b": b}, tx.init({"a": a, "b": b}))[0]

    updates = torch.vmap(shared, (0, None), {"a": 0, "b": None})(torch.ones(3, 2), torch.ones(2))
    assert (updates["a"].shape, updates["b"].shape) == ((3, 2), (2,))
    subclass = [torch.ones(2, requires_grad=True).as_subclass(Subclass) for _ in range(2)]
    fo.adam(0.1).update(subclass, fo.adam(0.1).init(subclass))
    assert not joined


def test_results_are_nobody_elses_memory(joined):
    """Autograd forbids to write to views of which there are several."""
    joined.join(on=True)
    params = [torch.ones(shape, requires_grad=True) for shape in SHAPES]
    tx = fo.adam(0.1)
    new, state = fo.step(tx, params, tx.init(params), params)
    assert joined
    expected = [2 * leaf.detach() for leaf in fo.tree.flatten((new, fo.tree.get(state, "exp_avg")))[0]]
    for leaf in fo.tree.flatten((new, fo.tree.get(state, "exp_avg")))[0]:
        leaf.mul_(2)
        assert not leaf._is_view()
    assert_close(fo.tree.flatten((new, fo.tree.get(state, "exp_avg")))[0], expected, rtol=0, atol=0)
    torch.autograd.grad(sum(leaf.sum() for leaf in new), params)


@given(st.lists(st.sampled_from(sorted({*SHAPES, (5,), (2, 1, 3)})), min_size=2, max_size=8), st.integers(1, 6))
def test_parts_of_what_is_joined_are_what_was_joined(shapes, small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SMALL", small)
        tensors = [torch.randn(shape) for shape in shapes]
        if all(tensor.numel() > small for tensor in tensors):
            return
        ends = module._Ends(tensors)
        joined = ends.joined(tensors)
        assert len(joined) == 1 + sum(tensor.numel() > small for tensor in tensors)
        assert_close(ends.parted(joined), tensors, rtol=0, atol=0)


def test_training_is_that_of_the_catalogue(joined):
    """As users write it: the properties of the catalogue are tested of what is joined."""
    row = next(row for row in CATALOGUE if row.name == "adam")
    params = {"layer": {"weight": torch.randn(2, 2), "bias": torch.randn(2), "scale": torch.randn(())}}
    params["rest"] = [torch.randn(2)]
    joined.join(on=True)
    torch.func.grad(lambda params: sum(leaf.sum() for leaf in fo.tree.flatten(train(row(), params, 1.0)[0])[0]))(params)
    assert joined["flat"] == 4
