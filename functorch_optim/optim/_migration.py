"""Another transformation in mid-training."""

from collections import defaultdict
from typing import Any

from functorch_optim._core import saving
from functorch_optim._core.places import REST
from functorch_optim._core.transformation import GradientTransformation, check_transformation
from functorch_optim.optim import _matching as matching
from functorch_optim.optim._base import OptimizerBase


def migrate(optimizer: OptimizerBase, transformation: GradientTransformation) -> saving.Loaded:
    """Give an optimizer another transformation, and the states of the former one that fit; see `Optimizer.migrate`."""
    if optimizer._has_factory:
        raise TypeError(
            "This optimizer has a factory, whose hyperparameters are in its groups; edit those: "
            "opt.param_groups[0]['mask'] = mask"
        )
    check_transformation(transformation, "opt.migrate(adamw(1e-3, mask=mask))")
    if optimizer._evaluating:
        raise RuntimeError("The parameters are where they are to be evaluated: call opt.train() before migrate")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    numbers: dict[Any, Any] = {p: number for number, p in enumerate(params)}
    states = {numbers.get(key, key): state for key, state in optimizer.state.items()}
    if REST in states:
        states[REST] = {key: saving.state_dict(state) for key, state in states[REST].items()}
    candidate = type(optimizer).__new__(type(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    own = {"_transformation": transformation, "_plans": {}, "_steps": {}}
    own["defaults"] = {**optimizer.defaults, "transformation": transformation}
    candidate.__dict__.update({**optimizer.__dict__, **own})
    for group in groups:
        group.pop("lr", None)
    groups = candidate.param_groups = [candidate._with_rate(group) for group in groups]
    saved = {"state": states, "param_groups": [{"params": [numbers[p] for p in g["params"]]} for g in groups]}
    found, report = matching.fitting(groups, [candidate._plan(0)], saved)
    candidate.state = defaultdict(dict)
    for key, state in found["state"].items():
        candidate.state[key if key == REST else params[key]] = state
    candidate._check_loaded(optimizer, matching.Manner(strict=False))
    optimizer.__dict__.update(candidate.__dict__)
    return report
