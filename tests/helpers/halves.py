"""Parameters of several precisions, gradients for them, and the same in float32."""

import torch

import functorch_optim as fo

HALVES = ("bfloat", "float16")


def make(count=12, size=300):
    generator = torch.Generator().manual_seed(0)
    dtypes = {"bfloat": torch.bfloat16, "float16": torch.float16, "single": torch.float32}

    def drawn():
        return {name: torch.randn(size // 3, 3, generator=generator).to(dtype) for name, dtype in dtypes.items()}

    return drawn(), [drawn() for _ in range(count)]


def in_single(tree):
    return fo.tree.cast(tree, torch.float32)


def same_bits(left, right):
    """Whether two trees are the same to the last bit, and in the same dtypes; NaN is NaN."""
    pairs = zip(fo.tree.flatten(left)[0], fo.tree.flatten(right)[0], strict=True)
    return all(a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)
