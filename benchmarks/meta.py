"""Derivatives of training, against TorchOpt, higher and torch.optim's `differentiable=True`."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import functorch_optim as fo
from benchmarks.functional import updated
from benchmarks.measure import Comparison
from benchmarks.shapes import Setting

STEPS = 5
TASKS, POINTS, HIDDEN = 25, 10, 40
LR = 1e-2


# Small tensors: what each operation costs. ----------------------------------------------------------------------------


def unroll(setting: Setting) -> Iterator[Comparison]:
    """The gradient through five Adam steps over small tensors by all of them and the learning rate, above SGD's."""
    count = 5 if setting.quick else 100
    peers = {
        "TorchOpt": torchopt_steps,
        "higher": higher_steps,
        "torch.optim.Adam(differentiable=True)": torch_steps,
    }
    yield Comparison(
        "unrolled Adam, above SGD",
        f"{count} tensors of 12x12",
        partial(differentiated, our_steps, count),
        {name: partial(differentiated, steps, count) for name, steps in peers.items()},
        0.25,
        floor=partial(differentiated, sgd_steps, count),
    )


def differentiated(train: Callable[[list[Tensor], Tensor], list[Tensor]], count: int) -> Callable[[], object]:
    """Return the gradient of the loss after training."""
    begin = [torch.randn(12, 12, requires_grad=True) for _ in range(count)]
    lr = torch.tensor(LR, requires_grad=True)
    return lambda: torch.autograd.grad(loss(train(begin, lr)), [*begin, lr])


def loss(params: list[Tensor]) -> Tensor:
    """Return the sum of squares."""
    return torch.stack([param.square().sum() for param in params]).sum()


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients, which can be differentiated."""
    return list(torch.autograd.grad(loss(params), params, create_graph=True))


def sgd_steps(params: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Do the least that a step can be."""
    for _ in range(STEPS):
        params = [p - lr * g for p, g in zip(params, gradients(params), strict=True)]
    return params


def our_steps(params: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Do Adam's."""
    tx = fo.adam(lr)
    state = tx.init(params)
    for _ in range(STEPS):
        params, state = fo.step(tx, gradients(params), state, params)
    return params


def torchopt_steps(params: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Do those of TorchOpt's functional Adam, which is faster than its MetaAdam."""
    import torchopt  # noqa: PLC0415

    tx = torchopt.adam(lr)
    state = tx.init(params)
    for _ in range(STEPS):
        updates, state = tx.update(gradients(params), state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def higher_steps(params: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Do those of higher's Adam."""
    import higher  # noqa: PLC0415

    optimizer = higher.optim.DifferentiableAdam(torch.optim.Adam(params), params, override={"lr": [lr]})
    for _ in range(STEPS):
        params = list(optimizer.step(loss(params), params=params))
    return params


def torch_steps(params: list[Tensor], lr: Tensor) -> list[Tensor]:
    """Do those of torch.optim's Adam, which writes to its parameters."""
    params = [param.clone() for param in params]
    optimizer = torch.optim.Adam(params, lr=lr, differentiable=True)
    for _ in range(STEPS):
        copies = [param.clone() for param in params]  # which autograd may save
        for param, grad in zip(params, gradients(copies), strict=True):
            param.grad = grad
        optimizer.step()
    return params


# MAML: many small tasks. ----------------------------------------------------------------------------------------------


def maml(setting: Setting) -> Iterator[Comparison]:
    """The gradient of the loss on sine waves after five steps on each; tasks are batched, TorchOpt has a loop."""
    tasks = 3 if setting.quick else TASKS
    peers = {"TorchOpt, a loop over tasks": partial(looped, tasks)}
    yield Comparison("MAML by vmap", f"{tasks} sine waves", partial(batched, tasks), peers, 0.12)
    if not setting.quick:  # compilation takes a minute
        ours = partial(batched, tasks, torch.compile)
        yield Comparison("MAML by vmap, compiled", f"{tasks} sine waves", ours, peers, 0.02)


def batched(tasks: int, finish: Callable[[Any], Any] = lambda function: function) -> Callable[[], object]:
    """Return our gradient, of all tasks at once."""
    tx = fo.adam(LR)
    step = updated(tx)

    def outer(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        def adapted(x: Tensor, y: Tensor) -> Tensor:
            trained, state = params, tx.init(params)
            for _ in range(STEPS):
                trained, state = step(torch.func.grad(error)(trained, x, y), state, trained)
            return error(trained, x, y)

        return torch.vmap(adapted)(x, y).mean()

    gradient = finish(torch.func.grad(outer))
    return partial(gradient, network(), *waves(tasks))


def looped(tasks: int) -> Callable[[], object]:
    """Return TorchOpt's gradient, of one task after the other."""
    import torchopt  # noqa: PLC0415

    tx = torchopt.adam(LR)
    params = {name: param.requires_grad_() for name, param in network().items()}

    def adapted(x: Tensor, y: Tensor) -> Tensor:
        trained, state = params, tx.init(params)
        for _ in range(STEPS):
            grads = torch.autograd.grad(error(trained, x, y), list(trained.values()), create_graph=True)
            updates, state = tx.update(dict(zip(trained, grads, strict=True)), state, inplace=False)
            trained = torchopt.apply_updates(trained, updates, inplace=False)
        return error(trained, x, y)

    def gradient(x: Tensor, y: Tensor) -> object:
        losses = [adapted(*task) for task in zip(x, y, strict=True)]
        return torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))

    return partial(gradient, *waves(tasks))


def network() -> dict[str, Tensor]:
    """Return the parameters of a network with two hidden layers."""
    sizes = (1, HIDDEN, HIDDEN, 1)
    weights = {f"weight{i}": torch.randn(a, b) / a**0.5 for i, (a, b) in enumerate(itertools.pairwise(sizes))}
    return weights | {f"bias{i}": torch.zeros(b) for i, b in enumerate(sizes[1:])}


def error(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error of the network."""
    x = torch.relu(x @ params["weight0"] + params["bias0"])
    x = torch.relu(x @ params["weight1"] + params["bias1"])
    return (x @ params["weight2"] + params["bias2"] - y).square().mean()


def waves(tasks: int) -> tuple[Tensor, Tensor]:
    """Return points of sine waves, of an amplitude and a phase for each task."""
    x = 10 * torch.rand(tasks, POINTS, 1) - 5
    return x, (0.1 + 4.9 * torch.rand(tasks, 1, 1)) * torch.sin(x + torch.pi * torch.rand(tasks, 1, 1))
