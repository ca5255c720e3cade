"""Parameters of a module or tree, as rules see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from functorch_optim import tree
from functorch_optim._core.checks import check_is_param
from functorch_optim._core.naming import plain
from functorch_optim.tree import Tree


class Parameter(NamedTuple):
    """A parameter, as rules see it.

    Attributes:
        path: its name: the first of them, for a module.
        paths: all of its names: those of all places where it is tied, with and without the prefixes of wrappers.
        tensor: the parameter.
        owners: for each place, the modules that it is in, from the outermost to its own; empty in a tree.
    """

    path: str
    paths: tuple[str, ...]
    tensor: Tensor
    owners: tuple[tuple[nn.Module, ...], ...]

    @property
    def trains(self) -> bool:
        """Whether a module trains it."""
        return not self.owners or self.tensor.requires_grad


class Parameters(NamedTuple):
    """The parameters of a module or tree.

    Attributes:
        listed: all of them, those that do not require grad too.
        build: makes a tree like the parameters of a value for each.
        of_module: whether they are those of a module.
    """

    listed: list[Parameter]
    build: Callable[[Sequence[Any]], Tree]
    of_module: bool


def parameters_of(module_or_tree: Any, name: str) -> Parameters:
    """List the parameters of a module or tree; `name` is the function that asks."""
    if isinstance(module_or_tree, nn.Module):
        return _of_module(module_or_tree)
    leaves, structure = tree.flatten(module_or_tree)
    paths = tree.paths(module_or_tree)
    if len(leaves) == 1 and leaves[0] is module_or_tree and not isinstance(module_or_tree, Tensor):
        raise TypeError(
            f"{name} needs a module or a tree of tensors, got a {type(module_or_tree).__name__}; write {name}(model, "
            f"...), or {name}(fo.params_of(model), ...)"
        )
    tied: dict[int, list[str]] = {}
    for i, leaf in enumerate(leaves):
        if leaf is not None:
            check_is_param(leaf, i, paths.__getitem__)
            tied.setdefault(id(leaf), []).append(paths[i])
    places = [i for i, leaf in enumerate(leaves) if leaf is not None]
    listed = [Parameter(paths[i], tuple(tied[id(leaves[i])]), leaves[i], ()) for i in places]

    def build(values: Sequence[Any]) -> Tree:
        filled: list[Any] = [None] * len(leaves)
        for i, value in zip(places, values, strict=True):
            filled[i] = value
        return tree.unflatten(structure, filled)

    return Parameters(listed, build, False)


def _of_module(module: nn.Module) -> Parameters:
    modules = dict(module.named_modules(remove_duplicate=False))
    tied: dict[Tensor, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        tied.setdefault(p, []).append(name)

    def owners(name: str) -> tuple[nn.Module, ...]:
        parts = name.split(".")[:-1]
        return tuple([modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)])

    listed = [
        Parameter(names[0], tuple(dict.fromkeys([*names, *map(plain, names)])), p, tuple(map(owners, names)))
        for p, names in tied.items()
    ]
    return Parameters(listed, lambda values: dict(zip([p.path for p in listed], values, strict=True)), True)
