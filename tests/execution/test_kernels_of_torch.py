"""torch's kernels run programs: the numbers are those of the program, and what is written is counted."""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import functorch_optim as fo
from functorch_optim._core.rule import ADD, Rule
from functorch_optim._execution import fused, native, torch_kernels
from functorch_optim._execution.blocks import InBlocks
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage

NUMBERS = {
    "weight1": 0.1,
    "beta2": 0.75,
    "weight2": 0.25,
    "rate": 0.6,
    "eps": 0.3,
    "lr": -0.2,
    "weight_decay": 0.4,
    "momentum": 0.8,
    "gain": 0.7,
}


@fo.leaf_state
class Kept(NamedTuple):
    kept: torch.Tensor


def described(kernel):
    """Name a kernel by what it does."""
    chosen = [key if value is True else value for key, value in kernel.rule.keywords.items() if value]
    return "-".join([kernel.rule.func.__name__.strip("_"), *chosen])


KERNELS = {described(kernel): kernel for kernel in torch_kernels.kernels()}
each = pytest.mark.parametrize("name", KERNELS)


def program_of(kernel, like, factors=()):
    """Record a kernel, after products of the gradient with numbers."""
    state = native._STATES[kernel.states]

    def update(g, state, p, n):
        return kernel.rule(g, state, p, dict(zip(kernel.numbers, n, strict=True)))

    product = Rule(None, lambda g, state, p, n: (g * n, state), elementwise=True)
    stages = [*[Stage(product) for _ in factors], Stage(Rule(None, update, elementwise=True, needs_params=True))]
    numbers = [NUMBERS[key] for key in kernel.numbers]
    program = record(stages, [*[() for _ in factors], state], True, [*factors, numbers], like)
    return moving(program), [*factors, *numbers]


def moving(program):
    """Say that the first output is the parameter, as of a program that ends in the addition."""
    return replace(program, moves=True)


def flipped(p):
    return torch.empty(p.shape[::-1], dtype=p.dtype).permute(tuple(reversed(range(p.ndim))))


LAYOUTS = {
    "contiguous": lambda p: torch.empty_like(p),
    "channels_last": lambda p: torch.empty_like(p, memory_format=torch.channels_last) if p.ndim == 4 else p.clone(),
    "transposed": flipped,
    "with_gaps": lambda p: torch.empty([*p.shape, 2], dtype=p.dtype)[..., 0],
}
SHAPES = [(3, 4), (), (0, 2), (17,), (2, 3, 4, 2)]


def drawn(count, dtype, layout, others="contiguous"):
    """Draw gradients, parameters and states: a list of tensors for each; states are not negative."""
    columns = []
    for number in range(count):
        make = LAYOUTS[layout if number else others]
        tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
        columns.append([make(t).copy_(t if number < 2 else t.abs()) for t in tensors])
    return columns


def copied(columns):
    """Copy tensors so that they lie in memory as they do."""
    lying = [[torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in column] for column in columns]
    return [[t.copy_(o) for t, o in zip(new, old, strict=True)] for new, old in zip(lying, columns, strict=True)]


class Unused:
    """A machine that must not run."""

    def __getattr__(self, name):
        pytest.fail("the kernel does not take it")


# A kernel computes what its program does. -----------------------------------------------------------------------------


@each
@pytest.mark.parametrize("factors", [(), (0.5,), (0.5, -2.0)], ids=["alone", "after_a_product", "after_two"])
def test_a_kernel_is_found_in_its_program(name, factors):
    program, numbers = program_of(KERNELS[name], torch.empty(0), factors)
    found = native.match(program)
    assert described(found.kernel) == name
    assert (found.gradient == "g") == (not factors)
    assert native.Native(program, found, Unused(), numbers)._named(numbers) == {
        key: NUMBERS[key] for key in found.numbers
    }


TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6}


@pytest.mark.sampled(size=128)
@each
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factors", [(), (0.5,)], ids=["alone", "after_a_product"])
def test_a_kernel_has_the_numbers_of_its_program(name, dtype, layout, factors):
    """In place and on copies, whatever lies where; tensors with gaps go to the other machine."""
    program, numbers = program_of(KERNELS[name], torch.empty(0, dtype=dtype), factors)
    inputs = drawn(len(program.inputs), dtype, layout)
    expected = InBlocks(program).new(copied(inputs), numbers)
    other = InBlocks(program) if layout == "with_gaps" else Unused()
    machine = native.Native(program, native.match(program), other, numbers)

    before = [[(tensor._version, tensor.clone()) for tensor in column] for column in inputs]
    found = machine.new(inputs, numbers)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for column, kept in zip(inputs, before, strict=True):
        for tensor, (version, value) in zip(column, kept, strict=True):
            assert tensor._version == version
            assert torch.equal(tensor, value)

    grads, *columns = copied(inputs)
    versions = [[tensor._version for tensor in column] for column in columns]
    step = machine.over(columns)(grads, numbers)
    torch.testing.assert_close(columns, inputs[1:], rtol=0, atol=0)  # nothing is written before it is asked for
    step()
    torch.testing.assert_close(columns, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(grads, inputs[0], rtol=0, atol=0)
    for column, old in zip(columns, versions, strict=True):
        assert all(t._version > version for t, version in zip(column, old, strict=True) if t.numel())


REFUSED = {
    "sgd-momentum": {"momentum": 0.0},
    "sgd-momentum-nesterov": {"momentum": 0.0},
    "adam": {"weight2": 0.3},
    "adam-amsgrad": {"beta2": 1.0, "weight2": 0.0},
    "adam-L2": {"weight1": 0.0},
    "adagrad": {"lr": torch.tensor(-0.2)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_that_a_kernel_does_not_take(name, monkeypatch):
    """The step is made by the other machine, and the next one may be the kernel's again."""
    program, numbers = program_of(KERNELS[name], torch.empty(0, dtype=torch.float64))
    names = KERNELS[name].numbers
    refused = [REFUSED[name].get(key, number) for key, number in zip(names, numbers, strict=True)]
    calls = []
    for kernel in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_", "_fused_adagrad_"):
        original = getattr(torch, kernel)
        monkeypatch.setattr(torch, kernel, lambda *a, k=original, **o: calls.append(1) or k(*a, **o))
    inputs = drawn(len(program.inputs), torch.float64, "contiguous")
    other = InBlocks(program)
    machine = native.Native(program, native.match(program), other, numbers)
    grads, *columns = copied(inputs)
    ready = machine.over(columns)
    for given, count in ((numbers, 1), (refused, 1), (numbers, 2)):
        expected = other.new([grads, *copied(columns)], given)
        ready(grads, given)()
        torch.testing.assert_close(columns, expected, rtol=1e-14, atol=1e-14)
        assert len(calls) == count


def test_programs_that_are_almost_those_of_a_kernel():
    """A rule that does something else besides, or in another way, is no kernel's."""

    def eps_inside(g, state, p, n):
        return p - n * g / torch.sqrt(state[0] + g * g + 1e-8), (state[0] + g * g,)

    def another_beta(g, state, p, n):
        return p - n * (0.5 * state[0] + g), (0.9 * state[0] + g,)

    def read_elsewhere(g, state, p, n):
        return p - n * g, (g,)

    for update in (eps_inside, another_beta, read_elsewhere):
        rule = Rule(None, update, elementwise=True, needs_params=True)
        program = moving(record([Stage(rule)], [native._STATES[1]], True, [0.1], torch.empty(0)))
        assert native.match(program) is None
    without = record([Stage(Rule(None, lambda g, state, p, n: (-n * g, state)))], [()], True, [0.1], torch.empty(0))
    assert native.match(without) is None  # the parameter stays


def averaging(weigh):
    """Record SGD, and a state that a function makes of the parameter before and after, the gradient, and itself."""

    def update(g, state, p, n):
        moved = p + n * g
        return moved, (weigh(p, moved, g, state[0]),)

    rule = Rule(None, update, elementwise=True, needs_params=True)
    return moving(record([Stage(rule)], [native._STATES[1]], True, [0.1], torch.empty(0, dtype=torch.float64)))


AVERAGES = {
    "of_the_new_parameter": lambda p, moved, g, a: torch.lerp(a, moved, 0.25),
    "that_stands_still": lambda p, moved, g, a: a,
    "of_the_largest": lambda p, moved, g, a: torch.maximum(a, moved),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_what_the_new_parameter_makes_comes_after_the_kernel(name):
    """It reads the parameter that the kernel has written, and overwrites a state."""
    program = averaging(AVERAGES[name])
    machine = native.Native(program, native.match(program), Unused(), [0.1])
    inputs = drawn(3, torch.float64, "contiguous")
    expected = InBlocks(program).new(inputs, [0.1])
    torch.testing.assert_close(machine.new(inputs, [0.1]), expected, rtol=1e-15, atol=1e-15)
    grads, *columns = copied(inputs)
    step = machine.over(columns)(grads, [0.1])
    torch.testing.assert_close(columns, inputs[1:], rtol=0, atol=0)
    step()
    torch.testing.assert_close(columns, expected, rtol=1e-15, atol=1e-15)


OTHERS = {
    "of_the_old_parameter": lambda p, moved, g, a: torch.lerp(a, p, 0.25),
    "of_the_gradient": lambda p, moved, g, a: torch.maximum(a, g),
    "of_several_calls": lambda p, moved, g, a: torch.maximum(a, moved * moved),
    "that_is_forgotten": lambda p, moved, g, a: moved * 2.0,
}


MAKING = {
    "of_a_call_that_has_no_form_in_place": lambda a, moved: torch.atan2(a, moved),
    "of_a_call_by_keyword": lambda a, moved: torch.maximum(input=a, other=moved),
    "of_a_call_with_an_option": lambda a, moved: torch.sub(a, moved, alpha=2),
    "weighted_by_a_tensor": lambda a, moved: torch.lerp(a, moved, torch.tensor(0.25, dtype=torch.float64)),
}


@pytest.mark.parametrize("size", [3, 1 << 15])
@pytest.mark.parametrize("name", MAKING)
def test_a_state_that_cannot_be_overwritten_after_the_kernel_is_of_the_new_parameter(name, size):
    """A call that makes a tensor takes memory, and so is made before the step, when the parameter is the old one."""
    update, added = (
        fo.sgd(0.5),
        fo.leafwise(
            lambda p: Kept(torch.ones_like(p)),
            lambda u, state, p, s: (u, Kept(MAKING[name](state.kept, p + u))),
            elementwise=True,
            needs_params=True,
        ),
    )
    tx, g = fo.chain(update, added), torch.linspace(2, 3, size, dtype=torch.float64)
    params, state = by_update(tx, g, tx.init(g), g)
    found = fo.step_(tx, g.clone(), tx.init(g), g.clone())
    torch.testing.assert_close(found, (params, state), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", OTHERS)
def test_another_state_is_no_kernels(name):
    assert native.match(averaging(OTHERS[name])) is None


def test_products_before_a_kernel():
    plain = [Stage(Rule(None, lambda g, state, p, n: (n * g, state))), Stage(ADD)]
    assert native.match(record(plain, [(), ()], True, [0.1, ()], torch.empty(0))) is not None


# What users see. ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda lr: fo.adam(lr),
    "adam_l2": lambda lr: fo.chain(fo.add_decayed_weights(0.1), fo.adam(lr)),
    "amsgrad": lambda lr: fo.adam(lr, amsgrad=True),
    "adamw": lambda lr: fo.adamw(lr, weight_decay=0.1),
    "adamw_amsgrad": lambda lr: fo.adamw(lr, weight_decay=0.1, amsgrad=True),
    "maximize": lambda lr: fo.adamw(lr, weight_decay=0.1, maximize=True),
    "sgd": lambda lr: fo.sgd(lr),
    "momentum": lambda lr: fo.sgd(lr, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda lr: fo.sgd(lr, momentum=0.9, nesterov=True, maximize=True),
    "momentum_that_vanishes": lambda lr: fo.sgd(lr, momentum=lambda step: torch.where(step > 1, 0.0, 0.9)),
    "adagrad": lambda lr: fo.adagrad(lr, weight_decay=0.1),
    "clipped": lambda lr: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr)),
    "clipped_each": lambda lr: fo.chain(fo.clip(0.5), fo.sgd(lr, momentum=0.9)),
    "averaged": lambda lr: fo.ema_weights(fo.adamw(lr), 0.9, every=2),
    "lookahead": lambda lr: fo.lookahead(fo.sgd(lr, momentum=0.9), every=3),
}


def trained(step, tx, dtype, layout):
    torch.manual_seed(0)
    _, params = drawn(2, dtype, layout)
    state = tx.init(params)
    for _ in range(4):
        grads, _ = drawn(2, dtype, layout, others="transposed")
        params, state = step(tx, grads, state, params)
    return fo.tree.flatten((params, state))[0]


def by_update(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return fo.apply_updates(params, updates), state


@pytest.mark.sampled
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_have_the_numbers_of_update(name, dtype, layout):
    for lr in (0.1, lambda step: 0.1 / (step + 1)):
        expected = trained(by_update, OPTIMIZERS[name](lr), dtype, layout)
        for step in (fo.step, fo.step_):
            found = trained(step, OPTIMIZERS[name](lr), dtype, layout)
            torch.testing.assert_close(found, expected, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


# What is written is counted, so that autograd sees it. ----------------------------------------------------------------

WAYS = {"best": {}, "foreach": {"foreach": True}, "blocks": {"foreach": False}, "fused": {"fused": True}}
STEPPED = {**OPTIMIZERS, "rmsprop": lambda lr: fo.rmsprop(lr, momentum=0.9), "muon": lambda lr: fo.muon(lr)}


@pytest.fixture
def uncompiled(monkeypatch):
    """Run programs that a compiler would be asked for as they are."""
    monkeypatch.setattr(fused, "_compiled", lambda function: function)


def own_params(name, size):
    shape = (size, 2) if name == "muon" else (size,)
    return [torch.randn(shape), torch.randn(shape)]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("size", [3, 1 << 15])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPPED)
def test_steps_in_place_are_counted(name, way, size):
    tx, params = STEPPED[name](0.1), own_params(name, size)
    state = tx.init(params)
    for _ in range(2):
        leaves = fo.tree.flatten((params, state))[0]
        versions = [leaf._version for leaf in leaves]
        values = [leaf.clone() for leaf in leaves]
        params, state = fo.step_(tx, [torch.randn_like(p) for p in params], state, params, **WAYS[way])
        now = {id(leaf) for leaf in fo.tree.flatten((params, state))[0]}
        for leaf, version, value in zip(leaves, versions, values, strict=True):
            if id(leaf) in now and not torch.equal(leaf, value):
                assert leaf._version > version
        assert all(p._version > version for p, version in zip(params, versions, strict=False))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPPED)
def test_autograd_sees_that_an_optimizer_has_written(name, way):
    """A loss computed before a step cannot be differentiated after it."""
    params = [p.requires_grad_() for p in own_params(name, 3)]
    optimizer = fo.Optimizer(params, STEPPED[name](0.1), **WAYS[way])
    for _ in range(3):
        loss = sum((p**3).sum() for p in params)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("way", ["best", "foreach", "blocks"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "NAdam", "RMSprop"])
def test_autograd_sees_that_a_class_has_written(name, way):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = getattr(fo.optim, name)([p], lr=0.1, **WAYS[way])
    for _ in range(3):
        loss = (p**3).sum()
        p.grad = torch.ones(2)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
