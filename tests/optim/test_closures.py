"""Transformations that evaluate the loss or its gradient again, in every loop that knows the loss."""

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo

X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RHO = 0.3


def sam(tx, rho=RHO):
    """Write sharpness-aware minimization as a user would: tx is given the gradient at p + rho g / |g|."""

    def update(updates, state, params, *, grad_fn, **extra):
        norm = fo.safe_sqrt(sum(g.square().sum() for g in fo.tree.flatten(updates)[0] if g is not None))
        moved = fo.tree.map(lambda p, g: p if g is None else p + rho * g / norm, params, updates)
        return tx.update(grad_fn(moved), state, params, **extra)

    return fo.GradientTransformation(tx.init, update, wraps=tx)


def loss(params, x):
    return (x @ params["w"] + params["b"]).sin().square().mean()


def start():
    return {"w": torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64), "b": torch.tensor(0.1, dtype=torch.float64)}


def by_hand(steps=4, lr=0.2, momentum=0.9):
    """SAM with momentum by its formulas."""
    params, buffers = start(), dict.fromkeys(start(), 0.0)
    for _ in range(steps):
        grads = torch.func.grad(loss)(params, X)
        norm = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
        moved = {name: p + RHO * grads[name] / norm for name, p in params.items()}
        again = torch.func.grad(loss)(moved, X)
        buffers = {name: momentum * buffers[name] + again[name] for name in params}
        params = {name: p - lr * buffers[name] for name, p in params.items()}
    return params


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(start()[name]) for name in ("w", "b"))

    def forward(self, x):
        return loss(dict(self.named_parameters()), x)


def closure_of(model, opt, set_to_none=True):
    def closure():
        opt.zero_grad(set_to_none=set_to_none)
        value = model(X)
        value.backward()
        return value

    return closure


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def make():
    return sam(fo.sgd(0.2, momentum=0.9))


def test_in_unroll():
    unrolled = fo.meta.unroll(loss, make(), start(), [X] * 4)
    assert_close(unrolled.params, by_hand())
    plain = fo.meta.unroll(loss, fo.sgd(0.2, momentum=0.9), start(), [X] * 4).params
    assert not torch.allclose(plain["w"], by_hand()["w"], rtol=1e-3)


def test_derivatives_of_unroll():
    def after(rho):
        return loss(fo.meta.unroll(loss, sam(fo.sgd(0.2), rho), start(), [X] * 3).params, X)

    rho, eps = torch.tensor(0.3, dtype=torch.float64), 1e-6
    expected = (after(rho + eps) - after(rho - eps)) / (2 * eps)
    assert_close(torch.func.grad(after)(rho), expected, rtol=1e-6, atol=1e-9)


def test_in_minimize():
    found = fo.minimize(lambda params: loss(params, X), start(), make(), tol=0.0, max_steps=4)
    assert_close(found.params, by_hand())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("way", ["transformation", "factory", "groups", "lists"])
def test_in_optimizers(way, set_to_none):
    model = Model()
    if way == "transformation":
        opt = fo.Optimizer(model.named_parameters(), make())
    elif way == "lists":
        opt = fo.Optimizer(model.parameters(), fo.chain(make(), fo.scale(1.0)))
    elif way == "groups":
        opt = fo.Optimizer([{"params": [model.w]}, {"params": [model.b]}], make())
    else:
        opt = fo.Optimizer(model.parameters(), lambda lr, rho: sam(fo.sgd(lr, momentum=0.9), rho), lr=0.2, rho=RHO)
    for _ in range(4):
        before = loss(trained(model), X)
        assert_close(opt.step(closure_of(model, opt, set_to_none)).detach(), before)
    assert_close(trained(model), by_hand())


def test_what_has_no_gradient_stays():
    model = Model()
    other = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = fo.Optimizer([model.w, other, model.b], sam(fo.sgd(0.2, momentum=0.9, weight_decay=0.0)))
    for _ in range(4):
        opt.step(closure_of(model, opt))
    assert_close(trained(model), by_hand())
    assert torch.equal(other, torch.ones(2, dtype=torch.float64))


def test_gradients_and_parameters_are_put_back():
    """The closure's last evaluation leaves no trace, also where it raises."""
    model, calls = Model(), []
    opt = fo.Optimizer(model.parameters(), make())
    closure = closure_of(model, opt)

    def second_raises():
        calls.append(trained(model)["w"].clone())
        if len(calls) == 2:
            raise ArithmeticError("second")
        return closure()

    with pytest.raises(ArithmeticError, match="second"):
        opt.step(second_raises)
    assert not torch.equal(calls[0], calls[1])
    assert_close(trained(model), start())
    assert_close({"w": model.w.grad, "b": model.b.grad}, torch.func.grad(loss)(start(), X))
    assert not opt.state

    opt.step(closure)
    assert_close({"w": model.w.grad, "b": model.b.grad}, torch.func.grad(loss)(start(), X))


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("groups", [False, True])
def test_lbfgs_is_that_of_torch(line_search_fn, groups):
    ours, theirs = Model(), Model()
    params = [{"params": [ours.w]}, {"params": [ours.b]}] if groups else ours.parameters()
    opt = fo.Optimizer(params, fo.lbfgs(0.5, max_iter=6, line_search_fn=line_search_fn))
    reference = torch.optim.LBFGS(theirs.parameters(), lr=0.5, max_iter=6, line_search_fn=line_search_fn)
    for _ in range(3):
        values = [o.step(closure_of(m, o)) for o, m in ((opt, ours), (reference, theirs))]
        assert_close(values[0].detach(), values[1].detach(), rtol=1e-9, atol=1e-12)
    assert_close(trained(ours), trained(theirs), rtol=1e-6, atol=1e-9)


def test_lbfgs_with_a_factory():
    model = Model()
    opt = fo.Optimizer(model.parameters(), fo.lbfgs, line_search_fn="strong_wolfe")
    first = opt.step(closure_of(model, opt))
    assert loss(trained(model), X) < 0.1 * first


def test_second_derivatives_of_a_closure_are_refused():
    def newton():
        def update(updates, state, params, *, value_fn):
            def slope(p):
                return torch.func.grad(value_fn)(p)["w"].sum()

            return torch.func.grad(slope)(params), state

        return fo.GradientTransformation(lambda params: (), update)

    model = Model()
    opt = fo.Optimizer(model.named_parameters(), newton())
    with pytest.raises(RuntimeError, match=r"closure has first derivatives only.*step\(closure, value_fn=loss\)"):
        opt.step(closure_of(model, opt))
    opt.step(closure_of(model, opt), value_fn=lambda params: loss(params, X))


def test_errors():
    model = Model()
    opt = fo.Optimizer(model.parameters(), make())
    with pytest.raises(
        TypeError, match=r"sam needs the extra 'grad_fn'; call opt.step\(closure\), or opt.step\(grad_fn"
    ):
        opt.step()
    differentiable = fo.Optimizer([p.clone() for p in model.parameters()], make(), differentiable=True)
    with pytest.raises(TypeError, match=r"sam needs the extra 'grad_fn'; call opt.step\(closure, grad_fn=...\)"):
        differentiable.step(lambda: model(X))

    def returns_nothing():
        closure_of(model, opt)()

    plateau = fo.Optimizer(model.parameters(), fo.chain(fo.sgd(0.1), fo.reduce_on_plateau()))
    for optimizer, message in (
        (plateau, "closure returned None, and the transformation needs the loss: end the closure with `return loss`"),
        (opt, "closure must return a loss, a 0-dim tensor, got a NoneType"),
        (fo.optim.LBFGS(model.parameters()), "closure returned None, and LBFGS needs the loss"),
    ):
        with pytest.raises(TypeError, match=message):
            optimizer.step(returns_nothing)
    assert_close(trained(model), start())
    for optimizer in (opt, fo.optim.LBFGS(model.parameters())):
        with pytest.raises(TypeError, match="step takes a closure, a function .*; got a Tensor. After loss.backward"):
            optimizer.step(model(X))
    with (
        pytest.raises(TypeError, match=r"call inner.step\(loss, value_fn=...\)"),
        fo.meta.inner_loop(model, fo.lbfgs()) as inner,
    ):
        inner.step(inner(X))
