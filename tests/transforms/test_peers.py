"""The same numbers as other libraries, where they are installed; see benchmarks/peers.txt."""

import numpy as np
import pytest
import torch

import functorch_optim as fo

SHAPES = {"bias": (3,), "kernel": (3, 4)}


def history(steps=4):
    return [{name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()} for _ in range(steps)]


BLOCKS = {
    "ema": (fo.ema(0.9), lambda o: o.ema(0.9)),
    "ema_biased": (fo.ema(0.9, False), lambda o: o.ema(0.9, debias=False)),
    "optimistic": (fo.optimistic_gradient(0.7, 0.3), lambda o: o.scale_by_optimistic_gradient(0.7, 0.3)),
    "block_rms": (fo.clip_by_block_rms(0.5), lambda o: o.clip_by_block_rms(0.5)),
    "trust_ratio": (fo.scale_by_trust_ratio(0.1, 0.5, 0.2), lambda o: o.scale_by_trust_ratio(0.1, 0.5, 0.2)),
    "normalize": (fo.normalize_by_update_norm(2.0, 0.1), lambda o: o.normalize_by_update_norm(2.0, 0.1)),
    "sign": (fo.scale_by_sign(), lambda o: o.scale_by_sign()),
    "centralize": (fo.centralize(), lambda o: o.centralize()),
    "nonnegative": (fo.keep_params_nonnegative(), lambda o: o.keep_params_nonnegative()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_equal_optax(name):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    ours, theirs = BLOCKS[name][0], BLOCKS[name][1](optax)
    [params, *grads] = history()
    with jax.enable_x64(True):
        arrays = [{key: jax.numpy.asarray(leaf.numpy()) for key, leaf in tree.items()} for tree in (params, *grads)]
        state, peer = ours.init(params), theirs.init(arrays[0])
        for g, a in zip(grads, arrays[1:], strict=True):
            updates, state = ours.update(g, state, params)
            expected, peer = theirs.update(a, peer, arrays[0])
            for key, leaf in updates.items():
                np.testing.assert_allclose(leaf.numpy(), np.asarray(expected[key]), rtol=1e-12, atol=1e-14)
            assert not np.allclose(updates["kernel"].numpy() * 1.001, np.asarray(expected["kernel"]), rtol=1e-6)


PROJECTIONS = [
    (
        lambda x: fo.projections.box(x, -0.5, 0.5),
        lambda p, x: p.projection_box(x, *[dict.fromkeys(x, bound) for bound in (-0.5, 0.5)]),
    ),
    (lambda x: fo.projections.simplex(x, 2.0), lambda p, x: p.projection_simplex(x, 2.0)),
    (lambda x: fo.projections.l1_ball(x, 2.0), lambda p, x: p.projection_l1_ball(x, 2.0)),
    (lambda x: fo.projections.l2_ball(x, 2.0), lambda p, x: p.projection_l2_ball(x, 2.0)),
    (lambda x: fo.projections.linf_ball(x, 0.5), lambda p, x: p.projection_linf_ball(x, 0.5)),
    (lambda x: fo.projections.sphere(x, 2.0), lambda p, x: p.projection_l2_sphere(x, 2.0)),
    (fo.projections.nonnegative, lambda p, x: p.projection_non_negative(x)),
]


@pytest.mark.parametrize("case", range(len(PROJECTIONS)))
def test_projections_equal_optax(case):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    ours, theirs = PROJECTIONS[case]
    [x] = history(1)
    with jax.enable_x64(True):
        expected = theirs(optax.projections, {key: jax.numpy.asarray(leaf.numpy()) for key, leaf in x.items()})
        for key, leaf in ours(x).items():
            np.testing.assert_allclose(leaf.numpy(), np.asarray(expected[key]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("clipping", [0.01, 0.3, 10.0])
def test_adaptive_grad_clip_equals_timm(clipping):
    agc = pytest.importorskip("timm.utils.agc")
    [params, grads] = history(2)
    theirs = {key: torch.nn.Parameter(leaf.clone()) for key, leaf in params.items()}
    for key, p in theirs.items():
        p.grad = grads[key].clone()
    agc.adaptive_clip_grad(theirs.values(), clipping, eps=1e-3)
    tx = fo.adaptive_grad_clip(clipping)
    for key, leaf in tx.update(grads, tx.init(params), params)[0].items():
        torch.testing.assert_close(leaf, theirs[key].grad, rtol=1e-12, atol=0)


def test_orthogonal_gradients_equal_pytorch_optimizers():
    peers = pytest.importorskip("pytorch_optimizer")
    [params, grads] = history(2)
    theirs = {key: torch.nn.Parameter(leaf.clone()) for key, leaf in params.items()}
    for key, p in theirs.items():
        p.grad = grads[key].clone()
    peers.OrthoGrad(torch.optim.SGD(theirs.values(), lr=1.0)).step()
    tx = fo.chain(fo.orthogonalize_against_params(), fo.sgd(1.0))
    for key, leaf in fo.step(tx, grads, tx.init(params), params)[0].items():
        torch.testing.assert_close(leaf, theirs[key].detach(), rtol=1e-6, atol=1e-6)


def test_corrected_decay_equals_timms_where_the_first_rate_is_the_largest():
    timm = pytest.importorskip("timm.optim.adamw")
    rates = [0.1, 0.05, 0.02]
    [params, *grads] = history(1 + len(rates))
    theirs = {key: torch.nn.Parameter(leaf.clone()) for key, leaf in params.items()}
    opt = timm.AdamWLegacy(theirs.values(), lr=rates[0], weight_decay=0.3, corrected_weight_decay=True)
    schedule = fo.schedules.table(torch.tensor(rates, dtype=torch.float64))
    tx = fo.chain(
        fo.scale_by_adam(), fo.add_decayed_weights(0.3, kind="corrected"), fo.scale_by_learning_rate(schedule)
    )
    state = tx.init(params)
    for lr, g in zip(rates, grads, strict=True):
        params, state = fo.step(tx, g, state, params)
        for group in opt.param_groups:
            group["lr"] = lr
        for key, p in theirs.items():
            p.grad = g[key].clone()
        opt.step()
    for key, leaf in params.items():
        torch.testing.assert_close(leaf, theirs[key].detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("theirs", "stepped", "ours"),
    [
        ({}, False, {}),
        ({}, True, {"start": 1}),
        ({"update_after_step": 2}, True, {"start": 3}),
        ({"use_warmup": True}, True, {"warmup": "timm"}),
        ({"use_warmup": True, "update_after_step": 2}, True, {"warmup": "timm", "start": 2}),
    ],
)
def test_exponential_averages_equal_timms(theirs, stepped, ours):
    model_ema = pytest.importorskip("timm.utils.model_ema")
    model = torch.nn.Linear(3, 2)
    average = model_ema.ModelEmaV3(model, decay=0.7, **theirs)
    tx, params = fo.ema_weights(fo.sgd(1.0), 0.7, **ours), fo.params_of(model)
    state = tx.init(params)
    for t in range(1, 7):
        grads = fo.tree.map(lambda p: torch.full_like(p, 0.1 * t), params)
        params, state = fo.step(tx, grads, state, params)
        model.load_state_dict(params)
        average.update(model, **({"step": t} if stepped else {}))
    expected = dict(average.module.named_parameters())
    for key, leaf in fo.eval_params(tx, state, params).items():
        torch.testing.assert_close(leaf, expected[key].detach(), rtol=1e-5, atol=1e-6)
