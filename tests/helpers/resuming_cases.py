"""Checkpoints of sharded training, which go on sharded, and whole in one process; each case runs on several ranks."""

import copy
import tempfile
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import functorch_optim as fo


def parts(params):
    return {name: "bias" if name.endswith("bias") else "weight" for name in params}


OPTIMIZERS = {
    "class": lambda ps: fo.optim.AdamW(ps, lr=0.1),
    "factory": lambda ps: fo.Optimizer(ps, fo.adamw, lr=0.1),
    "schedule": lambda ps: fo.Optimizer(ps, fo.adamw, lr=fo.schedules.cosine(0.1, 10)),
    "chain": lambda ps: fo.Optimizer(ps, fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(0.1))),
    "named chain": lambda ps: fo.Optimizer(ps, fo.named_chain(("clip", fo.clip(0.1)), ("adam", fo.adam(0.1)))),
    "partition": lambda ps: fo.Optimizer(
        ps, fo.partition({"bias": fo.sgd(0.1, momentum=0.9), "weight": fo.adam(0.1)}, parts)
    ),
    "whole tree": lambda ps: fo.Optimizer(ps, fo.monitor(fo.adamw(0.1))),
    "average": lambda ps: fo.Optimizer(ps, fo.ema_weights(fo.adamw(0.1), 0.9)),
}


def network(mesh=None):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    if mesh is not None:
        for part in (net[0], net[2], net):
            fully_shard(part, mesh=mesh)
    return net


def train(net, opt, steps):
    x = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)
    for _ in range(steps):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()


def whole(net):
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in net.parameters()]


def sharded_checkpoints_go_on_sharded_and_whole(mesh):
    warnings.filterwarnings("ignore", category=UserWarning)  # of torch.distributed.checkpoint
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    for name, make in OPTIMIZERS.items():
        net = network(mesh)
        opt = make(list(net.named_parameters()))
        train(net, opt, 2)
        model, states = get_state_dict(net, opt)
        dcp.save({"model": model, "optimizer": states}, checkpoint_id=f"{folder[0]}/{name}")
        complete = copy.deepcopy(get_state_dict(net, opt, options=StateDictOptions(full_state_dict=True)))
        train(net, opt, 2)
        for again in (network(mesh), network()):
            other = make(list(again.named_parameters()))
            model, states = get_state_dict(again, other)
            loaded = {"model": model, "optimizer": states}
            dcp.load(loaded, checkpoint_id=f"{folder[0]}/{name}")
            set_state_dict(again, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
            train(again, other, 2)
            torch.testing.assert_close(whole(again), whole(net), rtol=1e-12, atol=1e-12, msg=name)
        again = network(mesh)
        other = make(list(again.named_parameters()))
        set_state_dict(
            again,
            other,
            model_state_dict=complete[0],
            optim_state_dict=complete[1],
            options=StateDictOptions(full_state_dict=True),
        )
        train(again, other, 2)
        torch.testing.assert_close(whole(again), whole(net), rtol=1e-12, atol=1e-12, msg=name)


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
ELSEWHERE = {
    "tree": (lambda ps: fo.Optimizer(ps, fo.monitor(fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(0.1)))), FLAT),
    "muon": (lambda ps: fo.Optimizer(ps, fo.muon_with_adamw(0.1, ns_dtype=None)), FLAT),
}


def saves_for_others(folder, mesh):
    warnings.filterwarnings("ignore", category=UserWarning)  # of torch.distributed.checkpoint
    for name, (make, options) in ELSEWHERE.items():
        net = network(mesh)
        opt = make(list(net.named_parameters()))
        train(net, opt, 2)
        model, states = get_state_dict(net, opt, options=options)
        dcp.save({"model": model, "optimizer": states}, checkpoint_id=f"{folder}/{name}")


def goes_on_with_that_of_others(folder, mesh):
    """Load sharded on a mesh, and whole without one: the numbers are those of a training in one process."""
    warnings.filterwarnings("ignore", category=UserWarning)
    for name, (make, options) in ELSEWHERE.items():
        alone, net = network(), network(mesh)
        former, opt = (make(list(one.named_parameters())) for one in (alone, net))
        train(alone, former, 4)
        model, states = get_state_dict(net, opt, options=options)
        loaded = {"model": model, "optimizer": states}
        dcp.load(loaded, checkpoint_id=f"{folder}/{name}")
        set_state_dict(
            net, opt, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=options
        )
        train(net, opt, 2)
        torch.testing.assert_close(whole(net), whole(alone), rtol=1e-12, atol=1e-12, msg=name)
        rests = [fo.tree.flatten(one.state_dict()["state"].get("transformation", {}))[0] for one in (opt, former)]
        torch.testing.assert_close(*rests, rtol=1e-12, atol=1e-12, msg=name)
