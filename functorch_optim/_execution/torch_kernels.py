"""torch's fused kernels: the computation of each, written down as a rule, and its call.

The kernels correct for bias by themselves, from the step. The numbers of a program are corrected already, so the
kernels are given a step at which nothing is left to correct.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim._numerics import safe_sqrt

Numbers = dict[str, float]


class TorchKernel(NamedTuple):
    """One of torch's kernels.

    Attributes:
        rule: its computation: `rule(g, state, p, n) -> (p, state)`.
        numbers: names of the numbers n.
        states: how many states it overwrites.
        takes: whether it computes that with these values of the numbers.
        run: overwrites parameters and states.
    """

    rule: Callable[..., Any]
    numbers: tuple[str, ...]
    states: int
    takes: Callable[[Numbers], bool]
    run: Callable[..., None]


# Their computations. -------------------------------------------------------------------------------------------------


def _gradient(g: Any, p: Any, n: Any, maximize: bool, decay: bool) -> Any:
    g = -g if maximize else g
    return g + n["weight_decay"] * p if decay else g


def _adam(g: Any, state: Any, p: Any, n: Any, *, amsgrad: bool, maximize: bool, decay: str | None) -> Any:
    g = _gradient(g, p, n, maximize, decay == "L2")
    m = torch.lerp(state[0], g, n["weight1"])
    v = n["beta2"] * state[1] + n["weight2"] * g * g
    largest = torch.maximum(state[2], v) if amsgrad else v
    u = n["rate"] * m / (safe_sqrt(largest) + n["eps"])
    if decay == "decoupled":
        u = u + n["weight_decay"] * p
    return p + n["lr"] * u, (m, v, largest) if amsgrad else (m, v)


def _sgd(g: Any, state: Any, p: Any, n: Any, *, momentum: bool, nesterov: bool, maximize: bool, decay: bool) -> Any:
    g = _gradient(g, p, n, maximize, decay)
    if not momentum:
        return p + n["lr"] * g, ()
    b = n["momentum"] * state[0] + n["gain"] * g
    return p + n["lr"] * (g + n["momentum"] * b if nesterov else b), (b,)


def _adagrad(g: Any, state: Any, p: Any, n: Any, *, maximize: bool, decay: bool) -> Any:
    g = _gradient(g, p, n, maximize, decay)
    s = state[0] + g * g
    return p + n["lr"] * (g / (safe_sqrt(s) + n["eps"])), (s,)


# How they are called. ------------------------------------------------------------------------------------------------


def _run_adam(
    params: list[Tensor],
    grads: list[Tensor],
    states: Sequence[list[Tensor]],
    n: Numbers,
    *,
    decoupled: bool,
    **options: Any,
) -> None:
    lr, decay, eps = -n["lr"], n.get("weight_decay", 0.0), n.get("plain_eps", n["eps"])
    if "t" not in n:
        lr = lr * n["rate"]
    if decoupled and "t" not in n:  # the kernel's decay is lr * weight_decay, with the lr that it is given
        decay = decay / n["rate"] if n["rate"] else 0.0
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        params,
        grads,
        states[0],
        states[1],
        states[2] if len(states) > 2 else [],
        [number(n.get("t", _ENDLESS), params[0].device)] * len(params),
        lr=lr,
        beta1=1 - n["weight1"],
        beta2=n["beta2"],
        weight_decay=decay,
        eps=eps,
        **options,
    )


def _run_sgd(
    params: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]], n: Numbers, **options: Any
) -> None:
    torch._fused_sgd_(
        params,
        grads,
        states[0] if states else [],
        lr=-n["lr"],
        weight_decay=n.get("weight_decay", 0.0),
        momentum=n.get("momentum", 0.0),
        dampening=1 - n.get("gain", 1.0),
        is_first_step=False,
        **options,
    )


def _run_adagrad(
    params: list[Tensor], grads: list[Tensor], states: Sequence[list[Tensor]], n: Numbers, **options: Any
) -> None:
    torch._fused_adagrad_(
        params,
        grads,
        states[0],
        [number(1.0, params[0].device)] * len(params),
        lr=-n["lr"],
        lr_decay=0.0,
        weight_decay=n.get("weight_decay", 0.0),
        eps=n["eps"],
        **options,
    )


_ENDLESS = 1e30
"""A step at which nothing is left to correct: beta^step is 0."""


@functools.lru_cache
def number(value: float, device: torch.device) -> Tensor:
    """Make a number once: nothing takes memory while parameters are overwritten."""
    with torch.inference_mode(False):
        return torch.full((), value, dtype=torch.float32, device=device)


def kernels() -> list[TorchKernel]:
    """List all kernels."""
    found = []
    for maximize in (False, True):
        for decay in (None, "L2", "decoupled"):
            for amsgrad in (False, True):
                names = ["weight1", "beta2", "weight2", "rate", "eps", "lr", *(["weight_decay"] if decay else [])]
                rule = functools.partial(_adam, amsgrad=amsgrad, maximize=maximize, decay=decay)
                run = functools.partial(_run_adam, amsgrad=amsgrad, maximize=maximize, decoupled=decay == "decoupled")
                found.append(TorchKernel(rule, tuple(names), 2 + amsgrad, _is_adam, run))
        for decays in (False, True):
            own = ("weight_decay",) if decays else ()
            for momentum, nesterov in ((False, False), (True, False), (True, True)):
                also = ("momentum", "gain") if momentum else ()
                rule = functools.partial(_sgd, momentum=momentum, nesterov=nesterov, maximize=maximize, decay=decays)
                run = functools.partial(_run_sgd, nesterov=nesterov, maximize=maximize)
                found.append(TorchKernel(rule, ("lr", *also, *own), int(momentum), _is_sgd, run))
            rule = functools.partial(_adagrad, maximize=maximize, decay=decays)
            run = functools.partial(_run_adagrad, maximize=maximize)
            found.append(TorchKernel(rule, ("lr", "eps", *own), 1, _is_any, run))
    return found


def _is_adam(n: Numbers) -> bool:
    return n["weight2"] == 1 - n["beta2"] and n["beta2"] < 1 and n["weight1"] > 0


def _is_sgd(n: Numbers) -> bool:
    return n.get("momentum") != 0  # the kernel then leaves the buffer alone


def _is_any(n: Numbers) -> bool:
    return True
