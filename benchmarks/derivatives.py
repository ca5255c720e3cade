"""Measure how wrong derivatives through training are, here and in torch.optim: `python benchmarks/derivatives.py`.

Prints the two tables of docs/derivatives.md. It takes a few minutes, most of them for compilation.
"""

import inspect
import pathlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo.testing
from torch import Tensor

import functorch_optim as fo

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests/helpers"))
from catalogue import CATALOGUE, Row
from derivatives import (
    RELU,
    SMOOTH,
    STEPS,
    UNITS,
    OfVector,
    begun,
    continued,
    differences,
    error,
    errors,
    make_data,
    training_of_tasks,
    with_numbers,
)

# Rows of the catalogue, and what makes the same optimizer of torch.optim.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "sgd": ("SGD", {}),
    "sgd_momentum": ("SGD", {"maximize": True}),
    "sgd_nesterov": ("SGD", {"nesterov": True}),
    "adam": ("Adam", {}),
    "adam_amsgrad": ("Adam", {"amsgrad": True}),
    "adam_decoupled": ("Adam", {"decoupled_weight_decay": True}),
    "adamw": ("AdamW", {}),
    "sparse_adam": ("SparseAdam", {"maximize": True}),
    "nadam": ("NAdam", {"maximize": True}),
    "nadam_decoupled": ("NAdam", {"decoupled_weight_decay": True}),
    "radam": ("RAdam", {"maximize": True}),
    "radam_decoupled": ("RAdam", {"decoupled_weight_decay": True}),
    "adamax": ("Adamax", {}),
    "adagrad": ("Adagrad", {}),
    "adagrad_decay": ("Adagrad", {"maximize": True}),
    "adadelta": ("Adadelta", {"maximize": True}),
    "rmsprop": ("RMSprop", {"maximize": True}),
    "rmsprop_centered": ("RMSprop", {"centered": True}),
    "rprop": ("Rprop", {}),
    "asgd": ("ASGD", {}),
    "adafactor": ("Adafactor", {"maximize": True}),
    "adafactor_large_eps": ("Adafactor", {"maximize": True}),
    "adafactor_t5": None,
    "muon": ("Muon", {}),
    "shampoo": None,
    "soap": None,
    "lion": None,
    "sign_sgd": None,
    "signum": None,
    "lamb": None,
    "lars": None,
    "ademamix": None,
    "simplified_ademamix": None,
    "adopt": None,
    "adabelief": None,
    "adan": None,
    "nadamw": None,
    "stable_adamw": None,
    "yogi": None,
    "laprop": None,
    "adam_atan2": None,
    "adanorm": None,
    "grams": None,
    "adai": None,
    "came": None,
    "adam_mini": None,
    "ranger": None,
    "sophia": None,
    "dion": None,
    "lbfgs": ("LBFGS", {"max_iter": 2, "history_size": 2}),
    "lbfgs_search": ("LBFGS", {"max_iter": 1, "history_size": 2, "line_search_fn": "strong_wolfe"}),
    "chain": None,
    "scale_by_schedule": None,
    "reduce_on_plateau": None,
}
DEAD = torch.tensor([-100.0] + [0.0] * (UNITS - 1), dtype=torch.float64)  # one unit of the network is
EXACT = 1e-6
NONE = "—"


# Ours. ----------------------------------------------------------------------------------------------------------------


def measure(row: Row) -> list[str]:
    """Return the cells of a row: the largest errors of derivatives by each kind of argument, and so on."""
    first, later = seeded(begun, row), seeded(continued, row)
    found: dict[tuple[str, str], float] = {}
    for function in (first, later):
        gradient = torch.func.grad(function)(function.z)
        for path, e in errors(gradient, differences(function, function.z), function.places).items():
            kind, name = path.split(".")[:2]
            key = (kind, name if kind == "hyperparameters" else "")
            found[key] = max(found.get(key, 0.0), e)
    kinds = [number(found.pop((kind, ""))) if (kind, "") in found else NONE for kind in ("params", "data", "state")]
    worst = max(found, key=lambda key: found[key], default=None)
    by_number = NONE if worst is None else f"{number(found[worst])} `{worst[1]}`"
    modes = max(both_modes(first), both_modes(later))
    return [
        *kinds,
        by_number,
        number(modes),
        number(second_order(later)),
        number(batched(row)),
        dead(row),
        compiled(row),
    ]


def seeded(start: Callable[..., Any], row: Row, **options: Any) -> OfVector:
    """Return the training of a row that the tests look at."""
    torch.manual_seed(0)
    return OfVector(*start(row, **options))


def both_modes(function: OfVector) -> float:
    """Return how far forward mode is from reverse mode."""
    return error(torch.func.jacfwd(function)(function.z), torch.func.grad(function)(function.z))


def second_order(function: OfVector) -> float:
    """Return the error of the Hessian."""
    gradient = torch.func.grad(function)
    return error(torch.func.jacfwd(gradient)(function.z), differences(gradient, function.z))


def batched(row: Row) -> float:
    """Return how far the gradient through vmap over tasks with shared parameters is from that through a loop."""
    training, arguments = begun(row)
    tasks = [make_data() for _ in range(3)]

    def together(params: Any) -> Tensor:
        stacked = fo.tree.map(lambda *leaves: torch.stack(leaves), *tasks)
        losses = torch.vmap(lambda data: training({**arguments, "params": params, "data": data}))(stacked)
        return losses.sum()

    def one_by_one(params: Any) -> Any:
        return sum(training({**arguments, "params": params, "data": data}) for data in tasks)

    functions = [OfVector(total, arguments["params"]) for total in (together, one_by_one)]
    return error(*[torch.func.grad(function)(function.z) for function in functions])


def dead(row: Row) -> str:
    """Return the largest error where a unit of a ReLU network is dead."""
    function = seeded(begun, row, loss=RELU, shifts=(DEAD,) * STEPS)
    found = errors(torch.func.grad(function)(function.z), differences(function, function.z, h=1e-5), function.places)
    return number(max(found.values()))


def compiled(row: Row) -> str:
    """Tell whether the gradient of a batch of tasks compiles whole, once, and to the same numbers."""
    torch._dynamo.reset()
    train, total, params, numbers, state = training_of_tasks(row)
    counter = torch._dynamo.testing.CompileCounter()
    gradient = torch.func.grad(total, (0, 1))
    fast = torch.compile(gradient, backend=counter, fullgraph=True)
    for _ in range(3):
        arguments = params, numbers, state, torch.randn(3, 4, 2, dtype=torch.float64)
        try:
            pairs = zip(fo.tree.flatten(fast(*arguments))[0], fo.tree.flatten(gradient(*arguments))[0], strict=True)
        except Exception as reason:
            return message(reason)
        if max(error(left, right) for left, right in pairs) > EXACT:
            return "other numbers"
        params, state = train(params, numbers, state, arguments[-1][0])
        numbers = fo.tree.map(lambda value: 0.99 * value, numbers)
    return "yes" if counter.frame_count == 1 else f"{counter.frame_count} times"


# torch.optim's. -------------------------------------------------------------------------------------------------------


def torch_arguments(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Turn hyperparameters, each by itself, into torch.optim's arguments."""
    pairs = {
        "betas": ("beta1", "beta2"),
        "etas": ("etaminus", "etaplus"),
        "step_sizes": ("smallest", "largest"),
        "eps": ("eps1", "eps2"),
    }
    taken = {name: tuple([numbers[part] for part in parts]) for name, parts in pairs.items() if parts[0] in numbers}
    used = {part for name in taken for part in pairs[name]}
    return {**{name: value for name, value in numbers.items() if name not in used}, **taken}


def train_with_torch(
    kind: Callable[..., Any], options: Mapping[str, Any], loss: Callable[..., Tensor], arguments: Any, shift: Any
) -> Tensor:
    """Train as torch's own tests of `differentiable=True` do; without it where nothing requires grad."""
    leaves, structure = fo.tree.flatten(arguments["params"])
    params, data = [leaf.clone() for leaf in leaves], {**arguments["data"], "shift": shift}
    recorded = any(leaf.requires_grad for leaf in fo.tree.flatten(arguments)[0])
    numbers = arguments["hyperparameters"]
    numbers = {name: value if value.requires_grad else value.item() for name, value in numbers.items()}
    optimizer = kind(params, **torch_arguments(numbers), **options, differentiable=recorded)
    for _ in range(STEPS):
        copies = [param.clone() if param.requires_grad else param.clone().requires_grad_() for param in params]
        value = loss(fo.tree.unflatten(structure, copies), data)
        for param, grad in zip(params, torch.autograd.grad(value, copies, create_graph=recorded), strict=True):
            param.grad = grad
        optimizer.step()
    outcome: Tensor = loss(fo.tree.unflatten(structure, params), arguments["data"])
    return outcome + sum(param.sin().sum() for param in params)


def measure_torch(row: Row, name: str, options: Mapping[str, Any]) -> list[str]:
    """Return the errors of torch.optim's derivatives by the parameters and the learning rate; and with a dead unit."""
    kind = getattr(torch.optim, name)
    if "differentiable" not in inspect.signature(kind).parameters:
        return ["no such argument"] * 4
    row = with_numbers(row, weight_decay=0.0)  # which would give the dead unit a gradient
    return [
        torch_error(
            row, part, lambda arguments, loss=loss, shift=shift: train_with_torch(kind, options, loss, arguments, shift)
        )
        for loss, shift in ((SMOOTH, 0.0), (RELU, DEAD))
        for part in ("params", "lr")
    ]


def torch_error(row: Row, part: str, train: Callable[[Any], Tensor]) -> str:
    """Compare the gradient by the parameters or by the learning rate with differences."""
    torch.manual_seed(0)
    _, arguments = begun(row)

    def outcome(given: Any) -> Tensor:
        if part == "params":
            return train({**arguments, "params": given})
        return train({**arguments, "hyperparameters": {**arguments["hyperparameters"], "lr": given}})

    function = OfVector(outcome, arguments[part] if part == "params" else arguments["hyperparameters"]["lr"])
    expected = differences(function, function.z, h=1e-5, batched=False)
    z = function.z.clone().requires_grad_()
    try:
        [gradient] = torch.autograd.grad(function(z) + 0 * z.sum(), z)  # which is zero where z is not in the graph
    except Exception as reason:
        return message(reason)
    if not gradient.isfinite().all():
        return "NaN"
    wrong = error(gradient.detach(), expected)
    return number(wrong) if wrong < EXACT else f"wrong by {wrong:.0%}"


# Tables. --------------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a number with one digit."""
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def message(reason: Exception) -> str:
    """Return what is raised, without details of the tensors."""
    return f"{type(reason).__name__}: {str(reason).partition(': [')[0].splitlines()[0]}"


def with_notes(lines: Mapping[str, list[str]]) -> tuple[dict[str, list[str]], list[str]]:
    """Return a table without its long messages, and these."""
    notes = list(dict.fromkeys([cell for line in lines.values() for cell in line if "Error: " in cell]))
    numbers = {note: f"raises ({place})" for place, note in enumerate(notes, start=1)}
    return {name: [numbers.get(cell, cell) for cell in line] for name, line in lines.items()}, notes


def print_table(columns: list[str], lines: Mapping[str, list[str]]) -> None:
    """Print a table in markdown."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, cells in lines.items():
        print(f"| `{name}` | {' | '.join(cells)} |")
    print(flush=True)


def main() -> None:
    """Print the tables."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # so that torch.optim counts in float64 too
    rows = {row.name: row for row in CATALOGUE}
    print(f"torch {torch.__version__}, optree {fo.tree.optree.__version__}\n")
    columns = ["init", "data", "state", "hyperparameters: the worst", "forward mode", "Hessian", "vmap", "dead unit"]
    print_table(["", *columns, "compiles"], {name: measure(rows[name]) for name in OPTIMIZERS})
    theirs = {name: measure_torch(rows[name], *other) for name, other in OPTIMIZERS.items() if other is not None}
    table, notes = with_notes(theirs)
    print_table(["torch.optim", "init", "lr", "init, dead unit", "lr, dead unit"], table)
    print("\n".join([f"{place}. {note}" for place, note in enumerate(notes, start=1)]))


if __name__ == "__main__":
    main()
