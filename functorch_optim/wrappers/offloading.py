"""States on another device than their parameters."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.tree import Tree
from functorch_optim.tree._structure import saved
from functorch_optim.wrappers._wrapping import wrapped, wrapper


@saved
class OffloadState(NamedTuple):
    """The state of `offload`.

    Attributes:
        inner: that of the wrapped transformation, with all tensors but 0-dim ones on the device.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.offload(fo.trace(0.9)).init(torch.zeros(2)).inner.momentum_buffer.device
        device(type='cpu')
    """

    inner: Tree


def offload(tx: Any, device: torch.device | str = "cpu") -> Any:
    """Keep the states of any transformation on another device than the parameters: on the CPU, for those of a GPU.

    A step copies the states to the device of the parameters, computes there, and copies them back.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        device: of the states.

    Returns:
        Transformation whose state is an `OffloadState`.

    Raises:
        ValueError: at `init` or `update`, when parameters are on several devices; give those of each a transformation
            of their own, with `partition`.
        TypeError: `tx` is neither a transformation nor a factory.

    The numbers are those of `tx`. Steps, and other 0-dim tensors, stay where they are. During a step all states are on
    the device of the parameters; in between, none is. A state that a step does not change is not copied back. In
    `fo.Optimizer` the state is one for all parameters of a group. It was tested with simulated devices, and has not
    been run on a GPU.

    Source: Ren et al., ZeRO-Offload, arXiv:2101.06840, without its computation on the CPU.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.offload(fo.adamw(1e-3)), {"w": torch.zeros(2)}
        >>> params, state = fo.step(tx, {"w": torch.ones(2)}, tx.init(params), params)
        >>> params
        {'w': tensor([-0.0010, -0.0010])}
    """
    return wrapped(tx, _offload, "offload(adamw(1e-3))", device=device)


@wrapper
def _offload(tx: GradientTransformation, device: torch.device | str) -> GradientTransformation:
    def init(params: Tree) -> OffloadState:
        _home(params)
        return OffloadState(tree.map(lambda x: _moved(x, device), tx.init(params)))

    def update(updates: Tree, state: OffloadState, params: Tree, **extra: Any) -> tuple[Tree, OffloadState]:
        home = _home(updates if params is None else params)
        away, structure = tree.flatten(state.inner)
        here = away if home is None else [_moved(x, home) for x in away]
        updates, new = tx.update(updates, tree.unflatten(structure, here), params, **extra)
        after = tree.flatten_up_to(structure, new, "the next state", state.inner, "the one given")
        back = [old if x is given else _moved(x, device) for old, given, x in zip(away, here, after, strict=True)]
        return updates, OffloadState(tree.unflatten(structure, back))

    return GradientTransformation(init, update, wraps=tx)


def _moved(x: Any, device: torch.device | str) -> Any:
    return x.to(device) if isinstance(x, Tensor) and x.ndim > 0 else x


def _home(params: Tree) -> torch.device | None:
    """Return the device that all parameters are on."""
    devices = list(dict.fromkeys([p.device for p in tree.flatten(params)[0] if p is not None]))
    if len(devices) > 1:
        raise ValueError(
            f"offload is for parameters on one device, got some on {devices[0]} and on {devices[1]}; give those of "
            "each a transformation of their own, with partition"
        )
    return devices[0] if devices else None
