"""torch's own fused kernels, for the classes whose whole step they are.

They need no compilation, and take lists of tensors in one call. Each function here overwrites parameters and states as
the class does. `kernel(group, params, grads, states, step)`, with the states by torch's names, and the number of the
update, 1 at the first, changes nothing yet, and returns what makes the step.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from functorch_optim._core.checks import HALF
from functorch_optim._execution.blocks import empty_like, layout_of, lies

Tensors: TypeAlias = list[Tensor]
Step: TypeAlias = Callable[[], None]
Kernel: TypeAlias = Callable[[Mapping[str, Any], Tensors, Tensors, Mapping[str, Tensors], float], Step]

DEVICES = ("cpu", "cuda")
"""Where torch has these kernels."""


class Native:
    """A kernel for parameters and states that it overwrites.

    Args:
        kernel: one of those below.
        group: the param group, which is read at every step.
        params: parameters.
        states: for each rule, its states for these parameters.
    """

    needs_scalars: ClassVar[bool] = False

    def __init__(self, kernel: Kernel, group: Mapping[str, Any], params: Tensors, states: Sequence[Any]) -> None:
        self.kernel, self.group, self.params = kernel, group, params
        self.states = {
            name: column for state in states if state for name, column in zip(state._fields, state, strict=True)
        }

    def ready(self, updates: Tensors, scalars: Sequence[Any], step: float) -> Step:
        """Get ready for a step, and return what makes it."""
        if not all(p.is_contiguous() and u.is_contiguous() for u, p in zip(updates, self.params, strict=True)):
            updates = [
                u if lies(u, p) else empty_like(u, p).copy_(u) for u, p in zip(updates, self.params, strict=True)
            ]
        return self.kernel(self.group, self.params, updates, self.states, step)


def adam(group: Mapping[str, Any], params: Tensors, grads: Tensors, states: Mapping[str, Tensors], step: float) -> Step:
    """Adam and AdamW."""
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    return functools.partial(
        kernel,
        params,
        grads,
        states["exp_avg"],
        states["exp_avg_sq"],
        states.get("max_exp_avg_sq", []),
        _counters(params, step),
        beta1=float(beta1),
        beta2=float(beta2),
        amsgrad=bool(group["amsgrad"]),
        **_numbers(group, "lr", "weight_decay", "eps"),
    )


def sgd(group: Mapping[str, Any], params: Tensors, grads: Tensors, states: Mapping[str, Tensors], step: float) -> Step:
    """SGD, with and without momentum."""
    return functools.partial(
        torch._fused_sgd_,
        params,
        grads,
        states.get("momentum_buffer", []),
        nesterov=bool(group["nesterov"]),
        is_first_step=step == 1,
        **_numbers(group, "lr", "weight_decay", "momentum", "dampening"),
    )


def adagrad(
    group: Mapping[str, Any], params: Tensors, grads: Tensors, states: Mapping[str, Tensors], step: float
) -> Step:
    """Adagrad."""
    return functools.partial(
        torch._fused_adagrad_,
        params,
        grads,
        states["sum"],
        _counters(params, step),
        **_numbers(group, "lr", "weight_decay", "lr_decay", "eps"),
    )


def takes(group: Mapping[str, Any], params: Tensors, states: Sequence[Any]) -> bool:
    """Tell whether the kernels take these parameters and states, and what the group says."""
    columns = [params, *[column for state in states for column in state]]
    like = params[0]
    values = [group[name] for name in group.keys() & {"weight_decay", "eps", "momentum", "dampening", "lr_decay"}]
    lr, betas = group["lr"], group.get("betas", ())
    return (
        like.device.type in DEVICES
        and like.is_floating_point()
        # On the CPU, in half precision (torch 2.13), SGD's is wrong from 16 elements on, and Adagrad's 0 / 0 is NaN.
        and not (like.device.type == "cpu" and like.dtype in HALF)
        and all((t.dtype, t.device) == (like.dtype, like.device) for column in columns for t in column)
        and all(layout_of(p) is p for p in params)
        and all(lies(t, p) for column in columns for t, p in zip(column, params, strict=True))
        and all(isinstance(value, Real) for value in (*values, *betas))
        and (isinstance(lr, Real) or (isinstance(lr, Tensor) and lr.ndim == 0))
    )


def _counters(params: Tensors, step: float) -> Tensors:
    return [torch.full((), step, dtype=torch.float32, device=params[0].device)] * len(params)


def _numbers(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    numbers = {name: group[name] if isinstance(group[name], Tensor) else float(group[name]) for name in names}
    return {"maximize": bool(group["maximize"]), **numbers}
