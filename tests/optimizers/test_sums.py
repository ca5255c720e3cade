"""Numbers of the whole tree: exact sums, in little memory."""

import pytest
import torch
from memory import peak_bytes

from functorch_optim._execution.blocks import BLOCK
from functorch_optim.optimizers._whole import dot, or_first, squared_distance, total

STEPS = {"known": 1.0, "a_tensor": torch.tensor(1.0, dtype=torch.float64)}
SHAPES = [(1000, 700), (2 * BLOCK + 3,), (1, BLOCK + 1), (2, 3), (), (0, 4)]


def pair(dtype=torch.float32):
    xs, ys = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(2)]
    return [*xs, torch.randn(700, 900).to(dtype).T], [*ys, torch.randn(900, 700).to(dtype)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_sums_are_those_in_float64(step, dtype):
    xs, ys = pair(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = sum((x.to(wide) - y.to(wide)).abs().square().sum() for x, y in zip(xs, ys, strict=True))
    found = squared_distance(xs, ys, STEPS[step])
    assert isinstance(found, float) == (step == "known")
    assert found == pytest.approx(float(expected), rel=1e-7 if dtype != torch.float64 else 1e-14)


def test_terms_are_rounded_and_sums_are_not():
    xs, ys = pair()
    expected = float(sum((x * y).double().sum() for x, y in zip(xs, ys, strict=True)))
    assert dot(xs, ys, 1.0) == pytest.approx(expected, rel=1e-13)
    assert float(sum((x * y).sum() for x, y in zip(xs, ys, strict=True))) != pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("step", STEPS)
def test_the_derivative_of_an_inner_product_is_the_other_factor(step):
    xs, ys = pair()
    for x in xs:
        x.requires_grad_()
    dot(xs, ys, STEPS[step]).backward()
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x.grad, y)


def test_terms_of_a_large_tensor_are_in_memory_piece_by_piece():
    x = torch.randn(16, BLOCK)
    terms = torch.square, [[x]]
    assert peak_bytes(lambda: total(*terms, STEPS["known"])) < 4 * BLOCK * x.itemsize
    assert peak_bytes(lambda: total(*terms, STEPS["a_tensor"])) >= 16 * BLOCK * x.itemsize


def test_a_sum_over_no_tensor_is_zero():
    assert total(torch.square, [[]], 1.0) == 0.0


def test_the_first_value_is_computed_at_the_first_step_alone():
    assert or_first(0.0, lambda: 3.0) == 3.0
    assert or_first(2.0, lambda: pytest.fail("not needed")) == 2.0
    carried = torch.tensor([0.0, 2.0])
    assert torch.vmap(lambda one: or_first(one, lambda: torch.tensor(3.0)))(carried).tolist() == [3.0, 2.0]
