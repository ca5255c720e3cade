"""Roots and norms: torch's values, and derivatives that are finite where torch's are not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import functorch_optim as fo

ORDERS = [0.5, 1, 1.5, 2, 3, math.inf]
of_each_order = pytest.mark.parametrize("p", ORDERS)
real_and_complex = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])


def randn(*shape, dtype=torch.float64, requires_grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad)


def norm(p):
    return lambda x: fo.safe_norm(x, p)


def bits(x):
    return x.where(~x.isnan(), torch.nan).view(torch.int32).tolist()  # the sign of NaN means nothing


def assert_derivatives_vanish(function, x):
    """Check both modes and second derivatives, also in a batch."""

    def reverse(x):
        return torch.func.grad(function)(x)

    def forward(x):
        return torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    def twice(x):
        return torch.func.grad(lambda x: reverse(x).sum().real)(x)

    def forward_of_reverse(x):
        return torch.func.jvp(reverse, (x,), (torch.ones_like(x),))[1]

    batch = torch.stack([x, x])
    for derivative in (reverse, forward):
        assert derivative(x).count_nonzero() == 0  # NaN counts as nonzero
        assert torch.vmap(derivative)(batch).count_nonzero() == 0
    for derivative in (twice, forward_of_reverse):
        assert derivative(x).isfinite().all()
        assert torch.vmap(derivative)(batch).isfinite().all()


# safe_sqrt. -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.0, width=32), min_size=1, max_size=40))
def test_sqrt_has_the_bits_of_torch(numbers):
    x = torch.tensor(numbers)
    assert bits(fo.safe_sqrt(x)) == bits(x.sqrt())
    assert bits(torch.stack([fo.safe_sqrt(one) for one in x])) == bits(torch.stack([one.sqrt() for one in x]))


@pytest.mark.parametrize("number", [0.0, 1e-45, 1e-38, 3e38, math.inf, -math.inf, -1.0, -1e-45, math.nan])
def test_sqrt_of_special_numbers_has_the_bits_of_torch(number):
    x = torch.tensor([number])
    assert bits(fo.safe_sqrt(x)) == bits(x.sqrt())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_sqrt_keeps_dtype_and_shape(dtype, shape):
    x = torch.rand(shape).to(dtype)
    root = fo.safe_sqrt(x)
    assert root.dtype == dtype
    assert torch.equal(root, x.sqrt())


def test_sqrt_does_not_modify_its_argument():
    x = torch.tensor([0.0, 4.0])
    fo.safe_sqrt(x)
    assert x.tolist() == [0.0, 4.0]


def test_sqrt_derivatives_away_from_zero():
    x = (torch.rand(5, dtype=torch.float64) + 0.1).requires_grad_()
    assert gradcheck(fo.safe_sqrt, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(fo.safe_sqrt, x, check_fwd_over_rev=True)


def test_sqrt_derivatives_vanish_at_zero():
    assert_derivatives_vanish(fo.safe_sqrt, torch.zeros((), dtype=torch.float64))
    assert_derivatives_vanish(lambda x: fo.safe_sqrt(x).sum(), torch.zeros(3, dtype=torch.float64))
    assert_derivatives_vanish(lambda x: fo.safe_sqrt(x.square()).sum(), torch.zeros(3, dtype=torch.float64))
    # Negative control: torch's own does not.
    with pytest.raises(AssertionError):
        assert_derivatives_vanish(torch.sqrt, torch.zeros((), dtype=torch.float64))


def test_sqrt_treats_each_element_by_itself():
    x = torch.tensor([0.0, 4.0], dtype=torch.float64)
    assert torch.func.grad(lambda x: fo.safe_sqrt(x).sum())(x).tolist() == [0.0, 0.25]


# safe_norm. -----------------------------------------------------------------------------------------------------------


@of_each_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3), (0,), (2, 0)])
def test_norm_equals_torch(p, dtype, shape):
    drawn = torch.randn(shape, dtype=dtype)
    for x in (drawn, drawn.mT if drawn.ndim == 2 else drawn, torch.zeros_like(drawn)):
        ours = fo.safe_norm(x, p)
        # Of nothing, torch knows no maximum.
        theirs = torch.linalg.vector_norm(x, p) if x.numel() else torch.zeros((), dtype=x.real.dtype)
        assert (ours.shape, ours.dtype) == ((), theirs.dtype)
        torch.testing.assert_close(ours, theirs)


@of_each_order
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_half_precision_is_computed_in_float32(p, dtype):
    x = torch.tensor([300.0, -400.0, 0.0], dtype=dtype)  # whose squares float16 cannot hold
    assert fo.safe_norm(x, p).dtype == torch.float32
    torch.testing.assert_close(fo.safe_norm(x, p), torch.linalg.vector_norm(x.float(), p))
    assert fo.safe_norm(x[:0], p).dtype == torch.float32


@of_each_order
def test_norm_of_a_conjugate_view(p):
    x = randn(5, dtype=torch.complex128)
    torch.testing.assert_close(fo.safe_norm(x.conj(), p), fo.safe_norm(x, p))
    torch.testing.assert_close(fo.safe_norm(x.conj().imag, p), fo.safe_norm(x.imag, p))


@pytest.mark.parametrize("p", [1, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_norm_of_numbers_whose_squares_do_not_fit(p, dtype, size):
    x = torch.tensor([3 * size, -4 * size], dtype=dtype)
    torch.testing.assert_close(fo.safe_norm(x, p), torch.linalg.vector_norm(x, p), rtol=1e-6, atol=0)


@of_each_order
@pytest.mark.parametrize(
    "numbers", [[1.0, math.inf], [1.0, -math.inf], [1.0, math.nan], [math.nan, math.inf], [0.0, math.nan]]
)
def test_norm_of_infinities_and_nan(p, numbers):
    x = torch.tensor(numbers)
    torch.testing.assert_close(fo.safe_norm(x, p), torch.linalg.vector_norm(x, p), equal_nan=True)


@of_each_order
@real_and_complex
def test_norm_derivatives_away_from_zero(p, dtype):
    x = randn(2, 3, dtype=dtype, requires_grad=True)
    assert gradcheck(norm(p), x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(norm(p), x, check_fwd_over_rev=True)


@real_and_complex
def test_norm_derivatives_where_one_element_is_zero(dtype):
    """The euclidean norm is smooth there, and so is the third."""
    x = torch.tensor([0.0, 1.0, -2.0], dtype=dtype, requires_grad=True)
    for p in (2, 3):
        assert gradcheck(norm(p), x, check_forward_ad=True)
        assert gradgradcheck(norm(p), x, check_fwd_over_rev=True)


@of_each_order
@real_and_complex
@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (0,)])
def test_norm_derivatives_vanish_at_zero(p, dtype, shape):
    assert_derivatives_vanish(norm(p), torch.zeros(shape, dtype=dtype))


@of_each_order
def test_norm_derivatives_are_finite_where_one_element_is_zero(p):
    x = torch.tensor([0.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    gradient = torch.func.grad(norm(p))(x)
    assert gradient[[0, 2]].count_nonzero() == 0
    torch.testing.assert_close(gradient[[1, 3]], torch.func.grad(norm(p))(x[[1, 3]]))
    assert torch.func.hessian(norm(p))(x).isfinite().all()


@of_each_order
def test_norm_under_vmap_equals_a_loop(p):
    batch = randn(3, 4)
    torch.testing.assert_close(torch.vmap(norm(p))(batch), torch.stack([fo.safe_norm(x, p) for x in batch]))


@pytest.mark.parametrize("p", [0, -1.0, math.nan, -math.inf])
def test_norm_needs_a_positive_order(p):
    with pytest.raises(ValueError, match=rf"Invalid norm order: {p}; a norm needs p > 0, as in safe_norm\(x, p=2.0\)"):
        fo.safe_norm(torch.ones(2), p)


# debias. --------------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10**6))
def test_debias_is_the_weight_of_the_mean(beta, t):
    weight = fo.debias(beta, torch.tensor(float(t), dtype=torch.float64))
    assert weight.dtype == torch.float64
    assert weight.item() == pytest.approx(1 - beta**t, rel=1e-15, abs=4e-16)


def test_debias_of_the_first_steps():
    steps = torch.arange(1.0, 4.0, dtype=torch.float64)
    mean, expected = 0.0, []
    for _ in range(3):
        mean = 0.9 * mean + 0.1 * 1.0
        expected.append(mean)
    assert [fo.debias(0.9, step).item() for step in steps] == pytest.approx(expected, rel=1e-14)
    assert [fo.debias(0.0, step).item() for step in steps] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_debias_with_a_tensor(dtype):
    beta, step = torch.tensor(0.9, dtype=dtype), torch.tensor(5.0, dtype=torch.float64)
    assert fo.debias(beta, step) == fo.debias(beta.item(), step)
    assert fo.debias(beta, step).dtype == torch.float64


def test_debias_derivatives():
    for t in (1.0, 2.0, 7.0):
        step = torch.tensor(t, dtype=torch.float64)
        for value in (0.0, 0.5, 0.999):
            beta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
            assert gradcheck(fo.debias, (beta, step), check_forward_ad=True)
            assert gradgradcheck(fo.debias, (beta, step))


# All of them. ---------------------------------------------------------------------------------------------------------


FUNCTIONS = {"sqrt": fo.safe_sqrt, **{f"norm {p}": norm(p) for p in ORDERS}, "debias": lambda x: fo.debias(0.9, x)}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("x", [[1.0, 4.0, 0.0], [0.0, 0.0, 0.0]], ids=["some", "zero"])
def test_compiles(function, x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), function(x))
    gradients = [torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, function)]
    assert torch.equal(*gradients)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert forward_ad.unpack_dual(function(dual)).tangent.isfinite().all()
