"""Names of parameters: the same with and without the prefixes of wrappers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch.compile, FSDP and activation checkpointing add to names, at any place; DDP begins with `module`."""


def plain(name: str) -> str:
    """Return the name that a parameter has without wrappers.

    Example:
        >>> plain("module.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def same_names(names: Sequence[str], saved: Sequence[str]) -> dict[str, str]:
    """Find the saved name of each parameter: the same, or else the same without wrappers.

    Returns:
        Name -> saved name, for those that were found. It is empty where names are not unique.
    """

    def found(form: Callable[[str], str]) -> dict[str, str]:
        forms = {form(name): name for name in saved}
        if len(forms) < len(saved) or len({form(name) for name in names}) < len(names):
            return {}
        return {name: forms[form(name)] for name in names if form(name) in forms}

    exact, without = found(str), found(plain)
    return exact if len(exact) >= len(without) else without


def names_of(groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """List the names of the parameters in groups; None where they have none, or are in the right order already.

    torch.distributed.checkpoint saves names in place of indices, and brings them into the order of the optimizer.

    Raises:
        ValueError: there are other numbers of names than of parameters.
    """
    for group in groups:
        names = group.get("param_names")
        if names is None or any(isinstance(index, str) for index in group["params"]):
            return None
        if len(names) != len(group["params"]):
            raise ValueError(f"A saved group has {len(names)} param_names for {len(group['params'])} parameters")
    return [name for group in groups for name in group["param_names"]]


def indices_of(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """List the saved indices of the parameters in groups."""
    return [index for group in groups for index in group["params"]]
