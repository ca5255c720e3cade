"""Rules as programs: what is recorded of them, and what is refused."""

import math
from typing import NamedTuple

import pytest
import torch
from program_cases import LIKE, Two, recorded

import functorch_optim as fo
from functorch_optim._core.rule import ADD, Rule
from functorch_optim._execution import recording as module
from functorch_optim._execution.kernel import kernel
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage

# What is recorded. ----------------------------------------------------------------------------------------------------


def descent(g, state, p, s):
    m = torch.lerp(state.a, g, s[0])
    torch.tanh(m)  # nobody looks at it
    return p - s[1] * m, Two(m, state.b)


def test_a_program_is_what_the_outputs_depend_on():
    program = recorded(descent, (0.1, 0.2))
    assert str(program).splitlines() == [
        "v0 = lerp(x0_0, g, n0)",
        "v2 = mul(n1, v0)",
        "v3 = sub(p, v2)",
        "return v3, v0, x0_1",
    ]
    assert (program.inputs, program.numbers) == (("g", "p", "x0_0", "x0_1"), ("n0", "n1"))
    assert (program.dtype, program.device) == (torch.float64, torch.device("cpu"))


def test_rules_are_composed():
    first = Rule(None, lambda g, state, p, s: (s * g, state), elementwise=True)
    program = record([Stage(first), Stage(ADD)], [(), ()], True, [0.5, ()], LIKE)
    assert str(program) == "v0 = mul(n0, g)\nv1 = add(p, v0)\nreturn v1"


def test_numbers_are_computed_once():
    program = recorded(lambda g, state, p, s: (g * (1 - s) ** 2, state), 0.3)
    assert [(i.result, i.dtype) for i in program.instructions] == [
        ("n_0", None),
        ("n_1", None),
        ("v2", torch.float64),
    ]
    assert kernel(program, ("g", "x0_0", "x0_1")).buffers == ()


def test_what_a_dtype_says_is_no_instruction():
    def update(g, state, p, s):
        assert g.is_floating_point()
        assert (g.dtype, g.device.type) == (torch.float64, "cpu")
        return g * torch.finfo(g.dtype).eps, state

    assert len(recorded(update).instructions) == 1


CALLS = []


def making(factor):
    """Make a rule anew."""

    def update(g, state, p, s):
        CALLS.append(factor)
        return factor * s * g, state

    return update


def test_a_rule_is_recorded_once_for_what_it_may_depend_on():
    CALLS.clear()
    update = making(2.0)

    class One(NamedTuple):
        a: torch.Tensor

    single = torch.empty(0)
    first = recorded(update, 0.1)
    assert recorded(update, 0.2) is first
    assert recorded(update, torch.tensor(True)) is not first
    assert recorded(update, 0.1, Two(single, single), single).dtype == torch.float32
    assert len(recorded(update, 0.1, One(LIKE)).outputs) == 2
    assert len(CALLS) == 4
    assert recorded(update, 0.1) is first


def test_rules_that_are_made_anew_are_recorded_once():
    first = recorded(making(2.0), 0.1)
    assert recorded(making(2.0), 0.1) is first
    assert recorded(making(3.0), 0.1) is not first
    assert recorded(making(2), 0.1) is not first  # other types compute other numbers
    unknown = making(torch.tensor(2.0, dtype=torch.float64))  # it may be modified
    assert recorded(unknown, 0.1) is not recorded(unknown, 0.1)


def test_few_programs_are_kept(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST", 2)
    monkeypatch.setattr(module, "_recorded", {})
    for factor in range(5):
        recorded(making(factor), 0.1)
    assert len(module._recorded) == 2


# What is refused. -----------------------------------------------------------------------------------------------------

LEARNED = torch.ones((), requires_grad=True)
BRANCHES = "must not branch on values: use torch.where"
LOOKS = "must not look at values"
SHAPES = "must keep shapes, which {} does not; declare elementwise=False"
SEVERAL = "cannot use {}, of several tensors in one; declare elementwise=False"
REFUSED = {
    "method_in_place": (lambda g, state, p, s: (g.mul_(2), state), "modify its arguments: use mul\\(\\) in place of"),
    "function_in_place": (lambda g, state, p, s: (torch.sqrt_(g), state), "modify its arguments: use sqrt\\(\\)"),
    "out": (lambda g, state, p, s: (torch.add(g, p, out=p), state), "modify its arguments: call add without out"),
    "branch": (lambda g, state, p, s: (g if g > 0 else p, state), BRANCHES),
    "and": (lambda g, state, p, s: (g, state) if g.isnan() and p else (p, state), BRANCHES),
    "branch_on_a_number": (lambda g, state, p, s: (g if s else p, state), BRANCHES),
    "compare_numbers": (lambda g, state, p, s: (g if s > 0.5 else p, state), LOOKS + ", as gt does"),
    "maximum_of_numbers": (lambda g, state, p, s: (max(s, 1.0) * g, state), LOOKS),
    "equal": (lambda g, state, p, s: (g if torch.equal(g, p) else p, state), LOOKS + ", as equal does"),
    "float_of_a_tensor": (lambda g, state, p, s: (float(g) * p, state), LOOKS + ": a number that it needs is computed"),
    "float_of_a_number": (lambda g, state, p, s: (math.sqrt(s) * g, state), LOOKS + ": a number"),
    "item": (lambda g, state, p, s: (g.item() * p, state), "must not look at .item; declare it with elementwise"),
    "shape": (lambda g, state, p, s: (g * g.shape[0], state), "must not look at .shape; declare it with elementwise"),
    "size": (lambda g, state, p, s: (g * g.size(0), state), "must not look at .size; declare it with elementwise"),
    "elements": (lambda g, state, p, s: (g[0] + p, state), "must not pick elements"),
    "sum": (lambda g, state, p, s: (g / g.sum(), state), SHAPES.format("sum")),
    "sum_with_a_dimension": (lambda g, state, p, s: (g / g.sum(0, keepdim=True), state), SHAPES.format("sum")),
    "unsqueeze": (lambda g, state, p, s: (g.unsqueeze(0), state), SHAPES.format("unsqueeze")),
    "norm": (lambda g, state, p, s: (g / torch.linalg.vector_norm(g), state), SHAPES.format("linalg_vector_norm")),
    "stack": (lambda g, state, p, s: (torch.stack([g, p]).amax(0), state), SEVERAL.format("stack")),
    "frexp": (lambda g, state, p, s: (g * torch.frexp(p)[0], state), SEVERAL.format("frexp")),
    "closure": (
        lambda g, state, p, s: (LEARNED * g, state),
        "A tensor that requires grad is a number of the rule: compute it in scalars",
    ),
    "no_pair": (lambda g, state, p, s: g, "The rule of lambda must return a pair, \\(update, state\\)"),
    "other_state": (lambda g, state, p, s: (g, (state.a,)), "must return a state like the one it was given, with a, b"),
    "number": (lambda g, state, p, s: (0.0, state), "must return tensors like those it was given, got 0.0"),
    "constant": (lambda g, state, p, s: (g, Two(torch.zeros(5), p)), "must return tensors like those it was given"),
    "number_for_a_state": (lambda g, state, p, s: (g, Two(s, p)), "must return tensors like those it was given"),
    "dtype": (lambda g, state, p, s: (g.float(), state), "keep dtypes: it was given torch.float64 .* torch.float32"),
    "bool": (lambda g, state, p, s: (g, Two(g > 0, p)), "keep dtypes: it was given torch.float64 .* torch.bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_rule_must_not_do(name):
    update, message = REFUSED[name]
    with pytest.raises((TypeError, AttributeError), match=message.replace("lambda", ".*")):
        recorded(update, 0.7)


def test_the_error_is_that_of_an_update():
    tx = fo.leafwise(None, lambda g, state, p, s: (g.cumsum(0).sum() * g, state), elementwise=True)
    with pytest.raises(TypeError, match="must keep shapes, which sum does not"):
        tx.update({"w": torch.ones(3)}, tx.init({"w": torch.ones(3)}))
