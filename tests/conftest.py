"""Fixtures and settings of all tests."""

import gc

import pytest
import torch
from hypothesis import settings

pytest_plugins = ["tiers", "pytester"]

# So that asserts of helpers tell as much as those of tests.
pytest.register_assert_rewrite(
    "catalogue",
    "checkpoint_cases",
    "fault_cases",
    "hooks",
    "lbfgs_problems",
    "steady_cases",
    "step_cases",
    "torch_like_cases",
    "unrolling",
    "wrapper_cases",
)

# Tensors are small here, and tests run in several processes: threads would only be in each other's way.
torch.set_num_threads(1)

# Deterministic where it counts; `--hypothesis-profile=search` looks for new cases, longer.
settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("default")


if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    compile_any = torch.compile

    @pytest.fixture(autouse=True)
    def no_steps_are_compiled(monkeypatch):
        """What `fused=True` compiles is a function of lists of tensors, of any sizes; older torch traces it too."""

        def compile_kernel(*args, **options):
            if not options.get("dynamic"):
                pytest.skip("torch.compile traces all steps from torch 2.13 on")
            return compile_any(*args, **options)

        monkeypatch.setattr(torch, "compile", compile_kernel)


def pytest_collection_finish():
    """Let the garbage collector pass by what lives as long as the run: twenty thousand tests, and torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
    ]
)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def no_checks():
    """torch warns unless it is told whether to check sparse tensors."""
    torch.sparse.check_sparse_tensor_invariants.disable()


@pytest.fixture
def double():
    """Let torch.optim keep steps, and the numbers that NAdam and ASGD carry on, in float64 as functions do."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def seed():
    # torch.manual_seed remembers a call, with its stack, for each kind of device that is not there: half a millisecond.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    if torch._dynamo.convert_frame.FRAME_COUNTER:  # something has been compiled
        torch._dynamo.reset()
