"""Extras that the loops of this package give to a transformation: the loss, and the loss as a function."""

from collections.abc import Callable
from typing import Any

import torch

from functorch_optim._core.transformation import GradientTransformation


def takes(transformation: GradientTransformation, name: str, unknown: bool = False) -> bool:
    """Tell whether something in a transformation declares an extra.

    Args:
        transformation: the transformation.
        name: of the extra.
        unknown: what to say of a function that takes `**extra` and closes over no transformation.
    """
    for rule in [link.rule for link in transformation._links]:
        if name in rule.extras.names or (rule.extras.any and _passes_on(rule.update, name, unknown)):
            return True
    return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # it cannot look into closures
def _passes_on(update: Callable[..., Any], name: str, unknown: bool) -> bool:
    """Tell whether a function that takes `**extra` closes over a transformation that takes this one."""
    contents = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
    wrapped = [value for value in contents if isinstance(value, GradientTransformation)]
    return any(takes(inner, name, unknown) for inner in wrapped) if wrapped else unknown


def with_loss(transformation: GradientTransformation, loss: Any, extras: dict[str, Any]) -> dict[str, Any]:
    """Give the loss as the extra `value` where it is taken, and the caller gave none."""
    return {"value": loss, **extras} if takes(transformation, "value", unknown=True) else extras
