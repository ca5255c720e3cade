"""Bad input: an error that names the mistake, the path, and the call that would be right."""

from typing import NamedTuple

import pytest
import torch

import functorch_optim as fo

pytestmark = pytest.mark.smoke


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


PARAMS = {"a": {"w": ones(2), "b": ones(3)}, "c": [ones(1)]}


def like_params(**changed):
    return {**PARAMS, **changed}


class MeanState(NamedTuple):
    mean: torch.Tensor


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a": PARAMS["a"]}, "'c' is missing from updates"),
        (like_params(d=ones(1)), "'d' is missing from params"),
        (like_params(a={"w": ones(2)}), "'a.b' is missing from updates"),
        (like_params(c=(ones(1),)), "at 'c', params has a list and updates has a tuple"),
        (like_params(c=ones(1)), "at 'c', params has a list and updates has a Tensor"),
        (like_params(c=[ones(2)]), r"updates have shape \(2,\) .* at 'c.0', but the parameter there has shape \(1,\)"),
        (like_params(c=[ones(1).float()]), r"dtype torch.float32 at 'c.0', but the parameter .*float64"),
        (like_params(c=[1.0]), "updates have a float at 'c.0', not a tensor"),
    ],
)
def test_updates_that_do_not_match(updates, message):
    tx = fo.sgd(0.1)
    with pytest.raises((ValueError, TypeError), match=message):
        tx.update(updates, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (like_params(c=[torch.ones(1, dtype=torch.int64)]), "parameter at 'c.0' has dtype torch.int64.*float()"),
        (like_params(c=[True]), "parameter at 'c.0' is a bool, not a tensor"),
    ],
)
def test_parameters_that_cannot_be_optimized(params, message):
    with pytest.raises(TypeError, match=message):
        fo.adam().init(params)


def test_a_rule_that_changes_nothing_has_the_name_of_its_factory():
    tx, state = fo.chain(fo.identity(), fo.sgd(0.1)), fo.adam().init(PARAMS)[1]
    with pytest.raises(ValueError, match="state of identity is a ScaleByAdamState"):
        tx.update(PARAMS, (state, tx.init(PARAMS)[1]), PARAMS)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (fo.sgd(0.1).init(PARAMS), r"state should be a tuple of 3, but it is a tuple of 2"),
        (fo.named_chain(a=fo.scale(1.0)).init(PARAMS), "state should be a tuple of 3, but it is a dict with the keys"),
        (None, "state should be a tuple of 3, but it is a NoneType"),
        (fo.adadelta().init(PARAMS), "state of scale_by_adam is a ScaleByAdadeltaState: it belongs to another"),
        (fo.adam(amsgrad=True).init(PARAMS), "state of scale_by_adam is a ScaleByAMSGradState"),
        (fo.chain(fo.identity(), fo.scale_by_adam(), fo.scale(1.0)).init(PARAMS), "_decayed_weights is a EmptyState"),
        (fo.adam().init({"a": ones(1)}), "'c' is missing from the state's exp_avg"),
        (fo.adam().init(like_params(c=[ones(7)])), r"state's exp_avg .* shape \(7,\) .* at 'c.0'.*\(1,\)"),
    ],
)
def test_states_of_others(state, message):
    with pytest.raises(ValueError, match=message):
        fo.adam().update(PARAMS, state, PARAMS)


def test_states_of_other_named_parts():
    with pytest.raises(ValueError, match=r"dict with the keys \['a'\].*dict with the keys \['b'\]"):
        fo.named_chain(a=fo.scale(1.0)).update(PARAMS, fo.named_chain(b=fo.scale(1.0)).init(PARAMS))


def test_missing_parameters():
    tx = fo.adamw(0.1)
    with pytest.raises(
        ValueError, match=r"add_decayed_weights needs the parameters.*tx.update\(updates, state, params\)"
    ):
        tx.update(PARAMS, tx.init(PARAMS))
    without_decay = fo.adamw(0.1, weight_decay=0)
    without_decay.update(PARAMS, without_decay.init(PARAMS))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": True}, "labels do not fit the parameters: at the root"),
        ({"a": {"w": True}, "c": True}, r"at 'a' they have \['w'\] where the parameters have \['b', 'w'\]"),
        ({"a": True, "c": [True, True]}, "at 'c' they have"),
        ({"a": True, "c": "yes"}, "label 'yes' at 'c.0' is unknown; known are True, False"),
        (lambda params: {"a": True, "c": 2}, "label 2 at 'c.0' is unknown"),
    ],
)
def test_masks_that_do_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        fo.masked(fo.sgd(0.1), mask).init(PARAMS)


def test_labels_that_nothing_is_for():
    tx = fo.partition({"x": fo.sgd(0.1)}, {"a": "x", "c": ["y"]})
    with pytest.raises(ValueError, match="label 'y' at 'c.0' is unknown; known are 'x'"):
        tx.init(PARAMS)


def test_rules_that_change_shapes():
    sums = fo.leafwise(None, lambda g, state, p, s: (g.sum(), state))
    with pytest.raises(ValueError, match=r"update after .* has shape \(\) at 'a.b', but the one before has \(3,\)"):
        sums.update(PARAMS, sums.init(PARAMS))


def test_tree_transformations_that_change_trees():
    tx = fo.stateless(lambda updates, params: updates["a"])
    with pytest.raises(ValueError, match="the updates from stateless and updates do not match: 'a' is missing"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.chain(fo.sgd), TypeError, r"not a GradientTransformation; call it: chain\("),
        (lambda: fo.chain(fo.sgd(0.1), 3), TypeError, "3 is not a GradientTransformation; as in: chain"),
        (lambda: fo.named_chain(fo.sgd(0.1)), TypeError, "pairs of name and transformation"),
        (lambda: fo.named_chain(("a", fo.sgd(0.1)), a=fo.sgd(0.1)), ValueError, "name 'a' is given twice"),
        (lambda: fo.masked(fo.sgd, True), TypeError, "not a GradientTransformation; call it: masked"),
        (lambda: fo.partition({"a": fo.sgd}, "a"), TypeError, "not a GradientTransformation; call it: partition"),
        (lambda: fo.GradientTransformation(None, None), TypeError, "needs two functions, but init is a NoneType"),
        (lambda: fo.leaf_state(dict), TypeError, "must be a NamedTuple, got dict"),
        (lambda: fo.leaf_state(fo.StepState), TypeError, "has a field 'step', but the step is counted"),
        (lambda: fo.scale_by_schedule(0.1), TypeError, r"needs a function of the step, got 0.1; write scale\(0.1\)"),
        (lambda: fo.scale(float("nan")), ValueError, "Invalid factor: nan"),
        (lambda: fo.scale_by_learning_rate(-1.0), ValueError, "Invalid learning rate: -1.0; it needs value >= 0"),
        (lambda: fo.sgd(float("nan")), ValueError, "Invalid learning rate: nan"),
        (lambda: fo.sgd(momentum=-0.1), ValueError, "Invalid momentum value: -0.1"),
        (lambda: fo.sgd(weight_decay=-0.1), ValueError, "Invalid weight_decay value: -0.1"),
        (lambda: fo.sgd(nesterov=True), ValueError, "Nesterov momentum requires a momentum and zero dampening"),
        (lambda: fo.sgd(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "Nesterov momentum requires"),
        (lambda: fo.sgd(lr="0.1"), TypeError, "Invalid learning rate: '0.1' is a str; give a number, a 0-dim tensor"),
        (
            lambda: fo.adam(betas=(1.0, 0.9)),
            ValueError,
            "Invalid beta parameter at index 0: 1.0; it needs 0 <= value < 1",
        ),
        (lambda: fo.adam(betas=(0.9, -0.1)), ValueError, "Invalid beta parameter at index 1: -0.1"),
        (lambda: fo.adam(betas=0.9), ValueError, "Invalid betas: 0.9; give 2 numbers"),
        (lambda: fo.adam(eps=-1.0), ValueError, "Invalid epsilon value: -1.0"),
        (lambda: fo.adadelta(rho=1.1), ValueError, "Invalid rho value: 1.1"),
        (lambda: fo.adadelta(eps=-1.0), ValueError, "Invalid epsilon value: -1.0"),
        (lambda: fo.clip(-1.0), ValueError, "Invalid clip_value: -1.0"),
        (lambda: fo.clip_by_norm(-1.0), ValueError, "Invalid max_norm: -1.0"),
        (lambda: fo.clip_by_norm(1.0, 0.0), ValueError, "Invalid norm_type: 0.0; it needs value > 0"),
        (lambda: fo.clip_by_global_norm(1.0, eps=-1.0), ValueError, "Invalid eps: -1.0"),
        (lambda: fo.clip_by_global_norm(1.0, nonfinite="warn"), ValueError, "choose 'propagate', 'skip' or 'raise'"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_updates_that_cannot_be_applied():
    with pytest.raises(ValueError, match="'c' is missing from updates"):
        fo.apply_updates(PARAMS, {"a": PARAMS["a"]})
    with pytest.raises(ValueError, match=r"updates have shape \(2,\) .* at 'c.0'"):
        fo.apply_updates(PARAMS, like_params(c=[ones(2)]))


def test_saved_states_of_others():
    state = fo.trace(0.9).init({"w": ones(2)})
    with pytest.raises(ValueError, match="the state has 'momentum_buffer.w', which the saved one lacks"):
        fo.load_state_dict(state, {"step": state.step})
    with pytest.raises(ValueError, match="the saved state has 'exp_avg.w', which this one lacks"):
        fo.load_state_dict(state, {**fo.state_dict(state), "exp_avg.w": ones(2)})
    with pytest.raises(ValueError, match=r"saved 'momentum_buffer.w' has shape \(3,\), but the state's has \(2,\)"):
        fo.load_state_dict(state, {**fo.state_dict(state), "momentum_buffer.w": ones(3)})


def test_a_missing_subtree_is_named():
    params = {"a": {"x": ones(1), "y": ones(1)}, "b": ones(1)}
    tx = fo.masked(fo.scale(100.0), {"a": True, "b": False})
    with pytest.raises(ValueError, match="at 'a', params has a dict and updates has a NoneType"):
        tx.update({"a": None, "b": ones(1)}, tx.init(params), params)


def test_masks_of_tensors_are_refused():
    with pytest.raises(TypeError, match="label at 'a' is a tensor; masks and labels are python values"):
        fo.masked(fo.sgd(0.1), {"a": torch.tensor(True)}).init({"a": ones(1)})


def test_states_of_other_dtypes():
    params = {"w": ones(2)}
    for tx in (fo.trace(0.9), fo.scale_by_adam()):
        state = tx.init({"w": ones(2).float()})
        with pytest.raises(ValueError, match="has shape .* dtype torch.float32 at 'w', but the update .*float64"):
            tx.update(params, state)
    precise = fo.tree.map(torch.Tensor.float, fo.trace(0.9).init({"w": ones(2).bfloat16()}).momentum_buffer)
    state = fo.trace(0.9).init({"w": ones(2).bfloat16()})._replace(momentum_buffer=precise)
    updates, state = fo.trace(0.9).update({"w": ones(2).bfloat16()}, state)
    assert state.momentum_buffer["w"].dtype == torch.float32
    assert updates["w"].dtype == torch.bfloat16


def test_batched_states_outside_of_vmap():
    state = torch.vmap(fo.adam().init)({"w": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"step in the state of .* has shape \(3,\)"):
        fo.adam().update({"w": torch.ones(3, 2)}, state)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda g, state, p, s: g, r"rule of <lambda> must return a pair, \(update, state\), but it returned"),
        (lambda g, state, p, s: (g,), r"rule of <lambda> must return a pair, \(update, state\), but it returned"),
        (lambda g, state, p, s: (g, state, 1), r"rule of <lambda> must return a pair, \(update, state\), but it ret"),
        (lambda g, state, p, s: (g, ()), r"must return a state like .* with mean, but it returned \(\)"),
        (lambda g, state, p, s: (g, (g, g)), r"must return a state like .* with mean, but it returned \("),
        (lambda g, state, p, s: (g, None), "must return a state like .* with mean, but it returned None"),
    ],
)
@pytest.mark.parametrize("params", [{"a": ones(1)}, {"a": ones(1), "b": ones(2)}], ids=["one", "several"])
def test_rules_that_return_something_else(update, message, params):
    tx = fo.leafwise(MeanState, update, elementwise=True)
    with pytest.raises(TypeError, match=message):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("update", "found"),
    [
        (lambda updates, state, params: updates, "a dict"),
        (lambda updates, state, params: (updates, state, 1), "a tuple of 3"),
        (lambda updates, state, params: None, "a NoneType"),
    ],
)
def test_functions_of_trees_that_return_something_else(update, found):
    tx, params = fo.GradientTransformation(lambda params: (), update), {"a": ones(1), "b": ones(2)}
    with pytest.raises(TypeError, match=rf"update of <lambda> must return a pair, \(updates, state\).* {found}$"):
        tx.update(params, tx.init(params), params)


def test_modules_are_not_trees():
    model = torch.nn.Linear(2, 2)
    for thing in (model, model.parameters()):
        with pytest.raises(TypeError, match=r"parameter at 'the root' is a .*params_of\(model\)"):
            fo.adam().init(thing)


def test_paths_that_collide():
    state = fo.trace(0.9).init({"a.b": ones(1), "a": {"b": ones(1)}})
    with pytest.raises(ValueError, match="Two tensors of the state have the path 'momentum_buffer.a.b'"):
        fo.state_dict(state)


def test_a_gradient_for_a_parameter_that_is_not_there():
    with pytest.raises(ValueError, match="updates have a tensor at 'b', but the parameter there is None"):
        fo.sgd(0.1).update({"a": ones(1), "b": ones(1)}, fo.sgd(0.1).init({"a": ones(1)}), {"a": ones(1), "b": None})


@pytest.mark.parametrize("lr", [torch.tensor(True), torch.tensor(1j)])
def test_tensors_that_are_no_real_numbers(lr):
    with pytest.raises(TypeError, match="Invalid learning rate: a tensor of dtype torch.(bool|complex64)"):
        fo.sgd(lr)


def test_parameters_that_were_not_there_at_init():
    for tx in (fo.adam(0.1), fo.leafwise(MeanState, lambda g, state, p, s: (g, state))):
        with pytest.raises(ValueError, match="for .* has nothing at 'a': the parameter was None or masked out"):
            tx.update({"a": ones(1)}, tx.init({"a": None}), {"a": ones(1)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fo.nadam(momentum_decay=-1.0), "Invalid momentum_decay value: -1.0; it needs value >= 0"),
        (lambda: fo.adagrad(lr_decay=-1.0), "Invalid lr_decay value: -1.0"),
        (lambda: fo.adagrad(lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda: fo.adagrad(initial_accumulator_value=-1.0), "Invalid initial_accumulator_value value: -1.0"),
        (lambda: fo.rmsprop(alpha=-1.0), "Invalid alpha value: -1.0"),
        (lambda: fo.rmsprop(momentum=-1.0), "Invalid momentum value: -1.0"),
        (lambda: fo.rprop(etas=(0.5, 0.9)), "Invalid etas at index 1: 0.9; it needs value > 1"),
        (lambda: fo.rprop(etas=(1.5, 1.9)), "Invalid etas at index 0: 1.5; it needs 0 < value < 1"),
        (lambda: fo.rprop(step_sizes=0.1), r"Invalid step_sizes: 0.1; give 2 numbers, as in step_sizes=\(1e-6, 50.0\)"),
        (lambda: fo.asgd(lambd=-1.0), "Invalid lambd value: -1.0"),
        (lambda: fo.adafactor(beta2_decay=0.1), "Invalid beta2_decay: 0.1; it needs value <= 0"),
        (lambda: fo.adafactor(eps=1e-3), r"Invalid eps: 0.001; give a pair, as in eps=\(None, 1e-3\)"),
        (lambda: fo.adafactor(eps=(-1.0, 1e-3)), "Invalid epsilon1: -1.0"),
        (lambda: fo.adafactor(d=0.5), "Invalid clipping threshold d: 0.5; it needs value >= 1"),
        (lambda: fo.muon(ns_steps=100), "Invalid ns_steps: 100; torch.optim.Muon takes less than 100"),
        (lambda: fo.muon(ns_coefficients=(1.0, 2.0)), r"Invalid ns_coefficients: \(1.0, 2.0\); give 3 numbers"),
        (
            lambda: fo.muon(adjust_lr_fn="other"),
            "Invalid adjust_lr_fn: 'other'; choose 'original', 'match_rms_",
        ),
        (lambda: fo.muon(eps=0.0), "Invalid epsilon value: 0.0; it needs value > 0"),
        (lambda: fo.leafwise(None, lambda *_: None, carry=tuple), "carry needs scalars"),
    ],
)
def test_bad_arguments_of_further_optimizers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parameters_that_a_rule_cannot_take():
    with pytest.raises(ValueError, match=r"At 'a.b': Muon is for matrices, but this parameter has shape \(3,\)"):
        fo.muon().init(PARAMS)
    with pytest.raises(TypeError, match="At 'a.b': Adafactor does not support complex parameters"):
        fo.adafactor().init({"a": {"b": torch.ones(2, dtype=torch.complex64)}})
    opt = fo.Optimizer([torch.ones(3)], fo.muon)
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"At '0': Muon is for matrices"):
        opt.step()


def test_names_in_trees():
    state = fo.chain(fo.trace(0.9), fo.trace(0.5)).init(PARAMS)
    with pytest.raises(KeyError, match="Nothing in the tree bears the name 'exp_avg'; names in it are 0, step"):
        fo.tree.get(state, "exp_avg")
    with pytest.raises(KeyError, match="2 nodes bear the name 'momentum_buffer': 0.momentum_buffer, 1.momentum_buffer"):
        fo.tree.get(state, "momentum_buffer")
    assert fo.tree.get(state[0], "momentum_buffer") is state[0].momentum_buffer
