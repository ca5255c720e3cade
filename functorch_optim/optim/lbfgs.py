"""torch.optim.LBFGS with the iterations of this library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_optim.optimizers.lbfgs import common_dtype, flattened, unflattened
from functorch_optim.optimizers.limited_memory import STRONG_WOLFE, Settings, from_torch, minimize, to_torch


class LBFGS(torch.optim.LBFGS):
    """Train with the iterations of `fo.lbfgs`; all arguments are those of torch.optim.LBFGS.

    Same numbers, and the same state, in `state[first parameter]`. When the closure raises, parameters and state are as
    they were before the step. float16 and bfloat16 are computed in float32.

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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Minimize for up to `max_iter` iterations.

        Args:
            closure: clears gradients, evaluates the model, calls backward, and returns the loss.

        Returns:
            The loss before the step.

        Raises:
            RuntimeError: `line_search_fn` is neither None nor "strong_wolfe".
        """
        [group] = self.param_groups
        names = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn")
        settings = Settings(group["lr"], *[group[name] for name in names])
        if settings.line_search_fn not in (None, STRONG_WOLFE):
            raise RuntimeError("only 'strong_wolfe' is supported")
        params: list[Tensor] = group["params"]
        dtype = common_dtype(params)

        def grad() -> Tensor:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            return flattened([g.to_dense() if g.is_sparse else g for g in grads], dtype)

        def write(x: Tensor) -> None:
            pieces: list[Any] = unflattened(x, params)
            for p, piece in zip(params, pieces, strict=True):
                p.copy_(piece)

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            write(x)
            with torch.enable_grad():
                loss = closure()
            return x.new_tensor(float(loss)), grad()

        with torch.enable_grad():
            first = closure()
        begin = flattened(params, dtype)
        memory = from_torch(self.state[params[0]], begin)
        try:
            x, memory = minimize(evaluate, begin, begin.new_tensor(float(first)), grad(), memory, settings)
        except BaseException:
            write(begin)
            raise
        write(x)
        self.state[params[0]].update(to_torch(memory, settings.history_size))
        return first

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "defaults" not in state:  # torch's load_state_dict ends here, with nothing changed yet
            [group] = self.param_groups
            size = flattened(group["params"], torch.float64).numel()
            for loaded in state["state"].values():
                d = loaded.get("d")
                if isinstance(d, Tensor) and d.numel() != size:
                    raise ValueError(
                        f"The saved direction has {d.numel()} numbers, but the parameters have {size}; "
                        "it was saved for another model"
                    )
        super().__setstate__(state)
