"""Where programs around torch.optim look into it, and numbers at the ends of their range."""

import pytest
import torch
from torch_like_cases import NAMES, deviation, parameters

import functorch_optim as fo


@pytest.mark.parametrize("size", [1e20, 1e-20])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Adamax"])
def test_gradients_whose_squares_are_out_of_range(name, size):
    """Of 1e20 in float32 the square overflows, but 0.001 times it does not; after it all is well."""
    options = {} if name in ("SGD", "Adadelta") else {"eps": 0.0}

    def train(module, dtype):
        p = torch.ones(2, requires_grad=True, dtype=dtype)
        optimizer = getattr(module, name)([p], lr=1e-30 if name == "SGD" else 0.1, **options)
        for grad in (size, 1.0, 1.0):
            p.grad = torch.full((2,), grad, dtype=dtype)
            optimizer.step()
        return p.detach().double()

    ours, theirs = train(fo.optim, torch.float32), train(torch.optim, torch.float32)
    if name == "NAdam" and size > 1:  # torch.optim divides the mean of squares by a small number first
        theirs = train(torch.optim, torch.float64)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("t0", [1, 1e6])
@pytest.mark.parametrize("grad", [torch.inf, -torch.inf, torch.nan])
def test_the_average_of_asgd_follows_a_parameter_that_is_not_finite(grad, t0, foreach):
    params = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizers = [module.ASGD([p], lr=0.1, t0=t0) for module, p in zip((fo.optim, torch.optim), params, strict=True)]
    optimizers[0].param_groups[0]["foreach"] = foreach
    for last in (1.0, 1.0, grad):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.tensor([last, 1.0])
            optimizer.step()
    ours, theirs = [optimizer.state[p]["ax"] for p, optimizer in zip(params, optimizers, strict=True)]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert ours.isfinite().tolist() == [False, True]


class Averaging(fo.optim.SGD):
    """Keeps an average of its own in the state."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.detach(), 0.1)
                self.state[p]["note"] = "mine"
        return loss


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_classes_derived_from_these_may_keep_things_of_their_own(momentum):
    p, frozen = torch.ones(2, requires_grad=True), torch.ones(3)
    optimizer = Averaging([p, frozen], lr=0.1, momentum=momentum)
    p.grad = torch.ones(2)
    optimizer.step()
    again = Averaging([torch.ones(2, requires_grad=True), frozen], lr=0.1, momentum=momentum)
    again.load_state_dict(optimizer.state_dict())
    loaded, without = again.state.values()
    assert set(without) == {"average", "note"}
    assert loaded["note"] == "mine"
    assert torch.equal(loaded["average"], optimizer.state[p]["average"])
    assert ("momentum_buffer" in loaded) == (momentum > 0)


def make_trained(name):
    p = torch.randn(3, 3, requires_grad=True)
    optimizer = getattr(fo.optim, name)([p], **({"momentum": 0.9} if name == "SGD" else {}))
    p.grad = torch.randn(3, 3).to_sparse() if name == "SparseAdam" else torch.randn(3, 3)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_states_stay_where_they_are(name):
    """As torch.optim's do: other processes may share them, and others hold them."""
    p, optimizer = make_trained(name)
    held = {key: value for key, value in optimizer.state[p].items() if key != "step" or name != "SparseAdam"}
    before = {key: value.clone() for key, value in held.items()}
    optimizer.step()
    for key, value in held.items():
        assert optimizer.state[p][key] is value
    assert any(not torch.equal(held[key], before[key]) for key in held)


def test_shared_memory_stays_shared():
    p = torch.ones(2, requires_grad=True)
    optimizer = fo.optim.Adagrad([p])
    optimizer.share_memory()
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[p]["sum"].is_shared()
    assert torch.equal(optimizer.state[p]["sum"], torch.ones(2))


def test_a_state_that_cannot_be_overwritten_is_replaced():
    p, optimizer = make_trained("Adam")
    optimizer.state[p]["exp_avg"] = torch.zeros(()).expand(3, 3)
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].is_contiguous()


def test_momentum_is_reset_by_none():
    def train(module):
        p = torch.ones(2, requires_grad=True)
        optimizer = module.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
        for step in range(4):
            p.grad = torch.ones(2)
            if step == 2:
                optimizer.state[p]["momentum_buffer"] = None
            optimizer.step()
        return optimizer

    assert deviation(parameters(train(fo.optim)), parameters(train(torch.optim))) < 1e-6


@pytest.mark.skipif(not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="older torch has it not")
def test_every_public_name_of_torch_is_there():
    assert set(torch.optim.__all__) <= set(fo.optim.__all__)
    from functorch_optim.optim.optimizer import required
    from torch.optim.optimizer import required as theirs

    assert required is theirs


def test_groups_that_are_gone_are_forgotten():
    optimizer = fo.optim.Adam([{"params": [torch.ones(1)]}, {"params": [torch.ones(2)]}])
    for p in parameters(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups.pop()
    optimizer.step()
    assert len(optimizer._plans) == 1


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), ()])
def test_a_nan_spreads_as_far_as_torchs_adafactor_lets_it(shape):
    """In a vector it stays in its element, over a matrix it spreads."""
    start = torch.randn(shape, dtype=torch.float64)
    ours, theirs, functional = [start.clone().requires_grad_() for _ in range(2)] + [start]
    options = {"lr": 0.1, "weight_decay": 0.01}
    optimizers = [module.Adafactor([p], **options) for module, p in ((fo.optim, ours), (torch.optim, theirs))]
    tx = fo.adafactor(**options)
    state = tx.init(start)
    for step in range(4):
        g = torch.randn(shape, dtype=torch.float64)
        if step == 1:
            g.view(-1)[0] = torch.nan
        functional, state = fo.step(tx, g, state, functional)
        for p, optimizer in ((ours, optimizers[0]), (theirs, optimizers[1])):
            p.grad = g.clone()
            optimizer.step()
        for p in (ours, functional):
            torch.testing.assert_close(p, theirs, rtol=1e-12, atol=0, equal_nan=True)
    assert theirs.isnan().sum() == {1: 1, 2: 12, 3: 12, 0: 1}[len(shape)]
