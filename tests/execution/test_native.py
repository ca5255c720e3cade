"""torch's own fused kernels: which classes use them and when, and that their numbers are torch's."""

import copy

import pytest
import torch
from torch_like_cases import CASES, WITH_FUSED, assert_same_state, by_case, deviation, gradient, pair, parameters, run

import functorch_optim as fo
from functorch_optim._execution import fused
from functorch_optim.testing._copies import through_a_file

KERNELS = {
    "SGD": "_fused_sgd_",
    "Adam": "_fused_adam_",
    "AdamW": "_fused_adamw_",
    "Adagrad": "_fused_adagrad_",
}
NATIVE = [(name, options) for name, options in CASES if name in WITH_FUSED]
cases = by_case(NATIVE)
each = pytest.mark.parametrize("name", KERNELS)
LR = {"lr": 0.1}


@pytest.fixture
def calls(monkeypatch):
    """List the calls of torch's kernels."""
    seen = []
    for name in KERNELS.values():
        kernel = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, n=name, k=kernel, **o: seen.append((n, args)) or k(*args, **o))
    return seen


def draw_params(dtype=torch.float64):
    """Draw parameters that torch's kernels take: all lie without gaps."""
    shapes = [(3, 4), (), (0, 2), (5,), (2, 3, 4, 2)]
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    params[0] = torch.randn(4, 3, dtype=dtype).t()
    params[-1] = params[-1].to(memory_format=torch.channels_last)
    return params


def steps(optimizer, count=4):
    for step in range(count):
        for p in parameters(optimizer):
            p.grad = gradient(p, step, 1.0)
        optimizer.step()


def make(name, params=None, **options):
    params = draw_params() if params is None else params
    return getattr(fo.optim, name)([p.requires_grad_() for p in params], **{**LR, **options})


# When. ----------------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("fused", [None, True])
def test_they_are_used(name, options, fused, calls):
    steps(make(name, **options, fused=fused))
    decoupled = options.get("decoupled_weight_decay", False)
    assert [called for called, _ in calls] == [KERNELS["AdamW" if decoupled else name]] * 4
    assert {len(args[0]) for _, args in calls} == {5}


TENSOR = torch.tensor(0.1, dtype=torch.float64)
NOT = {
    "not_fused": ("Adam", {"fused": False}),
    "foreach": ("Adam", {"foreach": True}),
    "not_foreach": ("SGD", {"foreach": False, "momentum": 0.9}),
    "differentiable": ("Adam", {"differentiable": True}),
}
TENSORS = {
    "decay": ("Adam", {"weight_decay": TENSOR}),
    "eps": ("Adagrad", {"eps": TENSOR}),
    "momentum": ("SGD", {"momentum": TENSOR}),
    "lr_decay": ("Adagrad", {"lr_decay": TENSOR}),
    "betas": ("Adam", {"betas": (TENSOR, TENSOR), "lr": TENSOR}),
}


@pytest.mark.parametrize("name", NOT)
def test_when_they_are_not_used(name, calls):
    kind, options = NOT[name]
    if name == "differentiable":
        params = [p.clone().requires_grad_().clone() for p in draw_params()]
        optimizer = getattr(fo.optim, kind)(params, **LR, differentiable=True)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    else:
        steps(make(kind, **options))
    assert not calls


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_numbers_to_them(name, calls):
    """Each is read again at every step."""
    kind, options = TENSORS[name]
    optimizers = make(kind), make(kind)
    for p, q in zip(*map(parameters, optimizers), strict=True):
        q.data.copy_(p.data)
    own = fo.tree.map(torch.clone, options)
    optimizers[0].param_groups[0].update(own)
    for factor in (1.0, 0.5):
        for number in fo.tree.flatten(own)[0]:
            number.mul_(factor)
        optimizers[1].param_groups[0].update(fo.tree.map(lambda number, f=factor: float(number * f), options))
        for optimizer in optimizers:
            torch.manual_seed(0)
            steps(optimizer)
    assert deviation(*map(parameters, optimizers)) == 0
    assert len(calls) == 16


def test_other_classes_have_none(calls):
    for name in ("RMSprop", "NAdam", "Adamax", "Adadelta"):
        steps(make(name))
    assert not calls


@each
def test_complex_parameters_are_pairs_to_them(name, calls):
    p = torch.randn(3, dtype=torch.complex128)
    pairs = torch.view_as_real(p).clone()
    optimizer, expected = make(name, [p]), make(name, [pairs])
    for step in range(3):
        p.grad = gradient(p, step, 1.0)
        pairs.grad = torch.view_as_real(p.grad).clone()
        optimizer.step()
        expected.step()
    assert torch.equal(torch.view_as_real(p.detach()), pairs)
    assert len(calls) == 6


@each
def test_what_they_cannot_take(name, calls):
    steps(make(name, [torch.randn(10, dtype=torch.float64)[::3]]))
    assert not calls
    mixed = make(name, [torch.randn(3), torch.randn(3, dtype=torch.float64)])
    steps(mixed)
    assert [len(args[0]) for _, args in calls] == [1] * 8  # one dtype at a time


def test_half_parameters_with_single_states(calls):
    """As after module.half(): states keep more digits than the parameters have."""
    optimizer = make("Adam", [torch.randn(3, dtype=torch.float32)])
    steps(optimizer, 1)
    [p] = parameters(optimizer)
    p.grad = None
    p.data = p.data.bfloat16()
    before = len(calls)
    steps(optimizer, 3)
    assert len(calls) == before == 1
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_one_group_of_several(calls):
    groups = [
        {"params": [torch.ones(3, requires_grad=True)]},
        {"params": [torch.ones(4, requires_grad=True)], "fused": False},
        {"params": [torch.ones(5, requires_grad=True)], "foreach": True},
    ]
    steps(fo.optim.Adam(groups, **LR))
    assert [len(args[0][0]) for _, args in calls] == [3] * 4


def test_an_edit_of_a_group_takes_effect(calls):
    optimizer = make("Adam")
    steps(optimizer)
    for edit, more in (({"fused": False}, 0), ({"fused": None}, 4), ({"foreach": True}, 0), ({"foreach": None}, 4)):
        optimizer.param_groups[0].update(edit)
        before = len(calls)
        steps(optimizer)
        assert len(calls) - before == more


def test_nobody_waits_for_a_compiler(monkeypatch, calls):
    """fused=True is torch's kernel, and where that cannot be, blocks."""
    monkeypatch.setattr(fused, "_compiled", lambda function: pytest.fail("compiled"))
    steps(make("Adam", fused=True))
    steps(make("Adam", [torch.randn(10)[::3]], fused=True))
    steps(make("Adam", [torch.randn(3, dtype=torch.bfloat16)], fused=True))
    assert len(calls) == 4


# Numbers. -------------------------------------------------------------------------------------------------------------


@cases
def test_the_numbers_are_those_of_torchs_loop(name, options, calls):
    ours, theirs = pair(name, draw_params(), {**options, "foreach": None})
    for group in theirs.param_groups:
        group["foreach"] = False
    assert run(ours, theirs, missing=lambda step, i: (step + i) % 11 == 3) < 1e-12
    assert_same_state(ours, theirs, 1e-10)
    assert len(calls) >= 36


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_numbers_are_those_of_torchs_kernels(name, options, dtype):
    """Bit for bit."""
    ours, theirs = pair(name, draw_params(dtype), {**options, "fused": True})
    assert run(ours, theirs, steps=10, scale=0.01) == 0.0
    assert_same_state(ours, theirs, 0.0)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_single(name, options, dtype, calls):
    """Where torch's kernels for the CPU are wrong: for 16 elements and more, and where a gradient is zero."""
    params = [torch.randn(size, dtype=dtype) for size in (3, 48)]
    for group_options in ({}, {"fused": True}):
        ours, _ = pair(name, params, {**options, **group_options})
        single = getattr(torch.optim, name)([p.float().requires_grad_() for p in params], **options)
        for step in range(3):
            for p, q in zip(parameters(ours), parameters(single), strict=True):
                p.grad = torch.randn_like(p.detach()) if step else torch.zeros_like(p)
                q.grad = p.grad.float()
            ours.step()
            single.step()
        rounded = [p.detach().float() for p in parameters(ours)]
        assert deviation(rounded, parameters(single)) < 10 * torch.finfo(dtype).eps
    assert not calls


@pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, False), (0.4, False), (0.0, True)])
def test_the_first_step_of_sgd(dampening, nesterov, calls):
    """The buffer begins as the gradient, without dampening; for each parameter when its first gradient comes."""
    options = {**LR, "momentum": 0.9, "dampening": dampening, "nesterov": nesterov, "weight_decay": 0.1}
    ours, theirs = pair("SGD", draw_params(), options)
    late = run(ours, theirs, steps=12, missing=lambda step, i: step < 3 * i)
    assert late < 1e-14
    assert calls
    assert_same_state(ours, theirs, 1e-13)
    for optimizer in (ours, theirs):  # None, as torch.optim keeps a buffer that has not begun
        optimizer.state[parameters(optimizer)[0]]["momentum_buffer"] = None
    assert run(ours, theirs, steps=3) < 1e-14


@cases
@pytest.mark.parametrize("fused", [False, True])
def test_states_of_torch_go_on(name, options, fused, calls):
    """Begun by torch's loop or its kernels, loaded here, and back."""
    ours, theirs = pair(name, draw_params(), options)
    for group in theirs.param_groups:
        group.update(fused=fused, foreach=False)
    steps(theirs, 3)
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        p.data.copy_(q.data)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    ours.param_groups[0].update(fused=None, foreach=None)
    assert run(ours, theirs, steps=10) < 1e-12
    assert len(calls) >= 10
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert run(ours, theirs, steps=10) < 1e-12
    assert_same_state(ours, theirs, 1e-11)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tensor_for_a_learning_rate(name, dtype, calls):
    lr = torch.tensor(0.1, dtype=dtype)
    ours, theirs = pair(name, draw_params(), {"lr": lr.clone(), "fused": True})
    for step in range(6):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"].mul_(0.9) if step % 2 else None
        assert run(ours, theirs, steps=1) < 1e-12
    assert len(calls) == 12


@pytest.mark.parametrize("options", [{"capturable": True}, {"amsgrad": True, "capturable": True}])
def test_capturable(options, calls):
    ours, theirs = pair("Adam", draw_params(), {**LR, **options, "fused": True})
    assert run(ours, theirs, steps=10) == 0.0
    assert_same_state(ours, theirs, 0.0)


@each
@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"fused": True}])
def test_flags_change_no_number(name, flags):
    results = []
    for options in ({}, flags):
        torch.manual_seed(0)
        optimizer = make(name, **options)
        steps(optimizer, 10)
        results.append(parameters(optimizer))
    assert deviation(*results) < 1e-12


@each
def test_gradients_that_lie_otherwise_are_left_alone(name, calls):
    params = [torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64).t()]
    ours, theirs = pair(name, params, {**LR, "weight_decay": 0.1})
    for _ in range(5):
        grads = [torch.randn(3, 4, dtype=torch.float64).t(), torch.randn(4, 6, dtype=torch.float64)[:, ::2]]
        before = [g.clone() for g in grads]
        for optimizer in (ours, theirs):
            for p, g in zip(parameters(optimizer), grads, strict=True):
                p.grad = g
            optimizer.step()
        assert all(map(torch.equal, grads, before))
        assert deviation(parameters(ours), parameters(theirs)) < 1e-13
    assert len(calls) == 5


@each
def test_a_kernel_that_raises_is_not_hidden(name, monkeypatch):
    """Nor is a step counted that was not made."""
    optimizer = make(name)
    steps(optimizer, 5)
    before = copy.deepcopy(optimizer.state_dict()["state"])

    def broken(*args, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(torch, KERNELS[name], broken)
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)
