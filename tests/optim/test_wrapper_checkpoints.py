"""Checkpoints of fo.Optimizer, and of all optimizers through torch.distributed.checkpoint's helpers."""

from typing import NamedTuple

import pytest
import torch
from checkpoint_cases import assert_same_dicts, in_order, make
from torch.distributed.checkpoint import state_dict as distributed
from torch_like_cases import (
    OPTIONS,
    awkward_params,
    cases,
    deviation,
    embedding_params,
    factory_of,
    parameters,
    run,
    run_sparse,
)
from wrapper_cases import summing

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file

NAMES = ["matrix", "vector", "scalar", "frozen"]


def is_matrix(params):
    return {name: p.ndim > 1 for name, p in params.items()}


def is_frozen(params):
    return {name: name == "frozen" for name in params}


class Master(NamedTuple):
    """A copy in higher precision."""

    master: torch.Tensor
    calls: torch.Tensor


def with_master():
    """Take steps too small for the parameters, along a copy in float64."""

    def init(p):
        return Master(p.detach().double(), torch.zeros((), dtype=torch.int64, device=p.device))

    def update(g, state, p, s):
        master = state.master - 1e-3 * g.double()
        return master.to(p.dtype) - p, Master(master, state.calls + 1)

    return fo.leafwise(init, update, needs_params=True)


CHAINS = {
    "traces": fo.chain(fo.clip_by_global_norm(1.0), fo.trace(0.9), fo.masked(fo.trace(0.5), is_matrix), fo.scale(-0.1)),
    "nadam": fo.chain(fo.clip_by_global_norm(1.0), fo.nadam(0.1, weight_decay=0.1), fo.freeze(is_frozen)),
    "asgd": fo.asgd(0.1, lambd=0.1, t0=3),
    "partition": fo.partition({True: fo.nadam(0.1, momentum_decay=0.1), False: fo.asgd(0.1, t0=2)}, is_matrix),
    "numbers twice": fo.chain(fo.scale_by_nadam(), fo.trace(0.5), fo.scale_by_nadam(), fo.trace(0.7), fo.scale(-0.1)),
    "trees": fo.chain(summing(), fo.adam(0.1, amsgrad=True), summing(), fo.scale(0.1)),
    "master": with_master(),
    "schedule": fo.adamw(fo.schedules.cosine(0.1, 20)),
}


def make_wrapper(transformation, params, **hyperparameters):
    named = [(name, p.detach().clone().requires_grad_()) for name, p in zip(NAMES, params, strict=True)]
    return fo.Optimizer([{"params": named[:2]}, {"params": named[2:]}], transformation, **hyperparameters)


def missing(step, i):
    return (step + i) % 4 == 0


@pytest.mark.sampled(size=8)
@pytest.mark.parametrize("tx", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_chains_go_on_as_if_never_interrupted(tx, dtype):
    if dtype.is_complex and tx is CHAINS["master"]:
        pytest.skip("it is for real numbers")
    optimizer = make_wrapper(tx, [torch.randn(shape, dtype=dtype) for shape in [(3, 4), (4,), (), (2,)]])
    run(optimizer, optimizer, steps=7, missing=missing)
    resumed = make_wrapper(tx, parameters(optimizer))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert_same_dicts(resumed.state_dict(), optimizer.state_dict(), tolerance=0)
    assert run(resumed, optimizer, steps=10, missing=missing) == 0
    assert_same_dicts(resumed.state_dict(), optimizer.state_dict(), tolerance=0)


def test_numbers_that_are_carried_on_are_saved():
    optimizer = make_wrapper(CHAINS["partition"], [torch.ones(2, 2), torch.ones(2), torch.ones(()), torch.ones(2)])
    run(optimizer, optimizer, steps=2)
    states = optimizer.state_dict()["state"]
    assert set(states[0]) == {"step", "mu_product", "exp_avg", "exp_avg_sq"}
    assert set(states[1]) == {"step", "eta", "mu", "ax"}


# A factory and the class of its name. ---------------------------------------------------------------------------------


def wrapped(name, params, options):
    params = [p.detach().clone().requires_grad_() for p in params]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.03}]
    return fo.Optimizer(groups, factory_of(name), **options)


@pytest.mark.sampled(size=8)
@cases
@pytest.mark.parametrize("module", [fo.optim, torch.optim], ids=["ours", "torch"])
def test_factories_and_classes_load_what_the_other_saved(name, options, module):
    params = awkward_params(name, torch.float64)
    pair = [wrapped(name, params, options), make(module, name, params, **options)]
    assert run(*pair, steps=7) < 1e-12
    others = [wrapped(name, in_order(pair[0]), {}), make(module, name, in_order(pair[1]))]
    for target, source in zip(others, pair[::-1], strict=True):
        target.load_state_dict(through_a_file(source.state_dict()))
        for p, q in zip(parameters(target), parameters(source), strict=True):
            p.data.copy_(q)
    torch.manual_seed(1)
    run(*pair, steps=20)
    torch.manual_seed(1)
    run(*others, steps=20)
    # When loading, torch.optim's NAdam casts its product from float32 to float64, and goes on in that; fo.optim's too.
    for other in others:
        tolerance = 1e-5 if name == "NAdam" and type(other) is not fo.Optimizer else 1e-12
        assert deviation(parameters(other), parameters(pair[1])) < tolerance


def test_sparse_adam_and_its_factory():
    params = embedding_params()
    pair = [wrapped("SparseAdam", params, {}), make(torch.optim, "SparseAdam", params)]
    run_sparse(*pair, steps=7)
    others = [wrapped("SparseAdam", in_order(pair[0]), {}), make(torch.optim, "SparseAdam", in_order(pair[1]))]
    for target, source in zip(others, pair[::-1], strict=True):
        target.load_state_dict(through_a_file(source.state_dict()))
    assert run_sparse(*others, steps=30) < 1e-5  # torch.optim computes with the step as it is, here in float32


# torch.distributed.checkpoint.state_dict, without any distribution. ---------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
        self.second = torch.nn.Linear(4, 2, bias=False, dtype=torch.float64)


def train_models(pairs, steps):
    for t in range(steps):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
            model.second(model.first(x).tanh()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def optimizer_of(kind, name, model, options):
    groups = [{"params": model.second.parameters()}, {"params": model.first.parameters(), "lr": 0.03}]
    if kind == "wrapper":
        return fo.Optimizer(groups, factory_of(name), **options)
    return getattr((fo if kind == "ours" else torch).optim, name)(groups, **options)


def make_models(seed, kind, name, options):
    models = [Model(seed), Model(seed)]
    return [
        (model, optimizer_of(one, name, model, options)) for model, one in zip(models, (kind, "torch"), strict=True)
    ]


@pytest.mark.sampled(size=8)
@cases
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_distributed_state_dicts(name, options, flat):
    how = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)
    pairs = make_models(0, "ours", name, options)
    before = [p.detach().clone() for p in pairs[0][0].parameters()]
    empty = [distributed.get_optimizer_state_dict(model, optimizer, options=how) for model, optimizer in pairs]
    assert_same_dicts(*empty)
    assert all(map(torch.equal, pairs[0][0].parameters(), before))
    train_models(pairs, 3)
    saved = [distributed.get_state_dict(model, optimizer, options=how) for model, optimizer in pairs]
    assert_same_dicts(*saved)
    for source in saved:
        resumed = make_models(1, "ours", name, options)
        for model, optimizer in resumed:
            both = through_a_file(source)
            distributed.set_state_dict(
                model, optimizer, model_state_dict=both[0], optim_state_dict=both[1], options=how
            )
        assert_same_dicts(*[optimizer.state_dict() for _, optimizer in resumed])
        train_models(resumed, 8)
        assert_same_dicts(*[model.state_dict() for model, _ in resumed], tolerance=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_distributed_state_dicts_of_the_wrapper(name):
    options = {**OPTIONS[name][-1], **({} if name == "Muon" else {"maximize": False})}
    pairs = make_models(0, "wrapper", name, options)
    train_models(pairs, 3)
    for model, optimizer in pairs:
        saved = distributed.get_state_dict(model, optimizer)
        resumed = make_models(1, "wrapper", name, options)
        for new in resumed:
            both = through_a_file(saved)
            distributed.set_state_dict(*new, model_state_dict=both[0], optim_state_dict=both[1])
        train_models(resumed, 8)
        # torch.optim's NAdam casts its product to the parameters' dtype when it is loaded.
        tolerance = 1e-6 if name == "NAdam" else 1e-12
        assert_same_dicts(*[new.state_dict() for new, _ in resumed], tolerance=tolerance)


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("tx", [fo.lbfgs(max_iter=2), fo.quantized(fo.adamw(0.1))], ids=["lbfgs", "quantized"])
def test_distributed_state_dicts_where_no_parameter_has_a_state_of_its_own(tx, flat):
    how = distributed.StateDictOptions(flatten_optimizer_state_dict=flat)

    def make():
        model = Model(0)
        return model, fo.Optimizer(model.parameters(), tx)

    def train(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = sum((p - 1).square().sum() for p in model.parameters())
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)

    pair, resumed = make(), make()
    train(*pair)
    both = through_a_file(distributed.get_state_dict(*pair, options=how))
    distributed.set_state_dict(*resumed, model_state_dict=both[0], optim_state_dict=both[1], options=how)
    for some in (pair, resumed):
        train(*some)
    assert_same_dicts(pair[0].state_dict(), resumed[0].state_dict())
    assert_same_dicts(pair[1].state_dict(), resumed[1].state_dict())
