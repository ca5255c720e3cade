"""The steps of torch.optim's classes here."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from functorch_optim._core.hyperparameters import is_zero
from functorch_optim._execution.choose import check_options
from functorch_optim.optim._base import OptimizerBase, watched


class TorchLike(OptimizerBase):
    """The base of the classes below, before those of torch.optim."""

    _live = True
    _sparse_error: str | None = "{} does not support sparse gradients"
    _options: dict[str, Any] = {}  # options that torch.optim's class lacks, see `also`  # noqa: RUF012

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch.optim does."""
        for name, value in self._options.items():
            self.defaults.setdefault(name, value)
        if self._options:  # else the constructor has checked
            check_options(self.defaults)
        super().add_param_group(param_group)

    @watched
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model again, calls backward, and returns the loss.

        Returns:
            The result of the closure, or None.

        Raises:
            RuntimeError: a gradient is of a kind that this optimizer does not take, or a parameter cannot be modified
                in place.
            TypeError: `closure` is no function.
        """
        return self._step(closure)

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._check_gradient(p, p.grad, group)

    def _check_gradient(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Raise as torch.optim does when it cannot take a gradient."""
        if grad.is_sparse and self._sparse_error is not None:
            name = next(kind.__name__ for kind in type(self).__mro__ if kind.__module__.startswith("torch.optim"))
            raise RuntimeError(self._sparse_error.format(name))
        if grad.is_sparse and not is_zero(group.get("weight_decay", 0)):
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch.amp.GradScaler leaves unscaling, and skipping steps, to torch's fused kernels; to us it shall not.
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass


def also(init: Callable[..., None], **options: Any) -> Callable[..., None]:
    """Give one of torch.optim's constructors keywords that it lacks.

    Args:
        init: the constructor.
        **options: the keywords and their defaults; another value becomes a default of the param groups.
    """

    @functools.wraps(init)
    def __init__(self: TorchLike, *args: Any, **given: Any) -> None:  # noqa: N807
        asked = {name: given.pop(name) for name in options if name in given}
        self._options = {name: value for name, value in asked.items() if value != options[name]}
        init(self, *args, **given)

    signature = inspect.signature(init)
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in options.items()
    ]
    vars(__init__)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *keywords])
    return __init__
