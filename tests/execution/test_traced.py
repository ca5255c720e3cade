"""Steps are traced by make_fx, and run on fake tensors, as those of torch.optim are."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import functorch_optim as fo


def loss(params):
    return (params["w"] - 1).square().sum() + params["b"].sin().sum()


TRANSFORMATIONS = {
    "sgd": lambda: fo.sgd(0.1, momentum=0.9),
    "adamw": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.warmup_cosine(0.1, 2, 10))),
    "nadam": lambda: fo.nadam(0.1),
    "adafactor": lambda: fo.adafactor(0.1),
    "accumulate": lambda: fo.accumulate(fo.adam(0.1), 2),
    "schedule_free": lambda: fo.schedule_free(fo.sgd(0.1)),
    "plateau": lambda: fo.chain(fo.sgd(0.1), fo.reduce_on_plateau(patience=0)),
    "lbfgs": lambda: fo.lbfgs(0.1, max_iter=2, history_size=2),
    "strong_wolfe": lambda: fo.lbfgs(0.1, max_iter=1, max_eval=2, history_size=2, line_search_fn="strong_wolfe"),
}


def start():
    return {"w": torch.linspace(-1, 1, 4, dtype=torch.float64).reshape(2, 2), "b": torch.ones(2, dtype=torch.float64)}


def stepper(tx):
    names = {name for link in tx._links for name in link.rule.extras.names}

    def step(state, params):
        grads, value = torch.func.grad_and_value(loss)(params)
        extras = {"value": value, "value_fn": loss}
        return fo.step(tx, grads, state, params, **{name: extras[name] for name in names & set(extras)})

    return step


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_make_fx(name):
    """One trace serves the first step and later ones."""
    tx = TRANSFORMATIONS[name]()
    step, params = stepper(tx), start()
    state = tx.init(params)
    leaves, structure = fo.tree.flatten((state, params))
    traced = make_fx(lambda *leaves: fo.tree.flatten(step(*fo.tree.unflatten(structure, leaves)))[0])(*leaves)
    for _ in range(3):
        found = traced(*fo.tree.flatten((state, params))[0])
        params, state = step(state, params)
        for left, right in zip(found, fo.tree.flatten((params, state))[0], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_fake_tensors(name):
    with FakeTensorMode():
        tx = TRANSFORMATIONS[name]()
        step, params = stepper(tx), start()
        state = tx.init(params)
        for _ in range(2):
            params, state = step(state, params)
    assert params["w"].shape == (2, 2)
    real = TRANSFORMATIONS[name]().init(start())
    assert [leaf.shape for leaf in tree_leaves(state)] == [leaf.shape for leaf in tree_leaves(real)]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "Adagrad", "RMSprop", "ASGD", "Adafactor"])
def test_classes_on_fake_tensors(name):
    with FakeTensorMode():
        model = torch.nn.Linear(2, 1)
        optimizer = getattr(fo.optim, name)(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.ones(3, 2)).sum().backward()
            optimizer.step()
    assert optimizer.state or name == "SGD"
