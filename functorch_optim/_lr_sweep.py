"""The learning rate finder: one short training for each rate, all of them at once."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.hyperparameters import check_number
from functorch_optim._core.transformation import GradientTransformation, shown
from functorch_optim.meta._unrolling import unroll
from functorch_optim.transforms.zeros import set_to_zero
from functorch_optim.tree import Tree

_DIVERGED = 4.0  # times the best loss
_WIDTH = 40  # of the drawing


class LRSweep(NamedTuple):
    """The result of `lr_sweep`. It prints as a drawing of the curve.

    Attributes:
        lrs: the learning rates: (rates,), float64, on the CPU like all tensors here.
        losses: loss of each batch before its step, for each rate: (steps, rates).
        smoothed: the curve: mean of losses for each rate, the last ones count most: (rates,).
        untrained: that mean without any training.
        suggestion: rate with the lowest smoothed loss; None where no rate lowers the loss.
        steepest: rate at which the curve falls fastest by log lr, a cautious choice; None where it does not fall.
        diverging: smallest rate above the best that diverges: its loss is not finite, or more than without training
            and than 4 times the best; None where none does.
        reason: why the suggestion is one, in words.

    Example:
        >>> import functorch_optim as fo, torch
        >>> def loss_fn(x, batch):
        ...     return x**2
        >>> sweep = fo.lr_sweep(loss_fn, fo.sgd, torch.tensor(1.0), range(8), [0.01, 0.1, 0.5, 2.0])
        >>> sweep.suggestion, sweep.diverging
        (0.5, 2.0)
        >>> print(sweep)  # doctest: +NORMALIZE_WHITESPACE
               lr  smoothed loss
             0.01  0.8527     ##################################
              0.1  0.2717     ###########
              0.5  0.08398    ###  <- suggestion
                2  diverges
        The smoothed loss after 8 steps is lowest at 0.5: 0.08398, and 1 without training. It falls fastest at 0.01.
        Training diverges from 2 on. That is the next rate: a third of 0.5 is safer for a long training.
    """

    lrs: Tensor
    losses: Tensor
    smoothed: Tensor
    untrained: float
    suggestion: float | None
    steepest: float | None
    diverging: float | None
    reason: str

    def __repr__(self) -> str:
        lines = [f"{'lr':>9}  smoothed loss"]
        for lr, loss in zip(self.lrs.tolist(), self.smoothed.tolist(), strict=True):
            mark = "  <- suggestion" if lr == self.suggestion else ""
            if (self.diverging is not None and lr >= self.diverging) or not math.isfinite(loss):
                lines.append(f"{lr:>9.3g}  diverges")
            else:
                bar = "#" * round(_WIDTH * min(max(loss / self.untrained, 0.0), 1.0)) if self.untrained > 0 else ""
                lines.append(f"{lr:>9.3g}  {loss:<10.4g} {bar}{mark}".rstrip())
        return "\n".join([*lines, self.reason])

    def plot(self, ax: Any = None) -> Any:
        """Draw the curve with matplotlib: smoothed loss by learning rate, and the suggestion.

        Args:
            ax: matplotlib's axes to draw into. None: those of a new figure.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                ax = importlib.import_module("matplotlib.pyplot").subplots()[1]
            except ImportError as error:
                raise ImportError(
                    "plot needs matplotlib: pip install matplotlib; print(sweep) draws the curve as text"
                ) from error
        ends = self.lrs < (math.inf if self.diverging is None else self.diverging)
        ax.semilogx(self.lrs[ends].tolist(), self.smoothed[ends].tolist(), marker=".")
        for rate, name, style in ((self.suggestion, "suggestion", "-"), (self.steepest, "steepest", ":")):
            if rate is not None:
                ax.axvline(rate, linestyle=style, color="gray", label=f"{name}: {rate:.3g}")
        ax.set(xlabel="learning rate", ylabel=f"smoothed loss after {len(self.losses)} steps")
        ax.legend()
        return ax


def lr_sweep(
    loss_fn: Callable[..., Tensor],
    factory: Callable[[Any], GradientTransformation],
    params: Tree,
    batches: Iterable[Any],
    lrs: Sequence[float] | Tensor,
    *,
    smoothing: float = 0.9,
    buffers: Tree = None,
    vectorize: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> LRSweep:
    """Find a learning rate: train with each rate from the same beginning on the same batches, all in one vmapped run.

        smoothed = sum_t beta^(T - t) loss_t / sum_t beta^(T - t)

    Args:
        loss_fn: `loss_fn(params, batch)`, a 0-dim tensor; with `buffers`, `loss_fn(params, batch, buffers)`.
        factory: `factory(lr)` makes the transformation: `fo.adamw`, or `lambda lr: chain(clip(1.0), adamw(lr))`.
        params: tree of tensors to begin with; they are not modified.
        batches: one for each step, as `fo.meta.unroll` takes them; two or more. Fifty tell more than five.
        lrs: learning rates > 0 in increasing order, two or more; `torch.logspace(-5, 0, 16)`, say.
        smoothing: beta in [0, 1), the weight of all steps before the last.
        buffers: tree of tensors that steps carry besides, as in `fo.meta.unroll`.
        vectorize: whether to train with all rates at once by `torch.vmap`, which takes the memory of as many
            parameters, states and activations. Random operations, dropout say, are the same for all rates. False: one
            training after the other, where memory is short or `loss_fn` branches on data.
        progress: with `vectorize=False`, `progress(done, total)` is called after each training.

    Returns:
        `LRSweep`: the losses, the curve, a suggestion and its reason. Print it to see the curve.

    Raises:
        ValueError: rates are not in increasing order and > 0; there are less than two rates or batches; or `progress`
            comes with `vectorize=True`.
        TypeError: `factory` is a transformation, or does not make one.
        RuntimeError: torch.vmap cannot run `loss_fn`.

    Other finders let the rate grow during one training, so that each loss is of another rate, after other steps, and
    take the steepest point for the best rate. Here each rate has its own training, and its loss can be taken as it is.

    Source of the usual test: Smith, Cyclical Learning Rates for Training Neural Networks, arXiv:1506.01186.

    Example:
        >>> import functorch_optim as fo, torch
        >>> x = torch.linspace(-1, 1, 32)
        >>> def loss_fn(params, batch):
        ...     return (params["a"] * x + params["b"] - 3 * x - 1).square().mean()
        >>> params = {"a": torch.zeros(()), "b": torch.zeros(())}
        >>> sweep = fo.lr_sweep(loss_fn, fo.adam, params, range(30), torch.logspace(-4, 1, 6))
        >>> sweep.suggestion
        1.0
    """
    if isinstance(factory, GradientTransformation) or not callable(factory):
        raise TypeError(
            f"lr_sweep needs a function of the learning rate, got {shown(factory)}; write lr_sweep(loss_fn, adamw, "
            "...), or lambda lr: chain(clip(1.0), adamw(lr))"
        )
    check_number("smoothing", smoothing, "0 <= value < 1")
    if progress is not None and vectorize:
        raise ValueError("All rates are one run, without progress to show; write lr_sweep(..., vectorize=False)")
    rates = _checked(lrs)
    params = tree.stop_gradient(params)
    steps = batches if isinstance(batches, Sequence | Tensor) else [*batches]

    def losses(tx: GradientTransformation) -> Tensor:
        trained = unroll(loss_fn, tx, params, steps, first_order=True, buffers=buffers)
        found: Tensor = (trained if buffers is None else trained[0]).losses
        return found

    def at_rate(lr: Any) -> Tensor:
        return losses(factory(lr))

    with torch.no_grad():
        columns = _vectorized(at_rate, rates, params) if vectorize else _one_by_one(at_rate, rates, progress)
        untrained = losses(set_to_zero())
    return _judged(rates, columns.T.to("cpu", torch.float64), untrained.to("cpu", torch.float64), smoothing)


def _checked(lrs: Any) -> Tensor:
    """Return learning rates as float64 on the CPU.

    Raises:
        ValueError: there are less than two, or they are not in increasing order and > 0.
    """
    rates = torch.as_tensor(lrs, dtype=torch.float64, device="cpu").detach()
    increase = rates.ndim == 1 and len(rates) > 1 and bool((rates.diff() > 0).all() & (rates[0] > 0))
    if not increase or not rates.isfinite().all():
        raise ValueError(
            f"lrs need to be two or more rates > 0 in increasing order, got {lrs!r}; write torch.logspace(-5, 0, 16)"
        )
    return rates


def _vectorized(losses: Callable[[Any], Tensor], rates: Tensor, params: Tree) -> Tensor:
    device = next((leaf.device for leaf in tree.flatten(params)[0] if isinstance(leaf, Tensor)), None)
    try:
        return torch.vmap(losses, randomness="same")(rates.to(device))
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise RuntimeError(f"{error} Without torch.vmap: lr_sweep(..., vectorize=False)") from error


def _one_by_one(losses: Callable[[Any], Tensor], rates: Tensor, progress: Callable[[int, int], None] | None) -> Tensor:
    columns = []
    for lr in rates.tolist():
        columns.append(losses(lr))
        if progress is not None:
            progress(len(columns), len(rates))
    return torch.stack(columns)


def _judged(rates: Tensor, losses: Tensor, untrained: Tensor, smoothing: float) -> LRSweep:
    """Smooth the losses, and look for the best rate."""
    count = len(losses)
    if count < 2:
        raise ValueError(
            f"lr_sweep needs two or more batches, a step for each, got {count}; write [batch] * 50 for one"
        )
    weights = smoothing ** torch.arange(count - 1, -1, -1, dtype=torch.float64, device="cpu")
    weights = weights / weights.sum()
    start, smoothed = (weights @ untrained).item(), weights @ losses
    smoothed = torch.where(losses.isfinite().all(0), smoothed, torch.inf)
    best = int(smoothed.argmin())
    lowest = smoothed[best].item()
    too_high = (smoothed > max(_DIVERGED * lowest, start)) & (rates > rates[best])
    too_high |= ~smoothed.isfinite()
    diverging = next((lr for lr, high in zip(rates.tolist(), too_high.tolist(), strict=True) if high), None)
    if not lowest < start:
        reason = f"No rate lowers the smoothed loss, {start:.4g}, in {count} steps: try other rates, or more batches."
        return LRSweep(rates, losses, smoothed, start, None, None, diverging, reason)
    suggestion = rates[best].item()
    steepest = _steepest(rates[: best + 1], smoothed[: best + 1])
    reason = _reason(rates, best, start, lowest, count, steepest, diverging)
    return LRSweep(rates, losses, smoothed, start, suggestion, steepest, diverging, reason)


def _steepest(rates: Tensor, smoothed: Tensor) -> float | None:
    """Find the rate at which the curve falls fastest, up to its lowest point."""
    if len(rates) < 2:
        return None
    [slope] = torch.gradient(smoothed, spacing=(rates.log(),))
    return rates[slope.argmin()].item() if slope.min() < 0 else None


def _reason(
    rates: Tensor, best: int, start: float, lowest: float, count: int, steepest: float | None, diverging: float | None
) -> str:
    lr = rates[best].item()
    said = [
        f"The smoothed loss after {count} steps is lowest at {lr:.3g}: {lowest:.4g}, and {start:.4g} without training."
    ]
    if steepest is not None:
        said.append(f"It falls fastest at {steepest:.3g}.")
    if diverging is not None:
        said.append(f"Training diverges from {diverging:.3g} on.")
    if best == len(rates) - 1:
        said.append("It is the largest rate here: try larger ones.")
    elif best == 0:
        said.append("It is the smallest rate here: try smaller ones.")
    if best + 1 < len(rates) and rates[best + 1].item() == diverging:
        said.append(f"That is the next rate: a third of {lr:.3g} is safer for a long training.")
    return " ".join(said)
