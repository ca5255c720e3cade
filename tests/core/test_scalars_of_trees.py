"""Scalars that are shown the tensors of the whole tree."""

from typing import Any, NamedTuple

import torch

import functorch_optim as fo


class Kept(NamedTuple):
    """A state."""

    total: Any


def seeing(log):
    """Make a rule whose scalars are shown all there is."""

    def scalars(step, *, updates, params, states):
        log.append((updates, params, states))
        return 2.0

    def update(g, state, p, factor):
        return factor * g, Kept(state.total + g)

    return fo.leafwise(Kept, update, scalars, elementwise=True, needs_params=True)


def test_scalars_are_shown_updates_params_and_states_in_one_order():
    log = []
    tx = fo.masked(seeing(log), {"a": True, "b": False, "c": True, "d": True})
    params = {name: torch.full((2,), float(i)) for i, name in enumerate("abcd")}
    grads = {**params, "d": None}
    updates, state = tx.update(grads, tx.init(params), params)
    _, state = tx.update(grads, state, params)
    seen, weights, states = log[-1]
    assert [float(u[0]) for u in seen] == [0.0, 2.0]
    assert [float(p[0]) for p in weights] == [0.0, 2.0]
    assert [float(total[0]) for total in states.total] == [0.0, 2.0]
    assert type(states) is Kept
    assert float(updates["c"][0]) == 4.0


def test_scalars_inside_of_a_wrapper_are_shown_its_parameters():
    log = []
    tx, params = fo.schedule_free(fo.chain(seeing(log), fo.scale(-1.0))), torch.zeros(1)
    state = tx.init(params)
    for _ in range(2):
        params, state = fo.step(tx, torch.ones(1), state, params)
    assert torch.equal(log[-1][1][0], torch.tensor([-2.0]))  # the iterate of the wrapped transformation
