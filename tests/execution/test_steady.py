"""Steps like the one before: that they are taken, and never where something has been changed in between."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import functorch_optim as fo
from functorch_optim.optim._step import PreparedStep
from functorch_optim.testing._copies import through_pickle

pytestmark = pytest.mark.usefixtures("double")

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


@pytest.fixture
def taken(monkeypatch):
    """List what was prepared for an earlier step, each time that it is taken for another one."""
    steps = []
    fits = PreparedStep.fits
    monkeypatch.setattr(PreparedStep, "fits", lambda self, state: fits(self, state) and not steps.append(self))
    return steps


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


# That it is taken. ----------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("make", [ours, wrapper])
def test_plain_training_is_steady(name, make, taken):
    compare(make(name), torchs(name), steps=10)
    assert len(taken) == 9
    assert len(set(taken)) == 1  # what the first step prepared


CHAINS = {
    "clipped": lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adam(fo.schedules.cosine(0.1, 10))),
    "extra": lambda: fo.chain(
        fo.leafwise(None, lambda g, state, p, s: (s * g, state), lambda step, *, value: 1 / value, elementwise=True),
        fo.adam(0.1),
    ),
    "carried": lambda: fo.chain(fo.nadam(0.1), fo.asgd(0.1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_it_is_the_functional_form(name, taken):
    optimizer = fo.Optimizer(make_params(), CHAINS[name]())
    tx, params = CHAINS[name](), [p.detach() for p in make_params()]
    state = tx.init(params)
    for step in range(8):
        give_gradients(optimizer, step)
        extra = {"value": 1.0 + step} if name == "extra" else {}
        optimizer.step(**extra)
        updates, state = tx.update([p.grad for p in parameters(optimizer)], state, params, **extra)
        params = fo.apply_updates(params, updates)
        for p, q in zip(parameters(optimizer), params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)
    assert len(taken) == 7


def test_numbers_that_are_read_at_every_step_keep_it_steady(taken):
    pair = ours("Adam"), torchs("Adam")
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in pair]
    for step in range(8):
        for optimizer in pair:
            give_gradients(optimizer, step)
            optimizer.param_groups[0]["betas"] = (0.5 + 0.01 * step, 0.9)
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_same(*pair)
    assert len(taken) == 7


OTHERS = {
    "tree_rule": lambda: fo.chain(fo.adam(0.1), fo.stateless(lambda updates, params: updates)),
    "whole_tensors": lambda: fo.chain(fo.adam(0.1), fo.clip_by_norm(0.1)),
    "a_number_for_each": lambda: fo.sgd([0.1, 0.2, 0.3, 0.4, 0.5], momentum=0.9),
    "norm_in_the_middle": lambda: fo.chain(fo.trace(0.9), fo.clip_by_global_norm(0.1), fo.sgd(0.1)),
    "masked": lambda: fo.masked(fo.sgd(0.1), lambda params: [p.ndim > 1 for p in params]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_chains_are_the_functional_form(name, taken):
    optimizer, tx = fo.Optimizer(make_params(), OTHERS[name]()), OTHERS[name]()
    params = [p.detach() for p in make_params()]
    state = tx.init(params)
    for step in range(5):
        give_gradients(optimizer, step)
        optimizer.step()
        params, state = fo.step(tx, [p.grad for p in parameters(optimizer)], state, params)
        for p, q in zip(parameters(optimizer), params, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)
    assert len(taken) == (0 if name == "tree_rule" else 4)  # a function of the whole tree may return anything


@pytest.mark.parametrize("lr", [[0.1], {"w": 0.1}])
def test_a_number_for_each_of_one_parameter(lr):
    """With one parameter, a tree of numbers is one pass over all."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = fo.Optimizer([("w", p)] if isinstance(lr, dict) else [p], fo.sgd, lr=lr)
    for step in range(6):
        p.grad = torch.ones(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.1 * (step + 1)))


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
    *(states_deleted, one_state_deleted, state_dicts_replaced, state_replaced),
    *(lr_edited, lr_tensor, decay_edited, decay_off, maximized, betas_in_a_list, foreach_on, foreach_off),
    *(group_added, parameter_exchanged, parameter_taken_out, loaded, frozen, zeroed, hooked),
    *(copy.deepcopy, through_pickle),
]
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@each
@changes
def test_changes_between_steps(name, change, taken):
    compare(ours(name), torchs(name), change)
    assert len(taken) >= 3


@pytest.mark.parametrize("name", ["Adam", "ASGD"])
@changes
def test_changes_between_steps_of_the_wrapper(name, change, taken):
    """Against steps that are all prepared anew."""
    compare(wrapper(name), wrapper(name), change, slow=True)
    assert len(taken) >= 3


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


@each
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_gradients_of_other_kinds(name, draw, taken):
    if draw in (of_another_parameter, the_parameter, the_parameter_detached):  # which torch overwrites meanwhile
        compare(ours(name), ours(name), draw=draw, slow=True)
    else:
        compare(ours(name), torchs(name), draw=draw)
    assert len(taken) >= 3


@each
@pytest.mark.parametrize("make", [ours, wrapper])
def test_a_gradient_that_is_a_state(name, make, taken):
    def draw(optimizer, p):
        kept = [value for key, value in optimizer.state[p].items() if key != "step" and value.shape == p.shape]
        return kept[0] if kept and p.ndim else like(p)

    compare(make(name), make(name), draw=draw, slow=True)
    assert len(taken) >= 3


def test_sparse_gradients(taken):
    def draw(optimizer, p):
        return like(p).to_sparse() if p.ndim == 2 else like(p)

    for make in (ours, wrapper):
        compare(make("SGD"), make("SGD"), lambda o: o.param_groups[0].update(weight_decay=0), draw=draw, slow=True)
    optimizer = ours("Adam")
    for step in range(5):
        give_gradients(optimizer, step)
        optimizer.step()
    give_gradients(optimizer, 5, draw)
    before = [p.detach().clone() for p in parameters(optimizer)]
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, parameters(optimizer), before))


@each
@pytest.mark.parametrize("make", [ours, wrapper])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_modules_that_are_converted(name, make, dtype, taken):
    def change(optimizer):
        for p in parameters(optimizer):
            p.grad = None
        torch.nn.ParameterList(parameters(optimizer)).to(dtype)

    if dtype != torch.float16:
        compare(make(name), make(name), change, slow=True)
        assert len(taken) >= 3
    pair = make(name), make(name)
    for optimizer in pair:
        torch.nn.ParameterList(parameters(optimizer)).float()
    compare(*pair, change, slow=True)
    assert len(taken) >= 3


def test_gradients_of_another_dtype():
    """A parameter may say that its gradients have another dtype."""
    optimizer = fo.Optimizer([torch.nn.Parameter(torch.ones(3))], fo.adam)
    [p] = parameters(optimizer)
    for _ in range(5):
        p.grad = torch.ones(3)
        optimizer.step()
    before = p.detach().clone()
    p.grad = None
    p.grad_dtype = torch.float32
    p.grad = torch.ones(3, dtype=torch.float32)
    with pytest.raises(ValueError, match="have shape \\(3,\\) and dtype torch.float32 at '0', but the parameter"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


# Numbers in groups of the wrapper. ------------------------------------------------------------------------------------


def with_lists(lr, betas, decays=(0.1, 0.2)):
    return fo.chain(fo.add_decayed_weights(decays[1]), fo.adam(lr, betas))


@pytest.mark.parametrize(
    "edit",
    [
        lambda group: group["betas"].__setitem__(0, 0.1),
        lambda group: group["decays"].__setitem__(1, 0.9),
        lambda group: group.update(lr=0.5),
        lambda group: group["lr"].fill_(0.5) if isinstance(group["lr"], torch.Tensor) else group.update(lr=0.4),
        lambda group: group.update(foreach=True),
        lambda group: group.update(decays=(0.1, torch.tensor(0.5))),
    ],
)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_numbers_of_the_wrapper_are_read(edit, lr, taken):
    def make():
        given = {"lr": copy.deepcopy(lr), "betas": [0.9, 0.99], "decays": [0.1, 0.2]}
        return fo.Optimizer(make_params(), with_lists, **given)

    pair = compare(make(), make(), lambda optimizer: edit(optimizer.param_groups[0]), slow=True)
    assert taken
    unchanged = compare(make(), make(), slow=True)[0]
    if "foreach" not in edit.__code__.co_names and pair[0].param_groups[0].get("foreach") is None:
        assert not torch.equal(parameters(pair[0])[0], parameters(unchanged)[0])


def test_errors_leave_everything_as_it_was(taken):
    def failing(step):
        if step >= 5:
            raise ValueError("too late")
        return 0.1

    optimizer = fo.Optimizer(make_params(), fo.chain(fo.nadam(0.1), fo.scale_by_schedule(failing)))
    for step in range(5):
        give_gradients(optimizer, step)
        optimizer.step()
    assert taken
    tensors = [*parameters(optimizer), *[value for *_, value in each_state(optimizer)]]
    before = [(tensor, tensor.detach().clone(), tensor._version) for tensor in tensors]
    with pytest.raises(ValueError, match="too late"):
        optimizer.step()
    for tensor, value, version in before:
        assert tensor._version == version
        assert torch.equal(tensor, value)


# Anything, in any order. ----------------------------------------------------------------------------------------------

EDITS = [change for change in CHANGES if change not in (parameter_taken_out, hooked, data_swapped)]
ACTIONS = st.lists(st.sampled_from([None, None, None, None, *EDITS, *DRAWS]), min_size=4, max_size=14)


@pytest.mark.parametrize("make", [ours, wrapper])
@settings(max_examples=2 * settings().max_examples)
@given(ACTIONS, st.sampled_from(sorted(OPTIONS)))
def test_anything_in_any_order(make, actions, name):
    pair = [make(name) for _ in range(2)]
    for step, action in enumerate(actions):
        draw = action if action in DRAWS else lambda optimizer, p: like(p)
        if action in EDITS:
            pair = [changed(optimizer, action) for optimizer in pair]
        for optimizer in pair:
            give_gradients(optimizer, step, draw)
        forget(pair[1])
        for optimizer in pair:
            optimizer.step()
        assert_same(*pair, tolerance=1e-9)
