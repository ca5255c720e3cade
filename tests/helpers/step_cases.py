"""Parameters, gradients and ways of running steps, and what is compared."""

import pytest
import torch
from catalogue import loss

import functorch_optim as fo

WAYS = {
    "best": {},
    "blocks": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ways = pytest.mark.parametrize("way", WAYS)


def clone(tree):
    return fo.tree.map(torch.clone, tree)


def extras_of(tx, params):
    """Make the extras that some transformation declares."""
    extras = {"value": lambda: loss(params, 1.0), "value_fn": lambda: lambda params: loss(params, 1.0)}
    declared = {name for link in tx._links for name in link.rule.extras.names}
    return {name: extras[name]() for name in declared & extras.keys()}


def by_update(tx, grads, state, params, **extras):
    updates, state = tx.update(grads, state, params, **extras)
    return fo.apply_updates(params, updates), state


def histories(params, steps, missing=()):
    """Draw gradients, some of which are missing."""
    for k in range(steps):
        grads = fo.tree.map(torch.randn_like, params)
        if k in missing:
            grads["layer"]["bias"] = grads["rest"][0] = None
        yield grads


def run(step, tx, params, history):
    params = clone(params)
    state = tx.init(params)
    for grads in history:
        params, state = step(tx, clone(grads), state, params, **extras_of(tx, params))
    return params, state


def tensors(*trees):
    return [leaf for leaf in fo.tree.flatten(list(trees))[0] if isinstance(leaf, torch.Tensor)]


def snapshot(*trees):
    return [(leaf, leaf.clone(), leaf._version) for leaf in tensors(*trees)]


def assert_untouched(before):
    for leaf, value, version in before:
        assert leaf._version == version
        assert torch.equal(leaf, value)


def not_vectors(params):
    return fo.tree.map(lambda p: p.ndim != 1, params)


def negated(updates, params):
    return fo.tree.map(torch.neg, updates)
