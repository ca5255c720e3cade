"""Functional states as plain containers: by path in the state, and by parameter."""

import optree
import pytest
import torch
from catalogue import CATALOGUE, assert_close, make_params, rows, train

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


@pytest.mark.sampled
@rows
@pytest.mark.parametrize("by", ["path", "index"])
def test_there_and_back_by_parameter(row, by):
    tx, params, x = row(), make_params(), torch.ones(3, dtype=torch.float64)
    params, state = train(tx, params, x, steps=3)
    saved = through_a_file(fo.state_dict(state, params, by=by))
    loaded = fo.load_state_dict(tx.init(params), saved, params, by=by)
    assert_close(loaded, state, rtol=0, atol=0)
    assert_close(train(tx, params, x, state=loaded), train(tx, params, x, state=state), rtol=0, atol=0)


def test_the_state_of_a_parameter_has_torchs_names():
    params = {"b": torch.ones(2), "a": [torch.ones(3, 2)]}
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.1, momentum=0.9), fo.nadam(), fo.trace(0.5))
    state = tx.update(params, tx.init(params), params)[1]
    by_path, by_index = fo.state_dict(state, params), fo.state_dict(state, params, by="index")
    names = {"step", "mu_product", "momentum_buffer", "momentum_buffer.1", "exp_avg", "exp_avg_sq"}
    assert {key: set(value) for key, value in by_path["state"].items()} == {"a.0": names, "b": names}
    # Parameters are numbered as dicts were filled, as model.named_parameters() does; paths are sorted.
    assert list(by_index["state"]) == [0, 1]
    assert by_path["state"]["b"]["exp_avg"] is state[2][1].exp_avg["b"]
    assert torch.equal(by_index["state"][0]["exp_avg"], state[2][1].exp_avg["b"])
    shared = "0.step 1.0.step 1.1.step 1.2.step 2.0.step 2.1.step 2.1.mu_product 2.2.step 3.step"
    assert list(by_path["transformation"]) == shared.split()


def test_masked_parameters_have_no_state():
    params = {"a": torch.ones(2), "b": torch.ones(3), "c": None}
    tx = fo.masked(fo.trace(0.9), {"a": True, "b": False, "c": True})
    saved = fo.state_dict(tx.init(params), params)
    assert {key: set(value) for key, value in saved["state"].items()} == {"a": {"step", "momentum_buffer"}}


def test_functions_of_the_whole_tree_are_saved_apart():
    row = next(row for row in CATALOGUE if row.name == "tree_transformation")
    params = {"a": torch.ones(2)}
    saved = fo.state_dict(row().init(params), params)
    assert set(saved["transformation"]) == {"0.a", "1.step"}


@pytest.mark.parametrize(
    ("tx", "name", "lr", "options"),
    [
        (fo.adam(0.1, amsgrad=True), "Adam", 0.1, {"amsgrad": True}),
        (fo.nadam(0.1), "NAdam", 0.1, {}),
        (fo.sgd(0.1, 0.9), "SGD", 0.1, {"momentum": 0.9}),
        (fo.asgd(0.1), "ASGD", 0.1, {}),
        (fo.rprop(0.1), "Rprop", 0.1, {}),
    ],
)
def test_a_functional_state_goes_into_torchs_optimizers_and_back(tx, name, lr, options):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).double()
    params = {path: p.detach().clone() for path, p in model.named_parameters()}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(fo.tree.map(torch.randn_like, params), state, params)
        params = fo.apply_updates(params, updates)
    saved, before = fo.state_dict(state, params, by="index"), fo.tree.map(torch.clone, state)
    grads = fo.tree.map(torch.randn_like, params)
    updates, _ = tx.update(grads, state, params)
    moved = fo.apply_updates(params, updates)
    for module in (torch.optim, fo.optim):
        for foreach in (False, True):
            for path, p in model.named_parameters():
                p.data, p.grad = params[path].clone(), grads[path]
            optimizer = getattr(module, name)(model.parameters(), lr=lr, foreach=foreach, **options)
            through = saved if foreach else through_a_file(saved)
            optimizer.load_state_dict({**through, "param_groups": optimizer.state_dict()["param_groups"]})
            if name != "SGD":  # which keeps no step
                again = fo.load_state_dict(tx.init(params), optimizer.state_dict(), params, by="index")
                assert_close(again, state, rtol=0, atol=0)
            optimizer.step()
            assert_close({path: p.detach() for path, p in model.named_parameters()}, moved)
            assert_close(state, before, rtol=0, atol=0)  # torch.optim modifies what it has loaded
            saved = fo.state_dict(state, params, by="index")


def test_errors():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    tx = fo.adam(0.1)
    state = tx.init(params)
    saved = fo.state_dict(state, params)
    with pytest.raises(ValueError, match="Invalid by: 'name'; choose 'path' or 'index'"):
        fo.state_dict(state, params, by="name")
    with pytest.raises(ValueError, match=r"1\.exp_avg in the state and params do not match.*'c' is missing"):
        fo.state_dict(state, {**params, "c": torch.ones(1)})
    with pytest.raises(ValueError, match="saved state has the parameter 'a'; those here are 0, 1"):
        fo.load_state_dict(state, saved, params, by="index")
    with pytest.raises(ValueError, match=r"the state has '1\.exp_avg\.b', which the saved one lacks"):
        fo.load_state_dict(state, {**saved, "state": {"a": saved["state"]["a"]}}, params)
    with pytest.raises(ValueError, match=r"'1\.exp_avg\.a' has shape \(3,\), but the state's has \(2,\)"):
        fo.load_state_dict(state, {**saved, "state": {"a": saved["state"]["b"], "b": saved["state"]["b"]}}, params)

    optimizer = torch.optim.Adam([p.clone() for p in params.values()])
    for step in range(2):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = torch.ones_like(p) if step >= i else None
        optimizer.step()
    with pytest.raises(ValueError, match=r"differ in step: 0: 2\.0, 1: 1\.0.*from_torch"):
        fo.load_state_dict(state, optimizer.state_dict(), params, by="index")


def test_steps_that_belong_to_nobody_must_agree():
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    tx = fo.partition({"x": fo.sgd(0.1), "y": fo.sgd(0.2)}, {"a": "x", "b": "y"})
    state = tx.init(params)
    assert fo.state_dict(state, params)["state"]["a"]["step"] == 0
    other = tx.update(params, state, params)[1]
    with pytest.raises(ValueError, match="Rules that keep nothing but their step are at different ones"):
        fo.state_dict({"x": state["x"], "y": other["y"]}, params)


def test_paths_that_collide_are_refused_before_anything_is_lost():
    params = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    state = fo.trace(0.9).init(params)
    with pytest.raises(ValueError, match="Two parameters have the path 'a.b'; rename the keys with dots, or"):
        fo.state_dict(state, params)
    assert len(fo.state_dict(state, params, by="index")["state"]) == 2


def test_states_that_vmap_has_batched():
    params = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    for tx in (fo.sgd(0.1), fo.adam(0.1)):
        state = torch.vmap(tx.init)(params)
        loaded = fo.load_state_dict(state, fo.state_dict(state, params), params)
        assert_close(loaded, state, rtol=0, atol=0)


def test_dataclasses_are_trees():
    @optree.dataclasses.dataclass(namespace="functorch_optim")
    class Layer:
        weight: torch.Tensor
        bias: torch.Tensor

    params = {"b": Layer(torch.ones(2), torch.ones(1)), "a": torch.ones(3)}
    state = fo.trace(0.9).init(params)
    saved = fo.state_dict(state, params, by="index")
    assert [own["momentum_buffer"].numel() for own in saved["state"].values()] == [2, 1, 3]
    assert_close(fo.load_state_dict(state, saved, params, by="index"), state, rtol=0, atol=0)


def test_numbers_carried_on_have_the_names_that_each_parameter_gives_them():
    """The second NAdam is the first for a parameter that a mask hides from the other."""
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    tx = fo.chain(fo.masked(fo.scale_by_nadam(), {"a": True, "b": False}), fo.scale_by_nadam(momentum_decay=0.1))
    state = tx.update(params, tx.init(params), params)[1]
    saved = fo.state_dict(state, params)["state"]
    assert saved["a"]["mu_product"] is state[0].mu_product
    assert saved["a"]["mu_product.1"] is saved["b"]["mu_product"] is state[1].mu_product
    optimizer = fo.Optimizer(params.items(), tx)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({**fo.state_dict(state, params, by="index"), "param_groups": groups})
    loaded = fo.load_state_dict(tx.init(params), optimizer.state_dict(), params, by="index")
    assert_close(loaded, state, rtol=0, atol=0)


def test_rules_that_are_for_no_parameter():
    """A label that no parameter has: optimizers save nothing of its rules."""
    tx = fo.partition({"matrix": fo.sgd(0.1, momentum=0.9), "vector": fo.nadam(0.1)}, "matrix")
    params = {"w": torch.ones(2, 2)}
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer, state = fo.Optimizer([("w", p)], tx), tx.init(params)
    for _ in range(3):
        p.grad = torch.ones(2, 2)
        optimizer.step()
        params, state = fo.step(tx, {"w": torch.ones(2, 2)}, state, params)
    loaded = fo.load_state_dict(tx.init(params), optimizer.state_dict(), params, by="index")
    grads = {"w": torch.ones(2, 2)}
    assert_close(fo.step(tx, grads, loaded, params)[0], fo.step(tx, grads, state, params)[0])
