"""Steps that fail: the errors, and that everything is left as it was."""

import pytest
import torch
from catalogue import make_params
from step_cases import WAYS, assert_untouched, not_vectors, snapshot, ways

import functorch_optim as fo

pytestmark = pytest.mark.smoke


def raising(g, state, p, s):
    raise ValueError("no")


def dropping(g, state, p, s):
    return g.sum(), state


def failing_at(step):
    if step > 1:
        raise ValueError("too late")
    return 0.1


def wrong_shape(grads):
    grads["rest"][0] = torch.ones(7)


def wrong_dtype(grads):
    grads["rest"][0] = grads["rest"][0].float()


ERRORS = {
    "shape": (fo.adam, wrong_shape, {}, "the updates have shape \\(7,\\) and dtype torch.float32 at 'rest.0'"),
    "dtype": (fo.adam, wrong_dtype, {}, "the updates have shape \\(3,\\) and dtype torch.float32 at 'rest.0'"),
    "structure": (fo.adam, lambda grads: grads.pop("rest"), {}, "rest"),
    "extra": (fo.adam, lambda grads: None, {"value": 1.0}, "got the extra 'value', which nothing in the chain"),
    "missing_extra": (lambda: fo.chain(fo.sgd(0.1), fo.lbfgs(line_search_fn="strong_wolfe")), None, {}, "value_fn"),
    "rule": (lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, raising, elementwise=True)), None, {}, "no"),
    "whole": (lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, raising), fo.sgd(0.1)), None, {}, "no"),
    "kept": (lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, dropping)), None, {}, "has shape \\(\\) at"),
    "kept_in_blocks": (
        lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, dropping, elementwise=True)),
        None,
        {},
        "keep",
    ),
    "schedule": (lambda: fo.adam(lambda step: failing_at(step + 2)), None, {}, "too late"),
    "one_part": (
        lambda: fo.partition({True: fo.adam(0.1), False: fo.leafwise(None, raising, elementwise=True)}, not_vectors),
        None,
        {},
        "no",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@ways
def test_errors_leave_everything_as_it_was(name, way, compiled):
    make, spoil, extras, message = ERRORS[name]
    tx, params = make(), make_params()
    state, grads = tx.init(params), fo.tree.map(torch.randn_like, params)
    if spoil is not None:
        spoil(grads)
    before = snapshot(params, state, grads)
    with pytest.raises((TypeError, ValueError), match=message):
        fo.step_(tx, grads, state, params, **WAYS[way], **extras)
    with pytest.raises((TypeError, ValueError), match=message):
        fo.step(tx, grads, state, params, **extras)
    assert_untouched(before)


def test_states_and_parameters_that_do_not_fit():
    tx, params = fo.adam(0.1), make_params()
    grads = fo.tree.map(torch.randn_like, params)
    with pytest.raises(ValueError, match="needs the parameters: params, state = step\\(tx, grads, state, params\\)"):
        fo.step(tx, grads, tx.init(params), None)
    with pytest.raises(ValueError, match="needs the parameters"):
        fo.step_(tx, grads, tx.init(params), None)
    with pytest.raises(TypeError, match=r"^adam is not a GradientTransformation; call it: step\(sgd\(0.1\), grads"):
        fo.step(fo.adam, grads, tx.init(params), params)
    other = fo.sgd(0.1, momentum=0.9).init(params)
    before = snapshot(params, other)
    with pytest.raises(ValueError, match="belongs to another transformation|another"):
        fo.step_(tx, grads, other, params)
    expanded = {**params, "rest": [torch.ones(1, dtype=torch.float64).expand(3)]}
    with pytest.raises(RuntimeError, match="Elements of the parameter 'rest.0' share memory"):
        fo.step_(tx, grads, tx.init(params), expanded)
    tied = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(0), "d": torch.ones(0)}
    tied["b"] = tied["a"].view(3)
    with pytest.raises(RuntimeError, match="The parameters 'a' and 'b' share memory, so that both of their updates"):
        fo.step_(tx, fo.tree.map(torch.ones_like, tied), tx.init(tied), tied)
    moved, _ = fo.step_(fo.sgd(1.0), {**tied, "b": None}, fo.sgd(1.0).init(tied), tied)
    assert moved["b"].tolist() == [0.0, 0.0, 0.0]  # one update for both is no mistake
    assert_untouched(before)


@pytest.mark.parametrize("change", [lambda state: (*state, torch.ones(1)), lambda state: state[0]])
def test_a_state_that_changes_its_structure(change):
    tx = fo.GradientTransformation(
        lambda params: (torch.ones(1),), lambda updates, state, params: (updates, change(state))
    )
    tx, params = fo.chain(tx, fo.sgd(0.1, momentum=0.9)), {"w": torch.ones(2)}
    state = tx.init(params)
    before = snapshot(params, state)
    with pytest.raises(ValueError, match="the next state and the one given do not match: .*'0"):
        fo.step_(tx, params, state, params)
    assert_untouched(before)


def test_fused_and_foreach_contradict_each_other():
    tx, params = fo.sgd(0.1), {"w": torch.ones(2)}
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        fo.step_(tx, params, tx.init(params), params, fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        fo.Optimizer([torch.ones(2, requires_grad=True)], tx, fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        fo.Optimizer([torch.ones(2, requires_grad=True)], tx, fused=True, differentiable=True)
    assert torch.equal(params["w"], torch.ones(2))
