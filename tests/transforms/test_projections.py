"""Projections give the nearest point of their set, with exact derivatives."""

from functools import partial

import numpy as np
import pytest
import torch

import functorch_optim as fo
from functorch_optim import projections


def double(x):
    return torch.tensor(x, dtype=torch.float64)


NORMAL = {"a": double([[1.0, -2.0], [0.5, 0.0]]), "b": double([3.0])}
ALL = {
    "nonnegative": (projections.nonnegative, lambda x: [x]),
    "box": (partial(projections.box, lower=-0.3, upper={"a": 0.2, "b": 0.1}), None),
    "linf_ball": (partial(projections.linf_ball, scale=0.4), lambda x: [0.4 - x, 0.4 + x]),
    "l2_ball": (partial(projections.l2_ball, scale=0.7), lambda x: [0.49 - (x**2).sum()]),
    "sphere": (partial(projections.sphere, scale=0.7), lambda x: ["=", (x**2).sum() - 0.49]),
    "simplex": (partial(projections.simplex, scale=0.8), lambda x: [x, "=", x.sum() - 0.8]),
    "halfspace": (partial(projections.halfspace, normal=NORMAL, offset=-0.5), lambda x: [-0.5 - x @ flat(NORMAL)]),
}
L1 = partial(projections.l1_ball, scale=0.8)
each = pytest.mark.parametrize("name", [*ALL, "l1_ball"])


def projection_of(name):
    return L1 if name == "l1_ball" else ALL[name][0]


def flat(tree):
    return torch.cat([leaf.flatten() for leaf in fo.tree.flatten(tree)[0]]).numpy()


def example(scale=2.0):
    return {"a": scale * torch.randn(2, 2, dtype=torch.float64), "b": scale * torch.randn(1, dtype=torch.float64)}


@pytest.mark.parametrize("name", [name for name in ALL if name != "box"])
def test_it_is_the_nearest_point_that_a_solver_finds(name):
    optimize = pytest.importorskip("scipy.optimize")
    project, constraints = ALL[name]
    for _ in range(5):
        x = example()
        found, given = flat(project(x)), flat(x)
        kinds, kind = [], "ineq"
        for k, entry in enumerate(constraints(given)):
            if isinstance(entry, str):
                kind = "eq"
            else:
                kinds.append({"type": kind, "fun": lambda y, k=k: constraints(y)[k]})
        solved = optimize.minimize(
            lambda y, given=given: ((y - given) ** 2).sum(),
            found + 0.01,
            jac=lambda y, given=given: 2 * (y - given),
            constraints=kinds,
            method="SLSQP",
            options={"maxiter": 1000, "ftol": 1e-15},
        )
        np.testing.assert_allclose(found, solved.x, atol=1e-6)
        assert not np.allclose(given, solved.x, atol=1e-3) or name in ("nonnegative", "l2_ball", "halfspace")


def test_a_box_clamps_to_the_bounds_of_each_leaf():
    x = example()
    y = ALL["box"][0](x)
    np.testing.assert_array_equal(y["a"], np.clip(x["a"].numpy(), -0.3, 0.2))
    np.testing.assert_array_equal(y["b"], np.clip(x["b"].numpy(), -0.3, 0.1))


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_the_1_norm_of_what_is_outside_becomes_that_of_the_ball(size):
    """And the difference is as large, with the sign of x, wherever something is left: the conditions of optimality."""
    x = example(size)
    y, given = flat(L1(x)), flat(x)
    if np.abs(given).sum() <= 0.8:
        np.testing.assert_array_equal(y, given)
        return
    assert np.abs(y).sum() == pytest.approx(0.8)
    tau = (given - y)[y != 0] * np.sign(y[y != 0])
    np.testing.assert_allclose(tau, tau.max(), rtol=1e-9)
    assert (np.abs(given[y == 0]) <= tau.max() + 1e-12).all()


@each
def test_what_is_projected_stays(name):
    project = projection_of(name)
    once = project(example())
    np.testing.assert_allclose(flat(project(once)), flat(once), rtol=1e-12, atol=1e-14)


@pytest.mark.sampled(size=4)
@each
def test_derivatives_equal_finite_differences_in_both_modes_and_under_vmap(name):
    project = projection_of(name)

    def function(z):
        y = project({"a": z[:4].reshape(2, 2), "b": z[4:]})
        return torch.cat([y["a"].flatten(), y["b"]])

    for z in (torch.randn(5, dtype=torch.float64), double([0.25, 0.19, 0.11, 0.14, 0.05])):
        h = 1e-6
        eye = torch.eye(5, dtype=torch.float64)
        numeric = torch.stack([(function(z + h * e) - function(z - h * e)) / (2 * h) for e in eye], dim=1)
        for mode in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(mode(function)(z), numeric, rtol=1e-6, atol=1e-7)
    batch = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(function)(batch), torch.stack([function(z) for z in batch]))
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch[0]), function(batch[0]))


@pytest.mark.parametrize("name", ["linf_ball", "l1_ball", "l2_ball", "sphere", "simplex"])
def test_the_size_of_a_set_is_differentiated(name):
    x, h = example(3.0), 1e-6

    def function(scale):
        y = getattr(projections, name)(x, scale)
        return sum((leaf * torch.arange(1, leaf.numel() + 1).reshape(leaf.shape)).sum() for leaf in y.values())

    numeric = (function(double(0.8 + h)) - function(double(0.8 - h))) / (2 * h)
    torch.testing.assert_close(torch.func.grad(function)(double(0.8)), numeric, rtol=1e-6, atol=1e-8)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_none_and_zeros_are_kept(name, dtype):
    zeros = {"a": torch.zeros(2, 2, dtype=dtype), "b": torch.zeros(1, dtype=dtype)}
    y = projection_of(name)(zeros)
    assert {leaf.dtype for leaf in y.values()} == {dtype}
    if name not in ("box", "halfspace"):
        assert projection_of(name)({**zeros, "c": None})["c"] is None
    gradient = torch.func.grad(lambda x: sum(leaf.float().sum() for leaf in projection_of(name)(x).values()))(zeros)
    assert all(leaf.isfinite().all() for leaf in gradient.values())


def test_at_its_bounds_a_box_has_the_derivative_of_the_identity():
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        for bound in (0, 1):
            derivatives = mode(projections.box, argnums=(0, 1, 2))(double(float(bound)), double(0.0), double(1.0))
            assert derivatives == (1, 0, 0)


def test_to_zero_a_point_of_the_sphere_is_taken():
    y = projections.sphere(torch.zeros(4), 2.0)
    assert torch.equal(y, torch.ones(4))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_trees_without_elements_pass(scale):
    for project in (projections.l1_ball, projections.l2_ball, projections.linf_ball, projections.sphere):
        assert project({"a": torch.zeros(0, 2), "b": None}, scale)["a"].shape == (0, 2)
    assert not projections.l1_ball(torch.ones(3), 0.0).any()


def test_what_is_wrong_is_an_error():
    with pytest.raises(TypeError, match="does not support complex tensors; give it torch.view_as_real"):
        projections.simplex(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="Invalid scale: -1.0; it needs value >= 0"):
        projections.l2_ball(torch.ones(2), -1.0)
    with pytest.raises(ValueError, match="Invalid scale: 0.0; it needs value > 0"):
        projections.simplex(torch.ones(2), 0.0)
    with pytest.raises(ValueError, match="A tree without elements has no sum but 0"):
        projections.simplex(torch.ones(0))
    with pytest.raises(ValueError, match="upper do not fit the parameters"):
        projections.box({"a": torch.ones(2)}, 0.0, {"b": 1.0})
    with pytest.raises(ValueError, match=r"The normal has shape \(3,\) where the point has shape \(2, 3\)"):
        projections.halfspace(torch.ones(2, 3), torch.ones(3), 1.0)
    with pytest.raises(TypeError, match=r"The normal is torch.complex64 where the point is torch.float32; give a tree"):
        projections.halfspace(torch.ones(2), torch.ones(2, dtype=torch.complex64), 1.0)
    with pytest.raises(TypeError, match="The normal has a float where the point has a tensor; give a tree like it"):
        projections.halfspace(torch.ones(2), 1.0, 1.0)
    with pytest.raises(TypeError, match="Invalid scale: .* is a function; give a number, or a 0-dim tensor"):
        projections.l2_ball(torch.ones(2), lambda step: 1.0)
    for project in (projections.l2_ball, projections.simplex, projections.nonnegative):
        with pytest.raises(TypeError, match="A projection needs a tree of tensors, got a float in it"):
            project([torch.ones(2), 1.0])


@pytest.mark.parametrize(
    "project", [projections.l1_ball, projections.l2_ball, projections.linf_ball, projections.sphere]
)
def test_a_number_may_be_a_tensor_of_one_element(project):
    for x in (torch.tensor(3.0), torch.tensor([3.0, 4.0])):
        torch.testing.assert_close(project(x, torch.tensor([0.5])), project(x, 0.5))


def test_a_radius_may_be_too_large_for_half_precision():
    x = torch.tensor([-3.0, 4.0], dtype=torch.float16)
    for scale in (1e6, torch.tensor(1e6)):
        for project in (projections.linf_ball, projections.l1_ball, projections.l2_ball):
            assert torch.equal(project(x, scale), x)


@pytest.mark.parametrize("name", projections.__all__)
def test_tensors_of_integers_are_an_error(name):
    arguments = {"box": (0.0, 1.0), "halfspace": (torch.ones(2), 1.0)}.get(name, ())
    with pytest.raises(TypeError, match=r"A tensor of torch.int64 .* give it tensor.float\(\)"):
        getattr(projections, name)(torch.tensor([3, 4]), *arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_points_are_rounded_once(dtype):
    """Also where squares are out of range, and where differences of large numbers are taken."""
    large = torch.tensor([3.0, 4.0]).to(dtype) * (1e4 if dtype == torch.float16 else 1e30)
    some = [torch.tensor(x).to(dtype) for x in ([300.25, 300.0, 299.75], [12.0, 11.9, 11.8, 3.0], [1e4, -1e4])]
    for project, x in (
        (projections.l2_ball, large),
        (projections.sphere, large),
        *[(projections.simplex, near) for near in some],
        *[(projections.l1_ball, -near) for near in some],
        *[(lambda x: projections.halfspace(x, torch.ones_like(x), 1.0), near) for near in some],
    ):
        torch.testing.assert_close(project(x), project(x.double()).to(dtype), rtol=0, atol=0)
