"""Steps within `torch.inference_mode()` between others, as with torch.optim."""

from contextlib import nullcontext

import pytest
import torch
from torch_like_cases import NAMES, assert_same, give_gradients, make_pair, parameters

import functorch_optim as fo

WRAPPED = {
    "sgd": lambda params: fo.Optimizer(params, fo.sgd, lr=0.1),
    "adamw": lambda params: fo.Optimizer(params, fo.adamw, lr=0.1),
    "clipped": lambda params: fo.Optimizer(params, fo.chain(fo.clip_by_global_norm(0.1), fo.adam(0.1))),
    "lookahead": lambda params: fo.Optimizer(params, fo.lookahead(fo.adam(0.1), 2)),
    "monitored": lambda params: fo.Optimizer(params, fo.monitor(fo.adam(0.1))),
    "soap": lambda params: fo.Optimizer(params, fo.soap(0.1)),
}


def train(optimizers, within, missing=()):
    """Train on the same gradients, at some steps within inference mode, at some without that of the last parameter."""
    for step, inside in enumerate(within):
        give_gradients(*optimizers)
        for optimizer in optimizers:
            if step in missing:
                parameters(optimizer)[-1].grad = None
            with torch.inference_mode() if inside else nullcontext():
                optimizer.step()


@pytest.mark.parametrize("missing", [(), (1,)])
@pytest.mark.parametrize("name", NAMES)
def test_steps_within(name, missing):
    pair = make_pair(name)
    train(pair, [False, True, False, True, True, False], missing)
    assert_same(*pair)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("missing", [(), (1,)])
def test_it_changes_no_number(name, missing):
    trained = []
    for within in ([True, False, True, False], [False] * 4):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(2)]
        train([WRAPPED[name](params)], within, missing)
        trained.append(params)
    torch.testing.assert_close(*trained, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_made_within_lasts(name):
    """Where torch.optim cannot go on outside."""
    ours, theirs = make_pair(name)
    give_gradients(ours, theirs)
    theirs.step()
    with torch.inference_mode():
        ours.step()
    train([ours, theirs], [False, False])
    assert_same(ours, theirs)


def test_a_state_that_is_loaded_within_lasts():
    ours, theirs = make_pair("Adam")
    train([ours, theirs], [False])
    with torch.inference_mode():
        ours.load_state_dict(ours.state_dict())
    train([ours, theirs], [False, False])
    assert_same(ours, theirs)


def test_parameters_that_are_made_within():
    with torch.inference_mode():
        pair = make_pair("Adam", [torch.ones(3), torch.ones(2)])
    train(pair, [True, True, True])
    assert_same(*pair)


def step_of_class(params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    fo.optim.Adam(params).step()


def step_in_place(params, grads):
    tx = fo.adam(0.1)
    fo.step_(tx, grads, tx.init(params), params)


@pytest.mark.parametrize("step", [step_of_class, step_in_place])
def test_nothing_is_written_outside_where_a_parameter_was_made_within(step):
    with torch.inference_mode():
        within = torch.ones(2)
    params = [torch.ones(2), within]
    with pytest.raises(RuntimeError, match="The parameter '1' was made in inference mode, and can only be written to"):
        step(params, [torch.ones(2), torch.ones(2)])
    assert torch.equal(params[0], torch.ones(2))
