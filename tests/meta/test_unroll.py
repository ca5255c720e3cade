"""Training as a function: its values and derivatives are those of the loop that anyone would write."""

from typing import NamedTuple

import pytest
import torch
from catalogue import assert_close, loss, make_params, rows, train
from unrolling import BATCHES, by_hand

import functorch_optim as fo


def tensors(row):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in row.hyperparameters.items()}


def small(tx):
    """Take small steps, so that rows without a learning rate do not run off."""
    return fo.chain(tx, fo.scale(0.1))


# Values and derivatives. ----------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=8)
@rows
def test_is_the_loop(row):
    params = make_params()
    expected = by_hand(row(), params, BATCHES)
    for checkpoint in (False, True, 3):
        unrolled = fo.meta.unroll(loss, row(), params, BATCHES, checkpoint=checkpoint)
        assert_close(unrolled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(size=4)
@rows
def test_derivatives_are_those_of_the_loop(row):
    """With respect to parameters, batches, the state, and all hyperparameters, which the transformation closes over."""
    params = make_params()
    state = by_hand(small(row()), params, BATCHES[:2]).state

    def outer(run, arguments):
        params, batches, state, numbers = arguments
        trained = run(small(row(**numbers)), params, batches, state)
        leaves = fo.tree.flatten(trained.state)[0]
        total = loss(trained.params, 1.0) + trained.losses.square().sum()
        return total + sum(leaf.sin().sum() for leaf in leaves if leaf.is_floating_point())

    def unrolled(tx, params, batches, state):
        return fo.meta.unroll(loss, tx, params, batches, state)

    def checkpointed(tx, params, batches, state):
        return fo.meta.unroll(loss, tx, params, batches, state, checkpoint=2)

    leaves, structure = fo.tree.flatten((params, BATCHES[:3], state, tensors(row)))
    moving = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point() and leaf.isfinite().all()]

    def of_floats(run):
        def function(*some):
            given = list(leaves)
            for i, tensor in zip(moving, some, strict=True):
                given[i] = tensor
            return outer(run, fo.tree.unflatten(structure, given))

        return function

    primals = [leaves[i] for i in moving]
    directions = tuple([torch.randn_like(primal) for primal in primals])
    expected, *found = [
        (
            torch.func.grad(of_floats(run), argnums=tuple(range(len(moving))))(*primals),
            torch.func.jvp(of_floats(run), tuple(primals), directions)[1],
        )
        for run in (by_hand, unrolled, checkpointed)
    ]
    for derivatives in found:
        assert_close(derivatives, expected, rtol=1e-9, atol=1e-11)


def test_the_comparison_sees_a_cut():
    def outer(run, params):
        return loss(run(fo.adam(0.1), params, BATCHES).params, 1.0)

    def cut(tx, params, batches):
        return fo.meta.unroll(loss, tx, params, batches, truncate=3)

    params = make_params()
    with pytest.raises(AssertionError):
        assert_close(*[torch.func.grad(lambda p, run=run: outer(run, p))(params) for run in (by_hand, cut)])


@pytest.mark.parametrize("checkpoint", [False, True])
def test_by_autograd(checkpoint):
    params, lr = make_params(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params = fo.tree.map(lambda p: p.requires_grad_(), params)
    trained = fo.meta.unroll(loss, fo.adamw(lr), params, BATCHES, checkpoint=checkpoint)
    loss(trained.params, 1.0).backward()

    def outer(params, lr):
        return loss(by_hand(fo.adamw(lr), params, BATCHES).params, 1.0)

    constants = fo.stop_gradient(params)
    expected = torch.func.grad(outer, argnums=(0, 1))(constants, lr.detach())
    grads = fo.tree.map(lambda p: torch.zeros_like(p) if p.grad is None else p.grad, params)
    assert_close((grads, lr.grad), expected)


# Options. -------------------------------------------------------------------------------------------------------------


def first_order_by_hand(tx, params, batches):
    state = tx.init(params)
    for batch in batches:
        constant = torch.func.grad(loss)(fo.stop_gradient(params), batch)
        updates, state = tx.update(constant, state, params)
        params = fo.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("checkpoint", [False, True])
def test_first_order(checkpoint):
    def outer(params, lr, run):
        return loss(run(fo.adamw(lr, weight_decay=0.1), params, BATCHES), 1.0)

    def unrolled(tx, params, batches, first_order=True):
        return fo.meta.unroll(loss, tx, params, batches, first_order=first_order, checkpoint=checkpoint).params

    arguments = (make_params(), torch.tensor(0.1, dtype=torch.float64))
    grad = torch.func.grad(outer, argnums=(0, 1))
    assert_close(grad(*arguments, unrolled), grad(*arguments, first_order_by_hand))
    with pytest.raises(AssertionError):
        assert_close(grad(*arguments, lambda *given: unrolled(*given, False)), grad(*arguments, first_order_by_hand))
    # Of SGD, it is the gradient at the trained parameters.
    params = make_params()
    first = torch.func.grad(lambda p: loss(unrolled(fo.sgd(0.1), p, BATCHES), 1.0))(params)
    assert_close(first, torch.func.grad(loss)(unrolled(fo.sgd(0.1), params, BATCHES), 1.0))


def test_losses_have_their_own_derivative_in_first_order_mode():
    params = make_params()
    grad = torch.func.grad(lambda p: fo.meta.unroll(loss, fo.sgd(0.1), p, BATCHES[:1], first_order=True).losses.sum())
    assert_close(grad(params), torch.func.grad(loss)(params, BATCHES[0]))


def test_what_reaches_the_steps_by_gradients_alone_is_no_part_of_the_first_order():
    """Here the strength of an augmentation; the losses themselves have their derivative."""

    start = make_params()

    def outer(strength, first_order):
        def augmented(params, batch):
            return loss(params, batch * strength)

        trained = fo.meta.unroll(augmented, fo.sgd(0.1), start, BATCHES, first_order=first_order)
        return loss(trained.params, 1.0), trained.losses.sum()

    def derivative(output, first_order):
        strength = torch.tensor(1.5, dtype=torch.float64)
        return float(torch.func.grad(lambda s: outer(s, first_order)[output])(strength))

    def constants(strength):
        """Add up the losses of parameters that are constant."""
        params, total = start, 0
        for batch in BATCHES:
            total = total + loss(fo.stop_gradient(params), batch * strength)
            params = fo.meta.unroll(loss, fo.sgd(0.1), params, [1.5 * batch]).params
        return total

    assert derivative(0, first_order=True) == 0
    assert abs(derivative(0, first_order=False)) > 1e-3
    expected = float(torch.func.grad(constants)(torch.tensor(1.5, dtype=torch.float64)))
    assert derivative(1, first_order=True) == pytest.approx(expected, rel=1e-12)
    assert derivative(1, first_order=False) != pytest.approx(expected, rel=1e-3)


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("checkpoint", [False, 1, 3, True])
@pytest.mark.parametrize("truncate", [1, 2, 3, 4, 9])
def test_truncate(truncate, checkpoint):
    batches = torch.cat([BATCHES, BATCHES])

    def windows(params, lr):
        state = fo.adam(lr).init(params)
        total = 0
        for first in range(0, len(batches), truncate):
            params, state = fo.stop_gradient((params, state)) if first else (params, state)
            params, state, losses = by_hand(fo.adam(lr), params, batches[first : first + truncate], state)
            total = total + losses.sum()
        return total, loss(params, 1.0)

    def unrolled(params, lr):
        trained = fo.meta.unroll(loss, fo.adam(lr), params, batches, truncate=truncate, checkpoint=checkpoint)
        return trained.losses.sum(), loss(trained.params, 1.0)

    params, lr = make_params(), torch.tensor(0.1, dtype=torch.float64)
    for output in (0, 1):
        expected, found = [
            torch.func.grad(lambda p, lr, f=f: f(p, lr)[output], argnums=(0, 1))(params, lr)
            for f in (windows, unrolled)
        ]
        assert_close(found, expected)
        if output == 1 and truncate < len(batches):
            assert all((leaf == 0).all() for leaf in fo.tree.flatten(found[0])[0])


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda batches: batches, lambda batches: (batch for batch in batches)]
)
def test_batches_may_be_anything_that_can_be_iterated(kind):
    params = make_params()
    assert_close(fo.meta.unroll(loss, fo.adam(), params, kind(BATCHES)), by_hand(fo.adam(), params, BATCHES))


def test_batches_of_trees_and_numbers():
    def regression(w, batch):
        x, y = batch
        return (w * x - y).square().mean()

    w, ys = torch.ones(3, dtype=torch.float64), 2 * BATCHES
    for checkpoint in (False, True):
        pairs = fo.meta.unroll(regression, fo.sgd(0.1), w, zip(BATCHES, ys, strict=True), checkpoint=checkpoint)
        single = fo.meta.unroll(lambda w, t: regression(w, (BATCHES[t], ys[t])), fo.sgd(0.1), w, range(4))
        assert_close(pairs, single)


def test_no_batches():
    params = make_params()
    for checkpoint in (False, True):
        trained = fo.meta.unroll(loss, fo.adam(), params, [], checkpoint=checkpoint)
        assert trained.params is params
        assert (trained.losses.shape, trained.losses.dtype) == ((0,), torch.float64)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_else_the_loss_function_returns(checkpoint):
    """Here, running statistics that do not come into the loss, and something that is no tensor."""

    def with_aux(params, batch):
        return loss(params, batch), {"mean": params["rest"][0] * batch, "name": "mean"}

    def outer(params, run):
        trained, aux = run(params)
        return loss(trained.params, 1.0) + sum(entry["mean"].sin().sum() for entry in aux)

    def unrolled(params):
        return fo.meta.unroll(with_aux, fo.adam(0.1), params, BATCHES, has_aux=True, checkpoint=checkpoint)

    def looped(params):
        state, aux = fo.adam(0.1).init(params), []
        for batch in BATCHES:
            aux.append(with_aux(params, batch)[1])
            params, state = train(fo.adam(0.1), params, batch, steps=1, state=state)
        return fo.meta.Unrolled(params, state, None), aux

    params = make_params()
    assert [entry["name"] for entry in unrolled(params)[1]] == ["mean"] * 4
    assert_close(*[torch.func.grad(outer)(params, run) for run in (unrolled, looped)])


def test_missing_parameters_stay_missing():
    params = {"w": torch.ones(2), "none": None, "part": fo.MaskedNode()}
    trained = fo.meta.unroll(lambda p, x: (p["w"] * x).sum(), fo.adam(0.1), params, torch.ones(2), checkpoint=True)
    assert trained.params["none"] is None
    assert trained.params["part"] == fo.MaskedNode()
    torch.testing.assert_close(trained.params["w"], torch.full((2,), 0.8))


def test_extras_that_the_transformation_declares():
    given = []

    def scalars(step, *, value, value_fn):
        given.append((value, value_fn))
        return ()

    tx = fo.chain(fo.leafwise(None, lambda g, state, p, s: (g, state), scalars), fo.sgd(0.1))
    params = make_params()
    trained = fo.meta.unroll(loss, tx, params, BATCHES[:1])
    [(value, value_fn)] = given
    assert torch.equal(value, trained.losses[0])
    assert torch.equal(value_fn(params), value)


class Triple(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor


def used_up():
    batches = (batch for batch in BATCHES)
    fo.meta.unroll(loss, fo.sgd(0.1), make_params(), batches)
    return batches


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            TypeError,
            r"is not a GradientTransformation; call it: unroll\(loss_fn, sgd\(0.1\)",
            {"transformation": fo.sgd},
        ),
        (TypeError, r"needs batches, one for each step, got a dict; give a list", {"batches": {"x": BATCHES}}),
        (
            TypeError,
            r"tuple of tensors of shapes \(4, 3\), \(4,\), which looks like one batch. Give \[batch\] for one step",
            {"batches": (BATCHES, BATCHES[:, 0])},
        ),
        (TypeError, r"looks like one batch", {"batches": (BATCHES, BATCHES)}),
        (TypeError, r"looks like one batch", {"batches": (BATCHES, BATCHES, BATCHES.long())}),
        (TypeError, r"looks like one batch", {"batches": Triple(BATCHES, BATCHES, BATCHES)}),
        (
            ValueError,
            r"got a generator without batches: .* used up by its first use. Make it anew",
            {"batches": used_up()},
        ),
        (TypeError, r"got a int; give a list .* or range\(steps\)", {"batches": 5}),
        (TypeError, "Invalid truncate: 2.0 is a float; give an integer >= 1", {"truncate": 2.0}),
        (ValueError, "Invalid truncate: 0; it needs an integer >= 1", {"truncate": 0}),
        (ValueError, "Invalid checkpoint: 0; it needs an integer >= 1", {"checkpoint": 0}),
        (TypeError, "Invalid checkpoint: 'all' is a str; give an integer >= 1", {"checkpoint": "all"}),
        (TypeError, "The parameter at 'w' is a str, not a tensor", {"params": {"w": "x"}}),
        (ValueError, "belongs to another transformation", {"state": fo.adam().init(make_params())}),
    ],
)
def test_errors(error, message, arguments):
    given = {"transformation": fo.sgd(0.1), "params": make_params(), "batches": BATCHES, **arguments}
    with pytest.raises(error, match=message):
        fo.meta.unroll(loss, **given)
