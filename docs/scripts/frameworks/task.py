"""A model, its data, and the three forms of an optimizer: for the programs beside this one."""

import torch

import functorch_optim as fo


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def make_data():
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))


def make_optimizer(model, form):
    if form == "class":
        return fo.optim.AdamW(model.parameters(), lr=1e-2)
    if form == "factory":
        return fo.Optimizer(model.parameters(), fo.adamw, lr=1e-2)
    return fo.Optimizer(model.parameters(), fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2)))


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
