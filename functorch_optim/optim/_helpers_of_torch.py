"""States for `get_optimizer_state_dict` and its relatives in torch.distributed.checkpoint; and who calls a step."""

import functools
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch

from functorch_optim._core.places import REST

_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


def asks_for_a_state() -> bool:
    """Tell whether torch's helper steps, only so that there be a state."""
    return is_caller(_CHECKPOINTS, "_init_optim_state")


def saves() -> bool:
    """Tell whether torch's helper saves a state."""
    return is_caller(_CHECKPOINTS, "_get_optim_state_dict")


def is_caller(module: str, name: str) -> bool:
    """Tell whether a function of a module has called this one, through others."""
    return _call(module, name) is not None


def _call(module: str, name: str) -> FrameType | None:
    """Find the call of a function of a module from which this one was reached."""
    function = functools.reduce(
        lambda holder, part: getattr(holder, part, None), name.split("."), sys.modules.get(module)
    )
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    frame = sys._getframe() if code is not None else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def lowered(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put the states of functions of the whole tree into that of a parameter: torch's helpers know no others."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    home = next((number for number, p in zip(numbers, params, strict=True) if p.requires_grad), None)
    if home is not None and REST in saved["state"]:
        saved["state"][home] = {**saved["state"].get(home, {}), REST: saved["state"].pop(REST)}
        for number, p in zip(numbers, params, strict=True):
            if p.requires_grad:
                saved["state"].setdefault(number, {})  # without an entry, torch's helper does not load


def lifted(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Take the states of functions of the whole tree out of that of a parameter again."""
    states = state_dict.get("state")
    if not isinstance(states, Mapping):
        return state_dict
    homes = [key for key, own in states.items() if key != REST and isinstance(own, Mapping) and REST in own]
    if homes:
        own = dict(states[homes[0]])
        whole = own.pop(REST)
        states = {**states, homes[0]: own}
    else:
        whole = _flattened(states)
        if not whole:
            return state_dict
    return {**state_dict, "state": {**{key: own for key, own in states.items() if own != {}}, REST: whole}}


def _flattened(states: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Find the states of functions of the whole tree in a flattened dict, where torch's helper looks for no such entry.

    Args:
        states: those that the helper has found there, by the names of parameters.
    """
    call = _call(_CHECKPOINTS, "_load_optim_state_dict")
    found: dict[str, dict[str, Any]] = {}
    for name, value in ({} if call is None else call.f_locals["state_dict"]).items():
        for start in [f"state.{parameter}.{REST}." for parameter in states]:
            if name.startswith(start):
                index, number, path = name.removeprefix(start).split(".", 2)
                found.setdefault(f"{index}.{number}", {})[path] = value  # a key as tree_keys makes them
    return found
