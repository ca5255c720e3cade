"""Parts of trees by name and path: read, exchanged, and what is said where there is none or where there are several."""

from typing import Any, NamedTuple

import pytest
import torch

import functorch_optim as fo

T = fo.tree


class Pair(NamedTuple):
    left: Any
    right: Any


def state():
    tx = fo.partition({"a": fo.chain(fo.trace(0.9), fo.adam()), "b": fo.trace(0.5)}, {"x": "a", "y": "b"})
    return tx.init({"x": torch.ones(2), "y": torch.ones(3)})


def test_get_by_name_and_path():
    tree = state()
    assert T.get(tree, "exp_avg") is tree["a"][1][1].exp_avg
    assert T.get(tree, "momentum_buffer", path="b") is tree["b"].momentum_buffer
    assert T.get(tree, "b.momentum_buffer") is tree["b"].momentum_buffer
    assert T.get(tree, "0.momentum_buffer") is tree["a"][0].momentum_buffer
    assert T.get(tree, "momentum_buffer", path="a.0") is tree["a"][0].momentum_buffer
    assert T.get(tree, "exp_avg.x") is tree["a"][1][1].exp_avg["x"]
    assert T.get({"layer.weight": 1, "weight": 2}, "weight") == 2
    assert T.get({"layer.weight": 1}, "layer.weight") == 1
    assert T.get({"a": {"b": 1}, "x": {"a": {"b": 2}}}, "a.b") == 1  # the whole path of one


def test_none_and_several():
    with pytest.raises(KeyError, match="bears the name 'lr'; names in it are a, 0, step, momentum_buffer, "):
        T.get(state(), "lr")
    with pytest.raises(KeyError, match=r"2 nodes bear the name 'momentum_buffer': a\.0\.momentum_buffer, b\.mom"):
        T.get(state(), "momentum_buffer")
    with pytest.raises(KeyError, match="2 nodes bear the name"):
        T.set(state(), "momentum_buffer", torch.ones(2))
    with pytest.raises(KeyError, match="bears the name 'exp_avg'"):
        T.get(state(), "exp_avg", path="b")
    with pytest.raises(KeyError, match="bears the name 'c'"):
        T.get(state(), "exp_avg", path="c")
    with pytest.raises(KeyError, match="names in it are none"):
        T.get({}, "a")


def test_set_exchanges_one_part_and_copies():
    tree = state()
    value = torch.full((2,), 7.0, dtype=torch.float64)
    new = T.set(tree, "exp_avg.x", value)
    assert torch.equal(T.get(new, "exp_avg")["x"], value.float())
    assert T.get(tree, "exp_avg")["x"].tolist() == [0.0, 0.0]
    assert [a is b for a, b in zip(T.flatten(tree)[0], T.flatten(new)[0], strict=True)].count(False) == 1
    value32 = torch.ones(2)
    assert T.get(T.set(tree, "exp_avg.x", value32), "exp_avg.x") is not value32
    whole = T.set(tree, "exp_avg", {"x": torch.ones(2), "y": fo.MaskedNode()})
    assert T.get(whole, "exp_avg.x").tolist() == [1.0, 1.0]
    assert T.get(T.set(tree, "momentum_buffer.y", 2, path="b"), "momentum_buffer.y", path="b").tolist() == [2.0] * 3
    assert T.set(Pair(1, "x"), "right", "y") == Pair(1, "y")
    assert T.get(T.set(tree, "step", 4, path="b"), "step", path="b") == torch.tensor(4)
    assert T.set({"a": torch.tensor(1j)}, "a", 2j)["a"] == 2j
    assert T.set({"a": torch.tensor(1)}, "a", 3.0)["a"] == 3


def test_what_does_not_fit_is_not_set():
    tree = state()
    with pytest.raises(
        ValueError, match=r"value for 'a\.1\.1\.exp_avg\.x' has shape \(3,\), but the present one has \(2,\)"
    ):
        T.set(tree, "exp_avg.x", torch.ones(3))
    with pytest.raises(ValueError, match=r"the value and the node at 'a\.1\.1\.exp_avg' do not match: 'y' is missing"):
        T.set(tree, "exp_avg", {"x": torch.ones(2)})
    with pytest.raises(TypeError, match=r"value for 'b\.step' is torch\.float64, but the present one is torch\.int64"):
        T.set(tree, "step", 0.5, path="b")
    with pytest.raises(TypeError, match=r"is torch\.complex64, but the present one is torch\.float32"):
        T.set(tree, "exp_avg.x", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"value for 'exp_avg\.w' is a str"):
        T.set(fo.adam().init({"w": torch.ones(1)})[1], "exp_avg.w", "x")


def test_derivatives_flow_through_a_value_that_is_set():
    def squared(x):
        return T.norm(T.get(T.set({"a": torch.zeros(2), "b": torch.ones(1)}, "a", x), "a")) ** 2

    assert torch.func.grad(squared)(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert torch.vmap(squared)(torch.eye(2)).tolist() == [1.0, 1.0]
    assert torch.compile(squared, backend="eager", fullgraph=True)(torch.tensor([1.0, 2.0])) == 5
