"""Numbers that are one for all parameters of an fo.Optimizer, whichever of them have a gradient at a step."""

import copy
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

import functorch_optim as fo

FALLING = fo.schedules.linear(1.0, 0.1, 6)


class Largest(NamedTuple):
    largest: torch.Tensor


class Nothing(NamedTuple):
    pass


def of_the_step():
    """Carry on a number that depends on the step, as corrections of bias do."""

    def scalars(step, carried, *, updates):
        largest = carried.largest / step + max([float(g.abs().max()) for g in updates])
        return largest, Largest(largest)

    return fo.leafwise(
        fo.leaf_state(Nothing, Largest),
        lambda g, state, p, s: (-g / s, state),
        scalars,
        carry=lambda: Largest(0.0),
        elementwise=True,
    )


TRANSFORMATIONS = {
    "prodigy": fo.prodigy(d0=0.1),
    "prodigy, scheduled": fo.prodigy(FALLING, d0=0.1),
    "prodigy, injected": fo.inject_hyperparams(fo.prodigy)(lr=FALLING, d0=0.1),
    "prodigy, guarded": fo.apply_if_finite(fo.prodigy(d0=0.1)),
    "prodigy, two": fo.partition({"a": fo.prodigy(d0=0.1), "b": fo.prodigy(d0=0.5)}, ["a", "b", "a"]),
    "dadapt_adam": fo.dadapt_adam(d0=0.1),
    "dadapt_sgd": fo.dadapt_sgd(d0=0.1),
    "dog": fo.dog(reps_rel=0.1),
    "dowg": fo.dowg(),
    "momo": fo.momo(0.5),
    "momo_adam": fo.momo_adam(0.5),
    "adai": fo.adai(0.1),
    "zclip": fo.chain(fo.zclip(warmup_steps=2, max_grad_norm=None), fo.sgd(0.1)),
    "zclip, scheduled": fo.chain(fo.zclip(z_thresh=FALLING, warmup_steps=2, max_grad_norm=None), fo.sgd(0.1)),
    "of the step": fo.chain(of_the_step(), fo.scale_by_learning_rate(0.1)),
    "accumulate": fo.accumulate(fo.sgd(0.1), 2),
    "accumulate, clipped": fo.accumulate(fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.1)), 3),
    "accumulate, prodigy": fo.accumulate(fo.prodigy(d0=0.1), 2),
    "skip": fo.skip(fo.sgd(0.1), lambda step: step % 3 == 0),
}
each = pytest.mark.parametrize("name", TRANSFORMATIONS)

# No parameter has all of its gradients, so that none has had all updates of the tree.
GRADIENTS = [
    (1.0, None, None),
    (None, 3.0, None),
    (2.0, None, 1.0),
    (None, 4.0, None),
    (1.0, None, 5.0),
    (30.0, 20.0, None),
    (1.0, 2.0, 3.0),
]
KEYS = (
    "d",
    "d_max",
    "d_numerator",
    "num_norms",
    "mean",
    "var",
    "mean_exp_avg_sq",
    "rbar",
    "loss_avg",
    "largest",
    "mini_step",
)


def tensor(x):
    return None if x is None else torch.tensor([x], dtype=torch.float64)


def extras(name):
    return {"value": 3.0} if "momo" in name else {}


def functional(tx, rows, **extra):
    params = [tensor(x) for x in (1.0, 2.0, 3.0)]
    state = tx.init(params)
    for row in rows:
        params, state = fo.step(tx, [tensor(g) for g in row], state, params, **extra)
    return params


def make(tx, values=(1.0, 2.0, 3.0)):
    params = [torch.nn.Parameter(tensor(x)) for x in values]
    return params, fo.Optimizer(params, tx)


def drive(params, opt, rows, **extra):
    for row in rows:
        for p, g in zip(params, row, strict=True):
            p.grad = tensor(g)
        opt.step(**extra)
    return [p.detach() for p in params]


def exchanging(name, exchange):
    """Exchange the numbers of all parameters before each step."""
    params, opt = make(TRANSFORMATIONS[name])
    for row in GRADIENTS:
        for own in opt.state.values():
            numbers = {key: value for key, value in own.items() if torch.is_tensor(value) and value.ndim == 0}
            own.update({key: exchange(value) for key, value in numbers.items()})
        moved = drive(params, opt, [row], **extras(name))
    return moved


@each
def test_missing_gradients_give_the_numbers_of_the_functional_form(name):
    tx, extra = TRANSFORMATIONS[name], extras(name)
    for count in range(1, len(GRADIENTS) + 1):
        assert drive(*make(tx), GRADIENTS[:count], **extra) == functional(tx, GRADIENTS[:count], **extra)


def test_mini_steps_without_any_gradient_of_those_that_are_accumulated_count_in_the_functional_form_alone():
    tx = fo.masked(TRANSFORMATIONS["accumulate"], [True, True, False])
    without, other = (None, None, 1.0), (1.0, None, 1.0)
    assert drive(*make(tx), [other, without, other])[:2] == drive(*make(tx), [other, other])[:2]
    assert functional(tx, [other, without])[:2] == functional(tx, [other])[:2]
    assert functional(tx, [other, without, other])[:2] == functional(tx, [other])[:2]


@pytest.mark.parametrize("name", sorted(TRANSFORMATIONS.keys() - {"prodigy, two"}))
def test_all_parameters_show_the_same_after_each_step(name):
    params, opt = make(TRANSFORMATIONS[name])
    for row in GRADIENTS:
        drive(params, opt, [row], **extras(name))
        for one, other in pairwise(opt.state.values()):
            assert {key: one[key] for key in KEYS if key in one} == {key: other[key] for key in KEYS if key in other}


@each
def test_they_go_on_in_checkpoints_and_copies(name):
    tx, extra = TRANSFORMATIONS[name], extras(name)
    expected = functional(tx, GRADIENTS, **extra)
    for stop in range(1, len(GRADIENTS)):
        params, opt = make(tx)
        values = drive(params, opt, GRADIENTS[:stop], **extra)
        again, other = make(tx, [float(p) for p in values])
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        assert drive(again, other, GRADIENTS[stop:], **extra) == expected
        again, other = copy.deepcopy((params, opt))
        assert drive(again, other, GRADIENTS[stop:], **extra) == expected


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_differentiable_steps_share_them_too():
    given = [tensor(x).requires_grad_() for x in (1.0, 2.0, 3.0)]
    opt = fo.Optimizer([x.clone() for x in given], fo.prodigy(d0=0.1), differentiable=True)
    moved = drive(opt.param_groups[0]["params"], opt, GRADIENTS)
    torch.testing.assert_close(moved, functional(fo.prodigy(d0=0.1), GRADIENTS))
    assert len({own["d"].item() for own in opt.state.values()}) == 1


def test_a_factory_shares_them_within_a_group():
    params = [torch.nn.Parameter(tensor(x)) for x in (1.0, 2.0, 3.0)]
    opt = fo.Optimizer([{"params": params[:2]}, {"params": params[2:]}], fo.prodigy, d0=0.1)
    drive(params, opt, GRADIENTS)
    a, b, c = (float(opt.state[p]["d"]) for p in params)
    assert a == b != c


def test_a_parameter_whose_state_is_dropped_takes_them_from_the_others():
    params, opt = make(fo.prodigy(d0=0.1))
    drive(params, opt, GRADIENTS)
    d = float(opt.state[params[1]]["d"])
    del opt.state[params[0]]
    drive(params, opt, [(1.0, None, None)])
    assert float(opt.state[params[0]]["d"]) == float(opt.state[params[1]]["d"]) >= d > 0.1


@pytest.mark.parametrize("key", ["d", "step"])
@pytest.mark.parametrize("number", [2, 2.0])
def test_a_python_number_that_a_program_sets_counts_as_a_tensor_does(key, number):
    moved = []
    for value in (number, torch.tensor(2.0, dtype=torch.float64)):
        params, opt = make(fo.prodigy(d0=0.1))
        drive(params, opt, [(1.0, 2.0, 3.0)])
        for own in opt.state.values():
            own[key] = value
        moved.append(drive(params, opt, [(1.0, 2.0, 3.0), (3.0, 1.0, 2.0)]))
    assert moved[0] == moved[1]


@each
def test_python_numbers_of_the_same_value_change_nothing(name):
    assert exchanging(name, torch.Tensor.item) == functional(TRANSFORMATIONS[name], GRADIENTS, **extras(name))


@each
def test_numbers_of_inference_mode_change_nothing(name):
    """They can be written in that mode alone."""
    clone = torch.inference_mode()(torch.clone)
    assert exchanging(name, clone) == functional(TRANSFORMATIONS[name], GRADIENTS, **extras(name))


def test_parameters_that_a_gate_lets_through_at_different_steps_share_them():
    """The first makes a step alone: the others have no gradient at the last mini-step."""
    params, opt = make(fo.accumulate(fo.prodigy(d0=0.1), 2))
    drive(params, opt, [(1.0, 1.0, 1.0), (1.0, None, None), *[(1.0, 1.0, 1.0)] * 5])
    for key in ("d", "d_max", "d_numerator", "k", "step"):
        assert len({float(own[key]) for own in opt.state.values()}) == 1
    assert float(opt.state[params[0]]["step"]) == 3.0


def test_states_saved_when_each_parameter_kept_its_own_go_on_with_those_of_the_most_updates():
    tx = TRANSFORMATIONS["zclip, scheduled"]
    params, opt = make(tx)
    values = drive(params, opt, [(1.0, 1.0, 1.0), (1.0, None, 2.0), (2.0, None, None)])
    saved = copy.deepcopy(opt.state_dict())
    for own in saved["state"].values():
        del own["step.1"]  # there was no step of the tree
    saved["state"][1]["mean"] = torch.tensor(7.0, dtype=torch.float64)  # as it was after its last update
    again, other = make(tx, [float(p) for p in values])
    other.load_state_dict(saved)
    rows = [(None, 1.0, None), (None, None, 3.0), (1.0, 2.0, 30.0)]
    assert drive(again, other, rows) == drive(params, opt, rows)
    for p, q in zip(params, again, strict=True):
        assert other.state[q] == opt.state[p]


M = torch.nn.Linear(2, 2)
GUARDED = {
    "frozen": lambda: fo.frozen(fo.adamw(0.1), M, "bias"),
    "masked": lambda: fo.masked(fo.adamw(0.1), {"weight": True, "bias": False}),
    "partition": lambda: fo.partition({"a": fo.adamw(0.1), "b": fo.set_to_zero()}, {"weight": "a", "bias": "b"}),
    "quantized": lambda: fo.quantized(fo.adamw(0.1)),
    "offload": lambda: fo.offload(fo.adamw(0.1)),
}


@pytest.mark.parametrize("name", GUARDED)
def test_a_guard_around_a_transformation_of_some_parameters_resumes(name):
    """The guard is for all parameters, and counts no steps."""

    def prepared(model):
        opt = fo.Optimizer(model.named_parameters(), fo.apply_if_finite(GUARDED[name]()))
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        return opt

    opt = prepared(M)
    opt.step()
    resumed = prepared(M)
    resumed.load_state_dict(opt.state_dict())
    M.bias.grad = None
    resumed.step()
    M.weight.data = M.weight.data.clone()
    M.bias.grad = torch.full_like(M.bias, torch.nan)
    resumed.step()
    assert {float(own["total_notfinite"]) for own in map(resumed.state.get, M.parameters())} == {3.0}
