"""Statistics of BatchNorm for other parameters."""

import pytest
import torch
from catalogue import assert_close

import functorch_optim as fo


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, momentum=0.3), torch.nn.Dropout(0.0))


BATCHES = [(torch.randn(5, 3, generator=torch.Generator().manual_seed(i)), None) for i in range(3)]


def test_statistics_are_those_of_torch():
    ours, theirs = network(), network()
    fo.update_bn(BATCHES, ours, "cpu")
    torch.optim.swa_utils.update_bn(BATCHES, theirs, "cpu")
    assert_close(fo.buffers_of(ours), fo.buffers_of(theirs), rtol=0, atol=0)
    assert ours[1].running_mean.abs().sum() > 0
    assert ours[1].momentum == 0.3


def test_statistics_of_other_parameters():
    ours, theirs = network(), network()
    params = fo.tree.scale(2.0, fo.params_of(theirs))
    fo.update_bn([batch for batch, _ in BATCHES], ours, params=params)
    theirs.load_state_dict(params, strict=False)
    torch.optim.swa_utils.update_bn(BATCHES, theirs)
    assert_close(fo.buffers_of(ours), fo.buffers_of(theirs))
    assert_close(fo.params_of(ours), fo.params_of(network()))


@pytest.mark.parametrize(("batches", "error"), [([], "got no batch"), ([torch.ones(5, 2)], "shapes")])
def test_an_error_leaves_modes_and_statistics(batches, error):
    model = network()
    model(BATCHES[0][0])
    before = fo.buffers_of(model)
    model[2].eval()
    with pytest.raises((ValueError, RuntimeError), match=error):
        fo.update_bn(batches, model)
    assert_close(fo.buffers_of(model), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert model[1].momentum == 0.3


def test_what_has_no_statistics_is_not_run():
    fo.update_bn([torch.ones(1, 7)], torch.nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"update_bn needs a torch.nn.Module.*update_bn\(loader, model\)"):
        fo.update_bn([], [])
