"""The inner loop: the tensors that it makes and those that it leaves alone, its modes, and its memory."""

import copy
import gc

import pytest
import torch
from inner_loop_cases import F64, TASK, adapt, adapted, loss_fn, make, modes, modules, outer_loss
from memory import Alive
from torch import nn

import functorch_optim as fo
from functorch_optim.meta import inner_loop

# The module stays as it is. -------------------------------------------------------------------------------------------


def everything_in(module):
    """List which tensors there are, in which places, their values, versions and gradients."""
    found = []
    for path, submodule in module.named_modules(remove_duplicate=False):
        found.append((path, id(submodule), submodule.training))
        for name, tensor in {**submodule._parameters, **submodule._buffers}.items():
            if tensor is not None:
                grad = None if tensor.grad is None else tensor.grad.tolist()
                found.append((name, id(tensor), tensor.tolist(), tensor._version, tensor.requires_grad, grad))
    return found


@modules
@modes
@pytest.mark.parametrize("training", [True, False])
def test_the_module_stays_as_it_is(name, options, training):
    module = make(name).train(training)
    before, output = everything_in(module), copy.deepcopy(module)(TASK.x)
    inner = adapted(module, **options)
    inner(TASK.x)
    assert everything_in(module) == before
    if name != "dropout":
        assert torch.equal(copy.deepcopy(module)(TASK.x), output)
    outer_loss(inner).backward()
    reached = options != {"differentiable": False}
    assert all((p.grad is not None) == (reached and p.requires_grad) for p in module.parameters())
    module.zero_grad()
    assert everything_in(module) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module(TASK.x),
        lambda module: module.eval(),
        lambda module: setattr(module[0], "weight", nn.Parameter(module[0].weight.detach())),
        lambda module: module(TASK.x).sum().backward(),
        lambda module: module[0].weight.data.add_(1e-9),
        lambda module: module[0].weight.requires_grad_(False),
    ],
)
def test_changes_would_be_seen(change):
    module = make("batch_norm")
    before = everything_in(module)
    change(module)
    assert everything_in(module) != before


@pytest.mark.parametrize("where", ["call", "loop", "step"])
def test_nothing_is_done_in_parts_when_something_fails(where):
    class Failing(nn.BatchNorm1d):
        def forward(self, x):
            output = super().forward(x)
            if failing == "call":
                raise ZeroDivisionError
            return output

    def update(updates, state, params):
        if failing == "step":
            raise ZeroDivisionError
        return updates, state

    module, failing = nn.Sequential(make("tied"), Failing(5)).to(F64), None
    before = everything_in(module)
    inner = inner_loop(module, fo.chain(fo.sgd(0.1), fo.GradientTransformation(lambda params: (), update)))
    adapt(inner)
    loss, failing = loss_fn(inner(TASK.x), TASK.y), where
    kept = (inner.params, inner.buffers, inner.state)

    def go_on():
        with inner:
            if failing == "loop":
                raise ZeroDivisionError
            inner.step(loss) if failing == "step" else inner(TASK.x)

    with pytest.raises(ZeroDivisionError):
        go_on()
    assert everything_in(module) == before
    assert all(now is then for now, then in zip((inner.params, inner.buffers, inner.state), kept, strict=True))


def test_a_module_may_change_the_weights_that_it_is_given():
    class Clamped(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.01, 0.01)
            return super().forward(x)

    module = Clamped(3, 5).to(F64)
    before = everything_in(module)
    inner = inner_loop(module, fo.sgd(0.1))
    inner(TASK.x)
    assert inner.params["weight"].abs().max() <= 0.01
    assert everything_in(module) == before


# What it makes. -------------------------------------------------------------------------------------------------------


def test_it_begins_as_the_module_is():
    module = make("nested")
    inner = inner_loop(module, fo.adam())
    assert list(inner.params) == [name for name, _ in module.named_parameters()]
    assert torch.equal(inner(TASK.x, shift=1.0), module(TASK.x, shift=1.0))


@modes
@modules
def test_the_weights_are_those_of_ordinary_training(name, options):
    module = make(name)
    trained = copy.deepcopy(module)
    # The gradient of a bias before a normalization is a rounding error: of that alone a smaller eps makes a step.
    opt = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=0.05, eps=1e-3)
    torch.manual_seed(1)
    for _ in range(3):
        opt.zero_grad()
        loss_fn(trained(TASK.x), TASK.y).backward()
        opt.step()
        for buffer in trained.buffers():
            buffer.detach_()
    torch.manual_seed(1)
    inner = adapted(module, fo.adam(0.05, eps=1e-3), **options)
    expected = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    for mine, theirs in ((inner.params, expected), (inner.buffers, dict(trained.named_buffers()))):
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key].detach(), tensor.detach(), rtol=1e-9, atol=1e-10)


def test_weights_and_buffers_are_for_functional_call():
    module = make("batch_norm").eval()
    inner = adapted(module)
    again = torch.func.functional_call(module, {**inner.params, **inner.buffers}, (TASK.x,))
    assert torch.equal(again, inner(TASK.x))
    assert not torch.equal(again, module(TASK.x))


def test_a_step_and_a_call_make_new_ones():
    inner = inner_loop(make("batch_norm"), fo.adam())
    made = [inner.params, inner.buffers, inner.state]
    values = copy.deepcopy(fo.tree.map(torch.Tensor.detach, made))
    adapt(inner)
    assert fo.tree.flatten(fo.tree.map(torch.equal, made, values))[0].count(False) == 0


def test_what_has_no_gradient_stays():
    module = nn.ModuleDict({"used": make(), "unused": make()}).to(F64)
    module.forward = module["used"].forward
    inner = adapted(module, fo.adamw(0.1))
    before = dict(module.named_parameters())
    for name, p in inner.params.items():
        assert torch.equal(p, before[name]) == name.startswith("unused")
        assert bool(inner.state[0].exp_avg[name].any()) == name.startswith("used")


def test_frozen_weights_adapt_only_when_they_are_named():
    module = make("frozen")
    assert list(adapted(module).params) == ["2.weight", "2.bias"]
    module.requires_grad_(False)
    inner = adapted(module, params=dict(module.named_parameters()))
    assert not any(torch.equal(inner.params[name], p) for name, p in module.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())


def test_buffers_may_begin_elsewhere():
    module = make("batch_norm")
    former = adapted(module)
    inner = inner_loop(module, fo.sgd(0.1), buffers={"1.running_mean": former.buffers["1.running_mean"]})
    assert torch.equal(inner.buffers["1.running_mean"], former.buffers["1.running_mean"])
    assert torch.equal(inner.buffers["1.running_var"], module[1].running_var)


# Modes. ---------------------------------------------------------------------------------------------------------------


def test_where_nothing_is_differentiated_weights_are_leaves():
    lr = torch.tensor(0.05, dtype=F64, requires_grad=True)
    module = make("centered")
    former = adapted(module)
    inner = adapted(
        module, fo.adam(lr), differentiable=False, params=former.params, buffers=former.buffers, state=former.state
    )
    assert all(p.is_leaf and p.requires_grad for p in inner.params.values())
    assert not any(leaf.requires_grad for leaf in fo.tree.flatten(inner.state)[0])
    outer_loss(inner).backward()
    assert lr.grad is None
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("options", [{}, {"first_order": True}], ids=str)
def test_losses_of_the_loop_may_be_part_of_the_outer_one(options):
    module, total = make(), 0.0
    with inner_loop(module, fo.sgd(0.1), **options) as inner:
        for _ in range(3):
            loss = loss_fn(inner(TASK.x), TASK.y)
            inner.step(loss)
            total = total + loss
    total.backward()
    assert all(p.grad.any() for p in module.parameters())


def test_without_grad_mode():
    """A call has no graph then; and a loop that begins there is connected to the module all the same."""
    module = make("batch_norm")
    with torch.no_grad():
        inner = inner_loop(module, fo.sgd(0.1))
        assert not inner(TASK.x).requires_grad
        begun = {name: buffer.clone() for name, buffer in inner.buffers.items()}
    assert not torch.equal(begun["1.running_mean"], module[1].running_mean)
    adapt(inner)
    outer_loss(inner).backward()
    assert all(p.grad.any() for name, p in module.named_parameters() if name != "0.bias")


def test_after_the_end_all_but_a_step():
    module = make()
    inner = adapted(module)
    outer_loss(inner).backward()
    assert all(p.grad.any() for p in module.parameters())
    assert inner.state[0].step == 3
    with pytest.raises(RuntimeError, match="inner loop has ended with its `with`: .* params=inner.params"):
        adapt(inner)


@pytest.mark.sampled(pool="compiled")
@modes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own access
def test_a_compiled_module(options):
    module = make()
    expected = adapted(module, **options)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=backend)
        if backend == "aot_eager" and not options:
            with pytest.raises(RuntimeError, match="not currently support double backward"):
                outer_loss(adapted(compiled)).backward()
            continue
        inner = adapted(compiled, **options)
        for name, p in expected.params.items():
            torch.testing.assert_close(inner.params[f"_orig_mod.{name}"], p, rtol=1e-12, atol=1e-13)
        outer_loss(inner).backward()
        assert all((p.grad is None) == ("differentiable" in options) for p in module.parameters())
        module.zero_grad()


# Memory. --------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize(("keep", "steps"), [(False, 300), (True, 20)])
def test_memory_stays_flat_over_many_outer_steps(keep, steps):
    module, log_lr = nn.Linear(1, 1), torch.tensor(-2.0, requires_grad=True)
    opt = torch.optim.SGD([*module.parameters(), log_lr], lr=0.1)
    x, kept, counts = torch.ones(2, 1), [], []
    gc.collect()
    gc.disable()  # a cycle would be memory too
    try:
        with Alive() as alive:
            for step in range(1, steps + 1):
                with inner_loop(module, fo.sgd(log_lr.exp(), momentum=0.9)) as inner:
                    inner.step(inner(x).square().mean())
                    outer = (inner(x) - 1).square().mean()
                opt.zero_grad()
                outer.backward()
                opt.step()
                kept += [inner] if keep else []
                if step in (10, steps):
                    objects = sum(issubclass(type(it), torch.Tensor | inner_loop) for it in gc.get_objects())
                    counts.append((len(alive), alive.bytes, objects))
    finally:
        gc.enable()
    assert (counts[0] == counts[1]) == (not keep)


@modes
def test_memory_over_many_inner_steps(options):
    module, tx, counts = make("centered"), fo.adam(0.05), []
    with Alive(), inner_loop(module, tx, **options) as inner:
        adapt(inner, 2)  # prepares what tx keeps
    with Alive() as alive, inner_loop(module, tx, **options) as inner:
        for _ in range(2):
            adapt(inner, 20)
            counts.append(alive.bytes)
    assert (counts[0] == counts[1]) == (options != {})  # only second derivatives need what the steps computed
    del inner
    assert len(alive) == 0
