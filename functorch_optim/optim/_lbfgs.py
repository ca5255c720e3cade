"""torch.optim.LBFGS with the iterations of this library."""

import functools
import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from functorch_optim._core import checks
from functorch_optim._core.vector import common_dtype, flattened, unflattened
from functorch_optim.optim import _matching as matching
from functorch_optim.optim._closure import check_closure
from functorch_optim.optimizers._limited_memory import (
    PATIENCE,
    STRONG_WOLFE,
    Memory,
    Settings,
    from_torch,
    minimize,
    to_torch,
)

_COUNTS = ("func_evals", "n_iter")
_REST = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss")  # since the first iteration


def whole_bounds(group: Mapping[str, Any]) -> dict[str, int]:
    """Return the bounds of a param group as integers; torch.optim takes floats too, infinite ones among them."""
    return {name: math.ceil(min(group[name], sys.maxsize)) for name in ("max_iter", "max_eval")}


def _hooked(step: Callable[..., Any]) -> Any:
    """Add torch's hooks, and run both as they are in a compiled function: iterations end when data says so."""
    hooked: Any = _disable_dynamo(torch.optim.Optimizer.profile_hook_step(step))
    hooked.hooked = True  # or torch's constructor would add them once more
    return hooked


class LBFGS(torch.optim.LBFGS):
    """Train with the iterations of `fo.lbfgs`; all arguments are those of torch.optim.LBFGS.

    Same numbers, and the same state, in `state[first parameter]`; state dicts go both ways. Differs from
    torch.optim:

    - A line search shortens its step where the loss or its slope is not finite. torch.optim's goes on further out.
    - A warning when a step stands still because `max_eval` leaves the line search too few evaluations, as `max_iter=1`
      may: all steps after it will.
    - When the closure raises, parameters and state are as they were before the step. torch.optim leaves the parameters
      where it tried them, and cannot step again when it was the first step.
    - float16 and bfloat16 are computed in float32, mixed dtypes in the widest of them, and parameters rounded where
      the closure sees them. `load_state_dict` keeps that dtype; `cast=True` rounds to the dtype of the first parameter,
      as torch.optim does.
    - A tensor as learning rate may be modified in place, as schedulers do. torch.optim takes it for the length of the
      last step too.
    - Gradients need not be contiguous, and all parameters may be empty.
    - Copies, and optimizers out of a pickle, train on.
    - An unknown line search is an error before the closure is called, and a second group when it is added.
    - A state dict of another model or of another kind of optimizer is an error, and changes nothing; options that one
      lacks stay as they are.

    Its steps cannot be differentiated, nor those of torch.optim.LBFGS: the closure writes gradients of points that the
    algorithm chooses. `fo.Optimizer(params, fo.lbfgs, differentiable=True)` can, whose step is given the loss as a
    function: `step(closure, value_fn=loss)`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> opt = fo.optim.LBFGS([p], line_search_fn="strong_wolfe")
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (p * p).sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)
        tensor(25., grad_fn=<SumBackward0>)
        >>> bool(p.abs().max() < 1e-5)
        True
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        if "differentiable" in options:
            raise TypeError(
                "LBFGS takes no differentiable: its closure writes gradients of points that the algorithm chooses. Use "
                "Optimizer(params, lbfgs, differentiable=True) of functorch_optim, and step(closure, value_fn=loss)"
            )
        super().__init__(*args, **options)

    vars(__init__)["__wrapped__"] = torch.optim.LBFGS.__init__  # for the signature

    @_hooked
    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Minimize for up to `max_iter` iterations.

        Args:
            closure: clears gradients, evaluates the model, calls backward, and returns the loss.

        Returns:
            The loss before the step.

        Raises:
            RuntimeError: `line_search_fn` is neither None nor "strong_wolfe".
            ValueError: `history_size` is not positive.
            TypeError: `closure` is no function, or returns no loss.
        """
        [group] = self.param_groups
        if group["line_search_fn"] not in (None, STRONG_WOLFE):
            raise RuntimeError("only 'strong_wolfe' is supported")
        if group["history_size"] < 1:
            raise ValueError(f"Invalid history_size: {group['history_size']}; it needs an integer >= 1")
        bounds = whole_bounds(group)
        names = ("tolerance_grad", "tolerance_change", "history_size", "line_search_fn")
        settings = Settings(
            float(group["lr"]), bounds["max_iter"], bounds["max_eval"], *[group[name] for name in names]
        )
        params: list[Tensor] = group["params"]
        dtype = common_dtype(params)

        check_closure(closure)

        def evaluated() -> Any:
            with torch.enable_grad():
                loss = closure()
            if not isinstance(loss, Tensor) and not hasattr(loss, "__float__"):
                raise TypeError(
                    f"The closure returned {loss!r}, and LBFGS needs the loss: end the closure with `return loss`"
                )
            return loss

        def grad() -> Tensor:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            return flattened([g.to_dense() if g.is_sparse else g for g in grads], dtype)

        def write(x: Tensor) -> None:
            pieces: list[Any] = unflattened(x, params)
            for p, piece in zip(params, pieces, strict=True):
                p.copy_(piece)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            write(x)
            return x.new_tensor(float(evaluated())), grad()

        first = evaluated()
        begin = flattened(params, dtype)
        memory = before = from_torch(self.state[params[0]], begin)
        try:
            loss = begin.new_tensor(float(first))
            if bounds["max_iter"] > 0:
                x, memory = minimize(evaluate, begin, loss, grad(), memory, settings)
            else:
                x, memory = begin, memory._replace(func_evals=memory.func_evals + 1)
        except BaseException:
            write(begin)
            raise
        write(x)
        is_cut_short = PATIENCE > bounds["max_eval"] < memory.func_evals - before.func_evals
        if settings.line_search_fn == STRONG_WOLFE and is_cut_short and torch.equal(x, begin):
            _warn_of_a_stop(memory, loss, bounds["max_eval"])
        self.state[params[0]].update(to_torch(memory, settings.history_size))
        return first

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise: there can be only one group, and the constructor adds it.

        Args:
            param_group: as torch.optim takes it.

        Raises:
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError("LBFGS doesn't support per-parameter options (parameter groups)")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any], *, cast: bool = False) -> None:
        """Load a result of `state_dict`; see `fo.Optimizer`.

        Args:
            state_dict: checked before anything is changed. Its names, where both have some, must come in this order:
                the state is one vector.
            cast: round the state to the dtype of the first parameter, as torch.optim does.

        Raises:
            ValueError: it is another model's or another kind of optimizer's.
        """
        with self.register_load_state_dict_pre_hook(functools.partial(_as_saved, cast=cast)):
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" not in state:  # torch's load_state_dict ends here, with nothing changed yet
            state = {"state": self.state, "param_groups": self.param_groups, **state}  # missing entries stay
            [group], [loaded] = self.param_groups, state["param_groups"]
            states, manner = matching.unwrapped(state["state"])
            p = group["params"][0]
            if p in states:
                checks.check_is_dict("state", states[p])
                dtype = p.dtype if manner.cast else common_dtype(group["params"])
                states[p] = _cast(states[p], p.device, None if manner.cast and p.is_complex() else dtype)
            state = {**state, "state": defaultdict(dict, states)}
            for p in group["params"]:
                _check(state["state"].get(p, {}), flattened(group["params"], torch.float64).numel())
            for name, value in group.items():
                loaded.setdefault(name, value)
        super().__setstate__(state)
        # torch's pickles lack these, and its methods need them.
        self._params = self.param_groups[0]["params"]
        self._numel_cache = None


def _as_saved(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], *, cast: bool) -> dict[str, Any]:
    arranged = matching.as_saved(optimizer, state_dict, matching.Manner(cast=cast), takes_names=True)
    for group, saved in zip(arranged["param_groups"], state_dict["param_groups"], strict=True):
        if group["params"] != saved["params"]:
            raise ValueError(
                f"The saved parameters are {', '.join(saved['param_names'])}, in another order than these, "
                f"{', '.join(group['param_names'])}, and LBFGS keeps one vector of all; give them in the saved order"
            )
    return arranged


def _cast(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Copy a state, its real tensors in another dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, dict):
        return {key: _cast(item, device, dtype) for key, item in value.items()}
    return [_cast(item, device, dtype) for item in value] if isinstance(value, list | tuple) else value


def _warn_of_a_stop(memory: Memory, loss: Tensor, max_eval: int) -> None:
    """Warn where a step stands still although the slope promises more than the rounding of a loss."""
    if -memory.prev_flat_grad.dot(memory.d) > torch.finfo(loss.dtype).eps ** 0.5 * loss.abs():
        warnings.warn(
            f"LBFGS stands still: its line search found no lower loss in max_eval={max_eval} evaluations, and all "
            "steps to come are the same. Give it more: LBFGS(params, max_eval=25, line_search_fn='strong_wolfe')",
            stacklevel=4,
        )


def _check(state: dict[str, Any], size: int) -> None:
    """Raise when a loaded state is not one of L-BFGS for parameters of this size."""
    foreign = [key for key in state if key not in (*_COUNTS, *_REST, "al")]
    if foreign:
        raise ValueError(f"The saved state has {foreign[0]!r}, which LBFGS does not keep; another optimizer saved it")
    if not state.get("n_iter", 0):
        return
    missing = [key for key in _REST if key not in state]
    if missing:
        raise ValueError(f"The saved state lacks {missing[0]!r}, which LBFGS keeps after the first iteration")
    for vector in (state["d"], state["prev_flat_grad"], *state["old_dirs"], *state["old_stps"]):
        if vector.numel() != size:
            raise ValueError(
                f"The saved state is for {vector.numel()} numbers, but the parameters have {size}; "
                "it was saved for another model"
            )
