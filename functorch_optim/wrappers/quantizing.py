"""States in 8 or 4 bits between the steps of any transformation: blocks of numbers, each with a scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_optim import tree
from functorch_optim._core.checks import SINGLE
from functorch_optim._core.hyperparameters import check_choice, check_integer
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim._execution.sharded import layout_of, local
from functorch_optim.tree import MaskedNode, Tree
from functorch_optim.tree._structure import saved
from functorch_optim.wrappers._wrapping import wrapped, wrapper


@saved
class QuantizedState(NamedTuple):
    """The state of `quantized`: two trees, each built like the state of the wrapped transformation.

    Attributes:
        codes: uint8 tensors, of 4 bits two in one along the last dimension; tensors that are not quantized as they are.
        absmax: for each of them the largest absolute value of each block, float32 `(blocks,)`, with a minus where no
            number of the block is negative; `MaskedNode()` for tensors that are not quantized.

    Example:
        >>> import functorch_optim as fo, torch
        >>> state = fo.quantized(fo.trace(0.9)).init(torch.zeros(64, 64))
        >>> state.codes.momentum_buffer.dtype, state.absmax.momentum_buffer.shape
        (torch.uint8, torch.Size([16]))
    """

    codes: Tree
    absmax: Tree


def quantized(tx: Any, bits: int = 8, *, block_size: int | None = None, min_size: int = 4096) -> Any:
    """Keep the states of any transformation in 8 or 4 bits: a quarter or an eighth of the memory of float32.

        a = max |x| of each block of x,  code = nearest of x / a in a map of 2^bits numbers
        x = a map[code]

    States are float32 while a step is computed, and are rounded at its end.

    Args:
        tx: transformation; or a factory, then the result is a factory of the same hyperparameters.
        bits: 8 or 4.
        block_size: numbers of a block, >= 1; by default 256 of 8 bits, and 128 of 4 bits.
        min_size: number of elements from which on a tensor is quantized, >= 1.

    Returns:
        Transformation whose state is a `QuantizedState`.

    Raises:
        ValueError: `bits` is neither 8 nor 4, or a size is less than 1.
        TypeError: `tx` is neither a transformation nor a factory, or a size is no integer.

    The maps are the signed and the unsigned dynamic one of the paper; of 4 bits the unsigned one is linear without
    zero. A block without negative numbers, such as those of a mean of squares, has the unsigned map. There a positive
    number is not rounded to zero, since Adam divides by its root; bitsandbytes rounds it. Tensors of float64 and of
    complex numbers are not quantized, nor of 4 bits those whose last dimension is odd.

    Wrap the moments alone, and let wrappers that keep parameters go around: `master_weights(quantized(adamw(1e-3)))`,
    `ema_weights(...)`. A NaN or infinite number spoils its block: let `apply_if_finite` go around. A step holds all
    states in float32 at once, so that memory is saved between steps, and not at their peak. No derivatives flow through
    quantized states. In `fo.Optimizer` the state is one for all parameters of a group.

    Blocks of a sharded state (DTensor) do not cross its shards, so that nothing is sent; `absmax` then has the shape
    `(shards, blocks)`. Such a state loads on as many processes as have saved it. Of 4 bits, states that are cut along
    their last dimension are not quantized.

    Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, sections 2 and 3; Li et
    al., Memory Efficient Optimizers with 4-bit States, arXiv:2309.01507, section 3. Blocks of 256 and tensors from 4096
    elements on are those of bitsandbytes.

    Example:
        >>> import functorch_optim as fo, torch
        >>> params = torch.zeros(1000, 100)
        >>> def size(state):
        ...     return sum([leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(state)])
        >>> size(fo.adam(1e-3).init(params)) // 1000, size(fo.quantized(fo.adam(1e-3)).init(params)) // 1000
        (800, 203)
    """
    check_choice("bits", bits, 8, 4)
    block_size = (256 if bits == 8 else 128) if block_size is None else block_size
    check_integer("block_size", block_size, 1)
    check_integer("min_size", min_size, 1)
    return wrapped(
        tx, _quantized, "quantized(adamw(1e-3), bits=8)", bits=bits, block_size=block_size, min_size=min_size
    )


@wrapper
def _quantized(tx: GradientTransformation, bits: int, block_size: int, min_size: int) -> GradientTransformation:
    def is_large(x: Tensor) -> bool:
        layout = layout_of(x)
        fits = bits == 8 or (x.ndim > 0 and x.shape[-1] % 2 == 0 and not (layout and layout.cuts(x.ndim - 1)))
        return x.dtype in SINGLE and x.numel() >= min_size and fits

    def pack(x: Any) -> tuple[Any, Any]:
        return _packed_shards(x, bits, block_size) if isinstance(x, Tensor) and is_large(x) else (x, MaskedNode())

    def init(params: Tree) -> QuantizedState:
        leaves, structure = tree.flatten(tx.init(params))
        return _arranged(structure, [pack(leaf) for leaf in leaves])

    def update(updates: Tree, state: QuantizedState, params: Tree, **extra: Any) -> tuple[Tree, QuantizedState]:
        codes, structure = tree.flatten(state.codes)
        absmax = tree.flatten_up_to(structure, state.absmax, "absmax", state.codes, "codes")
        forms = list(zip(codes, absmax, strict=True))
        given = [
            _unpacked_shards(*form, bits, block_size) if isinstance(form[1], Tensor) else form[0] for form in forms
        ]
        updates, new = tx.update(updates, tree.unflatten(structure, given), params, **extra)
        after = tree.flatten_up_to(structure, new, "the next state", state.codes, "the one given")
        # What did not change is not rounded again.
        packed = [form if x is old else pack(x) for form, x, old in zip(forms, after, given, strict=True)]
        return updates, _arranged(structure, packed)

    return GradientTransformation(init, update, wraps=tx)


def _arranged(structure: Any, forms: list[tuple[Any, Any]]) -> QuantizedState:
    return QuantizedState(*[tree.unflatten(structure, [form[k] for form in forms]) for k in (0, 1)])


def _packed_shards(x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Pack a tensor; of a sharded one each shard, so that scales are a vector for each."""
    layout = layout_of(x)
    if layout is None:
        return _packed(x, bits, size)
    codes, absmax = _packed(local(x), bits, size)
    most = layout.of_vectors(-(-layout.largest // size))
    vector = torch.nn.functional.pad(absmax, (0, most.shape[-1] - len(absmax)))
    home = layout if bits == 8 else layout.of_shape((*layout.shape[:-1], layout.shape[-1] // 2))
    return home.joined(codes), most.joined(vector.reshape((1,) * (len(most.shape) - 1) + (-1,)))


def _unpacked_shards(codes: Tensor, absmax: Tensor, bits: int, size: int) -> Tensor:
    """Unpack a tensor, or the shards of one."""
    layout = layout_of(codes)
    x = _unpacked(local(codes), local(absmax).reshape(-1), bits, size)
    if layout is None:
        return x
    return (layout if bits == 8 else layout.of_shape((*layout.shape[:-1], layout.shape[-1] * 2))).joined(x)


def _packed(x: Tensor, bits: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the codes of a tensor, and the scales of its blocks."""
    numbers = x.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % size)).reshape(-1, size)
    absmax, unsigned = blocks.abs().amax(1), blocks.amin(1) >= 0
    scaled = blocks / torch.where(absmax == 0, 1.0, absmax).unsqueeze(1)
    with_sign, without = [torch.bucketize(scaled, (m[1:] + m[:-1]) / 2) for m in _maps(bits, x.device)]
    if bits == 8:  # 0 is the first number without sign
        without = torch.maximum(without, (scaled > 0).to(without.dtype))
    codes = torch.where(unsigned.unsqueeze(1), without, with_sign).to(torch.uint8)
    codes = codes.reshape(-1)[: len(numbers)].reshape(x.shape)
    if bits == 4:
        codes = codes[..., ::2] * 16 + codes[..., 1::2]
    return codes, torch.where(unsigned, -absmax, absmax)


def _unpacked(codes: Tensor, absmax: Tensor, bits: int, size: int) -> Tensor:
    """Return the float32 numbers that codes and scales stand for."""
    if bits == 4:
        codes = torch.stack([codes // 16, codes % 16], -1).flatten(-2)
    shape, count = codes.shape, codes.numel()
    scale = absmax.repeat_interleave(size)[:count].reshape(shape)
    with_sign, without = [m[codes.to(torch.int64)] for m in _maps(bits, codes.device)]
    return torch.where(torch.signbit(scale), without, with_sign) * scale.abs()


def _maps(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the numbers between -1 and 1 that codes stand for, and those between 0 and 1, in order."""
    half = _dynamic(bits - 1, 0)
    signed = [*[-x for x in reversed(half)], 0.0, *half, 1.0]
    unsigned = [0.0, *_dynamic(bits - 1, 1), 1.0] if bits == 8 else [k / 16 for k in range(1, 17)]
    return torch.tensor(signed, device=device), torch.tensor(unsigned, device=device)


def _dynamic(exponents: int, more: int) -> list[float]:
    """Return positive numbers: for each power of ten the middles of equal parts, twice as many as for the one below."""
    found = []
    for i in range(exponents):
        parts = 2 ** (i + more)
        found += [10.0 ** (i - exponents + 1) * (0.1 + 0.9 * (k + 0.5) / parts) for k in range(parts)]
    return found
