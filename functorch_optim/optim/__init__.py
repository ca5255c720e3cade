"""The stateful side: what torch.optim has, under the same names.

`import functorch_optim.optim as optim` takes the place of `import torch.optim as optim`, with the same numbers up to
rounding; `Optimizer`, `lr_scheduler` and `swa_utils` here are torch's own. The optimizer around any transformation is
`fo.Optimizer`.
"""

import sys

import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils

from functorch_optim.optim.classes import (
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
from functorch_optim.optim.lbfgs import LBFGS

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
    from functorch_optim.optim.classes import Muon as Muon

    __all__ += ["Muon"]

# So that `from functorch_optim.optim.lr_scheduler import StepLR` works too.
sys.modules[f"{__name__}.lr_scheduler"] = lr_scheduler
sys.modules[f"{__name__}.swa_utils"] = swa_utils
