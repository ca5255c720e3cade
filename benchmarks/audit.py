"""Find the operations of torch whose derivatives are wrong: `python benchmarks/audit.py`, in about ten minutes.

Prints the tables of docs/audit.md, which explains them: every differentiable operation that torch tests itself, on
torch's own samples. Give names of operations to look at them alone.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import functorch_optim as fo

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests/helpers"))
from nested_derivatives import Point, Scalar, difference, nestings, point

SAMPLES = 5  # that differ in form, of each operation
LARGEST = 3000  # number of elements
NESTINGS = {
    "reverse": "reverse",
    "forward": "forward",
    "reverse over reverse": "R R",
    "forward over reverse": "F R",
    "forward over forward": "F F",
    "third derivative": "R R R",
    "reverse over vmap of reverse": "R vmap R",
    "forward over vmap of reverse": "F vmap R",
}
EXACT = 1e-5  # relative to the derivative, and to a thousandth of the value
NOT_A_DERIVATIVE = ("random", "vmap", "batch", "storage", "channels_last")  # in messages of what vmap cannot do
RANDOM = ("normal",)  # operations


class Sample(NamedTuple):
    """An operation, as a function of the tensors that it can be differentiated in.

    Attributes:
        function: the sum of what the operation returns, weighted.
        x: the tensors.
    """

    function: Scalar
    x: list[Tensor]


def samples(operation: Any) -> Iterator[Sample]:
    """Yield samples that differ in form."""
    call = operation.get_op()
    if operation.gradcheck_wrapper is not None:  # it makes matrices symmetric, triangular and so on
        call = functools.partial(operation.gradcheck_wrapper, call)
    seen = set()
    for sample in itertools.islice(operation.sample_inputs("cpu", torch.float64, requires_grad=True), 60):
        leaves, structure = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
        tensors = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        places = [i for i, leaf in tensors if leaf.requires_grad and 0 < leaf.numel() <= LARGEST]
        form = str([(i, leaf.ndim if isinstance(leaf, Tensor) else leaf) for i, leaf in enumerate(leaves)])
        real = not any(leaf.is_complex() or leaf.layout != torch.strided for _, leaf in tensors)
        if not (places and real) or form in seen or len(seen) == SAMPLES:
            continue
        seen.add(form)

        def run(
            *xs: Tensor, leaves: Any = leaves, structure: Any = structure, places: Any = places, s: Any = sample
        ) -> Any:
            given = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            for i, x in zip(places, xs, strict=True):
                given[i] = x.clone()
            args, kwargs = pytree.tree_unflatten(given, structure)
            output = call(*args, **kwargs)
            return pytree.tree_leaves(s.output_process_fn_grad(output) if s.output_process_fn_grad else output)

        generator = torch.Generator().manual_seed(0)
        x = [leaves[i].detach().clone() for i in places]  # and away from kinks
        x = [a + 1e-3 * (torch.rand(a.shape, generator=generator, dtype=torch.float64) - 0.5) for a in x]
        differentiable = [
            isinstance(y, Tensor) and y.requires_grad and y.dtype in (torch.float64, torch.complex128)
            for y in run(*[a.clone().requires_grad_() for a in x])
        ]
        yield Sample(lambda *xs, run=run, some=differentiable: weighted(itertools.compress(run(*xs), some)), x)


def weighted(outputs: Any) -> Tensor:
    """Add up numbers, each with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        y = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
        weights = 1 + 0.5 * torch.arange(1.0, 1.0 + y.numel(), dtype=torch.float64).sin()
        total = total + (weights.reshape(y.shape) * y).sum()
    return total


def judge(sample: Sample) -> dict[str, str]:
    """Say of each nesting of derivatives what is wrong with it: a relative error, or why there is none."""
    at = point(sample.x)
    values = [sample.function(*at.x) for _ in range(2)]
    if not (torch.equal(*values) and values[0].isfinite()):
        return {}
    wrong: dict[str, str] = {}
    for nesting in nestings(sample.function, at):
        try:
            value = float(nesting.value())
        except (RuntimeError, NotImplementedError) as error:
            if not any(word in str(error).lower() for word in NOT_A_DERIVATIVE):
                wrong.setdefault(nesting.name, f"raises: {str(error).splitlines()[0][:80]}")
            continue
        off = relative_error(value, nesting.function, at)
        if off is not None and not off < EXACT:
            wrong[nesting.name] = max(f"{off:.0e}", wrong.get(nesting.name, ""), key=magnitude)
    return wrong


def relative_error(value: float, function: Scalar, at: Point) -> float | None:
    """Return how far a derivative is from differences; None where these are in doubt, or are not there."""
    try:
        expected, doubt = difference(function, at)
    except (RuntimeError, NotImplementedError):
        return None
    scale = max(abs(expected), 1e-3 * abs(float(function(*at.x))), 1e-6)
    return abs(value - expected) / scale if doubt < 0.1 * EXACT * scale else None


def magnitude(cell: str) -> float:
    """Return the error of a cell; one that raises has none."""
    try:
        return float("inf") if cell == "nan" else float(cell)
    except ValueError:
        return -1.0


def audit(names: list[str]) -> dict[str, dict[str, str]]:
    """Return what is wrong with each operation, if anything is."""
    from torch.testing._internal.common_methods_invocations import op_db  # noqa: PLC0415 (which takes seconds)

    found = {}
    for operation in op_db:
        name = ".".join(filter(None, (operation.name, operation.variant_test_name)))
        wanted = operation.name not in RANDOM and (not names or name.startswith(tuple(names)))
        if not (wanted and operation.supports_autograd and torch.float64 in operation.supported_dtypes("cpu")):
            continue
        wrong: dict[str, str] = {}
        with contextlib.suppress(RuntimeError, NotImplementedError):  # samples that torch itself cannot run
            for sample in samples(operation):
                for nesting, cell in judge(sample).items():
                    wrong[nesting] = max(cell, wrong.get(nesting, ""), key=magnitude)
        if wrong:
            found[name] = wrong
            print(".", end="", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Print what is wrong in torch, and what raises; and whether it is so inside of exact_derivatives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="operations, such as nn.functional.layer_norm; all by default")
    found = audit(names := parser.parse_args().names)
    with fo.meta.exact_derivatives():
        left = audit(names or list(found))
    print(f"\ntorch {torch.__version__}\n")
    print("| operation | " + " | ".join(NESTINGS.values()) + " | replaced |")
    print("|---" * (len(NESTINGS) + 2) + "|")
    for name, wrong in found.items():
        if any(magnitude(cell) > 0 for cell in wrong.values()):
            cells = ["raises" if magnitude(cell) < 0 else cell for cell in (wrong.get(n, "0") for n in NESTINGS)]
            cells = ["" if cell == "0" else cell for cell in cells]
            print(f"| `{name}` | " + " | ".join(cells) + f" | {'no' if name in left else 'yes'} |")
    print("\n| operation | raises in | replaced |\n|---|---|---|")
    for name, wrong in found.items():
        if all(magnitude(cell) < 0 for cell in wrong.values()):
            print(f"| `{name}` | {', '.join(NESTINGS[n] for n in wrong)} | {'no' if name in left else 'yes'} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
