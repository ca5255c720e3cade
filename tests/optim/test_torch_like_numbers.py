"""The same numbers as the classes of torch.optim: every class, every option, awkward parameters and gradients."""

import copy

import pytest
import torch
from lbfgs_problems import FEW, Training
from lbfgs_problems import deviation as deviation_of_training
from torch_like_cases import (
    EMBEDDINGS,
    MODULES,
    NAMES,
    OPTIONS,
    REAL,
    assert_same_state,
    awkward_params,
    cases,
    deviation,
    embedding_params,
    embeddings,
    muon,
    pair,
    parameters,
    run,
    run_sparse,
)

import functorch_optim as fo

STEPS = 60  # of what docs/torch-optim.md says


@pytest.mark.sampled(size=24)
@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_double_precision(name, options, dtype, device):
    if dtype.is_complex and name in REAL:
        pytest.skip("torch.optim has it for real numbers only")
    ours, theirs = pair(name, awkward_params(name, dtype, device), options)
    assert run(ours, theirs, STEPS) < 1e-12
    assert_same_state(ours, theirs, 1e-10)


@pytest.mark.sampled(size=24)
@pytest.mark.smoke
@cases
def test_single_precision(name, options, device):
    ours, theirs = pair(name, awkward_params(name, torch.float32, device), options)
    # Gradients up to 10: larger ones would move parameters up and down by more than they keep digits.
    assert run(ours, theirs, STEPS, scale=0.01) < STEPS * 4 * torch.finfo(torch.float32).eps
    assert_same_state(ours, theirs, 1e-4)


@pytest.mark.sampled(size=12)
@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, options, dtype, device):
    """torch.optim rounds after every operation and we do once: half a unit in the last place a step, and no worse."""
    params = awkward_params(name, dtype, device)
    ours, theirs = pair(name, params, options)
    _, exact = pair(name, [p.double() for p in params], options)
    for _ in range(STEPS):
        for p, q, r in zip(parameters(ours), parameters(theirs), parameters(exact), strict=True):
            q.grad = torch.randn_like(q.detach())
            p.grad, r.grad = q.grad.clone(), q.grad.double()
        for optimizer in (ours, theirs, exact):
            optimizer.step()
    mine, torchs, right = [[p.detach().double() for p in parameters(some)] for some in (ours, theirs, exact)]
    # eps=1e-8 is 0 in float16, and so torch.optim divides 0 by 0 where a gradient happens to be 0.
    torchs = [torch.where(q.isnan(), p, q) for p, q in zip(mine, torchs, strict=True)]
    eps = torch.finfo(dtype).eps
    assert all(p.isfinite().all() for p in mine)
    assert deviation(mine, torchs) < 30 * eps
    assert deviation(mine, right) < deviation(torchs, right) + 3 * eps


@pytest.mark.sampled
@cases
def test_gradients_that_are_missing_at_times_or_begin_late(name, options, device):
    ours, theirs = pair(name, awkward_params(name, torch.float64, device), options)
    assert run(ours, theirs, missing=lambda step, i: (step + i) % 3 == 0 or step < 4 * i) < 1e-12
    assert_same_state(ours, theirs, 1e-10)


@pytest.mark.sampled(size=32)
@cases
def test_groups_with_options_of_their_own(name, options, device):
    params = awkward_params(name, torch.float64, device)
    groups = [{"params": [p], **others} for p, others in zip(params, [options, {}, {"lr": 0.03}], strict=False)]
    ours, theirs = pair_of_groups(name, groups)
    assert run(ours, theirs) < 1e-12
    assert_same_state(ours, theirs, 1e-10)


@pytest.mark.sampled(size=24)
@cases
def test_mixed_dtypes(name, options, device):
    dtypes = [torch.float64, torch.float32, torch.complex128, torch.complex64]
    params = [p for dtype in dtypes[: 2 if name in REAL else 4] for p in awkward_params(name, dtype)[:2]]
    if name == "Adafactor" and "eps" not in options:
        params = params[:2]  # torch takes the first parameter's machine epsilon for all
    ours, theirs = pair(name, params, options)
    assert run(ours, theirs, scale=0.01) < 36 * 4 * torch.finfo(torch.float32).eps
    assert deviation(parameters(ours)[:2], parameters(theirs)[:2]) < 1e-12
    assert_same_state(ours, theirs, 1e-4)


def pair_of_groups(name, groups, **options):
    def make(module):
        own = [{**group, "params": [p.requires_grad_() for p in group["params"]]} for group in copy.deepcopy(groups)]
        return getattr(module, name)(own, **options)

    return make(fo.optim), make(torch.optim)


@pytest.mark.sampled(size=32)
@cases
def test_a_tensor_as_learning_rate(name, options, device):
    options = {**options, "lr": torch.tensor(options.get("lr", 0.01), dtype=torch.float64)}
    ours, theirs = pair(name, awkward_params(name, torch.float64, device), options)
    assert run(ours, theirs) < 1e-12


@pytest.mark.sampled(size=24)
@cases
def test_learning_rates_that_change(name, options, device):
    ours, theirs = pair(name, awkward_params(name, torch.float64, device), options)

    def edit(step):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 * (0.0 if step % 10 == 9 else -0.01 if step % 10 == 8 else 0.9**step)

    assert run(ours, theirs, each=edit) < 1e-12


@muon
def test_muon_in_bfloat16_keeps_its_momentum():
    """torch.optim.Muon without nesterov divides its buffer by its norm in place when it is in bfloat16 already."""
    p = torch.randn(4, 4, dtype=torch.bfloat16)
    ours, theirs = pair("Muon", [p], {"nesterov": False, "momentum": 0.5})
    [ours_p], [theirs_p] = parameters(ours), parameters(theirs)
    ours_p.grad = theirs_p.grad = torch.randn_like(p)
    ours.step()
    theirs.step()
    torch.testing.assert_close(ours.state[ours_p]["momentum_buffer"], 0.5 * ours_p.grad)
    torch.testing.assert_close(theirs.state[theirs_p]["momentum_buffer"].norm().item(), 1.0, rtol=0.01, atol=0)


@embeddings
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_sparse_gradients(name, options, dtype, tolerance, device):
    assert run_sparse(*pair(name, embedding_params(dtype, device), options), STEPS) < tolerance


def test_sparse_gradients_touch_no_other_entry():
    p = torch.randn(5, 2, dtype=torch.float64)
    before = p.clone()
    opt = fo.optim.SparseAdam([p.requires_grad_()], lr=0.1)
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2, dtype=torch.float64), (5, 2))
    opt.step()
    assert torch.equal((p != before).any(1), torch.tensor([False, True, False, True, False]))


def test_the_comparison_can_fail():
    params = awkward_params("Adam", torch.float64)
    ours, _ = pair("Adam", params, {"eps": 1.1e-8})
    _, theirs = pair("Adam", params, {"eps": 1e-8})
    assert run(ours, theirs) > 1e-9


# The table of docs/torch-optim.md. ------------------------------------------------------------------------------------


def measure(name, dtype, scale):
    """Return the largest relative deviation over all options."""
    worst = 0.0
    for options in OPTIONS.get(name, []):
        torch.manual_seed(0)
        worst = max(worst, run(*pair(name, awkward_params(name, dtype), options), STEPS, scale=scale))
    for sparse, options in EMBEDDINGS:
        if sparse == name:
            torch.manual_seed(0)
            worst = max(worst, run_sparse(*pair(name, embedding_params(dtype), options), STEPS))
    return worst


def measure_lbfgs(dtype):
    """Return the same of LBFGS, from closures of a convex loss."""
    worst = 0.0
    for options in FEW:
        torch.manual_seed(0)
        params = [torch.randn(shape, dtype=dtype) for shape in ((3,), (), (2, 2))]
        ours, theirs = [Training(module.LBFGS, params, **options) for module in MODULES]
        for _ in range(STEPS):
            ours.step()
            theirs.step()
            worst = max(worst, deviation_of_training(ours, theirs))
    return worst


if __name__ == "__main__":
    torch.sparse.check_sparse_tensor_invariants.disable()
    kinds = (torch.float64, 1.0), (torch.float32, 0.01)
    rows = {name: [measure(name, *kind) for kind in kinds] for name in NAMES}
    rows["LBFGS"] = [measure_lbfgs(dtype) for dtype, _ in kinds]
    for name, (double, single) in rows.items():
        print(f"| `{name}` | {double:.0e} | {single:.0e} | {single / torch.finfo(torch.float32).eps / STEPS:.2f} |")
