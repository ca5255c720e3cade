"""Right derivatives: operations that torch differentiates wrongly are replaced while a function runs."""

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from functorch_optim.meta import _elementary as elementary


class exact_derivatives(TorchFunctionMode, contextlib.ContextDecorator):  # noqa: N801 - used as torch.no_grad is
    """Compute with operations whose derivatives are right in all orders and modes, and under vmap.

    Torch (2.13) differentiates some operations wrongly, and without a warning, when derivatives are nested: in
    `torch.func.grad(torch.vmap(f))`, where f takes a gradient itself, as for meta-gradients over a batch of tasks; in
    forward mode over forward mode; from the third derivative on. Other operations have no second derivative. Inside of
    `exact_derivatives` both kinds are replaced by the same formulas in elementary operations:

    - wrong in torch: `layer_norm`, `batch_norm`, `instance_norm`, `weight_norm`, `select_scatter`, `cholesky_inverse`,
      `linear_cross_entropy` in chunks; in forward mode over forward mode `linalg.solve` and determinants;
    - missing in torch: `scaled_dot_product_attention`, `cdist`, `pdist`, `huber_loss`, `mse_loss`,
      `soft_margin_loss`, `hardsigmoid`, `glu`.

    The modules that call them, such as `LayerNorm`, `MultiheadAttention` and `TransformerEncoder`, become right too.
    Values are torch's, up to rounding. A replacement is slower than torch's one kernel, and attention keeps its matrix
    of weights. Calls of other torch functions take a microsecond longer.

    `fo.meta.unroll`, `inner_loop`, `forward_grad`, `checkpoint` and `custom_root` do this to the functions that they
    are given. In your own loops use it as you use `torch.no_grad`: `with fo.meta.exact_derivatives():` around the
    computation of the loss, or `@fo.meta.exact_derivatives()` on the loss function. It works inside and outside of the
    transforms of torch.func and of functions that `torch.compile` compiles. It may be nested.

    While torch.compile traces, it does not tell of `hardsigmoid` (2.13), which stays without a second derivative there.

    Only calls by torch's Python names are replaced. `torch.ops.aten.native_layer_norm` and modules that went through
    `torch.jit` are not. The page "Derivatives in torch" of the documentation lists the errors in torch.

    Example:
        >>> import functorch_optim as fo, torch
        >>> x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
        >>> @fo.meta.exact_derivatives()
        ... def loss(w, x):
        ...     return (torch.nn.functional.layer_norm(w * x, (2,), weight=w) ** 3).sum()
        >>> def after_a_step(w, x):
        ...     return loss(w - 0.1 * torch.func.grad(loss)(w, x), x)
        >>> w = torch.tensor([1.0, 0.5], dtype=torch.float64)
        >>> at_once = torch.func.grad(lambda w: torch.vmap(after_a_step, (None, 0))(w, x).sum())(w)
        >>> in_turn = torch.func.grad(lambda w: after_a_step(w, x[0]) + after_a_step(w, x[1]))(w)
        >>> torch.allclose(at_once, in_turn)
        True
    """

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, or its replacement."""
        if function in _OPENED:
            with self:
                return _OPENED[function](*args, **(kwargs or {}))
        return _EXACT.get(function, function)(*args, **(kwargs or {}))


def _opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function of torch that is written in Python, without the check whether a mode handles it.

    A mode sees a torch function as one call. It sees each call that the copy makes; but while torch.compile traces none
    of `torch._C._nn`, which the copy therefore replaces itself.
    """
    questions = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**function.__globals__, **dict.fromkeys(questions, _no), "torch": _torch()}
    opened = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


@functools.cache
def _torch() -> types.ModuleType:
    """Copy the module torch, with replacements in `torch._C._nn`."""

    def copied(module: Any, **others: Any) -> types.ModuleType:
        made = types.ModuleType(module.__name__)
        made.__dict__.update({**module.__dict__, **others})
        return made

    nn = torch._C._nn
    own = {name: _EXACT[found] for name, found in vars(nn).items() if callable(found) and found in _EXACT}
    return copied(torch, _C=copied(torch._C, _nn=copied(nn, **own)))


def _no(*_: Any) -> bool:
    return False


_EXACT: dict[Any, Callable[..., Any]] = {
    torch.layer_norm: elementary.layer_norm,
    torch.batch_norm: elementary.batch_norm,
    torch.instance_norm: elementary.instance_norm,
    torch._weight_norm: elementary.weight_norm,
    functional.scaled_dot_product_attention: elementary.scaled_dot_product_attention,
    torch.cdist: elementary.cdist,
    torch.pdist: elementary.pdist,
    torch._C._nn.huber_loss: elementary.huber_loss,
    torch._C._nn.mse_loss: elementary.mse_loss,
    torch._C._nn.soft_margin_loss: elementary.soft_margin_loss,
    torch._C._nn.hardsigmoid: elementary.hardsigmoid,
    torch._C._nn.glu: elementary.glu,
    torch.cholesky_inverse: elementary.cholesky_inverse,
    getattr(functional, "linear_cross_entropy", None): elementary.linear_cross_entropy,  # from torch 2.13 on
    torch.linalg.solve: elementary.solve,
    **dict.fromkeys([torch.select_scatter, Tensor.select_scatter], elementary.select_scatter),
    **dict.fromkeys([torch.linalg.det, torch.det, Tensor.det], elementary.det),
    **dict.fromkeys([torch.linalg.slogdet, torch.slogdet, Tensor.slogdet], elementary.slogdet),
    **dict.fromkeys([torch.logdet, Tensor.logdet], elementary.logdet),
}
_OPENED = {
    function: _opened(function)
    for function in (
        functional.layer_norm,
        functional.batch_norm,
        functional.instance_norm,
        functional.multi_head_attention_forward,
        functional.huber_loss,
        functional.mse_loss,
        functional.soft_margin_loss,
        functional.hardsigmoid,
        functional.glu,
    )
}
