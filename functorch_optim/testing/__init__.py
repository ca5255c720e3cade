"""A test kit for your own transformations and optimizers: it checks all promises that this library makes of its own.

    from functorch_optim import testing

    def test_lion():
        testing.check_transformation(lion, {"lr": 0.1, "weight_decay": 0.1})

It needs hypothesis: `pip install "functorch_optim[testing]"`.
"""

try:
    import hypothesis as _  # noqa: F401
except ImportError as error:
    raise ImportError("functorch_optim.testing needs hypothesis: pip install hypothesis") from error

from functorch_optim.testing._comparison import assert_same, unmodified
from functorch_optim.testing._optimizer_class import OPTIMIZER_PROPERTIES, check_optimizer_class
from functorch_optim.testing._oracles import check_against
from functorch_optim.testing._problem import Problem, Subject
from functorch_optim.testing._properties import PROPERTIES
from functorch_optim.testing._report import PropertyError
from functorch_optim.testing._transformation import check_transformation
from functorch_optim.testing.strategies import gradients, histories, hyperparameters, tensors, trees

__all__ = [
    "OPTIMIZER_PROPERTIES",
    "PROPERTIES",
    "Problem",
    "PropertyError",
    "Subject",
    "assert_same",
    "check_against",
    "check_optimizer_class",
    "check_transformation",
    "gradients",
    "histories",
    "hyperparameters",
    "tensors",
    "trees",
    "unmodified",
]
