"""Torch's operations, composed of elementary ones whose derivatives are right where torch's own are not.

Each function has the arguments and the values of the torch function that it stands for. Wrong arguments are passed on
to torch, whose error explains the mistake. `docs/audit.md` lists torch's errors in the derivatives of each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.nn import functional

from functorch_optim._execution.representation import widened
from functorch_optim._numerics import safe_sqrt

# Normalizations. Torch's backward passes treat the mean and the deviation of the forward pass as constants, and their
# batching rules add up derivatives that must stay apart. --------------------------------------------------------------


def layer_norm(
    input: Tensor,  # noqa: A002 - torch's name, here and below
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    shape = tuple(normalized_shape)
    shapes = [input.shape[max(input.ndim - len(shape), 0) :], *[p.shape for p in (weight, bias) if p is not None]]
    if not shape or any(other != shape for other in shapes):
        return torch.layer_norm(input, shape, weight, bias, eps, cudnn_enable)  # raises torch's error
    single = input.is_cuda and torch.is_autocast_enabled("cuda")
    # In half precision torch's kernels take means in float32.
    x = _standardized(widened(input), tuple(range(-len(shape), 0)), eps)
    return _affine(x, weight, bias).to(torch.float32 if single else input.dtype)


def batch_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
    *,
    torchs: Callable[..., Tensor] = torch.batch_norm,
    batch: tuple[int, ...] = (0,),
) -> Tensor:
    """Normalize each channel over its positions, and over the dimensions `batch`."""
    parameters, rest = (weight, bias, running_mean, running_var), (training, momentum, eps, cudnn_enabled)
    fixed = not training and running_mean is not None  # then torch is right
    if fixed or input.ndim < 2 or any(p is not None and p.shape != input.shape[1:2] for p in parameters):
        return torchs(input, *parameters, *rest)  # raises torch's error, or is right
    if running_mean is not None:  # torch keeps the running statistics, which have no derivatives
        torchs(input.detach(), None, None, running_mean, running_var, *rest)
    along = (-1, *[1] * (input.ndim - 2))
    x = _standardized(widened(input), (*batch, *range(2, input.ndim)), eps)
    return _affine(x, *[None if p is None else p.reshape(along) for p in (weight, bias)]).to(input.dtype)


def instance_norm(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    rest = (use_input_stats, momentum, eps, cudnn_enabled)
    return batch_norm(input, weight, bias, running_mean, running_var, *rest, torchs=torch.instance_norm, batch=())


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = None if dim == -1 else [i for i in range(v.ndim) if i != dim]  # -1: one norm of all, as torch has it
    norm: Tensor = torch.linalg.vector_norm(v, 2, others, keepdim=dim != -1)
    return v * (g / norm)


# Operations without a second derivative, or without one in forward mode. --------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled(query.device.type):  # autocast knows only the name of the replaced function
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, zero, -torch.inf)
    elif attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    mathematics: Any = torch._scaled_dot_product_attention_math
    output: Tensor = mathematics(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )[0]
    return output


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:  # noqa: A002
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[i] - input[j], p)


def _length(x: Tensor, p: float) -> Tensor:
    return safe_sqrt(x.square().sum(-1)) if p == 2 else torch.linalg.vector_norm(x, p, dim=-1)


def huber_loss(input: Tensor, target: Tensor, reduction: int = 1, delta: float = 1.0) -> Tensor:  # noqa: A002
    error = (input - target).abs()
    return _reduced(torch.where(error <= delta, 0.5 * error.square(), delta * (error - 0.5 * delta)), reduction)


def soft_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:  # noqa: A002
    return _reduced(functional.softplus(-target * input), reduction)


def mse_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Tensor:  # noqa: A002
    if torch.is_autocast_enabled(input.device.type):  # which has losses in single precision
        input, target = widened(input), widened(target)  # noqa: A001
    return _reduced((input - target).square(), reduction)


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return (losses, losses.mean(), losses.sum())[reduction]


def hardsigmoid(input: Tensor) -> Tensor:  # noqa: A002
    return functional.relu6(input + 3) / 6


def glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    if input.ndim == 0 or input.shape[dim] % 2:
        refused: Tensor = torch.ops.aten.glu(input, dim)  # raises torch's error
        return refused
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


# Operations whose derivative is wrong for a reason of their own. ------------------------------------------------------


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:  # noqa: A002
    size = input.shape[dim]
    if not -size <= index < size or src.ndim != input.ndim - 1:
        return torch.select_scatter(input, src, dim, index)  # raises torch's error
    start = index % size
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, start, start + 1)


def cholesky_inverse(input: Tensor, upper: bool = False, **out: Any) -> Tensor:  # noqa: A002
    identity = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device)
    return torch.cholesky_solve(identity, input.triu() if upper else input.tril(), upper=upper, **out)


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Any:
    return functional.linear_cross_entropy(*args, **kwargs)  # torch's derivative is right without chunks


# Operations that are wrong only in forward mode over forward mode: torch saves the forward pass's LU decomposition. ---


def solve(A: Tensor, B: Tensor, *, left: bool = True, **out: Any) -> Any:  # noqa: N803 - torch's names
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    if not _nested_forward() or (vector and not left):
        return torch.linalg.solve(A, B, left=left, **out)
    x = torch.linalg.lu_solve(*torch.linalg.lu_factor(A), B.unsqueeze(-1) if vector else B, left=left)
    return x.squeeze(-1) if vector else x


def det(A: Tensor, **out: Any) -> Any:  # noqa: N803
    if not _nested_forward():
        return torch.linalg.det(A, **out)
    P, _, U = torch.linalg.lu(A)  # noqa: N806
    return torch.linalg.det(P) * U.diagonal(dim1=-2, dim2=-1).prod(-1)


def slogdet(A: Tensor, **out: Any) -> Any:  # noqa: N803
    if not _nested_forward():
        return torch.linalg.slogdet(A, **out)
    P, _, U = torch.linalg.lu(A)  # noqa: N806
    diagonal = U.diagonal(dim1=-2, dim2=-1)
    return torch.linalg.det(P) * torch.sgn(diagonal).prod(-1), diagonal.abs().log().sum(-1)


def logdet(input: Tensor) -> Any:  # noqa: A002
    if not _nested_forward():
        return torch.logdet(input)
    sign, logarithm = slogdet(input)
    return torch.where(sign == -1, torch.nan, logarithm)


def _nested_forward() -> bool:
    if torch.compiler.is_compiling():  # it cannot be asked there
        return True
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ()) > 1
