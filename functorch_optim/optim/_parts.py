"""A warning where each process has the optimizer of a part of the parameters, and does not know of the others."""

import warnings

import torch

from functorch_optim._core.rule import Rule
from functorch_optim.optim import _helpers_of_torch as helpers
from functorch_optim.optim._plan import Plan


def warn_of_parts(plan: Plan) -> None:
    """Warn of rules that would see a part where they are to see all.

    Under `FullyShardedDataParallel` parameters are cut, and only elementwise rules are right. Under
    `ZeroRedundancyOptimizer` they are whole, and only numbers of the whole tree are not.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_world_size() == 1:
        return
    rules = [link.rule for link in plan.links if isinstance(link.rule, Rule)]
    if any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in plan.params):
        partial = [rule for rule in rules if rule.sees_tree or not rule.elementwise]
        cause = "FullyShardedDataParallel gives each process pieces of the parameters"
        remedy = "model.clip_grad_norm_(1.0)"
    elif helpers.is_caller("torch.distributed.optim.zero_redundancy_optimizer", "ZeroRedundancyOptimizer._local_step"):
        partial = [rule for rule in rules if rule.sees_tree]
        cause = "ZeroRedundancyOptimizer gives each process some of the parameters"
        remedy = "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"
    else:
        return
    if partial:
        names = ", ".join(dict.fromkeys([rule.name for rule in partial]))
        warnings.warn(
            f"{cause}, and {names} sees those alone, so that its numbers differ between processes. Under "
            "torch.distributed.fsdp.fully_shard they are those of one process. For clipping alone call "
            f"{remedy} before opt.step()",
            stacklevel=2,
        )
