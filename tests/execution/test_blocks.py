"""In blocks: how tensors are cut and put together, against the rule run tensor by tensor."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim._core import prepare
from functorch_optim._execution import blocks, choose
from functorch_optim._execution.blocks import Blocks, InBlocks, Scratch, empty_like, flat, layout_of, lies


class Mixed(NamedTuple):
    """A state of two tensors."""

    slow: torch.Tensor
    fast: torch.Tensor


def update(g, state, p, s):
    """Mix everything with everything, so that an element in a wrong place is noticed."""
    slow = torch.lerp(state.slow, g, s[0])
    fast = state.fast * s[1] + torch.where(g < p, g, slow)
    return s[1] * slow / (1 + fast.abs()) - g * p, Mixed(slow, fast)


def mixed():
    """Make a chain anew, so that nothing is prepared for it yet."""
    return fo.chain(
        fo.leafwise(
            Mixed, update, lambda step: (0.1 * step, torch.cos(step)), elementwise=True, needs_params=True, sparse=None
        ),
        fo.add_decayed_weights(0.1),
        fo.trace(0.9),
    )


def cut_at(patch, block, small):
    """Cut everything."""
    sizes = {blocks.BLOCK: block, blocks.SMALL: small}
    patch.setattr(Blocks.__init__, "__defaults__", tuple([sizes[size] for size in Blocks.__init__.__defaults__]))
    patch.setattr(blocks, "BLOCK", block)
    patch.setattr(blocks.OverBlocks, "length", block)
    patch.setattr(blocks, "SMALL", small)
    patch.setattr(choose, "machine", lambda program, *_: InBlocks(program))


@pytest.fixture
def small(monkeypatch):
    cut_at(monkeypatch, 8, 4)


def like(p, layout=None):
    """Draw numbers for a tensor, lying as it does or as another."""
    noise = torch.randn(p.shape, dtype=p.dtype)
    return noise if layout is None else torch.empty_strided(layout.shape, layout.stride(), dtype=p.dtype).copy_(noise)


def run(params, steps=3, way=lambda tx, g, state, p: fo.step(tx, g, state, p), draw=like, by_tensor=False):
    """Train on random gradients; return the parameters and the state."""
    torch.manual_seed(1)
    params = [draw(p, p).copy_(p) for p in params]
    tx = mixed()
    state = tx.init(params)
    with pytest.MonkeyPatch.context() as patch:
        if by_tensor:
            patch.setattr(prepare, "is_plain", lambda *args: False)
        for _ in range(steps):
            params, state = way(tx, [draw(p) for p in params], state, params)
    return params, state


def assert_equal(left, right, tolerance=0.0):
    torch.testing.assert_close(fo.tree.flatten(left)[0], fo.tree.flatten(right)[0], rtol=tolerance, atol=tolerance)


def both(params, tolerance=1e-13, **options):
    """Run in blocks, purely and in place, and compare with the rules run tensor by tensor."""
    reference = run(params, by_tensor=True, **options)
    assert_equal(run(params, **options), reference, tolerance)
    assert_equal(run(params, way=fo.step_, **options), reference, tolerance)


# Layouts. -------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": torch.randn(4, 5),
    "transposed": torch.randn(5, 4).t(),
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "channels_last": torch.randn(2, 3, 4, 2).to(memory_format=torch.channels_last),
    "sliced": torch.randn(12, 4)[::3],
    "columns": torch.randn(4, 12)[:, 1::3],
    "rows_with_gaps": torch.randn(6, 5)[1:5, :3],
    "in_the_middle": torch.randn(40)[7:33],
    "transposed_in_the_middle": torch.randn(40)[5:25].view(4, 5).t(),
    "ones": torch.randn(1, 6, 1).transpose(0, 2),
    "one_between": torch.randn(20).as_strided((4, 1, 5), (1, 7, 4)),
    "empty": torch.randn(0, 3),
    "empty_transposed": torch.randn(3, 0).t(),
    "scalar": torch.randn(()),
    "one": torch.randn(1),
    "complex": torch.randn(5, 2, dtype=torch.complex64),
    "complex_transposed": torch.randn(2, 5, dtype=torch.complex64).t(),
    "conjugated": torch.randn(5, 2, dtype=torch.complex64).conj(),
    "expanded": torch.randn(1, 4).expand(3, 4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_elements_are_taken_in_the_order_of_a_layout(name):
    tensor = LAYOUTS[name]
    layout = layout_of(tensor)
    elements = flat(tensor, layout)
    assert elements.shape == (tensor.numel(),)
    assert lies(tensor, layout) == (name not in ("sliced", "columns", "rows_with_gaps", "expanded"))
    if lies(tensor, layout) and tensor.numel() and not tensor.is_conj():
        assert elements.data_ptr() == tensor.data_ptr()
    # Another tensor that lies otherwise gives the same elements in the same order.
    other = tensor.clone(memory_format=torch.contiguous_format)
    assert torch.equal(flat(other, layout), elements)
    mine = empty_like(tensor, layout)
    flat(mine, layout).copy_(elements)
    assert torch.equal(mine, tensor)


# Cutting. -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_how_tensors_are_cut():
    tensors = [torch.zeros(n) for n in (3, 4, 20, 0, 2, 3, 1, 8)]
    halves = [torch.zeros(n, dtype=torch.bfloat16) for n in (17, 6)]
    cut = Blocks(torch.float32, [[*tensors, *halves]], [*tensors, *halves])
    pieces = cut.cut([*tensors, *halves])
    assert cut.alone == [1, 2, 7]
    assert [len(piece) for piece in pieces.alone] == [4, 8, 8, 4, 8]
    assert [[len(piece) for piece in pack] for pack in pieces.packs] == [[3, 2, 3], [1], [8], [8], [1, 6]]
    assert cut.sizes == [(3, 2, 3), (1,), (8,), (8,), (1, 6)]
    assert cut.in_order == [True, True, False, False, False]
    for piece in pieces.alone:
        piece.fill_(1)
    for pack in pieces.packs:
        torch._foreach_add_(pack, 1)
    assert all(bool((tensor == 1).all()) for tensor in (*tensors, *halves))
    whole = Blocks(torch.float32, [tensors], tensors, length=None).cut(tensors)
    assert [len(piece) for piece in whole.alone] == [4, 20, 8]


def test_scratch_is_used_again_and_grows():
    scratch = Scratch(torch.device("cpu"))
    small = scratch.part("a", torch.float32, 3)
    assert scratch.part("a", torch.float32, 3) is small
    assert scratch.part("b", torch.float32, 3).data_ptr() != small.data_ptr()
    parts = scratch.parts("a", torch.float32, (1, 2))
    assert [part.data_ptr() for part in parts] == [small.data_ptr(), small.data_ptr() + 4]
    large = scratch.part("a", torch.float32, 100)
    assert scratch.part("a", torch.float32, 3).data_ptr() == large.data_ptr() != small.data_ptr()
    assert scratch.parts("a", torch.float32, (1, 2))[0].data_ptr() == large.data_ptr()


# Numbers. -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("size", [*range(10), 15, 16, 17, 23, 24, 25, 40])
def test_every_size(size):
    both([torch.randn(size, dtype=torch.float64)])


@pytest.mark.usefixtures("small")
def test_many_sizes_together():
    both([torch.randn(size, dtype=torch.float64) for size in (3, 0, 5, 1, 1, 17, 2, 8, 3, 7, 33, 4, 1)])
    both([torch.randn(0, dtype=torch.float64)] * 2)
    both([torch.randn((), dtype=torch.float64) for _ in range(20)])


DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.complex128: 1e-13}


@pytest.mark.sampled(size=24)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("expanded", "conjugated")])
@pytest.mark.parametrize("others", ["lying_so", "lying_otherwise"])
def test_layouts_and_dtypes(dtype, name, others):
    layout = LAYOUTS[name]
    p = layout.real.to(dtype) if layout.is_complex() else layout.to(dtype)

    def draw(p, like_this=None):
        if like_this is None and others == "lying_otherwise" and p.ndim > 1:
            return torch.randn(p.shape[::-1], dtype=p.dtype).permute(*reversed(range(p.ndim)))
        return like(p, layout if like_this is None and layout.shape == p.shape else like_this)

    gaps = draw(p, layout)
    assert gaps.stride() == layout.stride()
    for sizes in ((8, 4), (64, 64)):  # cut, and put together
        with pytest.MonkeyPatch.context() as patch:
            cut_at(patch, *sizes)
            both([gaps.copy_(p), torch.randn(3, dtype=dtype)], DTYPES[dtype], draw=draw)


@pytest.mark.usefixtures("small")
def test_all_at_once():
    params = [tensor.to(torch.float64) for name, tensor in LAYOUTS.items() if not tensor.is_complex()]
    both([p for p in params if all(p.stride())])


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 5)), max_size=6))
def test_random_shapes_and_orders(shapes):
    """Parameters and gradients whose dimensions lie in some order."""
    with pytest.MonkeyPatch.context() as patch:  # hypothesis wants no fixtures of one example
        cut_at(patch, 7, 5)
        params = []
        for shape, order in shapes:
            dims = torch.randperm(len(shape), generator=torch.Generator().manual_seed(order)).tolist()
            p = torch.randn([shape[d] for d in dims], dtype=torch.float64)
            params.append(p.permute(*torch.tensor(dims, dtype=torch.int64).argsort().tolist()) if dims else p)
        both(params)


@pytest.mark.usefixtures("small")
def test_half_parameters_with_single_states():
    """As after module.half(): states keep more digits than the parameters have."""
    for dtype in (torch.bfloat16, torch.float16):
        params = [torch.randn(size) for size in (3, 5, 20)]
        state = mixed().init(params)
        halves = [p.to(dtype) for p in params]
        grads = [torch.randn_like(p) for p in halves]
        results = []
        for by_tensor in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if by_tensor:
                    patch.setattr(prepare, "is_plain", lambda *args: False)
                results.append(mixed().update(grads, state, halves))
        mine = fo.step_(mixed(), grads, fo.tree.map(torch.clone, state), fo.tree.map(torch.clone, halves))[1]
        assert {leaf.dtype for leaf in fo.tree.flatten(mine)[0]} == {torch.float32, torch.int64}
        assert_equal(results[0], results[1], 1e-5)
        assert_equal(mine, results[1][1], 1e-5)


# Purity. --------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "expanded"])
def test_the_functional_form_modifies_nothing_and_shares_nothing(name):
    p = LAYOUTS[name]
    params = [p, p.new_zeros(3), p.new_zeros(17)]
    tx = mixed()
    state, grads = tx.init(params), [torch.randn_like(p) for p in params]
    _, state = tx.update(grads, state, params)
    given_ones = fo.tree.flatten((params, grads, state))[0]
    before = [(tensor.clone(), tensor._version) for tensor in given_ones]
    for results in (tx.update(grads, state, params), fo.step(tx, grads, state, params)):
        for tensor, (value, version) in zip(given_ones, before, strict=True):
            assert tensor._version == version
            assert torch.equal(tensor, value)
        storages = {tensor.untyped_storage().data_ptr() for tensor in given_ones if tensor.numel()}
        new = {id(tensor): tensor for tensor in fo.tree.flatten(results)[0] if tensor.numel()}.values()
        theirs = [tensor.untyped_storage().data_ptr() for tensor in new]
        assert storages.isdisjoint(theirs)
        assert len(set(theirs)) == len(theirs)
    assert not any(tensor.requires_grad for tensor in fo.tree.flatten(results)[0])


@pytest.mark.usefixtures("small")
def test_expanded_gradients():
    """As from sum().backward(): all elements are one."""
    params = [torch.randn(3, 4, dtype=torch.float64), torch.randn(17, dtype=torch.float64)]

    def draw(p, like_this=None):
        return like(p, like_this) if like_this is not None else torch.randn((), dtype=p.dtype).expand(p.shape)

    both(params, draw=draw)


@pytest.mark.usefixtures("small")
def test_a_step_needs_blocks_and_no_copies(monkeypatch):
    """The memory that a step in place takes does not grow with the tensors."""
    Scratch.of.cache_clear()  # so that all of it is made here
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: made.append(empty(*args, **kwargs)) or made[-1])
    monkeypatch.setattr(
        torch, "empty_strided", lambda *args, **kwargs: pytest.fail("a step in place made a tensor like a parameter")
    )
    params = [torch.randn(1000), torch.randn(30, 30).t(), torch.randn(3)]
    tx = mixed()
    state = tx.init(params)
    fo.step_(tx, [torch.randn(1000), torch.randn(30, 30).t(), torch.randn(3)], state, params)
    assert 0 < max(tensor.numel() for tensor in made) <= blocks.BLOCK
