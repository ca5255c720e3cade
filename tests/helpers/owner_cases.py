"""Rules that need their tensor whole, on sharded tensors: each is computed by one rank; cases for several ranks."""

import contextlib
import math
from typing import NamedTuple

import pytest
import torch
from sharded_cases import EXACT, whole
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

import functorch_optim as fo
from functorch_optim._execution import wholes

SHAPES = {"a": (8, 6), "b": (5, 7), "c": (1, 3), "d": (6, 6), "stack": (3, 4, 5)}
OPTIMIZERS = {
    "muon": lambda: fo.muon(0.1, ns_dtype=torch.float64),
    "normuon": lambda: fo.normuon(0.1, ns_dtype=torch.float64),
    "adafactor": lambda: fo.adafactor(0.1),
    "shampoo": lambda: fo.shampoo(0.1),
    "lamb": lambda: fo.lamb(0.1, weight_decay=0.1),
    "novograd": lambda: fo.novograd(0.1, weight_decay=0.1),
    "ldog": lambda: fo.ldog(0.1, reps_rel=0.1),
    "norms": lambda: fo.chain(
        fo.lamb(0.1, weight_decay=0.1), fo.clip_by_block_rms(0.01), fo.clip_by_norm(0.005, norm_type=math.inf)
    ),
}


def parameters():
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}


def sharded(tree, mesh, placements):
    return {name: distribute_tensor(leaf.clone(), mesh, placements) for name, leaf in tree.items()}


def trains_as_one_process(mesh, placements, names=OPTIMIZERS):
    for name in names:
        tx, one = OPTIMIZERS[name](), parameters()
        many = sharded(one, mesh, placements)
        one_state, many_state = tx.init(one), tx.init(many)
        for step in range(2):
            grads = parameters()
            form = fo.step if step else fo.step_
            many, many_state = form(tx, sharded(grads, mesh, placements), many_state, many)
            one, one_state = form(tx, grads, one_state, one)
        assert all(leaf.placements == tuple(placements) for leaf in many.values())
        torch.testing.assert_close(whole(many), one, **EXACT)
        torch.testing.assert_close(fo.tree.flatten(whole(many_state))[0], fo.tree.flatten(one_state)[0], **EXACT)


def rows_columns_and_grids_train_as_one_process(mesh):
    trains_as_one_process(mesh, [Shard(0)])
    trains_as_one_process(mesh, [Shard(1)], ["muon", "normuon", "norms"])
    if mesh.size() == 4:
        grid = torch.distributed.init_device_mesh("cpu", (2, 2))
        trains_as_one_process(grid, [Shard(0), Shard(1)], ["muon", "adafactor", "norms", "ldog"])
        trains_as_one_process(grid, [Shard(0), Shard(0)], ["muon", "norms"])
        trains_as_one_process(grid, [Replicate(), Shard(0)], ["muon", "norms"])


def stateful_steps_are_those_of_one_process(mesh):
    torch.manual_seed(0)
    one = parameters()
    opts = []
    for params in (one, sharded(one, mesh, [Shard(0)])):
        opts.append(fo.Optimizer([torch.nn.Parameter(p.clone()) for p in params.values()], OPTIMIZERS["normuon"]()))
    for _ in range(3):
        grads = parameters()
        for opt, own in zip(opts, (grads, sharded(grads, mesh, [Shard(0)])), strict=True):
            for p, g in zip(opt.param_groups[0]["params"], own.values(), strict=True):
                p.grad = g
            opt.step()
    for p, q in zip(*[opt.param_groups[0]["params"] for opt in opts], strict=True):
        torch.testing.assert_close(q.full_tensor(), p, **EXACT)


class Mean(NamedTuple):
    mean: torch.Tensor


def counting(called):
    """Return a rule that needs its tensor whole, and notes the shapes that it is given."""

    def update(g, state, p, s):
        called.append(tuple(g.shape))
        mean = (state.mean + g) / 2
        return mean - mean.mean(), Mean(mean)

    return fo.leafwise(Mean, update)


def total(number):
    number = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(number)
    return int(number)


def each_tensor_is_computed_once(mesh):
    called = []
    tx, grads = counting(called), sharded(parameters(), mesh, [Shard(0)])
    state = tx.init(grads)
    tx.update(grads, state)
    assert set(called) <= set(SHAPES.values())
    assert total(len(called)) == len(SHAPES)
    called.clear()
    tx.update({name: g.requires_grad_() for name, g in grads.items()}, state)
    assert total(len(called)) == len(SHAPES) * mesh.size(), "with derivatives every rank computes all"


@contextlib.contextmanager
def exchanges():
    """List the bytes that this rank sends to others, for each collective."""
    sent, exchange = [], torch.distributed.all_to_all_single

    def noting(output, given, output_sizes, input_sizes, group):
        sent.append(sum(input_sizes) - input_sizes[torch.distributed.get_rank(group)])
        return exchange(output, given, output_sizes, input_sizes, group=group)

    torch.distributed.all_to_all_single = noting
    try:
        yield sent
    finally:
        torch.distributed.all_to_all_single = exchange


def two_collectives_send_the_bytes_of_the_formula(mesh):
    """Update and momentum there and back: 4 T (n - 1) / n of all ranks, for T bytes of parameters."""
    n = mesh.size()
    grads = {str(k): torch.randn(4 * n, 8) for k in range(2 * n)}
    grads = sharded(grads, mesh, [Shard(0)])
    tx = fo.scale_by_muon()
    state = tx.init(grads)
    with exchanges() as sent:
        tx.update(grads, state, grads)
    size = sum(4 * math.prod(g.shape) for g in grads.values())
    assert len(sent) == 2
    assert sum(sent) == 4 * size * (n - 1) // n**2


def a_rank_may_be_watched_alone(mesh):
    """All ranks are to choose the same way, or they wait for each other."""
    grads = sharded(parameters(), mesh, [Shard(0)])
    for name in ("muon", "lamb"):
        tx = OPTIMIZERS[name]()
        state = tx.init(grads)
        watched = FlopCounterMode(display=False) if mesh.get_rank() == 0 else contextlib.nullcontext()
        with watched:
            updates, _ = tx.update(grads, state, grads)
        expected, _ = tx.update(whole(grads), tx.init(whole(grads)), whole(grads))
        torch.testing.assert_close(whole(updates), expected, **EXACT)


def norms_take_one_collective_and_send_no_tensor(mesh):
    """Also where some shards are empty, or the same on several ranks."""
    grads = sharded(parameters(), mesh, [Shard(0)])
    tx = OPTIMIZERS["norms"]()
    state = tx.init(grads)
    gathering, gathered = [], wholes.gathered
    wholes.gathered = lambda *args: gathering.append(1) or gathered(*args)
    try:
        with exchanges() as sent:
            updates, _ = tx.update(grads, state, grads)
    finally:
        wholes.gathered = gathered
    assert not sent
    assert len(gathering) == 3, "of parameters and updates together, and then of one result after the other"
    expected, _ = tx.update(whole(grads), tx.init(whole(grads)), whole(grads))
    torch.testing.assert_close(whole(updates), expected, **EXACT)


def modules_that_are_also_parallel_in_tensors_train_as_whole_ones(mesh):
    """FSDP then cuts the shards of tensor parallelism, so that those of the whole tensor have strides."""
    grid = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    nets, opts = [], []
    for parallel in (True, False):
        torch.manual_seed(0)
        layers = torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3), torch.nn.Tanh()
        net = torch.nn.Sequential(*layers).double()
        if parallel:
            parallelize_module(net, grid["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            fully_shard(net, mesh=grid["data"])
        nets.append(net)
        opts.append(fo.Optimizer(net.named_parameters(), fo.muon_with_adamw, lr=0.1, ns_dtype=None))
    x = torch.randn(4, 5, dtype=torch.float64)
    with exchanges() as sent:
        for _ in range(2):
            for net, opt in zip(nets, opts, strict=True):
                opt.zero_grad()
                net(x).square().sum().backward()
                opt.step()
    assert len(sent) == 2 * 2 * 4, "two steps, two matrices cut in two ways, there and back along two dimensions"
    for p, q in zip(*[net.parameters() for net in nets], strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), **EXACT)


def owners_name_their_own_parameters(mesh):
    tx = fo.leafwise(None, lambda g, state, p, s: (g.sum(0), state))
    grads = sharded({"small": torch.ones(2, 2), "large": torch.ones(6, 6)}, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="at 'large'" if mesh.get_rank() == 0 else "at 'small'"):
        tx.update(grads, tx.init(grads))


CASES = [
    norms_take_one_collective_and_send_no_tensor,
    rows_columns_and_grids_train_as_one_process,
    stateful_steps_are_those_of_one_process,
    each_tensor_is_computed_once,
    two_collectives_send_the_bytes_of_the_formula,
    owners_name_their_own_parameters,
    a_rank_may_be_watched_alone,
]
OF_FOUR = [
    norms_take_one_collective_and_send_no_tensor,
    rows_columns_and_grids_train_as_one_process,
    two_collectives_send_the_bytes_of_the_formula,
    modules_that_are_also_parallel_in_tensors_train_as_whole_ones,
]
