"""The extras that a step of the inner loop takes, and its errors."""

import pytest
import torch
from inner_loop_cases import TASK, adapt, adapted, loss_fn, make, modes, outer_loss
from torch import nn

import functorch_optim as fo
from functorch_optim.meta import inner_loop

pytestmark = pytest.mark.smoke

# Extras. --------------------------------------------------------------------------------------------------------------


@modes
def test_the_loss_is_the_value_unless_another_is_given(options):
    given = []

    def update(updates, state, params, *, value):
        given.append(value)
        return updates, state

    tx = fo.chain(fo.GradientTransformation(lambda params: (), update), fo.sgd(0.1))
    with inner_loop(make(), tx, **options) as inner:
        loss = outer_loss(inner)
        inner.step(loss)
        inner.step(outer_loss(inner), value=3.0)
    assert given[0].item() == loss.item()
    assert given[0].requires_grad == (options == {})
    assert given[1] == 3.0


@modes
def test_a_function_of_the_weights(options):
    module = make()
    loss_of = lambda params: loss_fn(torch.func.functional_call(module, params, (TASK.x,)), TASK.y)
    with inner_loop(module, fo.lbfgs(line_search_fn="strong_wolfe"), **options) as inner:
        for _ in range(20):
            inner.step(loss_fn(inner(TASK.x), TASK.y), value_fn=loss_of)
    assert loss_of(inner.params) < 1e-6  # there are more weights than data
    assert outer_loss(inner).requires_grad


# Errors. --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "match"),
    [
        (
            (lambda x: x, fo.sgd(0.1)),
            {},
            TypeError,
            r"needs a torch.nn.Module, got a function; write inner_loop\(model",
        ),
        ((make(), fo.sgd), {}, TypeError, r"is not a GradientTransformation; call it: inner_loop\(model, fo.adam\("),
        ((make(), torch.optim.Adam), {}, TypeError, r"^Adam is not a GradientTransformation; call it: inner_loop"),
        ((make(), 0.1), {}, TypeError, r"0.1 is not a GradientTransformation; as in: inner_loop\(model, fo.adam\("),
        ((nn.Tanh(), fo.sgd(0.1)), {}, ValueError, "nothing to adapt: .* no parameter of the module requires grad"),
        ((make().requires_grad_(False), fo.sgd(0.1)), {}, ValueError, r"or call model.requires_grad_\(\)"),
        ((make(), fo.sgd(0.1)), {"params": {}}, ValueError, "nothing to adapt: params is empty"),
        (
            (make(), fo.sgd(0.1)),
            {"params": {"0.wait": torch.ones(3)}},
            ValueError,
            "params has '0.wait', but the module has no such name; it has 0.weight, 0.bias, 2.weight, 2.bias",
        ),
        (
            (make("tied"), fo.sgd(0.1)),
            {"params": {"output.weight": torch.ones(5, 3)}},
            ValueError,
            "has 'output.weight', .* it has embedding.weight, first.weight, first.bias. Tied .* first of their names",
        ),
        ((make(), fo.sgd(0.1)), {"params": {"0.weight": 1.0}}, TypeError, "params has a float at '0.weight', not a te"),
        ((make(), fo.sgd(0.1)), {"buffers": {"mean": 1}}, ValueError, "buffers has 'mean', .* it has none"),
        ((make("centered"), fo.sgd(0.1)), {"buffers": {"mean": 1}}, TypeError, "buffers has a int at 'mean'"),
    ],
)
def test_errors_at_the_beginning(arguments, options, kind, match):
    with pytest.raises(kind, match=match):
        inner_loop(*arguments, **options)


@modes
def test_errors_in_a_step(options):
    module = make()
    inner = inner_loop(module, fo.adam(0.1), **options)

    def loss():
        return loss_fn(inner(TASK.x), TASK.y)

    def freed():
        value = loss()
        value.backward()
        return value

    def without_grad():
        with torch.no_grad():
            return loss()

    before = loss()
    adapt(inner)
    for make_loss, kind, match in [
        (lambda: 1.0, TypeError, "needs a loss, a 0-dim tensor, got a float"),
        (lambda: inner(TASK.x), ValueError, r"got one of shape \(4, 5\) and dtype torch.float64; take the mean or sum"),
        (lambda: loss() * 1j, ValueError, r"a real 0-dim tensor, got one of shape \(\) and dtype torch.complex128"),
        (without_grad, RuntimeError, r"The loss has no graph: .* compute it with inner\(x\)"),
        (lambda: loss().detach(), RuntimeError, "The loss has no graph: it was detached"),
        (lambda: loss_fn(module(TASK.x), TASK.y), RuntimeError, "probably computed with the module itself"),
        (lambda: before, RuntimeError, r"does not depend on the fast weights.* inner\(x\), anew for every step"),
        (freed, RuntimeError, "graph of the loss has been freed: call neither backward nor step"),
    ]:
        kept = (inner.params, inner.state)
        with pytest.raises(kind, match=match):
            inner.step(make_loss())
        assert (inner.params is kept[0], inner.state is kept[1]) == (True, True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="grad mode is off: .* differentiable=False"):
        inner.step(before)
    adapt(inner)


def test_other_errors_of_autograd_are_not_explained_away():
    inner = inner_loop(make(), fo.sgd(0.1))
    loss = inner(TASK.x).square().mean()
    with torch.no_grad():
        inner.params["2.weight"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        inner.step(loss)


def test_states_and_extras_of_others():
    module = make()
    state = adapted(module).state
    for tx, options, match in [
        (fo.sgd(0.1, momentum=0.9), {"state": state}, "belongs to another transformation"),
        (fo.adam(), {"state": state, "params": {"0.bias": module[0].bias}}, "the state's exp_avg and params do not ma"),
    ]:
        with pytest.raises(ValueError, match=match):
            adapted(module, tx, **options)
    with inner_loop(module, fo.lbfgs()) as inner, pytest.raises(TypeError, match="lbfgs needs the extra 'value_fn'"):
        adapt(inner)
    with (
        inner_loop(module, fo.sgd(0.1)) as inner,
        pytest.raises(TypeError, match="got the extra 'value_fn', which not"),
    ):
        inner.step(inner(TASK.x).sum(), value_fn=len)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap], ids=["grad", "vmap"])
def test_inside_of_transforms_torch_says_what_to_do(transform):
    def adapt_at(lr):
        return outer_loss(adapted(module, fo.sgd(lr)))

    module, lr = make(), torch.full((3,), 0.1) if transform is torch.vmap else torch.tensor(0.1)
    with pytest.raises(RuntimeError, match="inside of a function being transformed by a functorch transform"):
        transform(adapt_at)(lr)
