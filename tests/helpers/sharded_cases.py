"""Sharded training, compared with that of one process; each case runs on several ranks."""

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import functorch_optim as fo

EXACT = {"rtol": 1e-12, "atol": 1e-12}
PLACEMENTS = {  # rows that are not divided evenly, ranks with nothing, and a replicated tensor among them
    "rows": [Shard(0)],
    "columns": [Shard(1)],
    "uneven": [Shard(0)],
    "empty": [Shard(0)],
    "everywhere": [Replicate()],
}


def parameters():
    shapes = {"rows": (8, 6), "columns": (6, 4), "uneven": (5,), "empty": (1, 4), "everywhere": ()}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def sharded(tree, mesh):
    return {name: distribute_tensor(leaf.clone(), mesh, PLACEMENTS[name]) for name, leaf in tree.items()}


def whole(tree):
    return fo.tree.map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def routed(params):
    return {name: "matrix" if name in ("rows", "columns") else "rest" for name in params}


TRANSFORMATIONS = {
    "adamw": lambda: fo.adamw(0.1, weight_decay=0.1),
    "global norm": lambda: fo.chain(fo.clip_by_global_norm(0.3), fo.sgd(0.1, momentum=0.9)),
    "maximum norm": lambda: fo.chain(fo.clip_by_global_norm(0.3, norm_type=float("inf")), fo.adam(0.1)),
    "muon": lambda: fo.partition({"matrix": fo.muon(0.1, ns_dtype=None), "rest": fo.adamw(0.1)}, routed),
    "adafactor": fo.adafactor,
    "lamb": lambda: fo.lamb(0.1),
    "prodigy": fo.prodigy,
    "ldog": fo.ldog,
    "ema_weights": lambda: fo.ema_weights(fo.adam(0.1), 0.9),
    "schedule_free": lambda: fo.schedule_free_adamw(0.1),
    "accumulate": lambda: fo.accumulate(fo.adamw(0.1), 2),
    "monitor": lambda: fo.monitor(fo.adamw(0.1)),
    "rate for each": lambda: fo.sgd({name: 0.1 * k for k, name in enumerate(PLACEMENTS, 1)}),
}


def by_update(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


def functional_forms_give_the_numbers_of_one_process(mesh):
    for make in TRANSFORMATIONS.values():
        for form in (by_update, fo.step, fo.step_):
            tx, one = make(), parameters()
            many = sharded(one, mesh)
            one_state, many_state = tx.init(one), tx.init(many)
            for _ in range(3):
                grads = parameters()
                many, many_state = form(tx, sharded(grads, mesh), many_state, many)
                one, one_state = form(tx, grads, one_state, one)
            assert all(many[name].placements == tuple(PLACEMENTS[name]) for name in many)
            torch.testing.assert_close(whole(many), one, **EXACT)
            torch.testing.assert_close(fo.tree.flatten(whole(many_state))[0], fo.tree.flatten(one_state)[0], **EXACT)


def fully_sharded_modules_train_as_whole_ones(mesh):
    makers = [
        lambda ps: fo.optim.AdamW(ps, lr=0.1),
        lambda ps: fo.optim.Adam(ps, lr=0.1, fused=True),
        lambda ps: fo.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: fo.optim.Adafactor(ps, lr=0.1),
        lambda ps: fo.Optimizer(ps, fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(0.1))),
        lambda ps: fo.Optimizer(ps, fo.chain(fo.clip_by_global_norm(0.1), fo.adam(0.1)), fused=True),
        lambda ps: fo.Optimizer(ps, fo.muon_with_adamw, lr=0.1, ns_dtype=None),
    ]
    for make in makers:
        nets = []
        for _ in range(2):
            torch.manual_seed(0)
            nets.append(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double())
        for part in (nets[0][0], nets[0][2], nets[0]):
            fully_shard(part, mesh=mesh)
        opts = [make(list(net.named_parameters())) for net in nets]
        x = torch.randn(4, 5, dtype=torch.float64)
        seen = []
        for _ in range(4):
            for net, opt in zip(nets, opts, strict=True):
                opt.zero_grad()
                net(x).square().sum().backward()
                opt.step()
            states = [opts[0].state[p] for p in nets[0].parameters()]
            seen.append([id(t) for state in states for t in state.values() if isinstance(t, DTensor)])
        assert seen[1] == seen[3], "states are overwritten, not replaced"
        for p, q in zip(*[net.parameters() for net in nets], strict=True):
            torch.testing.assert_close(p.full_tensor(), q, **EXACT)
            assert all(t.placements == p.placements for t in opts[0].state[p].values() if t.shape == p.shape)


def a_global_norm_takes_one_collective(mesh):
    params = sharded(parameters(), mesh)
    tx = fo.chain(fo.clip_by_global_norm(0.3), fo.adamw(0.1))
    state = tx.init(params)
    with CommDebugMode() as norm:
        fo.step(tx, params, state, params)
    with CommDebugMode() as elementwise:
        fo.step(fo.adamw(0.1), params, fo.adamw(0.1).init(params), params)
    assert (norm.get_total_counts(), elementwise.get_total_counts()) == (1, 0)


def a_rule_that_sees_the_tree_is_given_the_sharded_tensors_themselves(mesh):
    seen = []

    def scalars(step, *, updates, params):
        seen.append((*updates, *params))
        return step

    def rule():
        return fo.leafwise(None, lambda g, state, p, s: (g, state), scalars, elementwise=True, needs_params=True)

    params, grads = sharded(parameters(), mesh), sharded(parameters(), mesh)
    tx = fo.chain(rule(), fo.scale(0.5), rule())
    fo.step(tx, grads, tx.init(params), params)
    first, second = seen
    leaves = fo.tree.flatten((grads, params))[0]
    assert all(one is other for one, other in zip(first, leaves, strict=True))
    for new, g in zip(second[: len(grads)], leaves[: len(grads)], strict=True):
        assert new.placements == g.placements
        torch.testing.assert_close(new.full_tensor(), g.full_tensor() / 2)


def parameters_and_states_keep_their_placements(mesh):
    """A gradient may be a partial sum, as that of a replicated parameter under sequence parallelism is."""
    ranks = mesh.size()
    p = distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Replicate()])
    g = DTensor.from_local(torch.full((4,), mesh.get_rank() + 1.0, dtype=torch.float64), mesh, [Partial()])
    tx, total = fo.adam(0.1), torch.full((4,), ranks * (ranks + 1) / 2, dtype=torch.float64)
    new, state = fo.step(tx, g, tx.init(p), p)
    expected, _ = fo.step(tx, total, tx.init(total), torch.ones_like(total))
    torch.testing.assert_close(new.to_local(), expected, **EXACT)
    sharded_leaves = [leaf for leaf in [new, *fo.tree.flatten(state)[0]] if isinstance(leaf, DTensor)]
    assert len(sharded_leaves) == 3
    assert all(leaf.placements == (Replicate(),) for leaf in sharded_leaves)
    assert fo.sgd(0.1).update(g, fo.sgd(0.1).init(p))[0].placements == (Replicate(),)


def derivatives_through_steps_are_those_of_one_process(mesh):
    start, gradient, weights = (torch.randn(6, 3, dtype=torch.float64) for _ in range(3))
    for make in (fo.adam, lambda lr: fo.chain(fo.clip_by_global_norm(0.2), fo.sgd(lr)), fo.muon):
        found = []
        for split in (lambda x, placement: x.clone(), lambda x, placement: distribute_tensor(x, mesh, [placement])):
            p, w = split(start, Shard(0)), split(weights, Shard(0))
            g = split(gradient, Shard(0)).requires_grad_()
            lr = split(torch.tensor(0.1, dtype=torch.float64), Replicate()).requires_grad_()
            tx = make(lr) if make is not fo.muon else fo.muon(lr, ns_dtype=None)
            state = tx.init(p)
            for scale in (1, 2):
                p, state = fo.step(tx, scale * g, state, p)
            found.append(torch.autograd.grad(whole((p * p * w).sum()), (g, lr)))
        torch.testing.assert_close(whole(found[1]), found[0], rtol=1e-10, atol=1e-12)


def tensors_of_two_meshes_and_of_none_have_one_norm(mesh):
    grid = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    placed = {"both": (grid, [Shard(0), Shard(1)]), "one": (grid["tensor"], [Shard(0)])}
    one = {name: torch.randn(6, 4, dtype=torch.float64) for name in (*placed, "none")}
    many = {name: distribute_tensor(leaf, *placed[name]) if name in placed else leaf for name, leaf in one.items()}
    tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(0.1))
    new, _ = fo.step(tx, many, tx.init(many), many)
    expected, _ = fo.step(tx, one, tx.init(one), one)
    torch.testing.assert_close(whole(new), expected, **EXACT)


def autograd_sees_that_sharded_parameters_were_overwritten(mesh):
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    opt = fo.optim.Adam([p], lr=0.1)
    for _ in range(3):
        before = p._version
        opt.step()
        assert p._version > before


def whole_states_load_into_sharded_optimizers(mesh):
    tx, one = fo.adamw(0.1), parameters()
    many = sharded(one, mesh)
    _, one_state = fo.step(tx, one, tx.init(one), one)
    loaded = fo.load_state_dict(tx.init(many), fo.state_dict(one_state))
    for p, m in zip(many.values(), loaded[0].exp_avg.values(), strict=True):
        assert m.placements == p.placements
    torch.testing.assert_close(whole(loaded[0].exp_avg), one_state[0].exp_avg, **EXACT)
    opts = []
    for params in (one, many):
        params = [torch.nn.Parameter(p) for p in params.values()]  # noqa: PLW2901
        opts.append(fo.optim.AdamW(params, lr=0.1))
        for p in params:
            p.grad = p.detach().clone()
    opts[0].step()
    opts[1].load_state_dict(opts[0].state_dict())
    for p, state in opts[1].state.items():
        assert state["exp_avg"].placements == p.placements


CASES = [
    functional_forms_give_the_numbers_of_one_process,
    fully_sharded_modules_train_as_whole_ones,
    a_global_norm_takes_one_collective,
    a_rule_that_sees_the_tree_is_given_the_sharded_tensors_themselves,
    parameters_and_states_keep_their_placements,
    derivatives_through_steps_are_those_of_one_process,
    autograd_sees_that_sharded_parameters_were_overwritten,
    whole_states_load_into_sharded_optimizers,
]


OF_FOUR = [
    derivatives_through_steps_are_those_of_one_process,
    tensors_of_two_meshes_and_of_none_have_one_norm,
    whole_states_load_into_sharded_optimizers,
]


def a_case_that_fails(mesh):
    assert mesh.size() == 0, "no mesh is empty"
