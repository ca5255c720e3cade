"""Chains, masks and partitions, compared with their parts."""

import pytest
import torch

import functorch_optim as fo

pytestmark = pytest.mark.smoke


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def test_one_counter_for_a_chain():
    params = {"w": ones(2)}
    whole = fo.stateless(lambda updates, params: updates)
    tx = fo.chain(fo.chain(fo.scale(1.0), fo.trace(0.9)), whole, fo.clip_by_global_norm(1.0), fo.adam(0.1))
    _, state = tx.update(params, tx.init(params), params)
    steps = {id(leaf) for path, leaf in fo.state_dict(state).items() if path.endswith("step")}
    assert len(steps) == 1


def test_a_link_that_is_left_out_counts_for_itself_where_a_compiler_does_not_know_when():
    """All counters begin as one tensor."""
    params = {"w": ones(2)}
    doubling = fo.scale_by_schedule(lambda count: 2.0**count)
    tx = fo.chain(fo.scale_by_schedule(lambda count: 1.0 + 0 * count), fo.accumulate(doubling, 2))

    def four_updates(state):
        moved = []
        for _ in range(4):
            updates, state = tx.update(params, state, params)
            moved.append(updates["w"])
        return moved, state

    found, state = torch.compile(four_updates, backend="eager", fullgraph=True)(tx.init(params))
    assert [float(update[0]) for update in found] == [0.0, 1.0, 0.0, 2.0]
    assert (int(state[0].step), int(state[1][1].step)) == (4, 2)


def test_a_chain_is_its_links_one_after_the_other():
    params = {"w": ones(3), "b": ones(2)}
    links = [
        fo.clip_by_global_norm(0.5),
        fo.trace(0.9),
        fo.stateless(lambda u, p: fo.tree.map(torch.sin, u)),
        fo.adam(),
    ]
    tx = fo.chain(*links)
    states = [link.init(params) for link in links]
    state = tx.init(params)
    assert fo.tree.flatten(state)[1] == fo.tree.flatten(tuple(states))[1]
    for _ in range(3):
        grads = fo.tree.map(torch.randn_like, params)
        together, state = tx.update(grads, state, params)
        for i, link in enumerate(links):
            grads, states[i] = link.update(grads, states[i], params)
        for name in params:
            torch.testing.assert_close(together[name], grads[name], rtol=0, atol=0)


def test_an_empty_chain_is_the_identity():
    params = {"w": ones(2)}
    assert fo.chain().init(params) == ()
    updates, state = fo.chain().update(params, ())
    assert updates["w"] is params["w"]
    assert state == ()


def test_links_may_begin_anew_one_by_one():
    """A state is its links' states: one of them may be replaced, and then it counts for itself."""
    params = ones(1)
    tx = fo.chain(fo.scale_by_adam(), fo.scale_by_schedule(fo.schedules.linear(0.0, 1.0, 10)))
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state)
    fresh = (state[0], tx.init(params)[1])
    updates, after = tx.update(params, fresh)
    assert after[0].step == 4
    assert after[1].step == 1
    assert updates == 0  # the schedule's first value


def test_masks_as_tree_prefix_and_function():
    params = {"body": {"w": ones(2, 2), "b": ones(2)}, "head": ones(2)}
    full = {"body": {"w": True, "b": False}, "head": False}
    masks = [
        full,
        lambda params: full,
        lambda params: {"body": fo.tree.map(lambda p: p.ndim == 2, params["body"]), "head": False},
    ]
    for mask in masks:
        tx = fo.masked(fo.scale(3.0), mask)
        updates, _ = tx.update(params, tx.init(params))
        assert torch.equal(updates["body"]["w"], 3 * ones(2, 2))
        assert updates["body"]["b"] is params["body"]["b"]
    prefix = fo.masked(fo.scale(3.0), {"body": True, "head": False})
    updates, _ = prefix.update(params, prefix.init(params))
    assert torch.equal(updates["body"]["b"], 3 * ones(2))
    assert updates["head"] is params["head"]


def test_masks_meet():
    params = {"a": ones(1), "b": ones(1), "c": ones(1)}
    inner = fo.masked(fo.scale(2.0), {"a": True, "b": True, "c": False})
    tx = fo.masked(fo.chain(inner, fo.scale(5.0)), {"a": True, "b": False, "c": True})
    updates, _ = tx.update(params, tx.init(params))
    assert {name: update.item() for name, update in updates.items()} == {"a": 10, "b": 1, "c": 5}


def test_masks_by_function_where_leaves_are_missing():
    def vectors(params):
        return fo.tree.map(lambda p: p.ndim == 1, params)

    tx = fo.masked(fo.scale(2.0), vectors)
    updates, _ = tx.update({"a": None, "b": ones(1)}, tx.init({"a": ones(1), "b": ones(1)}))
    assert updates == {"a": None, "b": 2}
    partly = {"w": ones(2, 2), "b": None}
    tx = fo.adamw(0.1, mask=vectors)
    updates, _ = tx.update(partly, tx.init(partly), partly)
    assert updates["b"] is None


def test_a_partition_is_each_part_by_itself():
    params = {"a": ones(2), "b": {"c": ones(3), "d": ones(1)}}
    parts = {"x": fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1)), "y": fo.sgd(0.1, 0.9)}
    tx = fo.partition(parts, {"a": "x", "b": {"c": "y", "d": "x"}})
    state = tx.init(params)
    assert set(state) == {"x", "y"}
    alone = {"a": params["a"], "d": params["b"]["d"]}
    alone_state = parts["x"].init(alone)
    for _ in range(3):
        grads = fo.tree.map(torch.randn_like, params)
        updates, state = tx.update(grads, state, params)
        expected, alone_state = parts["x"].update({"a": grads["a"], "d": grads["b"]["d"]}, alone_state, alone)
        # The norm is that of the part.
        torch.testing.assert_close(updates["a"], expected["a"])
        torch.testing.assert_close(updates["b"]["d"], expected["d"])


def test_a_partition_of_parameters_that_a_rule_cannot_take():
    """A rule is not asked about leaves that it is not for."""

    def init(p):
        assert p.ndim == 2
        return ()

    matrices = fo.leafwise(init, lambda g, state, p, s: (g @ g.T @ g, state))
    params = {"w": ones(2, 2), "b": ones(2)}
    tx = fo.partition({2: matrices, 1: fo.sgd(0.1)}, lambda params: fo.tree.map(lambda p: p.ndim, params))
    updates, _ = tx.update(params, tx.init(params))
    assert torch.equal(updates["w"], 4 * ones(2, 2))


def test_labels_are_read_once_an_update():
    calls = []

    def labels(params):
        calls.append(1)
        return {"a": "x", "b": "y"}

    params = {"a": ones(1), "b": ones(1)}
    tx = fo.partition({"x": fo.adamw(0.1), "y": fo.sgd(0.1, 0.9)}, labels)
    state = tx.init(params)
    assert len(calls) == 1
    tx.update(params, state, params)
    assert len(calls) == 2


def test_freeze_keeps_parameters():
    params = {"body": {"w": ones(2)}, "head": ones(1)}
    tx = fo.chain(fo.adamw(0.1), fo.freeze({"body": True, "head": False}))
    updates, _ = tx.update(fo.tree.map(lambda p: p * torch.nan, params), tx.init(params), params)
    assert torch.equal(fo.apply_updates(params, updates)["body"]["w"], params["body"]["w"])
