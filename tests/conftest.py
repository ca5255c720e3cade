"""Fixtures and settings of all tests."""

import pytest
import torch
from hypothesis import settings

# Tensors are small here, and tests run in several processes: threads would only be in each other's way.
torch.set_num_threads(1)

# Deterministic where it counts; `--hypothesis-profile=search` looks for new cases, longer.
settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("default")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
    ]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch._dynamo.reset()
