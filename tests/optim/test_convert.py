"""From live optimizers to the functional form, and back."""

import pytest
import torch
from torch_like_cases import awkward_params, cases, deviation, gradient, parameters

import functorch_optim as fo

pytestmark = pytest.mark.usefixtures("double")


def make(module, name, options, named=False, groups=1):
    """Make an optimizer; with several groups, each has a learning rate of its own."""
    torch.manual_seed(0)
    params = [p.clone().requires_grad_() for p in awkward_params(name, torch.float64)]
    entries = [(f"p{9 - i}", p) if named else p for i, p in enumerate(params)]  # named in another order than sorted
    if groups == 1:
        return getattr(module, name)(entries, **options)
    parts = [{"params": entries[:2]}, {"params": entries[2:], "lr": 0.03}]
    return getattr(module, name)(parts, **options)


def draw(steps, params, late=False):
    torch.manual_seed(1)
    return [
        [None if late and step < 2 * i else gradient(p, step, 1.0) for i, p in enumerate(params)]
        for step in range(steps)
    ]


def step_all(optimizer, history):
    for grads in history:
        for p, g in zip(parameters(optimizer), grads, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()


def update_all(tx, params, state, history, names):
    for grads in history:
        given = dict(zip(names, grads, strict=True)) if names else grads
        updates, state = tx.update(given, state, params)
        params = fo.apply_updates(params, updates)
    return params, state


@pytest.mark.sampled
@cases
@pytest.mark.parametrize(
    ("module", "named", "groups", "late"),
    [
        (torch.optim, False, 1, False),
        (torch.optim, True, 1, True),
        (torch.optim, True, 2, True),
        (fo.optim, True, 2, True),
    ],
    ids=["torch", "torch-named", "torch-groups", "ours-groups"],
)
def test_there_and_back_with_the_same_numbers(name, options, module, named, groups, late):
    optimizer, twin = [make(module, name, options, named, groups) for _ in range(2)]
    first, second, third = [draw(8, parameters(optimizer), late), *[draw(6, parameters(optimizer))] * 2]
    for some in (optimizer, twin):
        step_all(some, first)
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    tx, params, state = fo.from_torch(optimizer)
    assert isinstance(params, dict if named else list)
    before = [p.detach().clone() for p in parameters(optimizer)]
    params, state = update_all(tx, params, state, second, names)
    assert all(torch.equal(p, old) for p, old in zip(parameters(optimizer), before, strict=True))

    step_all(twin, second)
    moved = [params[name] for name in names] if named else params
    assert deviation(moved, parameters(twin)) < 1e-12

    fo.to_torch(optimizer, params, state)
    assert deviation(parameters(optimizer), parameters(twin)) < 1e-12
    for p, q in zip(parameters(optimizer), parameters(twin), strict=True):
        assert set(optimizer.state[p]) == set(twin.state[q])
        for key, value in twin.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-10, atol=1e-10)
    step_all(optimizer, third)
    step_all(twin, third)
    assert deviation(parameters(optimizer), parameters(twin)) < 1e-12


def test_parameters_at_one_step_in_one_group_need_no_partition():
    assert repr(fo.from_torch(make(torch.optim, "AdamW", {"lr": 0.1}))[0]).startswith("adam(lr=0.1")
    assert repr(fo.from_torch(make(torch.optim, "AdamW", {}, groups=2))[0]).startswith("partition(")


def test_learning_rates_may_be_learned():
    """What torch.optim cannot: the derivative of a later loss with respect to the learning rate of a live optimizer."""
    optimizer = make(torch.optim, "Adam", {})
    step_all(optimizer, draw(3, parameters(optimizer)))
    _, params, state = fo.from_torch(optimizer)
    grads = [torch.ones_like(p) for p in params]

    def loss(lr):
        updates, _ = fo.adam(lr).update(grads, state, params)
        return sum((p + u).square().sum() for p, u in zip(params, updates, strict=True))

    by, lr = 1e-6, torch.tensor(0.1)
    difference = (loss(lr + by) - loss(lr - by)) / (2 * by)
    torch.testing.assert_close(torch.func.grad(loss)(lr), difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"line_search_fn": "strong_wolfe"}, {"history_size": 3, "lr": 0.5}])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("module", [torch.optim, fo.optim], ids=["torch", "ours"])
def test_lbfgs(options, named, module):
    target = {"p9": torch.randn(3), "p8": torch.randn(2, 2)}

    def loss(params):
        values = [params[name] for name in target] if named else params
        return sum(((p - t) ** 4 + (p - t) ** 2).sum() for p, t in zip(values, target.values(), strict=True))

    def make_lbfgs():
        params = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
        entries = list(zip(target, params, strict=True)) if named else params
        return module.LBFGS(entries, max_iter=2, **options)

    def closure(optimizer):
        params = parameters(optimizer)
        value = loss(dict(zip(target, params, strict=True)) if named else params)
        for p, g in zip(params, torch.autograd.grad(value, params), strict=True):
            p.grad = g
        return value

    optimizer, twin = make_lbfgs(), make_lbfgs()
    for some in (optimizer, twin):
        some.step(lambda some=some: closure(some))
    tx, params, state = fo.from_torch(optimizer)
    updates, state = tx.update(torch.func.grad(loss)(params), state, params, value_fn=loss)
    fo.to_torch(optimizer, fo.apply_updates(params, updates), state)
    for _ in range(2):
        twin.step(lambda: closure(twin))
    optimizer.step(lambda: closure(optimizer))
    assert deviation(parameters(optimizer), parameters(twin)) < 1e-9
    assert optimizer.state[parameters(optimizer)[0]]["n_iter"] == twin.state[parameters(twin)[0]]["n_iter"]


def test_optimizers_around_chains():
    """One transformation for all groups, with a norm, numbers that are carried on, and a function of the whole tree."""

    def halve(updates, params):
        return fo.tree.map(lambda g: g / 2, updates)

    def accumulate(updates, state, params):
        total = fo.tree.map(torch.add, state, updates)
        return total, total

    def make_one():
        torch.manual_seed(0)
        params = [torch.randn(3).requires_grad_(), torch.randn(2, 2).requires_grad_()]
        accumulated = fo.GradientTransformation(lambda params: fo.tree.map(torch.zeros_like, params), accumulate)
        tx = fo.chain(fo.clip_by_global_norm(1.0), accumulated, fo.nadam(0.1), fo.stateless(halve), fo.trace(0.5))
        return fo.Optimizer([("b", params[0]), ("a", params[1])], tx)

    optimizer, twin = make_one(), make_one()
    history = draw(4, parameters(optimizer))
    for some in (optimizer, twin):
        step_all(some, history)
    tx, params, state = fo.from_torch(optimizer)
    assert tx is optimizer._transformation
    params, state = update_all(tx, params, state, history, ["b", "a"])
    fo.to_torch(optimizer, params, state)
    step_all(twin, history)
    assert deviation(parameters(optimizer), parameters(twin)) < 1e-12
    for some in (optimizer, twin):
        step_all(some, history)
    assert deviation(parameters(optimizer), parameters(twin)) < 1e-12


ONE_FOR_ALL = [
    fo.prodigy(d0=0.1),
    fo.accumulate(fo.prodigy(d0=0.1), 2),
    fo.chain(fo.trace(0.5), fo.momo(0.5)),
    fo.nadam(0.1),
    fo.apply_if_finite(fo.adam(0.1)),
    fo.chain(fo.zclip(), fo.adam(0.1)),
    fo.chain(fo.zclip(), fo.sgd(0.1)),
    fo.inject_hyperparams(fo.adam)(lr=0.1),
    fo.chain(fo.inject_hyperparams(fo.trace)(0.5), fo.inject_hyperparams(fo.trace)(0.25)),
]


@pytest.mark.parametrize("tx", ONE_FOR_ALL, ids=repr)
def test_states_come_back_bit_for_bit(tx):
    torch.set_default_dtype(torch.float32)  # in which numbers of the whole tree do not fit
    optimizer = fo.Optimizer([torch.ones(2), torch.ones(3)], tx)
    for p in parameters(optimizer):
        p.grad = torch.full_like(p, 0.3)
    for _ in range(3):
        optimizer.step(**({"value": 3.0} if "momo" in repr(tx) else {}))
    before = [dict(optimizer.state[p]) for p in parameters(optimizer)]
    _, params, state = fo.from_torch(optimizer)
    fo.to_torch(optimizer, params, state)
    for p, old in zip(parameters(optimizer), before, strict=True):
        assert optimizer.state[p].keys() == old.keys()
        for key, value in old.items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=0, atol=0)


def test_hyperparameters_are_copies():
    optimizer = make(torch.optim, "Adam", {"lr": torch.tensor(0.1)})
    tx, params, state = fo.from_torch(optimizer)
    expected = tx.update(params, state, params)[0]
    optimizer.param_groups[0]["lr"].fill_(5.0)
    assert all(torch.equal(a, b) for a, b in zip(tx.update(params, state, params)[0], expected, strict=True))


def test_lbfgs_with_bounds_that_are_floats():
    p = torch.ones(2, requires_grad=True)
    tx, _, _ = fo.from_torch(torch.optim.LBFGS([p], max_iter=1e1, max_eval=float("inf")))
    assert "max_iter=10" in repr(tx)


def test_sparse_adam():
    """Whose step torch.optim keeps as an int."""
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    tx, params, state = fo.from_torch(optimizer)
    updates, state = tx.update([embedding.weight.grad], state, params)
    fo.to_torch(optimizer, fo.apply_updates(params, updates), state)
    assert optimizer.state[embedding.weight]["step"] == 2
    assert type(optimizer.state[embedding.weight]["step"]) is int
    optimizer.step()


@pytest.mark.parametrize(
    "parts",
    [
        (fo.nadam(0.1), fo.sgd(0.1)),
        (fo.nadam(0.1), fo.nadam(0.1, momentum_decay=0.1)),
        (fo.prodigy(), fo.dadapt_adam()),
    ],
    ids=["nadam and sgd", "two of nadam", "two of the whole tree"],
)
def test_parts_may_carry_numbers_of_their_own(parts):
    tx = fo.partition({"first": parts[0], "second": parts[1]}, {"a": "first", "b": "second"})
    optimizer, back = [fo.Optimizer({"a": torch.ones(3), "b": torch.ones(2, 2)}.items(), tx) for _ in range(2)]
    step_all(optimizer, draw(3, parameters(optimizer)))
    found, params, state = fo.from_torch(optimizer)
    history = draw(4, parameters(optimizer))
    fo.to_torch(back, *update_all(found, params, state, history, list(params)))
    step_all(optimizer, history)
    for some in (optimizer, back):
        step_all(some, draw(2, parameters(some)))
    assert deviation(parameters(back), parameters(optimizer)) == 0


def test_numbers_that_parameters_carry_on_apart_are_told():
    tx = fo.nadam(0.1)
    optimizer = fo.Optimizer([torch.ones(2), torch.ones(2)], tx)
    step_all(optimizer, [[torch.ones(2), torch.ones(2)]])
    optimizer.state[parameters(optimizer)[0]]["mu_product"].mul_(2)
    with pytest.raises(ValueError, match="at different numbers that rules carry on, but nadam.* it cannot be parted"):
        fo.from_torch(optimizer)


def test_steps_that_differ_are_told_where_numbers_of_the_tree_are_the_same():
    optimizer = fo.Optimizer([torch.ones(2), torch.ones(2)], fo.dadapt_adam())
    step_all(optimizer, [[torch.ones(2), torch.ones(2)], [None, torch.ones(2)]])
    with pytest.raises(ValueError, match="at different steps, 1, 2, but dadapt_adam.* it cannot be parted"):
        fo.from_torch(optimizer)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (fo.sgd(0.1), torch.optim.Adam, "lacks 'exp_avg'"),
        (fo.adam(0.1), lambda params: torch.optim.Adam(params, amsgrad=True), "lacks 'max_exp_avg_sq'"),
        (fo.adam(0.1), torch.optim.NAdam, "lacks 'mu_product'"),
        (fo.clip(0.1), torch.optim.Adam, "lacks 'exp_avg'"),
    ],
)
def test_states_of_others_are_refused(ours, theirs, message):
    params = [torch.ones(2)]
    _, state = ours.update(params, ours.init(params), params)
    optimizer = theirs([torch.zeros(2)])
    with pytest.raises(ValueError, match=message):
        fo.to_torch(optimizer, params, state)
    assert not optimizer.state
    assert torch.equal(parameters(optimizer)[0], torch.zeros(2))


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_what_comes_twice_cannot_be_a_tree():
    p, q = torch.ones(1), torch.ones(1)
    with pytest.raises(ValueError, match="The optimizer has parameters that come more than once"):
        fo.from_torch(torch.optim.Adam([p, p]))
    with pytest.raises(ValueError, match="The optimizer has names that come more than once"):
        fo.from_torch(torch.optim.Adam([{"params": [("w", p)]}, {"params": [("w", q)]}]))


def test_errors_change_nothing():
    optimizer = torch.optim.Adam([torch.ones(2), torch.ones(1).expand(3)])
    _, params, state = fo.from_torch(optimizer)
    with pytest.raises(RuntimeError, match="Elements of the parameter '1' share memory"):
        fo.to_torch(optimizer, [p + 1 for p in params], state)
    assert torch.equal(parameters(optimizer)[0], torch.ones(2))


def test_errors():
    class Mine(torch.optim.Optimizer):
        pass

    with pytest.raises(TypeError, match="Mine is no optimizer of torch.optim"):
        fo.from_torch(Mine([torch.ones(1)], {}))

    chained = fo.Optimizer([torch.ones(1), torch.ones(1)], fo.chain(fo.clip_by_global_norm(1.0), fo.adam()))
    step_all(chained, [[torch.ones(1), None], [torch.ones(1), torch.ones(1)]])
    with pytest.raises(ValueError, match="at different steps, 2, 1, but .* it cannot be parted"):
        fo.from_torch(chained)

    around = fo.Optimizer([torch.ones(1), torch.ones(1)], fo.adam())
    step_all(around, [[torch.ones(1), None], [torch.ones(1), torch.ones(1)]])
    with pytest.raises(
        ValueError, match="at different steps, 2, 1, but adam.* looks at all of them together, or is one for all"
    ):
        fo.from_torch(around)

    optimizer = make(torch.optim, "Adam", {})
    _, params, state = fo.from_torch(optimizer)
    with pytest.raises(ValueError, match="params and the optimizer's parameters do not match"):
        fo.to_torch(optimizer, params[1:], state)
    with pytest.raises(ValueError, match="the params have shape .* at '0'"):
        fo.to_torch(optimizer, [torch.ones(7), *params[1:]], state)
    with pytest.raises(ValueError, match="The saved state of parameter '0' has 'prev', which this transformation does"):
        fo.to_torch(optimizer, params, fo.rprop().update(params, fo.rprop().init(params))[1])
    with pytest.raises(ValueError, match="not one of lbfgs for these parameters"):
        fo.to_torch(torch.optim.LBFGS([torch.ones(1)]), [torch.ones(1)], state)
    assert not optimizer.state
