"""The stateful side: transformations as torch.optim optimizers."""

from functorch_optim.optim.wrapper import Optimizer

__all__ = ["Optimizer"]
