"""Optimizers in two groups, and comparisons of what they save."""

import torch
from torch_like_cases import parameters


def make(module, name, params, named=False, **options):
    """Make an optimizer over copies of parameters, in two groups."""
    params = [p.detach().clone().requires_grad_() for p in params]
    params = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
    return getattr(module, name)([{"params": params[::2]}, {"params": params[1::2], "lr": 0.03}], **options)


def in_order(optimizer):
    """Return parameters as `make` was given them."""
    params = parameters(optimizer)
    params[::2], params[1::2] = [group["params"] for group in optimizer.param_groups]
    return params


def assert_same_dicts(mine, torchs, tolerance=1e-10, path="saved"):
    """Compare containers: their types, and what they hold in which order; and tensors: dtypes, shapes, numbers.

    Only what is kept for a parameter has no order.
    """
    assert type(mine) is type(torchs), path
    if isinstance(torchs, dict):
        of_parameters = ".state." in path or any(str(key).startswith("state.") for key in torchs)  # these are flat
        assert (set if of_parameters else list)(mine) == (set if of_parameters else list)(torchs), path
        for key, value in torchs.items():
            assert_same_dicts(mine[key], value, tolerance, f"{path}.{key}")
    elif isinstance(torchs, list | tuple):
        assert len(mine) == len(torchs), path
        for i, pair in enumerate(zip(mine, torchs, strict=True)):
            assert_same_dicts(*pair, tolerance, f"{path}.{i}")
    elif isinstance(torchs, torch.Tensor):
        assert mine.requires_grad == torchs.requires_grad
        torch.testing.assert_close(
            mine.to_dense(), torchs.to_dense(), rtol=tolerance, atol=tolerance, msg=lambda text: f"{path}: {text}"
        )
    else:
        assert mine == torchs, path
