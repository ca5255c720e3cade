"""Roots and bases of symmetric matrices: values, and derivatives at spectra where those of eigh are wrong."""

import numpy as np
import pytest
import torch

from functorch_optim.optimizers import _spectral
from functorch_optim.optimizers._spectral import eigenvectors, inverse_root, orthonormalized
from functorch_optim.testing._derivatives import differences, error


def spectrum(*values, seed=0):
    """Make a symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


MATRICES = {
    "distinct": spectrum(3.0, 2.0, 1.0, 0.5),
    "rank deficient by one": spectrum(3.0, 2.0, 1.0, 0.0),
    "rank deficient by two": spectrum(3.0, 2.0, 0.0, 0.0),
    "rank one": spectrum(3.0, 0.0, 0.0, 0.0),
    "repeated": spectrum(2.0, 2.0, 2.0, 0.5),
    "nearly repeated": spectrum(2.0, 2.0 + 1e-9, 0.5, 0.5 - 1e-12),
    "identity": torch.eye(4, dtype=torch.float64),
    "zero": torch.zeros(4, 4, dtype=torch.float64),
}
matrices = pytest.mark.parametrize("a", MATRICES.values(), ids=MATRICES)
roots = pytest.mark.parametrize("root", [1, 2, 4, 6])
WEIGHTS = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_eigh(a, root, eps):
    w, q = torch.linalg.eigh((a + a.mT) / 2)
    return (q * (w + eps) ** (-1 / root)) @ q.mT


def number_of(function, a, root):
    """Make one number of a root, as a function of a matrix near `a`, and eps, in one vector."""

    def number(z):
        made = function(a + z[:-1].reshape(4, 4), root, z[-1])
        return (WEIGHTS * made).sum() + made.square().sum()

    return number, torch.cat([torch.zeros(16, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)])


@matrices
@roots
def test_a_root_to_its_power_is_the_inverse(a, root):
    made = inverse_root(a, root, 0.3)
    inverse = np.linalg.inv(a.numpy() + 0.3 * np.eye(4))
    assert error(torch.linalg.matrix_power(made, root), torch.tensor(inverse)) < 1e-13
    assert error(inverse_root(a.clone().requires_grad_(), root, 0.3).detach(), made) < 1e-14


@matrices
@roots
def test_derivatives_of_roots_equal_differences_in_both_modes(a, root):
    number, z = number_of(inverse_root, a, root)
    expected = differences(number, z)
    reverse, forward = torch.func.grad(number)(z), torch.func.jacfwd(number)(z)
    assert error(reverse, expected) < 1e-7
    assert error(forward, reverse) < 1e-12
    leaf = z.clone().requires_grad_()
    assert error(torch.autograd.grad(number(leaf), leaf)[0], reverse) < 1e-14


@matrices
@pytest.mark.parametrize("root", [2, 4])
def test_second_derivatives_of_roots_equal_differences_in_all_modes(a, root):
    number, z = number_of(inverse_root, a, root)
    gradient = torch.func.grad(number)
    expected = differences(gradient, z)
    hessian = torch.func.jacfwd(gradient)(z)
    assert error(hessian, expected) < 1e-7
    for other in (torch.func.jacrev(gradient), torch.func.jacfwd(torch.func.jacfwd(number))):
        assert error(other(z), hessian) < 1e-11


def test_second_derivatives_take_a_second_iteration(monkeypatch):
    number, z = number_of(inverse_root, MATRICES["rank deficient by two"], 4)
    gradient = torch.func.grad(number)
    monkeypatch.setattr(_spectral, "ORDERS", 1)
    assert error(gradient(z), differences(number, z)) < 1e-7
    assert error(torch.func.jacfwd(gradient)(z), differences(gradient, z)) > 1e-3


def test_third_derivatives_of_roots_equal_differences():
    number, z = number_of(inverse_root, MATRICES["rank deficient by two"], 4)
    some = z[:3]

    def second(some):
        return torch.func.hessian(lambda some: number(torch.cat([some, z[3:]])))(some)

    assert error(torch.func.jacfwd(second)(some), differences(second, some)) < 1e-7


@pytest.mark.parametrize("name", ["rank deficient by two", "rank one", "repeated", "identity", "zero"])
def test_the_derivative_of_eigh_is_off_there(name):
    number, z = number_of(by_eigh, MATRICES[name], 4)
    gradient = torch.func.grad(number)(z)
    assert not error(gradient, differences(number, z)) < 1e-7


def test_the_roots_of_a_small_eps_are_as_exact_as_its_matrix():
    """The statistic of a first gradient with two more rows than columns, and Shampoo's power."""
    g = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def number(g):
        return (inverse_root(g @ g.mT, 4, 1e-3) @ g).sin().sum()

    expected = differences(lambda z: number(z.reshape(6, 2)), g.reshape(-1))
    assert error(torch.func.grad(number)(g).reshape(-1), expected) < 1e-7
    assert error(torch.func.jacfwd(number)(g).reshape(-1), expected) < 1e-7


def test_batches_are_matrices_one_by_one():
    stack = torch.stack(list(MATRICES.values()))
    one_by_one = torch.stack([inverse_root(a, 4, 0.3) for a in stack])
    assert error(inverse_root(stack, 4, 0.3), one_by_one) < 1e-14
    assert error(torch.vmap(lambda a: inverse_root(a, 4, 0.3))(stack), one_by_one) < 1e-14

    def slope(a):
        return torch.func.grad(lambda a: (WEIGHTS * inverse_root(a, 4, 0.3)).sum())(a)

    assert error(torch.vmap(slope)(stack), torch.stack([slope(a) for a in stack])) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_that_are_rounding_are_no_smaller_than_it(dtype):
    a = spectrum(1e3, 1.0, 0.0, -1e-14).to(dtype)
    made = inverse_root(a, 4, 1e-20)
    noise = 1e3 * torch.finfo(dtype).eps
    assert noise / 2 < torch.linalg.matrix_norm(made, 2) ** -4 < 100 * noise


def test_what_is_not_finite_makes_nan_and_no_error():
    a = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan), torch.full((3, 3), torch.inf)])
    made = inverse_root(a, 4, 0.1)
    assert made[0].isfinite().all()
    assert made[1:].isnan().all()


# Bases. ---------------------------------------------------------------------------------------------------------------


@matrices
def test_eigenvectors_make_a_matrix_diagonal_by_descending_value(a):
    q = eigenvectors(a)
    assert error(q.mT @ q, torch.eye(4, dtype=torch.float64)) < 1e-14
    d = q.mT @ a @ q
    assert error(d, torch.diag(d.diagonal())) < 1e-13
    assert bool((d.diagonal().diff() < 1e-12).all())


@pytest.mark.parametrize("name", ["distinct", "rank deficient by one"])
@pytest.mark.parametrize("function", [eigenvectors, orthonormalized])
def test_derivatives_of_bases_equal_differences(name, function):
    def number(z):
        a = MATRICES[name] + z.reshape(4, 4)
        return (WEIGHTS * function(a if function is eigenvectors else a @ WEIGHTS + 0.1 * WEIGHTS)).sum()

    z = torch.zeros(16, dtype=torch.float64)
    gradient = torch.func.grad(number)
    assert error(gradient(z), differences(number, z)) < 1e-7
    assert error(torch.func.jacfwd(number)(z), gradient(z)) < 1e-12
    hessian = torch.func.jacfwd(gradient)(z)
    assert error(hessian, differences(gradient, z)) < 1e-6
    assert error(torch.func.jacfwd(torch.func.jacfwd(number))(z), hessian) < 1e-11


@matrices
@pytest.mark.parametrize("function", [eigenvectors, orthonormalized])
def test_derivatives_of_bases_are_finite_at_every_spectrum(a, function):
    def number(a):
        return (WEIGHTS * function(a)).sum()

    assert torch.func.grad(number)(a).isfinite().all()
    assert torch.func.hessian(number)(a).isfinite().all()


def test_the_choice_between_equal_eigenvectors_has_derivative_zero():
    derivative = torch.func.jacrev(eigenvectors)(MATRICES["identity"])
    assert not derivative.any()
    assert not torch.func.jacfwd(eigenvectors)(MATRICES["identity"]).any()
    assert torch.func.jacrev(eigenvectors)(MATRICES["repeated"]).any()  # those of different values turn


def test_the_plane_of_equal_eigenvectors_turns_as_differences_say():
    """The vectors in it are any; the projection on it is not."""

    def number(z):
        q = eigenvectors(MATRICES["rank deficient by two"] + z.reshape(4, 4))[:, :2]
        return (WEIGHTS * (q @ q.mT)).sum()

    z = torch.zeros(16, dtype=torch.float64)
    assert error(torch.func.grad(number)(z), differences(number, z)) < 1e-7


def test_columns_are_orthonormalized_as_by_qr_where_it_has_a_derivative():
    a = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(orthonormalized(a), torch.linalg.qr(a)[0])
    ours = torch.func.grad(lambda a: (WEIGHTS * orthonormalized(a)).sum())(a)
    assert error(ours, torch.func.grad(lambda a: (WEIGHTS * torch.linalg.qr(a)[0]).sum())(a)) < 1e-12


def test_it_compiles():
    a = MATRICES["rank deficient by two"]

    def slope(a):
        return torch.func.grad(lambda a: (WEIGHTS * inverse_root(a, 4, 0.3)).sum())(a)

    compiled = torch.compile(slope, fullgraph=True, backend="eager")
    assert error(compiled(a), slope(a)) < 1e-14
