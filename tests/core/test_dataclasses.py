"""Plain dataclasses are trees; those that can be called, or are tensors or containers, are not."""

import dataclasses
from typing import Any

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo


@dataclasses.dataclass
class Weights:
    kernel: torch.Tensor
    bias: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    weights: Weights
    scale: torch.Tensor
    name: str = dataclasses.field(default="frozen", metadata={"pytree_node": False})

    def __post_init__(self):
        assert isinstance(self.scale, torch.Tensor)  # a constructor that checks is not asked


def make(cls):
    weights = Weights(torch.tensor([1.0, -2.0]), torch.tensor([0.5]))
    return weights if cls is Weights else Frozen(weights, torch.tensor(3.0), "here")


def as_dict(params):
    plain = dataclasses.asdict(params)
    plain.pop("name", None)
    return plain


@pytest.mark.parametrize("cls", [Weights, Frozen])
def test_steps(cls):
    tx, params = fo.adamw(0.1, weight_decay=0.1), make(cls)
    expected, state, expected_state = as_dict(params), tx.init(params), tx.init(as_dict(params))
    for step in (fo.step, fo.step_):
        grads = fo.tree.map(torch.sin, params)
        params, state = step(tx, grads, state, params)
        expected, expected_state = step(tx, fo.tree.map(torch.sin, expected), expected_state, expected)
        assert type(params) is cls
        assert getattr(params, "name", "here") == "here"
        assert_close(as_dict(params), expected)
    assert set(fo.state_dict(state)) == set(fo.state_dict(expected_state))


def test_nested_first_meeting():
    """Classes that are first met inside of one another, and by any function."""

    @dataclasses.dataclass
    class Inner:
        w: torch.Tensor

    @dataclasses.dataclass
    class Outer:
        inner: Inner
        rest: list

    tree = {"a": Outer(Inner(torch.ones(1)), [torch.ones(2)])}
    assert fo.tree.paths(tree) == ["a.inner.w", "a.rest.0"]
    assert_close(fo.tree.map(lambda t: 2 * t, tree)["a"].inner.w, torch.full((1,), 2.0))


def test_as_hyperparameters_and_masks():
    params, grads = make(Weights), fo.tree.map(torch.ones_like, make(Weights))
    updates, _ = fo.sgd(Weights(0.1, 0.2)).update(grads, fo.sgd(Weights(0.1, 0.2)).init(params), params)
    assert_close(as_dict(updates), {"kernel": torch.full((2,), -0.1), "bias": torch.full((1,), -0.2)})
    tx = fo.masked(fo.scale(3.0), Weights(True, False))
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(as_dict(updates), {"kernel": torch.full((2,), 3.0), "bias": torch.ones(1)})


def test_what_can_be_called_is_a_schedule():
    @dataclasses.dataclass
    class Halving:
        start: float

        def __call__(self, step):
            return self.start * 0.5**step

    tx, params = fo.sgd(Halving(1.0)), torch.zeros(1)
    state = tx.init(params)
    for _ in range(2):
        params, state = fo.step(tx, torch.ones(1), state, params)
    assert_close(params, torch.tensor([-1.5]))


def test_errors_name_the_field():
    with pytest.raises(TypeError, match=r"parameter at 'bias' is a float, not a tensor"):
        fo.adam().init(Weights(torch.ones(1), 0.0))
    params = make(Weights)
    with pytest.raises(ValueError, match="at the root, params has a Weights and updates has a dict"):
        fo.sgd(0.1).update(as_dict(params), fo.sgd(0.1).init(params), params)


@pytest.mark.sampled(pool="compiled")
def test_compiled():
    tx, params = fo.adam(0.1), make(Frozen)
    state = tx.init(params)

    def train(params, state):
        return fo.step(tx, fo.tree.map(torch.ones_like, params), state, params)

    compiled = torch.compile(train, fullgraph=True, backend="eager")
    assert_close(as_dict(compiled(params, state)[0]), as_dict(train(params, state)[0]), rtol=1e-6, atol=1e-7)
