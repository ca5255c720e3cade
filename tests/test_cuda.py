"""What only a GPU can show: that no step waits for it, and that functional steps can be captured in a CUDA graph."""

import pytest
import torch

import functorch_optim as fo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCHEDULE = fo.schedules.warmup_cosine(0.1, 2, 10)
CHAINS = {
    "adam": fo.adam(0.1),
    "adamw_clipped": fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(SCHEDULE)),
    "sgd": fo.sgd(0.1, momentum=0.9, dampening=0.1),
    "nadam": fo.nadam(0.1),
    "rmsprop": fo.rmsprop(0.1, centered=True, momentum=0.9),
    "muon": fo.muon(0.1),
}
chains = pytest.mark.parametrize("name", CHAINS)
CLASSES = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop")


def trees(count=2):
    return [{"a": torch.randn(4, 3, device="cuda"), "b": torch.randn(3, 2, device="cuda")} for _ in range(count)]


@pytest.fixture
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_waiting")
def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(1, device="cuda").item()


@chains
@pytest.mark.usefixtures("no_waiting")
def test_functional_steps_do_not_wait(name):
    tx = CHAINS[name]
    params, grads = trees()
    state = tx.init(params)
    for _ in range(3):
        params, state = fo.step(tx, grads, state, params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        params, state = fo.step_(tx, grads, state, params)


@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_stateful_steps_do_not_wait(name, fused, request):
    params = [torch.randn(4, 3, device="cuda", requires_grad=True) for _ in range(3)]
    options = {} if fused is None else {"fused": fused}
    optimizer = getattr(fo.optim, name)(params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()  # compiling may wait
    request.getfixturevalue("no_waiting")
    for _ in range(3):
        optimizer.step()


@chains
def test_a_functional_step_is_captured(name):
    tx = CHAINS[name]
    params, grads = trees()
    expected, expected_state = dict(params), tx.init(params)
    for _ in range(6):
        expected, expected_state = fo.step(tx, grads, expected_state, expected)

    state = tx.init(params)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # captures want what they need to be there
        fo.step(tx, grads, state, params)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new_params, new_state = fo.step(tx, grads, state, params)
        for old, new in zip(
            fo.tree.flatten((params, state))[0], fo.tree.flatten((new_params, new_state))[0], strict=True
        ):
            old.copy_(new)
    for _ in range(6):
        graph.replay()
    for ours, theirs in zip(fo.tree.flatten(params)[0], fo.tree.flatten(expected)[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_stateful_steps_refuse_to_be_captured():
    p = torch.randn(3, device="cuda", requires_grad=True)
    p.grad = torch.randn_like(p)
    optimizer = fo.optim.Adam([p], capturable=True)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="Capture the functional step"), torch.cuda.graph(graph):
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}])
@chains
def test_ways_agree(name, options):
    tx = CHAINS[name]
    params, grads = trees()
    expected, _ = fo.step(tx, grads, tx.init(params), params)
    copies = fo.tree.map(torch.clone, params)
    moved, _ = fo.step_(tx, grads, tx.init(copies), copies, **options)
    for ours, theirs in zip(fo.tree.flatten(moved)[0], fo.tree.flatten(expected)[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
