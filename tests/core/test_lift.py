"""The lift: every kind of tree, missing gradients, extras, saving."""

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

pytestmark = pytest.mark.smoke


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
    """DTensors stay DTensors, whose whole tensors are those of one process."""
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

    scale = fo.leafwise(init=None, update=update, scalars=lambda step: 2 * step)
    g = torch.randn(2, 2, dtype=torch.complex64)
    updates, _ = scale.update(g, scale.init(g))
    assert seen == [((2, 2), torch.complex64)]
    assert torch.equal(updates, 2 * g)


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


def test_extras_of_things_that_are_not_plain_functions():
    def update(factor, updates, state, params, *, value, offset=0.0):
        return fo.tree.map(lambda u: factor * u + value + offset, updates), state

    tx = fo.GradientTransformation(lambda params: (), functools.partial(update, 2.0))
    assert tx.update(ones(1), (), value=3.0)[0] == 5
    with pytest.raises(TypeError, match="partial needs the extra 'value'"):
        tx.update(ones(1), ())
    with pytest.raises(TypeError, match="extra 'valeu', which nothing in the chain declares"):
        tx.update(ones(1), (), valeu=3.0)


def test_it_really_is_a_pair():
    init, update = fo.sgd(0.1)
    updates, _ = update(PARAMS, init(PARAMS))
    assert torch.equal(updates["c"][0], -0.1 * PARAMS["c"][0])


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
