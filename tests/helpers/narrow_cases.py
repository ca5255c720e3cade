"""Sharded parameters in few bits, and random numbers for them; each case runs on several ranks."""

import torch
from sharded_cases import whole
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import functorch_optim as fo

PLACED = {"rows": (8, 32), "uneven": (5, 32), "empty": (1, 32), "column": (64, 1)}


def parameters(dtype):
    return {name: torch.randn(shape).to(dtype) for name, shape in PLACED.items()}


def sharded(tree, mesh, placements):
    return {name: distribute_tensor(leaf.clone(), mesh, placements) for name, leaf in tree.items()}


def trains_as_one_process(mesh, tx, dtype, placements, **tolerances):
    one = parameters(dtype)
    many = sharded(one, mesh, placements)
    one_state, many_state = tx.init(one), tx.init(many)
    for form in (fo.step, fo.step_):
        grads = parameters(dtype)
        many, many_state = form(tx, sharded(grads, mesh, placements), many_state, many)
        one, one_state = form(tx, grads, one_state, one)
    assert all(leaf.placements == tuple(placements) for leaf in many.values())
    torch.testing.assert_close(whole(many), one, **tolerances)
    return one_state, many_state


def random_bits_are_those_of_whole_tensors(mesh):
    exact = {"rtol": 0, "atol": 0}
    for placements in ([Shard(0)], [Replicate()]):
        trains_as_one_process(mesh, fo.stochastic_rounding(fo.sgd(0.1), 5), torch.bfloat16, placements, **exact)
        noisy = fo.chain(fo.add_noise(0.1, generator=5), fo.sgd(0.1))
        trains_as_one_process(mesh, noisy, torch.float32, placements)
    p, g = (distribute_tensor(torch.ones(4, 6, dtype=torch.bfloat16), mesh, [Shard(1)]) for _ in range(2))
    tx = fo.stochastic_rounding(fo.sgd(0.001), 5)
    p, _ = fo.step(tx, g, tx.init(p), p)
    plain = torch.ones(4, 6, dtype=torch.bfloat16)
    torch.testing.assert_close(p.full_tensor(), fo.step(tx, plain, tx.init(plain), plain)[0], **exact)
    assert len(p.full_tensor().unique()) == 2


def noise_of_one_seed_is_that_of_whole_tensors(mesh):
    one = parameters(torch.float32)
    many = sharded(one, mesh, [Shard(0)])
    found = []
    for params in (one, many):
        tx = fo.sgld(0.1, generator=torch.Generator().manual_seed(0))
        found.append(fo.step(tx, params, tx.init(params), params)[0])
    assert all(leaf.placements == (Shard(0),) for leaf in found[1].values())
    torch.testing.assert_close(whole(found[1]), found[0])
    assert not torch.equal(found[0]["rows"], 0.95 * one["rows"])


def blocks_are_quantized_shard_by_shard(mesh):
    for bits in (8, 4):
        tx = fo.quantized(fo.adamw(0.1), bits, block_size=32, min_size=32)  # a block is a row, which no shard cuts
        one, many = trains_as_one_process(mesh, tx, torch.float32, [Shard(0)], rtol=1e-5, atol=1e-6)
        for name in ("rows", "uneven", "empty"):
            m = many.codes[0].exp_avg[name]
            assert m.dtype == torch.uint8
            assert m.placements == (Shard(0),)
            assert (m.full_tensor() == one.codes[0].exp_avg[name]).float().mean() > 0.9, "but for rounding"
            assert many.absmax[0].exp_avg[name].to_local().shape[0] == 1
    p = distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)])
    assert not hasattr(fo.quantized(fo.trace(0.9), 4).init(p).absmax.momentum_buffer, "shape")


def quantized_states_are_saved_and_loaded(mesh):
    opts = []
    for _ in range(2):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(p) for p in sharded(parameters(torch.float32), mesh, [Shard(0)]).values()]
        opts.append(fo.Optimizer(params, fo.quantized(fo.adam(0.1), block_size=16, min_size=32)))

    def step(opt):
        for p in opt.param_groups[0]["params"]:
            p.grad = p.detach().clone()
        opt.step()

    step(opts[0])
    step(opts[1])
    opts[1].load_state_dict(opts[0].state_dict())
    for opt in opts:
        step(opt)
    for p, q in zip(*[opt.param_groups[0]["params"] for opt in opts], strict=True):
        torch.testing.assert_close(p.to_local(), q.to_local())


CASES = [
    random_bits_are_those_of_whole_tensors,
    noise_of_one_seed_is_that_of_whole_tensors,
    blocks_are_quantized_shard_by_shard,
    quantized_states_are_saved_and_loaded,
]
