"""The stateful side: torch.optim's classes and functions, under the same names.

`import functorch_optim.optim as optim` takes the place of `import torch.optim as optim`, with the same numbers up to
rounding; `Optimizer`, `lr_scheduler` and `swa_utils` here are torch's own. The optimizer around any transformation is
`fo.Optimizer`.
"""

import sys

import torch
from torch.optim import Optimizer, lr_scheduler, optimizer, swa_utils

from functorch_optim.optim._classes import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
)
from functorch_optim.optim._lbfgs import LBFGS

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "lr_scheduler",
    "swa_utils",
]

if hasattr(torch.optim, "Muon"):  # since torch 2.9
    from functorch_optim.optim._classes import Muon as Muon

    __all__ += ["Muon"]

if hasattr(torch.optim, "swap_in_optimizer_params_and_state"):  # older torch has it not
    from torch.optim import swap_in_optimizer_params_and_state as swap_in_optimizer_params_and_state

    __all__ += ["swap_in_optimizer_params_and_state"]

# So that `from functorch_optim.optim.lr_scheduler import StepLR` works too.
for _module in (lr_scheduler, optimizer, swa_utils):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
