"""Optimizers, what is changed between their steps, which gradients they get, and a comparison of two."""

import copy
from functools import partial

import pytest
import torch

import functorch_optim as fo
from functorch_optim.testing._copies import through_pickle

OPTIONS = {
    "Adam": {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.5},
    "NAdam": {"lr": 0.1},
    "ASGD": {"lr": 0.1, "t0": 2},
}
each = pytest.mark.parametrize("name", OPTIONS)


def make_params():
    torch.manual_seed(0)
    shapes = [(64, 64), (3,), (), (2, 3)]  # the first is large enough to be worked on where it is
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [torch.nn.Parameter(tensor) for tensor in (*tensors, torch.randn(4, 4, dtype=torch.float64).t())]


def ours(name):
    return getattr(fo.optim, name)(make_params(), **OPTIONS[name])


def torchs(name):
    return getattr(torch.optim, name)(make_params(), **OPTIONS[name])


def wrapper(name):
    return fo.Optimizer(make_params(), getattr(fo, name.lower()), **OPTIONS[name])


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def like(p):
    return torch.randn(p.shape, dtype=p.dtype)


def give_gradients(optimizer, step, draw=lambda optimizer, p: like(p)):
    torch.manual_seed(100 + step)
    for p in parameters(optimizer):
        p.grad = draw(optimizer, p)


def forget(optimizer):
    """Let the next step of ours be prepared anew."""
    optimizer.__dict__.get("_steps", {}).clear()


def assert_same(left, right, tolerance=1e-12):
    close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    for p, q in zip(parameters(left), parameters(right), strict=True):
        close(p.detach(), q.detach())
        mine, others = left.state.get(p, {}), right.state.get(q, {})
        for key in mine.keys() & others.keys():
            close(mine[key], others[key], check_dtype=False)


def changed(optimizer, change):
    """Change an optimizer, or make another of it."""
    other = change(optimizer)
    return other if isinstance(other, torch.optim.Optimizer) else optimizer


def compare(left, right, change=lambda optimizer: None, draw=None, steps=8, at=5, slow=False):
    """Train both; change something before one step, and draw gradients otherwise from there on."""
    pair = [left, right]
    for step in range(steps):
        if step == at:
            pair = [changed(optimizer, change) for optimizer in pair]
        for optimizer in pair:
            give_gradients(optimizer, step, *([draw] if draw and step >= at else []))
        if slow:
            forget(pair[1])
        for optimizer in pair:
            optimizer.step()
        assert_same(*pair)
    return pair


# Changes that torch.optim's classes take too. -------------------------------------------------------------------------


def each_state(optimizer):
    for p in parameters(optimizer):
        yield from [(p, key, value) for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)]


def data_replaced(optimizer):
    for p in parameters(optimizer):
        p.data = 2 * p.data


def data_transposed(optimizer):
    parameters(optimizer)[0].data = parameters(optimizer)[0].data.t()


def data_transposed_back(optimizer):
    for p in parameters(optimizer):
        if not p.is_contiguous() and p.shape == (4, 4):
            p.data = p.data.t()


def data_in_one_buffer(optimizer):
    """As DDP and FSDP do."""
    params = parameters(optimizer)
    buffer = torch.cat([p.data.reshape(-1) for p in params])
    for p, part in zip(params, buffer.split([p.numel() for p in params]), strict=True):
        p.data = part.view(p.shape)


def data_with_gaps(optimizer):
    for p in parameters(optimizer):
        p.data = torch.stack([p.data, p.data], -1)[..., 0]


def data_swapped(optimizer):
    """Two parameters exchange their memory."""
    p, q = parameters(optimizer)[0], torch.nn.Parameter(torch.ones(64, 64))
    torch.utils.swap_tensors(p, q)


def data_edited(optimizer):
    with torch.no_grad():
        for p in parameters(optimizer):
            p.mul_(2)


def states_replaced(optimizer):
    for p, key, value in list(each_state(optimizer)):
        optimizer.state[p][key] = value * 2


def states_data_replaced(optimizer):
    for _, _, value in each_state(optimizer):
        value.data = value.data * 2


def states_edited(optimizer):
    for _, _, value in each_state(optimizer):
        value.mul_(2)


def one_step_edited(optimizer):
    state = optimizer.state[parameters(optimizer)[1]]
    if "step" in state:
        state["step"].fill_(1)


def one_step_replaced(optimizer):
    state = optimizer.state[parameters(optimizer)[1]]
    if "step" in state:
        state["step"] = torch.tensor(1.0)


def carried_edited(optimizer):
    for _, key, value in each_state(optimizer):
        if key in ("mu_product", "eta", "mu"):
            value.mul_(0.5)


def one_step_edited_unseen(optimizer):
    """As collectives and other processes do: the version of the tensor stays."""
    state = optimizer.state[parameters(optimizer)[1]]
    if "step" in state:
        state["step"].data.fill_(1)


def numbers_edited_unseen(optimizer):
    for _, key, value in each_state(optimizer):
        if key in ("step", "mu_product", "eta", "mu"):
            value.data.fill_(9 if key == "step" else 0.5)


def states_deleted(optimizer):
    optimizer.state.clear()


def one_state_deleted(optimizer):
    optimizer.state.pop(parameters(optimizer)[0], None)


def state_dicts_replaced(optimizer):
    for p in parameters(optimizer):
        optimizer.state[p] = {key: value.clone() * 2 for key, value in optimizer.state[p].items()}


def state_replaced(optimizer):
    for p in parameters(optimizer):
        optimizer.state[p] = copy.deepcopy(optimizer.state[p])
    for _, _, value in each_state(optimizer):
        value.mul_(2)


def lr_edited(optimizer):
    optimizer.param_groups[0]["lr"] = 0.03


def lr_tensor(optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.03)


def decay_edited(optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.3


def decay_off(optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0.0


def maximized(optimizer):
    optimizer.param_groups[0]["maximize"] = True


def betas_in_a_list(optimizer):
    if "betas" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["betas"] = [0.5, 0.6]


def foreach_on(optimizer):
    optimizer.param_groups[0]["foreach"] = True


def foreach_off(optimizer):
    optimizer.param_groups[0]["foreach"] = False


def group_added(optimizer):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.linspace(-1, 1, 5))], "lr": 0.02})


def parameter_exchanged(optimizer):
    group = optimizer.param_groups[0]
    optimizer.state.pop(group["params"][0], None)
    group["params"][0] = torch.nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))


def parameter_taken_out(optimizer):
    del optimizer.param_groups[0]["params"][1]


def loaded(optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.02
    for state in saved["state"].values():
        for value in state.values():
            value.mul_(2)
    optimizer.load_state_dict(saved)


def frozen(optimizer):
    parameters(optimizer)[0].requires_grad_(False)


def zeroed(optimizer):
    optimizer.zero_grad(set_to_none=False)


def hooked(optimizer):
    def halve(optimizer, args, kwargs):
        for p in parameters(optimizer):
            p.grad = p.grad / 2

    optimizer.register_step_pre_hook(halve)


CHANGES = [
    *(
        data_replaced,
        data_transposed,
        data_transposed_back,
        data_in_one_buffer,
        data_with_gaps,
        data_swapped,
        data_edited,
    ),
    *(states_replaced, states_data_replaced, states_edited, one_step_edited, one_step_replaced, carried_edited),
    *(one_step_edited_unseen, numbers_edited_unseen),
    *(states_deleted, one_state_deleted, state_dicts_replaced, state_replaced),
    *(lr_edited, lr_tensor, decay_edited, decay_off, maximized, betas_in_a_list, foreach_on, foreach_off),
    *(group_added, parameter_exchanged, parameter_taken_out, loaded, frozen, zeroed, hooked),
    *(copy.deepcopy, through_pickle),
]
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


# Gradients. -----------------------------------------------------------------------------------------------------------


def some_none(optimizer, p):
    return None if p.ndim == 1 else like(p)


def transposed(optimizer, p):
    return like(p).t().contiguous().t() if p.ndim == 2 else like(p)


def with_gaps(optimizer, p):
    return torch.stack([like(p), like(p)], -1)[..., 0]


def expanded(optimizer, p):
    return torch.randn((), dtype=p.dtype).expand(p.shape)


def negated(optimizer, p):
    """A tensor with the negative bit."""
    return torch.randn(p.shape, dtype=torch.complex128).conj().imag


def the_parameter(optimizer, p):
    return p.data


def the_parameter_detached(optimizer, p):
    return p.detach()


def of_another_parameter(optimizer, p):
    other = parameters(optimizer)[0].detach().reshape(-1)
    return other[1 : len(p) + 1] if p.ndim == 1 and len(p) < len(other) else like(p)


DRAWS = [
    some_none,
    transposed,
    with_gaps,
    expanded,
    negated,
    the_parameter,
    the_parameter_detached,
    of_another_parameter,
]
