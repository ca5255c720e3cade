"""A function that does not do the same again, when a checkpoint runs it for the derivative, is an error."""

import random

import pytest
import torch

import functorch_optim as fo

X = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W = torch.ones(3, dtype=torch.float64)
MESSAGE = "has other values now that the function runs again"


class Impure:
    """A loss with something that is not torch's."""

    def __init__(self, kind):
        self.kind, self.generator, self.weight = kind, torch.Generator(), 1.0
        self.dropout = torch.nn.Dropout(0.5)
        torch.manual_seed(0)
        random.seed(0)

    def __call__(self, w, batch=None):
        x = X
        if self.kind == "generator":
            x = X * torch.rand(X.shape, generator=self.generator, dtype=X.dtype)
        if self.kind == "python":
            x = X * random.random()
        if self.kind == "module":
            x = self.dropout(X)
        return self.weight * (x @ w).square().mean()

    def change(self):
        self.dropout.eval()
        self.weight = 0.5 if self.kind == "weight" else 1.0


kinds = pytest.mark.parametrize("kind", ["generator", "python", "module", "weight"])


@kinds
@pytest.mark.parametrize("checkpoint", [True, 1])
def test_unroll(kind, checkpoint):
    loss = Impure(kind)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    trained = fo.meta.unroll(loss, fo.adam(lr), W, range(4), checkpoint=checkpoint)
    loss.change()
    with pytest.raises(RuntimeError, match=MESSAGE):
        trained.losses.sum().backward()


WAYS = {
    "reverse": lambda f: torch.func.grad(f)(W),
    "forward": lambda f: torch.func.jvp(f, (W,), (W,)),
    "second order": lambda f: torch.func.hessian(f)(W),
    "in vmap": lambda f: torch.vmap(torch.func.grad(f))(W.expand(2, 3)),
    "over vmap": lambda f: torch.func.grad(lambda w: torch.vmap(f)(w * X[:2]).sum())(W),
    "forward over vmap": lambda f: torch.func.jvp(lambda w: torch.vmap(f)(w * X[:2]).sum(), (W,), (W,)),
}


@pytest.mark.parametrize("way", WAYS)
def test_in_transforms(way):
    with pytest.raises(RuntimeError, match=MESSAGE):
        WAYS[way](fo.meta.checkpoint(Impure("python")))


def test_where_only_the_gradient_of_the_second_run_differs():
    """The values are the same in the first and the second run; the third, for the second derivative, has others."""
    runs = []

    @fo.meta.checkpoint
    def function(x):
        runs.append(None)
        return x**3 if len(runs) < 3 else x**3 + x**2

    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.grad(torch.func.grad(function))(torch.tensor(2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_rounding_is_no_difference(dtype):
    """As where threads add up in another order."""
    eps = torch.finfo(dtype).eps
    factors = [1.0 + 4 * eps, 1.0]
    function = fo.meta.checkpoint(lambda x: x * factors.pop())
    assert torch.func.grad(lambda x: function(x).abs().sum())(torch.ones(5, dtype=dtype)).isfinite().all()


def test_nan_and_infinity_are_like_themselves():
    values = torch.tensor([0.0, 1.0, -1.0])
    function = fo.meta.checkpoint(lambda x: (x / values, torch.arange(3), x > 0, torch.zeros(0)))
    for x in (torch.zeros(3), torch.ones(3)):
        x.requires_grad_()
        function(x)[0][1].backward()
        assert x.grad.tolist()[1] == 1.0


def test_another_integer_is_a_difference():
    numbers = [2, 1]
    function = fo.meta.checkpoint(lambda x: (x * 2, torch.tensor(numbers.pop())))
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.func.grad(lambda x: function(x)[0])(torch.tensor(1.0))


def test_results_that_were_modified_are_those_of_the_first_run():
    x = torch.ones(3, requires_grad=True)
    y = fo.meta.checkpoint(lambda x: x * 2)(x)
    y.mul_(3)
    y.sum().backward()
    assert x.grad.tolist() == [6.0] * 3
