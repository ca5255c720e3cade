"""Faults in the middle of a step: gradients that are no numbers, what raises, memory that runs out, interrupts."""

import copy
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from fault_cases import (
    assert_equal,
    assert_goes_on,
    each_optimizer,
    give_gradients,
    make_params,
    nothing_changes,
    numbers,
    step,
    steps_before,
    trained,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch_like_cases import OPTIONS, make_pair, parameters

import functorch_optim as fo

NAN, INF = math.nan, math.inf


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


@pytest.mark.sampled(size=24)
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
    """Let so many operations that make tensors have memory, and no more; by default all of them.

    The library does not see this mode, so that it goes the way that it goes without.
    """

    def __init__(self, allowed=math.inf):
        super().__init__()
        self.allowed, self.made = allowed, 0
        self.unseen = mock.patch.object(torch._C, "_len_torch_dispatch_stack", return_value=0)

    def __enter__(self):
        self.unseen.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.unseen.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function._schema.returns
        self.made += any(value.alias_info is None and "Tensor" in str(value.type) for value in returned)
        if self.made > self.allowed:
            raise torch.OutOfMemoryError(str(function))
        return function(*args, **(kwargs or {}))


def places(count):
    """Pick some of so many places where memory may run out: more of the last, where things are written."""
    return sorted({*range(0, count, 1 + count // 5), *range(max(0, count - 12), count)})


@pytest.mark.sampled(size=4)
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

    step_(math.inf)  # prepares what is kept
    count = step_(math.inf)
    assert [step_(allowed) for allowed in places(count)] == [allowed + 1 for allowed in places(count)]


def test_memory_that_runs_out_between_batches_of_foreach(monkeypatch):
    """Batches are written one after the other; each is whole, and none is counted."""
    monkeypatch.setattr(
        "functorch_optim._execution.foreach._batches", lambda tensors: [[i] for i in range(len(tensors))]
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


@pytest.mark.sampled(size=4)
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
