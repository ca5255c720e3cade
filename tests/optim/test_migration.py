"""From one chain, mask or partition to another: what fits is loaded, and the report says what was and what was not."""

import pytest
import torch
from torch import nn

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


def labelled(frozen):
    def labels(params):
        return {name: "keep" if name in frozen else "train" for name in params}

    return fo.partition({"train": fo.adamw(0.1), "keep": fo.set_to_zero()}, labels)


def make_params():
    return {"body": torch.tensor([1.0, 2.0]), "head": torch.tensor([3.0])}


def grads_at(params, t):
    return {name: torch.cos(p + t) for name, p in params.items()}


def train(tx, params, state, steps):
    for t in steps:
        params, state = fo.step(tx, grads_at(params, t), state, params)
    return params, state


def train_optimizer(opt, named, steps):
    for t in steps:
        for p in named.values():
            p.grad = torch.cos(p.detach() + t)
        opt.step()


def make_optimizer(tx, **hyperparameters):
    named = {name: nn.Parameter(p.clone()) for name, p in make_params().items()}
    return named, fo.Optimizer(named.items(), tx, **hyperparameters)


def test_unfreezing_a_functional_training():
    tx, params = labelled(["body"]), make_params()
    params, state = train(tx, params, tx.init(params), range(3))
    assert torch.equal(params["body"], make_params()["body"])
    state, loaded = fo.migrate(labelled([]), state, params)
    assert loaded.begun == ("train.0.exp_avg.body", "train.0.exp_avg_sq.body")
    assert {"train.0.exp_avg.head", "train.0.step"} <= set(loaded.taken)
    assert loaded.left == ()
    after, _ = train(labelled([]), params, state, [3])
    # Adam, written down: the head goes on at step 4, the body has moments of zero at step 4.
    for name, before in (("head", [0, 1, 2]), ("body", [])):
        p, m, v = params[name], 0.0, 0.0
        history = make_params()[name]
        for t in before:
            g = torch.cos(history + t)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            rate = 0.1 / (1 - 0.9 ** (t + 1))
            history = history * (1 - 0.001) - rate * m / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        g = torch.cos(p + 3)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = p * (1 - 0.001) - 0.1 / (1 - 0.9**4) * m / ((v / (1 - 0.999**4)).sqrt() + 1e-8)
        torch.testing.assert_close(after[name], expected)


def test_unfreezing_an_optimizer():
    """Each parameter has a step of its own: the newcomer trains as with an optimizer of its own."""
    named, opt = make_optimizer(labelled(["body"]))
    train_optimizer(opt, named, range(3))
    loaded = opt.migrate(labelled([]))
    assert loaded.taken == ("head.exp_avg", "head.exp_avg_sq", "head.step")
    assert set(loaded.begun) == {"body.exp_avg", "body.exp_avg_sq", "body.step"}
    train_optimizer(opt, named, range(3, 6))
    alone = {name: nn.Parameter(p.clone()) for name, p in make_params().items()}
    for name, steps in (("head", range(6)), ("body", range(3, 6))):
        train_optimizer(torch.optim.AdamW([alone[name]], lr=0.1), {name: alone[name]}, steps)
        torch.testing.assert_close(named[name], alone[name])


def test_freezing_forgets():
    named, opt = make_optimizer(labelled([]))
    train_optimizer(opt, named, range(3))
    loaded = opt.migrate(labelled(["body"]))
    assert loaded.left == ("0.step", "0.exp_avg", "0.exp_avg_sq")
    body = named["body"].detach().clone()
    train_optimizer(opt, named, range(3, 5))
    assert torch.equal(named["body"], body)


def test_migrate_refuses():
    _, opt = make_optimizer(labelled([]))
    with pytest.raises(TypeError, match=r"is not a GradientTransformation; .*opt.migrate\(adamw\(1e-3, mask=mask\)\)"):
        opt.migrate(0.1)
    before = opt._transformation
    with pytest.raises(ValueError, match="The label 3 at 'body' is unknown; known are True, False"):
        opt.migrate(fo.masked(fo.sgd(0.1), {"body": 3, "head": True}))
    assert opt._transformation is before
    train_optimizer(opt, {}, [0])
    with pytest.raises(TypeError, match=r"has a factory, .*edit those: opt.param_groups\[0\]\['mask'\] = mask"):
        make_optimizer(fo.adam)[1].migrate(fo.adam(0.1))
    _, averaged = make_optimizer(fo.schedule_free(fo.sgd(0.1)))
    averaged.eval()
    with pytest.raises(RuntimeError, match="where they are to be evaluated: call opt.train"):
        averaged.migrate(fo.sgd(0.1))


# From one chain to another. -------------------------------------------------------------------------------------------

ADAM = fo.adam(0.1)
LONGER = fo.chain(fo.clip_by_global_norm(1e9), fo.trace(0.0), fo.adam(0.1))


def test_functional_states_by_parameter():
    params = make_params()
    params, state = train(ADAM, params, ADAM.init(params), range(3))
    saved = through_a_file(fo.state_dict(state, params))
    with pytest.raises(ValueError, match="lacks"):
        fo.load_state_dict(LONGER.init(params), saved, params)
    loaded, report = fo.load_state_dict(LONGER.init(params), saved, params, strict=False)
    assert set(report.begun) == {"1.momentum_buffer.body", "1.momentum_buffer.head", "1.step"}
    assert torch.equal(loaded[2][1].exp_avg["body"], state[1].exp_avg["body"])
    assert (int(loaded[2][1].step), int(loaded[1].step)) == (3, 0)
    expected = train(ADAM, params, state, range(3, 6))[0]
    torch.testing.assert_close(train(LONGER, params, loaded, range(3, 6))[0], expected)
    back, report = fo.load_state_dict(ADAM.init(params), fo.state_dict(loaded, params), params, strict=False)
    assert {"body.momentum_buffer", "head.momentum_buffer"} == set(report.left)
    torch.testing.assert_close(train(ADAM, params, back, range(3, 6))[0], expected)


def test_functional_states_by_path_take_a_rule_whole_or_not_at_all():
    params = make_params()
    state = train(ADAM, params, ADAM.init(params), range(3))[1]
    loaded, report = fo.load_state_dict(fo.nadam(0.1).init(params), fo.state_dict(state), strict=False)
    assert not any(path.startswith("1.") for path in report.taken)  # NAdam's product would be another step's
    assert torch.equal(loaded[1].exp_avg["body"], torch.zeros(2))
    assert "1.exp_avg.body" in report.left
    same, report = fo.load_state_dict(ADAM.init(params), fo.state_dict(state), strict=False)
    assert (report.begun, report.left) == ((), ())
    assert torch.equal(same[1].exp_avg["body"], state[1].exp_avg["body"])


def test_parameters_of_another_shape_begin_anew():
    params = make_params()
    state = train(ADAM, params, ADAM.init(params), range(3))[1]
    wider = {**params, "head": torch.ones(5), "new": torch.ones(1)}
    _, report = fo.load_state_dict(ADAM.init(wider), fo.state_dict(state, params), wider, strict=False)
    begun = {path for path in report.begun if path.startswith("1.")}
    assert begun == {f"1.{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in ("head", "new")}
    assert set(report.left) == {"head.exp_avg", "head.exp_avg_sq"}


def test_different_steps_cannot_be_shared():
    params = make_params()
    saved = fo.state_dict(ADAM.init(params), params)
    saved["state"]["head"]["step"] = torch.tensor(3)
    with pytest.raises(ValueError, match="The parameters are at different steps, or differ in step"):
        fo.load_state_dict(ADAM.init(params), saved, params, strict=False)


def test_optimizers_of_other_chains():
    named, opt = make_optimizer(ADAM)
    train_optimizer(opt, named, range(3))
    other_named, other = make_optimizer(LONGER)
    saved = through_a_file(opt.state_dict())
    with pytest.raises(ValueError, match="lacks 'momentum_buffer'"):
        other.load_state_dict(saved)
    assert not other.state
    report = other.load_state_dict(saved, strict=False)
    assert set(report.begun) == {"body.momentum_buffer", "head.momentum_buffer"}
    assert "body.exp_avg" in report.taken
    assert report.left == ()
    assert opt.load_state_dict(saved) is None
    for name, p in named.items():
        other_named[name].data.copy_(p)
    train_optimizer(opt, named, range(3, 6))
    train_optimizer(other, other_named, range(3, 6))
    for name, p in named.items():
        torch.testing.assert_close(other_named[name], p)


def test_optimizers_of_other_algorithms():
    """Nothing of Adam's fits SGD; its step is not SGD's either, and hyperparameters stay."""
    named, opt = make_optimizer(fo.adam, lr=0.1)
    train_optimizer(opt, named, range(3))
    _, other = make_optimizer(fo.sgd, lr=7.0, momentum=0.9)
    report = other.load_state_dict(opt.state_dict(), strict=False)
    assert not other.state
    assert report.taken == ()
    assert set(report.left) == {f"{n}.{key}" for n in named for key in ("step", "exp_avg", "exp_avg_sq")}
    assert other.param_groups[0]["lr"] == 7.0


def test_more_and_fewer_parameters_by_name():
    named, opt = make_optimizer(ADAM)
    train_optimizer(opt, named, range(3))
    new = nn.Parameter(torch.ones(1))
    other = fo.Optimizer([("new", new), ("module.head", named["head"])], ADAM)
    report = other.load_state_dict(opt.state_dict(), strict=False)
    assert list(other.state) == [named["head"]]
    assert torch.equal(other.state[named["head"]]["exp_avg"], opt.state[named["head"]]["exp_avg"])
    assert "module.head.exp_avg" in report.taken
    assert "new.exp_avg" in report.begun
    assert "body.exp_avg" in report.left
    with pytest.raises(ValueError, match=r"saved groups have \[2\] parameters and these \[1\], and without names"):
        fo.Optimizer([new], ADAM).load_state_dict(opt.state_dict(), strict=False)


def test_functions_of_the_whole_tree():
    tx = fo.chain(fo.reduce_on_plateau(patience=0), fo.sgd(0.1, 0.9))
    named, opt = make_optimizer(tx)
    for t in range(3):
        for p in named.values():
            p.grad = torch.ones_like(p)
        opt.step(value=torch.tensor(1.0 + t))
    longer = fo.chain(fo.reduce_on_plateau(patience=0), fo.trace(0.5), fo.sgd(0.1, 0.9))
    _, other = make_optimizer(longer)
    report = other.load_state_dict(through_a_file(opt.state_dict()), strict=False)
    assert other.state["transformation"]["0.0"].scale == opt.state["transformation"]["0.0"].scale < 1
    assert any(path.startswith("transformation.0.0.") for path in report.taken)
    _, without = make_optimizer(fo.sgd(0.1, 0.9))
    assert "transformation.0.0" in without.load_state_dict(opt.state_dict(), strict=False).left
    _, fresh = make_optimizer(fo.chain(fo.lbfgs(), fo.sgd(0.1, 0.9)))
    assert "transformation.0.0.step" in fresh.load_state_dict(opt.state_dict(), strict=False).begun


def test_a_state_of_the_whole_tree_that_was_taken_is_not_left_out():
    tx = fo.monitor(fo.sgd(0.1, 0.9))
    named, opt = make_optimizer(tx)
    train_optimizer(opt, named, range(2))
    _, other = make_optimizer(tx)
    for report in (other.load_state_dict(opt.state_dict(), strict=False), opt.migrate(fo.monitor(fo.sgd(0.1, 0.9)))):
        assert "transformation.0.0.grad_norm" in report.taken
        assert report.begun == report.left == ()


@pytest.mark.parametrize("saved", [True, False])
def test_a_step_of_the_tree_goes_on_where_the_steps_of_parameters_do(saved):
    """It may be missing: not all optimizers had one."""
    tx = fo.chain(fo.zclip(), fo.adam(0.1))
    named, opt = make_optimizer(tx)
    train_optimizer(opt, named, range(3))
    state_dict = opt.state_dict()
    if not saved:
        for own in state_dict["state"].values():
            del own["step.1"]
    other_named, other = make_optimizer(tx)
    report = other.load_state_dict(state_dict, strict=False)
    assert report.begun == report.left == ()
    train_optimizer(other, other_named, range(3, 4))
    assert {float(own["step.1"]) for own in other.state.values()} == {4.0}
