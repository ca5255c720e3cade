"""Linear solvers over trees, against torch.linalg.solve."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functorch_optim.meta import (
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_dense,
    solve_gmres,
    solve_neumann,
    solve_normal_cg,
)

F64 = torch.float64
GENERAL = [solve_auto, solve_normal_cg, solve_gmres, solve_bicgstab, solve_dense]
ALL = [solve_cg, *GENERAL, functools.partial(solve_neumann, step_size=0.4, max_iter=500)]
EXACT = {"tol": 1e-13}


def name(solve):
    return getattr(solve, "func", solve).__name__


every = pytest.mark.parametrize("solve", ALL, ids=name)
general = pytest.mark.parametrize("solve", GENERAL, ids=name)


def spd(n, dtype=F64):
    """Symmetric (Hermitian), eigenvalues between 1 and 4."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=dtype))
    return (q * torch.linspace(1, 4, n, dtype=dtype)) @ q.mH


def unsymmetric(n, dtype=F64):
    return 2 * torch.eye(n, dtype=dtype) + torch.randn(n, n, dtype=dtype) / (2 * n**0.5)


def times(a):
    return lambda x: a @ x


def assert_close(x, expected, tolerance=1e-10):
    assert (x - expected).abs().max() <= tolerance * expected.abs().max()


# Numbers. -------------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_symmetric_systems(solve, n):
    a, b = spd(n), torch.randn(n, dtype=F64)
    assert_close(solve(times(a), b, **EXACT), torch.linalg.solve(a, b))


@general
@pytest.mark.parametrize("n", [2, 7, 40])
def test_unsymmetric_systems(solve, n):
    a, b = unsymmetric(n), torch.randn(n, dtype=F64)
    assert_close(solve(times(a), b, **EXACT), torch.linalg.solve(a, b))
    assert_close(solve(times(a), b), torch.linalg.solve(a, b), 1e-4)


@pytest.mark.parametrize("solve", [solve_auto, solve_normal_cg, solve_gmres, solve_dense], ids=name)
def test_indefinite_systems(solve):
    a = torch.block_diag(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]), torch.diag(torch.tensor([3.0, -1.0]))).to(F64)
    b = torch.randn(4, dtype=F64)
    assert_close(solve(times(a), b, **EXACT), torch.linalg.solve(a, b))


@every
def test_complex_systems(solve):
    a, b = spd(5, torch.complex128), torch.randn(5, dtype=torch.complex128)
    assert_close(solve(times(a), b, **EXACT), torch.linalg.solve(a, b))


@general
def test_operators_that_are_linear_over_the_reals_only(solve):
    b = torch.randn(5, dtype=torch.complex128)
    x = solve(lambda x: 2 * x + 1j * x.conj(), b, **EXACT)
    assert_close(2 * x + 1j * x.conj(), b)


@every
def test_trees_of_mixed_shapes_and_dtypes(solve):
    a = spd(3 + 4 + 2)
    b = {
        "w": torch.randn(3, dtype=F64),
        "deep": (torch.randn(2, 2, dtype=F64), None, torch.randn((), dtype=torch.complex128)),
    }

    def numbers(tree):
        (m, _, c) = tree["deep"]
        return torch.cat([tree["w"], m.reshape(4), torch.stack((c.real, c.imag))])

    def matvec(tree):
        y = a @ numbers(tree)
        return {"deep": (y[3:7].reshape(2, 2), None, torch.complex(y[7], y[8])), "w": y[:3]}

    x = solve(matvec, b, **EXACT)
    assert list(x) == ["w", "deep"]
    assert x["deep"][1] is None
    assert_close(numbers(x), torch.linalg.solve(a, numbers(b)))


@every
def test_ridge(solve):
    a, b = spd(4), torch.randn(4, dtype=F64)
    squared = solve is solve_normal_cg
    left, right = (a @ a, a @ b) if squared else (a, b)
    expected = torch.linalg.solve(left + 0.3 * torch.eye(4, dtype=F64), right)
    assert_close(solve(times(a), b, ridge=0.3, **EXACT), expected)


def test_normal_equations_give_least_squares_of_a_singular_operator():
    a = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=F64))
    assert solve_normal_cg(times(a), torch.ones(3, dtype=F64), **EXACT).tolist() == pytest.approx([0.5, 1, 0])


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**31))
def test_gmres_restarts(n, restart, seed):
    torch.manual_seed(seed)
    a, b = unsymmetric(n), torch.randn(n, dtype=F64)
    x = solve_gmres(times(a), b, restart=restart, max_iter=600, **EXACT)
    assert_close(x, torch.linalg.solve(a, b), 1e-9)


def test_neumann_adds_up_its_terms():
    a, b = spd(4) / 4, torch.randn(4, dtype=F64)
    terms = [0.5 * torch.linalg.matrix_power(torch.eye(4, dtype=F64) - 0.5 * a, k) @ b for k in range(6)]
    assert_close(solve_neumann(times(a), b, tol=0.0, max_iter=6, step_size=0.5), sum(terms), 1e-14)


# Stopping. ------------------------------------------------------------------------------------------------------------


def products(solve, a, b, **options):
    count = []

    def matvec(x):
        count.append(1)
        return a @ x

    return solve(matvec, b, **options), len(count)


@pytest.mark.parametrize("solve", [solve_cg, solve_normal_cg, solve_gmres, solve_bicgstab], ids=name)
def test_loops_end_where_the_tolerance_is_met(solve):
    a, b = spd(60), torch.randn(60, dtype=F64)
    loose, few = products(solve, a, b, tol=1e-2)
    tight, many = products(solve, a, b, tol=1e-10)
    capped, one = products(solve, a, b, tol=0.0, max_iter=2, **({"restart": 2} if solve is solve_gmres else {}))
    assert one < few < many < 60
    if solve is not solve_normal_cg:
        assert (b - a @ loose).norm() <= 1e-2 * b.norm()
        assert (b - a @ tight).norm() <= 1.01e-10 * b.norm()
    assert not torch.allclose(capped, tight, rtol=1e-3)
    absolute, fewest = products(solve, a, b, tol=0.0, atol=10 * float(b.norm()))
    assert absolute.count_nonzero() == 0
    assert fewest <= 2


@pytest.mark.parametrize("solve", [solve_cg, solve_gmres, solve_bicgstab], ids=name)
def test_a_good_beginning_is_kept(solve):
    a, b = spd(9), torch.randn(9, dtype=F64)
    solution = torch.linalg.solve(a, b)
    x, count = products(solve, a, b, init=solution)
    assert_close(x, solution, 1e-14)
    assert count == 1
    assert_close(solve(times(a), b, init=torch.randn(9, dtype=F64), **EXACT), solution)


@every
@pytest.mark.parametrize("tol", [1e-5, 0.0])
def test_zero_converged_and_empty_right_hand_sides_are_finite(solve, tol):
    a = spd(4)
    assert solve(times(a), torch.zeros(4, dtype=F64), tol=tol).tolist() == [0.0] * 4
    b = a[:, 0].contiguous()
    assert_close(
        solve(times(a), b, init=torch.eye(4, dtype=F64)[0], tol=tol, max_iter=200), torch.eye(4, dtype=F64)[0], 1e-7
    )
    assert solve(lambda x: x, {"w": torch.zeros(0)})["w"].shape == (0,)
    batch = torch.vmap(lambda b: solve(times(a), b, tol=tol, max_iter=60))(torch.stack([0 * b, b, 1e-200 * b]))
    assert batch.isfinite().all()


@every
def test_small_and_large_numbers_do_not_vanish_or_overflow(solve):
    a, b = spd(4, torch.float32), torch.randn(4)
    for scale in (1e-30, 1e30):
        assert_close(solve(times(a), scale * b) / scale, torch.linalg.solve(a, b), 1e-4)


ITERATIVE = [solve_cg, solve_normal_cg, solve_gmres, solve_bicgstab, solve_neumann]


@pytest.mark.parametrize("solve", [*ITERATIVE, solve_auto], ids=name)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_visible(solve, bad):
    assert solve(times(spd(3)), torch.tensor([bad, 1.0, 1.0], dtype=F64), max_iter=3).isnan().any()
    assert solve(lambda x: bad * x, torch.ones(3, dtype=F64), max_iter=3).isnan().any()


def test_breakdown_is_no_nan():
    turn, zeros = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.zeros(2, 2)
    for solve, a in ((solve_bicgstab, turn), (solve_cg, turn), (solve_gmres, zeros), (solve_auto, zeros)):
        assert solve(times(a), torch.tensor([1.0, 0.0]), tol=0.0).isfinite().all()
        with pytest.raises(torch.linalg.LinAlgError, match=r"the residual is 1\.0e\+00 of the right-hand side"):
            solve(times(a), torch.tensor([1.0, 0.0]))


# A promise that is not kept. ------------------------------------------------------------------------------------------


def conditioned(condition, n, dtype=F64):
    """Symmetric, eigenvalues between 1 and 1 / condition."""
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64))
    return ((q * torch.logspace(0, -math.log10(condition), n, dtype=F64)) @ q.T).to(dtype)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("solve", ITERATIVE, ids=name)
def test_a_tolerance_that_is_not_met_is_an_error(solve):
    a, b = conditioned(1e6, 50), torch.randn(50, dtype=F64)
    restart = {"restart": 5} if solve is solve_gmres else {}
    unkept = functools.partial(solve, times(a), max_iter=30, **restart)
    message = (
        r"is not solved after \d+ iterations: the residual is \d\.\de[+-]\d\d of .* and tol is 1\.0e-08.*tol=0\.0 takes"
    )
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        unkept(b, tol=1e-8)
    rough = unkept(b, tol=0.0)
    assert rough.isfinite().all()
    assert torch.equal(torch.compile(unkept, backend="eager", fullgraph=True)(b, tol=0.0), rough)
    batch = torch.stack([0 * b, b, 0 * b])
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        torch.vmap(lambda b: unkept(b, tol=1e-8))(batch)
    assert torch.vmap(lambda b: unkept(b, tol=1e-8))(batch[::2]).count_nonzero() == 0


def test_where_torch_compile_traces_nothing_is_raised():
    a, b = conditioned(1e6, 20), torch.randn(20, dtype=F64)
    traced = torch.compile(lambda b: solve_cg(times(a), b, max_iter=3), backend="eager", fullgraph=True)
    assert_close(traced(b), solve_cg(times(a), b, tol=0.0, max_iter=3))


@pytest.mark.parametrize("condition", [1e2, 1e5, 1e8])
def test_small_systems_lose_as_many_digits_as_the_condition_number_has(condition):
    a, x = conditioned(condition, 60), torch.randn(60, dtype=F64)
    for known in (x, a @ x):  # the second is hard for an explicit inverse: |b| is not small against |x|
        assert_close(solve_auto(times(a), a @ known), known, 1e-14 * condition)


def test_in_float32_too():
    a, x = conditioned(1e3, 60, torch.float32), torch.randn(60)
    assert_close(solve_auto(times(a), a @ x), x, 1e-3)
    with pytest.raises(torch.linalg.LinAlgError, match=r"singular to the precision of torch\.float32.*ridge=1e-6"):
        solve_auto(times(conditioned(1e9, 60, torch.float32)), x)


def test_of_many_solutions_the_smallest():
    a = torch.diag(torch.tensor([2.0, 0.0, 4.0], dtype=F64))
    assert solve_auto(times(a), torch.tensor([2.0, 0.0, 4.0], dtype=F64)).tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(torch.linalg.LinAlgError, match=r"A is singular .*the residual is 1\.8e-01.*tol is 3\.7e-11"):
        solve_auto(times(a), torch.tensor([2.0, 0.8, 4.0], dtype=F64))


def test_above_256_unknowns_iterations():
    count = []

    def counted(a):
        return lambda x: count.append(1) or a @ x

    b = torch.randn(257, dtype=F64)
    a = unsymmetric(257)
    assert_close(solve_auto(counted(a), b), torch.linalg.solve(a, b), 1e-9)
    assert len(count) < 100
    with pytest.raises(torch.linalg.LinAlgError, match="after 2570 iterations"):
        solve_auto(times(conditioned(1e6, 257)), b)
    singular = torch.diag(torch.arange(257, dtype=F64) > 0).to(F64)
    with pytest.raises(torch.linalg.LinAlgError, match="after 20 iterations"):
        solve_auto(times(singular), b, max_iter=20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solve", [solve_auto, solve_cg, solve_gmres, solve_bicgstab, solve_dense], ids=name)
def test_half_precision(solve, dtype):
    x = solve(lambda x: 4 * x, torch.tensor([2.0, 4.0], dtype=dtype))
    assert x.dtype == dtype
    assert x.tolist() == [0.5, 1.0]


# Transforms. ----------------------------------------------------------------------------------------------------------


@every
def test_vmap_over_operators_and_right_hand_sides(solve):
    a = torch.stack([spd(4) for _ in range(5)])
    b = torch.randn(5, 4, dtype=F64) * torch.tensor([0, 1, 1e-6, 1e6, 1], dtype=F64)[:, None]
    options = {**EXACT, "max_iter": 400 if name(solve) == "solve_neumann" else 8}
    batched = torch.vmap(lambda a, b: solve(times(a), b, **options))(a, b)
    for row, matrix, side in zip(batched, a, b, strict=True):
        assert_close(row, torch.linalg.solve(matrix, side), 1e-8)
        assert_close(row, solve(times(matrix), side, **options), 1e-8)


@pytest.mark.sampled(pool="compiled")
@every
def test_compile(solve):
    a, b = spd(3), torch.randn(3, dtype=F64)
    solved = torch.compile(lambda a, b: solve(times(a), b, max_iter=3), fullgraph=True, backend="eager")
    assert_close(solved(a, b), solve(times(a), b, max_iter=3), 1e-12)
    batched = torch.compile(torch.vmap(lambda b: solve(times(a), b, max_iter=3)), fullgraph=True, backend="eager")
    assert_close(batched(torch.stack([b, 2 * b]))[1], 2 * solve(times(a), b, max_iter=3), 1e-12)


# Errors. --------------------------------------------------------------------------------------------------------------


def test_errors_name_the_path():
    b = {"w": torch.ones(2), "v": torch.ones(3)}
    with pytest.raises(ValueError, match="the results of matvec and b do not match: 'v' is missing from the results"):
        solve_cg(lambda x: {"w": x["w"]}, b)
    with pytest.raises(ValueError, match=r"the results of matvec have shape \(3,\) and dtype torch.float32 at 'w'"):
        solve_cg(lambda x: {"w": x["v"], "v": x["v"]}, b)
    with pytest.raises(ValueError, match="the results of matvec have None at 'v', but b there has a tensor"):
        solve_gmres(lambda x: {"w": x["w"], "v": None}, b)
    with pytest.raises(ValueError, match="init and b do not match"):
        solve_cg(lambda x: x, b, init={"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("solve", "name", "value"),
    [
        *[(solve, name, math.nan) for solve in ALL for name in ("tol", "atol", "ridge")],
        (solve_cg, "tol", -1.0),
        (solve_cg, "max_iter", -1),
        (solve_gmres, "restart", 0),
        (solve_neumann, "step_size", 0.0),
    ],
)
def test_a_number_that_is_out_of_range_is_an_error_that_names_it(solve, name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: "):
        solve(lambda x: 2 * x, torch.ones(3), **{name: value})


@pytest.mark.parametrize("solve", ALL, ids=name)
def test_integers_are_an_error_as_their_solution_would_be_rounded(solve):
    with pytest.raises(TypeError, match="b has a tensor of torch.int64 at 'n'; it must be a tree of floating-point"):
        solve(lambda x: x, {"n": torch.tensor([1, 3])})
    with pytest.raises(TypeError, match="b has a float at 'the root'; it must be"):
        solve(lambda x: x, 1.0)
