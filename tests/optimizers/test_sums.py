"""Numbers of the whole tree: exact sums, in little memory."""

import shutil

import pytest
import torch
from memory import peak_bytes
from torch._dynamo.utils import counters

import functorch_optim as fo
from functorch_optim._execution import choose, sums
from functorch_optim._execution.blocks import BLOCK, SMALL
from functorch_optim._execution.mode import Plain
from functorch_optim.optimizers._whole import or_first, total

TENSOR_STEP = torch.tensor(1.0, dtype=torch.float64)
WAYS = {"in blocks": (Plain, 1.0), "known": (list, 1.0), "a tensor": (list, TENSOR_STEP)}
SHAPES = [(1000, 700), (2 * BLOCK + 3,), (1, BLOCK + 1), (2, 3), (), (0, 4)]


def pair(dtype=torch.float32):
    xs, ys = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(2)]
    return [*xs, torch.randn(700, 900).to(dtype).T], [*ys, torch.randn(900, 700).to(dtype)]


def distance(x, y):
    return (x - y).square()


def distance_and_more(x, y, a, b):
    return (x - y).square(), a * x * y, (b * x).abs() + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_sums_are_those_in_float64(way, dtype):
    xs, ys = pair(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    expected = sum((x.to(wide) - y.to(wide)).abs().square().sum() for x, y in zip(xs, ys, strict=True))
    make, step = WAYS[way]
    found = total(distance, [make(xs), make(ys)], step)
    assert isinstance(found, float) is (way != "a tensor")
    assert found == pytest.approx(float(expected), rel=1e-7 if dtype != torch.float64 else 1e-14)


@pytest.mark.parametrize("way", ["in blocks", "known"])
def test_terms_are_rounded_and_sums_are_not(way):
    xs, ys = pair()
    expected = float(sum((x * y).double().sum() for x, y in zip(xs, ys, strict=True)))
    make, step = WAYS[way]
    assert total(torch.mul, [make(xs), make(ys)], step) == pytest.approx(expected, rel=1e-13)
    assert float(sum((x * y).sum() for x, y in zip(xs, ys, strict=True))) != pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of", [pair, lambda: ([torch.empty(0)], [torch.empty(0)]), lambda: ([], [])])
def test_several_sums_with_numbers_are_those_of_their_terms(way, of):
    xs, ys = of()
    numbers = 0.3, -2.0
    make, step = WAYS[way]
    found = total(distance_and_more, [make(xs), make(ys)], step, *numbers)
    rows = [distance_and_more(x.double(), y.double(), *numbers) for x, y in zip(xs, ys, strict=True)]
    for k, one in enumerate(found):
        expected = sum(float(row[k].sum()) for row in rows)
        assert float(one) == pytest.approx(expected, rel=1e-6, abs=1e-3)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler for the default backend")
def test_sums_of_fused_steps_are_compiled():
    xs, ys = map(Plain, pair())
    plain = total(distance_and_more, [xs, ys], 1.0, 0.3, -2.0)
    graphs = counters["stats"]["unique_graphs"]
    xs.fuses = True
    fused = total(distance_and_more, [xs, ys], 1.0, 0.3, -2.0)
    assert counters["stats"]["unique_graphs"] > graphs
    assert fused == pytest.approx(plain, rel=1e-6)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler for the default backend")
@pytest.mark.parametrize("fused", [True, False])
def test_steps_say_whether_their_sums_are_compiled(fused, monkeypatch):
    said = []

    def in_blocks(terms, columns, numbers, compiles):
        said.append(compiles)
        return sums.in_blocks(terms, columns, numbers, compiles=False)

    monkeypatch.setattr(choose, "in_blocks", in_blocks)
    p = torch.nn.Parameter(torch.randn(SMALL))
    optimizer = fo.Optimizer([p], fo.dog, fused=fused)
    p.grad = torch.randn(SMALL)
    optimizer.step()
    assert set(said) == {fused}


@pytest.mark.parametrize("step", [1.0, TENSOR_STEP], ids=["known", "a tensor"])
def test_the_derivative_of_an_inner_product_is_the_other_factor(step):
    xs, ys = pair()
    for x in xs:
        x.requires_grad_()
    total(torch.mul, [xs, ys], step).backward()
    for x, y in zip(xs, ys, strict=True):
        assert torch.equal(x.grad, y)


def test_terms_of_a_large_tensor_are_in_memory_piece_by_piece():
    x = torch.randn(16, BLOCK)
    size = 16 * BLOCK * x.itemsize
    assert peak_bytes(lambda: total(torch.square, [Plain([x])], 1.0)) < size / 4
    assert peak_bytes(lambda: total(torch.square, [[x]], TENSOR_STEP)) >= size


def test_a_sum_over_no_tensor_is_zero():
    assert total(torch.square, [[]], 1.0) == 0.0


def test_the_first_value_is_computed_at_the_first_step_alone():
    assert or_first(0.0, lambda: 3.0) == 3.0
    assert or_first(2.0, lambda: pytest.fail("not needed")) == 2.0
    carried = torch.tensor([0.0, 2.0])
    assert torch.vmap(lambda one: or_first(one, lambda: torch.tensor(3.0)))(carried).tolist() == [3.0, 2.0]
