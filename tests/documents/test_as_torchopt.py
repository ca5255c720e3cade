"""The file that runs programs written for TorchOpt gives their numbers."""

import importlib
import pathlib

import pytest
import torch

import functorch_optim as fo

SCRIPTS = pathlib.Path(__file__).parents[2] / "docs" / "scripts"


@pytest.fixture
def as_torchopt(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("as_torchopt")


def data():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(3, 2, generator=generator), torch.zeros(2)]
    return params, torch.randn(4, 3, generator=generator)


def program(torchopt, make, inplace, steps=5):
    """Train as programs of TorchOpt do: gradients in a tuple, parameters in a list."""
    params, x = data()
    for p in params:
        p.requires_grad_()
    optimizer = make(torchopt)
    state = optimizer.init(params)
    for _ in range(steps):
        grads = torch.autograd.grad(((x @ params[0] + params[1] - 1) ** 2).mean(), params)
        updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
        new = torchopt.apply_updates(tuple(params), updates, inplace=inplace)
        assert all((p is q) == inplace for p, q in zip(new, params, strict=True))
        params = list(new) if inplace else [p.detach().requires_grad_() for p in new]
    return [p.detach() for p in params]


MAKERS = {
    "adamw": (lambda torchopt: torchopt.adamw(0.1, weight_decay=0.2), fo.adamw(0.1, weight_decay=0.2)),
    "sgd": (lambda torchopt: torchopt.sgd(0.1, momentum=0.9), fo.sgd(0.1, momentum=0.9)),
    "chain": (
        lambda torchopt: torchopt.chain(torchopt.sgd(0.5), torchopt.sgd(0.1)),
        fo.chain(fo.sgd(0.5), fo.sgd(0.1)),
    ),
}
each = pytest.mark.parametrize(("make", "tx"), MAKERS.values(), ids=MAKERS)
in_place_or_not = pytest.mark.parametrize("inplace", [True, False])


@each
@in_place_or_not
def test_a_program_has_the_numbers_of_functional_steps(as_torchopt, make, tx, inplace):
    found = program(as_torchopt, make, inplace)
    params, x = data()
    state = tx.init(params)
    for _ in range(5):
        grads = torch.func.grad(lambda params: ((x @ params[0] + params[1] - 1) ** 2).mean())(params)
        params, state = fo.step(tx, grads, state, params)
    torch.testing.assert_close(found, params)
    assert not torch.equal(found[0], program(as_torchopt, make, inplace, steps=4)[0])


@each
@in_place_or_not
def test_a_program_has_the_numbers_of_torchopt(as_torchopt, make, tx, inplace):
    torchopt = pytest.importorskip("torchopt")
    found, expected = [program(module, make, inplace) for module in (as_torchopt, torchopt)]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each
def test_a_program_may_go_on_with_the_state_that_it_gave(as_torchopt, make, tx):
    params, x = data()
    optimizer = make(as_torchopt)
    state, others, new = optimizer.init(params), params, tx.init(params)
    for _ in range(3):
        grads = torch.func.grad(lambda params: ((x @ params[0] + params[1] - 1) ** 2).mean())
        updates, _ = optimizer.update(grads(params), state, params=params)
        others, new = fo.step(tx, grads(others), new, others)
        as_torchopt.apply_updates(params, updates)
    torch.testing.assert_close(params, others)


def test_what_is_not_here_is_an_error(as_torchopt):
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        as_torchopt.nonsense(0.1)
