"""lbfgs inside of fo.Optimizer, of masks and of partitions: what it is given there."""

import copy

import pytest
import torch
from lbfgs_problems import DOUBLE, WOLFE, Theirs, deviation, leaves_of, make, rosenbrock

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


def make_params():
    return {"a": torch.randn(3, **DOUBLE), "b": torch.randn((), **DOUBLE)}


def total(params):
    values = params.values() if isinstance(params, dict) else params
    return rosenbrock({"x": torch.cat([value.reshape(-1) for value in values])}, 5.0)


class Wrapped:
    """fo.Optimizer around it, as a factory or a transformation; parameters named or not."""

    def __init__(self, params, named, as_factory, **options):
        self.params = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
        self.seen = set()
        entries = self.params.items() if named else self.params.values()
        if as_factory:
            self.optimizer = fo.Optimizer(entries, fo.lbfgs, **options)
        else:
            self.optimizer = fo.Optimizer(entries, fo.lbfgs(**options))

    def loss(self, params):
        self.seen.add(type(params))
        return total(params)

    def closure(self):
        self.optimizer.zero_grad()
        loss = total(self.params)
        loss.backward()
        return loss

    def step(self):
        return self.optimizer.step(self.closure, value_fn=self.loss)


forms = pytest.mark.parametrize(("named", "as_factory"), [(True, True), (True, False), (False, True), (False, False)])


@forms
@pytest.mark.parametrize("options", [{"lr": 0.02, "max_iter": 5}, {"lr": 0.5, "max_iter": 4, **WOLFE}])
def test_equals_torch(named, as_factory, options):
    params = make_params()
    ours, theirs = Wrapped(params, named, as_factory, **options), Theirs(total, params, **options)
    for _ in range(3):
        expected = total(ours.params)
        assert ours.step() == expected
        theirs.step()
        assert deviation(ours, theirs) < 1e-11
    assert ours.seen == {dict if named else list}
    [state] = ours.optimizer.state["transformation"].values()
    assert (int(state.n_iter), int(state.func_evals)) == (theirs.state["n_iter"], theirs.state["func_evals"])
    assert not any(leaf.requires_grad for leaf in leaves_of(state))  # nor the graph of the closure's loss


@forms
def test_without_a_closure_the_gradients_are_those_at_hand(named, as_factory):
    params = make_params()
    ours, others = [Wrapped(params, named, as_factory, lr=0.02, max_iter=5) for _ in range(2)]
    ours.step()
    others.closure()
    others.optimizer.step(value_fn=others.loss)
    assert deviation(ours, others) == 0
    others.optimizer.zero_grad()
    others.optimizer.step(value_fn=others.loss)  # no gradient, no step
    assert deviation(ours, others) == 0
    others.closure()
    with pytest.raises(TypeError, match="lbfgs needs the extra 'value_fn'"):
        others.optimizer.step()


@pytest.mark.parametrize("make_copy", ["deepcopy", "state_dict"])
def test_goes_on_after_copies_and_schedulers(make_copy):
    ours = Wrapped(make_params(), True, True, lr=0.02, max_iter=1)
    scheduler = torch.optim.lr_scheduler.StepLR(ours.optimizer, 1, gamma=0.5)
    ours.step()
    scheduler.step()
    if make_copy == "deepcopy":
        twin = copy.deepcopy(ours)
    else:
        twin = Wrapped(ours.params, True, True)
        twin.optimizer.load_state_dict(through_a_file(ours.optimizer.state_dict()))
    assert twin.optimizer.param_groups[0]["lr"] == 0.01
    before = {name: p.detach().clone() for name, p in ours.params.items()}
    twin.step()
    assert all(torch.equal(p, before[name]) for name, p in ours.params.items())
    ours.step()
    assert deviation(ours, twin) == 0
    assert all(not torch.equal(p, before[name]) for name, p in ours.params.items())


def trained(tx, params, loss, updates=3):
    state = tx.init(params)
    for _ in range(updates):
        grads = torch.func.grad(total)(params)
        changes, state = tx.update(grads, state, params, value_fn=loss)
        params = fo.apply_updates(params, changes)
    return params, state


@pytest.mark.parametrize("options", [{"lr": 0.02, "max_iter": 5}, {"max_iter": 4, **WOLFE}])
def test_masked_parameters_are_not_in_the_tree_of_value_fn(options):
    """The loss must know them itself. They are as good as fixed then; a gradient of None says that more simply."""
    params = make_params()

    def loss(given):
        assert isinstance(given["b"], fo.MaskedNode)
        return total({**given, "b": params["b"]})

    mask = {"a": True, "b": False}
    masked = fo.chain(fo.masked(fo.lbfgs(**options), mask), fo.freeze({"a": False, "b": True}))
    result, state = trained(masked, params, loss)
    theirs = Theirs(lambda given: total({**given, "b": params["b"]}), {"a": params["a"]}, **options)
    for _ in range(3):
        theirs.step()
    torch.testing.assert_close(result["a"], theirs.params["a"].detach(), rtol=1e-9, atol=1e-9)
    assert torch.equal(result["b"], params["b"])
    assert state[0].d.shape == (3,)

    labels = {"a": "moves", "b": "stays"}
    split = fo.partition({"moves": fo.lbfgs(**options), "stays": fo.scale(0.0)}, labels)
    assert torch.equal(trained(split, params, loss)[0]["a"], result["a"])


def test_a_loss_that_wants_masked_parameters_fails_where_it_uses_them():
    params = make(rosenbrock)
    params = {"x": params["x"], "y": params["x"]}
    tx = fo.masked(fo.lbfgs(), {"x": True, "y": False})
    with pytest.raises((TypeError, AttributeError), match="MaskedNode"):
        tx.update(params, tx.init(params), params, value_fn=lambda p: (p["x"] * p["y"].sum()).sum())
