"""Uses of unrolled training: many tasks, learned hyperparameters, loops around it."""

import gc

import pytest
import torch
import torch._dynamo.testing
from catalogue import CATALOGUE, assert_close, loss, make_params
from memory import Alive, peak_bytes
from unrolling import BATCHES, by_hand

import functorch_optim as fo

# Transforms. ----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=4)
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    "row",
    [row for row in CATALOGUE if row.name in ("adam_amsgrad", "chain", "muon", "lbfgs")],
    ids=lambda row: row.name,
)
def test_tasks_from_one_initialization(row, checkpoint):
    tasks = torch.randn(5, 4, 3, dtype=torch.float64)

    def adapted(params, task):
        return loss(fo.meta.unroll(loss, row(), params, task, checkpoint=checkpoint).params, 1.0)

    def vmapped(params):
        return torch.vmap(adapted, in_dims=(None, 0))(params, tasks).sum()

    def looped(params):
        return sum(loss(by_hand(row(), params, task).params, 1.0) for task in tasks)

    params = make_params()
    assert_close(torch.func.grad(vmapped)(params), torch.func.grad(looped)(params), rtol=1e-8, atol=1e-9)


@pytest.mark.sampled(pool="compiled")
def test_compiles_whole_and_once():
    counter = torch._dynamo.testing.CompileCounter()

    def meta_loss(params, lr, tasks):
        def adapted(params, task):
            return loss(fo.meta.unroll(loss, fo.adam(lr), params, task).params, 1.0)

        return torch.vmap(adapted, in_dims=(None, 0))(params, tasks).sum()

    meta_grad = torch.func.grad(meta_loss, argnums=(0, 1))
    compiled = torch.compile(meta_grad, backend=counter, fullgraph=True)
    for scale in (1.0, 0.5, 2.0):
        params = fo.tree.map(lambda p, scale=scale: p * scale, make_params())
        del params["layer"]["none"]
        given = (params, torch.tensor(0.1 * scale, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64))
        assert_close(compiled(*given), meta_grad(*given))
    assert counter.frame_count == 1


# Learned hyperparameters. ---------------------------------------------------------------------------------------------


def differences(outer, argument):
    """Differentiate along a random direction, by differences and by the gradient."""
    gradient = torch.func.grad(outer)(argument)
    direction = fo.tree.map(torch.randn_like, argument)
    up, down = [outer(fo.tree.map(lambda a, d: a + by * d, argument, direction)) for by in (1e-6, -1e-6)]
    pairs = zip(fo.tree.flatten(gradient)[0], fo.tree.flatten(direction)[0], strict=True)
    return sum((g * d).sum() for g, d in pairs), (up - down) / 2e-6


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["per step", "per parameter", "per element", "per parameter and step", "meta-sgd"])
def test_learned_learning_rates(kind, checkpoint):
    params = make_params()
    rates = {
        "per step": torch.rand(4, dtype=torch.float64),
        "per parameter": fo.tree.map(lambda p: torch.rand((), dtype=torch.float64), params),
        "per element": fo.tree.map(torch.rand_like, params),
        "per parameter and step": fo.tree.map(lambda p: torch.rand(4, dtype=torch.float64), params),
        "meta-sgd": fo.tree.map(lambda p: torch.rand((4, *p.shape), dtype=torch.float64), params),
    }[kind]

    def outer(rates):
        if kind == "per step":
            lr = fo.schedules.table(rates)
        else:
            lr = fo.tree.map(fo.schedules.table, rates) if kind in ("per parameter and step", "meta-sgd") else rates
        return loss(
            fo.meta.unroll(loss, fo.sgd(lr, momentum=0.9), params, 0.1 * BATCHES, checkpoint=checkpoint).params, 1.0
        )

    small_rates = fo.tree.map(lambda r: 0.05 * (1 + r), rates)
    torch.testing.assert_close(*differences(outer, small_rates), rtol=1e-6, atol=1e-8)


def test_a_schedule_is_learned():
    """Gradient descent on a learning rate for each step beats the best constant one."""
    target = torch.tensor([1.0, 5.0], dtype=torch.float64)

    def quadratic(w, _):
        return (target * w.square()).sum() / 2

    def outer(rates):
        return quadratic(
            fo.meta.unroll(quadratic, fo.sgd(fo.schedules.table(rates)), torch.ones(2).double(), range(2)).params, 0
        )

    constants = torch.linspace(0, 0.6, 601, dtype=torch.float64)
    best = torch.vmap(lambda lr: outer(lr.expand(2)))(constants).min()
    rates = torch.full((2,), 0.2, dtype=torch.float64)
    tx = fo.adam(0.02)
    rates = fo.meta.unroll(lambda rates, _: outer(rates), tx, rates, range(200)).params
    assert outer(rates) < 0.02 * best


# Memory, and loops around. --------------------------------------------------------------------------------------------


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize("way", ["backward", "torch.func.grad"])
def test_memory_grows_like_the_square_root_of_the_steps(way):
    weights = torch.randn(2000, dtype=torch.float64)

    def inner(params, x):
        return (torch.tanh(params["w"] * x) - weights).square().mean()

    def outer(lr, steps, checkpoint):
        params = {"w": torch.ones(2000, dtype=torch.float64)}
        batches = torch.linspace(1, 2, steps, dtype=torch.float64)
        return inner(fo.meta.unroll(inner, fo.adam(lr), params, batches, checkpoint=checkpoint).params, 1.0)

    def peak(steps, checkpoint):
        lr, found = torch.tensor(0.01, dtype=torch.float64), []

        def run():
            if way == "backward":
                leaf = lr.clone().requires_grad_()
                outer(leaf, steps, checkpoint).backward()
                found.append(leaf.grad)
            else:
                found.append(torch.func.grad(outer)(lr, steps, checkpoint))

        return peak_bytes(run), found[0]

    few, many = 16, 144
    (plain_few, _), (plain_many, expected) = peak(few, False), peak(many, False)
    (root_few, _), (root_many, found) = peak(few, True), peak(many, True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert plain_many > 0.9 * many / few * plain_few
    assert root_many < 1.1 * (many / few) ** 0.5 * root_few
    assert root_many < plain_many / 6


def fitted(params, x):
    return (params["w"] * x - 1).square().sum()


def test_memory_is_flat_over_many_outer_steps():
    """Parameters and state are carried from one outer step to the next, which learns a learning rate."""
    lr = torch.tensor(0.01, requires_grad=True)
    optimizer = torch.optim.SGD([lr], lr=1e-6)
    params, state, counts = {"w": torch.ones(3)}, None, []
    gc.collect()
    gc.disable()  # what is only freed in rounds counts as kept
    try:
        with Alive() as alive:
            for _ in range(60):
                params, state, losses = fo.meta.unroll(fitted, fo.adam(lr), params, torch.rand(2, 3), state)
                params, state = fo.stop_gradient((params, state))
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
                counts.append(len(alive))
    finally:
        gc.enable()
    assert counts[59] == counts[10]


def test_the_count_sees_a_graph_that_grows():
    params, state, counts = {"w": torch.ones(3, requires_grad=True)}, None, []
    with Alive() as alive:
        for _ in range(20):
            params, state, _ = fo.meta.unroll(fitted, fo.adam(0.1), params, torch.rand(2, 3), state)
            counts.append(len(alive))
    assert counts[19] > counts[10] + 100


@pytest.mark.parametrize("detached", [True, False])
def test_the_state_is_carried_between_outer_steps(detached):
    """Two calls in a row are one, when nothing is detached; when the state is, it is a constant to the second."""

    def twice(params, batches):
        first = fo.meta.unroll(loss, fo.adam(0.1), params, batches[:2])
        state = fo.stop_gradient(first.state) if detached else first.state
        return loss(fo.meta.unroll(loss, fo.adam(0.1), first.params, batches[2:], state).params, 1.0)

    def once(params, batches):
        return loss(fo.meta.unroll(loss, fo.adam(0.1), params, batches).params, 1.0)

    params = make_params()
    assert_close(twice(params, BATCHES), once(params, BATCHES))
    grads = [torch.func.grad(f)(params, BATCHES) for f in (twice, once)]
    if detached:
        with pytest.raises(AssertionError):
            assert_close(*grads)
    else:
        assert_close(*grads)


def test_stop_gradient():
    w = torch.ones(2, requires_grad=True)
    tree = {"w": 2 * w, "none": None, "name": "w", "state": fo.adam().init({"w": 3 * w}), "list": [w, (w,)]}
    cut = fo.stop_gradient(tree)
    assert_close(fo.tree.flatten(cut["state"])[0], fo.tree.flatten(tree["state"])[0])
    assert (cut["none"], cut["name"]) == (None, "w")
    leaves = fo.tree.flatten(cut)[0]
    assert not any(leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor))
    assert cut["w"].data_ptr() == tree["w"].data_ptr()
    _, tangent = torch.func.jvp(lambda x: fo.stop_gradient({"x": x})["x"] * x, (w.detach(),), (w.detach(),))
    assert torch.equal(tangent, torch.ones(2))
    assert torch.equal(torch.func.grad(lambda x: (fo.stop_gradient([x])[0] * x).sum())(w.detach()), torch.ones(2))


def test_windows_of_one_step_give_a_multi_step_loss():
    """A validation loss after each step: unroll in pieces."""

    def by_pieces(params):
        state, total = fo.adam(0.1).init(params), 0
        for batch in BATCHES:
            params, state, _ = fo.meta.unroll(loss, fo.adam(0.1), params, [batch], state)
            total = total + loss(params, 1.0)
        return total

    def all_at_once(params):
        return sum(loss(by_hand(fo.adam(0.1), params, BATCHES[: n + 1]).params, 1.0) for n in range(4))

    params = make_params()
    assert_close(torch.func.grad(by_pieces)(params), torch.func.grad(all_at_once)(params))
