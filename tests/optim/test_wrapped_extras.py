"""A wrapper that passes `**extra` on is given the loss if the wrapped transformation declares it, and not otherwise."""

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


class Forwarding:
    """A wrapper whose update is a method: what it wraps is in no closure, and is declared."""

    def __init__(self, tx):
        self.tx = tx

    def update(self, updates, state, params, **extra):
        return self.tx.update(updates, state, params, **extra)


@transformations
@pytest.mark.parametrize("wraps", [lambda tx: tx, lambda tx: (tx, fo.identity())], ids=["one", "several"])
def test_what_is_wrapped_may_be_declared(name, wraps):
    make = TRANSFORMATIONS[name]
    tx = fo.GradientTransformation(make().init, Forwarding(make()).update, wraps=wraps(make()))
    plain = fo.meta.unroll(loss, make(), W, X)
    assert_close(fo.meta.unroll(loss, tx, W, X).params, plain.params)
    if name != "value":  # the negative control: undeclared, it is given the loss, and nothing else
        opaque = fo.GradientTransformation(make().init, Forwarding(make()).update)
        with pytest.raises(TypeError, match="got the extra 'value'|needs the extra 'value_fn'"):
            fo.meta.unroll(loss, opaque, W, X)


@transformations
def test_closures(name):
    def trained(tx):
        p = torch.nn.Parameter(W["w"].clone())
        opt = fo.Optimizer([("w", p)], tx)

        def closure():
            opt.zero_grad()
            value = loss({"w": p}, X)
            value.backward()
            return value

        for _ in range(3):
            opt.step(closure)
        return p.detach()

    make = TRANSFORMATIONS[name]
    assert_close(trained(wrapped(make())), trained(make()))
    assert_close(
        fo.minimize(lambda w: loss(w, X), W, wrapped(make()), tol=0.0, max_steps=3).params["w"], trained(make())
    )


def test_errors():
    tx, ones = wrapped(fo.chain(fo.sgd(0.1), fo.reduce_on_plateau())), {"w": torch.ones(2)}
    state = tx.init(ones)
    with pytest.raises(
        TypeError, match=r"wrapped needs the extra 'value'; call tx.update\(updates, state, params, value"
    ):
        tx.update(ones, state, ones)
    with pytest.raises(TypeError, match=r"wrapped needs the extra 'value'; call step\(tx, grads, state, params, value"):
        fo.step(tx, ones, state, ones)
    with pytest.raises(
        TypeError, match="got the extra 'vaule', which nothing in the chain declares; declared are: value"
    ):
        fo.step_(tx, ones, state, ones, vaule=1.0)
    with pytest.raises(TypeError, match="sgd is not a GradientTransformation"):
        fo.GradientTransformation(tx.init, tx.update, wraps=(fo.sgd,))


def test_what_takes_any_extra_and_wraps_nothing_is_given_the_loss():
    given = []

    def update(updates, state, params, **extra):
        given.append(extra)
        return updates, state

    trained = fo.meta.unroll(loss, fo.GradientTransformation(lambda params: (), update), W, X[:1])
    assert given == [{"value": trained.losses[0]}]


@pytest.mark.sampled(pool="compiled")
def test_compiled_whole():
    tx = wrapped(fo.sgd(0.1, momentum=0.9))

    def outer(params):
        return loss(fo.meta.unroll(loss, tx, params, X).params, X[0])

    compiled = torch.compile(torch.func.grad(outer), fullgraph=True, backend="aot_eager")
    assert_close(compiled(W), torch.func.grad(outer)(W))
