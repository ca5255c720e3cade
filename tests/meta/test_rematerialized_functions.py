"""Functions that are computed again: what they close over, draw at random, return, and see."""

import functools

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo

WEIGHTS = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# What a function closes over. -----------------------------------------------------------------------------------------


class Holder(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.reshape(1, -1)).sum()

    @property
    def squared(self):
        return self.weight * self.weight


def by_operator(w):
    return lambda x: (w * x).sum()


def by_default(w):
    return lambda x, w=w: torch.add(x, w).prod()


def by_list(w):
    return lambda x: torch.stack([w, x, w]).prod(0).sum()


def by_keyword(w):
    return lambda x: torch.addcmul(x, tensor1=w, tensor2=w).sum()


def by_index(w):
    return lambda x: (w[1:] * x[:-1] + w[0]).sum()


def by_partial(w):
    return functools.partial(torch.dot, w)


def by_attribute(w):
    return Holder(w)


def by_property(w):
    return lambda x: (Holder(w).squared * x).sum()


def by_result(w):
    return lambda x: (x.sum(), w)


@pytest.mark.parametrize(
    "make",
    [by_operator, by_default, by_list, by_keyword, by_index, by_partial, by_attribute, by_property, by_result],
    ids=lambda make: make.__name__,
)
def test_captured_tensors_have_derivatives(make):
    w, x = torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    ws = torch.rand(2, 3, dtype=torch.float64)

    def outer(w, x, wrap):
        result = wrap(make(w))(x)
        return sum(part.sin().sum() for part in result) if isinstance(result, tuple) else result.sin()

    def same(function):
        return function

    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1)),
        lambda f: torch.func.hessian(f, argnums=(0, 1)),
        lambda f: functools.partial(torch.func.jvp, f, tangents=(x, w)),
    ):
        given = ((w, x),) if isinstance(transform(lambda w, x: w), functools.partial) else (w, x)
        plain, again = [transform(functools.partial(outer, wrap=wrap))(*given) for wrap in (same, fo.meta.checkpoint)]
        assert_close(again, plain)
    plain, again = [
        torch.vmap(torch.func.grad(functools.partial(outer, wrap=wrap)), in_dims=(0, None))(ws, x)
        for wrap in (same, fo.meta.checkpoint)
    ]
    assert_close(again, plain)
    v = w.clone().requires_grad_()
    outer(v, x, fo.meta.checkpoint).backward()
    assert_close(v.grad, torch.func.grad(functools.partial(outer, wrap=same))(w, x))


def test_what_is_returned_may_be_any_tree():
    @fo.meta.checkpoint
    def function(x, *, scale):
        return {"x": (x * scale,), "name": "x", "none": None, "count": torch.tensor(3), "first": x}

    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    result = function(x, scale=2.0)
    assert (result["name"], result["none"], result["count"].item()) == ("x", None, 3)
    assert not result["count"].requires_grad
    (result["x"][0].sum() + result["first"].sum()).backward()
    assert torch.equal(x.grad, torch.full((2,), 3.0, dtype=torch.float64))


def test_complex_numbers():
    x = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(fo.meta.checkpoint(lambda x: (x * x.conj()).sin()), x)
    assert torch.autograd.gradgradcheck(fo.meta.checkpoint(lambda x: (x * x.conj()).sin()), x)


def test_random_numbers_are_drawn_again_alike(device):
    def noisy(x):
        return (x * torch.nn.functional.dropout(torch.ones_like(x))).square().sum()

    x = torch.rand(100, dtype=torch.float64, device=device, requires_grad=True)
    grads = []
    for wrap in (lambda function: function, fo.meta.checkpoint):
        torch.manual_seed(3)
        value = wrap(noisy)(x) + wrap(noisy)(x)
        following = torch.rand(1)
        grads.append((torch.autograd.grad(value, x)[0], following, torch.rand(1)))
    assert_close(*grads, rtol=0, atol=0)
    functional = torch.func.grad(fo.meta.checkpoint(noisy))
    torch.manual_seed(3)
    value = torch.func.grad(noisy)(x)
    torch.manual_seed(3)
    assert_close(functional(x), value, rtol=0, atol=0)


def test_autocast_is_entered_again():
    x = torch.rand(8, 8, requires_grad=True)
    seen = []

    @fo.meta.checkpoint
    def function(x):
        seen.append((x @ x).dtype)
        return (x @ x).float().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function(x)
    value.backward()
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_nothing_is_computed_again_when_no_derivative_is_wanted():
    calls = []
    function = fo.meta.checkpoint(lambda x: calls.append(1) or x * x)
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert not function(x).requires_grad
    assert not function(x.detach()).requires_grad
    assert len(calls) == 2


def test_the_function_does_not_see_that_it_is_given_constants():
    model = torch.nn.Linear(3, 1).double()
    model.bias.requires_grad_(False)
    frozen = torch.ones(3, dtype=torch.float64)

    def penalized(x, y):
        assert x.requires_grad
        assert x.is_leaf
        assert not y.requires_grad
        penalty = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
        return model(x * y).square().sum() + penalty

    x = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    values = [wrap(penalized)(x, frozen) for wrap in (lambda function: function, fo.meta.checkpoint)]
    assert_close(*values)
    assert_close(*[torch.autograd.grad(value, [x, model.weight]) for value in values])


def test_recurrent_layers():
    layer = torch.nn.LSTM(3, 4)
    x = torch.rand(5, 2, 3)
    grads = []
    for wrap in (lambda function: function, fo.meta.checkpoint):
        layer.zero_grad()
        wrap(lambda x: layer(x)[0].square().sum())(x).backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_results_may_be_modified():
    x = torch.rand(2, 3, requires_grad=True)
    value = torch.nn.ReLU(inplace=True)(fo.meta.checkpoint(lambda x: x - 0.5)(x)).sum()
    assert_close(torch.autograd.grad(value, x)[0], (x > 0.5).float())


def test_inference_mode():
    with torch.inference_mode():
        assert fo.meta.checkpoint(torch.neg)(torch.ones(())).item() == -1
