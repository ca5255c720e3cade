"""The check of a derivative has the right verdict: right, wrong, missing, or in doubt."""

import pytest
import torch

import functorch_optim as fo

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def verdicts(function, *args, **options):
    check = fo.meta.check_derivative(function, *args, **options)
    return [check.verdict(mode) for mode in check.found]


RIGHT = {
    "a sine": (lambda x: x.sin().sum(), torch.ones(3)),
    "a steep function": (lambda x: (20 * x).exp(), torch.tensor(1.0)),
    "a small argument": (lambda x: (x * 1e6).sin(), torch.tensor(1e-6)),
    "close to a kink": (torch.abs, torch.tensor(1e-3)),
    "zero": (lambda x: 0 * x, torch.tensor(1.0)),
    "at zero": (lambda x: x.square().sum() + x.sum(), torch.zeros(3)),
    "a complex argument": (lambda z: (z * z.conj() * 1j * z).real, torch.tensor(1.0 + 2.0j)),
    "trees, and what is no number": (
        lambda t, n, s: (t["a"] ** n).sum() + t["b"][0],
        {"a": X[0], "b": [X[1, 1]]},
        3,
        "s",
    ),
    "numbers in float32": (lambda x: x.float().square().sum().double(), torch.ones(3)),
    "training": (lambda w, lr: fo.meta.unroll(loss, fo.adam(lr), w, X).losses.sum(), torch.ones(3), torch.tensor(0.1)),
}


def loss(w, x):
    return (w @ x).sin().square()


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    check = fo.meta.check_derivative(*RIGHT[name])
    assert check.ok, check
    assert str(check).count("right") == 2


def test_the_number_is_the_directional_derivative():
    check = fo.meta.check_derivative(lambda x: 3 * x, torch.tensor(2.0), seed=1)
    direction = 2 * torch.randn((), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert check.differences == pytest.approx(3 * float(direction), rel=1e-10)
    assert check.found["reverse"] == pytest.approx(3 * float(direction), rel=1e-12)


class OffByATenth(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, _):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad * 0.9


def test_wrong():
    assert verdicts(lambda x: x * x.detach(), torch.tensor(2.0)) == ["wrong by 50 %"] * 2
    assert verdicts(lambda x: x.detach().sin(), torch.tensor(2.0)) == ["wrong by 100 %"] * 2
    reverse, forward = verdicts(OffByATenth.apply, torch.tensor(2.0))
    assert reverse == "wrong by 10 %"
    assert forward.startswith("raises: ")
    assert verdicts(OffByATenth.apply, torch.tensor(2.0), modes=["reverse"]) == ["wrong by 10 %"]
    assert verdicts(OffByATenth.apply, torch.tensor(2.0), modes="reverse") == ["wrong by 10 %"]
    assert not fo.meta.check_derivative(OffByATenth.apply, torch.tensor(2.0)).ok
    slightly = lambda x: x + 1e-4 * (x - x.detach())
    assert verdicts(slightly, torch.tensor(2.0)) == ["wrong by 0.01 %"] * 2


def test_in_doubt():
    for function, x in ((torch.relu, 0.0), (torch.abs, 0.0), (lambda x: x.clamp(max=1.0), 1.0)):
        check = fo.meta.check_derivative(function, torch.tensor(x))
        assert not check.ok
        assert "is there a kink" in str(check), check
    assert verdicts(lambda x: x * torch.rand(()), torch.tensor(1.0))[0].startswith(
        "in doubt: the function returns another"
    )
    assert verdicts(torch.sqrt, torch.tensor(0.0)) == ["not finite"] * 2


@pytest.mark.parametrize(
    ("message", "function", "args", "options"),
    [
        ("no floating-point tensor in the arguments", lambda n: n, (3,), {}),
        (
            r"must return one real number, a 0-dim tensor, got a tensor of shape \(3,\)",
            lambda x: x,
            (torch.ones(3),),
            {},
        ),
        ("got a float", lambda x: 1.0, (torch.ones(3),), {}),
        (r"Invalid modes: \['backward'\]; give 'reverse'", torch.sin, (torch.tensor(1.0),), {"modes": ["backward"]}),
    ],
)
def test_errors(message, function, args, options):
    with pytest.raises(ValueError, match=message):
        fo.meta.check_derivative(function, *args, **options)
