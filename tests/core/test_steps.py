"""Steps: fo.step against update and apply_updates, fo.step_ against fo.step, in all ways of running."""

import contextlib
import functools
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from catalogue import assert_close, loss, make_params, rows

import functorch_optim as fo
from functorch_optim._execution import choose, fused, native

WAYS = {
    "best": {},
    "blocks": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def compiled(monkeypatch):
    """Let kernels be traced, but not compiled, and not be torch's own; list the graphs, and count the calls."""
    graphs, calls, machine = [], [], choose.machine

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @functools.cache
    def compile_it(function):
        made = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
        return lambda *args: calls.append(1) or made(*args)

    def chosen(program, sizes, numbers, way, overwrites):
        none_found = mock.patch.object(native, "match", return_value=None)
        with none_found if way == "fused" else contextlib.nullcontext():
            return machine(program, sizes, numbers, way, overwrites)

    monkeypatch.setattr(fused, "_compiled", compile_it)
    monkeypatch.setattr(choose, "machine", chosen)
    return graphs, calls


def clone(tree):
    return fo.tree.map(torch.clone, tree)


def extras_of(tx, params):
    """Make the extras that some transformation declares."""
    extras = {"value": lambda: loss(params, 1.0), "value_fn": lambda: lambda params: loss(params, 1.0)}
    declared = {name for link in tx._links for name in link.rule.extras.names}
    return {name: extras[name]() for name in declared & extras.keys()}


def by_update(tx, grads, state, params, **extras):
    updates, state = tx.update(grads, state, params, **extras)
    return fo.apply_updates(params, updates), state


def histories(params, steps, missing=()):
    """Draw gradients, some of which are missing."""
    for k in range(steps):
        grads = fo.tree.map(torch.randn_like, params)
        if k in missing:
            grads["layer"]["bias"] = grads["rest"][0] = None
        yield grads


def run(step, tx, params, history):
    params = clone(params)
    state = tx.init(params)
    for grads in history:
        params, state = step(tx, clone(grads), state, params, **extras_of(tx, params))
    return params, state


def tensors(*trees):
    return [leaf for leaf in fo.tree.flatten(list(trees))[0] if isinstance(leaf, torch.Tensor)]


def snapshot(*trees):
    return [(leaf, leaf.clone(), leaf._version) for leaf in tensors(*trees)]


def assert_untouched(before):
    for leaf, value, version in before:
        assert leaf._version == version
        assert torch.equal(leaf, value)


# Every transformation. ------------------------------------------------------------------------------------------------


@rows
def test_a_step_in_single_precision_is_an_update_and_its_application(row):
    """In double precision it is a property of test_properties.py, and so is that nothing is modified."""
    tx, params = row(), make_params(torch.float32)
    history = list(histories(params, 4, missing=(2,)))
    assert_close(run(fo.step, tx, params, history), run(by_update, tx, params, history), rtol=1e-5, atol=1e-5)


@rows
@ways
def test_a_step_in_place_writes_into_the_tensors_given(row, way, compiled):
    tx, params = row(), make_params()
    history = list(histories(params, 4, missing=(2,)))
    expected = run(fo.step, tx, params, history)
    params = clone(params)
    state = tx.init(params)
    for grads in history:
        before, old_params, old_state = snapshot(grads), tensors(params), tensors(state)
        params, state = fo.step_(tx, grads, state, params, **WAYS[way], **extras_of(tx, params))
        assert_untouched(before)
        assert list(map(id, tensors(params))) == list(map(id, old_params))
        if row.elementwise:
            assert list(map(id, tensors(state))) == list(map(id, old_state))
    assert_close((params, state), expected, rtol=max(1e-12, row.tolerance), atol=max(1e-12, row.tolerance))
    in_one = row.elementwise and not row.name.startswith("adafactor")  # which divides by norms of whole tensors
    in_one = in_one and row.name != "identity"  # of an addition alone there is nothing to fuse
    assert bool(compiled[1]) == (way == "fused" and in_one)


@rows
def test_a_missing_gradient_leaves_parameter_and_state_alone(row):
    tx, params = row(), make_params()
    state = tx.init(params)
    params, state = fo.step_(tx, next(histories(params, 1)), state, params, **extras_of(tx, params))
    grads = fo.tree.map(torch.randn_like, params)
    grads["layer"]["bias"] = grads["rest"][0] = None
    saved = fo.state_dict(state)
    before = snapshot([params["layer"]["bias"], params["rest"][0]])
    before += snapshot([leaf for path, leaf in saved.items() if path.endswith(("layer.bias", "rest.0"))])
    params, state = fo.step_(tx, grads, state, params, **extras_of(tx, params))
    for leaf, value, _ in before:
        assert torch.equal(leaf, value)
    nothing = fo.tree.map(lambda p: None, params)
    before = snapshot(params)
    fo.step_(tx, nothing, state, params, **extras_of(tx, params))
    assert_untouched(before)


DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.complex128: 1e-13}


@ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ways_agree_for_every_dtype(way, dtype, compiled):
    tx = fo.chain(fo.clip_by_global_norm(3.0), fo.adamw(0.1, eps=1e-3, weight_decay=0.1), fo.trace(0.5))
    params = make_params(dtype)
    params["rest"].append(torch.randn(5, 4, dtype=dtype).t())
    params["rest"].append(torch.randn(12, dtype=dtype)[::3])
    history = list(histories(params, 3, missing=(1,)))
    expected = run(fo.step, tx, params, history)
    step_ = functools.partial(fo.step_, **WAYS[way])
    assert_close(run(step_, tx, params, history), expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


# Chains. --------------------------------------------------------------------------------------------------------------


def not_vectors(params):
    return fo.tree.map(lambda p: p.ndim != 1, params)


def negated(updates, params):
    return fo.tree.map(torch.neg, updates)


CHAINS = {
    "tree_rule_first": lambda: fo.chain(fo.stateless(negated), fo.adam(0.1)),
    "tree_rule_last": lambda: fo.chain(fo.adam(0.1), fo.stateless(negated)),
    "tree_rule_between": lambda: fo.chain(fo.trace(0.9), fo.stateless(negated), fo.adam(0.1)),
    "whole_tensors_last": lambda: fo.chain(fo.adam(0.1), fo.clip_by_norm(0.05)),
    "whole_tensors_first": lambda: fo.chain(fo.clip_by_norm(0.5), fo.trace(0.9), fo.adam(0.1)),
    "norm_between": lambda: fo.chain(fo.trace(0.9), fo.clip_by_global_norm(0.5), fo.adam(0.1)),
    "schedule": lambda: fo.adamw(fo.schedules.cosine(0.1, 5)),
    "partition": lambda: fo.partition(
        {True: fo.adam(0.1), False: fo.chain(fo.clip_by_norm(0.1), fo.sgd(0.1, momentum=0.9))}, not_vectors
    ),
    "masked": lambda: fo.chain(fo.masked(fo.trace(0.9), not_vectors), fo.masked(fo.sgd(0.1), not_vectors)),
    "a_number_for_each": lambda: fo.sgd({"layer": 0.1, "rest": [0.2]}, momentum=0.9),
    "a_number_for_each_element": lambda: fo.adam({"layer": 0.1, "rest": [torch.tensor([0.1, 0.2, 0.3])]}),
    "tensor": lambda: fo.adam(torch.tensor(0.1)),
    "empty": lambda: fo.chain(),
    "carried": lambda: fo.chain(fo.nadam(0.1), fo.asgd(0.1)),
}


@pytest.mark.parametrize("name", CHAINS)
@ways
def test_chains(name, way, compiled):
    tx, params = CHAINS[name](), make_params()
    history = list(histories(params, 4, missing=(2,)))
    expected = run(by_update, tx, params, history)
    assert_close(run(fo.step, tx, params, history), expected, rtol=1e-12, atol=1e-12)
    step_ = functools.partial(fo.step_, **WAYS[way])
    assert_close(run(step_, tx, params, history), expected, rtol=1e-12, atol=1e-12)


class Two(NamedTuple):
    """A state of two tensors."""

    a: torch.Tensor
    b: torch.Tensor


def shared(p):
    zeros = torch.zeros_like(p)
    return Two(zeros, zeros)


MOVING = {
    "swap": (Two, lambda g, state, p, s: (state.a - g, Two(state.b + g, state.a))),
    "shift": (Two, lambda g, state, p, s: (g - state.b, Two(g, state.a))),
    "state_is_parameter": (lambda p: Two(p, 2 * p), lambda g, state, p, s: (-0.1 * g, Two(state.b, state.a))),
    "parameter_before": (Two, lambda g, state, p, s: (-0.1 * g + state.a, Two(p, state.a))),
    "parameter_after": (Two, lambda g, state, p, s: (-0.1 * g + state.a, Two(state.b, p - g))),
    "view": (Two, lambda g, state, p, s: (state.a.detach() - g, Two(2 * state.a + g, state.a.detach()))),
    "one_for_two_fields": (shared, lambda g, state, p, s: (g, Two(state.a + g, state.b - 1))),
    "the_parameter_itself": (lambda p: Two(p, p), lambda g, state, p, s: (g - state.a, Two(state.a + g, state.b - 1))),
}


@pytest.mark.parametrize("name", MOVING)
@ways
def test_states_that_move_and_share(name, way, compiled):
    """What is read must not have been overwritten."""
    init, update = MOVING[name]
    tx = fo.leafwise(init, update, elementwise=True, needs_params=True)
    params = make_params()
    history = list(histories(params, 4))
    expected = run(by_update, tx, params, history)
    assert_close(run(fo.step, tx, params, history), expected, rtol=1e-12, atol=1e-12)
    step_ = functools.partial(fo.step_, **WAYS[way])
    assert_close(run(step_, tx, params, history), expected, rtol=1e-12, atol=1e-12)


@ways
def test_what_shares_memory(way, compiled):
    """Parameters that are parts of one tensor, and gradients that are parameters or states."""
    tx = fo.chain(fo.scale_by_adam(), fo.scale(-0.1))

    def train(step):
        buffer = torch.linspace(-1, 1, 24, dtype=torch.float64)
        params = {"a": buffer[:6].view(2, 3), "b": buffer[6:10], "c": buffer[10:20:2], "d": buffer[11:20:2]}
        state = tx.init(params)
        params, state = step(tx, fo.tree.map(torch.ones_like, params), state, params)
        params, state = step(tx, params, state, params)
        params, state = step(tx, fo.tree.map(torch.Tensor.detach, params), state, params)
        return step(tx, state[0].exp_avg, state, params)

    assert_close(train(functools.partial(fo.step_, **WAYS[way])), train(fo.step), rtol=1e-12, atol=1e-12)


@ways
def test_trees_that_share_memory(way, compiled):
    """A function of whole trees may return parameters, and keep them."""

    def exchanged(updates, state, params):
        return {"a": params["b"], "b": params["a"], "c": state["c"]}, params

    tx = fo.chain(
        fo.GradientTransformation(lambda params: fo.tree.map(torch.ones_like, params), exchanged), fo.clip_by_norm(1e9)
    )
    params = {name: torch.randn(3, dtype=torch.float64) for name in "abc"}
    history = [fo.tree.map(torch.randn_like, params) for _ in range(3)]
    expected = run(by_update, tx, params, history)
    assert_close(run(functools.partial(fo.step_, **WAYS[way]), tx, params, history), expected)
    tx = fo.chain(*[fo.GradientTransformation(lambda params: fo.tree.map(torch.ones_like, params), exchanged)] * 2)
    expected = run(by_update, tx, params, history)
    assert_close(run(functools.partial(fo.step_, **WAYS[way]), tx, params, history), expected)


def test_trees_of_any_kind():
    tx = fo.adam(0.1)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    for params in (draw(3), [draw(3), (draw(2), None)], {}, (draw(),)):
        grads = fo.tree.map(torch.ones_like, params)
        expected = by_update(tx, grads, tx.init(params), params)
        assert_close(fo.step(tx, grads, tx.init(params), params), expected)
        assert_close(fo.step_(tx=tx, grads=grads, state=tx.init(params), params=params), expected)


def test_inference_mode():
    tx, ones = fo.adam(0.1), torch.ones(3, dtype=torch.float64)
    expected = by_update(tx, {"w": ones}, tx.init({"w": ones}), {"w": ones})
    for step in (fo.step, fo.step_):
        with torch.inference_mode():
            params = {"w": torch.ones(3, dtype=torch.float64)}
            params, state = step(tx, {"w": ones}, tx.init(params), params)
            assert_close((params, state), expected)


def test_parameters_of_a_module():
    """Leaves that require grad are written to, and nothing is recorded."""
    model = torch.nn.Linear(3, 2).double()
    params = dict(model.named_parameters())
    tx = fo.adam(0.1)
    grads = fo.tree.map(torch.ones_like, params)
    expected = by_update(tx, grads, tx.init(params), fo.tree.map(torch.Tensor.detach, params))
    expected = fo.tree.map(torch.clone, expected)
    state = tx.init(params)
    params, state = fo.step_(tx, grads, state, params)
    assert params["weight"] is model.weight
    assert model.weight.is_leaf
    assert model.weight.requires_grad
    assert not any(leaf.requires_grad for leaf in tensors(state))
    assert_close((fo.tree.map(torch.Tensor.detach, params), state), expected)


# Inside of transformations. -------------------------------------------------------------------------------------------


def test_steps_are_differentiated_and_batched():
    def trained(step, lr):
        tx, params = fo.sgd(lr, momentum=0.9), {"w": torch.linspace(-1, 1, 3, dtype=torch.float64)}
        state = tx.init(params)
        for _ in range(2):
            params, state = step(tx, fo.tree.map(lambda p: p * p + p, params), state, params)
        return params["w"].square().sum()

    lrs = torch.tensor([0.1, 0.01], dtype=torch.float64)
    for transform in (torch.func.grad, lambda f: lambda lr: torch.func.jvp(f, (lr,), (lr,))[1]):
        batched = [torch.vmap(transform(functools.partial(trained, step)))(lrs) for step in (fo.step, by_update)]
        torch.testing.assert_close(*batched, rtol=1e-12, atol=0)
        assert batched[0].abs().min() > 0
    compiled = torch.compile(functools.partial(trained, fo.step), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(lrs[0]), trained(by_update, lrs[0]), rtol=1e-12, atol=0)


def in_place_step(p):
    tx = fo.sgd(0.1)
    return fo.step_(tx, p.detach(), tx.init(p), p)[0].sum()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, lambda f: lambda p: torch.func.jvp(f, (p,), (p,))])
def test_steps_in_place_are_refused_in_transforms(transform):
    p = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="step_ writes in place, which torch.func .* params, state = step\\(tx, gr"):
        transform(in_place_step)(p)
    assert torch.equal(p, torch.ones(3, 2))


def test_steps_in_place_are_refused_in_what_is_compiled():
    p = torch.ones(3, 2)
    with pytest.raises(Exception, match="step_ writes in place"):
        torch.compile(in_place_step, fullgraph=True, backend="eager")(p)
    assert torch.equal(p, torch.ones(3, 2))


# Errors. --------------------------------------------------------------------------------------------------------------


def raising(g, state, p, s):
    raise ValueError("no")


def dropping(g, state, p, s):
    return g.sum(), state


def failing_at(step):
    if step > 1:
        raise ValueError("too late")
    return 0.1


def wrong_shape(grads):
    grads["rest"][0] = torch.ones(7)


def wrong_dtype(grads):
    grads["rest"][0] = grads["rest"][0].float()


ERRORS = {
    "shape": (fo.adam, wrong_shape, {}, "the updates have shape \\(7,\\) and dtype torch.float32 at 'rest.0'"),
    "dtype": (fo.adam, wrong_dtype, {}, "the updates have shape \\(3,\\) and dtype torch.float32 at 'rest.0'"),
    "structure": (fo.adam, lambda grads: grads.pop("rest"), {}, "rest"),
    "extra": (fo.adam, lambda grads: None, {"value": 1.0}, "got the extra 'value', which nothing in the chain"),
    "missing_extra": (lambda: fo.chain(fo.sgd(0.1), fo.lbfgs(line_search_fn="strong_wolfe")), None, {}, "value_fn"),
    "rule": (lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, raising, elementwise=True)), None, {}, "no"),
    "whole": (lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, raising), fo.sgd(0.1)), None, {}, "no"),
    "kept": (lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, dropping)), None, {}, "has shape \\(\\) at"),
    "kept_in_blocks": (
        lambda: fo.chain(fo.trace(0.9), fo.leafwise(None, dropping, elementwise=True)),
        None,
        {},
        "keep",
    ),
    "schedule": (lambda: fo.adam(lambda step: failing_at(step + 2)), None, {}, "too late"),
    "one_part": (
        lambda: fo.partition({True: fo.adam(0.1), False: fo.leafwise(None, raising, elementwise=True)}, not_vectors),
        None,
        {},
        "no",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@ways
def test_errors_leave_everything_as_it_was(name, way, compiled):
    make, spoil, extras, message = ERRORS[name]
    tx, params = make(), make_params()
    state, grads = tx.init(params), fo.tree.map(torch.randn_like, params)
    if spoil is not None:
        spoil(grads)
    before = snapshot(params, state, grads)
    with pytest.raises((TypeError, ValueError), match=message):
        fo.step_(tx, grads, state, params, **WAYS[way], **extras)
    with pytest.raises((TypeError, ValueError), match=message):
        fo.step(tx, grads, state, params, **extras)
    assert_untouched(before)


def test_states_and_parameters_that_do_not_fit():
    tx, params = fo.adam(0.1), make_params()
    grads = fo.tree.map(torch.randn_like, params)
    with pytest.raises(ValueError, match="needs the parameters: params, state = step\\(tx, grads, state, params\\)"):
        fo.step(tx, grads, tx.init(params), None)
    with pytest.raises(ValueError, match="needs the parameters"):
        fo.step_(tx, grads, tx.init(params), None)
    with pytest.raises(TypeError, match=r"^adam is not a GradientTransformation; call it: step\(sgd\(0.1\), grads"):
        fo.step(fo.adam, grads, tx.init(params), params)
    other = fo.sgd(0.1, momentum=0.9).init(params)
    before = snapshot(params, other)
    with pytest.raises(ValueError, match="belongs to another transformation|another"):
        fo.step_(tx, grads, other, params)
    expanded = {**params, "rest": [torch.ones(1, dtype=torch.float64).expand(3)]}
    with pytest.raises(RuntimeError, match="Elements of the parameter 'rest.0' share memory"):
        fo.step_(tx, grads, tx.init(params), expanded)
    tied = {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(0), "d": torch.ones(0)}
    tied["b"] = tied["a"].view(3)
    with pytest.raises(RuntimeError, match="The parameters 'a' and 'b' share memory, so that both of their updates"):
        fo.step_(tx, fo.tree.map(torch.ones_like, tied), tx.init(tied), tied)
    moved, _ = fo.step_(fo.sgd(1.0), {**tied, "b": None}, fo.sgd(1.0).init(tied), tied)
    assert moved["b"].tolist() == [0.0, 0.0, 0.0]  # one update for both is no mistake
    assert_untouched(before)


@pytest.mark.parametrize("change", [lambda state: (*state, torch.ones(1)), lambda state: state[0]])
def test_a_state_that_changes_its_structure(change):
    tx = fo.GradientTransformation(
        lambda params: (torch.ones(1),), lambda updates, state, params: (updates, change(state))
    )
    tx, params = fo.chain(tx, fo.sgd(0.1, momentum=0.9)), {"w": torch.ones(2)}
    state = tx.init(params)
    before = snapshot(params, state)
    with pytest.raises(ValueError, match="the next state and the one given do not match: .*'0"):
        fo.step_(tx, params, state, params)
    assert_untouched(before)


def test_fused_and_foreach_contradict_each_other():
    tx, params = fo.sgd(0.1), {"w": torch.ones(2)}
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        fo.step_(tx, params, tx.init(params), params, fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        fo.Optimizer([torch.ones(2, requires_grad=True)], tx, fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        fo.Optimizer([torch.ones(2, requires_grad=True)], tx, fused=True, differentiable=True)
    assert torch.equal(params["w"], torch.ones(2))


# Compiling. -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["at_once", "when_called"])
def test_without_a_compiler_there_is_one_warning(monkeypatch, fails):
    def compile_it(function, **options):
        def called(*args):
            raise RuntimeError("There is no g++ here.\nAnd more.")

        return called() if fails == "at_once" else called

    monkeypatch.setattr(torch, "compile", compile_it)
    fused._compiled.cache_clear()

    def make_tx(bound):  # a program of its own, for nobody is told twice of one
        def update(g, state, p, s):
            return s * torch.clamp(g, max=bound), state

        return fo.chain(fo.leafwise(None, update, lambda step: -0.1 * step, elementwise=True), fo.trace(0.5))

    message = "fused=True needs torch.compile and a compiler that works here, .* RuntimeError: There is no g\\+\\+ here"
    params = make_params()
    history = list(histories(params, 5))
    for number, run_it in enumerate((step_by_step, with_an_optimizer)):
        tx = make_tx(10.0**number + len(fails))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            results = run_it(tx, params, history)
        assert len(seen) == 1
        with pytest.warns(UserWarning, match=message):
            warnings.warn_explicit(seen[0].message, None, seen[0].filename, seen[0].lineno)
        assert_close(results, run(fo.step, tx, params, history)[0], rtol=1e-12, atol=1e-12)
    fused._compiled.cache_clear()


def step_by_step(tx, params, history):
    return run(functools.partial(fo.step_, fused=True), tx, params, history)[0]


def with_an_optimizer(tx, params, history):
    params = fo.tree.map(lambda p: p.clone().requires_grad_(), params)
    leaves, structure = fo.tree.flatten(params)
    optimizer = fo.Optimizer(leaves, tx, fused=True)
    for grads in history:
        for p, g in zip(leaves, fo.tree.flatten(grads)[0], strict=True):
            p.grad = g.clone()
        optimizer.step()
    return fo.tree.unflatten(structure, [p.detach() for p in leaves])


def test_a_schedule_does_not_compile_again(compiled):
    graphs, calls = compiled
    tx = fo.chain(fo.clip_by_global_norm(1.0, nonfinite="skip"), fo.adamw(fo.schedules.warmup_cosine(0.1, 10, 100)))
    params = make_params()
    history = list(histories(params, 100))
    results = run(functools.partial(fo.step_, fused=True), tx, params, history)
    assert len(graphs) == 1
    assert len(calls) >= 100
    assert_close(results, run(fo.step, tx, params, history), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factory", [fo.adamw, fo.nadam, fo.rmsprop])
def test_a_scheduler_does_not_compile_again(factory, compiled):
    graphs, calls = compiled
    results = []
    for is_fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 40), torch.nn.Linear(40, 5)).double()
        optimizer = fo.Optimizer(model.parameters(), factory, lr=0.1, fused=is_fused)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        for _ in range(100):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            scheduler.step()
        results.append([p.detach() for p in model.parameters()])
    assert len(graphs) == 1
    assert len(calls) >= 100
    assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_groups_may_choose(compiled):
    graphs, _ = compiled
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "fused": True, "momentum": 0.9}]
    optimizer = fo.Optimizer(groups, fo.sgd, lr=0.1)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(3)
        optimizer.step()
    assert len(graphs) == 1
    torch.testing.assert_close(params[0].detach(), torch.full((3,), 0.7))
    torch.testing.assert_close(params[1].detach(), torch.full((3,), 1 - 0.1 * (1 + 1.9 + 2.71)))


def test_fused_kernels_of_the_default_compiler():
    """Large tensors and small ones, in another order of memory too, with a flag among the numbers."""
    fused._compiled.cache_clear()
    tx = fo.chain(fo.clip_by_global_norm(1.0, nonfinite="skip"), fo.adamw(fo.schedules.linear(0.1, 0.0, 10), eps=1e-3))
    params = {**make_params(torch.float32), "large": torch.randn(150, 200), "turned": torch.randn(150, 200).t()}
    history = [fo.tree.map(torch.randn_like, params) for _ in range(3)]
    history[1]["large"] = torch.randn(200, 150).t()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = run(functools.partial(fo.step_, fused=True), tx, params, history)
    assert_close(results, run(fo.step, tx, params, history), rtol=1e-5, atol=1e-6)
