"""Newton and Schulz's iteration: from a matrix U S V^T towards U V^T, by products of matrices alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import Hyperparameter, at, check_choice, check_each, check_integer

Triple: TypeAlias = tuple[Hyperparameter, Hyperparameter, Hyperparameter]
"""a, b, c of an iteration X <- a X + (b A + c A A) X, A = X X^T."""
Coefficients: TypeAlias = Triple | Sequence[Triple] | str

JORDAN = (3.4445, -4.7750, 2.0315)
"""Chosen by Jordan for a large slope at zero; singular values end between 0.7 and 1.2."""


def _with_margin(margin: float, *triples: tuple[float, float, float]) -> tuple[tuple[float, float, float], ...]:
    """Divide the matrix by a margin more than its norm: in the first iteration, where it costs nothing."""
    (a, b, c), *rest = triples
    return (a / margin, b / margin**3, c / margin**5), *rest


PRESETS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "jordan": (JORDAN,) * 5,
    "polar_express": _with_margin(
        1.02,
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    "deepseek_v4": ((JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2),
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
}
"""Coefficients by name, a triple for each iteration. Polar Express: Amsel et al., arXiv:2505.16932, as dion has it,
whose margin of 1.02 is in the first triple here. DeepSeek-V4: eight of Jordan's, and two that end at 1. CANS: Grishina
et al., arXiv:2506.10935."""


def checked_triples(ns_coefficients: Any, ns_steps: Any) -> tuple[tuple[Triple, ...], int]:
    """Return the triples that were given, and the number of iterations; the last triple is repeated.

    Raises:
        ValueError: there is no triple, or no such name, or `ns_steps` is out of range.
    """
    check_integer("ns_steps", ns_steps, 0)
    if ns_steps >= 100:
        raise ValueError(f"Invalid ns_steps: {ns_steps}; torch.optim.Muon takes less than 100, and 5 are usual")
    if isinstance(ns_coefficients, str):
        check_choice("ns_coefficients", ns_coefficients, *PRESETS)
        ns_coefficients = PRESETS[ns_coefficients]
    each = list(ns_coefficients) if isinstance(ns_coefficients, tuple | list) else []
    several = bool(each) and all(isinstance(one, tuple | list) and len(one) == 3 for one in each)
    triples = tuple(map(tuple, each)) if several else (ns_coefficients,)
    for triple in triples:
        check_each("ns_coefficients", triple, ("a number",) * 3, "(3.4445, -4.775, 2.0315)")
    return triples, max(ns_steps, len(triples)) if several else ns_steps


def check_ns_dtype(dtype: Any) -> None:
    """Raise unless this is a dtype to iterate in, or None.

    Raises:
        ValueError: it is neither.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"Invalid ns_dtype: {dtype!r}; give a floating-point dtype, such as torch.bfloat16, or None")


def triples_at(triples: tuple[Triple, ...], step: Tensor) -> tuple[tuple[Any, ...], ...]:
    """Evaluate coefficients at a step."""
    return tuple([tuple([at(value, step) for value in triple]) for triple in triples])


def check_matrix(name: str, p: Tensor) -> None:
    """Raise where an optimizer of matrices is given another parameter.

    Raises:
        ValueError: it is a vector or a number.
        TypeError: it is complex.
    """
    if p.ndim < 2:
        raise ValueError(
            f"{name} is for matrices, but this parameter has shape {tuple(p.shape)}; give it to another optimizer, as "
            f"muon_with_adamw does, or as in partition({{True: {name.lower()}(), False: adamw()}}, lambda ps: "
            "tree.map(lambda p: p.ndim >= 2, ps))"
        )
    if p.is_complex():
        raise TypeError(f"{name} does not support complex parameters; give them to another optimizer, with partition")


def as_matrices(x: Tensor, flatten: bool | None) -> Tensor:
    """View a tensor of two dimensions or more as a matrix, or a stack of them.

    Args:
        x: the tensor.
        flatten: True: the dimensions after the first are the columns. False: those before the last two are a stack.
            None: the first for four dimensions and more, the second for three.
    """
    if x.ndim == 2:
        return x
    return x.flatten(1) if flatten or (flatten is None and x.ndim > 3) else x.flatten(0, -3)


def matrix_norm(x: Tensor) -> Tensor:
    """Take the Frobenius norm of each matrix: (..., 1, 1). Its derivative is zero at zero."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return norm


def orthogonalized(x: Tensor, triples: Sequence[Any], ns_steps: int) -> Tensor:
    """Iterate from matrices whose norm is at most 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for k in range(ns_steps):
        a, b, c = triples[min(k, len(triples) - 1)]
        gram = x @ x.mT
        x = _addmm(a, x, 1.0, _addmm(b, gram, c, gram, gram), x)
    return x.mT if tall else x


def _addmm(beta: Any, x: Tensor, alpha: Any, y: Tensor, z: Tensor) -> Tensor:
    """Compute beta x + alpha y z: rounded once where the factors are numbers."""
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        mixed: Tensor = beta * x + alpha * (y @ z)
        return mixed
    product = torch.addmm if x.ndim == 2 else torch.baddbmm
    return product(x, y, z, beta=beta, alpha=alpha)
