"""The tensors of a module, as trees: copies that record nothing."""

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo


def make_module():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2)).double()
    module[2].weight.requires_grad_(False)
    return module


def loss(params, module, x):
    return torch.func.functional_call(module, params, (x,)).square().sum()


def test_parameters_that_are_trained_are_copied():
    module = make_module()
    params = fo.params_of(module)
    expected = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert list(params) == list(expected)
    assert "2.weight" not in params
    for name, p in params.items():
        assert torch.equal(p, expected[name])
        assert type(p) is torch.Tensor
        assert not p.requires_grad
        assert p.data_ptr() != expected[name].data_ptr()


def test_buffers_are_copied():
    module = make_module()
    buffers = fo.buffers_of(module)
    expected = dict(module.named_buffers())
    assert list(buffers) == list(expected)
    assert all(torch.equal(buffers[name], expected[name]) for name in expected)
    assert all(buffers[name].data_ptr() != expected[name].data_ptr() for name in expected)
    assert fo.buffers_of(torch.nn.Linear(2, 1)) == {}


def test_tied_parameters_are_there_once():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    assert list(fo.params_of(module)) == ["0.weight", "0.bias", "1.bias"]


def test_steps_in_place_leave_the_module_alone():
    module, x = make_module().eval(), torch.ones(4, 3, dtype=torch.float64)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    params, tx = fo.params_of(module), fo.adam(0.1)
    state = tx.init(params)
    for _ in range(3):
        params, state = fo.step_(tx, torch.func.grad(loss)(params, module, x), state, params)
    assert_close(dict(module.state_dict()), before)
    assert not torch.equal(params["0.weight"], before["0.weight"])


def graph_sizes(params, module):
    """Count the nodes of the graph behind a parameter after each of three steps."""
    tx, x = fo.adam(0.1), torch.ones(4, 3, dtype=torch.float64)
    state, sizes = tx.init(params), []
    for _ in range(3):
        params, state = fo.step(tx, torch.func.grad(loss)(params, module, x), state, params)
        seen, rest = set(), [params["0.bias"].grad_fn]
        while rest:
            node = rest.pop()
            if node is not None and node not in seen:
                seen.add(node)
                rest += [next_node for next_node, _ in node.next_functions]
        sizes.append(len(seen))
    return sizes


def test_no_graph_grows():
    module = make_module().eval()
    assert graph_sizes(fo.params_of(module), module) == [0, 0, 0]
    sizes = graph_sizes(dict(module.named_parameters()), module)  # what is differentiated keeps all
    assert 0 < sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("step", ["step", "update"])
def test_derivatives_through_steps_of_leaves(step):
    """The parameters of a module that are given as they are have derivatives, as MAML by hand needs them."""
    module, x = make_module().eval(), torch.ones(4, 3, dtype=torch.float64)
    tx = fo.sgd(0.1, momentum=0.9)

    def trained(params):
        state = tx.init(params)
        for _ in range(3):
            grads = torch.func.grad(loss)(params, module, x)
            if step == "step":
                params, state = fo.step(tx, grads, state, params)
            else:
                updates, state = tx.update(grads, state, params)
                params = fo.apply_updates(params, updates)
        return loss(params, module, x)

    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = dict(zip(leaves, torch.autograd.grad(trained(leaves), list(leaves.values())), strict=True))
    assert_close(found, torch.func.grad(trained)(fo.params_of(module)))


def test_errors():
    for function in (fo.params_of, fo.buffers_of):
        with pytest.raises(
            TypeError, match=rf"needs a torch.nn.Module, got a dict; write {function.__name__}\(model\)"
        ):
            function({"w": torch.ones(1)})
    with pytest.raises(ValueError, match="no parameter of the Linear requires grad"):
        fo.params_of(torch.nn.Linear(2, 1).requires_grad_(False))
    with pytest.raises(TypeError, match=r"stop_gradient takes a tree of tensors, got a Linear.*params_of\(module\)"):
        fo.stop_gradient(torch.nn.Linear(2, 1))
