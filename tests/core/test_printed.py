"""The text of a transformation makes it again: of every function of the library, with arguments that are literals."""

import pytest
import torch

import functorch_optim as fo
from functorch_optim import schedules
from functorch_optim._core.rule import OF_TREE

# What functions need besides their defaults, as users write it.
NEEDED = {
    "accumulate": "(adamw(0.01), 2, mean=False)",
    "adaptive_grad_clip": "(0.1)",
    "add_noise": "(0.1, generator=3)",
    "apply_if_finite": "(adamw(0.01), 2)",
    "cautious": "(adamw(0.01), 'count', descends=True)",
    "clip": "(0.5)",
    "clip_by_block_rms": "(0.5)",
    "clip_by_global_norm": "(0.5, norm_type=inf)",
    "clip_by_norm": "(0.5)",
    "ema": "(0.9)",
    "ema_weights": "(adamw(0.01), 0.9, warmup='timm')",
    "freeze": "({'w': True, 'b': False})",
    "gpa": "(adamw(0.01), 0.9)",
    "inject_hyperparams": "(adamw)(lr=0.01)",
    "kahan": "(adamw(0.01))",
    "lookahead": "(adamw(0.01), 2)",
    "mars": "(adamw(0.01), 0.1)",
    "masked": "(adamw(0.01), {'w': True, 'b': False})",
    "master_weights": "(adamw(0.01))",
    "monitor": "(adamw(0.01), per_layer=True)",
    "offload": "(adamw(0.01), 'cpu')",
    "partition": "({'a': adamw(0.01), 'b': sgd(0.1)}, {'w': 'a', 'b': 'b'})",
    "polynomial_average": "(adamw(0.01), 4.0)",
    "quantized": "(adamw(0.01), 4, min_size=1)",
    "sam": "(adamw(0.01), 0.1, adaptive=True)",
    "scale": "(-0.1)",
    "scale_by_learning_rate": "(cosine(0.1, 10))",
    "scale_by_schedule": "(cosine(-0.1, 10))",
    "schedule_free": "(adamw(0.01), 0.8, r=1.0)",
    "stochastic_rounding": "(adamw(0.01), 3)",
    "swa": "(adamw(0.01), 2)",
}
NAMES = sorted(set(fo.names()) - set(schedules.__all__) - {"schedules.swa"} | {"swa"})
WITHOUT_TEXT = {"cast_states", "project", "sgld", "skip"}  # these take a dtype, functions, or a generator


def trained(tx):
    params = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]]), "b": torch.tensor([[0.3, -0.7]])}
    state = tx.init(params)

    def loss(params):
        return sum([(p.square() - p).sum() for p in params.values()])

    known = {"value": loss(params), "value_fn": loss, "grad_fn": torch.func.grad(loss)}
    declared = {name for link in tx._links for name in link.rule.extras.names} - OF_TREE
    extras = {name: known[name] for name in declared & known.keys()}
    for _ in range(3):
        params, state = fo.step(tx, torch.func.grad(loss)(params), state, params, **extras)
    return params


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_TEXT])
def test_the_text_of_a_transformation_makes_it_again(name):
    tx = fo.get(name + NEEDED.get(name, "()"))
    again = fo.get(repr(tx))
    assert repr(again) == repr(tx)
    assert name in repr(tx)
    torch.testing.assert_close(trained(again), trained(tx), rtol=0, atol=0, equal_nan=True)


def test_the_text_of_a_wrapped_factory_makes_it_again():
    factory = fo.get("accumulate(cautious(adamw), 2)")
    again = fo.get(repr(factory))
    assert repr(again) == repr(factory)
    assert repr(again(0.5)) == repr(factory(0.5))
