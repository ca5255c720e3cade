"""Adam-mini and Ranger against formulas in numpy, and a package."""

import numpy as np
import pytest
import torch
from trajectories import deviation, functional, of_each, problem, stateful

import functorch_optim as fo

# Adam-mini. -----------------------------------------------------------------------------------------------------------

NUMBERS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def adam_mini(p, grads, lr, betas, eps, weight_decay, block):
    """One v for each element, which is the same in all elements of a block."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * mean_of_blocks(g**2, block)
        p = (1 - lr * weight_decay) * p
        p = p - lr * m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield p


def mean_of_blocks(x, block):
    if block == "element" or x.ndim == 0:
        return x
    if block == "tensor":
        return np.full_like(x, x.mean())
    parts = np.split(x, len(x) if block == "row" else block)
    return np.concatenate([np.full_like(part, part.mean()) for part in parts])


@pytest.mark.parametrize("block", ["row", "tensor", "element", 2])
@pytest.mark.parametrize("zeros", [(), (0, 1)], ids=["", "begins with zeros"])
def test_adam_mini_is_the_formula(block, zeros):
    params, history = problem(shapes=[(4, 3), (2,), (6, 2, 2), (4, 1)], zeros=zeros)
    expected = of_each(adam_mini, params, history, **NUMBERS, block=block)
    assert deviation(functional(fo.adam_mini(**NUMBERS, block=block), params, history), expected) < 1e-12
    ours = stateful(lambda params: fo.Optimizer(params, fo.adam_mini, **NUMBERS, block=block), params, history)
    assert deviation(ours, expected) < 1e-12


@pytest.mark.parametrize(
    "changed",
    [{"block": "row"}, {"block": "element"}, {"block": 4}, {"lr": 0.2}, {"eps": 1e-2}, {"weight_decay": 0.0}],
    ids=str,
)
def test_the_comparison_can_fail(changed):
    params, history = problem(shapes=[(4, 3)])
    ours = functional(fo.adam_mini(**{**NUMBERS, "block": 2, **changed}), params, history)
    assert deviation(ours, of_each(adam_mini, params, history, **NUMBERS, block=2)) > 1e-6


def test_with_a_block_for_each_element_it_is_adamw():
    params, history = problem()
    adamw = functional(fo.adamw(**NUMBERS), params, history)
    assert deviation(functional(fo.adam_mini(**NUMBERS, block="element"), params, history), adamw) < 1e-12
    assert deviation(functional(fo.adam_mini(**NUMBERS, block="row"), params, history), adamw) > 1e-3


@pytest.mark.parametrize(
    ("block", "shape"), [("row", (6,)), ("tensor", ()), ("element", (6, 4)), (3, (3,)), (lambda p: p.ndim, (2,))]
)
def test_there_is_one_number_for_each_block(block, shape):
    state = fo.adam_mini(block=block).init(torch.zeros(6, 4))
    assert fo.tree.get(state, "exp_avg_sq").shape == shape


def test_blocks_by_name():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj, self.norm = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.q_proj(x) * self.v_proj(x)).square().sum() + self.norm.weight.sum()

    model = Attention()
    block = fo.label(model, {"q_proj.weight": 2, torch.nn.LayerNorm: "tensor"}, default="row")
    opt = fo.Optimizer(model.named_parameters(), fo.adam_mini(1e-3, block=block))
    model(torch.randn(3, 8)).backward()
    opt.step()
    shapes = {name: tuple(opt.state[p]["exp_avg_sq"].shape) for name, p in model.named_parameters()}
    assert shapes == {"q_proj.weight": (2,), "norm.weight": (), "norm.bias": ()} | dict.fromkeys(
        ["q_proj.bias", "v_proj.weight", "v_proj.bias"], (8,)
    )


def test_means_of_squares_are_kept_in_single_precision_at_least():
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert fo.tree.get(fo.adam_mini().init(torch.zeros(2, 2, dtype=dtype)), "exp_avg_sq").dtype == kept


@pytest.mark.parametrize("block", ["rows", 0, True, None, 2.0])
def test_what_is_no_block_is_an_error(block):
    with pytest.raises(ValueError, match="choose 'row', 'tensor', 'element', or a number of heads"):
        fo.adam_mini(block=block)
    with pytest.raises(ValueError, match="Invalid block"):
        fo.adam_mini(block=lambda p: block).init(torch.zeros(2, 2))


def test_a_block_in_a_tree_that_is_none_is_named():
    with pytest.raises(ValueError, match="Invalid block at 'a.b': 'head'"):
        fo.adam_mini(block={"a": {"b": "head"}, "c": "row"})


def test_heads_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"At 'w': A parameter of shape \(6, 4\) cannot be parted into 4 heads"):
        fo.adam_mini(block=4).init({"w": torch.zeros(6, 4)})


# Ranger. --------------------------------------------------------------------------------------------------------------


def ranger(p, grads, lr, betas, eps, weight_decay, k=6, alpha=0.5, use_gc=False, decoupled_weight_decay=True):
    (b1, b2), slow = betas, p
    m, v, rho_inf = np.zeros_like(p), np.zeros_like(p), 2 / (1 - betas[1]) - 1
    for t, g in enumerate(grads, 1):
        if use_gc and p.ndim > 1:
            g = g - g.mean(tuple(range(1, p.ndim)), keepdims=True)  # noqa: PLW2901
        if not decoupled_weight_decay:
            g = g + weight_decay * p  # noqa: PLW2901
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
        u = m / (1 - b1**t)
        if rho > 5:
            r = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            u = u * np.sqrt(r * (1 - b2**t)) / (np.sqrt(v) + eps)
        p = p - lr * u - (lr * weight_decay * p if decoupled_weight_decay else 0)
        if t % k == 0:
            slow = slow + alpha * (p - slow)
            p = slow
        yield p


RANGER = {"lr": 0.1, "betas": (0.95, 0.999), "eps": 1e-5, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 4, "alpha": 0.3, "use_gc": True}, {"k": 1, "decoupled_weight_decay": False, "betas": (0.8, 0.9)}],
    ids=str,
)
def test_ranger_is_the_formula(options):
    params, history = problem()
    options = {**RANGER, **options}
    expected = of_each(ranger, params, history, **options)
    assert deviation(functional(fo.ranger(**options), params, history), expected) < 1e-12
    ours = stateful(lambda params: fo.Optimizer(params, fo.ranger, **options), params, history)
    assert deviation(ours, expected) < 1e-12
    changed = functional(fo.ranger(**{**options, "alpha": 0.9}), params, history)
    assert deviation(changed, expected) > 1e-4


@pytest.mark.parametrize("use_gc", [True, False])
def test_ranger_is_that_of_a_package(use_gc):
    package = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    params, history = problem()
    options = {**RANGER, "use_gc": use_gc}
    theirs = stateful(lambda params: package.Ranger(params, **options, degenerated_to_sgd=True), params, history)
    assert deviation(functional(fo.ranger(**options), params, history), theirs) < 1e-12


def test_ranger_is_evaluated_at_its_slow_weights():
    tx, params = fo.ranger(k=5), torch.ones(2)
    state = tx.init(params)
    trained, state = fo.step(tx, torch.ones(2), state, params)
    assert torch.equal(fo.eval_params(tx, state, trained), params)
    assert not torch.equal(trained, params)
