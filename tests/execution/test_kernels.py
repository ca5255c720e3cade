"""Programs run by kernels have the same numbers as the rules."""

import math
import operator
from dataclasses import replace

import pytest
import torch
from catalogue import CATALOGUE
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from program_cases import LIKE, Two, recorded

import functorch_optim as fo
from functorch_optim import tree
from functorch_optim._execution.foreach import Foreach
from functorch_optim._execution.kernel import kernel, pure
from functorch_optim._execution.program import Instruction, Name
from functorch_optim._execution.recording import record
from functorch_optim._execution.reference import Stage
from functorch_optim._execution.representation import cast
from functorch_optim._numerics import safe_power


def assert_kernels_agree(program, expected, inputs, numbers, tolerance=1e-14):
    """Run a program in place, apart, and as the compiler gets it; compare with what its rule returned."""
    flat = tree.flatten(list(numbers))[0]
    in_place = ("g", *program.inputs[2:])
    overwritten = [program.inputs.index(name) for name in in_place]

    def close(results):
        torch.testing.assert_close(list(results), list(expected), rtol=tolerance, atol=tolerance, equal_nan=True)

    def scratch(of):
        return [torch.empty_like(inputs[0], dtype=dtype) for dtype in of.buffers]

    mine = [tensor.clone() for tensor in inputs]
    over = kernel(program, in_place)
    over.function(*mine, *flat, *scratch(over))
    close([mine[k] for k in overwritten])

    mine = [tensor.clone() for tensor in inputs]
    results = [torch.full_like(tensor, torch.nan) for tensor in expected]
    apart = kernel(program, None)
    apart.function(*mine, *results, *flat, *scratch(apart))
    close(results)
    assert all(map(torch.equal, mine, inputs))

    pure(program, in_place)(*mine, torch.tensor([float(number) for number in flat], dtype=program.dtype))
    close([mine[k] for k in overwritten])
    assert_foreach_agrees(program, expected, inputs, flat, tolerance)


def moved(program):
    """Let a program add its update to the parameter."""
    new = Instruction(operator.add, (Name("p"), program.outputs[0]), (), Name("moved"), program.dtype)
    outputs = (new.result, *program.outputs[1:])
    return replace(program, instructions=(*program.instructions, new), outputs=outputs, moves=True)


def assert_foreach_agrees(program, expected, inputs, numbers, tolerance):
    """Run a program over lists of tensors: into new ones as the rule, and in place to the same bits."""
    numbers = [torch.tensor(number) if isinstance(number, bool) else number for number in numbers]

    def parts(tensors):
        return [list(torch.split(tensor.clone(), 4)) for tensor in tensors]

    given = parts(inputs)
    found = Foreach(program, numbers).new(given, numbers)
    together = [torch.cat(column) for column in found]
    torch.testing.assert_close(together, list(expected), rtol=tolerance, atol=tolerance, equal_nan=True)
    assert all(map(torch.equal, [torch.cat(column) for column in given], inputs))

    machine = Foreach(moved(program), numbers)
    new = machine.new(given, numbers)
    assert all(map(torch.equal, [torch.cat(column) for column in given], inputs))
    grads, *columns = parts(inputs)
    versions = [tensor._version for tensor in columns[0]]
    machine.over(columns)(grads, numbers)()
    torch.testing.assert_close(columns, new, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.cat(grads), inputs[0])
    assert all(tensor._version > version for tensor, version in zip(columns[0], versions, strict=True))


def check(update, numbers=(), tolerance=1e-14):
    """Compare a rule as a program with the rule."""
    g, p, a, b = inputs = [torch.randn(7, dtype=torch.float64) for _ in range(4)]
    new, state = update(g, Two(a, b), p, numbers)
    assert_kernels_agree(recorded(update, numbers), [new, *state], inputs, [numbers], tolerance)


CONSTANT = torch.tensor(0.3, dtype=torch.float64)
FLAG = torch.tensor(True)


def twice(g, state, p, s):
    m = 0.9 * state.a + g
    return m, Two(m, m)


def kept_product(g, state, p, s):
    m = s * g
    return p + m, Two(m, m + g)


def moved_on(g, state, p, s):
    return g + state.a * state.b, Two(g, state.a)


def seen_after_it_is_overwritten(g, state, p, s):
    old, new = state.a.detach(), 2 * state.a
    return g + old, Two(new, old.to(torch.float64))


def bits(g, state, p, s):
    seen, new = state.a.view(torch.int64), state.a + g
    return torch.where(seen & 1 == 0, g, p), Two(new, state.b)


def masked(g, state, p, s):
    some = (g > 0) & ~(p >= state.a) | (state.b < 0.1)
    return some * g, Two(torch.where(some, p, state.b), some + 0.5 * (g < 0) + 0 * g)


def piecewise(g, state, p, s):
    return torch.where(g < -1, -1.0, torch.where(g > 1, 1.0, g)), state


def numbers_of_numbers(g, state, p, s):
    rate = (1 - s[0]) / (2 - s[1] ** 2)
    return -rate * g + abs(-rate), Two(state.a / rate, rate / (1 + state.b * state.b))


SYNTHETIC = {
    "swap": (lambda g, state, p, s: (g, Two(state.b, state.a)), ()),
    "rotate": (lambda g, state, p, s: (state.a, Two(state.b, g)), ()),
    "moved_on": (moved_on, ()),
    "parameter_kept": (lambda g, state, p, s: (p - g, Two(p, state.a)), ()),
    "twice": (twice, ()),
    "unchanged": (lambda g, state, p, s: (g, state), ()),
    "two_of_one_input": (lambda g, state, p, s: (p, Two(p, p)), ()),
    "seen_after_it_is_overwritten": (seen_after_it_is_overwritten, ()),
    "bits": (bits, ()),
    "masked": (masked, ()),
    "piecewise": (piecewise, ()),
    "numbers_first": (lambda g, state, p, s: (1 - g, Two(s / (2 + abs(p)), 2**state.b)), 0.7),
    "negative_first": (lambda g, state, p, s: (-1 * g, Two(-s * p, -(s - p))), 0.7),
    "numbers_of_numbers": (numbers_of_numbers, (0.1, 0.9)),
    "scaled": (lambda g, state, p, s: (p + s * g, Two(g * s + p, (p * 2) + state.a)), 0.7),
    "scaled_product": (
        lambda g, state, p, s: (p + s * g * p, Two(s * (g * state.b) + g, state.b + (g * p) * -0.1)),
        0.7,
    ),
    "scaled_quotient": (
        lambda g, state, p, s: (p + s * (g / state.a), Two(p + s * g / state.a, state.b - s * (g / p))),
        0.7,
    ),
    "kept_product": (kept_product, 0.7),
    "alpha": (lambda g, state, p, s: (torch.add(g, p, alpha=s), Two(torch.sub(1.0, p, alpha=2), state.b)), 0.7),
    "number_and_alpha": (lambda g, state, p, s: (torch.add(1.0, g, alpha=3), Two(torch.add(s, p), state.b)), 0.7),
    "value": (
        lambda g, state, p, s: (
            torch.addcmul(g, p, state.a, value=s),
            Two(torch.addcdiv(g, p, state.a, value=-s), state.b),
        ),
        0.7,
    ),
    "flag": (lambda g, state, p, s: (p + s * g, Two(s * p, ~s * p + g)), FLAG),
    "flag_off": (lambda g, state, p, s: (torch.where(s, g, p), Two(torch.where(s | FLAG, g, p), state.b)), ~FLAG),
    "bool": (lambda g, state, p, s: (p + s * g, state), True),
    "bool_constant": (lambda g, state, p, s: (p + True * g, state), ()),
    "integer": (lambda g, state, p, s: (p + s * g, Two(p**s, state.b // s)), 3),
    "constant": (lambda g, state, p, s: (p + CONSTANT * g, Two(CONSTANT - g, torch.maximum(g, CONSTANT))), ()),
    "tensors_alone": (
        lambda g, state, p, s: (
            torch.where(g < p, g, 0.0),
            Two(torch.minimum(g, torch.maximum(p, state.a)), torch.atan2(g, torch.hypot(p, state.b))),
        ),
        (),
    ),
    "clamp": (lambda g, state, p, s: (torch.clamp(g, -s, s), Two(p.clamp(max=s), state.b.clip(min=0.1))), 0.4),
    "bounded": (
        lambda g, state, p, s: (
            torch.where(g < s, s, g),
            Two(torch.where(p * math.nan < -1, -1.0, p * math.nan), torch.where(state.b < s, s, state.a)),
        ),
        0.4,
    ),
    "powers": (lambda g, state, p, s: (safe_power(g * g, 1 / 3), Two(safe_power(0 * p, 0.5), state.b)), ()),
    "lerp": (
        lambda g, state, p, s: (torch.lerp(g, p, torch.sigmoid(p)), Two(state.a.lerp(g, s), torch.lerp(g, p, 0.9))),
        0.4,
    ),
    "roots": (
        lambda g, state, p, s: (
            fo.safe_sqrt(g * g),
            Two((p * p).sqrt().reciprocal(), torch.rsqrt(1 + state.b.square())),
        ),
        (),
    ),
    "other_dtype": (lambda g, state, p, s: (g.float().double() + 1, Two((p.float() * 2).to(g.dtype), state.b)), ()),
    "like": (lambda g, state, p, s: (torch.zeros_like(g), Two(torch.full_like(p, 2.0), torch.ones_like(p) * g)), ()),
    "clone": (
        lambda g, state, p, s: (state.a.clone(), Two(g.clone(memory_format=torch.preserve_format), p.clone() + g)),
        (),
    ),
    "modes": (lambda g, state, p, s: (torch.div(g, p, rounding_mode="floor"), Two(g % 0.3, g // p)), ()),
    "infinite": (lambda g, state, p, s: (g * math.inf, Two(torch.clamp(p, max=math.inf), p * math.nan)), ()),
    "unary": (
        lambda g, state, p, s: (
            torch.sign(g) * abs(g).exp() + torch.expm1(p),
            Two(torch.log1p(p * p) - p.sin() * p.cos(), torch.negative(p) + torch.absolute(g)),
        ),
        (),
    ),
}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_kernels_agree_with_the_rule(name):
    check(*SYNTHETIC[name])


LINKS = [
    (f"{row.name}-{k}", link)
    for row in CATALOGUE
    if row.elementwise
    for k, link in enumerate(row()._links)
    if getattr(link.rule, "elementwise", False)
]


def numbers_of(rule, step, g, p, state):
    """Compute the numbers of a rule at a step."""
    if rule.scalars is None:
        return ()
    step = torch.tensor(step, dtype=torch.float64)
    states = type(state)(*[[column] for column in state]) if state else ()
    known = {"updates": [g], "params": [p], "states": states, "value": torch.tensor(0.5, dtype=torch.float64)}
    extras = {name: given for name, given in known.items() if name in rule.extras.names}
    if rule.carry is None:
        return rule.scalars(step, **extras)
    carried = rule.carried_type(*[torch.tensor(float(n), dtype=torch.float64) for n in rule.carried()])
    scalars, _ = rule.scalars(step, carried, **extras)
    return scalars if rule.hold is None else scalars[0]  # a gate says besides whether it is open


@pytest.mark.sampled(size=256)
@pytest.mark.parametrize("link", [link for _, link in LINKS], ids=[name for name, _ in LINKS])
@pytest.mark.parametrize("step", [1, 7])
def test_kernels_of_the_library_agree_with_its_rules(link, step):
    g, p = torch.randn(2, 7, dtype=torch.float64).unbind()
    g[0] = 0.0
    state = link.rule.init_leaf(p)
    state = type(state)(*[torch.rand_like(p) for _ in state]) if state else ()
    scalars = numbers_of(link.rule, step, g, p, state)
    numbers = tree.map(cast(LIKE, LIKE.dtype, to_number=True, as_pairs=True), scalars)
    new, new_state = link.rule.update(g, state, p, numbers)
    program = record([Stage(link.rule)], [state], True, [numbers], LIKE)
    assert_kernels_agree(program, [new, *new_state], [g, p, *state], [numbers])


def source(update, numbers=()):
    return kernel(recorded(update, numbers), ("g", "x0_0", "x0_1")).function.__doc__


def test_sums_of_products_are_one_call():
    assert "(p, g, alpha=n0, out=g)" in source(lambda g, state, p, s: (p + s * g, state), 0.7)
    assert "addcmul" in source(lambda g, state, p, s: (p + s * g * g, state), 0.7)
    assert "addcdiv" in source(lambda g, state, p, s: (p + s * (g / state.a), state), 0.7)
    # Not where something else reads the product.
    assert "alpha" not in source(kept_product, 0.7)


def test_bounds_are_one_call():
    assert "(g, n0, out=g)" in source(lambda g, state, p, s: (torch.where(g < s, s, g), state), 0.7)
    # Not where it is another value that is compared, or another number.
    assert "clamp" not in source(lambda g, state, p, s: (torch.where(p < s, s, g), state), 0.7)
    assert "clamp" not in source(lambda g, state, p, s: (torch.where(g < 0.5, s, g), state), 0.7)


def test_buffers_are_used_again():
    def update(g, state, p, s):
        for _ in range(20):
            g = torch.tanh(g * state.a) + state.b
        return g, state

    assert len(kernel(recorded(update), ("g", "x0_0", "x0_1")).buffers) <= 2
    tx = fo.scale_by_adam()
    rule, numbers = tx._links[0].rule, tx._links[0].rule.scalars(torch.tensor(1.0, dtype=torch.float64))
    numbers = tree.map(float, numbers)
    program = record([Stage(rule)], [rule.init_leaf(LIKE)], True, [numbers], LIKE)
    assert len(kernel(program, ("g", *program.inputs[2:])).buffers) <= 2


# Random programs. -----------------------------------------------------------------------------------------------------

NUMBERS = (0.7, -1.3, FLAG)
STEPS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "divide": lambda x, y: x / (1 + y * y),
    "scale": lambda x, y, n: x * n + y,
    "scaled_product": lambda x, y, z, n: x + n * y * z,
    "scaled_quotient": lambda x, y, z, n: x + n * (y / (2 + z * z)),
    "from_number": lambda x, n: n - x,
    "over": lambda x, n: n / (1 + abs(x)),
    "flag": lambda x, y, f: x + f * y,
    "no_flag": lambda x, y, f: torch.where(~f, x, y),
    "numbers": lambda x, n, m: (n * 2 - m) * x,
    "lerp": lambda x, y, n: torch.lerp(x, y, 0.3) + n,
    "where": lambda x, y, z: torch.where(x < 0.3, y, z),
    "mask": lambda x, y, z: ((x < 0.3) & (y >= -0.2)) * z,
    "count": lambda x, y: (x > 0.3) + 0.5 * (y > 0.1) + 0 * x,
    "maximum": lambda x, y: torch.maximum(x, y),
    "clamp": lambda x, n: x.clamp(-1, 1) * n,
    "root": lambda x: fo.safe_sqrt(1 + x * x),
    "tanh": lambda x: torch.tanh(-x),
    "same": lambda x: x.detach(),
    "copy": lambda x: x.clone(),
}
PLACES = st.integers(0, 30)
INSTRUCTIONS = st.tuples(st.sampled_from(sorted(STEPS)), PLACES, PLACES, PLACES, st.integers(0, 1), st.integers(0, 1))


@settings(max_examples=4 * settings().max_examples)
@given(st.lists(INSTRUCTIONS, max_size=12), st.tuples(PLACES, PLACES, PLACES), st.integers(0, 2**16))
def test_random_programs_agree_with_their_rules(instructions, outputs, seed):
    largest = [1.0]

    def update(g, state, p, s):
        values = [g, p, state.a, state.b]
        for name, *places, n, m in instructions:
            function = STEPS[name]
            names = function.__code__.co_varnames
            chosen = [
                values[place % len(values)] for place, letter in zip(places, "xyz", strict=True) if letter in names
            ]
            chosen += [s[i] for i, letter in ((n, "n"), (m, "m"), (2, "f")) if letter in names]
            values.append(function(*chosen))
            if isinstance(values[-1], torch.Tensor):
                largest.append(values[-1].abs().max().item())
        new, a, b = [values[place % len(values)] for place in outputs]
        return new, Two(a, b)

    g, p, a, b = inputs = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).unbind()
    new, state = update(g, Two(a, b), p, NUMBERS)
    assume(max(largest) < 1e6)
    assert_kernels_agree(recorded(update, NUMBERS), [new, *state], inputs, [NUMBERS], 1e-13 * max(largest))
