"""The same numbers as the classes of torch.optim: every class, every option, awkward parameters and gradients."""

import pytest
import torch

import functorch_optim as fo

DECAY = {"weight_decay": 0.1}
OPTIONS = {
    "SGD": [
        {},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, **DECAY},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True, **DECAY},
    ],
    "Adam": [
        {},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, **DECAY},
        {"lr": 0.1, "amsgrad": True, "maximize": True, **DECAY},
        {"lr": 0.1, "decoupled_weight_decay": True, **DECAY},
    ],
    "AdamW": [{}, {"lr": 0.1, "amsgrad": True, "maximize": True, **DECAY}],
    "NAdam": [
        {},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "momentum_decay": 0.1, **DECAY},
        {"momentum_decay": 0.0, "maximize": True, "decoupled_weight_decay": True, **DECAY},
    ],
    "RAdam": [
        {},
        {"lr": 0.1, "betas": (0.5, 0.6), "eps": 1e-2, **DECAY},
        {"betas": (0.9, 0.9), "maximize": True, "decoupled_weight_decay": True, **DECAY},
    ],
    "Adamax": [{}, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "maximize": True, **DECAY}],
    "Adagrad": [
        {},
        {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-2, "maximize": True, **DECAY},
        {"initial_accumulator_value": 0.5},
    ],
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.7, "eps": 1e-3, "maximize": True, **DECAY}],
    "RMSprop": [
        {},
        {"lr": 0.1, "alpha": 0.7, "eps": 1e-2, "momentum": 0.5, **DECAY},
        {"centered": True, "momentum": 0.9, "maximize": True, **DECAY},
    ],
    "Rprop": [{}, {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (0.05, 0.2), "maximize": True}],
    "ASGD": [{}, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 5, "maximize": True, **DECAY}],
    "Adafactor": [
        {},
        {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-3, 1e-2), "d": 1.5, "maximize": True, **DECAY},
    ],
    "Muon": [
        {},
        {"lr": 0.1, "momentum": 0.5, "nesterov": False, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
        {"adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-3},
    ],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]
cases = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{'-'.join(options) or 'defaults'}" for name, options in CASES]
)


def make_params(name, dtype, device="cpu"):
    """Matrices, a stack of them, a vector, a scalar, an empty one, and some that are not contiguous."""
    options = {"dtype": dtype, "device": device}
    if name == "Muon":
        return [torch.randn(3, 4, **options).t(), torch.randn(5, 2, **options), torch.randn(2, 6, **options)[:, ::2]]
    empty = [] if name == "Adafactor" else [torch.randn(0, 2, **options)]  # torch's Adafactor divides by their size, 0
    return [
        torch.randn(3, 4, **options).t(),
        torch.randn(2, 3, 2, **options),
        torch.randn(4, **options),
        torch.randn((), **options),
        torch.randn(10, **options)[::3],
        *empty,
    ]


def pair(name, params, options):
    """Make ours and torch's over copies of the same parameters."""
    ours = [p.clone().requires_grad_() for p in params]
    theirs = [p.clone().requires_grad_() for p in params]
    return getattr(fo.optim, name)(ours, **options), getattr(torch.optim, name)(theirs, **options)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradient(p, step, scale):
    """Draw a gradient of one of many sizes; some are exactly zero."""
    return torch.zeros_like(p) if step % 5 == 2 else scale * 10 ** (step % 7 - 3) * torch.randn_like(p.detach())


def run(ours, theirs, steps=60, scale=1.0, missing=lambda step, i: False, each=lambda step: None):
    """Train both on the same gradients; return the largest relative deviation of a parameter in any step."""
    worst = 0.0
    for step in range(steps):
        for i, (p, q) in enumerate(zip(parameters(ours), parameters(theirs), strict=True)):
            q.grad = None if missing(step, i) else gradient(q, step, scale)
            p.grad = None if q.grad is None else q.grad.clone()
        ours.step()
        theirs.step()
        each(step)
        worst = max(worst, deviation(parameters(ours), parameters(theirs)))
    return worst


def deviation(ours, theirs):
    pairs = [(p.detach(), q.detach()) for p, q in zip(ours, theirs, strict=True) if p.numel()]
    return max(((p - q).abs() / q.abs().clamp(min=1)).max().item() for p, q in pairs)


def assert_same_state(ours, theirs, tolerance):
    """Compare all states: keys, shapes, dtypes, and numbers relative to their size."""
    for p, q in zip(parameters(ours), parameters(theirs), strict=True):
        mine, torchs = ours.state.get(p, {}), theirs.state.get(q, {})
        assert set(mine) == set(torchs)
        for key, expected in torchs.items():
            assert type(mine[key]) is type(expected)
            if isinstance(expected, torch.Tensor):
                assert (mine[key].shape, mine[key].dtype, mine[key].device) == (
                    expected.shape,
                    expected.dtype,
                    expected.device,
                )
            torch.testing.assert_close(mine[key], expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_double_precision(name, options, dtype, device):
    if dtype.is_complex and name in ("Adafactor", "Muon"):
        pytest.skip("torch.optim has it for real numbers only")
    ours, theirs = pair(name, make_params(name, dtype, device), options)
    assert run(ours, theirs) < 1e-12
    assert_same_state(ours, theirs, 1e-10)


@cases
def test_single_precision(name, options, device):
    ours, theirs = pair(name, make_params(name, torch.float32, device), options)
    # Gradients up to 10: larger ones would move parameters up and down by more than they keep digits.
    assert run(ours, theirs, scale=0.01) < 60 * 4 * torch.finfo(torch.float32).eps
    assert_same_state(ours, theirs, 1e-4)


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, options, dtype, device):
    """torch.optim rounds after every operation and we do once: half a unit in the last place a step, and no worse."""
    params = make_params(name, dtype, device)
    ours, theirs = pair(name, params, options)
    _, exact = pair(name, [p.double() for p in params], options)
    for _ in range(60):
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


@cases
def test_gradients_that_are_missing_at_times_or_begin_late(name, options, device):
    ours, theirs = pair(name, make_params(name, torch.float64, device), options)
    assert run(ours, theirs, missing=lambda step, i: (step + i) % 3 == 0 or step < 4 * i) < 1e-12
    assert_same_state(ours, theirs, 1e-10)


@cases
def test_groups_with_options_of_their_own(name, options, device):
    params = make_params(name, torch.float64, device)
    groups = [{"params": [p], **others} for p, others in zip(params, [options, {}, {"lr": 0.03}], strict=False)]
    ours, theirs = pair_of_groups(name, groups)
    assert run(ours, theirs) < 1e-12
    assert_same_state(ours, theirs, 1e-10)


@cases
def test_mixed_dtypes(name, options, device):
    dtypes = [torch.float64, torch.float32, torch.complex128, torch.complex64]
    params = [p for dtype in dtypes[: 2 if name in ("Adafactor", "Muon") else 4] for p in make_params(name, dtype)[:2]]
    if name == "Adafactor" and "eps" not in options:
        params = params[:2]  # torch takes the first parameter's machine epsilon for all
    ours, theirs = pair(name, params, options)
    assert run(ours, theirs, scale=0.01) < 60 * 4 * torch.finfo(torch.float32).eps
    assert deviation(parameters(ours)[:2], parameters(theirs)[:2]) < 1e-12
    assert_same_state(ours, theirs, 1e-4)


def pair_of_groups(name, groups, **options):
    def make(module):
        own = [{**group, "params": [p.clone().requires_grad_() for p in group["params"]]} for group in groups]
        return getattr(module, name)(own, **options)

    return make(fo.optim), make(torch.optim)


@cases
def test_a_tensor_as_learning_rate(name, options, device):
    options = {**options, "lr": torch.tensor(options.get("lr", 0.01), dtype=torch.float64)}
    ours, theirs = pair(name, make_params(name, torch.float64, device), options)
    assert run(ours, theirs) < 1e-12


@cases
def test_learning_rates_that_change(name, options, device):
    ours, theirs = pair(name, make_params(name, torch.float64, device), options)

    def edit(step):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 * (0.0 if step % 10 == 9 else -0.01 if step % 10 == 8 else 0.9**step)

    assert run(ours, theirs, each=edit) < 1e-12


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


@pytest.fixture(autouse=True)
def no_checks():
    """torch warns unless it is told whether to check sparse tensors."""
    torch.sparse.check_sparse_tensor_invariants.disable()


EMBEDDINGS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "maximize": True}),
    ("SparseAdam", {}),
    ("SparseAdam", {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "maximize": True}),
]


@pytest.mark.parametrize(("name", "options"), EMBEDDINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_sparse_gradients(name, options, dtype, tolerance, device):
    assert run_sparse(name, options, dtype, device) < tolerance


def run_sparse(name, options, dtype, device="cpu"):
    params = [torch.randn(7, 3, dtype=dtype, device=device), torch.randn(4, 2, 2, dtype=dtype, device=device)]
    ours, theirs = pair(name, params, options)
    worst = 0.0
    for step in range(60):
        for p, q in zip(parameters(ours), parameters(theirs), strict=True):
            entries = torch.randint(len(q), (1, step % 5), device=device)  # none at times, and some more than once
            values = torch.randn(entries.shape[1], *q.shape[1:], dtype=dtype, device=device)
            q.grad = torch.sparse_coo_tensor(entries, values, q.shape)
            p.grad = q.grad.clone()
        ours.step()
        theirs.step()
        assert all(p.grad.is_sparse for p in parameters(ours))
        worst = max(worst, deviation(parameters(ours), parameters(theirs)))
    return worst


def test_sparse_gradients_touch_no_other_entry():
    p = torch.randn(5, 2, dtype=torch.float64)
    before = p.clone()
    opt = fo.optim.SparseAdam([p.requires_grad_()], lr=0.1)
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2, dtype=torch.float64), (5, 2))
    opt.step()
    assert torch.equal((p != before).any(1), torch.tensor([False, True, False, True, False]))


def test_the_comparison_can_fail():
    params = make_params("Adam", torch.float64)
    ours, _ = pair("Adam", params, {"eps": 1.1e-8})
    _, theirs = pair("Adam", params, {"eps": 1e-8})
    assert run(ours, theirs) > 1e-9


def measure(name, dtype, scale):
    """Return the largest relative deviation over all options."""
    worst = 0.0
    for options in OPTIONS.get(name, []):
        torch.manual_seed(0)
        worst = max(worst, run(*pair(name, make_params(name, dtype), options), scale=scale))
    for sparse, options in EMBEDDINGS:
        if sparse == name:
            worst = max(worst, run_sparse(name, options, dtype))
    return worst


if __name__ == "__main__":  # the table of docs/torch-optim.md
    for name in [*OPTIONS, "SparseAdam"]:
        double, single = measure(name, torch.float64, 1.0), measure(name, torch.float32, 0.01)
        print(f"| `{name}` | {double:.0e} | {single:.0e} | {single / torch.finfo(torch.float32).eps / 60:.2f} |")
