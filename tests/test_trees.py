"""The lift: every kind of tree, missing gradients, masks and labels, and errors that name the path."""

import collections
import copy
import functools
import os
import pickle
from typing import NamedTuple

import optree
import pytest
import torch

import functorch_optim as fo


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Module:
    weight: torch.Tensor
    inner: dict


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


TREES = {
    "tensor": ones(2),
    "scalar": ones(),
    "zero_size": ones(0, 3),
    "dict": {"b": ones(2), "a": ones(1)},
    "nested": {"x": [ones(1), (ones(2), {"y": ones(3)})]},
    "ordered_dict": collections.OrderedDict(b=ones(2), a=ones(1)),
    "defaultdict": collections.defaultdict(list, a=ones(1)),
    "namedtuple": Layer(ones(2, 2), ones(2)),
    "dataclass": Module(ones(2), {"a": ones(1)}),
    "non_contiguous": {"a": ones(3, 4).t(), "b": ones(6)[::2]},
    "mixed_dtypes": {
        "a": ones(2),
        "b": ones(2).float(),
        "c": ones(2).bfloat16(),
        "d": torch.ones(2, dtype=torch.cfloat),
    },
    "empty": {},
    "empty_inside": {"a": [], "b": ones(2), "c": ()},
    "with_none": {"a": None, "b": ones(2)},
}
trees = pytest.mark.parametrize("params", TREES.values(), ids=TREES)
SOME = fo.chain(fo.clip_by_global_norm(1e6), fo.trace(0.5), fo.clip_by_norm(1e6), fo.adamw(0.1, weight_decay=0.1))


def leaf_by_leaf(tx, params, steps):
    """Train each leaf by itself: what a tree of them should do, when nothing looks at the whole tree."""

    def train(leaf):
        state = tx.init(leaf)
        for _ in range(steps):
            updates, state = tx.update(torch.full_like(leaf, 0.5), state, leaf)
            leaf = fo.apply_updates(leaf, updates)
        return leaf

    return fo.tree.map(train, params)


@trees
def test_every_tree(params, device):
    params = fo.tree.map(lambda p: p.to(device), params)
    expected = leaf_by_leaf(SOME, params, 3)
    state = SOME.init(params)
    for _ in range(3):
        updates, state = SOME.update(fo.tree.map(lambda p: torch.full_like(p, 0.5), params), state, params)
        params = fo.apply_updates(params, updates)
    assert type(params) is type(expected)
    left, right = fo.tree.flatten(params), fo.tree.flatten(expected)
    assert left[1] == right[1]
    for ours, theirs in zip(left[0], right[0], strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
            assert ours.dtype == theirs.dtype


@trees
def test_state_fields_are_built_like_the_parameters(params):
    state = fo.trace(0.9).init(params)
    assert type(state.momentum_buffer) is type(params)
    assert state.step.dtype == torch.int64
    assert state.step.ndim == 0


def test_leaves_on_several_devices():
    """The meta device stands for one that is not there."""
    params = {"a": ones(2), "b": torch.ones(3, device="meta"), "c": ones(2)}
    tx = fo.chain(fo.clip_by_norm(0.5), fo.adamw(fo.schedules.linear(0.1, 0.0, 5), weight_decay=0.1))
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["b"].device.type == "meta"
    alone = {"a": params["a"]}
    expected, _ = tx.update(alone, tx.init(alone), alone)
    torch.testing.assert_close(updates["a"], expected["a"])


def test_one_counter_for_a_chain():
    params = {"w": ones(2)}
    whole = fo.stateless(lambda updates, params: updates)
    tx = fo.chain(fo.chain(fo.scale(1.0), fo.trace(0.9)), whole, fo.clip_by_global_norm(1.0), fo.adam(0.1))
    _, state = tx.update(params, tx.init(params), params)
    steps = {id(leaf) for path, leaf in fo.state_dict(state).items() if path.endswith("step")}
    assert len(steps) == 1


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


def test_freeze_keeps_parameters():
    params = {"body": {"w": ones(2)}, "head": ones(1)}
    tx = fo.chain(fo.adamw(0.1), fo.freeze({"body": True, "head": False}))
    updates, _ = tx.update(fo.tree.map(lambda p: p * torch.nan, params), tx.init(params), params)
    assert torch.equal(fo.apply_updates(params, updates)["body"]["w"], params["body"]["w"])


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


def test_extras_reach_those_who_declare_them():
    def scalars(step, *, value):
        return value

    by_value = fo.leafwise(None, lambda g, state, p, value: (value * g, state), scalars)

    def update(updates, state, params, *, value, offset=0.0):
        return fo.tree.map(lambda u: u + value + offset, updates), state

    whole = fo.GradientTransformation(lambda params: (), update)
    tx = fo.partition({0: fo.chain(fo.masked(by_value, True), fo.scale(2.0), whole)}, 0)
    state = tx.init(ones(1))
    assert tx.update(ones(1), state, value=torch.tensor(3.0))[0] == 9
    assert tx.update(ones(1), state, value=torch.tensor(3.0), offset=1.0)[0] == 10
    with pytest.raises(TypeError, match="needs the extra 'value'.*value=..."):
        tx.update(ones(1), state)
    with pytest.raises(
        TypeError, match="extra 'vlaue', which nothing in the chain declares; declared are: offset, value"
    ):
        tx.update(ones(1), state, vlaue=3.0)


PARAMS = {"a": {"w": ones(2), "b": ones(3)}, "c": [ones(1)]}


def like_params(**changed):
    return {**PARAMS, **changed}


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a": PARAMS["a"]}, "'c' is missing from updates"),
        (like_params(d=ones(1)), "'d' is missing from params"),
        (like_params(a={"w": ones(2)}), "'a.b' is missing from updates"),
        (like_params(c=(ones(1),)), "at 'c', params has a list and updates has a tuple"),
        (like_params(c=ones(1)), "at 'c', params has a list and updates has a Tensor"),
        (like_params(c=[ones(2)]), r"updates have shape \(2,\) .* at 'c.0', but the parameter there has shape \(1,\)"),
        (like_params(c=[ones(1).float()]), r"dtype torch.float32 at 'c.0', but the parameter .*float64"),
        (like_params(c=[1.0]), "updates have a float at 'c.0', not a tensor"),
    ],
)
def test_updates_that_do_not_match(updates, message):
    tx = fo.sgd(0.1)
    with pytest.raises((ValueError, TypeError), match=message):
        tx.update(updates, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (like_params(c=[torch.ones(1, dtype=torch.int64)]), "parameter at 'c.0' has dtype torch.int64.*float()"),
        (like_params(c=[True]), "parameter at 'c.0' is a bool, not a tensor"),
    ],
)
def test_parameters_that_cannot_be_optimized(params, message):
    with pytest.raises(TypeError, match=message):
        fo.adam().init(params)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (fo.sgd(0.1).init(PARAMS), r"state should be a tuple of 3, but it is a tuple of 2"),
        (fo.named_chain(a=fo.scale(1.0)).init(PARAMS), "state should be a tuple of 3, but it is a dict with the keys"),
        (None, "state should be a tuple of 3, but it is a NoneType"),
        (fo.adadelta().init(PARAMS), "state of scale_by_adam is a ScaleByAdadeltaState: it belongs to another"),
        (fo.adam(amsgrad=True).init(PARAMS), "state of scale_by_adam is a ScaleByAMSGradState"),
        (fo.chain(fo.identity(), fo.scale_by_adam(), fo.scale(1.0)).init(PARAMS), "_decayed_weights is a EmptyState"),
        (fo.adam().init({"a": ones(1)}), "'c' is missing from the state's exp_avg"),
        (fo.adam().init(like_params(c=[ones(7)])), r"state's exp_avg .* shape \(7,\) .* at 'c.0'.*\(1,\)"),
    ],
)
def test_states_of_others(state, message):
    with pytest.raises(ValueError, match=message):
        fo.adam().update(PARAMS, state, PARAMS)


def test_states_of_other_named_parts():
    with pytest.raises(ValueError, match=r"dict with the keys \['a'\].*dict with the keys \['b'\]"):
        fo.named_chain(a=fo.scale(1.0)).update(PARAMS, fo.named_chain(b=fo.scale(1.0)).init(PARAMS))


def test_missing_parameters():
    tx = fo.adamw(0.1)
    with pytest.raises(
        ValueError, match=r"add_decayed_weights needs the parameters.*tx.update\(updates, state, params\)"
    ):
        tx.update(PARAMS, tx.init(PARAMS))
    without_decay = fo.adamw(0.1, weight_decay=0)
    without_decay.update(PARAMS, without_decay.init(PARAMS))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True}, "labels do not fit the parameters: at 'the root'"),
        ({"a": {"w": True}, "c": True}, r"at 'a' they have \['w'\] where the parameters have \['b', 'w'\]"),
        ({"a": True, "c": [True, True]}, "at 'c' they have"),
        ({"a": True, "c": "yes"}, "label 'yes' at 'c.0' is unknown; known are True, False"),
        (lambda params: {"a": True, "c": 2}, "label 2 at 'c.0' is unknown"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        fo.masked(fo.sgd(0.1), mask).init(PARAMS)


def test_labels_that_nothing_is_for():
    tx = fo.partition({"x": fo.sgd(0.1)}, {"a": "x", "c": ["y"]})
    with pytest.raises(ValueError, match="label 'y' at 'c.0' is unknown; known are 'x'"):
        tx.init(PARAMS)


def test_rules_that_change_shapes():
    sums = fo.leafwise(None, lambda g, state, p, s: (g.sum(), state))
    with pytest.raises(ValueError, match=r"update after .* has shape \(\) at 'a.b', but the one before has \(3,\)"):
        sums.update(PARAMS, sums.init(PARAMS))


def test_tree_transformations_that_change_trees():
    tx = fo.stateless(lambda updates, params: updates["a"])
    with pytest.raises(ValueError, match="the updates from stateless and updates do not match: 'a' is missing"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.chain(fo.sgd), TypeError, r"not a GradientTransformation; call it: chain\("),
        (lambda: fo.chain(fo.sgd(0.1), 3), TypeError, "3 is not a GradientTransformation; as in: chain"),
        (lambda: fo.named_chain(fo.sgd(0.1)), TypeError, "pairs of name and transformation"),
        (lambda: fo.named_chain(("a", fo.sgd(0.1)), a=fo.sgd(0.1)), ValueError, "name 'a' is given twice"),
        (lambda: fo.masked(fo.sgd, True), TypeError, "not a GradientTransformation; call it: masked"),
        (lambda: fo.partition({"a": fo.sgd}, "a"), TypeError, "not a GradientTransformation; call it: partition"),
        (lambda: fo.GradientTransformation(None, None), TypeError, "needs two functions, but init is a NoneType"),
        (lambda: fo.leaf_state(dict), TypeError, "must be a NamedTuple, got dict"),
        (lambda: fo.leaf_state(fo.StepState), TypeError, "has a field 'step', but the step is counted"),
        (lambda: fo.scale_by_schedule(0.1), TypeError, r"needs a function of the step, got 0.1; write scale\(0.1\)"),
        (lambda: fo.scale(float("nan")), ValueError, "Invalid factor: nan"),
        (lambda: fo.scale_by_learning_rate(-1.0), ValueError, "Invalid learning rate: -1.0; it needs value >= 0"),
        (lambda: fo.sgd(float("nan")), ValueError, "Invalid learning rate: nan"),
        (lambda: fo.sgd(momentum=-0.1), ValueError, "Invalid momentum value: -0.1"),
        (lambda: fo.sgd(weight_decay=-0.1), ValueError, "Invalid weight_decay value: -0.1"),
        (lambda: fo.sgd(nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (lambda: fo.sgd(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "Nesterov momentum requires"),
        (lambda: fo.sgd(lr="0.1"), TypeError, "Invalid learning rate: '0.1' is a str; give a number, a 0-dim tensor"),
        (
            lambda: fo.adam(betas=(1.0, 0.9)),
            ValueError,
            "Invalid beta parameter at index 0: 1.0; it needs 0 <= value < 1",
        ),
        (lambda: fo.adam(betas=(0.9, -0.1)), ValueError, "Invalid beta parameter at index 1: -0.1"),
        (lambda: fo.adam(betas=0.9), ValueError, "Invalid betas: 0.9; give a pair"),
        (lambda: fo.adam(eps=-1.0), ValueError, "Invalid epsilon value: -1.0"),
        (lambda: fo.adadelta(rho=1.1), ValueError, "Invalid rho value: 1.1"),
        (lambda: fo.adadelta(eps=-1.0), ValueError, "Invalid epsilon value: -1.0"),
        (lambda: fo.clip(-1.0), ValueError, "Invalid clip_value: -1.0"),
        (lambda: fo.clip_by_norm(-1.0), ValueError, "Invalid max_norm: -1.0"),
        (lambda: fo.clip_by_norm(1.0, 0.0), ValueError, "Invalid norm_type: 0.0; it needs value > 0"),
        (lambda: fo.clip_by_global_norm(1.0, eps=-1.0), ValueError, "Invalid eps: -1.0"),
        (lambda: fo.clip_by_global_norm(1.0, nonfinite="warn"), ValueError, "choose 'propagate', 'skip' or 'raise'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_updates_that_cannot_be_applied():
    with pytest.raises(ValueError, match="'c' is missing from updates"):
        fo.apply_updates(PARAMS, {"a": PARAMS["a"]})
    with pytest.raises(ValueError, match=r"updates have shape \(2,\) .* at 'c.0'"):
        fo.apply_updates(PARAMS, like_params(c=[ones(2)]))


def test_saved_states_of_others():
    state = fo.trace(0.9).init({"w": ones(2)})
    with pytest.raises(ValueError, match="the state has 'momentum_buffer.w', which the saved one lacks"):
        fo.load_state_dict(state, {"step": state.step})
    with pytest.raises(ValueError, match="the saved state has 'exp_avg.w', which this one lacks"):
        fo.load_state_dict(state, {**fo.state_dict(state), "exp_avg.w": ones(2)})
    with pytest.raises(ValueError, match=r"saved 'momentum_buffer.w' has shape \(3,\), but the state's has \(2,\)"):
        fo.load_state_dict(state, {**fo.state_dict(state), "momentum_buffer.w": ones(3)})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_norms(bad):
    grads = {"a": ones(2), "b": torch.tensor([1.0, bad], dtype=torch.float64)}

    def clipped(nonfinite):
        tx = fo.clip_by_global_norm(1.0, nonfinite=nonfinite)
        return tx.update(grads, tx.init(grads))[0]

    assert not torch.isfinite(clipped("propagate")["b"]).all()
    assert all((update == 0).all() for update in clipped("skip").values())
    with pytest.raises(RuntimeError, match=f"total norm of order 2.0 is {bad}, so it cannot be clipped"):
        clipped("raise")


def test_sharded_tensors():
    """DTensors go tensor by tensor, and stay DTensors."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    os.environ.setdefault("MASTER_ADDR", "localhost")
    store = torch.distributed.HashStore()
    init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain = {"w": torch.randn(4, 2), "b": torch.randn(2)}
        params = {
            "w": distribute_tensor(plain["w"], mesh, [Shard(0)]),
            "b": distribute_tensor(plain["b"], mesh, [Replicate()]),
        }
        tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(fo.schedules.linear(0.1, 0.0, 5), weight_decay=0.1))
        state, plain_state = tx.init(params), tx.init(plain)
        for _ in range(3):
            updates, state = tx.update(params, state, params)
            plain_updates, plain_state = tx.update(plain, plain_state, plain)
            params, plain = fo.apply_updates(params, updates), fo.apply_updates(plain, plain_updates)
        for name, param in params.items():
            assert isinstance(param, DTensor)
            torch.testing.assert_close(param.full_tensor(), plain[name])
        assert isinstance(state[1][0].exp_avg["w"], DTensor)
        assert state[1][0].exp_avg["w"].placements == (Shard(0),)
    finally:
        destroy_process_group()


def test_a_missing_subtree_is_named():
    params = {"a": {"x": ones(1), "y": ones(1)}, "b": ones(1)}
    tx = fo.masked(fo.scale(100.0), {"a": True, "b": False})
    with pytest.raises(ValueError, match="at 'a', params has a dict and updates has a NoneType"):
        tx.update({"a": None, "b": ones(1)}, tx.init(params), params)


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


def test_masks_of_tensors_are_refused():
    with pytest.raises(TypeError, match="label at 'a' is a tensor; masks and labels are python values"):
        fo.masked(fo.sgd(0.1), {"a": torch.tensor(True)}).init({"a": ones(1)})


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


def test_gradients_with_the_conjugate_bit():
    params = torch.randn(3, dtype=torch.complex128)
    grads = params.conj()
    assert grads.is_conj()
    for tx in (fo.adamw(0.1), fo.chain(fo.clip_by_norm(0.1), fo.sgd(0.1))):
        updates, _ = tx.update(grads, tx.init(params), params)
        expected, _ = tx.update(grads.resolve_conj(), tx.init(params), params)
        assert torch.equal(updates, expected)


def test_other_rules_see_complex_tensors_whole():
    seen = []

    def update(g, state, p, s):
        seen.append((g.shape, g.dtype))
        return s * g, state

    scale = fo.leafwise(None, update, lambda step: 2 * step)
    g = torch.randn(2, 2, dtype=torch.complex64)
    updates, _ = scale.update(g, scale.init(g))
    assert seen == [((2, 2), torch.complex64)]
    assert torch.equal(updates, 2 * g)


def test_states_of_other_dtypes():
    params = {"w": ones(2)}
    for tx in (fo.trace(0.9), fo.scale_by_adam()):
        state = tx.init({"w": ones(2).float()})
        with pytest.raises(ValueError, match="has shape .* dtype torch.float32 at 'w', but the update .*float64"):
            tx.update(params, state)
    precise = fo.tree.map(torch.Tensor.float, fo.trace(0.9).init({"w": ones(2).bfloat16()}).momentum_buffer)
    state = fo.trace(0.9).init({"w": ones(2).bfloat16()})._replace(momentum_buffer=precise)
    updates, state = fo.trace(0.9).update({"w": ones(2).bfloat16()}, state)
    assert state.momentum_buffer["w"].dtype == torch.float32
    assert updates["w"].dtype == torch.bfloat16


def test_batched_states_outside_of_vmap():
    state = torch.vmap(fo.adam().init)({"w": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"step in the state of .* has shape \(3,\)"):
        fo.adam().update({"w": torch.ones(3, 2)}, state)


def test_extras_of_decorated_functions():
    @torch.no_grad()
    def scalars(step, *, value, **others):
        return value * len(others)

    tx = fo.leafwise(None, lambda g, state, p, s: (s * g, state), scalars)
    assert tx.update(ones(1), tx.init(ones(1)), value=3.0, another=1, one_more=2)[0] == 6

    @torch.no_grad()
    def update(updates, state, params, *, value):
        return fo.tree.map(lambda u: value * u, updates), state

    tx = fo.GradientTransformation(lambda params: (), update)
    assert tx.update(ones(1), (), value=3.0)[0] == 3
    with pytest.raises(TypeError, match="extra 'valeu', which nothing in the chain declares; declared are: value"):
        tx.update(ones(1), (), valeu=3.0)


class MeanState(NamedTuple):
    mean: torch.Tensor


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda g, state, p, s: g, r"rule of <lambda> must return a pair, \(update, state\), but it returned"),
        (lambda g, state, p, s: (g, ()), r"must return a state like .* with mean, but it returned \(\)"),
        (lambda g, state, p, s: (g, None), "must return a state like .* with mean, but it returned None"),
    ],
)
@pytest.mark.parametrize("params", [{"a": ones(1)}, {"a": ones(1), "b": ones(2)}], ids=["one", "several"])
def test_rules_that_return_something_else(update, message, params):
    tx = fo.leafwise(MeanState, update, elementwise=True)
    with pytest.raises(TypeError, match=message):
        tx.update(params, tx.init(params))


def test_modules_are_not_trees():
    model = torch.nn.Linear(2, 2)
    for thing in (model, model.parameters()):
        with pytest.raises(TypeError, match=r"parameter at 'the root' is a .*dict\(model.named_parameters\(\)\)"):
            fo.adam().init(thing)


def test_paths_that_collide():
    state = fo.trace(0.9).init({"a.b": ones(1), "a": {"b": ones(1)}})
    with pytest.raises(ValueError, match="Two tensors of the state have the path 'momentum_buffer.a.b'"):
        fo.state_dict(state)


def test_saved_states_take_the_dtypes_of_those_they_are_loaded_into():
    state = fo.trace(0.9).init({"w": ones(2)})
    loaded = fo.load_state_dict(state, {"step": torch.tensor(3.0), "momentum_buffer.w": torch.ones(2)})
    assert (loaded.step, loaded.step.dtype, loaded.momentum_buffer["w"].dtype) == (3, torch.int64, torch.float64)


def test_states_without_a_step_pickle():
    tx = fo.leafwise(MeanState, lambda g, state, p, s: (g, MeanState(g)), elementwise=True)
    _, state = tx.update({"w": ones(2)}, tx.init({"w": ones(2)}))
    again = pickle.loads(pickle.dumps(state))
    assert type(again) is type(state)
    assert again._fields == ("mean",)
    assert torch.equal(again.mean["w"], ones(2))


def test_transformations_are_copied_as_what_they_are():
    lr = torch.tensor(0.1, requires_grad=True) * 2  # torch refuses to copy this one
    tx = fo.sgd(lr)
    assert copy.deepcopy(tx) is tx


def test_a_gradient_for_a_parameter_that_is_not_there():
    with pytest.raises(ValueError, match="updates have a tensor at 'b', but the parameter there is None"):
        fo.sgd(0.1).update({"a": ones(1), "b": ones(1)}, fo.sgd(0.1).init({"a": ones(1)}), {"a": ones(1), "b": None})


def test_extras_of_things_that_are_not_plain_functions():
    def update(factor, updates, state, params, *, value, offset=0.0):
        return fo.tree.map(lambda u: factor * u + value + offset, updates), state

    tx = fo.GradientTransformation(lambda params: (), functools.partial(update, 2.0))
    assert tx.update(ones(1), (), value=3.0)[0] == 5
    with pytest.raises(TypeError, match="partial needs the extra 'value'"):
        tx.update(ones(1), ())
    with pytest.raises(TypeError, match="extra 'valeu', which nothing in the chain declares"):
        tx.update(ones(1), (), valeu=3.0)


@pytest.mark.parametrize("lr", [torch.tensor(True), torch.tensor(1j)])
def test_tensors_that_are_no_real_numbers(lr):
    with pytest.raises(TypeError, match="Invalid learning rate: a tensor of dtype torch.(bool|complex64)"):
        fo.sgd(lr)


def test_it_really_is_a_pair():
    init, update = fo.sgd(0.1)
    updates, _ = update(PARAMS, init(PARAMS))
    assert torch.equal(updates["c"][0], -0.1 * PARAMS["c"][0])


def test_parameters_that_were_not_there_at_init():
    for tx in (fo.adam(0.1), fo.leafwise(MeanState, lambda g, state, p, s: (g, state))):
        with pytest.raises(ValueError, match="for .* has nothing at 'a': the parameter was None or masked out"):
            tx.update({"a": ones(1)}, tx.init({"a": None}), {"a": ones(1)})


def test_states_with_missing_leaves_are_saved_and_loaded():
    tx = fo.GradientTransformation(
        lambda params: fo.tree.map(torch.zeros_like, params), lambda updates, state, params: (updates, state)
    )
    state = tx.init({"a": ones(1), "b": None})
    assert list(fo.state_dict(state)) == ["a"]
    assert fo.load_state_dict(state, {"a": ones(1)}) == {"a": 1, "b": None}


def test_extras_of_a_wrapper_that_gives_them_itself():
    def update(updates, state, params, *, value):
        return fo.tree.map(lambda u: value * u, updates), state

    @functools.wraps(update)
    def with_value(updates, state, params):
        return update(updates, state, params, value=2.0)

    assert fo.GradientTransformation(lambda params: (), with_value).update(ones(1), ())[0][0] == 2


class CountedState(NamedTuple):
    counted: torch.Tensor


def test_state_fields_may_have_any_name():
    tx = fo.leafwise(CountedState, lambda g, state, p, s: (g, state))
    assert tx.init(ones(1)).counted == 0


def test_scalars_are_not_computed_for_nothing():
    def scalars(step, *, updates):
        return torch.stack(updates).sum()

    summed = fo.leafwise(None, lambda g, state, p, s: (g, state), scalars)
    tx = fo.partition({"x": summed, "y": fo.sgd(0.1)}, {"a": "x", "b": "y"})
    params = {"a": ones(1), "b": ones(1)}
    updates, _ = tx.update({"a": None, "b": ones(1)}, tx.init(params), params)
    assert updates["a"] is None
