"""The ways of running a rule: when which, and the list of tensors that answers like one."""

import operator

import pytest
import torch

import functorch_optim as fo
from functorch_optim import _execution as execution
from functorch_optim._execution.tensor_list import TensorList

GROUPS = [(2, 3), (), (0,), (4,)]


def lists(count, dtype=torch.float64):
    return [TensorList([torch.rand(shape, dtype=dtype) + 0.5 for shape in GROUPS]) for _ in range(count)]


SCALAR = torch.tensor(0.7, dtype=torch.float64)
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)
OPERATIONS = {
    **{f"{op.__name__}_list": (op, 2, ()) for op in ARITHMETIC},
    **{f"{op.__name__}_number": (op, 1, (0.7,)) for op in ARITHMETIC},
    **{f"{op.__name__}_scalar": (op, 1, (SCALAR,)) for op in ARITHMETIC},
    **{
        f"{op.__name__}_{kind}_first": (lambda x, op=op, first=first: op(first, x), 1, ())
        for op in (*ARITHMETIC, operator.pow)
        for kind, first in (("number", 0.7), ("scalar", SCALAR))
    },
    "pow_number": (operator.pow, 1, (3,)),
    "pow_list": (operator.pow, 2, ()),
    "neg": (operator.neg, 1, ()),
    "abs": (abs, 1, ()),
    "less": (lambda x, y: torch.where(x < y, x, y), 2, ()),
    "not": (lambda x, y: torch.where(~((x >= y) | (x == 1)), x, 0.0), 2, ()),
    "sqrt": (torch.sqrt, 1, ()),
    "safe_sqrt": (fo.safe_sqrt, 1, ()),
    "sign": (torch.sign, 1, ()),
    "tanh": (torch.tanh, 1, ()),
    "sin": (torch.sin, 1, ()),
    "method": (lambda x: x.square().clamp_min(0.5), 1, ()),
    "method_with_keywords": (lambda x: x.clamp(min=0.6, max=0.9), 1, ()),
    "clamp_scalars": (lambda x: torch.clamp(x, -SCALAR, SCALAR), 1, ()),
    "maximum": (torch.maximum, 2, ()),
    "maximum_scalar_first": (lambda x: torch.maximum(SCALAR, x), 1, ()),
    "floordiv": (operator.floordiv, 2, ()),
    "mod": (operator.mod, 1, (0.4,)),
    "lerp_number": (torch.lerp, 2, (0.3,)),
    "lerp_scalar": (torch.lerp, 2, (SCALAR,)),
    "lerp_list": (torch.lerp, 3, ()),
    "addcmul": (torch.addcmul, 3, ()),
    "addcdiv_value": (lambda x, y, z: torch.addcdiv(x, y, z, value=-0.3), 3, ()),
    "add_alpha": (lambda x, y: torch.add(x, y, alpha=2.0), 2, ()),
    "zeros_like": (torch.zeros_like, 1, ()),
    "isnan": (lambda x: torch.where(torch.isnan(x), torch.zeros_like(x), x), 1, ()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tensor_list_answers_like_one_tensor(name):
    operation, count, others = OPERATIONS[name]
    arguments = lists(count)
    result = operation(*arguments, *others)
    assert isinstance(result, TensorList)
    for i in range(len(GROUPS)):
        expected = operation(*[argument.tensors[i] for argument in arguments], *others)
        torch.testing.assert_close(result.tensors[i], expected, rtol=1e-15, atol=0)


def test_operations_with_a_kernel_use_it(monkeypatch):
    calls = []
    for name in ("mul", "lerp", "sqrt", "addcdiv"):
        kernel = getattr(torch, f"_foreach_{name}")
        monkeypatch.setattr(torch, f"_foreach_{name}", lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    x, y = lists(2)
    torch.addcdiv(torch.lerp(x, 2.0 * y, 0.1), x, fo.safe_sqrt(y), value=-1.0)
    assert calls == ["mul", "lerp", "sqrt", "addcdiv"]


def test_a_tensor_list_knows_what_its_tensors_share():
    (x,) = lists(1, torch.float32)
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"
    assert repr(x).startswith("TensorList([tensor(")


@pytest.mark.parametrize("operation", [lambda x: x.mul_(2), lambda x: torch.sqrt_(x)])
def test_rules_cannot_work_in_place(operation):
    with pytest.raises(TypeError, match="A rule must not modify its arguments: use (mul|sqrt)\\(\\) in place of"):
        operation(lists(1)[0])


def test_rules_cannot_branch_on_values():
    (x,) = lists(1)
    with pytest.raises(TypeError, match="must not branch on values: use torch.where"):
        abs(x) if x > 0 else x


PARAMS = {"a": torch.ones(2), "b": torch.ones(3)}


def ways(tx, params=PARAMS, transform=lambda function: function):
    """List the ways in which one update is run."""
    used = []
    patch = pytest.MonkeyPatch()
    for name in ("in_blocks", "foreach", "flat", "recomputed", "tensor_by_tensor"):
        way = getattr(execution, name)
        patch.setattr(execution, name, lambda *args, n=name, w=way: used.append(n) or w(*args))
    with patch.context():
        transform(lambda params: tx.update(params, tx.init(params), params)[0])(params)
    patch.undo()
    return used


def test_which_way_when():
    adam = fo.adam(0.1)
    assert ways(adam) == ["in_blocks"]
    assert ways(adam, {"a": torch.ones(2)}) == ["in_blocks"]
    assert ways(fo.chain(fo.trace(), fo.clip_by_norm(1.0), adam)) == ["in_blocks", "tensor_by_tensor", "in_blocks"]
    assert ways(adam, {**PARAMS, "c": torch.ones(1).double(), "d": torch.ones(1).double()}) == ["in_blocks"] * 2
    with pytest.MonkeyPatch.context() as patch:  # as on other devices
        patch.setattr(execution, "can_block", lambda *args: False)
        assert ways(adam) == ["foreach"]
        assert ways(adam, {"a": torch.ones(2)}) == ["tensor_by_tensor"]
    # With derivatives.
    small = {name: torch.ones(2, requires_grad=True) for name in "abcd"}
    large = {"e": torch.ones(1 << 19, requires_grad=True)}
    assert ways(adam, small) == ["flat"]
    assert ways(adam, large) == ["recomputed"]
    assert ways(adam, {**small, **large}) == ["flat"]
    # Everywhere else tensor by tensor.
    assert ways(adam, large, lambda f: lambda p: torch.func.vjp(f, p)) == ["tensor_by_tensor"]
    batched = {name: param.expand(2, -1) for name, param in PARAMS.items()}
    assert ways(adam, batched, torch.vmap) == ["tensor_by_tensor"]
    assert ways(adam, transform=lambda f: torch.func.vjp(f, PARAMS)[1] and (lambda p: None)) == ["tensor_by_tensor"]
    assert ways(adam, transform=lambda f: lambda p: torch.func.jvp(f, (p,), (p,))) == ["tensor_by_tensor"]
    wanted = {name: param.clone().requires_grad_() for name, param in PARAMS.items()}
    assert ways(adam, wanted) == ["tensor_by_tensor"]
    assert ways(adam, wanted, torch.no_grad()) == ["in_blocks"]
    assert ways(fo.adam(torch.tensor(0.1, requires_grad=True))) == ["tensor_by_tensor"]

    class Subclass(torch.Tensor):
        pass

    assert ways(adam, {name: param.as_subclass(Subclass) for name, param in PARAMS.items()}) == ["tensor_by_tensor"]


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


@pytest.mark.parametrize("name", ["shape", "ndim", "T"])
def test_elementwise_rules_cannot_look_at_shapes(name):
    with pytest.raises(AttributeError, match=f"must not look at .{name}; declare it with elementwise=False"):
        getattr(lists(1)[0], name)


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
