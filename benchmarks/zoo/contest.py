"""One optimizer on one task: trainings with all learning rates, weight decays and seeds, as one batch of torch.vmap."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functorch_optim as fo
from benchmarks.zoo.entrants import Entrant
from benchmarks.zoo.tasks import Task

LRS = tuple([10 ** (half / 2) for half in range(-10, 3)])


class Effort(NamedTuple):
    """How thorough a contest is.

    Attributes:
        lrs: the learning rates.
        seeds: number of seeds, each with weights and batches of its own.
        share: of the budgets of the tasks.
        evaluations: number of times that a training is judged.
    """

    lrs: tuple[float, ...] = LRS
    seeds: int = 3
    share: float = 1.0
    evaluations: int = 20


FULL = Effort()
QUICK = Effort((1e-3, 1e-2, 1e-1), seeds=1, share=0.05, evaluations=5)


class Result(NamedTuple):
    """The results of an optimizer on a task; infinity where a loss is not finite, or a target was not reached.

    Attributes:
        lrs, decays: the learning rates and weight decays.
        steps: number of steps of a training.
        untrained: loss of the initial parameters: median of the seeds, as all losses.
        losses: last loss by weight decay and learning rate; all losses are those of validation.
        reached: steps until the loss was at most the target, by weight decay and learning rate: median of the seeds.
        lr, decay: those with the lowest last loss.
        errors: with them, the error on test data by seed.
        seconds: time of a training on the processor, when all are trained as one batch.
    """

    lrs: list[float]
    decays: list[float]
    steps: int
    untrained: float
    losses: list[list[float]]
    reached: list[list[float]]
    lr: float
    decay: float
    errors: list[float]
    seconds: float


@torch.no_grad()
def compete(task: Task, entrant: Entrant, effort: Effort) -> Result:
    """Train with all learning rates, weight decays and seeds."""
    parts = max(1, min(effort.evaluations, round(task.steps * effort.share)))
    steps = max(1, round(task.steps * effort.share) // parts) * parts
    decays = [0.0, entrant.decay] if task.decays and entrant.decay is not None else [0.0]
    members = list(itertools.product(range(effort.seeds), decays, effort.lrs))
    seeds = torch.tensor([seed for seed, _, _ in members])
    decay, lr = torch.tensor([numbers for _, *numbers in members], dtype=torch.float64).unbind(1)
    params = fo.tree.map(lambda *some: torch.stack(some)[seeds], *[task.init(seed) for seed in range(effort.seeds)])
    batches = torch.stack([task.batches(seed, steps) for seed in range(effort.seeds)])

    def made(lr: Tensor, decay: Tensor) -> fo.GradientTransformation:
        return entrant.at(lr, steps, decay if len(decays) > 1 else 0.0)

    def start(params: Any, lr: Tensor, decay: Tensor) -> Any:
        return made(lr, decay).init(params)

    def train(params: Any, state: Any, lr: Tensor, decay: Tensor, batches: Tensor) -> Any:
        trained = fo.meta.unroll(task.loss, made(lr, decay), params, batches, state, first_order=True)
        return trained.params, trained.state

    def judged(judge: Callable[[Any], Tensor]) -> Tensor:
        def of_member(params: Any, state: Any, lr: Tensor, decay: Tensor) -> Tensor:
            return judge(fo.eval_params(made(lr, decay), state, params) if entrant.averages else params)

        return torch.vmap(of_member)(params, state, lr, decay).double().reshape(effort.seeds, len(decays), -1)

    state = torch.vmap(start)(params, lr, decay)
    losses, seconds = [judged(task.validation)], 0.0
    for part in batches.tensor_split(parts, dim=1):
        begin = time.process_time()
        params, state = torch.vmap(train)(params, state, lr, decay, part[seeds])
        seconds += time.process_time() - begin
        losses.append(judged(task.validation))
    return summarized(task.target, effort.lrs, decays, steps, torch.stack(losses), judged(task.error), seconds)


def summarized(
    target: float,
    lrs: tuple[float, ...],
    decays: list[float],
    steps: int,
    losses: Tensor,
    errors: Tensor,
    seconds: float,
) -> Result:
    """Summarize trainings.

    Args:
        target: loss that counts as reached.
        lrs: learning rates.
        decays: weight decays.
        steps: of each training.
        losses: before the first step and at equal distances: (times, seeds, decays, rates).
        errors: at the end: (seeds, decays, rates).
        seconds: for all trainings together.
    """
    losses = losses.nan_to_num(torch.inf, torch.inf)
    times = torch.linspace(0, steps, len(losses)).reshape(-1, 1, 1, 1)
    reached = torch.where(losses <= target, times, torch.inf).amin(0).median(0).values
    last = losses[-1].median(0).values
    decay, lr = divmod(int(last.argmin()), len(lrs))
    return Result(
        [rounded(lr) for lr in lrs],
        decays,
        steps,
        rounded(losses[0].median()),
        [[rounded(loss) for loss in row] for row in last],
        [[rounded(count) for count in row] for row in reached],
        rounded(lrs[lr]),
        decays[decay],
        [rounded(error) for error in errors[:, decay, lr].nan_to_num(torch.inf, torch.inf)],
        rounded(seconds / losses[-1].numel()),
    )


def rounded(number: Any) -> float:
    """Round to four digits: results shall be small."""
    return float(f"{float(number):.4g}")
