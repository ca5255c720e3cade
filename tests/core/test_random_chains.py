"""Random chains on random trees with random histories: the lift against a plain interpreter, and against torch."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import LINKS, not_scalars, trees

import functorch_optim as fo
from functorch_optim._core import prepare
from functorch_optim._core.links import nest
from functorch_optim.testing import assert_same, gradients, histories
from functorch_optim.testing.strategies import SCALES

CHAINS = st.recursive(LINKS, lambda links: st.lists(links, max_size=4).map(lambda some: fo.chain(*some)), max_leaves=8)


def one_by_one(tx, updates, states, params):
    """Run the links of a chain each by itself, and each tensor by tensor."""
    states = list(states)
    with mock.patch.object(prepare, "is_plain", return_value=False):
        for k, link in enumerate(tx._links):
            alone = fo.GradientTransformation._of([link], 0)
            updates, states[k] = alone.update(updates, states[k], params)
    return updates, states


@given(st.data())
def test_a_chain_equals_its_links_one_by_one(data):
    tx = data.draw(CHAINS)
    params = data.draw(trees())
    state = tx.init(params)
    states = [fo.GradientTransformation._of([link], 0).init(params) for link in tx._links]
    for grads in data.draw(histories(params, data.draw(st.integers(1, 3)))):
        expected, states = one_by_one(tx, grads, states, params)
        updates, state = tx.update(grads, state, params)
        assert_same(updates, expected, "the updates", scale=max(SCALES))
        # By path: links that are run one by one do not share their steps.
        assert_same(fo.state_dict(state), fo.state_dict(nest(tx._layout, states)), "the state", scale=max(SCALES))
        params = fo.apply_updates(params, updates)


WRAPPERS = st.sampled_from(
    [
        lambda tx: fo.accumulate(tx, 2),
        lambda tx: fo.skip(tx, lambda step: step % 2 == 1),
        fo.apply_if_finite,
        fo.cautious,
        lambda tx: fo.lookahead(tx, every=2),
        lambda tx: fo.ema_weights(tx, 0.9),
        lambda tx: fo.masked(tx, not_scalars),
    ]
)
WHOLE = st.sampled_from([fo.centralize(), fo.clip_by_norm(0.5), fo.clip_by_block_rms(0.5), fo.mars(fo.identity())])
NESTED = st.recursive(
    LINKS | WHOLE,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(lambda some: fo.chain(*some))
        | st.builds(lambda wrap, tx: wrap(tx), WRAPPERS, inner)
    ),
    max_leaves=4,
)


def as_rules(tx, grads, state, params):
    """Run every rule tensor by tensor."""
    with mock.patch.object(prepare, "is_plain", return_value=False):
        return fo.step(tx, grads, state, params)


def updated(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


@given(st.data())
def test_all_forms_of_nested_wrappers_are_the_rules(data):
    tx = data.draw(NESTED)
    params = data.draw(trees(dtypes=[torch.float64], max_leaves=3))
    history = data.draw(histories(params, 4))
    results = []
    for take in (as_rules, updated, fo.step, fo.step_):
        own, state = fo.tree.map(torch.clone, params), tx.init(params)
        for grads in history:
            own, state = take(tx, grads, state, own)
        results.append((own, fo.state_dict(state)))
    for found in results[1:]:
        assert_same(found, results[0], "what is trained", 1e-10, max(SCALES))


rates = st.floats(0, 0.999)
common = {
    "lr": st.floats(0, 1),
    "weight_decay": st.just(0.0) | st.floats(0, 1),
    "maximize": st.booleans(),
}
betas = st.tuples(rates, rates)
eps = st.floats(1e-10, 1)
SAME = {
    "sgd": (fo.sgd, torch.optim.SGD, {"momentum": rates, "dampening": rates}),
    "nesterov": (fo.sgd, torch.optim.SGD, {"momentum": st.floats(0.1, 0.999), "nesterov": st.just(True)}),
    "adam": (fo.adam, torch.optim.Adam, {"betas": betas, "eps": eps, "amsgrad": st.booleans()}),
    "adamw": (fo.adamw, torch.optim.AdamW, {"betas": betas, "eps": eps, "amsgrad": st.booleans()}),
    "adadelta": (fo.adadelta, torch.optim.Adadelta, {"rho": st.floats(0, 1), "eps": eps}),
}


@pytest.mark.parametrize("name", SAME)
@given(data=st.data())
def test_random_hyperparameters_equal_torch(name, data):
    factory, torch_class, drawn = SAME[name]
    options = data.draw(st.fixed_dictionaries({**common, **drawn}))
    params = data.draw(trees(max_leaves=3))
    params = fo.tree.map(torch.Tensor.double, params)
    leaves, structure = fo.tree.flatten(params)
    if not leaves:
        return
    torch_params = [leaf.clone().requires_grad_() for leaf in leaves]
    optimizer = torch_class(torch_params, **options)
    tx = factory(**options)
    state = tx.init(params)
    for _ in range(data.draw(st.integers(1, 6))):
        size = 10.0 ** data.draw(st.integers(-4, 4))
        grads = fo.tree.map(lambda p: size * p, data.draw(gradients(params)))
        for param, grad in zip(torch_params, fo.tree.flatten(grads)[0], strict=True):
            param.grad = grad.clone()
        optimizer.step()
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        for ours, theirs in zip(fo.tree.flatten(params)[0], torch_params, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-12 * max(1.0, size))
    assert fo.tree.flatten(params)[1] == structure
