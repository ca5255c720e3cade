"""Faults in the middle of a step, and hostile input: what is refused, and what is left."""

import copy
import io
import math
import os
import pickle
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from copies import through_a_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_like_cases import OPTIONS, make_pair, parameters

import functorch_optim as fo

NAN, INF = math.nan, math.inf


# Optimizers: a way to run a step each. --------------------------------------------------------------------------------


def make_params():
    """Parameters that are worked on where they are, some that are copied together, and one that lies otherwise."""
    torch.manual_seed(0)
    tensors = [torch.randn(90, 60), torch.randn(3), torch.randn(()), torch.randn(4, 3).double(), torch.randn(5, 4).t()]
    return [nn.Parameter(tensor) for tensor in tensors]


def in_groups():
    params = make_params()
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05}]


def whole_tensors():
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10)), fo.clip_by_norm(0.1))


OPTIMIZERS = {
    "native": lambda: fo.optim.Adam(in_groups(), amsgrad=True),
    "native sgd": lambda: fo.optim.SGD(in_groups(), momentum=0.9),
    "blocks": lambda: fo.optim.Adam(in_groups(), fused=False),
    "foreach": lambda: fo.optim.RMSprop(make_params()[:3], momentum=0.9, foreach=True),
    "carried": lambda: fo.optim.NAdam(in_groups()),
    "schedule": lambda: fo.Optimizer(make_params(), fo.chain(fo.clip_by_global_norm(1.0), fo.adam(lambda n: 0.1 / n))),
    "whole tensors": lambda: fo.Optimizer(make_params(), whole_tensors()),
    "whole tree": lambda: fo.Optimizer(make_params(), fo.chain(fo.trace(0.9), fo.reduce_on_plateau(), fo.sgd(0.1))),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
steps_before = pytest.mark.parametrize("before", [0, 1, 4], ids=["first", "second", "steady"])


def give_gradients(optimizer, t):
    generator = torch.Generator().manual_seed(t)
    for p in parameters(optimizer):
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def step(optimizer, t, closure=None):
    give_gradients(optimizer, t)
    return optimizer.step(closure or (lambda: torch.tensor(1.0)))


def trained(make, before):
    optimizer = make()
    for t in range(before):
        step(optimizer, t)
    return optimizer


def numbers(optimizer):
    """Copy parameters and states, by name."""
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    found = {f"{i}.p": p.detach().clone() for i, p in enumerate(parameters(optimizer))}
    for i, state in saved.items():
        found.update({f"{i}.{key}": value for key, value in state.items()})
    return fo.state_dict(found)


def assert_equal(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def assert_goes_on(optimizer, t=9):
    """What can be seen of an optimizer is all there is: its next steps are those of a copy, which knows no more."""
    twin = copy.deepcopy(optimizer)
    for later in range(t, t + 3):
        for one in (optimizer, twin):
            step(one, later)
        assert_equal(numbers(optimizer), numbers(twin))


@contextmanager
def nothing_changes(optimizer):
    before = numbers(optimizer)
    tensors = [*parameters(optimizer), *[t for state in optimizer.state.values() for t in state.values()]]
    yield
    assert_equal(numbers(optimizer), before)
    now = [*parameters(optimizer), *[t for state in optimizer.state.values() for t in state.values()]]
    assert list(map(id, now)) == list(map(id, tensors))
    assert torch.is_grad_enabled()
    assert_goes_on(optimizer)


# Gradients that are no numbers. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(("name", "options"), [(name, options[-1]) for name, options in OPTIONS.items()], ids=OPTIONS)
def test_gradients_that_are_no_numbers(name, options, value):
    """They spread as far as in torch.optim, in this step and later ones, and no farther."""
    pair = make_pair(name, **options)
    for t in range(5):
        for optimizer in pair:
            give_gradients(optimizer, t)
            if t == 2:
                parameters(optimizer)[0].grad[0, 1] = value
            optimizer.step()
        for p, q in zip(*map(parameters, pair), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, equal_nan=True)
    reached = [p.isfinite().all().item() for p in parameters(pair[0])]
    assert reached[1:] == [True] * len(reached[1:])


# What raises. ---------------------------------------------------------------------------------------------------------


class BrokenError(Exception):
    """What a user's function raises."""


def raising(*args):
    raise BrokenError


def closure_midway(optimizer):
    def closure():
        optimizer.zero_grad()
        loss = sum([p.square().sum() for p in parameters(optimizer)])
        loss.backward()
        raise BrokenError

    optimizer.step(closure)


def pre_hook(optimizer):
    with optimizer.register_step_pre_hook(raising):
        optimizer.step()


def tensor_hook(optimizer):
    """It raises while some gradients are there and others are not."""

    def closure():
        optimizer.zero_grad()
        sum([p.square().sum() for p in parameters(optimizer)]).backward()

    with parameters(optimizer)[1].register_hook(raising):
        optimizer.step(closure)


def accumulation_hook(optimizer):
    def closure():
        optimizer.zero_grad()
        sum([p.square().sum() for p in parameters(optimizer)]).backward()

    with parameters(optimizer)[1].register_post_accumulate_grad_hook(raising):
        optimizer.step(closure)


@each_optimizer
@steps_before
@pytest.mark.parametrize("fault", [closure_midway, pre_hook, tensor_hook, accumulation_hook])
def test_what_raises_before_a_step(make, before, fault):
    optimizer = trained(make, before)
    give_gradients(optimizer, before)
    with nothing_changes(optimizer), pytest.raises(BrokenError):
        fault(optimizer)


@each_optimizer
@steps_before
def test_hooks_that_raise_after_a_step(make, before):
    """The step is made, and the error goes on."""
    optimizer, twin = trained(make, before), trained(make, before)
    with optimizer.register_step_post_hook(raising), pytest.raises(BrokenError):
        step(optimizer, before)
    step(twin, before)
    assert_equal(numbers(optimizer), numbers(twin))
    assert_goes_on(optimizer)


def test_a_schedule_that_raises_in_the_last_group():
    def schedule(count):
        return 0.1 if count < 3 else raising()

    groups = [{"params": params} for params in (make_params()[:2], make_params()[2:])]
    optimizer = fo.Optimizer(groups, fo.adam, lr=0.1)
    optimizer.param_groups[1]["lr"] = schedule
    for t in range(3):
        step(optimizer, t)
    give_gradients(optimizer, 3)
    before = numbers(optimizer)
    with pytest.raises(BrokenError):
        optimizer.step()
    assert_equal(numbers(optimizer), before)


# Memory that runs out. ------------------------------------------------------------------------------------------------


class Scarce(TorchDispatchMode):
    """Let so many operations that make tensors have memory, and no more; by default all of them."""

    def __init__(self, allowed=math.inf):
        super().__init__()
        self.allowed, self.made = allowed, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function._schema.returns
        self.made += any(value.alias_info is None and "Tensor" in str(value.type) for value in returned)
        if self.made > self.allowed:
            raise torch.OutOfMemoryError(str(function))
        return function(*args, **(kwargs or {}))


def places(count):
    """Pick some of so many places where memory may run out: more of the last, where things are written."""
    return sorted({*range(0, count, 1 + count // 5), *range(max(0, count - 12), count)})


@each_optimizer
@steps_before
def test_memory_that_runs_out(make, before):
    """Wherever it does, nothing has been written."""
    twin = trained(make, before)
    give_gradients(twin, before)
    with Scarce() as memory:
        twin.step(lambda: 1.0)
    assert memory.made
    for allowed in places(memory.made):
        optimizer = trained(make, before)
        give_gradients(optimizer, before)
        unchanged = numbers(optimizer)
        with pytest.raises(torch.OutOfMemoryError), Scarce(allowed):
            optimizer.step(lambda: 1.0)
        assert_equal(numbers(optimizer), unchanged)
        if allowed % 4 == 0:
            assert_goes_on(optimizer)


@pytest.mark.parametrize("foreach", [None, True])
def test_memory_that_runs_out_in_place(foreach):
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.nadam(0.1))
    some = 3 if foreach else 5  # which foreach kernels take in one batch
    grads = [torch.ones_like(p) for p in make_params()[:some]]

    def step_(allowed):
        params = [p.detach() for p in make_params()[:some]]
        state = fo.step(tx, grads, tx.init(params), params)[1]
        given = (params, list(fo.state_dict(state).values()))
        before = copy.deepcopy(given)
        with suppress(torch.OutOfMemoryError), Scarce(allowed) as memory:
            fo.step_(tx, grads, state, params, foreach=foreach)
        if memory.made > allowed:
            assert_equal(given, before)
        return memory.made

    count = step_(math.inf)
    assert [step_(allowed) for allowed in places(count)] == [allowed + 1 for allowed in places(count)]


def test_memory_that_runs_out_between_batches_of_foreach(monkeypatch):
    """Batches are written one after the other; each is whole, and none is counted."""
    monkeypatch.setattr(
        "functorch_optim.execution.in_place._batches", lambda tensors: [[i] for i in range(len(tensors))]
    )

    def make():
        return fo.optim.RMSprop(make_params()[:3], momentum=0.9, foreach=True)

    outcomes, failures = set(), 0
    twin = trained(make, 2)
    before = numbers(twin)
    step(twin, 2)
    after = numbers(twin)
    while True:
        optimizer = trained(make, 2)
        give_gradients(optimizer, 2)
        try:
            with Scarce(failures):
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            failures += 1
        now = numbers(optimizer)
        for i in range(3):
            own = [key for key in now if key.startswith(f"{i}.") and key != f"{i}.step"]
            new = {torch.equal(now[key], after[key]) for key in own}
            old = {torch.equal(now[key], before[key]) for key in own}
            assert len(new) == len(old) == 1
            assert new != old
            assert torch.equal(now[f"{i}.step"], before[f"{i}.step"])
        outcomes.add(tuple([torch.equal(now[f"{i}.p"], after[f"{i}.p"]) for i in range(3)]))
        assert_goes_on(optimizer)
    assert outcomes == {(False, False, False), (True, False, False), (True, True, False)}


# Interrupts. ----------------------------------------------------------------------------------------------------------

PACKAGE = str(Path(fo.__file__).parent) + os.sep


def lines_of(function, interrupted=None):
    """Call a function; return how many lines of the library it ran, or interrupt it before one."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == interrupted:
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(former)
    return count


@each_optimizer
@steps_before
def test_interrupts(make, before):
    """Every number is that of before or of after; what is counted is written; and nothing else remembers."""
    for _ in range(2):  # once for what is kept for good, programs say
        twin = trained(make, before)
        old = numbers(twin)
        count = lines_of(lambda: step(twin, before))
        new = numbers(twin)
    written = set()
    for line in {*range(1, count, count // 3), *range(max(1, count - 60), count + 1, 9)}:
        optimizer = trained(make, before)
        # An interrupt between a `with` and its body leaves autograd off; no Python code can help that.
        with suppress(KeyboardInterrupt), torch.enable_grad():
            lines_of(lambda: step(optimizer, before), interrupted=line)
        now = numbers(optimizer)
        for key, value in now.items():
            known = [numbers[key] for numbers in (old, new) if key in numbers]
            assert torch.stack([value == one for one in known]).any(0).all()
        for i, p in enumerate(parameters(optimizer)):
            of = {key for key in new if key.startswith(f"{i}.")}
            if optimizer.state.get(p):
                assert of <= now.keys()
            if f"{i}.step" in now and now[f"{i}.step"] == new[f"{i}.step"]:
                assert_equal({key: now[key] for key in of}, {key: new[key] for key in of})
        written.add(all(torch.equal(now[key], value) for key, value in old.items()))
        assert_goes_on(optimizer)
    assert written == {True, False}


# Checkpoints. ---------------------------------------------------------------------------------------------------------


class Malicious:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("malicious",)


def saved_bytes(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


def load(data):
    return torch.load(io.BytesIO(data), weights_only=True)


@each_optimizer
def test_what_is_saved_is_plain(make):
    optimizer = trained(make, 2)
    saved = through_a_file(optimizer.state_dict(), weights_only=True)
    other = make()
    other.load_state_dict(saved)
    for p, q in zip(*map(parameters, (optimizer, other)), strict=True):
        torch.testing.assert_close(other.state[q], optimizer.state[p], rtol=0, atol=0, check_dtype=False)


def test_code_in_checkpoints_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer = trained(OPTIMIZERS["carried"], 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = Malicious()
    with nothing_changes(optimizer):
        with pytest.raises(Exception, match="Weights only load failed"):
            optimizer.load_state_dict(load(saved_bytes(saved)))
        with pytest.raises(ValueError, match="The saved exp_avg of parameter '0' is <.*Malicious.*, where a tensor"):
            optimizer.load_state_dict(saved)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_cut_off():
    optimizer = trained(OPTIMIZERS["carried"], 2)
    data = saved_bytes(optimizer.state_dict())
    with nothing_changes(optimizer):
        for end in (0, 1, len(data) // 3, len(data) // 2, len(data) - 1):
            with pytest.raises((RuntimeError, EOFError, ValueError, pickle.UnpicklingError)):
                optimizer.load_state_dict(load(data[:end]))


@pytest.mark.parametrize("foreign", [None, 3, [], "text", torch.ones(2)], ids=str)
@pytest.mark.parametrize("name", ["native", "whole tensors"])
def test_checkpoints_that_are_no_dicts(name, foreign):
    optimizer = trained(OPTIMIZERS[name], 2)
    kind = type(foreign).__name__
    with (
        nothing_changes(optimizer),
        pytest.raises(ValueError, match=f"saved state dict is of type {kind}, where a dict"),
    ):
        optimizer.load_state_dict(foreign)


@pytest.mark.parametrize("name", ["native", "whole tensors"])
def test_checkpoints_of_models(name):
    optimizer = trained(OPTIMIZERS[name], 2)
    with nothing_changes(optimizer), pytest.raises(KeyError, match="state"):
        optimizer.load_state_dict(nn.Linear(2, 2).state_dict())


NUMBERS = {
    "nan": (torch.tensor(NAN), "The saved '1.step' is nan, but it is a count of updates"),
    "infinite": (torch.tensor(INF), "The saved '1.step' is inf, but it is a count of updates"),
    "negative": (torch.tensor(-3), "The saved '1.step' is -3, but it is a count of updates"),
    "half": (torch.tensor(2.5), "The saved '1.step' is 2.5, but it is a count of updates"),
    "complex": (torch.tensor(1j), "The saved '1.step' is torch.complex64, but the state's is torch.int64"),
    "shape": (torch.ones(2), r"The saved '1.step' has shape \(2,\), but the state's has \(\)"),
    "none": (None, "The saved '1.step' is None, where a tensor belongs"),
    "text": ("3", "The saved '1.step' is '3', where a tensor belongs"),
}


@pytest.fixture
def functional():
    """A functional state, and the parameters."""
    tx, params = fo.chain(fo.trace(0.9), fo.scale_by_nadam()), {"w": torch.ones(2), "b": torch.ones(())}
    return tx.update(params, tx.init(params), params)[1], params


@pytest.mark.parametrize(("value", "message"), NUMBERS.values(), ids=NUMBERS)
def test_steps_of_functional_states(functional, value, message):
    state, _ = functional
    with pytest.raises(ValueError, match=message):
        fo.load_state_dict(state, {**fo.state_dict(state), "1.step": value})


@pytest.mark.parametrize("step", [INF, -1.0, 0.5])
def test_steps_of_functional_states_by_parameter(functional, step):
    state, params = functional
    saved = fo.state_dict(state, params)
    for own in saved["state"].values():
        own["step"] = torch.tensor(step)
    with pytest.raises(ValueError, match=f"The saved '0.step' is {step}, but it is a count of updates"):
        fo.load_state_dict(state, {**saved, "transformation": {}}, params)


def test_integers_that_are_no_counts():
    state = {"number": torch.tensor(-3)}
    assert fo.load_state_dict(state, {"number": torch.tensor(-4.0)})["number"] == -4
    with pytest.raises(ValueError, match="The saved 'number' is 0.5, but the state's is torch.int64"):
        fo.load_state_dict(state, {"number": torch.tensor(0.5)})


def test_complex_numbers_in_real_states(functional):
    state, _ = functional
    with pytest.raises(
        ValueError, match="The saved '1.exp_avg.w' is torch.complex64, but the state's is torch.float32"
    ):
        fo.load_state_dict(state, {**fo.state_dict(state), "1.exp_avg.w": torch.ones(2) * 1j})


NO_DICTS = {
    "all": (lambda saved: None, "The saved state is of type NoneType, where a dict belongs"),
    "states": (lambda saved: {**saved, "state": []}, "The saved state is of type list, where a dict belongs"),
    "one": (lambda saved: {**saved, "state": {"w": 3}}, "state of parameter 'w' is of type int, where a dict belongs"),
    "rest": (
        lambda saved: {**saved, "transformation": 3},
        "The saved state of functions of the whole tree, 'transformation', is of type int, where a dict belongs",
    ),
}


@pytest.mark.parametrize(("change", "message"), NO_DICTS.values(), ids=NO_DICTS)
def test_functional_states_that_are_no_dicts(functional, change, message):
    state, params = functional
    with pytest.raises(ValueError, match=message):
        fo.load_state_dict(state, change(fo.state_dict(state, params)), params)


def test_functional_states_that_are_no_dicts_by_path(functional):
    with pytest.raises(ValueError, match="The saved state is of type Tensor, where a dict belongs"):
        fo.load_state_dict(functional[0], torch.ones(2))
