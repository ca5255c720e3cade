"""Loaded states of single parameters: checked, and brought into the form that a step leaves."""

import copy
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core import checks, places, saving
from functorch_optim._core.rule import DECLARED
from functorch_optim._execution.sharded import placed
from functorch_optim.optim._plan import Plan, State, number_dtype, scalar

# Besides the names that rules declare: torch.optim's of rules that may not have been declared yet.
_TORCHS = (
    *("step", "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu_product", "exp_inf", "sum"),
    *("square_avg", "acc_delta", "grad_avg", "prev", "step_size", "eta", "mu", "ax", "row_var", "col_var", "variance"),
)
_COMMON = ("average",)
"""Names of rules that programs use, too, for entries of their own; so are all single letters, as schedulefree's z."""


def checked_state(
    plan: Plan,
    i: int,
    state: State,
    known: AbstractSet[str],
    required: AbstractSet[str] = frozenset(),
    *,
    as_torch: bool = False,
    cast: bool = False,
) -> State:
    """Return a loaded `state[p]` in the form that a step leaves, if it is one that this transformation makes.

    Args:
        plan: of the transformation.
        i: index of the parameter.
        state: the loaded entries.
        known: keys that are welcome though this transformation has no use for them.
        required: keys that must be there if this transformation keeps them, unless nothing is there.
        as_torch: whether to widen the numbers that scalars carry on to the dtype of the parameter, as torch.optim does.
            Else they keep theirs, so that the numbers are those of a training that was never interrupted.
        cast: whether to round numbers that were saved in a wider dtype, as torch.optim does.

    Keys that no rule has belong to the program, and are kept.

    Raises:
        ValueError: a key is another optimizer's or missing, a shape is wrong, or a value is no tensor.
    """
    p, part = plan.params[i], plan.parts[i]
    checks.check_is_dict(f"state of parameter {plan.path(i)!r}", state)
    # torch.optim.SGD used to save None for a buffer that was not there yet.
    state = {key: value for key, value in state.items() if value is not None}
    foreign = [key for key in state if key not in part.known | known and is_of_rules(key)]
    if foreign:
        raise ValueError(
            f"The saved state of parameter {plan.path(i)!r} has {foreign[0]!r}, which this transformation does not "
            f"keep; it keeps {', '.join(sorted(part.known)) or 'nothing'}. An optimizer of another kind saved it"
        )
    # torch's SGD and Muon do not count.
    uncounted = plan.count is None or all(key.startswith("momentum_buffer") for key in state)
    # Nor had all optimizers that saved a state a step of the tree.
    optional = part.tree_steps | (set(part.counters) if uncounted else set())
    lacking = sorted((part.known & required) - set(state) - optional)
    # Neither entries of a derived class alone are a state of ours, nor numbers that are one for all parameters.
    if lacking and set(state) & part.known.difference(*part.shared.values()):
        raise ValueError(
            f"The saved state of parameter {plan.path(i)!r} lacks {lacking[0]!r}; it has only {', '.join(state)}"
        )
    initial = initial_state(plan, i)
    checked = {}
    for key, value in state.items():
        if key in part.scalars:
            checked[key] = _checked_number(plan, i, key, value)
            if as_torch and key not in part.counters and isinstance(value, Tensor) and p.is_floating_point():
                checked[key] = checked[key].to(p.dtype if cast else torch.promote_types(value.dtype, p.dtype))
        elif isinstance(value, Tensor):
            checked[key] = _checked_tensor(plan, i, key, value, initial.get(key), cast)
        elif key in initial:
            raise ValueError(f"The saved {key} of parameter {plan.path(i)!r} is {value!r}, where a tensor belongs")
        else:
            checked[key] = value
    return checked


def is_of_rules(key: Any) -> bool:
    """Tell whether a key of `state[p]` is one that some rule keeps, or a second of that name, `momentum_buffer.1`.

    All others belong to the program.
    """
    name = str(key).split(".", maxsplit=1)[0]
    return len(name) > 1 and name not in _COMMON and (name in _TORCHS or name in DECLARED)


def initial_state(plan: Plan, i: int) -> dict[str, Tensor]:
    """Make the tensors with which `state[p]` begins, without their data."""
    p, part = plan.params[i], plan.parts[i]
    initial: dict[str, Tensor] = {}
    for k, keys in zip(part.links, part.keys, strict=True):
        initial.update(zip(keys, plan.links[k].init_leaf(torch.empty_like(p, device="meta")), strict=True))
    return initial


def copied(value: Any) -> Any:
    """Copy the entries that a program keeps in `state[p]`; tensors may be recorded by autograd."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([copied(item) for item in value])
    return copy.deepcopy(value)


def _checked_number(plan: Plan, i: int, key: str, value: Any) -> Any:
    """Return the step, or a number that scalars carry on, in the form that a step leaves."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"The saved {key} of parameter {plan.path(i)!r} has shape {tuple(value.shape)}, but it is one number"
        )
    number = value.item() if isinstance(value, Tensor) and not value.is_meta else value
    if isinstance(number, bool) or not isinstance(number, Real | Tensor):
        raise ValueError(f"The saved {key} of parameter {plan.path(i)!r} is {value!r}, where a number belongs")
    if (
        key in plan.parts[i].counters
        and not isinstance(number, Tensor)
        and not (float(number) >= 0 and float(number).is_integer())
    ):
        raise ValueError(f"The saved step of parameter {plan.path(i)!r} is {number}, but it is a count of updates")
    return plan.as_kept(key, value)


def _checked_tensor(plan: Plan, i: int, key: str, value: Tensor, like: Tensor | None, cast: bool) -> Tensor:
    """Return a loaded tensor in the form that a step leaves.

    Args:
        plan: of the transformation.
        i: index of the parameter.
        key: of the tensor.
        value: the loaded entry.
        like: its initial value; None when it does not keep the tensor.
        cast: whether to round it to the dtype that it begins with.
    """
    p = plan.params[i]
    if value.layout != torch.strided:
        value = value.to_dense()  # torch.optim.SGD has sparse buffers for sparse gradients
    if like is None:
        casts = value.is_complex() == p.is_complex() and (cast or value.is_floating_point() or value.is_complex())
        wider = p.dtype if cast else torch.promote_types(value.dtype, p.dtype)
        return value.to(p.device, wider if casts else value.dtype)
    if value.shape != like.shape:
        raise ValueError(
            f"The saved {key} of parameter {plan.path(i)!r} has shape {tuple(value.shape)}, "
            f"but it is {tuple(like.shape)} here; it was saved for another model"
        )
    if value.is_complex() != like.is_complex():
        raise ValueError(
            f"The saved {key} of parameter {plan.path(i)!r} is {value.dtype}, but it is {like.dtype} here; it was "
            "saved for another model"
        )
    return placed(value, like).to(p.device, like.dtype if cast else saving.kept_dtype(value.dtype, like.dtype))


def exported_state(plan: Plan, i: int, state: State) -> State:
    """Return copies of a functional state of one parameter, as `state[p]` keeps it; see `checked_state`."""
    part = plan.parts[i]
    uncounted = part.counters if plan.count is None else ()
    checked = checked_state(plan, i, {k: v for k, v in state.items() if k not in uncounted}, set(), part.known)
    dtypes = {
        key: number_dtype(plan.links[k]) for k, keys in zip(part.links, part.carried, strict=True) for key in keys
    }

    def exported(key: str, value: Any) -> Any:
        if key in part.counters:
            return plan.as_kept(key, float(value))
        return scalar(float(value), dtypes[key]) if key in dtypes else value.detach().clone()

    return {key: exported(key, value) for key, value in checked.items()}


def fitting_state(plan: Plan, i: int, state: Mapping[str, Any]) -> tuple[State, list[str]]:
    """Pick the fitting entries of a parameter's saved state; and name those that begin anew."""
    part, initial = plan.parts[i], initial_state(plan, i)
    kept: State = {key: value for key, value in state.items() if key not in part.known and not is_of_rules(key)}
    begun: list[str] = []
    going: set[str | None] = set()  # steps of rules whose state was taken
    fresh: set[str | None] = set()
    for keys, carried, step in zip(part.keys, part.carried, part.steps, strict=True):
        tensors = all(places.fits(state.get(key), initial[key]) for key in keys)
        fits = tensors and all(isinstance(state.get(key), Tensor | int | float) for key in carried)
        if fits:
            kept.update({key: state[key] for key in (*keys, *carried)})
        else:
            begun += [*keys, *carried]
        if keys or carried:
            (going if fits else fresh).add(step)
    for step in part.counters:
        if step in state and (step in going or step not in fresh):
            kept[step] = state[step]
        elif plan.count is not None:
            begun.append(step)
    if kept.keys() & ({*part.counters} - part.tree_steps):
        # A step of the tree that was not saved is the number of updates.
        begun = [key for key in begun if key not in part.tree_steps & going]
    return kept, begun
