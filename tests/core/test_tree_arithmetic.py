"""Arithmetic with trees: numbers of numpy, derivatives, transforms, and what is said about trees that do not match."""

import numpy as np
import pytest
import torch

import functorch_optim as fo

T = fo.tree


def make(dtype=torch.float64, seed=0, missing=True):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    return {
        "w": random(3, 2),
        "rest": [random(4), random()],
        "none": None if missing else random(2),
        "empty": random(0),
    }


def as_numpy(tree):
    return np.concatenate([leaf.numpy().reshape(-1) for leaf in T.flatten(tree)[0] if leaf is not None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_numbers_are_those_of_numpy(dtype):
    a, b = make(dtype, 0), make(dtype, 1)
    x, y = as_numpy(a), as_numpy(b)
    np.testing.assert_allclose(as_numpy(T.add(a, b, a)), x + y + x)
    np.testing.assert_allclose(as_numpy(T.sub(a, b)), x - y)
    np.testing.assert_allclose(as_numpy(T.scale(-0.3, a)), -0.3 * x)
    np.testing.assert_allclose(T.vdot(a, b).item(), np.vdot(x, y))
    for order in (1.0, 2.0, 3.0, float("inf")):
        np.testing.assert_allclose(T.norm(a, order).item(), np.linalg.norm(x, order))
    assert not np.allclose(np.vdot(x, y), np.vdot(y, x)) or dtype == torch.float64  # that conjugation would be seen
    np.testing.assert_allclose(as_numpy(T.ravel(a)[0]), x)


def test_a_missing_leaf_is_a_zero():
    a, b = {"x": torch.tensor(1.0), "y": None, "z": None}, {"x": None, "y": torch.tensor(2.0), "z": None}
    assert T.add(a, b) == {"x": 1.0, "y": 2.0, "z": None}
    assert T.sub(a, b) == {"x": 1.0, "y": -2.0, "z": None}
    assert T.vdot(a, b) == 0
    assert T.norm(b) == 2
    assert T.scale(2.0, a) == {"x": 2.0, "y": None, "z": None}
    assert T.zeros_like(a) == {"x": 0.0, "y": None, "z": None}
    assert T.where(True, a, a) == a


@pytest.mark.parametrize("empty", [{}, None, {"a": None}, {"a": fo.MaskedNode()}, ()])
def test_trees_without_tensors(empty):
    assert T.add(empty, empty) == T.sub(empty, empty) == T.scale(2.0, empty) == T.zeros_like(empty) == empty
    assert T.norm(empty) == T.vdot(empty, empty) == 0
    vector, unravel = T.ravel(empty)
    assert vector.shape == (0,)
    assert unravel(vector) == empty


def test_integers():
    tree = {"n": torch.tensor([3, 4]), "m": torch.tensor(12)}
    assert T.vdot(tree, tree) == 169
    assert T.vdot(tree, tree).dtype == torch.int64
    assert T.norm(tree) == 13
    assert T.norm(tree).dtype == torch.float32
    assert T.scale(2, tree)["n"].dtype == torch.int64
    assert T.scale(0.5, tree)["n"].tolist() == [1.5, 2.0]
    vector, unravel = T.ravel({"x": torch.tensor([0.5]), **tree})
    assert vector.dtype == torch.float32
    assert [leaf.dtype for leaf in T.flatten(unravel(vector))[0]] == [torch.int64, torch.int64, torch.float32]


def test_half_precision_is_summed_in_float32():
    tree = {"w": torch.full((100_000,), 0.1, dtype=torch.bfloat16)}
    assert T.vdot(tree, tree).dtype == T.norm(tree).dtype == torch.float32
    exact = as_numpy(T.cast(tree, torch.float64))
    np.testing.assert_allclose(T.vdot(tree, tree).item(), exact @ exact, rtol=1e-3)
    assert T.scale(torch.tensor(0.3, dtype=torch.float64), tree)["w"].dtype == torch.bfloat16


def test_cast_converts_what_has_fractions():
    tree = {"w": torch.ones(2), "c": torch.ones(2, dtype=torch.complex64), "n": torch.tensor(3), "none": None}
    wide = T.cast(tree, torch.float64)
    assert [wide[name].dtype for name in ("w", "c", "n")] == [torch.float64, torch.complex128, torch.int64]
    assert wide["none"] is None
    assert T.cast(tree, torch.float32)["w"] is tree["w"]
    with pytest.raises(TypeError, match=r"floating-point or complex dtype, got torch\.int64"):
        T.cast(tree, torch.int64)


def test_where_lets_nothing_through_that_is_not_chosen():
    a, b = {"w": torch.tensor([1.0, torch.nan])}, {"w": torch.tensor([torch.inf, 2.0])}
    condition = torch.tensor([True, False])
    assert T.where(condition, a, b)["w"].tolist() == [1.0, 2.0]
    assert T.where({"w": condition}, a, b)["w"].tolist() == [1.0, 2.0]
    assert T.where(False, a, b) == b

    def chosen(x):
        return T.where(condition, {"w": 2 * x}, {"w": 3 * x})["w"].sum()

    assert torch.func.grad(chosen)(torch.zeros(2)).tolist() == [2.0, 3.0]


def test_ravel_and_back():
    tree = make()
    vector, unravel = T.ravel(tree)
    again = unravel(vector)
    assert T.paths(again) == T.paths(tree)
    assert all(torch.equal(a, b) for a, b in zip(T.flatten(again)[0], T.flatten(tree)[0], strict=True) if a is not None)
    with pytest.raises(ValueError, match=r"unravel takes a vector of shape \(11,\), got one of shape \(3,\)"):
        unravel(torch.zeros(3))
    with pytest.raises(ValueError, match="type dict"):
        unravel(tree)
    mixed = {"c": torch.ones(2, dtype=torch.complex64), "r": torch.ones(1)}
    vector, unravel = T.ravel(mixed)
    assert vector.dtype == torch.complex64
    assert unravel(vector)["r"].dtype == torch.float32


def everything(a, b, s, condition):
    vector, unravel = T.ravel(T.add(T.scale(s, a), T.sub(b, a), None if a is None else a))
    tree = T.where(condition, unravel(vector.sin()), T.zeros_like(b))
    return T.vdot(tree, a) + T.norm(tree) + T.norm(T.cast(tree, torch.float64), 1.0)


def arguments():
    return make(seed=0, missing=False), make(seed=1, missing=False), torch.tensor(0.7, dtype=torch.float64)


def test_derivatives_are_those_of_finite_differences():
    a, b, s = arguments()
    (flat, unravel), yes = T.ravel((a, b, s)), torch.tensor(True)

    def function(vector):
        return everything(*unravel(vector), yes)

    flat.requires_grad_()
    assert torch.autograd.gradcheck(function, flat, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, flat)
    assert torch.func.grad(T.norm)({"w": torch.zeros(2)})["w"].tolist() == [0.0, 0.0]


def test_vmap_is_a_loop():
    trees = [arguments() for _ in range(1)] + [
        (make(seed=5, missing=False), make(seed=6, missing=False), torch.tensor(-1.0).double())
    ]
    conditions = torch.tensor([True, False])
    stacked = T.map(lambda *rows: torch.stack(rows), *trees)
    batched = torch.vmap(everything)(*stacked, conditions)
    looped = torch.stack([everything(*tree, c) for tree, c in zip(trees, conditions, strict=True)])
    torch.testing.assert_close(batched, looped)


@pytest.mark.sampled(pool="compiled")
def test_compiled_whole():
    a, b, s = arguments()
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(a, b, s, torch.tensor(True)), everything(a, b, s, torch.tensor(True)))


# Errors. --------------------------------------------------------------------------------------------------------------

BINARY = {"add": T.add, "sub": T.sub, "vdot": T.vdot, "where": lambda a, b: T.where(True, a, b)}
binary = pytest.mark.parametrize(("name", "function"), BINARY.items(), ids=BINARY)


@binary
def test_structures_that_differ(name, function):
    with pytest.raises(ValueError, match=f"tree 2 of {name} and the first tree do not match: 'layer.b' is missing"):
        function({"layer": {"a": torch.ones(1), "b": torch.ones(1)}}, {"layer": {"a": torch.ones(1)}})


@binary
def test_shapes_that_differ_do_not_broadcast(name, function):
    with pytest.raises(ValueError, match=rf"{name} is given at 'layer\.a' have shapes \(2, 1\) and \(2,\)"):
        function({"layer": {"a": torch.ones(2, 1)}}, {"layer": {"a": torch.ones(2)}})


@pytest.mark.parametrize("function", [T.add, T.norm, T.zeros_like, T.ravel, lambda tree: T.scale(1.0, tree)])
def test_leaves_that_are_no_tensors(function):
    with pytest.raises(TypeError, match="but there is a str at 'layer.name'"):
        function({"layer": {"name": "x", "w": torch.ones(1)}})


def test_numbers_are_no_tensors_of_ravel():
    with pytest.raises(TypeError, match="ravel takes tensors, but there is a float at 'a'"):
        T.ravel({"a": 1.0})


def test_the_number_comes_first_in_scale():
    with pytest.raises(TypeError, match=r"a number first, got a dict; write fo\.tree\.scale\(0\.5, tree\)"):
        T.scale({"a": torch.ones(1)}, 0.5)
    with pytest.raises(TypeError, match=r"got a tensor of shape \(2,\)"):
        T.scale(torch.ones(2), {"a": torch.ones(2)})


def test_an_order_that_is_none():
    with pytest.raises(ValueError, match="Invalid norm order: 0; a norm needs ord > 0"):
        T.norm({"a": torch.ones(1)}, 0)


def test_conditions_that_do_not_fit():
    tree = {"a": torch.ones(2)}
    with pytest.raises(TypeError, match=r"condition of where for 'a' is a torch\.float32 tensor; give a bool"):
        T.where(torch.ones(2), tree, tree)
    with pytest.raises(TypeError, match="condition of where for 'a' is a int"):
        T.where(1, tree, tree)
    with pytest.raises(
        ValueError, match=r"for 'a' has shape \(3,\), which does not broadcast to that of the leaf, \(2,\)"
    ):
        T.where(torch.ones(3) > 0, tree, tree)
    with pytest.raises(ValueError, match=r"has shape \(3, 2\), which does not broadcast"):
        T.where(torch.ones(3, 2) > 0, tree, tree)
    with pytest.raises(ValueError, match="At 'a' one tree of where has None"):
        T.where(True, tree, {"a": None})
    with pytest.raises(ValueError, match="the conditions of where and the first tree do not match"):
        T.where({"b": True}, tree, tree)
