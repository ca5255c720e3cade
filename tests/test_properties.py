"""Properties that hold of every transformation, tested of every row of the catalogue.

Those of derivatives and compilation are in test_derivatives.py, test_finite_derivatives.py and test_meta_transforms.py.
"""

import pytest
import torch
from catalogue import assert_close, hyperparameters, make_params, rows, step, train
from copies import through_a_file, through_pickle

import functorch_optim as fo
from functorch_optim import execution


def tree_by_tree(function, count, *trees):
    """Apply a function to each slice of batched trees and stack the results: what vmap should do."""
    results = [function(*[fo.tree.map(lambda leaf: leaf[i], tree) for tree in trees]) for i in range(count)]
    return fo.tree.map(lambda *leaves: torch.stack(leaves), *results)


@rows
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex128])
def test_is_pure_and_keeps_structure_shapes_and_dtypes(row, dtype, device):
    if dtype.is_complex and not row.complex:
        with pytest.raises(TypeError, match="does not support complex parameters"):
            row().init(make_params(dtype, device))
        return
    tx, params = row(), make_params(dtype, device)
    state = tx.init(params)
    for _ in range(3):
        grads = fo.tree.map(torch.randn_like, params)
        given = fo.tree.flatten((params, grads, state))[0]
        before = [(leaf.clone(), leaf._version) for leaf in given]
        updates, new_state = step(tx, grads, state, params)
        for leaf, (value, version) in zip(given, before, strict=True):
            assert leaf._version == version
            assert torch.equal(leaf, value)
        for old, new in ((grads, updates), (state, new_state)):
            old_leaves, old_structure = fo.tree.flatten(old)
            new_leaves, new_structure = fo.tree.flatten(new)
            assert old_structure == new_structure
            assert [(leaf.shape, leaf.dtype, leaf.device) for leaf in old_leaves] == [
                (leaf.shape, leaf.dtype, leaf.device) for leaf in new_leaves
            ]
        params, state = fo.apply_updates(params, updates), new_state


@rows
def test_state_is_made_of_tensors_in_plain_trees(row):
    state = row().init(make_params())
    assert all(isinstance(leaf, torch.Tensor) for leaf in fo.tree.flatten(state)[0])
    # torch.func sees trees through torch.utils._pytree: both must see the same tensors, and nothing else.
    leaves = torch.utils._pytree.tree_leaves(state)
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in fo.tree.flatten(state)[0]}


@rows
def test_ways_of_running_agree(row, device, monkeypatch):
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        params = make_params(dtype, device)
        history = [fo.tree.map(torch.randn_like, params) for _ in range(4)]
        calls = []

        def run(by_tensor, params=params, history=history, calls=calls):
            in_blocks = execution.in_blocks
            with monkeypatch.context() as patch:
                patch.setattr(execution, "in_blocks", lambda *args: calls.append(1) or in_blocks(*args))
                if by_tensor:
                    patch.setattr(execution, "can_batch", lambda *args: False)
                tx = row()
                state = tx.init(params)
                for grads in history:
                    updates, state = step(tx, grads, state, params)
            return updates, state

        reference = run(by_tensor=True)
        assert not calls
        assert_close(run(by_tensor=False), reference, rtol=tolerance, atol=tolerance)
        assert bool(calls) == row.elementwise


@rows
def test_missing_gradients_leave_parameter_and_state_alone(row):
    tx, params = row(), make_params()
    _, state = train(tx, params, torch.ones(3, dtype=torch.float64), steps=2)
    grads = fo.tree.map(torch.ones_like, params)
    grads["layer"]["bias"] = grads["rest"][0] = None
    updates, new_state = step(tx, grads, state, params)
    assert updates["layer"]["bias"] is None
    assert updates["rest"] == [None]
    old, new = fo.state_dict(state), fo.state_dict(new_state)
    missing = [path for path in old if path.endswith(("layer.bias", "rest.0"))]
    assert all(torch.equal(old[path], new[path]) for path in missing)
    moved = fo.apply_updates(params, updates)
    assert moved["rest"][0] is params["rest"][0]
    # With the gradient back, the others go on as if nothing had been.
    everything, _ = step(tx, fo.tree.map(torch.ones_like, params), new_state, params)
    assert everything["rest"][0] is not None


@rows
def test_pickles_prints_and_saves(row):
    tx, params, x = row(), make_params(), torch.ones(3, dtype=torch.float64)
    params, state = train(tx, params, x, steps=2)
    assert repr(tx).endswith(")")

    loaded = fo.load_state_dict(tx.init(params), through_a_file(fo.state_dict(state)))
    assert_close(loaded, state, rtol=0, atol=0)
    assert_close(through_pickle(state), state, rtol=0, atol=0)
    assert_close(train(tx, params, x, state=loaded), train(tx, params, x, state=state), rtol=0, atol=0)


@pytest.mark.parametrize(
    "tx",
    [
        fo.chain(
            fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10), mask={"layer": True, "rest": False})
        ),
        fo.partition({"a": fo.sgd(0.1), "b": fo.adadelta()}, {"layer": "a", "rest": "b"}),
        fo.named_chain(("clip", fo.clip(0.1)), ("lr", fo.scale(torch.tensor(2.0)))),
    ],
)
def test_transformation_pickles(tx):
    again = through_pickle(tx)
    assert repr(again) == repr(tx)
    params, x = make_params(), torch.ones(3, dtype=torch.float64)
    assert_close(train(again, params, x), train(tx, params, x), rtol=0, atol=0)


@hyperparameters
def test_numbers_tensors_and_schedules_are_the_same(row, name):
    params, x = make_params(), torch.ones(3, dtype=torch.float64)
    expected = train(row(), params, x)
    number = row.hyperparameters[name]
    kinds = [torch.tensor(number, dtype=torch.float64), lambda step: number + 0 * step]
    for kind in kinds if row.scheduled else kinds[:1]:
        # The state too: its structure does not depend on the kind of a hyperparameter.
        assert_close(train(row(**{name: kind}), params, x), expected, rtol=row.tolerance, atol=row.tolerance)


@hyperparameters
def test_schedules_are_asked_for_the_number_of_updates_done(row, name):
    if not row.scheduled:
        with pytest.raises(TypeError, match=f"Invalid {name}: .* is a function"):
            row(**{name: fo.schedules.constant(0.5)})
        return
    asked = []

    def schedule(step):
        asked.append(step.item())
        assert step.dtype == torch.float64
        return row.hyperparameters[name]

    train(row(**{name: schedule}), make_params(), torch.ones(3, dtype=torch.float64), steps=3)
    assert sorted(set(asked)) == ([0] if name in row.initial else [0, 1, 2])


@rows
def test_scalars_are_float64(row):
    tx = row(**{name: torch.tensor(value) for name, value in row.hyperparameters.items()})
    step = torch.tensor(2.0, dtype=torch.float64)
    for link in tx._links:
        scalars = getattr(link.rule, "scalars", None)
        if scalars is not None:
            extras = {"updates": [torch.ones(2)]} if link.rule.sees_tree else {}
            carried = [torch.tensor(0.5, dtype=torch.float64) for _ in link.rule.counters[1:]]
            arguments = [link.rule.carried_type(*carried)] if carried else []
            leaves = fo.tree.flatten(scalars(step, *arguments, **extras))[0]
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            assert all(leaf.dtype in (torch.float64, torch.bool) for leaf in tensors)


@rows
def test_vmap_over_parameters_equals_a_loop(row):
    tx, params, x = row(), make_params(batch=(3,)), torch.randn(3, 3, dtype=torch.float64)
    state = torch.vmap(tx.init)(params)
    trained = torch.vmap(lambda p, s, x: train(tx, p, x, state=s))(params, state, x)
    expected = tree_by_tree(lambda p, s, x: train(tx, p, x, state=s), 3, params, state, x)
    assert_close(trained, expected, rtol=row.tolerance, atol=row.tolerance)


@rows
def test_vmap_over_tasks_with_shared_parameters_equals_a_loop(row):
    tx, params, xs = row(), make_params(), torch.randn(3, 3, dtype=torch.float64)
    trained = torch.vmap(lambda p, x: train(tx, p, x), in_dims=(None, 0))(params, xs)
    expected = tree_by_tree(lambda x: train(tx, params, x), 3, xs)
    assert_close(trained, expected, rtol=row.tolerance, atol=row.tolerance)


@hyperparameters
def test_vmap_over_hyperparameters_equals_a_loop(row, name):
    params, x = make_params(), torch.ones(3, dtype=torch.float64)
    values = row.hyperparameters[name] * torch.tensor([0.9, 1.0, 1.01], dtype=torch.float64)

    def run(value):
        return train(row(**{name: value}), params, x)[0]

    assert_close(torch.vmap(run)(values), tree_by_tree(run, 3, values), rtol=row.tolerance, atol=row.tolerance)
