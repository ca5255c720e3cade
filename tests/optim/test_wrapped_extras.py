"""A wrapper that passes `**extra` on is given the loss where what it wraps declares it, and not otherwise."""

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = {"w": torch.ones(3, dtype=torch.float64)}


def loss(params, x):
    return (params["w"] * x).sin().square().sum()


def wrapped(tx):
    """As the documents write it."""

    def update(updates, state, params, **extra):
        return tx.update(updates, state, params, **extra)

    return fo.GradientTransformation(tx.init, update)


TRANSFORMATIONS = {
    "nothing": lambda: fo.sgd(0.1, momentum=0.9),
    "value": lambda: fo.chain(fo.sgd(0.1), fo.reduce_on_plateau(patience=0, factor=0.5)),
    "value_fn": lambda: fo.lbfgs(line_search_fn="strong_wolfe"),
}
transformations = pytest.mark.parametrize("name", TRANSFORMATIONS)


@transformations
def test_unroll(name):
    make = TRANSFORMATIONS[name]
    plain = fo.meta.unroll(loss, make(), W, X)
    for tx in (wrapped(make()), wrapped(fo.chain(wrapped(make()), fo.scale(1.0)))):
        trained = fo.meta.unroll(loss, tx, W, X)
        assert_close((trained.params, trained.losses), (plain.params, plain.losses))


@pytest.mark.parametrize("name", ["nothing", "value"])
def test_inner_loop(name):
    module = torch.nn.Linear(3, 1).double()

    def adapted(tx):
        with fo.meta.inner_loop(module, tx) as inner:
            for x in X:
                inner.step(inner(x).square().sum())
        return inner.params

    make = TRANSFORMATIONS[name]
    assert_close(adapted(wrapped(make())), adapted(make()))


def test_what_takes_any_extra_and_wraps_nothing_is_given_the_loss():
    given = []

    def update(updates, state, params, **extra):
        given.append(extra)
        return updates, state

    trained = fo.meta.unroll(loss, fo.GradientTransformation(lambda params: (), update), W, X[:1])
    assert given == [{"value": trained.losses[0]}]


def test_compiled_whole():
    tx = wrapped(fo.sgd(0.1, momentum=0.9))

    def outer(params):
        return loss(fo.meta.unroll(loss, tx, params, X).params, X[0])

    compiled = torch.compile(torch.func.grad(outer), fullgraph=True, backend="aot_eager")
    assert_close(compiled(W), torch.func.grad(outer)(W))
