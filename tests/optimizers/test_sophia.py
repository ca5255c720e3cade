"""Sophia against its formula and a package; its estimates of diagonals against exact ones."""

import numpy as np
import pytest
import torch
from trajectories import deviation, problem, tensors

import functorch_optim as fo

NUMBERS = {"lr": 0.1, "betas": (0.9, 0.8), "rho": 0.5, "weight_decay": 0.1, "eps": 1e-3}


def sophia(params, history, diagonals, lr, betas, rho, weight_decay, eps, every=10, at_first=False):
    """In numpy, with a diagonal for each step; it is used where it is due."""
    m, h = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for t, (grads, diagonal) in enumerate(zip(history, diagonals, strict=True), 1):
        if t % every == 1 % every and (at_first or t > 1):
            h = [betas[1] * a + (1 - betas[1]) * b for a, b in zip(h, diagonal, strict=True)]
        m = [betas[0] * a + (1 - betas[0]) * g for a, g in zip(m, grads, strict=True)]
        steps = [np.clip(a / np.maximum(rho * b, eps), -1, 1) for a, b in zip(m, h, strict=True)]
        params = [(1 - lr * weight_decay) * p - lr * u for p, u in zip(params, steps, strict=True)]
        yield params


def given(params, batch):
    """Take the batch for the diagonal."""
    return batch


def functional(tx, params, history, diagonals):
    params = tensors(params)
    state = tx.init(params)
    for grads, diagonal in zip(history, diagonals, strict=True):
        params, state = fo.step(tx, tensors(grads), state, params, batch=tensors(diagonal))
        yield params


def stateful(make, params, history, diagonals):
    params = [torch.nn.Parameter(p) for p in tensors(params)]
    optimizer = make(params)
    for grads, diagonal in zip(history, diagonals, strict=True):
        for p, g in zip(params, tensors(grads), strict=True):
            p.grad = g
        optimizer.step(**{"batch" if isinstance(optimizer, fo.Optimizer) else "hessian": tensors(diagonal)})
        yield [p.detach().clone() for p in params]


SCHEDULES = [{}, {"every": 1}, {"every": 1, "at_first": True}, {"every": 3}, {"every": 3, "at_first": True}]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_every_step_is_that_of_the_formula(options):
    params, history = problem()
    _, diagonals = problem(seed=1)
    options = {**NUMBERS, **options}
    expected = list(sophia(params, history, diagonals, **options))
    ours = list(functional(fo.sophia(**options, hessian=given), params, history, diagonals))
    assert deviation(ours, expected) < 1e-12
    ours = stateful(lambda ps: fo.Optimizer(ps, fo.sophia(**options, hessian=given)), params, history, diagonals)
    assert deviation(list(ours), expected) < 1e-12


@pytest.mark.parametrize("changed", [{"rho": 0.7}, {"eps": 0.1}, {"betas": (0.9, 0.5)}, {"every": 2}], ids=str)
def test_the_comparison_can_fail(changed):
    params, history = problem()
    _, diagonals = problem(seed=1)
    options = {**NUMBERS, "every": 3}
    ours = list(functional(fo.sophia(**{**options, **changed}, hessian=given), params, history, diagonals))
    assert deviation(ours, list(sophia(params, history, diagonals, **options))) > 1e-6


def test_every_step_is_that_of_an_independent_package():
    """Its steps are clipped at p, ours at lr: the learning rates differ by p."""
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    params, history = problem()
    _, diagonals = problem(seed=1)
    p, lr, eps = 0.04, 0.5, 1e-3
    theirs = stateful(
        lambda ps: package.SophiaH(ps, lr=lr, betas=(0.9, 0.8), p=p, eps=eps, weight_decay=0.1),
        *(params, history, diagonals),
    )
    options = {"betas": (0.9, 0.8), "rho": p, "weight_decay": 0.1 / p, "eps": eps * p, "every": 1, "at_first": True}
    ours = functional(fo.sophia(lr * p, **options, hessian=given), params, history, diagonals)
    assert deviation(list(ours), list(theirs)) < 1e-12


def test_until_the_first_estimate_steps_are_signs():
    params, history = problem(steps=11)
    ours = functional(fo.sophia(0.1, rho=1e3, weight_decay=0.0, hessian=given), params, history, history)
    before = tensors(params)
    for t, after in enumerate(ours, 1):
        sizes = [(new - p).abs() for new, p in zip(after, before, strict=True)]
        signs = all(torch.allclose(size, torch.full_like(size, 0.1)) for size in sizes)
        assert signs == (t < 11)
        before = after


def test_nothing_is_estimated_in_between():
    calls = []

    def counted(params, batch, *, step):
        calls.append(int(step))
        return batch

    params, history = problem(steps=9)
    list(functional(fo.sophia(hessian=counted, every=4), params, history, history))
    assert calls == [5, 9]


# Estimates. -----------------------------------------------------------------------------------------------------------

DOUBLE = {"dtype": torch.float64}


def loss(params, batch):
    return (torch.tanh(batch @ params["w"]) * params["b"]).square().mean() + (params["w"] ** 3).sum()


def diagonal_of(function, params):
    """Return the diagonal of the Hessian, exactly."""
    leaves, structure = fo.tree.flatten(params)
    rows = torch.func.hessian(lambda *leaves: function(fo.tree.unflatten(structure, leaves)), tuple(range(len(leaves))))
    blocks = rows(*leaves)
    found = [blocks[i][i].reshape(p.numel(), p.numel()).diagonal().reshape(p.shape) for i, p in enumerate(leaves)]
    return fo.tree.unflatten(structure, found)


def mean_of(estimate, params, batch, count):
    """Return the mean of estimates, and how far it may be from the expectation: five standard errors."""
    found = torch.vmap(lambda step: estimate(params, batch, step=step))(torch.arange(count))
    mean = fo.tree.map(lambda x: x.mean(0), found)
    return mean, fo.tree.map(lambda x: 5 * x.std(0) / count**0.5 + 1e-12, found)


def assert_within(mean, spread, expected):
    for a, s, b in zip(*[fo.tree.flatten(one)[0] for one in (mean, spread, expected)], strict=True):
        assert ((a - b).abs() <= s).all()


def test_hutchinsons_estimate_is_the_diagonal_on_average():
    params = {"w": torch.randn(3, **DOUBLE), "b": torch.randn(1, **DOUBLE)}
    batch = torch.randn(5, 3, **DOUBLE)
    exact = diagonal_of(lambda params: loss(params, batch), params)
    mean, spread = mean_of(fo.hutchinson(loss, generator=0), params, batch, 2000)
    assert_within(mean, spread, exact)
    with pytest.raises(AssertionError):
        assert_within(fo.tree.scale(1.5, mean), spread, exact)


def test_hutchinsons_estimate_of_a_diagonal_hessian_is_exact():
    params = torch.randn(4, **DOUBLE)
    found = fo.hutchinson(lambda params, batch: (params**4).sum())(params)
    torch.testing.assert_close(found, 12 * params**2, rtol=1e-14, atol=0)


def test_gauss_newton_bartlett_is_the_diagonal_on_average():
    """Of logits that are linear, the Gauss-Newton matrix of the cross-entropy is its Hessian, whatever the labels."""
    params, batch = torch.randn(3, 4, **DOUBLE), torch.randn(6, 3, **DOUBLE)
    labels = torch.randint(4, (6,))
    exact = diagonal_of(lambda w: torch.nn.functional.cross_entropy(batch @ w, labels), params)
    estimate = fo.gauss_newton_bartlett(lambda w, batch: batch @ w, generator=0)
    mean, spread = mean_of(estimate, params, batch, 3000)
    assert_within(mean, spread, exact)
    assert bool((estimate(params, batch) >= 0).all())
    with pytest.raises(AssertionError):
        assert_within(1.5 * mean, spread, exact)


def test_tokens_are_predictions_of_their_own():
    params, tokens = torch.randn(3, 4, **DOUBLE), torch.randn(2, 5, 3, **DOUBLE)
    estimate = fo.gauss_newton_bartlett(lambda w, batch: batch @ w, generator=0)
    flat = estimate(params, tokens.reshape(10, 3), step=1)
    torch.testing.assert_close(estimate(params, tokens, step=1), flat, rtol=1e-12, atol=1e-14)


def test_estimates_are_functions_of_the_step():
    params, batch = {"w": torch.randn(3, **DOUBLE), "b": torch.randn(1, **DOUBLE)}, torch.randn(5, 3, **DOUBLE)
    estimate = fo.hutchinson(loss, generator=torch.Generator().manual_seed(0))
    one, again, other = [estimate(params, batch, step=step)["w"] for step in (1, 1, 2)]
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    drawn = torch.stack([estimate(params, batch)["w"] for _ in range(8)])
    assert len(drawn.unique(dim=0)) > 1


# In loops. ------------------------------------------------------------------------------------------------------------


def test_unrolled_it_takes_the_loss_of_the_loop():
    params, batches = {"w": torch.ones(3, **DOUBLE), "b": torch.ones(1, **DOUBLE)}, torch.randn(4, 5, 3, **DOUBLE)

    def trained(rho):
        tx = fo.sophia(0.1, (0.5, 0.5), rho, eps=0.1, every=2)
        return loss(fo.meta.unroll(loss, tx, params, batches).params, batches[0])

    assert fo.meta.check_derivative(trained, torch.tensor(2.0, **DOUBLE)).ok
    expected = trained(2.0)
    tx, state = fo.sophia(0.1, (0.5, 0.5), 2.0, eps=0.1, every=2), None
    for batch in batches:
        state = tx.init(params) if state is None else state
        grads = torch.func.grad(loss)(params, batch)
        params, state = fo.step(tx, grads, state, params, value_fn=lambda params, batch=batch: loss(params, batch))
    torch.testing.assert_close(loss(params, batches[0]), expected, rtol=1e-12, atol=0)


def test_in_an_optimizer_the_batch_or_the_loss_is_given_with_the_closure():
    x = torch.randn(8, 3)
    labels = torch.randint(2, (8,))
    after = []
    for by in ("batch", "loss", "logits"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)

        def logits(params, batch, model=model):
            return torch.func.functional_call(model, params, (batch,))

        def of_params(params, batch=x, logits=logits):
            return torch.nn.functional.cross_entropy(logits(params, batch), labels)

        estimates = {"batch": fo.hutchinson(of_params, generator=0), "logits": fo.gauss_newton_bartlett(logits, 0)}
        opt = fo.Optimizer(model.named_parameters(), fo.sophia(0.1, rho=10.0, every=2, hessian=estimates.get(by)))

        def closure(opt=opt, model=model):
            opt.zero_grad()
            value = torch.nn.functional.cross_entropy(model(x), labels)
            value.backward()
            return value

        extra = {"value_fn": of_params} if by == "loss" else {"batch": x}
        losses = [opt.step(closure, **extra).item() for _ in range(9)]
        assert losses[-1] < losses[0]
        after.append(model.weight.detach())
    assert torch.equal(after[0], after[1])
    assert not torch.equal(after[0], after[2])


def test_members_of_a_batch_have_estimates_of_their_own():
    params, batch = torch.randn(2, 3, **DOUBLE), torch.rand(2, 3, **DOUBLE) + 0.5
    tx = fo.sophia(0.1, rho=1.0, every=2, hessian=fo.hutchinson(lambda p, a: (a * p**2).sum(), generator=0))

    def trained(p, a):
        state = tx.init(p)
        for _ in range(4):
            p, state = fo.step(tx, 2 * a * p, state, p, batch=a)
        return p

    together = torch.vmap(trained)(params, batch)
    torch.testing.assert_close(together, torch.stack(list(map(trained, params, batch))), rtol=1e-12, atol=1e-14)


def test_without_a_gradient_nothing_changes():
    params = {"a": torch.ones(2), "b": torch.ones(2)}
    tx = fo.sophia(hessian=lambda params, batch: fo.tree.map(torch.ones_like, params), every=1, at_first=True)
    updates, state = tx.update({"a": torch.ones(2), "b": None}, tx.init(params), params)
    assert updates["b"] is None
    h = fo.tree.get(state, "hessian")
    assert bool((h["a"] > 0).all())
    assert not h["b"].any()


# Errors. --------------------------------------------------------------------------------------------------------------


def test_a_closure_alone_has_no_second_derivatives():
    model = torch.nn.Linear(2, 1)
    opt = fo.Optimizer(model.parameters(), fo.sophia(at_first=True))

    def closure():
        opt.zero_grad()
        value = model(torch.ones(1, 2)).square().sum()
        value.backward()
        return value

    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Give the loss as a function of the parameters: opt.step"):
        opt.step(closure)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rho": 0.0}, ValueError, "Invalid rho: 0.0; it needs value > 0"),
        ({"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0; it needs value >= 0"),
        ({"every": 0}, ValueError, "Invalid every: 0; it needs an integer >= 1"),
        ({"rho": {"a": 0.1}}, TypeError, "Invalid rho: .* is a tree"),
        ({"hessian": torch.ones(2)}, TypeError, "hessian is a function of parameters and batch"),
    ],
)
def test_arguments_that_cannot_be_used_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        fo.sophia(**options)


def test_what_is_missing_is_an_error_at_the_first_step():
    tx, params = fo.sophia(), torch.ones(2)
    with pytest.raises(
        TypeError, match=r"sophia needs the loss: sophia\(hessian=hutchinson\(loss_fn\)\) and batch=batch"
    ):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))
    with pytest.raises(TypeError, match="hutchinson needs the loss"):
        fo.hutchinson()(params)
    with pytest.raises(TypeError, match=r"Invalid generator: 'a'; .* as in hutchinson\(loss, generator=0\)"):
        fo.hutchinson(generator="a")
    wrong = fo.sophia(hessian=lambda params, batch: {"b": params["a"]}, at_first=True)
    with pytest.raises(ValueError, match="the Hessian and the parameters do not match"):
        wrong.update({"a": params}, wrong.init({"a": params}), {"a": params})
