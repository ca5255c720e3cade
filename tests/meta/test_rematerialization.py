"""Derivatives by computing again: the same in every mode and order, with less memory."""

import pytest
import torch
from catalogue import assert_close
from memory import Alive, peak_bytes
from torch.autograd import forward_ad

import functorch_optim as fo

WEIGHTS = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def training(checkpoint):
    """Return a scalar function of hyperparameters, parameters and data, with two checkpointed steps twice over."""

    def outer(arguments):
        lr, x = arguments["lr"], arguments["x"]
        tx = fo.chain(fo.clip_by_global_norm(5 * lr), fo.adam(lr, eps=1e-3))

        def segment(params, state):
            for _ in range(2):
                grads = torch.func.grad(lambda p: (torch.tanh(WEIGHTS @ p["w"]) * x).square().sum())(params)
                updates, state = tx.update(grads, state, params)
                params = fo.apply_updates(params, updates)
            return params, state

        segment = fo.meta.checkpoint(segment) if checkpoint else segment
        params = {"w": arguments["w"]}
        state = tx.init(params)
        for _ in range(2):
            params, state = segment(params, state)
        return params["w"].sin().sum() + fo.tree.get(state, "exp_avg")["w"].sum()

    return outer


def random_arguments(*batch):
    shapes = {"lr": (), "x": (3,), "w": (3,)}
    return {name: torch.rand((*batch, *shape), dtype=torch.float64) + 0.1 for name, shape in shapes.items()}


def by_autograd(function, order):
    arguments = fo.tree.map(lambda a: a.requires_grad_(), random_arguments())
    grads = torch.autograd.grad(function(arguments), list(arguments.values()), create_graph=order > 1)
    for _ in range(order - 1):
        total = sum(grad.sin().sum() for grad in grads)
        grads = torch.autograd.grad(total, list(arguments.values()), create_graph=True)
    return [grad.detach() for grad in grads]


def by_dual_numbers(function):
    with forward_ad.dual_level():
        duals = fo.tree.map(lambda a: forward_ad.make_dual(a, torch.ones_like(a)), random_arguments())
        return forward_ad.unpack_dual(function(duals)).tangent


def by_a_pullback_and_autograd(function):
    arguments = random_arguments()
    lr = arguments["lr"].requires_grad_()
    value, pullback = torch.func.vjp(lambda w: function({**arguments, "w": w}), arguments["w"])
    (grad,) = pullback(torch.ones_like(value))
    return torch.autograd.grad(grad.sum(), lr)


def over_batch(transformed, name):
    """Batch one argument; share the others."""
    arguments, batch = random_arguments(), random_arguments(4)[name]
    return torch.vmap(lambda one: transformed({**arguments, name: one}))(batch)


def grad_over_batch(function, name):
    arguments, batch = random_arguments(), random_arguments(4)[name]

    def total(arguments, batch):
        return torch.vmap(lambda one: function({**arguments, name: one}))(batch).sum()

    return torch.func.grad(total, argnums=(0, 1))(arguments, batch)


def ones(arguments):
    return fo.tree.map(torch.ones_like, arguments)


MODES = {
    "value": lambda f: f(random_arguments()),
    "grad": lambda f: torch.func.grad(f)(random_arguments()),
    "jvp": lambda f: torch.func.jvp(f, (random_arguments(),), (ones(random_arguments()),)),
    "hessian": lambda f: torch.func.hessian(f)(random_arguments()),
    "reverse over reverse": lambda f: torch.func.jacrev(torch.func.jacrev(f))(random_arguments()),
    "forward over forward": lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(random_arguments()),
    "reverse over forward": lambda f: torch.func.jacrev(torch.func.jacfwd(f))(random_arguments()),
    "vmap x": lambda f: over_batch(f, "x"),
    "vmap lr": lambda f: over_batch(f, "lr"),
    "vmap grad x": lambda f: over_batch(torch.func.grad(f), "x"),
    "vmap grad lr": lambda f: over_batch(torch.func.grad(f), "lr"),
    "vmap hessian lr": lambda f: over_batch(torch.func.hessian(f), "lr"),
    "grad vmap x": lambda f: grad_over_batch(f, "x"),
    "grad vmap lr": lambda f: grad_over_batch(f, "lr"),
    "grad vmap w": lambda f: grad_over_batch(f, "w"),
    "grad vmap grad": lambda f: grad_over_batch(lambda a: torch.func.grad(f)(a)["w"].sum(), "x"),
    "vmap jvp": lambda f: over_batch(lambda a: torch.func.jvp(f, (a,), (ones(a),)), "lr"),
    "jvp vmap": lambda f: torch.func.jvp(lambda lr: over_batch(f, "x") * lr, (WEIGHTS[0, :1],), (WEIGHTS[0, :1],)),
    "autograd": lambda f: by_autograd(f, 1),
    "autograd, second order": lambda f: by_autograd(f, 2),
    "autograd, third order": lambda f: by_autograd(f, 3),
    "dual numbers": by_dual_numbers,
    "a pullback and autograd": by_a_pullback_and_autograd,
}


@pytest.mark.sampled(size=8)
@pytest.mark.parametrize("mode", MODES)
def test_derivatives_are_the_same(mode):
    torch.manual_seed(1)
    expected = MODES[mode](training(checkpoint=False))
    torch.manual_seed(1)
    assert_close(MODES[mode](training(checkpoint=True)), expected, rtol=1e-11, atol=1e-11)


def test_the_comparison_sees_a_captured_tensor_that_is_lost():
    with pytest.raises(AssertionError):
        assert_close(
            torch.func.grad(lambda a: training(checkpoint=True)({**a, "lr": a["lr"].detach()}))(random_arguments()),
            torch.func.grad(training(checkpoint=False))(random_arguments()),
        )


# Memory. --------------------------------------------------------------------------------------------------------------


def powers(x, steps, wrap):
    for _ in range(steps):
        x = wrap(lambda x: x.sin().cos().tanh().exp().sin())(x)
    return x.sum()


@pytest.mark.parametrize("way", ["backward", "torch.func.grad"])
def test_memory_is_that_of_arguments_and_results(way):
    def peak(steps, wrap):
        x = torch.rand(1000, dtype=torch.float64)

        def run():
            if way == "backward":
                leaf = x.clone().requires_grad_()
                powers(leaf, steps, wrap).backward()
            else:
                torch.func.grad(lambda x: powers(x, steps, wrap))(x)

        return peak_bytes(run) / (8 * 1000)

    for wrap, expected in ((fo.meta.checkpoint, (0.9, 2.2)), (lambda function: function, (3.9, 25))):
        each = (peak(40, wrap) - peak(20, wrap)) / 20
        assert expected[0] <= each <= expected[1]


def test_after_backward_nothing_is_kept():
    with Alive() as alive:
        x = torch.rand(1000, requires_grad=True)
        value = powers(x, 5, fo.meta.checkpoint)
        value.backward()
        assert alive.bytes < 4 * 1000 * 3  # x, its gradient, and numbers


# Errors. --------------------------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(_, grad):
        return 2 * grad


def test_captured_tensors_that_cannot_be_found():
    """A tensor that is given to something else than a torch function is out of sight."""
    message = r"of shape \(\) that the function closes over.*: make what the function closes over an argument"
    for use in (Double.apply, torch.func.grad(torch.sin)):

        def hidden(w, use=use):
            return fo.meta.checkpoint(lambda x: x * use(w))(torch.tensor(2.0))

        def mended(w, use=use):
            return fo.meta.checkpoint(lambda x, w: x * use(w))(torch.tensor(2.0), w)

        with pytest.raises(RuntimeError, match=message):
            hidden(torch.tensor(1.0, requires_grad=True))
        expected = torch.func.grad(lambda w, use=use: 2.0 * use(w))(torch.tensor(1.0))
        assert_close(torch.func.grad(mended)(torch.tensor(1.0)), expected)
        if use == Double.apply:  # under torch.func it is in sight
            assert_close(torch.func.grad(hidden)(torch.tensor(1.0)), expected)
        else:
            with pytest.raises(RuntimeError, match=message):
                torch.func.grad(hidden)(torch.tensor(1.0))


def test_functions_that_are_not_pure():
    w = torch.ones((), requires_grad=True)
    used = [w]
    value = fo.meta.checkpoint(lambda x: x * used.pop() if used else x)(torch.ones((), requires_grad=True))
    with pytest.raises(RuntimeError, match=r"of shape \(\) was there when the function ran first.* must be a pure"):
        value.backward()


def test_arguments_that_are_modified():
    with pytest.raises(RuntimeError, match="modifies its arguments in place, and cannot run again"):
        fo.meta.checkpoint(lambda x: x.mul_(2))(torch.ones(2, requires_grad=True) * 1)


def test_constants_that_are_modified_before_the_derivative_is_taken():
    weight, x = torch.tensor(2.0), torch.ones(2, requires_grad=True)
    value = fo.meta.checkpoint(lambda x: (x * weight).sum())(x)
    weight.mul_(3)
    with pytest.raises(RuntimeError, match=r"of shape \(\) that the function closes over was changed in place before"):
        value.backward()


class Output:
    def __init__(self, loss):
        self.loss = loss


def test_results_that_are_no_trees():
    with pytest.raises(TypeError, match="returned a Output, which is neither tensor nor tree"):
        fo.meta.checkpoint(lambda x: Output(x.sum()))(torch.ones(2, requires_grad=True))


def test_compile():
    def function(x):
        return fo.meta.checkpoint(torch.sin)(2 * x)

    x = torch.ones(1, requires_grad=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="torch.compile cannot trace fo.meta.checkpoint"):
        torch.compile(function, backend="eager", fullgraph=True)(x)
    value = torch.compile(function, backend="eager")(x)
    assert_close(torch.autograd.grad(value, x), torch.autograd.grad(function(x), x))
