"""The learning rate finder: all rates at once, against trainings one by one; its curve, suggestion and drawing."""

import sys

import pytest
import torch
from torch import nn

import functorch_optim as fo

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6, 1)
BATCHES = [(x, (3 * x).sin()) for x in X] * 2
RATES = torch.logspace(-3, 1, 5, dtype=torch.float64)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_of(model):
    def loss_fn(params, batch):
        return (torch.func.functional_call(model, params, (batch[0],)) - batch[1]).square().mean()

    return loss_fn


def with_torch(model, make, lr):
    """Train as torch does, and return the loss of each batch before its step."""
    params = [p.detach().clone().requires_grad_() for p in model.parameters()]
    named = dict(zip(dict(model.named_parameters()), params, strict=True))
    opt, losses = make(params, lr), []
    for batch in BATCHES:
        loss = loss_of(model)(named, batch)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("factory", "make"),
    [
        (fo.adam, lambda params, lr: torch.optim.Adam(params, lr)),
        (lambda lr: fo.sgd(lr, 0.9), lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9)),
    ],
)
def test_each_rate_has_the_losses_of_a_training_of_its_own(model, factory, make, vectorize):
    sweep = fo.lr_sweep(loss_of(model), factory, fo.params_of(model), BATCHES, RATES, vectorize=vectorize)
    expected = torch.tensor([with_torch(model, make, lr) for lr in RATES.tolist()]).T.double()
    torch.testing.assert_close(sweep.losses, expected, rtol=1e-6, atol=1e-9)
    assert sweep.losses.shape == (len(BATCHES), len(RATES))
    assert not torch.allclose(sweep.losses[-1, 0], sweep.losses[-1, 2], rtol=1e-3)


def quadratic(x, h):
    return 0.5 * h * x**2


def test_on_a_parabola_the_suggestion_is_newtons_rate():
    steps, h = 6, 2.0
    rates = torch.tensor([0.01, 0.05, 0.1, 0.4, 0.5, 0.6, 0.9, 1.5], dtype=torch.float64)
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    sweep = fo.lr_sweep(quadratic, fo.sgd, x, [h] * steps, rates, smoothing=0.8)
    t = torch.arange(steps, dtype=torch.float64)[:, None]
    expected = 0.5 * h * 9 * (1 - rates * h) ** (2 * t)
    torch.testing.assert_close(sweep.losses, expected, rtol=1e-12, atol=1e-12)
    mean, weight = torch.zeros(len(rates), dtype=torch.float64), 0.0
    for loss in expected:  # the mean of a running average, corrected for its beginning at zero
        mean, weight = 0.8 * mean + 0.2 * loss, 0.8 * weight + 0.2
    torch.testing.assert_close(sweep.smoothed, mean / weight, rtol=1e-12, atol=1e-12)
    assert sweep.suggestion == 0.5 == 1 / h
    assert sweep.diverging == 1.5  # more than 2 / h
    slopes = torch.gradient((mean / weight)[:5], spacing=(rates[:5].log(),))[0]
    assert sweep.steepest == rates[slopes.argmin()].item() < sweep.suggestion
    assert not sweep.losses.requires_grad
    assert x.item() == 3.0


def test_runs_that_end_in_nan_or_inf_diverge_and_spoil_no_other():
    def loss_fn(x, batch):
        return (x - 1) ** 2

    sweep = fo.lr_sweep(loss_fn, fo.sgd, torch.tensor(0.0), range(20), [0.1, 0.4, 40.0, 1e30])
    assert sweep.suggestion == pytest.approx(0.4)
    assert sweep.diverging == 40.0
    assert sweep.smoothed[2:].isinf().all()
    assert "Training diverges from 40 on. That is the next rate: a third of 0.4 is safer" in sweep.reason
    assert repr(sweep).count("diverges\n") == 2


def test_small_rates_that_hardly_train_do_not_diverge():
    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [1.0] * 20, [1e-4, 1e-2, 1.0])
    assert sweep.diverging is None  # though their loss is more than four times the best
    assert "It is the largest rate here: try larger ones." in sweep.reason
    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [1.0] * 20, [1.0, 1.5, 1.9])
    assert "It is the smallest rate here: try smaller ones." in sweep.reason
    assert sweep.steepest is None


def test_where_no_rate_helps_there_is_no_suggestion():
    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [1.0] * 5, [3.0, 4.0])
    assert sweep.suggestion is sweep.steepest is None
    assert sweep.reason.startswith("No rate lowers the smoothed loss, 0.5, in 5 steps: try other rates")
    assert "<- suggestion" not in repr(sweep)


def test_what_the_loss_is_without_training_is_seen_on_all_batches():
    batches = [0.1, 1.0, 1.0, 1.0]  # of which the first is easy
    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), batches, [0.01, 0.1], smoothing=0.5)
    expected = 0.5 * (1 * 0.1 + (2 + 4 + 8) * 1.0) / 15
    assert sweep.untrained == pytest.approx(expected, rel=1e-6)
    assert sweep.suggestion == 0.1


def test_all_rates_have_the_same_dropout():
    def loss_fn(params, batch):
        return (nn.functional.dropout(params["w"], 0.5) - 0.3).square().sum()

    sweep = fo.lr_sweep(loss_fn, fo.sgd, {"w": torch.ones(50)}, range(4), [1e-9, 1e-8])
    torch.testing.assert_close(sweep.losses[:, 0], sweep.losses[:, 1], rtol=1e-5, atol=0)


def test_buffers_are_carried_by_each_rate():
    def loss_fn(x, batch, buffers):
        buffers["count"] += 1
        return (x - buffers["count"]).square(), buffers

    def as_unroll(x, batch, buffers):
        loss, _ = loss_fn(x, batch, buffers)
        return loss

    for vectorize in (True, False):
        sweep = fo.lr_sweep(
            as_unroll, fo.sgd, torch.tensor(0.0), range(3), [1e-9, 1e-8],
            buffers={"count": torch.zeros(())}, vectorize=vectorize,
        )  # fmt: skip
        torch.testing.assert_close(sweep.losses[:, 0], torch.tensor([1.0, 4.0, 9.0]).double(), rtol=1e-5, atol=0)


def test_a_loop_goes_where_vmap_cannot_and_says_how_far_it_is():
    def loss_fn(x, batch):
        return (x - 1) ** 2 if x.item() < 0.5 else 2 * (x - 1) ** 2

    calls = []
    arguments = (loss_fn, fo.sgd, torch.tensor(0.0), range(10), [0.01, 0.1, 0.2])
    sweep = fo.lr_sweep(*arguments, vectorize=False, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert sweep.suggestion == 0.2
    with pytest.raises(RuntimeError, match=r"Without torch\.vmap: lr_sweep\(\.\.\., vectorize=False\)"):
        fo.lr_sweep(*arguments)
    with pytest.raises(ValueError, match=r"without progress to show; write lr_sweep\(\.\.\., vectorize=False\)"):
        fo.lr_sweep(*arguments, progress=print)


def test_an_iterator_of_batches_serves_all_rates():
    for vectorize in (True, False):
        sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), iter([1.0] * 4), [0.1, 0.2], vectorize=vectorize)
        assert sweep.losses.shape == (4, 2)


def test_an_error_of_the_loss_is_raised_as_it_is():
    def loss_fn(x, batch):
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="^out of data$"):
        fo.lr_sweep(loss_fn, fo.sgd, torch.tensor(1.0), range(4), [0.1, 0.2])


@pytest.mark.parametrize("lrs", [[0.1], [0.2, 0.1], [0.1, 0.1], [0.0, 0.1], [0.1, float("inf")], [[0.1, 0.2]], 0.1])
def test_rates_increase_and_are_positive(lrs):
    with pytest.raises(ValueError, match=r"lrs need to be two or more rates > 0 in increasing order, got .*logspace"):
        fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [1.0] * 4, lrs)


def test_mistakes_are_errors():
    rest = (torch.tensor(1.0), [1.0] * 4, [0.1, 0.2])
    with pytest.raises(TypeError, match=r"needs a function of the learning rate, got sgd\(0\.1\); write lr_sweep"):
        fo.lr_sweep(quadratic, fo.sgd(0.1), *rest)
    with pytest.raises(TypeError, match="is not a GradientTransformation"):
        fo.lr_sweep(quadratic, lambda lr: lr, *rest)
    with pytest.raises(
        ValueError, match=r"lr_sweep needs two or more batches, a step for each, got 1; write \[batch\]"
    ):
        fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [1.0], [0.1, 0.2])
    with pytest.raises(ValueError, match="Invalid smoothing: 1.0; it needs 0 <= value < 1"):
        fo.lr_sweep(quadratic, fo.sgd, *rest, smoothing=1.0)
    with pytest.raises(TypeError, match=r"got a Linear, which is a module; write params_of\(module\)"):
        fo.lr_sweep(quadratic, fo.sgd, nn.Linear(1, 1), [1.0] * 4, [0.1, 0.2])


def test_the_drawing_has_a_line_for_each_rate(model):
    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [2.0] * 8, [0.01, 0.1, 0.5, 2.0])
    lines = str(sweep).splitlines()
    assert len(lines) == 1 + 4 + 1
    bars = [line.count("#") for line in lines[1:5]]
    assert bars[0] > bars[1] > bars[2] > bars[3] == 0
    assert lines[3].endswith("<- suggestion")
    assert lines[4].split() == ["2", "diverges"]
    assert lines[5] == sweep.reason


def test_the_picture_has_the_curve_and_the_suggestion():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [2.0] * 8, [0.01, 0.1, 0.5, 2.0])
    ax = Figure().subplots()
    assert sweep.plot(ax) is ax
    assert ax.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in ax.lines] == [0.01, sweep.suggestion, sweep.steepest]
    assert list(ax.lines[0].get_ydata()) == sweep.smoothed[:3].tolist()  # without the rate that diverges


def test_a_picture_without_matplotlib_is_an_error(monkeypatch):
    sweep = fo.lr_sweep(quadratic, fo.sgd, torch.tensor(1.0), [2.0] * 8, [0.01, 0.1])
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib; print\(sweep\) draws the curve as text"):
        sweep.plot()
