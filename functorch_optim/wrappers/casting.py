"""The precision of states, chosen for any transformation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from functorch_optim._core.checks import SINGLE
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.wrappers._wrapping import wrapped, wrapper


def cast_states(tx: Any, dtype: torch.dtype | Mapping[str, torch.dtype] = torch.float32) -> Any:
    """Keep the states of any transformation in a dtype: float32 moments for bfloat16 parameters, say.

    Steps are computed in float32, and states are rounded at their end.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        dtype: float32, bfloat16 or float16, for all states. Or a dict: name of a state -> dtype, as in
            `{"exp_avg": torch.bfloat16}`; states without an entry are float32.

    Returns:
        Transformation whose state is built as that of `tx`. The states of float64 and complex parameters stay as they
        are, and so do numbers that are kept once for all parameters, states of functions of the whole tree, and those
        of `master_weights` and `kahan`.

    Raises:
        ValueError: a dtype is none of these, or no rule in `tx` keeps a state of a name.
        TypeError: `tx` is neither a transformation nor a factory.

    States are like their parameters without it, but for small ones, a number for each row or tensor, which are float32
    in most optimizers. In bfloat16 a mean of squares with beta2 = 0.999 stands still, since its changes are rounded
    away: keep `exp_avg_sq` in float32. optax's `mu_dtype` is the entry "exp_avg" alone, and its second moment is like
    the parameters. Checkpoints hold states in their dtype.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx = fo.cast_states(fo.adamw(1e-3), {"exp_avg": torch.bfloat16})
        >>> state = tx.init(torch.zeros(2, dtype=torch.bfloat16))[0]
        >>> state.exp_avg.dtype, state.exp_avg_sq.dtype
        (torch.bfloat16, torch.float32)
    """
    for name, one in dtype.items() if isinstance(dtype, Mapping) else [("", dtype)]:
        if one not in SINGLE:
            of = f" of {name!r}" if name else ""
            raise ValueError(
                f"Invalid dtype{of}: {one!r}; states are float32, bfloat16 or float16, as in "
                "cast_states(adamw(1e-3), torch.float32)"
            )
    return wrapped(tx, _cast_states, "cast_states(adamw(1e-3), torch.float32)", dtype=dtype)


@wrapper
def _cast_states(tx: GradientTransformation, dtype: torch.dtype | Mapping[str, torch.dtype]) -> GradientTransformation:
    if isinstance(dtype, Mapping):
        _check_names(tx, dtype)

    def dtypes(name: str) -> torch.dtype:
        return dtype if isinstance(dtype, torch.dtype) else dtype.get(name, torch.float32)

    links = [link if link.rule.of_dtype is not None else link._replace(dtypes=dtypes) for link in tx._links]
    return GradientTransformation._of(links, tx._layout)


def _check_names(tx: GradientTransformation, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise when no rule keeps a state of a name; where a rule has not declared its state, that is not known."""
    rules = [link.rule for link in tx._links if getattr(link.rule, "init", None) is not None]
    types = [getattr(rule, "state_type", None) for rule in rules]
    known = {name for one in types for name in getattr(one, "_fields", ())}
    unknown = sorted(dtypes.keys() - known)
    if unknown and None not in types:
        raise ValueError(
            f"Nothing in {tx!r} keeps a state {unknown[0]!r}; states are {', '.join(sorted(known)) or 'none'}"
        )
