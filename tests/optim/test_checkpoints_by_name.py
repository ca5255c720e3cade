"""Checkpoints are found by name, copied, and not rounded; masks and from_torch see the optimizer's own names."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


class Net(nn.Module):
    def __init__(self, *names):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.full((2,), float(len(name)))))


def give(net, **grads):
    for name, p in net.named_parameters():
        p.grad = torch.full((2,), grads[name.rsplit(".", 1)[-1]])


def decaying_kernel(params):
    return {name: name.endswith("kernel") for name in params}


def tree_momentum():
    """A function of the whole tree, which keeps a state by name."""

    def update(updates, state, params):
        state = fo.tree.map(lambda m, g: m if g is None else 0.5 * m + g, state, updates)
        return state, state

    return fo.GradientTransformation(lambda params: fo.tree.map(torch.zeros_like, params), update)


FORMS = {
    "class": lambda params: fo.optim.AdamW(params, lr=0.1),
    "factory": lambda params: fo.Optimizer(params, fo.adamw, lr=0.1),
    "transformation": lambda params: fo.Optimizer(params, fo.adamw(0.1, mask=decaying_kernel)),
    "tree": lambda params: fo.Optimizer(params, fo.chain(tree_momentum(), fo.sgd(0.1))),
}
each_form = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)


def trained(make, net, prefix=""):
    opt = make([(prefix + name, p) for name, p in net.named_parameters()])
    for t in range(3):
        give(net, kernel=1.0 + t, bias=100.0)
        opt.step()
    return opt


def assert_goes_on(net, opt, other_net, other):
    """The next steps are the same, parameter by parameter."""
    other_net.load_state_dict(net.state_dict())
    for t in range(3):
        for one, optimizer in ((net, opt), (other_net, other)):
            give(one, kernel=-1.0, bias=2.0 + t)
            optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, other_net.get_parameter(name))


@each_form
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_another_order_and_prefix(make, prefix):
    net, second = Net("kernel", "bias"), Net("bias", "kernel")
    opt, other = trained(make, net), make([(prefix + name, p) for name, p in second.named_parameters()])
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert other.param_groups[0]["param_names"] == [prefix + "bias", prefix + "kernel"]
    assert_goes_on(net, opt, second, other)
    if make is not FORMS["tree"]:
        back = make(net.named_parameters())
        back.load_state_dict(other.state_dict())
        assert torch.equal(back.state[net.bias]["exp_avg"], other.state[second.bias]["exp_avg"])
        params = fo.from_torch(other)[1]
        assert torch.equal(params[prefix + "kernel"], second.kernel)


@pytest.mark.parametrize("name", ["layers._orig_mod.0.weight", "layers.0._fsdp_wrapped_module.weight"])
def test_prefixes_at_any_place(name):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    opt = fo.optim.Adam([(name, p), ("module.head", nn.Parameter(torch.ones(2)))])
    opt.step()
    other = fo.optim.Adam([("head", nn.Parameter(torch.ones(2))), ("layers.0.weight", q)])
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[q]["exp_avg"], opt.state[p]["exp_avg"])
    assert list(other.state) == [q]


def test_groups_in_another_order():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = fo.optim.Adam([{"params": [("p", p)], "lr": 0.1}, {"params": [("q", q)], "lr": 0.2}])
    p.grad = torch.ones(2)
    opt.step()
    other = fo.optim.Adam([{"params": [("q", q)]}, {"params": [("p", p)]}])
    other.load_state_dict(opt.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    assert list(other.state) == [p]


NAMES = {
    "renamed": (
        ["kernel", "offset"],
        "This optimizer has the parameter 'offset', which the saved state lacks; that ha",
    ),
    "unknown prefix": (
        ["model.kernel", "model.bias"],
        "This optimizer has the parameter 'model.kernel', which the sav",
    ),
    "more": (
        ["kernel"],
        "The saved state has the parameter 'bias', which this optimizer lacks; that has kernel. Ren",
    ),
}


@pytest.mark.parametrize(("names", "message"), NAMES.values(), ids=NAMES)
def test_other_names_are_refused(names, message):
    opt = trained(FORMS["transformation"], Net("kernel", "bias"))
    other = FORMS["factory"]([(name, nn.Parameter(torch.ones(2))) for name in names])
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(opt.state_dict())
    assert not other.state


def test_names_are_matched_where_both_have_some():
    net = Net("kernel", "bias")
    named, saved = FORMS["class"](net.parameters()), trained(FORMS["class"], net).state_dict()
    named.load_state_dict(saved)
    assert named.param_groups[0]["param_names"] == ["kernel", "bias"]  # as torch.optim has it
    masked = fo.Optimizer(net.parameters(), fo.adamw(0.1, mask=[True, False]))
    masked.load_state_dict(saved)
    assert "param_names" not in masked.param_groups[0]
    masked.step()
    del saved["param_groups"][0]["param_names"]
    other = FORMS["class"]([("b", net.bias), ("k", net.kernel)])
    other.load_state_dict(saved)  # by order, as was asked for
    assert other.param_groups[0]["param_names"] == ["b", "k"]


def test_groups_of_other_parameters_are_refused():
    p, q, r = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    saved = fo.optim.Adam([{"params": [("p", p), ("q", q)]}, {"params": [("r", r)]}]).state_dict()
    other = fo.optim.Adam([{"params": [("q", q)]}, {"params": [("p", p), ("r", r)]}])
    with pytest.raises(ValueError, match=r"The parameters q are one group here, but the saved groups are"):
        other.load_state_dict(saved)
    saved["param_groups"][0]["param_names"] = ["p"]
    with pytest.raises(ValueError, match="A saved group has 1 param_names for 2 parameters"):
        other.load_state_dict(saved)


def test_trees_whose_names_are_sorted_otherwise():
    net = Net("kernel", "bias")
    opt = trained(FORMS["tree"], net)
    other = FORMS["tree"]([("_orig_mod.kernel", net.kernel), ("module.bias", net.bias)])
    with pytest.raises(ValueError, match="The names of the parameters come in another order than when the state was"):
        other.load_state_dict(opt.state_dict())


def test_distributed_helpers_bring_the_order_themselves():
    net, second = Net("kernel", "bias"), Net("bias", "kernel")
    opt, other = trained(FORMS["factory"], net), FORMS["factory"](second.named_parameters())
    saved = distributed.get_optimizer_state_dict(net, opt)
    distributed.set_optimizer_state_dict(second, other, saved)
    assert other.param_groups[0]["param_names"] == ["bias", "kernel"]
    assert_goes_on(net, opt, second, other)


def test_functional_states_from_named_optimizers():
    """An optimizer's state dict is read by name where the parameters have the same ones, whatever their order."""
    net = Net("kernel", "bias")
    saved = trained(lambda params: fo.Optimizer(params, fo.adam, lr=0.1), net, "_orig_mod.").state_dict()
    tx, params = fo.adam(0.1), {"bias": torch.ones(2), "kernel": torch.ones(2)}
    state = fo.load_state_dict(tx.init(params), saved, params, by="index")
    assert torch.equal(state[1].exp_avg["kernel"], saved["state"][0]["exp_avg"])
    by_path = fo.state_dict(state, params)
    prefixed = {f"module.{name}": p for name, p in params.items()}
    again = fo.load_state_dict(tx.init(prefixed), by_path, prefixed)
    assert torch.equal(again[1].exp_avg["module.kernel"], saved["state"][0]["exp_avg"])


# Copies. --------------------------------------------------------------------------------------------------------------


def two_rollbacks(make, params):
    opt = make(params)

    def train():
        for t in range(3):
            for p in params:
                p.grad = torch.full_like(p, 1.0 - t)
            opt.step()

    train()
    checkpoint, values = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    kept, ends = copy.deepcopy(checkpoint), []
    for _ in range(2):
        opt.load_state_dict(checkpoint)
        for p, value in zip(params, values, strict=True):
            p.data.copy_(value)
        train()
        ends.append([p.detach().clone() for p in params])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    torch.testing.assert_close(checkpoint["state"], kept["state"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "ASGD", "Adagrad"])
def test_a_checkpoint_in_memory_can_be_loaded_twice(name):
    options = {"momentum": 0.9} if name == "SGD" else {}
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    two_rollbacks(lambda params: getattr(fo.optim, name)(params, lr=0.1, **options), params)


@pytest.mark.parametrize(
    "tx", [fo.adam(0.1), fo.chain(tree_momentum(), fo.sgd(0.1)), fo.schedule_free(fo.sgd(0.1))], ids=str
)
def test_a_checkpoint_of_a_chain_can_be_loaded_twice(tx):
    two_rollbacks(lambda params: fo.Optimizer(params, tx), [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))])


def test_a_functional_checkpoint_can_be_loaded_twice():
    tx, params = fo.adam(0.1), {"w": torch.zeros(2)}
    state = fo.step(tx, {"w": torch.ones(2)}, tx.init(params), params)[1]
    saved = fo.state_dict(state)
    loaded = fo.load_state_dict(tx.init(params), saved)
    before = fo.tree.map(torch.clone, state)
    fo.step_(tx, {"w": torch.ones(2)}, loaded, {"w": torch.zeros(2)})
    torch.testing.assert_close(fo.tree.flatten(state)[0], fo.tree.flatten(before)[0], rtol=0, atol=0)


# Precision. -----------------------------------------------------------------------------------------------------------


def halved(make):
    """Train in float32, and go on in bfloat16: the states stay in float32."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    opt = make([p])
    for t in range(4):
        p.grad = torch.tensor([0.1, 1.0, -3.0]).to(p.dtype) * (t + 1)
        opt.step()
        p.data = p.data.bfloat16() if t == 1 else p.data
    return p, opt


HALVED = {
    "Adam": lambda params: fo.optim.Adam(params, lr=0.1),
    "NAdam": lambda params: fo.optim.NAdam(params, lr=0.1),
    "ASGD": lambda params: fo.optim.ASGD(params, lr=0.1, t0=1),
    "factory": lambda params: fo.Optimizer(params, fo.nadam, lr=0.1),
    "chain": lambda params: fo.Optimizer(params, fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))),
}


@pytest.mark.parametrize("make", HALVED.values(), ids=HALVED)
def test_states_in_float32_are_not_rounded(make):
    p, opt = halved(make)
    assert p.dtype == torch.bfloat16
    q = nn.Parameter(p.detach().clone())
    resumed = make([q])
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    torch.testing.assert_close(dict(resumed.state[q]), dict(opt.state[p]), rtol=0, atol=0)
    for one, optimizer in ((p, opt), (q, resumed)):
        one.grad = torch.tensor([0.3, -0.1, 1.0]).bfloat16()
        optimizer.step()
    assert torch.equal(p, q)
    rounded = make([q])
    rounded.load_state_dict(opt.state_dict(), cast=True)
    tensors = [value for key, value in rounded.state[q].items() if value.ndim]
    assert tensors
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors)


def test_functional_states_in_float32_are_not_rounded():
    tx, params = fo.adam(0.1), {"w": torch.ones(3).bfloat16()}
    precise = fo.tree.map(lambda t: t.float() if t.dtype == torch.bfloat16 else t, tx.init(params))
    _, state = tx.update({"w": torch.full((3,), 0.3).bfloat16()}, precise, params)
    for given in ((), (params,)):
        loaded = fo.load_state_dict(tx.init(params), fo.state_dict(state, *given), *given)
        assert loaded[1].exp_avg["w"].dtype == torch.float32
        assert torch.equal(loaded[1].exp_avg["w"], state[1].exp_avg["w"])
        rounded = fo.load_state_dict(tx.init(params), fo.state_dict(state, *given), *given, cast=True)
        assert rounded[1].exp_avg["w"].dtype == torch.bfloat16
    double = {"w": torch.ones(3)}
    wide = fo.tree.map(lambda t: t.double() if t.is_floating_point() else t, tx.init(double))
    assert fo.load_state_dict(tx.init(double), fo.state_dict(wide))[1].exp_avg["w"].dtype == torch.float32


def test_from_torch_and_back_does_not_round():
    p, opt = halved(HALVED["Adam"])
    _, params, state = fo.from_torch(opt)
    before = copy.deepcopy(opt.state[p])
    fo.to_torch(opt, params, state)
    torch.testing.assert_close(dict(opt.state[p]), dict(before), rtol=0, atol=0)
