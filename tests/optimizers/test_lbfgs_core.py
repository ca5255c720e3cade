"""The iterations of L-BFGS on vectors: minimize, its memory, and its line search, against those of torch.optim."""

import pytest
import torch
from lbfgs_problems import (
    DOUBLE,
    WOLFE,
    Core,
    Ours,
    Theirs,
    deviation,
    largest_deviation,
    leaves_of,
    make,
    network,
    options,
    quadratic,
    rosenbrock,
)
from torch.optim.lbfgs import _strong_wolfe

import functorch_optim as fo
from functorch_optim._control import while_loop
from functorch_optim.optimizers import _line_search as line_search
from functorch_optim.optimizers._limited_memory import from_torch, to_torch
from functorch_optim.optimizers._line_search import Point
from functorch_optim.optimizers.lbfgs import lbfgs, pack, unpack


@pytest.mark.sampled(size=8)
@options
@pytest.mark.parametrize("problem", [rosenbrock, quadratic, network])
def test_without_additive_updates_it_equals_torch_for_long(problem, options):
    assert largest_deviation(Core, problem, options, 8) < 1e-9


# Memory. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_iter": 3, "lr": 0.02, "history_size": 5}, {"max_iter": 3, **WOLFE}])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_goes_on_from_torchs_state_and_torch_from_ours(options, steps):
    params, size = make(rosenbrock), options.get("history_size", 100)
    core, theirs = Core(rosenbrock, params, **options), Theirs(rosenbrock, params, **options)
    for _ in range(steps):
        core.step()
        theirs.step()

    ours = Core(rosenbrock, theirs.params, **options)
    ours.x, ours.state = ours.x.detach(), from_torch(theirs.state, ours.x.detach())
    functional = Ours(rosenbrock, fo.tree.map(torch.Tensor.detach, theirs.params), **options)
    functional.params = fo.tree.map(torch.clone, functional.params)
    functional.state = pack(torch.tensor(steps), from_torch(theirs.state, ours.x), functional.state)

    again = Theirs(rosenbrock, {"x": core.x}, **options)
    again.optimizer.state[again.leaves[0]].update(to_torch(core.state, size))
    memories = leaves_of((ours.state, core.state))
    before = [leaf.clone() for leaf in memories]
    theirs.step(), again.step(), ours.step(), functional.step()
    assert all(torch.equal(leaf, old) for leaf, old in zip(memories, before, strict=True))  # torch's are its own

    saved = again.optimizer.state_dict()
    again = Theirs(rosenbrock, {"x": again.leaves[0].detach()}, **options)
    again.optimizer.load_state_dict(saved)
    for _ in range(3):
        for side in (ours, functional, theirs, again):
            side.step()
        assert deviation(ours, theirs) < 1e-13
        assert deviation(functional, theirs) < 1e-11
        assert deviation(ours, again) < 1e-13
    assert set(to_torch(ours.state, size)) == set(theirs.state)


def test_memories_survive_packing_exactly():
    core = Core(rosenbrock, make(rosenbrock), max_iter=3)
    state = lbfgs().init(make(rosenbrock))
    for _ in range(3):
        core.step()
        state = pack(state.step + 1, core.state, state)
        again = unpack(state, 20)
        pairs = zip(leaves_of(tuple(core.state)), leaves_of(tuple(again)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


# Line search. ---------------------------------------------------------------------------------------------------------


def search(function, t, max_ls, tolerance_change=1e-9):
    """Search along a function of one number, by `begin` and `advance`."""
    evaluate = torch.func.grad_and_value(function)
    zero, one = torch.zeros((), **DOUBLE), torch.ones((), **DOUBLE)
    gtd, f = evaluate(zero)

    def turn(state):
        gtd_new, f_new = evaluate(state.t)
        new = Point(state.t, f_new, gtd_new[None], gtd_new)
        return line_search.advance(state, new, f, gtd[None], one, state.trials >= max_ls, tolerance_change)

    state = while_loop(lambda s: ~s.done, turn, line_search.begin(f, gtd[None], gtd, t), max_ls + 1)
    return state.low.t, state.low.f, state.low.g, state.trials


def torch_search(function, t, max_ls, tolerance_change=1e-9):
    evaluate = torch.func.grad_and_value(function)
    gtd, f = evaluate(torch.zeros((), **DOUBLE))

    def on_the_line(x, t, d):
        gtd, f = evaluate(torch.as_tensor(t, **DOUBLE))
        trials.append(f + gtd)
        return f.item(), gtd[None]

    trials, one = [], torch.ones(1, **DOUBLE)
    f, g, t, evaluations = _strong_wolfe(
        on_the_line, None, t, one, f.item(), gtd[None], gtd, max_ls=max_ls, tolerance_change=tolerance_change
    )
    found = (*[torch.as_tensor(value, **DOUBLE) for value in (t, f, g)], torch.as_tensor(evaluations))
    return found if torch.stack(trials).isfinite().all() else None


def bumpy(weights, digits):
    """Make a function that falls at first and then does all sorts of things; rounded losses make ties."""

    def function(t):
        waves = torch.arange(1, len(weights) + 1, **DOUBLE)
        f = -0.5 * t + (weights * (waves * t).sin()).sum() + 0.05 * t * t
        f = f - (weights * waves).sum() * t
        return f + (f.round(decimals=digits) - f).detach()

    return function


def kinked(slope, place):
    return lambda t: -0.01 * t + torch.nn.functional.softplus(50 * slope * (t - place)) * (1 + place)


def steep(slope, place):
    return lambda t: -t + torch.exp(slope * (t - place))


@pytest.mark.sampled(pool="long")
def test_the_line_search_is_torchs_on_all_kinds_of_functions():
    evaluations, overflows = set(), 0
    for seed in range(150):
        torch.manual_seed(seed)
        slope, place, size = torch.rand(3, **DOUBLE)
        t = 10 ** (5 * size - 2)
        functions = [
            bumpy(torch.randn(3, **DOUBLE).abs() * 0.3, digits=(0, 1, 12)[seed % 3]),
            kinked(10 * slope, 0.1 + 3 * place),
            steep(10 * slope, 0.1 + 3 * place),
        ]
        for function in functions:
            for max_ls in (25, seed % 6):
                ours, theirs = search(function, t, max_ls), torch_search(function, t, max_ls)
                if theirs is None:  # it has met a loss that is not finite
                    assert ours[1] <= function(torch.zeros((), **DOUBLE))
                    overflows += 1
                    continue
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
                evaluations.add(int(ours[3]))
    assert evaluations >= set(range(1, 20))
    assert 0 < overflows < 100


def test_outside_of_the_domain_masked_searches_and_derivatives_are_those_of_a_loop():
    def loss(slope):
        return lambda t: -slope * t - 0.1 * (1 - t).log()  # least at 1 - 0.1 / slope, NaN above 1

    slopes, t = torch.tensor([0.5, 1.0, 3.0, 0.2], **DOUBLE), torch.tensor([0.13, 7.0, 300.0, 2.2], **DOUBLE)
    found = lambda slope, t: search(loss(slope), t, 25)
    each = [found(slope, first) for slope, first in zip(slopes, t, strict=True)]
    torch.testing.assert_close(torch.vmap(found)(slopes, t), tuple(map(torch.stack, zip(*each, strict=True))))
    for slope, (t_found, *_) in zip(slopes, each, strict=True):
        assert 0 < t_found < 1
        assert abs(torch.func.grad(loss(slope))(t_found)) <= 0.9 * (slope - 0.1)
    length = lambda slope, t: found(slope, t)[0]
    for derivative in (torch.func.grad, torch.func.jacfwd):
        slow = torch.stack([derivative(length, (0, 1))(*pair)[1] for pair in zip(slopes, t, strict=True)])
        assert slow.isfinite().all()
        torch.testing.assert_close(torch.vmap(derivative(length, (0, 1)))(slopes, t)[1], slow)


def test_masked_line_searches_are_the_same():
    torch.manual_seed(0)
    weights, t = torch.randn(200, 3, **DOUBLE).abs() * 0.3, torch.rand(200, **DOUBLE) * 3
    batched = torch.vmap(lambda w, t: search(bumpy(w, 1), t, 10))(weights, t)
    each = [search(bumpy(w, 1), first, 10) for w, first in zip(weights, t, strict=True)]
    torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*each, strict=True))), rtol=1e-12, atol=1e-12)
    assert len(batched[3].unique()) > 4


def test_a_straight_line_is_followed_as_torch_does_with_a_finite_derivative():
    slope = torch.tensor(-0.25, **DOUBLE)
    one = torch.ones((), **DOUBLE)
    torch.testing.assert_close(search(lambda t: slope * t, one, 3), torch_search(lambda t: slope * t, one, 3))
    for derivative in (torch.func.grad, torch.func.jacfwd):
        # t = 10^3 at the end, whatever the slope; proportional to the first trial.
        assert derivative(lambda slope: search(lambda t: slope * t, one, 3)[0])(slope) == 0
        assert derivative(lambda t: search(lambda t: slope * t, t, 3)[0])(one) == 1000
