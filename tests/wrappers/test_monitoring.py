"""Monitored training: the numbers of numpy, at fixed structure, and the same updates."""

import numpy as np
import pytest
import torch

import functorch_optim as fo

PARAMS = {"layer": {"w": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([0.0])}, "unused": torch.tensor([2.0])}
GRADS = {"layer": {"w": torch.tensor([[6.0, 0.0]]), "b": torch.tensor([8.0])}, "unused": None}
NAMES = ["grad_norm", "update_norm", "update_ratio"]


def step(tx, state=None, params=PARAMS, grads=GRADS):
    return fo.step(tx, grads, tx.init(params) if state is None else state, params)


def test_the_numbers_are_those_of_numpy():
    tx = fo.monitor(fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.5)), per_layer=True)
    params, state = step(tx)
    found = {name: float(value) for name, value in fo.metrics(state).items()}
    change = np.concatenate(
        [
            p.numpy().ravel() - q.numpy().ravel()
            for p, q in zip(*(fo.tree.flatten(t)[0] for t in (params, PARAMS)), strict=True)
        ]
    )
    assert list(found)[:4] == ["grad_norm", "grad_norm/layer.b", "grad_norm/layer.w", "grad_norm/unused"]
    assert [found[name] for name in ("grad_norm", "grad_norm/layer.b", "grad_norm/layer.w")] == [10.0, 8.0, 6.0]
    np.testing.assert_allclose(found["update_norm"], np.linalg.norm(change), rtol=1e-6)
    np.testing.assert_allclose(found["update_ratio"], np.linalg.norm(change) / np.linalg.norm([3, 4, 0, 2]), rtol=1e-6)
    np.testing.assert_allclose(found["update_ratio/layer.w"], 0.3 / 5, rtol=1e-6)
    assert found["update_ratio/layer.b"] == np.inf  # 0.4 of nothing
    assert found["grad_norm/unused"] == found["update_norm/unused"] == found["update_ratio/unused"] == 0


def test_the_updates_are_the_same_and_the_structure_stays():
    tx, plain = fo.monitor(fo.adam(0.1), per_layer=True), fo.adam(0.1)
    state, expected_state, params, expected = tx.init(PARAMS), plain.init(PARAMS), PARAMS, PARAMS
    before = fo.tree.flatten(state)
    for _ in range(3):
        params, state = step(tx, state, params)
        expected, expected_state = step(plain, expected_state, expected)
        torch.testing.assert_close(params, expected, rtol=1e-6, atol=0)  # another kernel rounds otherwise
        leaves, structure = fo.tree.flatten(state)
        assert structure == before[1]
        assert [(t.shape, t.dtype) for t in leaves] == [(t.shape, t.dtype) for t in before[0]]
    assert list(fo.metrics(fo.monitor(plain).init(PARAMS))) == NAMES
    assert all(value == 0 for value in fo.metrics(tx.init(PARAMS)).values())


def test_precision():
    half = fo.tree.cast(PARAMS, torch.bfloat16)
    _, state = step(fo.monitor(fo.sgd(0.1)), params=half, grads=fo.tree.cast(GRADS, torch.bfloat16))
    assert fo.metrics(state)["grad_norm"].dtype == torch.float32
    double = fo.tree.cast(PARAMS, torch.complex128)
    _, state = step(
        fo.monitor(fo.sgd(0.1)), params=double, grads=fo.tree.scale(1j, fo.tree.cast(GRADS, torch.complex128))
    )
    assert fo.metrics(state)["grad_norm"] == 10
    assert fo.metrics(state)["grad_norm"].dtype == torch.float64


def test_sparse_gradients():
    weight = torch.ones(4, 2)
    grad = torch.sparse_coo_tensor([[1, 1]], [[3.0, 0.0], [0.0, 4.0]], (4, 2), check_invariants=True)
    _, state = step(fo.monitor(fo.sgd(0.1)), params=weight, grads=grad)
    assert fo.metrics(state)["grad_norm"] == 5


def test_a_step_that_is_left_out_keeps_the_numbers():
    tx = fo.accumulate(fo.monitor(fo.sgd(0.5)), 2)
    params, state = step(tx)
    params, state = step(tx, state, params)
    kept = fo.metrics(state)
    params, state = step(tx, state, params)
    torch.testing.assert_close(fo.metrics(state)["update_norm"], kept["update_norm"])
    assert kept["update_norm"] == 5


def test_several_monitors_are_told_apart():
    tx = fo.partition({"a": fo.monitor(fo.sgd(0.1)), "b": fo.monitor(fo.adam(0.1))}, {"layer": "a", "unused": "b"})
    _, state = step(tx, grads={"layer": GRADS["layer"], "unused": torch.tensor([7.0])})
    found = fo.metrics(state)
    assert sorted(found) == sorted([f"{part}.{name}" for part in "ab" for name in NAMES])
    assert (found["a.grad_norm"], found["b.grad_norm"]) == (10.0, 7.0)


def test_derivatives_are_those_of_finite_differences():
    tx = fo.monitor(fo.sgd(0.3, momentum=0.5), per_layer=True)
    params = fo.tree.cast({"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.5])}, torch.float64)

    def numbers(w, b):
        grads = {"w": w.sin(), "b": b}
        _, state = step(tx, params={"w": w, "b": b}, grads=grads)
        return tuple(fo.metrics(state).values())

    inputs = [p.requires_grad_() for p in params.values()]
    assert torch.autograd.gradcheck(numbers, inputs, check_forward_ad=True)
    zero = torch.func.grad(lambda w: fo.metrics(step(tx, params=w, grads=w)[1])["update_ratio"])(torch.zeros(2))
    assert zero.tolist() == [0.0, 0.0]


@pytest.mark.sampled(pool="compiled")
def test_under_vmap_and_compiled():
    tx = fo.monitor(fo.adam(0.1))

    def run(scale):
        _, state = step(tx, grads=fo.tree.scale(scale, GRADS))
        return fo.metrics(state)

    scales = torch.tensor([1.0, 2.0])
    batched = torch.vmap(run)(scales)
    assert batched["grad_norm"].tolist() == [10.0, 20.0]
    compiled = torch.compile(run, backend="eager", fullgraph=True)(scales[1])
    torch.testing.assert_close(compiled, run(scales[1]))


@pytest.mark.parametrize("with_factory", [False, True])
def test_an_optimizer_shows_them(with_factory):
    params = [torch.nn.Parameter(p.clone()) for p in fo.tree.flatten(PARAMS)[0]]
    names = fo.tree.paths(PARAMS)
    named = list(zip(names, params, strict=True))
    if with_factory:
        opt = fo.Optimizer(named, fo.monitor(fo.adam, per_layer=True), lr=0.1)
    else:
        opt = fo.Optimizer(named, fo.monitor(fo.adam(0.1), per_layer=True))
    assert set(opt.metrics.values()) <= {torch.tensor(0.0)} or all(value == 0 for value in opt.metrics.values())
    for p, g in zip(params, fo.tree.flatten(GRADS)[0], strict=True):
        p.grad = g
    opt.step()
    _, state = step(fo.monitor(fo.adam(0.1), per_layer=True))
    expected = fo.metrics(state)
    assert list(opt.metrics) == list(expected)
    torch.testing.assert_close(opt.metrics, expected)
    saved = opt.state_dict()
    again = fo.Optimizer(named, fo.monitor(fo.adam(0.1), per_layer=True))
    again.load_state_dict({**saved, "param_groups": again.state_dict()["param_groups"]})
    torch.testing.assert_close(again.metrics, expected)


def test_groups_are_told_apart():
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    opt = fo.Optimizer([{"params": [p]} for p in params], fo.monitor(fo.sgd), lr=0.1)
    params[1].grad = torch.tensor([3.0])
    opt.step()
    assert sorted(opt.metrics) == sorted([f"{n}.{name}" for n in range(2) for name in NAMES])
    assert (opt.metrics["0.grad_norm"], opt.metrics["1.grad_norm"]) == (0.0, 3.0)


def test_mistakes():
    with pytest.raises(ValueError, match="monitor needs the parameters, but update was called without them"):
        fo.monitor(fo.sgd(0.1)).update(GRADS, fo.monitor(fo.sgd(0.1)).init(PARAMS))
    with pytest.raises(TypeError, match=r"is not a GradientTransformation; as in: monitor\(adamw\(1e-3\)\)"):
        fo.monitor(0.1)
    with pytest.raises(ValueError, match=r"Nothing in the state is a monitor's; write tx = monitor\(adamw\(1e-3\)\)"):
        fo.metrics(fo.adam().init(PARAMS))
    with pytest.raises(ValueError, match="Nothing in the state is a monitor's"):
        _ = fo.Optimizer([torch.nn.Parameter(torch.ones(1))], fo.adam(0.1)).metrics
