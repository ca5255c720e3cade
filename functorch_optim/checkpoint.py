"""States as plain containers, to save and to load."""

from collections.abc import Mapping

from torch import Tensor

from functorch_optim import tree
from functorch_optim.tree import Tree


def state_dict(state: Tree) -> dict[str, Tensor]:
    """Flatten a state to a dict of tensors by path, which `torch.load(weights_only=True)` takes.

    Args:
        state: what `init` or `update` returned; any tree of tensors.

    Returns:
        Dict: dotted path -> tensor. The tensors are those of the state, not copies. None is left out.

    Raises:
        ValueError: two tensors have the same path, as under the keys "a.b" and "a" -> "b".

    Example:
        >>> import functorch_optim as fo, torch
        >>> state = fo.trace(0.9).init({"w": torch.zeros(1)})
        >>> fo.state_dict(state)
        {'step': tensor(0), 'momentum_buffer.w': tensor([0.])}
    """
    leaves = tree.flatten(state)[0]
    paths = [path for path, leaf in zip(tree.paths(state), leaves, strict=True) if leaf is not None]
    saved = dict(zip(paths, [leaf for leaf in leaves if leaf is not None], strict=True))
    if len(saved) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"Two tensors of the state have the path {twice!r}; rename the keys that contain dots")
    return saved


def load_state_dict(state: Tree, saved: Mapping[str, Tensor]) -> Tree:
    """Build a state from a saved one.

    Args:
        state: a state of the same transformation for the same parameters, as `init` makes it.
        saved: what `state_dict` returned.

    Returns:
        State built like `state`, with the saved values in its own dtypes and on its own devices.

    Raises:
        ValueError: paths or shapes differ; the message names the first that does.

    Example:
        >>> import functorch_optim as fo, torch
        >>> tx, params = fo.trace(0.9), {"w": torch.ones(1)}
        >>> _, state = tx.update({"w": torch.ones(1)}, tx.init(params))
        >>> fo.load_state_dict(tx.init(params), fo.state_dict(state)).momentum_buffer
        {'w': tensor([1.])}
    """
    leaves, structure = tree.flatten(state)
    paths = tree.paths(state)
    present = state_dict(state)
    for path in (*present, *saved):
        if path not in saved or path not in present:
            has, lacks = ("the state", "the saved one") if path in present else ("the saved state", "this one")
            raise ValueError(
                f"{has} has {path!r}, which {lacks} lacks; it was saved from another transformation or other parameters"
            )
    for path, leaf in present.items():
        if saved[path].shape != leaf.shape:
            raise ValueError(
                f"The saved {path!r} has shape {tuple(saved[path].shape)}, but the state's has {tuple(leaf.shape)}; "
                "it was saved from other parameters"
            )
    loaded = [None if leaf is None else saved[path].to(leaf) for path, leaf in zip(paths, leaves, strict=True)]
    return tree.unflatten(structure, loaded)
