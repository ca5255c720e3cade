"""Sparse gradients in the functional form: a rule is run on the entries that there are."""

import pytest
import torch

import functorch_optim as fo

pytestmark = pytest.mark.smoke


def sparse(entries, shape=(5, 2)):
    values = torch.randn(len(entries), *shape[1:], dtype=torch.float64)
    return torch.sparse_coo_tensor([entries], values, shape)


def train(tx, params, history):
    state = tx.init(params)
    for grads in history:
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
    return params, state


# What does nothing where the gradient is zero does the same on sparse gradients and on dense ones.
SAME = [
    fo.sgd(0.1),
    fo.sgd(0.1, momentum=0.9, nesterov=True),
    fo.sgd(fo.schedules.cosine(0.1, 5), momentum=0.9, dampening=0.5, maximize=True),
    fo.adagrad(0.1, initial_accumulator_value=0.1),
    fo.chain(fo.clip_by_global_norm(0.5), fo.adagrad(0.1)),
    fo.chain(fo.clip(0.1), fo.zero_nans(), fo.scale(2.0), fo.identity(), fo.sgd(0.1)),
    fo.chain(fo.scale_by_rss(), fo.masked(fo.trace(0.5), {"embedding": True, "bias": False}), fo.scale(-0.1)),
]


@pytest.mark.parametrize("tx", SAME, ids=repr)
def test_equals_dense_gradients(tx):
    params = {"embedding": torch.randn(5, 2, dtype=torch.float64), "bias": torch.randn(2, dtype=torch.float64)}
    # None, one entry, several, and one that comes twice.
    history = [
        {"embedding": sparse(some), "bias": torch.ones_like(params["bias"])} for some in ([], [1], [4, 0], [2, 2])
    ]
    dense = [{"embedding": grads["embedding"].to_dense(), "bias": grads["bias"]} for grads in history]
    left, right = train(tx, params, history), train(tx, params, dense)
    for a, b in zip(fo.tree.flatten(left)[0], fo.tree.flatten(right)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_updates_are_sparse_where_the_rules_are_and_nothing_is_modified():
    params, grad = torch.randn(5, 2, dtype=torch.float64), sparse([3, 3, 1])
    for tx, is_sparse in ((fo.adagrad(0.1), True), (fo.sgd(0.1), True), (fo.sgd(0.1, momentum=0.9), False)):
        state = tx.init(params)
        before = [leaf.clone() for leaf in fo.tree.flatten((params, state, grad.to_dense()))[0]]
        updates, _ = tx.update(grad, state, params)
        assert updates.is_sparse == is_sparse
        after = fo.tree.flatten((params, state, grad.to_dense()))[0]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not fo.apply_updates(params, grad).is_sparse


def test_sparse_adam_equals_a_dense_adam_of_the_rows_alone():
    """Rows 1 and 3 are touched at every step: they go as if they were all there is."""
    params = torch.randn(5, 2, dtype=torch.float64)
    grads = [sparse([1, 3]) for _ in range(4)]
    moved, state = train(fo.sparse_adam(0.1), params, grads)
    rows, own = train(fo.sparse_adam(0.1), params[[1, 3]], [grad.coalesce().values() for grad in grads])
    torch.testing.assert_close(moved[[1, 3]], rows, rtol=1e-14, atol=0)
    torch.testing.assert_close(fo.tree.get(state, "exp_avg")[[1, 3]], fo.tree.get(own, "exp_avg"), rtol=1e-14, atol=0)
    assert torch.equal(moved[[0, 2, 4]], params[[0, 2, 4]])


def test_half_precision_too():
    params = torch.randn(5, 2).bfloat16()
    grad = sparse([1, 3]).bfloat16()
    moved, state = train(fo.sparse_adam(0.1), params, [grad, grad])
    assert moved.dtype == fo.tree.get(state, "exp_avg").dtype == torch.bfloat16


def test_a_rule_of_ones_own():
    def update(g, state, p, s):
        return torch.sign(g), state

    grad = sparse([1, 3])
    signs = fo.leafwise(None, update, elementwise=True, sparse="touched")
    assert torch.equal(signs.update(grad, signs.init(grad.to_dense()))[0].to_dense(), grad.to_dense().sign())
    refuses = fo.leafwise(None, update, elementwise=True)
    message = "does not support sparse gradients, but that of '' has layout torch.sparse_coo; give update.to_dense()"
    with pytest.raises(RuntimeError, match=message):
        refuses.update(grad, refuses.init(grad.to_dense()))
    with pytest.raises(ValueError, match="Invalid sparse: 'touched'; give 'touched', for an elementwise rule only"):
        fo.leafwise(None, update, sparse="touched")
    with pytest.raises(ValueError, match="Invalid sparse: 'yes'"):
        fo.leafwise(None, update, elementwise=True, sparse="yes")


@pytest.mark.parametrize("tx", [fo.adam(), fo.adagrad(weight_decay=0.1), fo.clip_by_norm(1.0), fo.rprop()], ids=repr)
def test_what_cannot_take_them_refuses(tx):
    params = torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        tx.update(sparse([1]), tx.init(params), params)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_other_layouts_are_refused():
    params = torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="layout torch.sparse_csr"):
        fo.sgd(0.1).update(torch.eye(5, 2, dtype=torch.float64).to_sparse_csr(), fo.sgd(0.1).init(params))
