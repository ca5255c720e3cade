"""The same numbers as optax's optimizers, as docs/migration/optax.md says; where it is installed."""

import numpy as np
import pytest
import torch

import functorch_optim as fo

OPTIMISTIC = fo.optimistic_gradient(0.5, 0.25)

SAME = {
    "cocob": (fo.cocob(weight_decay=0.1), lambda o: o.contrib.cocob(weight_decay=0.1)),
    "dadapt_adamw": (
        fo.dadapt_adam(0.5, weight_decay=0.1, use_bias_correction=True, decoupled_weight_decay=True, d0=1e-2),
        lambda o: o.contrib.dadapt_adamw(0.5, weight_decay=0.1, estim_lr0=1e-2),
    ),
    "dog": (fo.dog(reps_rel=0.1), lambda o: o.contrib.dog(init_step=("heuristic", 0.1))),
    "dowg": (fo.dowg(0.5), lambda o: o.contrib.dowg(0.5)),
    "fromage": (fo.fromage(0.01), lambda o: o.fromage(0.01)),
    "madgrad": (fo.madgrad(0.01, weight_decay=0.1), lambda o: o.contrib.madgrad(0.01, weight_decay=0.1)),
    "momo": (fo.momo(lb=0.1), lambda o: o.contrib.momo(lower_bound=0.1)),
    "momo_adam": (fo.momo_adam(0.02, lb=0.1), lambda o: o.contrib.momo_adam(0.02, lower_bound=0.1)),
    "novograd": (
        fo.novograd(0.01, betas=(0.9, 0.25), eps=1e-6, weight_decay=0.1),
        lambda o: o.novograd(0.01, weight_decay=0.1),
    ),
    "optimistic_adam_v2": (
        fo.chain(fo.scale_by_nadamw(correct_ahead=True), OPTIMISTIC, fo.scale_by_learning_rate(0.1)),
        lambda o: o.optimistic_adam_v2(0.1, alpha=0.5, beta=0.25),
    ),
    "optimistic_gradient_descent": (
        fo.chain(OPTIMISTIC, fo.sgd(0.1)),
        lambda o: o.optimistic_gradient_descent(0.1, alpha=0.5, beta=0.25),
    ),
    "polyak_sgd": (fo.polyak(0.1, f_min=0.2), lambda o: o.polyak_sgd(0.1, f_min=0.2)),
    "prodigy": (
        fo.prodigy(0.5, weight_decay=0.1, use_bias_correction=True, d0=1e-2),
        lambda o: o.contrib.prodigy(0.5, weight_decay=0.1, estim_lr0=1e-2),
    ),
    "simplified_ademamix": (
        fo.simplified_ademamix(0.01, alpha=0.5, weight_decay=0.1),
        lambda o: o.contrib.simplified_ademamix(0.01, alpha=0.5, weight_decay=0.1),
    ),
    "sm3": (fo.sm3(0.1), lambda o: o.sm3(0.1)),
}


@pytest.mark.parametrize("name", SAME)
def test_an_optimizer_has_the_numbers_of_optax(name):
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    ours, theirs = SAME[name][0], optax.with_extra_args_support(SAME[name][1](optax))
    asks = "value" in {name for link in ours._links for name in link.rule.extras.names}
    shapes = {"bias": (3,), "kernel": (3, 4)}
    params, *history = [
        {key: torch.randn(shape, dtype=torch.float64) for key, shape in shapes.items()} for _ in range(9)
    ]
    first, state = params, ours.init(params)
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda p: jax.numpy.asarray(p.numpy()), params)
        peer = theirs.init(arrays)
        for t, grads in enumerate(history):
            given = {"value": torch.tensor(2.0 / (t + 1), dtype=torch.float64)} if asks else {}
            params, state = fo.step(ours, grads, state, params, **given)
            updates, peer = theirs.update(
                jax.tree.map(lambda g: jax.numpy.asarray(g.numpy()), grads), peer, arrays, value=2.0 / (t + 1)
            )
            arrays = optax.apply_updates(arrays, updates)
            for key, p in params.items():
                # optax takes some roots of its step in float32.
                np.testing.assert_allclose(p.numpy(), np.asarray(arrays[key]), rtol=1e-7, atol=1e-9)
    assert max((params[key] - p).abs().max() for key, p in first.items()) > 1e-3
