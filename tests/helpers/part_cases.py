"""Optimizers of a part of the parameters warn of rules that are to see all; each case runs on several ranks."""

import contextlib
import warnings

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import functorch_optim as fo

CLIPPED = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))


def network():
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))


def cut(net, mesh, original):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the age of this class
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=original)


def step(net, opt):
    opt.zero_grad()
    net(torch.ones(3, 4)).square().sum().backward()
    opt.step()


def steps(net, opt, warning=None):
    """Make two steps, of which the first warns."""
    with contextlib.nullcontext() if warning is None else pytest.warns(UserWarning, match=warning):
        step(net, opt)
    step(net, opt)


def cut_parameters_allow_elementwise_rules_alone(mesh):
    for original in (False, True):
        for tx, names in ((CLIPPED, "clip_by_global_norm sees"), (fo.lamb(0.1), "scale_by_trust_ratio sees")):
            net = cut(network(), mesh, original)
            steps(net, fo.Optimizer(net.parameters(), tx), f"FullyShardedDataParallel.*{names}.*model.clip_grad_norm_")
        net = cut(network(), mesh, original)
        steps(net, fo.Optimizer(net.parameters(), fo.adamw(0.1)))
        steps(net, fo.optim.AdamW(net.parameters()))


def divided_parameters_allow_all_but_numbers_of_the_tree(mesh):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns, which fails a test

    net = DistributedDataParallel(network())
    opt = ZeroRedundancyOptimizer(net.parameters(), fo.Optimizer, transformation=CLIPPED)
    steps(net, opt, "ZeroRedundancyOptimizer.*clip_by_global_norm sees.*torch.nn.utils.clip_grad_norm_")
    for tx in (fo.adamw(0.1), fo.lamb(0.1)):
        net = DistributedDataParallel(network())
        steps(net, ZeroRedundancyOptimizer(net.parameters(), fo.Optimizer, transformation=tx))


def whole_parameters_and_sharded_ones_allow_all(mesh):
    net = DistributedDataParallel(network())
    steps(net, fo.Optimizer(net.parameters(), CLIPPED))
    net = network()
    fully_shard(net, mesh=mesh)
    steps(net, fo.Optimizer(net.parameters(), CLIPPED))


CASES = [
    cut_parameters_allow_elementwise_rules_alone,
    divided_parameters_allow_all_but_numbers_of_the_tree,
    whole_parameters_and_sharded_ones_allow_all,
]
