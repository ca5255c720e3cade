"""Param groups and tables of labelled parameters."""

from __future__ import annotations

from typing import Any

from functorch_optim import tree
from functorch_optim._core.naming import plain
from functorch_optim._labels.parameters import Parameters, parameters_of
from functorch_optim.tree import Tree


def param_groups(module_or_tree: Any, **hyperparameters: Tree) -> list[dict[str, Any]]:
    """Make param groups of trees of hyperparameters: a group for the parameters whose values are all the same.

    Args:
        module_or_tree: module, whose parameters that do not require grad are left out; or tree of tensors.
        **hyperparameters: by name, a tree built like the parameters, or a prefix of one: a result of
            `fo.label`, `fo.layer_decay` or `fo.weight_decay_mask`. Where a value is None, the group has none.

    Returns:
        List of dicts for `fo.Optimizer` and all of torch.optim: `"params"` is a list of pairs of name and parameter.

    Raises:
        ValueError: a tree does not fit the parameters; or there is nothing to train.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> decays = fo.label(model, {"*.bias": 0.0}, default=0.1)
        >>> groups = fo.param_groups(model, weight_decay=decays)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight', '1.weight']), (0.0, ['0.bias', '1.bias'])]
        >>> opt = torch.optim.AdamW(groups, lr=1e-3)
    """
    parameters = parameters_of(module_or_tree, "param_groups")
    columns = {name: _aligned(parameters, name, values) for name, values in hyperparameters.items()}
    groups: dict[Any, dict[str, Any]] = {}
    taken: set[int] = set()
    for i, p in enumerate(parameters.listed):
        if p.trains and id(p.tensor) not in taken:
            taken.add(id(p.tensor))
            values = {name: column[i] for name, column in columns.items() if column[i] is not None}
            key = tuple([(name, _key(value)) for name, value in values.items()])
            groups.setdefault(key, {"params": [], **values})["params"].append((p.path, p.tensor))
    if not groups:
        raise ValueError("There is nothing to train: no parameter requires grad. Call module.requires_grad_() first")
    return list(groups.values())


def _key(value: Any) -> Any:
    """Return a key that tells values apart: numbers and text by value, tensors and schedules by identity."""
    return value if isinstance(value, int | float | str) else id(value)


def label_table(module_or_tree: Any, **trees: Tree) -> str:
    """Show the labels: a line for each parameter.

    Args:
        module_or_tree: module; or tree of tensors.
        **trees: by the name of the column: labels, masks or numbers: a tree like the parameters, or a prefix of one.

    Returns:
        Table to print. All names of a tied parameter are in its line, and those that do not require grad are marked.

    Raises:
        ValueError: a tree does not fit the parameters.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(4, 2)
        >>> print(fo.label_table(model, decays=fo.weight_decay_mask(model)))
        parameter  shape   decays
        weight     (2, 4)  True
        bias       (2,)    False
    """
    parameters = parameters_of(module_or_tree, "label_table")
    columns = [_aligned(parameters, name, values) for name, values in trees.items()]
    rows = [["parameter", "shape", *trees]]
    for i, p in enumerate(parameters.listed):
        others = [path for path in p.paths if plain(path) != plain(p.path)]
        name = " = ".join(dict.fromkeys([p.path, *others])) + ("" if p.trains else " (frozen)")
        rows.append([name, str(tuple(p.tensor.shape)), *[_short(column[i]) for column in columns]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _aligned(parameters: Parameters, name: str, values: Tree) -> list[Any]:
    """Give each parameter its value."""
    numbered = parameters.build(range(len(parameters.listed)))
    found = tree.broadcast_prefix(values, numbered, f"The values of {name!r}")
    by_number = dict(zip(tree.flatten(numbered)[0], found, strict=True))
    return [by_number[number] for number in range(len(parameters.listed))]
