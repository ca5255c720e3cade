"""Cautious updates, MARS and projections: the numbers of their papers, and where in a chain they act."""

import numpy as np
import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo

LR, WD, BETAS, EPS = 0.1, 0.05, (0.9, 0.99), 1e-8


def make(count=6):
    rng = np.random.default_rng(0)

    def draw():
        return {"w": rng.normal(size=(3, 4)), "b": rng.normal(size=3)}

    return draw(), [draw() for _ in range(count)]


def as_tensors(some):
    return {name: torch.from_numpy(value.copy()) for name, value in some.items()}


def pure(tx, params, history):
    params = as_tensors(params)
    state = tx.init(params)
    for grads in history:
        params, state = fo.step(tx, as_tensors(grads), state, params)
    return params


def stateful(tx, params, history, **hyperparameters):
    own = {name: torch.nn.Parameter(p) for name, p in as_tensors(params).items()}
    opt = fo.Optimizer(own.items(), tx, **hyperparameters)
    for grads in history:
        for name, g in as_tensors(grads).items():
            own[name].grad = g
        opt.step()
    return {name: p.detach() for name, p in own.items()}


def masked(u, g, scaling):
    kept = (u * g > 0).astype(u.dtype)
    return u * kept / max(kept.mean(), 1e-3) if scaling == "mean" else u * kept * kept.size / (kept.sum() + 1)


def adamw(params, history, scaling=None, sign=1.0, change=lambda name, g: g):
    """AdamW, whose direction may be masked, and whose gradients may be changed first."""
    params = dict(params)
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, grads in enumerate(history, 1):
        for name, p in params.items():
            g = sign * change(name, grads[name])
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g * g
            u = m[name] / (1 - BETAS[0] ** t) / (np.sqrt(v[name] / (1 - BETAS[1] ** t)) + EPS)
            u = u if scaling is None else masked(u, g, scaling)
            params[name] = p - LR * (u + WD * p)
    return as_tensors(params)


def base(**options):
    return fo.adamw(LR, BETAS, EPS, WD, **options)


# Cautious. ------------------------------------------------------------------------------------------------------------

WHOLE = {
    "optimizer": lambda scaling: fo.cautious(base(), scaling),
    "direction": lambda scaling: fo.chain(
        fo.cautious(fo.scale_by_adam(BETAS, EPS), scaling),
        fo.add_decayed_weights(WD),
        fo.scale_by_learning_rate(LR),
    ),
    "chain": lambda scaling: fo.cautious(fo.chain(fo.scale(1.0), base(mask={"w": True, "b": True})), scaling),
    "partition": lambda scaling: fo.cautious(fo.partition({"a": base(), "b": base()}, {"w": "a", "b": "b"}), scaling),
}


@pytest.mark.parametrize("scaling", ["mean", "count"])
@pytest.mark.parametrize("kind", WHOLE)
def test_the_direction_is_masked_and_decay_is_not(kind, scaling):
    params, history = make()
    expected = adamw(params, history, scaling)
    assert_close(pure(WHOLE[kind](scaling), params, history), expected)
    assert_close(stateful(WHOLE[kind](scaling), params, history), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(adamw(params, history)["w"], expected["w"], rtol=1e-3)


WD_OF_RULES = {  # they decay in the rule of the direction
    "stable_adamw": lambda wd: fo.stable_adamw(LR, weight_decay=wd),
    "adamp": lambda wd: fo.adamp(LR, weight_decay=wd, delta=10.0),
    "sgdp": lambda wd: fo.sgdp(LR, 0.9, weight_decay=wd),
    "prodigy": lambda wd: fo.prodigy(d0=0.1, weight_decay=wd),
    "dadapt_adam": lambda wd: fo.dadapt_adam(d0=0.1, weight_decay=wd, decoupled_weight_decay=True),
    "madgrad": lambda wd: fo.madgrad(LR, weight_decay=wd, decoupled_weight_decay=True),
    "adafactor": lambda wd: fo.adafactor(LR, weight_decay=wd),
}


@pytest.mark.parametrize("scaling", ["mean", "count"])
@pytest.mark.parametrize("tx", WD_OF_RULES.values(), ids=WD_OF_RULES)
def test_decay_in_the_rule_of_the_direction_is_not_masked(tx, scaling):
    params, history = make()
    params, history = as_tensors(params), list(map(as_tensors, history))
    whole, bare, cautious = tx(WD), tx(0.0), fo.cautious(tx(WD), scaling)
    states = [one.init(params) for one in (whole, bare, cautious)]
    wrong = False
    for grads in history:  # at the same place, so that states are the same
        updates = []
        for k, one in enumerate((whole, bare, cautious)):
            made, states[k] = one.update(grads, states[k], params)
            updates.append({name: u.numpy() for name, u in made.items()})
        for name, g in grads.items():
            decay = updates[0][name] - updates[1][name]
            expected = -masked(-updates[1][name], g.numpy(), scaling) + decay
            np.testing.assert_allclose(updates[2][name], expected, rtol=1e-11, atol=1e-13)
            assert np.abs(decay).max() > 1e-4
            wrong |= not np.allclose(updates[2][name], -masked(-updates[0][name], g.numpy(), scaling))
    assert wrong


def test_the_step_of_a_proximal_decay_is_masked():
    """Where all elements are kept, nothing changes."""
    p, g = {"w": torch.tensor([10.0, 10.0])}, {"w": torch.tensor([1.0, -1.0])}
    objective = {"value": 1.0}
    for tx, extras in ((fo.adan(0.1, weight_decay=0.5), {}), (fo.momo(weight_decay=0.5), objective)):
        plain, cautious = [fo.step(one, g, one.init(p), p, **extras)[0] for one in (tx, fo.cautious(tx))]
        torch.testing.assert_close(cautious, plain)


@pytest.mark.parametrize("weight_decay", [0.0, WD])
def test_the_direction_of_lamb_is_masked_before_decay_and_trust_ratio(weight_decay):
    params, history = make()
    parts = fo.chain(
        fo.cautious(fo.scale_by_adam(BETAS, EPS)),
        fo.add_decayed_weights(weight_decay),
        fo.scale_by_trust_ratio(),
        fo.scale_by_learning_rate(LR),
    )
    whole = fo.cautious(fo.lamb(LR, BETAS, EPS, weight_decay))
    assert_close(pure(whole, params, history), pure(parts, params, history))


def sine():
    return fo.stateless(lambda updates, params: fo.tree.map(torch.sin, updates))


PASSES = {  # directions that are more than one pass over the leaves
    "a function of the whole tree": lambda: [fo.scale_by_adam(BETAS, EPS), sine()],
    "one at the beginning": lambda: [sine(), fo.scale_by_adam(BETAS, EPS)],
    "two": lambda: [sine(), fo.scale_by_adam(BETAS, EPS), sine()],
    "a norm of the whole tree": lambda: [fo.trace(0.9), fo.clip_by_global_norm(0.5), fo.scale_by_adam(BETAS, EPS)],
    "a rule that needs its tensor whole": lambda: [fo.trace(0.9), fo.centralize(), fo.scale(2.0)],
}


@pytest.mark.parametrize("around", [lambda tx: tx, fo.schedule_free], ids=["alone", "inside of a wrapper"])
@pytest.mark.parametrize("direction", PASSES.values(), ids=PASSES)
def test_directions_of_several_passes_are_masked_by_what_they_were_given(direction, around):
    params, history = make()
    first, last = [fo.clip(1.5)], [fo.add_decayed_weights(WD), fo.scale_by_learning_rate(LR)]
    tx = around(fo.chain(*first, fo.cautious(fo.chain(*direction())), *last))

    def by_hand(updates, params, states=None):
        """The links, one after the other."""
        states = [link.init(params) for link in links] if states is None else states
        given = {}
        for k, link in enumerate(links):
            given[k] = updates
            updates, states[k] = link.update(updates, states[k], params)
            if k == len(first) + len(direction()) - 1:
                pairs = {name: (u.numpy(), given[len(first)][name].numpy()) for name, u in updates.items()}
                updates = {name: torch.from_numpy(masked(u, g, "mean")) for name, (u, g) in pairs.items()}
        return updates, states

    links = [*first, *direction(), *last]
    manual = around(fo.GradientTransformation(lambda p: None, lambda g, s, p: by_hand(g, p, s)))
    assert_close(pure(tx, params, history), pure(manual, params, history), rtol=1e-11, atol=1e-12)
    assert_close(stateful(tx, params, history), pure(manual, params, history), rtol=1e-6, atol=1e-7)


def test_complex_parameters_that_decay_in_their_rule():
    """Real and imaginary parts are as two parameters, but for the mean of the mask."""
    drawn = [torch.randn(2, 3, 2, dtype=torch.float64) for _ in range(4)]
    tx = fo.cautious(fo.madgrad(LR, weight_decay=WD, decoupled_weight_decay=True))
    results = []
    for view in (lambda x: x, torch.view_as_complex):
        params, *history = map(view, drawn)
        state = tx.init(params)
        for grads in history:
            params, state = fo.step(tx, grads, state, params)
        results.append(torch.view_as_real(params) if params.is_complex() else params)
    torch.testing.assert_close(*results)


def test_a_factory_and_ascent():
    params, history = make()
    numbers = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WD}
    found = stateful(fo.cautious(fo.adamw), params, history, **numbers)
    assert_close(found, adamw(params, history, "mean"), rtol=1e-6, atol=1e-7)
    assert_close(pure(fo.cautious(base(maximize=True)), params, history), adamw(params, history, "mean", sign=-1.0))


def test_with_accumulation_inside_and_outside_the_mean_counts():
    params, history = make()
    means = [{name: (g[name] + h[name]) / 2 for name in g} for g, h in zip(history[::2], history[1::2], strict=True)]
    expected = adamw(params, means, "mean")
    for tx in (fo.cautious(fo.accumulate(base(), 2)), fo.accumulate(fo.cautious(base()), 2)):
        assert_close(pure(tx, params, history), expected)
        assert_close(stateful(tx, params, history), expected, rtol=1e-6, atol=1e-7)


def test_inside_of_schedule_free():
    params, history = make(1)
    found = pure(fo.schedule_free(fo.cautious(base())), params, history)
    assert_close(found, adamw(params, history, "mean"))  # the first step


def test_signs_and_not_products_are_compared():
    params = torch.zeros(2)
    tx = fo.cautious(fo.scale(1e-30))
    found, _ = tx.update(torch.full((2,), 1e-20), tx.init(params), params)
    assert found.all() == (torch.full((2,), 1e-20) * 1e-30).all()
    tx = fo.cautious(fo.scale(1e-10))
    found, _ = tx.update(torch.full((2,), 1e-30), tx.init(params), params)
    assert found.all()


ADAMP = fo.adamp(0.1, weight_decay=1e-9)
WAYS = {  # where a change of sign may stand, and the way of the steps
    "descent": (fo.adam(0.1), -1),
    "ascent": (fo.adam(0.1, maximize=True), 1),
    "ascent behind a link": (fo.chain(fo.clip(10.0), fo.adam(0.1, maximize=True)), 1),
    "ascent behind a keeper": (fo.inject_hyperparams(fo.adam)(0.1, maximize=True), 1),
    "ascent behind a gate": (fo.apply_if_finite(fo.adam(0.1, maximize=True)), 1),
    "ascent behind a function of the whole tree": (fo.monitor(fo.adam(0.1, maximize=True)), 1),
    "ascent, with decay in the rule": (fo.adamp(0.1, weight_decay=1e-9, maximize=True), 1),
    "a factor of -1": (fo.chain(fo.scale(-1.0), ADAMP), 1),
    "two of them": (fo.chain(fo.scale(-1.0), fo.scale(-1.0), ADAMP), -1),
    "a factor for the learning rate": (fo.chain(fo.trace(0.9), fo.scale(-0.1)), -1),
    "both": (fo.chain(fo.clip(1.0), fo.maximize(), fo.trace(0.9), fo.scale(-0.1)), 1),
    "a state before a rule that could decay": (fo.chain(fo.trace(0.9), fo.adamp(0.1)), -1),
}


@pytest.mark.parametrize(("tx", "way"), WAYS.values(), ids=WAYS)
def test_all_that_moves_goes_its_way_and_something_does_not_move(tx, way):
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(12, 3, generator=generator)
    tx = fo.cautious(tx)
    state, moved = tx.init(params), 0
    for _ in range(6):
        g = torch.randn(12, 3, generator=generator)
        updates, state = tx.update(g, state, params)
        moves = updates.abs() > 1e-6
        assert (updates * g * way > 0)[moves].all()
        moved += int(moves.sum())
    assert 0.5 < moved / (6 * params.numel()) < 0.9


def test_decay_in_a_rule_behind_a_state_is_an_error():
    with pytest.raises(
        ValueError, match=r"that of adamp is in its rule, behind trace: write chain\(..., cautious\(adamp"
    ):
        fo.cautious(fo.chain(fo.trace(0.9), fo.adamp(0.1, weight_decay=0.1)))


def test_a_direction_without_parameters_needs_none():
    tx, g = fo.cautious(fo.trace(0.9)), torch.tensor([1.0, -2.0])
    assert torch.equal(tx.update(g, tx.init(g))[0], g)


def test_one_that_descends_by_other_means_says_so():
    params = torch.zeros(2)
    trace, slope = fo.chain(fo.trace(0.9), fo.scale(lambda step: -0.1)), torch.tensor([1.0, 2.0])
    for tx, moves in ((fo.cautious(trace, descends=True), True), (fo.cautious(trace), False)):
        found, _ = fo.step(tx, slope, tx.init(params), params)
        assert bool((found < 0).all()) == moves


def test_scaling_is_one_of_two():
    with pytest.raises(ValueError, match="Invalid scaling: 'sum'; choose 'mean' or 'count'"):
        fo.cautious(base(), "sum")


# MARS. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "beta1"), [(0.025, 0.95), (0.5, 0.8)])
@pytest.mark.parametrize("size", [1.0, 0.1])
def test_mars_is_the_formula_of_its_paper(gamma, beta1, size):
    params, history = make()
    history = [{name: size * g for name, g in grads.items()} for grads in history]
    last = {name: np.zeros_like(p) for name, p in params.items()}

    def change(name, g):
        c = g + gamma * beta1 / (1 - beta1) * (g - last[name])
        last[name] = g
        return c / max(1, np.linalg.norm(c))

    expected = adamw(params, history, change=change)
    tx = fo.mars(base(), gamma, beta1)
    assert_close(pure(tx, params, history), expected)
    assert_close(stateful(tx, params, history), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(adamw(params, history)["w"], expected["w"], rtol=1e-3)


def test_mars_is_that_of_pytorch_optimizer():
    peers = pytest.importorskip("pytorch_optimizer")
    params, history = make()
    own = [torch.nn.Parameter(p) for p in as_tensors(params).values()]
    peer = peers.MARS(own, lr=LR, betas=BETAS, gamma=0.025, weight_decay=WD, eps=1e-30, optimize_1d=True)
    for grads in history:
        for p, g in zip(own, as_tensors(grads).values(), strict=True):
            p.grad = g
        peer.step()
    found = pure(fo.mars(fo.adamw(LR, BETAS, 1e-30, WD), beta1=BETAS[0]), params, history)
    assert_close(list(found.values()), [p.detach() for p in own], rtol=1e-10, atol=1e-10)


def test_numbers_of_mars_are_in_range():
    with pytest.raises(ValueError, match="Invalid beta1 value: 1.0; it needs 0 <= value < 1"):
        fo.mars(base(), beta1=1.0)
    with pytest.raises(ValueError, match="Invalid gamma value: -1; it needs value >= 0"):
        fo.mars(base(), -1)


# Projections. ---------------------------------------------------------------------------------------------------------


def in_ball(params):
    return fo.projections.l2_ball(params, 0.5)


def test_steps_end_where_the_projection_is():
    params, history = make()
    found, state = as_tensors(params), fo.sgd(0.3, 0.9).init(as_tensors(params))
    for grads in history:
        updates, state = fo.sgd(0.3, 0.9).update(as_tensors(grads), state, found)
        found = in_ball(fo.apply_updates(found, updates))
    tx = fo.project(fo.sgd(0.3, 0.9), in_ball)
    assert_close(pure(tx, params, history), found)
    assert_close(stateful(tx, params, history), found)
    assert_close(stateful(fo.project(fo.sgd, in_ball), params, history, lr=0.3, momentum=0.9), found)
    assert_close(fo.tree.norm(found), torch.tensor(0.5, dtype=torch.float64))


def test_what_has_no_gradient_stays_and_is_seen():
    params = {"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}  # of norm 5
    tx = fo.project(fo.sgd(1.0), lambda params: fo.projections.l2_ball(params, 1.0))
    found, _ = fo.step(tx, {"w": torch.zeros(1), "b": None}, tx.init(params), params)
    assert_close(found, {"w": torch.tensor([0.6]), "b": torch.tensor([4.0])}, rtol=1e-6, atol=0)


def test_a_projection_returns_a_tree_like_the_parameters():
    params = {"w": torch.ones(2)}
    grads = {"w": torch.ones(2)}

    def project(projection):
        tx = fo.project(fo.sgd(1.0), projection)
        return fo.step(tx, grads, tx.init(params), params)

    with pytest.raises(ValueError, match=r"the projection have shape \(\).* at 'w'"):
        project(lambda params: {"w": params["w"].sum()})
    with pytest.raises(TypeError, match="the projection have a float at 'w', not a tensor"):
        project(lambda params: {"w": 0.0})
    with pytest.raises(ValueError, match="the projection"):
        project(lambda params: params["w"])
    with pytest.raises(TypeError, match="project needs a function of the tree of parameters, got a float"):
        fo.project(fo.sgd(1.0), 1.0)
    tx = fo.project(fo.sgd(1.0), fo.projections.nonnegative)
    with pytest.raises(ValueError, match="project needs the parameters, but update was called without them"):
        tx.update(grads, tx.init(params))
