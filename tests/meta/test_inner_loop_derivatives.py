"""Derivatives through the inner loop: against central finite differences, a loop of functions, and closed forms."""

import copy

import pytest
import torch
from inner_loop_cases import F64, TRANSFORMATIONS, Task, Tied, loss_fn, make, make_task, modules, transformations
from torch.func import functional_call, grad, grad_and_value

import functorch_optim as fo

LR = torch.tensor(0.05, dtype=F64)


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def outer_loss(module, tx, task, steps=4, after_step=lambda inner: None, **options):
    torch.manual_seed(1)  # for dropout
    with fo.meta.inner_loop(module, tx, **options) as inner:
        for _ in range(steps):
            inner.step(loss_fn(inner(task.x), task.y))
            after_step(inner)
        return loss_fn(inner(task.outer_x), task.outer_y)


def derivatives(module, make_tx, task, **options):
    """Give those with respect to the parameters, the learning rate and the data."""
    lr, x = [tensor.clone().requires_grad_() for tensor in (LR.to(task.x.device), task.x)]
    outer = outer_loss(module, make_tx(lr), task._replace(x=x), **options)
    params = list(trainable(module).values())
    return list(torch.autograd.grad(outer, [*params, lr, x], allow_unused=True, materialize_grads=True))


def by_functions(module, make_tx, task, cut=lambda g: g, steps=4):
    """Give the same, by a loop of torch.func.grad."""
    module = copy.deepcopy(module)
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}

    def loss(params, buffers, x, y):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        tensors = {**frozen, **params, **buffers}
        if isinstance(module, Tied):
            tensors["output.weight"] = tensors["embedding.weight"]
        value = loss_fn(functional_call(module, tensors, (x,), tie_weights=False), y)
        return value, {name: tensors[name] for name in buffers}

    def outer(params, lr, x):
        tx, buffers = make_tx(lr), dict(module.named_buffers())
        state = tx.init(params)
        for _ in range(steps):
            grads, buffers = grad(loss, has_aux=True)(params, buffers, x, task.y)
            updates, state = tx.update(fo.tree.map(cut, grads), state, params)
            params = fo.apply_updates(params, updates)
        return loss(params, buffers, task.outer_x, task.outer_y)[0]

    params = {name: p.detach() for name, p in trainable(module).items()}
    torch.manual_seed(1)
    of_params, *others = grad(outer, (0, 1, 2))(params, LR.to(task.x.device), task.x)
    return [*of_params.values(), *others]


def assert_close(left, right, rtol=1e-12, atol=1e-13):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def assert_equals_differences(gradients, module, make_tx, task):
    """Compare along a direction in each of: the parameters, the learning rate, the data."""
    directions = [torch.randn_like(g) for g in gradients]

    def moved(indices, by):
        other, lr, x = copy.deepcopy(module), LR.clone(), task.x.clone()
        with torch.no_grad():
            for i, tensor in enumerate([*trainable(other).values(), lr, x]):
                tensor.add_(directions[i], alpha=by if i in indices else 0)
        return outer_loss(other, make_tx(lr), task._replace(x=x)).item()

    count = len(gradients)
    for indices in (range(count - 2), [count - 2], [count - 1]):
        near, far = [(moved(indices, by) - moved(indices, -by)) / (2 * by) for by in (1e-5, 2e-5)]
        expected = torch.tensor((4 * near - far) / 3, dtype=F64)
        exact = sum((gradients[i] * directions[i]).sum() for i in indices)
        torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-9)


# All orders. ----------------------------------------------------------------------------------------------------------


@transformations
def test_derivatives_equal_finite_differences_for_transformations(tx):
    module, task = make(), make_task()
    gradients = derivatives(module, TRANSFORMATIONS[tx], task)
    assert_equals_differences(gradients, module, TRANSFORMATIONS[tx], task)


@pytest.mark.sampled(size=8)
@modules
def test_derivatives_equal_finite_differences_for_modules(name):
    module, task = make(name), make_task()
    gradients = derivatives(module, TRANSFORMATIONS["adam"], task)
    assert_equals_differences(gradients, module, TRANSFORMATIONS["adam"], task)


def detach_state(inner):
    inner.state = fo.tree.map(torch.Tensor.detach, inner.state)


def detach_weights(inner):
    inner.params = {name: p.detach().requires_grad_() for name, p in inner.params.items()}


@pytest.mark.parametrize("cut", [{"after_step": detach_state}, {"after_step": detach_weights}, {"first_order": True}])
def test_finite_differences_find_a_cut_graph(cut):
    module, task, make_tx = make(), make_task(), TRANSFORMATIONS["momentum"]
    gradients = derivatives(module, make_tx, task, **cut)
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_differences(gradients, module, make_tx, task)


@pytest.mark.sampled(size=32)
@modules
@transformations
def test_derivatives_equal_those_of_a_loop_of_functions(name, tx, device):
    module, task = make(name, device), make_task(device=device)
    with torch.backends.cudnn.flags(enabled=False):  # its LSTM has no second derivative
        mine = derivatives(module, TRANSFORMATIONS[tx], task)
        theirs = by_functions(module, TRANSFORMATIONS[tx], task)
        first_order = by_functions(module, TRANSFORMATIONS[tx], task, cut=torch.Tensor.detach)
    assert_close(mine, theirs)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(mine, first_order)


@transformations
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_derivatives_are_finite_where_units_are_dead(tx, dtype):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 5)).to(dtype)
    torch.nn.init.constant_(module[0].bias, -100.0)
    task = Task(*[tensor.to(dtype) for tensor in make_task()])
    gradients = derivatives(module, TRANSFORMATIONS[tx], task)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert not gradients[0].any()
    assert gradients[3].any()


def test_higher_derivatives():
    """Of (1 - 2 lr)^4 w^2: two steps of sgd on w^2."""
    module, lr = torch.nn.Linear(1, 1, bias=False).to(F64), LR.clone().requires_grad_()
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    outer = outer_loss(module, fo.sgd(lr), Task(one, zero, one, zero), steps=2)
    [first] = torch.autograd.grad(outer, lr, create_graph=True)
    of_lr, of_weight = torch.autograd.grad(first, [lr, module.weight])
    w, rest = module.weight.item(), 1 - 2 * LR
    assert_close([first, of_lr, of_weight.squeeze()], [-8 * rest**3 * w**2, 48 * rest**2 * w**2, -16 * rest**3 * w])


# Loops in a row, and next to each other. ------------------------------------------------------------------------------


@modules
def test_two_loops_in_a_row_are_one(name):
    task, lr = make_task(), LR.clone().requires_grad_()
    module, tx = make(name), TRANSFORMATIONS["adam"](lr)
    whole = torch.autograd.grad(outer_loss(module, tx, task), [*trainable(module).values(), lr])
    torch.manual_seed(1)
    begun = {}
    for _ in range(2):
        with fo.meta.inner_loop(module, tx, **begun) as inner:
            for _ in range(2):
                inner.step(loss_fn(inner(task.x), task.y))
        begun = {"params": inner.params, "buffers": inner.buffers, "state": inner.state}
    outer = loss_fn(inner(task.outer_x), task.outer_y)
    assert_close(torch.autograd.grad(outer, [*trainable(module).values(), lr]), whole, rtol=0, atol=0)


def test_a_loop_may_go_on_from_constants():
    module, task, lr = make(), make_task(), LR.clone().requires_grad_()
    tx = fo.adam(lr)
    with fo.meta.inner_loop(module, tx) as former:
        former.step(loss_fn(former(task.x), task.y))
    params, state = fo.tree.map(torch.Tensor.detach, (former.params, former.state))
    with fo.meta.inner_loop(module, tx, params=params, state=state) as inner:
        inner.step(loss_fn(inner(task.x), task.y))
    outer = loss_fn(inner(task.outer_x), task.outer_y)
    *of_params, of_lr = torch.autograd.grad(outer, [*module.parameters(), lr], allow_unused=True)
    assert of_params == [None] * 4

    def by_function(lr):
        loss = lambda params, x, y: loss_fn(functional_call(module, params, (x,)), y)
        updates, _ = fo.adam(lr).update(grad(loss)(params, task.x, task.y), state, params)
        return loss(fo.apply_updates(params, updates), task.outer_x, task.outer_y)

    assert_close([of_lr], [grad(by_function)(LR)])


@modules
def test_many_tasks_from_one_initialization_in_any_order(name):
    module, tasks, tx = make(name), [make_task(seed) for seed in range(3)], fo.adam(0.05)
    if name == "dropout":
        module.eval()
    expected = torch.autograd.grad(
        sum(outer_loss(module, tx, task) for task in tasks), list(trainable(module).values())
    )
    inners = [fo.meta.inner_loop(module, tx) for _ in tasks]
    for _ in range(4):
        for inner, task in zip(inners, tasks, strict=True):
            inner.step(loss_fn(inner(task.x), task.y))
    for inner, task in zip(inners, tasks, strict=True):
        loss_fn(inner(task.outer_x), task.outer_y).backward()
    assert_close([p.grad for p in trainable(module).values()], expected)


def test_only_the_head_adapts():
    """ANIL: derivatives reach the body all the same."""
    module, task = make("nested"), make_task()
    body, head = module.parts["body"], module.parts["head"]
    chosen = {name: p for name, p in module.named_parameters() if "head" in name}
    outer = outer_loss(module, fo.adam(LR), task, params=chosen)
    mine = torch.autograd.grad(outer, [body[0].weight, head.weight, module.scale])

    def by_function(body_weight, head_weight, scale):
        params = {"weight": head_weight, "bias": head.bias.detach()}
        hidden = lambda x: torch.tanh(torch.nn.functional.linear(x, body_weight, body[0].bias))
        loss = lambda params, x, y: loss_fn(functional_call(head, params, (hidden(x),)) * scale, y)
        tx = fo.adam(LR)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(grad(loss)(params, task.x, task.y), state, params)
            params = fo.apply_updates(params, updates)
        return loss(params, task.outer_x, task.outer_y)

    given = [p.detach() for p in (body[0].weight, head.weight, module.scale)]
    assert_close(mine, grad(by_function, (0, 1, 2))(*given))


# First order. ---------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(size=32)
@modules
@transformations
def test_first_order_equals_a_loop_of_functions_with_constant_gradients(name, tx):
    module, task = make(name), make_task()
    mine = derivatives(module, TRANSFORMATIONS[tx], task, first_order=True)
    theirs = by_functions(module, TRANSFORMATIONS[tx], task, cut=torch.Tensor.detach)
    assert_close(mine, theirs)
    assert all(g.any() for g in mine[:-1])
    assert not mine[-1].any() or name == "centered"  # its buffer remembers the data


def test_first_order_in_closed_form():
    """With sgd: the gradient at the adapted weights, and for the learning rate its product with all others."""
    module, task, lr, seen = make(), make_task(), LR.clone().requires_grad_(), []
    with fo.meta.inner_loop(module, fo.sgd(lr), first_order=True) as inner:
        for _ in range(4):
            before = list(inner.params.values())
            inner.step(loss_fn(inner(task.x), task.y))
            seen.append([(b - a).detach() / LR for a, b in zip(inner.params.values(), before, strict=True)])
        outer = loss_fn(inner(task.outer_x), task.outer_y)
    at_end = torch.autograd.grad(outer, list(inner.params.values()), retain_graph=True)
    outer.backward()
    assert_close([p.grad for p in module.parameters()], at_end, rtol=0, atol=0)
    products = [(g * last).sum() for grads in seen for g, last in zip(grads, at_end, strict=True)]
    assert_close([lr.grad], [-sum(products)])


# Extras. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_is_given_the_loss_and_a_function(search):
    module, task, lr = make(), make_task(), LR.clone().requires_grad_()
    make_tx = lambda lr: fo.lbfgs(lr, max_iter=2, history_size=2, line_search_fn=search)
    loss = lambda params, x, y: loss_fn(functional_call(module, params, (x,)), y)
    with fo.meta.inner_loop(module, make_tx(lr)) as inner:
        for _ in range(2):
            inner.step(loss_fn(inner(task.x), task.y), value_fn=lambda params: loss(params, task.x, task.y))
        outer = loss_fn(inner(task.outer_x), task.outer_y)
    mine = torch.autograd.grad(outer, [*module.parameters(), lr])

    def by_function(params, lr):
        tx = make_tx(lr)
        state = tx.init(params)
        for _ in range(2):
            grads, value = grad_and_value(loss)(params, task.x, task.y)
            value_fn = lambda params: loss(params, task.x, task.y)
            updates, state = tx.update(grads, state, params, value=value, value_fn=value_fn)
            params = fo.apply_updates(params, updates)
        return loss(params, task.outer_x, task.outer_y)

    params = {name: p.detach() for name, p in module.named_parameters()}
    of_params, of_lr = grad(by_function, (0, 1))(params, LR)
    assert_close(mine, [*of_params.values(), of_lr], rtol=1e-9)
