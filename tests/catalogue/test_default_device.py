"""Numbers and states are where parameters are, where torch's default device is another: `meta` stands for it."""

import pytest
import torch
from catalogue import make_params, rows, train
from torch_like_cases import NAMES

import functorch_optim as fo


@rows
def test_steps_are_those_of_the_default_device_of_the_parameters(row):
    params, x = make_params(), torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    expected, state = train(row(), params, x, 2)
    with torch.device("meta"):
        found, reached = train(row(), params, x, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(reached, state, rtol=0, atol=0)


@pytest.mark.sampled
@rows
def test_states_and_parameters_without_data_have_the_shapes_of_others(row):
    if row.name == "offload":
        pytest.skip("its states have data, on the CPU")
    params, x = make_params(), torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    on_meta = fo.tree.map(lambda p: p.to("meta"), params)
    expected, found = [train(row(), some, x.to(device), 2) for some, device in ((params, "cpu"), (on_meta, "meta"))]
    for some, other in zip(fo.tree.flatten(found)[0], fo.tree.flatten(expected)[0], strict=True):
        assert (some.shape, some.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_classes_make_the_steps_of_the_default_device_of_the_parameters(name, options):
    def trained(device):
        p = torch.linspace(-1, 1, 6).reshape(3, 2).requires_grad_()
        optimizer = getattr(fo.optim, name)([p], lr=0.1)
        optimizer.param_groups[0].update({key: value for key, value in options.items() if key in optimizer.defaults})
        p.grad = torch.linspace(1, 2, 6).reshape(3, 2)
        p.grad = p.grad.to_sparse() if name == "SparseAdam" else p.grad
        with torch.device(device):
            for _ in range(3):
                optimizer.step()
        return p.detach()

    torch.testing.assert_close(trained("meta"), trained("cpu"), rtol=0, atol=0)


def test_arithmetic_with_trees_leaves_tensors_where_they_are():
    tree = {"w": torch.ones(2), "b": torch.tensor(2.0)}
    with torch.device("meta"):
        numbers = [fo.tree.norm(tree), fo.tree.vdot(tree, tree), fo.tree.zeros_like(tree)["b"], fo.tree.norm({})]
    assert [number.device.type for number in numbers] == ["cpu"] * 4


def square(params, batch=None, buffers=None):
    return params.square().sum()


META = {
    "check_derivative": lambda x: x.new_tensor(fo.meta.check_derivative(square, x).differences),
    "forward_grad": fo.meta.forward_grad(square),
    "zero_order_grad": fo.meta.zero_order_grad(lambda x: float(square(x)), sampler=lambda *_, **__: torch.ones_like(X)),
    "unroll": lambda x: fo.meta.unroll(square, fo.adam(0.1), x, range(2), buffers={"n": x})[0].params,
    "no step": lambda x: fo.meta.unroll(square, fo.adam(0.1), x, []).losses,
    "add_noise": lambda x: fo.step(fo.add_noise(0.0), x, fo.add_noise(0.0).init(x), x)[0],
}
X = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("name", META)
def test_derivatives_and_keys_are_those_of_the_default_device_of_the_parameters(name):
    expected = META[name](X)
    with torch.device("meta"):
        found = META[name](X)
    torch.testing.assert_close(found, expected)
