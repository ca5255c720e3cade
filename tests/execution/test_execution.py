"""Machines: which runs what, and the interpreter of programs over lists of tensors."""

import operator
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch

import functorch_optim as fo
from functorch_optim._core.rule import Rule
from functorch_optim._execution import blocks, choose, flat, fused, recomputed, reduced
from functorch_optim._execution.foreach import Foreach
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage

# Programs over lists of tensors. --------------------------------------------------------------------------------------


class Two(NamedTuple):
    """A state of two tensors."""

    y: torch.Tensor
    z: torch.Tensor


GROUPS = [(2, 3), (), (0,), (4,)]
LIKE = torch.empty(0, dtype=torch.float64)
SCALAR = torch.tensor(0.7, dtype=torch.float64)
FLAG = torch.tensor(True)
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)
OPERATIONS = {
    **{f"{op.__name__}_list": lambda x, y, z, n, op=op: op(x, y) for op in ARITHMETIC},
    **{f"{op.__name__}_number": lambda x, y, z, n, op=op: op(x, n) for op in ARITHMETIC},
    **{f"{op.__name__}_literal": lambda x, y, z, n, op=op: op(x, 0.7) for op in ARITHMETIC},
    **{f"{op.__name__}_scalar": lambda x, y, z, n, op=op: op(x, SCALAR) for op in ARITHMETIC},
    **{f"{op.__name__}_number_first": lambda x, y, z, n, op=op: op(n, x) for op in (*ARITHMETIC, operator.pow)},
    **{f"{op.__name__}_literal_first": lambda x, y, z, n, op=op: op(0.7, x) for op in (*ARITHMETIC, operator.pow)},
    **{f"{op.__name__}_scalar_first": lambda x, y, z, n, op=op: op(SCALAR, x) for op in (*ARITHMETIC, operator.pow)},
    "mul_flag": lambda x, y, z, n: x * FLAG,
    "pow_literal": lambda x, y, z, n: x**3,
    "pow_list": lambda x, y, z, n: x**y,
    "neg": lambda x, y, z, n: -x,
    "abs": lambda x, y, z, n: abs(x),
    "less": lambda x, y, z, n: torch.where(x < y, x, y),
    "not": lambda x, y, z, n: torch.where(~((x >= y) | (x == 1)), x, 0.0),
    "sqrt": lambda x, y, z, n: torch.sqrt(x),
    "safe_sqrt": lambda x, y, z, n: fo.safe_sqrt(x),
    "sign": lambda x, y, z, n: torch.sign(x),
    "tanh": lambda x, y, z, n: torch.tanh(x),
    "sin": lambda x, y, z, n: torch.sin(x),
    "method": lambda x, y, z, n: x.square().clamp_min(0.5),
    "method_with_keywords": lambda x, y, z, n: x.clamp(min=0.6, max=0.9),
    "clamp_scalars": lambda x, y, z, n: torch.clamp(x, -SCALAR, SCALAR),
    "maximum": lambda x, y, z, n: torch.maximum(x, y),
    "maximum_scalar_first": lambda x, y, z, n: torch.maximum(SCALAR, x),
    "floordiv": lambda x, y, z, n: x // y,
    "mod": lambda x, y, z, n: x % 0.4,
    "lerp_literal": lambda x, y, z, n: torch.lerp(x, y, 0.3),
    "lerp_number": lambda x, y, z, n: torch.lerp(x, y, n),
    "lerp_scalar": lambda x, y, z, n: torch.lerp(x, y, SCALAR),
    "lerp_list": lambda x, y, z, n: torch.lerp(x, y, z),
    "addcmul": lambda x, y, z, n: torch.addcmul(x, y, z),
    "addcdiv_value": lambda x, y, z, n: torch.addcdiv(x, y, z, value=-0.3),
    "add_alpha": lambda x, y, z, n: torch.add(x, y, alpha=2.0),
    "zeros_like": lambda x, y, z, n: torch.zeros_like(x),
    "isnan": lambda x, y, z, n: torch.where(torch.isnan(x), torch.zeros_like(x), x),
    "adam": lambda x, y, z, n: x - 0.1 * (n * y / (fo.safe_sqrt(z) + 1e-8)),
}
NUMBERS = {"float": 0.7, "tensor": SCALAR}


def columns(count=3):
    return [[torch.rand(shape, dtype=torch.float64) + 0.5 for shape in GROUPS] for _ in range(count)]


def recorded(operation, number=0.7):
    rule = Rule(None, lambda g, state, p, n: (operation(g, *state, n), state), elementwise=True)
    return record([Stage(rule)], [Two(LIKE, LIKE)], False, [number], LIKE)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_program_over_lists_has_the_bits_of_the_rule(name, number):
    operation, inputs, n = OPERATIONS[name], columns(), NUMBERS[number]
    found = Foreach(recorded(operation, n), [n]).new(inputs, [n])
    for row, result in zip(zip(*inputs, strict=True), found[0], strict=True):
        # Sums of products are one call where numbers are known, which rounds once less.
        tolerance = 1e-15 if name == "adam" and number == "float" else 0
        torch.testing.assert_close(result, operation(*row, n), rtol=tolerance, atol=0)
    assert [list(map(id, column)) for column in found[1:]] == [list(map(id, column)) for column in inputs[1:]]


def test_calls_with_a_kernel_use_it(monkeypatch):
    calls = []
    for name in ("mul", "mul_", "lerp", "lerp_", "sqrt", "sqrt_", "addcdiv", "addcdiv_"):
        kernel = getattr(torch, f"_foreach_{name}")
        monkeypatch.setattr(torch, f"_foreach_{name}", lambda *a, n=name, k=kernel: calls.append(n.strip("_")) or k(*a))

    def operation(x, y, z, n):
        return torch.addcdiv(torch.lerp(x, 2.0 * y, 0.1), x, fo.safe_sqrt(y), value=-1.0)

    Foreach(recorded(operation), [0.7]).new(columns(), [0.7])
    assert sorted(calls) == ["addcdiv", "lerp", "mul", "sqrt"]


# Which machine runs what. ---------------------------------------------------------------------------------------------

RUNS = [
    ("native", torch, "_fused_adam_"),
    ("foreach", Foreach, "new"),
    ("foreach", Foreach, "_ready"),
    ("in_blocks", blocks, "run"),
    ("reduced", reduced.Reduced, "numbers"),
    ("fused", fused, "run"),
    ("flat", flat, "flat"),
    ("recomputed", recomputed, "recomputed"),
    ("tensor_by_tensor", choose, "tensor_by_tensor"),
]


PARAMS = {"a": torch.ones(2), "b": torch.ones(3)}


def machines(run):
    """List the machines that run, each as often as it does."""
    used = []
    with pytest.MonkeyPatch.context() as patch:
        for name, owner, attribute in RUNS:
            method = getattr(owner, attribute)
            patch.setattr(owner, attribute, lambda *args, n=name, m=method, **o: used.append(n) or m(*args, **o))
        run()
    return used


def updating(tx, params=PARAMS, transform=lambda function: function):
    return machines(lambda: transform(lambda params: tx.update(params, tx.init(params), params)[0])(params))


def stepping(tx, params=PARAMS):
    return machines(lambda: fo.step(tx, params, tx.init(params), params))


def overwriting(tx, params=PARAMS, **options):
    own = fo.tree.map(torch.clone, params)
    return machines(lambda: fo.step_(tx, params, tx.init(own), own, **options))


LARGE = {"large": torch.ones(1 << 15)}
MANY = {str(i): torch.ones(2) for i in range(33)}


def test_what_runs_updates():
    adam = fo.adam(0.1)
    assert updating(adam) == ["foreach"]
    assert updating(adam, MANY) == ["foreach"]
    assert updating(adam, LARGE) == ["in_blocks"]
    assert updating(adam, {**PARAMS, **LARGE}) == ["foreach", "in_blocks"]
    assert updating(fo.chain(fo.trace(), fo.centralize(), adam)) == ["foreach", "tensor_by_tensor", "foreach"]
    clipped = fo.chain(fo.trace(), fo.clip_by_norm(1.0), adam)
    assert updating(clipped) == ["foreach", "tensor_by_tensor", "foreach"]
    assert updating(clipped, {**PARAMS, **LARGE}) == ["reduced"]
    assert updating(adam, {**PARAMS, "c": torch.ones(1).double(), "d": torch.ones(1).double()}) == ["foreach"] * 2


def test_what_runs_steps():
    """torch's kernels have one for Adam, on copies where they are small, and none for RMSprop."""
    adam, rmsprop = fo.adam(0.1), fo.rmsprop(0.1)
    assert stepping(adam) == ["native"]
    assert stepping(fo.chain(fo.clip_by_global_norm(1.0), adam)) == ["foreach", "native"]
    assert stepping(adam, LARGE) == ["in_blocks"]
    assert stepping(rmsprop) == ["foreach"]
    assert stepping(rmsprop, MANY) == ["foreach"]
    assert stepping(rmsprop, {**PARAMS, **LARGE}) == ["foreach", "in_blocks"]


def test_what_overwrites():
    adam, rmsprop = fo.adam(0.1), fo.rmsprop(0.1)
    for params in (PARAMS, LARGE, MANY):
        assert overwriting(adam, params) == ["native"]
        assert overwriting(adam, params, fused=True) == ["native"]
        assert overwriting(adam, params, fused=False) == ["in_blocks"]
        assert overwriting(adam, params, foreach=False) == ["in_blocks"]
        assert overwriting(adam, params, foreach=True) == ["foreach"]
        for options in ({}, {"fused": params is not LARGE}, {"foreach": True}):
            assert overwriting(fo.lars(0.1), params, **options) == ["reduced", *["in_blocks"] * len(params)]
        assert overwriting(rmsprop, params) == (["foreach"] if params is PARAMS else ["in_blocks"])


def test_what_overwrites_where_a_compiler_is_asked(monkeypatch):
    monkeypatch.setattr(fused, "compiled", lambda program: fused.Fused(program, lambda *args: None))
    assert overwriting(fo.rmsprop(0.1), fused=True) == ["fused"]
    assert overwriting(fo.adam(0.1), fused=True) == ["native"]
    monkeypatch.setattr(fused, "compiled", lambda program: None)  # there is none
    assert overwriting(fo.rmsprop(0.1), LARGE, fused=True) == ["in_blocks"]


def test_norms_where_a_compiler_is_asked(monkeypatch):
    """It makes functions for large tensors; small ones beside them are run in blocks."""
    tried = []

    def compile_it(program, source):
        tried.append(source)
        return lambda *args: torch.ones(2, dtype=torch.float64)

    monkeypatch.setattr(fused, "tried", compile_it)
    assert overwriting(fo.lars(0.1), {**PARAMS, **LARGE}, fused=True) == ["reduced", "in_blocks", "in_blocks", "fused"]
    assert len(tried) == 2
    monkeypatch.setattr(fused, "tried", lambda *args: tried.append(None))  # there is none
    assert overwriting(fo.lars(0.1), LARGE, fused=True) == ["reduced", "in_blocks"]
    assert len(tried) == 3


def test_what_runs_on_other_devices():
    """Foreach, for which calls cost the same for any size."""
    program = record([Stage(Rule(None, lambda g, state, p, s: (-g, state), elementwise=True))], [()], False, [()], LIKE)
    there = replace(program, device=torch.device("meta"))
    for sizes in ([1 << 20], [2] * 100):
        assert type(choose.machine(there, sizes, [], None, overwrites=True)) is Foreach
        assert type(choose.machine(there, sizes, [], "blocks", overwrites=True)) is blocks.InBlocks


def test_what_runs_where_derivatives_are_wanted():
    adam = fo.adam(0.1)
    small = {name: torch.ones(2, requires_grad=True) for name in "abcd"}
    large = {"e": torch.ones(1 << 19, requires_grad=True)}
    assert updating(adam, small) == ["flat"]
    assert updating(adam, large) == ["recomputed", "in_blocks"]  # so is the forward pass run
    assert updating(adam, {**small, **large}) == ["flat", "in_blocks"]
    # Everywhere else tensor by tensor.
    assert updating(adam, large, lambda f: lambda p: torch.func.vjp(f, p)) == ["tensor_by_tensor"]
    batched = {name: param.expand(2, -1) for name, param in PARAMS.items()}
    assert updating(adam, batched, torch.vmap) == ["tensor_by_tensor"]
    assert updating(adam, transform=lambda f: torch.func.vjp(f, PARAMS)[1] and (lambda p: None)) == ["tensor_by_tensor"]
    assert updating(adam, transform=lambda f: lambda p: torch.func.jvp(f, (p,), (p,))) == ["tensor_by_tensor"]
    wanted = {name: param.clone().requires_grad_() for name, param in PARAMS.items()}
    assert updating(adam, wanted) == ["tensor_by_tensor"]
    assert updating(adam, wanted, torch.no_grad()) == ["foreach"]
    assert updating(fo.adam(torch.tensor(0.1, requires_grad=True))) == ["tensor_by_tensor"]

    class Subclass(torch.Tensor):
        pass

    subclass = {name: param.as_subclass(Subclass) for name, param in PARAMS.items()}
    assert updating(adam, subclass) == ["tensor_by_tensor"]
    assert overwriting(adam, subclass) == ["tensor_by_tensor"]


def test_a_machine_for_some_tensors_and_one_for_the_others():
    """What they return is in the order of the tensors."""
    params = {"a": torch.randn(1 << 15), "b": torch.randn(2), "c": torch.randn(1 << 15), "d": torch.randn(3)}
    tx = fo.adam(0.1)
    updates, state = tx.update(params, tx.init(params))
    for name, p in params.items():
        alone, own = tx.update({name: p}, tx.init({name: p}))
        torch.testing.assert_close(updates[name], alone[name], rtol=1e-6, atol=0)
        found, expected = [fo.tree.get(some, "exp_avg")[name] for some in (state, own)]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


# Everywhere. ----------------------------------------------------------------------------------------------------------


def test_dual_tensors_are_differentiated():
    """Forward mode without torch.func: tensors that do not say that they require grad."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lr, torch.ones_like(lr))
        tx = fo.sgd(dual)
        updates, _ = tx.update(PARAMS, tx.init(PARAMS))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(updates["a"]).tangent, -PARAMS["a"])


def test_rules_that_work_in_place_are_found_where_tensors_are_plain():
    def update(g, state, p, s):
        return g.mul_(2), state

    tx = fo.leafwise(None, update)
    with pytest.raises(TypeError, match="must not modify its arguments, but one of these did: test_rules_that"):
        tx.update(PARAMS, tx.init(PARAMS))
    PARAMS["a"].fill_(1)
    with torch.inference_mode():  # there tensors do not count their versions
        fo.adam().update({"a": torch.ones(2)}, fo.adam().init({"a": torch.ones(2)}))


def test_numbers_on_the_cpu_are_numbers_to_a_rule():
    seen = []

    def update(g, state, p, s):
        seen.append(type(s))
        return s * g, state

    tx = fo.leafwise(None, update, lambda step: 2 * step)
    tx.update(PARAMS, tx.init(PARAMS))
    assert set(seen) == {float}
    seen.clear()
    torch.func.grad(lambda params: tx.update(params, tx.init(params))[0]["a"].sum())(PARAMS)
    assert set(seen) == {torch.Tensor}


def test_single_precision_sees_exact_numbers():
    """1 - rho is computed before it is rounded, however the rule is run."""
    rho = torch.tensor(0.9999, dtype=torch.float64)
    states = []
    for kind in (0.9999, rho, rho.clone().requires_grad_()):
        tx = fo.scale_by_adadelta(kind)
        _, state = tx.update({"w": torch.ones(2)}, tx.init({"w": torch.ones(2)}))
        states.append(state.square_avg["w"].detach())
    for state in states:
        torch.testing.assert_close(state, torch.full((2,), 1e-4), rtol=1e-6, atol=0)
