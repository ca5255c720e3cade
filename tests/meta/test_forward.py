"""Gradients by forward mode: those of reverse mode, under all transforms, in memory that does not grow."""

import pytest
import torch
from catalogue import CATALOGUE, hyperparameters, loss, make_params, train
from derivatives import differences
from memory import peak_bytes

import functorch_optim as fo
from functorch_optim.meta import forward_grad

F64 = {"dtype": torch.float64}
ways = pytest.mark.parametrize("vectorize", [False, True], ids=["one by one", "at once"])


def outcome(row, cut=lambda leaf: leaf):
    """Return the loss after training as a function of hyperparameters, by name."""
    params, x = make_params(), torch.linspace(0.5, 1.5, 3, **F64)
    steps = 7 if "radam" in row.name else 4  # RAdam begins as SGD does

    def after_training(numbers):
        tx = fo.chain(row(**numbers), fo.scale(0.05))  # updates that are no steps, such as a trace, would diverge
        trained, state = params, tx.init(params)
        for _ in range(steps):
            trained, state = train(tx, trained, x, 1, fo.tree.map(cut, state))
        return loss(trained, x)

    return after_training


def numbers_of(row):
    return {name: torch.tensor(value, **F64) for name, value in row.hyperparameters.items()}


def quadratic(lr, steps=3):
    """Train w on w * w from w = 1 without a transformation: the gradient is in closed form."""
    w = torch.ones((), **F64)
    for _ in range(steps):
        w = w - lr * torch.func.grad(lambda w: w * w)(w)
    return w * w


def slope(lr, steps=3):
    return -4 * steps * (1 - 2 * lr) ** (2 * steps - 1)


# Exact. ---------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=12)
@hyperparameters
def test_is_reverse_mode_and_finite_differences(row, name):
    f, number = outcome(row), numbers_of(row)[name]
    forward, reverse = [grad(lambda number: f({name: number}))(number) for grad in (forward_grad, torch.func.grad)]
    torch.testing.assert_close(forward, reverse, rtol=1e-10, atol=1e-13)
    width = 1e-2 if number.abs() < 1e-4 else 1e-4  # rounding hides the effect of a small part of a small number
    [expected] = differences(lambda z: f({name: z[0]}), number.reshape(1), width)
    torch.testing.assert_close(forward, expected, rtol=1e-6, atol=1e-8)
    # Some have no effect: Rprop's bounds that are not met, machine epsilon.
    assert (forward != 0) == (expected != 0)


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("row", [row for row in CATALOGUE if row.hyperparameters], ids=lambda row: row.name)
def test_all_hyperparameters_at_once(row):
    f, numbers = outcome(row), numbers_of(row)
    expected = torch.func.grad(f)(numbers)
    for vectorize in (False, True):
        torch.testing.assert_close(forward_grad(f, vectorize=vectorize)(numbers), expected, rtol=1e-10, atol=1e-13)


@ways
def test_a_derivative_that_is_cut_is_noticed(vectorize):
    row = next(row for row in CATALOGUE if row.name == "sgd_momentum")
    numbers = numbers_of(row)
    expected = torch.func.grad(outcome(row))(numbers)
    actual = forward_grad(outcome(row, torch.Tensor.detach), vectorize=vectorize)(numbers)
    assert abs(actual["momentum"] - expected["momentum"]) > 0.01 * abs(expected["momentum"])


# Under transforms. ----------------------------------------------------------------------------------------------------


@ways
def test_composes(vectorize):
    """In closed form: the derivatives of the gradient, in both modes, a batch of them, both."""
    grad = forward_grad(quadratic, vectorize=vectorize)
    lr = torch.tensor(0.1, **F64)
    curvature = 60 * (1 - 2 * lr) ** 4 * 2
    for outer in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev, forward_grad):
        torch.testing.assert_close(outer(grad)(lr), curvature, rtol=1e-12, atol=0)
    third = -8 * 2 * 60 * (1 - 2 * lr) ** 3
    torch.testing.assert_close(torch.func.hessian(grad)(lr), third, rtol=1e-12, atol=0)
    many = torch.linspace(0.05, 0.3, 4, **F64)
    torch.testing.assert_close(torch.vmap(grad)(many), slope(many), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.vmap(torch.func.grad(grad))(many), 120 * (1 - 2 * many) ** 4, rtol=1e-12, atol=0)
    whole = torch.func.grad(lambda many: torch.vmap(grad)(many).sum())(many)
    torch.testing.assert_close(whole, 120 * (1 - 2 * many) ** 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sgd_nesterov", "adamw", "chain"])
def test_second_derivatives_of_training(name):
    row = next(row for row in CATALOGUE if row.name == name)
    f, numbers = outcome(row), numbers_of(row)
    lr = numbers.pop("lr")
    grad = forward_grad(lambda lr: f({"lr": lr, **numbers}))
    expected = torch.func.hessian(lambda lr: f({"lr": lr, **numbers}))(lr)
    assert expected != 0
    torch.testing.assert_close(torch.func.grad(grad)(lr), expected, rtol=1e-10, atol=0)


@pytest.mark.sampled(pool="compiled")
@ways
def test_compiles(vectorize):
    compiled = torch.compile(forward_grad(quadratic, vectorize=vectorize), fullgraph=True, backend="eager")
    lr = torch.tensor(0.1, **F64)
    torch.testing.assert_close(compiled(lr), slope(lr), rtol=1e-12, atol=0)


def regression(reduction, weight):
    """Return the parameters after training as a function of the learning rate: the target is a constant."""
    x, y = torch.linspace(-1, 1, 6, **F64).reshape(3, 2), torch.ones(3, 1, **F64)

    def loss(w, _):
        return torch.nn.functional.mse_loss(x @ w, y, reduction=reduction, weight=weight).sum()

    return lambda lr: fo.meta.unroll(loss, fo.sgd(lr), torch.ones(2, 1, **F64), range(3)).params.sum()


@pytest.mark.parametrize("weight", [None, torch.tensor([[1.0], [0.5], [2.0]], **F64)], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_of_training_with_squared_errors_is_reverse_mode(reduction, weight):
    f, lr = regression(reduction, weight), torch.tensor(0.05, **F64)
    expected = torch.func.grad(f)(lr)
    tangent = lambda lr: torch.func.jvp(f, (lr,), (torch.ones_like(lr),))[1]
    for way in (forward_grad(f), torch.func.jacfwd(f), tangent, lambda lr: torch.vmap(tangent)(lr[None])[0]):
        torch.testing.assert_close(way(lr), expected, rtol=1e-10, atol=0)


LOSSES = {
    "huber_loss": lambda x, y: torch.nn.functional.huber_loss(x, y, delta=0.5),
    "mse_loss": torch.nn.functional.mse_loss,
    "soft_margin_loss": lambda x, y: torch.nn.functional.soft_margin_loss(x, y.sign()),
    "glu": lambda x, y: torch.nn.functional.glu(x + y).sin().sum(),
}


@pytest.mark.sampled(size=1)
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_losses_are_replaced_too(name):
    x, y = [torch.linspace(*ends, 6, dtype=torch.float64) for ends in ((-1.0, 2.0), (2.0, -1.5))]

    def slope(rate):
        def trained(rate):
            return fo.meta.unroll(lambda w, b: LOSSES[name](w * x, y), fo.sgd(rate), x, range(3)).params.sum()

        return torch.func.jvp(trained, (rate,), (torch.ones_like(rate),))[1]

    rate = torch.tensor(0.1, dtype=torch.float64)
    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rate), slope(rate))


@ways
def test_autograd_records_nothing_unless_it_is_told_to(vectorize):
    lr, start = torch.tensor(0.1, **F64).requires_grad_(), torch.ones((), **F64).requires_grad_()
    f = lambda lr: start * quadratic(lr)
    constant = forward_grad(f, vectorize=vectorize)(lr)
    assert not constant.requires_grad
    recorded = forward_grad(f, vectorize=vectorize, create_graph=True)(lr)
    assert constant == recorded
    derivatives = torch.autograd.grad(recorded, (lr, start))
    torch.testing.assert_close(derivatives[0], 120 * (1 - 2 * lr.detach()) ** 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(derivatives[1], slope(lr.detach()), rtol=1e-12, atol=0)
    with torch.no_grad():
        assert not forward_grad(f, vectorize=vectorize, create_graph=True)(lr).requires_grad
    # Between autograd and a transform: what the transform differentiates is not recorded by autograd.
    assert not torch.vmap(forward_grad(f, vectorize=vectorize))(lr.expand(2)).requires_grad


# Memory. --------------------------------------------------------------------------------------------------------------


def training(steps, weights):
    """Return a training run: a function of a learning rate and a momentum."""
    x = torch.linspace(-1, 1, 8).reshape(8, 1)
    objective = lambda weights: (torch.tanh(x @ weights["hidden"]) @ weights["output"] - x.sin()).square().mean()

    def loss_after_training(numbers):
        tx, moving = fo.sgd(numbers["lr"], numbers["momentum"]), weights
        state = tx.init(moving)
        for _ in range(steps):
            updates, state = tx.update(torch.func.grad(objective)(moving), state)
            moving = fo.apply_updates(moving, updates)
        return objective(moving)

    return loss_after_training


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize(("vectorize", "requires_grad"), [(False, True), (True, False)])
def test_memory_does_not_grow_with_the_steps(vectorize, requires_grad):
    weights = {"hidden": torch.randn(1, 16), "output": torch.randn(16, 1)}
    weights = {name: w.requires_grad_(requires_grad) for name, w in weights.items()}
    numbers = {"lr": torch.tensor(0.01), "momentum": torch.tensor(0.9)}

    def peak(steps, grad=lambda f: forward_grad(f, vectorize=vectorize)):
        return peak_bytes(lambda: grad(training(steps, weights))(numbers))

    short = peak(10)
    assert short > 0
    assert peak(50) <= 1.01 * short
    # Negative controls: the count sees what reverse mode keeps, and what autograd is told to record.
    assert peak(50, torch.func.grad) > 3 * peak(10, torch.func.grad) > 3 * short
    recorded = [peak(steps, lambda f: forward_grad(f, vectorize=vectorize, create_graph=True)) for steps in (10, 40)]
    assert (recorded[1] > 3 * recorded[0]) == requires_grad


# What goes in and comes out. ------------------------------------------------------------------------------------------


def mixed(a, name, b, scale=1.0):
    assert name == "name"
    return scale * ((a["w"] ** 2).sum() * a["c"].abs() ** 2 + (a["c"] * b[0]).real + 2 * b[0].exp())


@ways
def test_trees_argnums_and_complex_numbers(vectorize, device):
    a = {"w": torch.randn(2, 2), "none": None, "c": torch.tensor(1 + 2j, dtype=torch.complex128)}
    b = [torch.tensor(0.5, **F64)]
    a, b = fo.tree.map(lambda leaf: leaf.to(device), (a, b))
    expected = torch.func.grad(lambda w, c, b: mixed({"w": w, "c": c}, "name", [b], scale=3.0), (0, 1, 2))(
        a["w"], a["c"], b[0]
    )
    first = forward_grad(mixed, vectorize=vectorize)(a, "name", b, scale=3.0)
    assert list(first) == ["w", "none", "c"]
    assert first["none"] is None
    torch.testing.assert_close((first["w"], first["c"]), expected[:2])
    last = forward_grad(mixed, -1, vectorize=vectorize)(a, "name", b, scale=3.0)
    torch.testing.assert_close(last, [expected[2]])
    both = forward_grad(mixed, (2, 0), vectorize=vectorize)(a, "name", b, scale=3.0)
    torch.testing.assert_close(both, (last, first))


def test_numbers_of_several_devices(device):
    lr, weight = torch.tensor(0.5), torch.tensor(2.0, device=device)
    first, second = forward_grad(lambda lr, weight: lr.to(device) * weight**2, (0, 1))(lr, weight)
    assert (first.item(), first.device, second.item(), second.device) == (4.0, lr.device, 2.0, weight.device)


@ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, vectorize):
    numbers = {"low": torch.tensor([1.0, -2.0], dtype=dtype), "high": torch.tensor(3.0, **F64)}
    gradient = forward_grad(lambda n: (n["low"] ** 2).sum() * n["high"], vectorize=vectorize)(numbers)
    expected = {"low": torch.tensor([6.0, -12.0], dtype=dtype), "high": torch.tensor(5.0, **F64)}
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


@ways
def test_what_has_no_effect_has_gradient_zero(vectorize):
    gradient = forward_grad(lambda lr, unused: lr * 2, (0, 1), vectorize=vectorize)(torch.ones(()), torch.ones(2))
    torch.testing.assert_close(gradient, (torch.tensor(2.0), torch.zeros(2)))


@ways
def test_aux(vectorize):
    """The value and the trained parameters come out as they are, of the one run."""

    def f(lr):
        value = (lr["lr"] ** 2).sum() * weights.sum()
        return value, {"value": value, "weights": (weights * lr["lr"][0], weights)}

    weights, lr = torch.randn(3).requires_grad_(), {"lr": torch.tensor([2.0, 3.0])}
    gradient, aux = forward_grad(f, has_aux=True, vectorize=vectorize)(lr)
    torch.testing.assert_close(gradient, {"lr": 2 * lr["lr"] * weights.sum().detach()})
    torch.testing.assert_close(aux, {"value": 13 * weights.sum(), "weights": (2 * weights, weights)})
    assert not aux["value"].requires_grad
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.forward_ad.unpack_dual(aux["value"]).tangent is None


def test_random_numbers_are_those_of_one_run_where_it_is_one():
    noisy = lambda lr: (lr * torch.randn(2)).sum()
    torch.manual_seed(0)
    gradient = forward_grad(noisy, vectorize=True)(torch.ones(2))
    torch.manual_seed(0)
    torch.testing.assert_close(gradient, torch.randn(2))


def test_errors():
    lr = torch.tensor(0.1)
    for nothing in (None, {}, torch.zeros(0), [None, torch.zeros(2, 0)]):
        with pytest.raises(ValueError, match=r"There is no number .* in the arguments \(1,\); choose by argnums"):
            forward_grad(lambda a, b: a, 1)(lr, nothing)
    with pytest.raises(TypeError, match="at '0.steps' has dtype torch.int64"):
        forward_grad(lambda n: n["lr"])({"lr": lr, "steps": torch.tensor(3)})
    with pytest.raises(TypeError, match="at '0.lr' is a float, not a tensor"):
        forward_grad(lambda n: n["lr"])({"lr": 0.1})
    for vectorize in (False, True):
        for wrong, text in [
            (lambda lr: lr.repeat(2), r"a tensor of shape \(2,\) and dtype torch.float32"),
            (lambda lr: lr * 1j, r"a tensor of shape \(\) and dtype torch.complex64"),
            (lambda lr: lr > 0, r"a tensor of shape \(\) and dtype torch.bool"),
            (lambda lr: (lr, lr), "a tuple"),
            (lambda lr: None, "a NoneType"),
        ]:
            with pytest.raises(ValueError, match=f"must return one real number, a 0-dim tensor, got {text}"):
                forward_grad(wrong, vectorize=vectorize)(lr)
