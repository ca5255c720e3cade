"""Branches and loops that are decided where values are known, and masked where they are not.

Eagerly, and under `torch.func.grad` and `jvp`, the value of a condition is known: one branch runs, and a loop ends
early. Inside of `torch.vmap` a condition has one value for each member of the batch. While torch.compile or make_fx
traces, and on fake tensors, it has no value. In these cases both branches run, a loop runs to its limit, and
`torch.where` picks the results, with the same numbers. Then the branch that is not taken must be finite, and so must
its derivative: 0 * inf is NaN.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from functorch_optim import tree

Carry = TypeVar("Carry")
"""A tensor, or a tuple or NamedTuple of them, nested."""


def is_traced() -> bool:
    """Tell whether tensors have no values: torch.compile or make_fx traces, or tensors are fake."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    is_fake = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    return is_fake or get_proxy_mode() is not None


def is_known(condition: Tensor | bool) -> bool:
    """Tell whether a condition has a value that Python may branch on."""
    if isinstance(condition, bool):
        return True
    if is_traced() or isinstance(condition, FakeTensor):
        return False
    tensor = condition
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return not tensor.is_meta


def is_masked() -> bool:
    """Tell whether some conditions may be unknown here, so that structures must not depend on them."""
    if is_traced():
        return True
    vmap = torch._C._functorch.TransformType.Vmap
    return any(level.key() == vmap for level in torch._C._functorch.get_interpreter_stack() or ())


def known_values(tensor: Tensor) -> Tensor | None:
    """Return the values for all members of all batches; None while a function is traced."""
    if is_traced() or isinstance(tensor, FakeTensor):
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor.detach()


def select(condition: Tensor | bool, chosen: Carry, otherwise: Carry) -> Carry:
    """Return `chosen` where the condition holds.

    Args:
        condition: 0-dim tensor of bool, or a bool.
        chosen: tensor, or tuples of them.
        otherwise: built like `chosen`.

    Example:
        >>> import torch
        >>> select(torch.tensor(True), (torch.ones(1), torch.ones(1)), (torch.zeros(1), torch.zeros(1)))
        (tensor([1.]), tensor([1.]))
    """
    if is_known(condition):
        return chosen if condition else otherwise
    picked: Carry = _where(condition, chosen, otherwise)
    return picked


def _where(condition: Any, chosen: Any, otherwise: Any) -> Any:
    if isinstance(chosen, tuple):
        items = [_where(condition, a, b) for a, b in zip(chosen, otherwise, strict=True)]
        return type(chosen)(*items) if hasattr(chosen, "_fields") else tuple(items)
    return chosen if chosen is otherwise else torch.where(condition, chosen, otherwise)


def cond(
    condition: Tensor | bool, on_true: Callable[[Carry], Carry], on_false: Callable[[Carry], Carry], carry: Carry
) -> Carry:
    """Apply one of two functions: in a rule, to compute something only at the steps where it is due.

    Where the value of the condition is known, one function runs: eagerly, and under `torch.func.grad` and `jvp`. On a
    GPU that waits for the value. Inside of `torch.vmap`, where each member of the batch has its own value, and while
    torch.compile or make_fx traces, both functions run and `torch.where` picks the results, with the same numbers.

    Args:
        condition: 0-dim tensor of bool, or a bool.
        on_true: carry -> result.
        on_false: carry -> result, a tree like that of `on_true`, with tensors of the same shapes and dtypes. Where both
            functions run, the one that is not taken must be finite, and so must its derivative: 0 * inf is NaN.
        carry: argument of the functions: any tree of tensors.

    Returns:
        The result of the function that is taken.

    Raises:
        TypeError: the condition is neither a tensor nor a bool; or both functions run, and a result is no tensor.
        ValueError: the condition has more than one element; or both functions run, and their results differ in
            structure, shape or dtype.

    torch.cond, in contrast, always traces both functions, and refuses those that dynamo cannot trace. The idea is
    `jax.lax.cond`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> fo.cond(torch.tensor(True), torch.neg, torch.exp, torch.tensor(2.0))
        tensor(-2.)
        >>> torch.vmap(lambda x: fo.cond(x > 0, torch.neg, torch.exp, x))(torch.tensor([2.0, 0.0]))
        tensor([-2.,  1.])
    """
    if isinstance(condition, bool):
        return on_true(carry) if condition else on_false(carry)
    if not isinstance(condition, Tensor):
        raise TypeError(
            f"The condition of cond is {condition!r}, a {type(condition).__name__}; give a bool or a 0-dim tensor of "
            "bool, as in cond(step == 0, on_true, on_false, carry)"
        )
    if condition.ndim > 0:
        raise ValueError(
            f"The condition of cond has shape {tuple(condition.shape)}, and one value is needed; to choose for each "
            "element, write torch.where(condition, x, y)"
        )
    if is_known(condition):
        return on_true(carry) if condition else on_false(carry)
    chosen, otherwise = on_true(carry), on_false(carry)
    leaves, structure = tree.flatten(chosen)
    others = tree.flatten_up_to(structure, otherwise, "the result of on_false", chosen, "the result of on_true")
    pairs = list(zip(leaves, others, strict=True))
    for i, (one, other) in enumerate(pairs):
        if one is not other and not _is_alike(one, other):
            raise _unlike(one, other, tree.paths(chosen)[i])
    picked: Carry = tree.unflatten(structure, [_where(condition, one, other) for one, other in pairs])
    return picked


def _is_alike(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return tensors and one.shape == other.shape and one.dtype == other.dtype


def _unlike(one: Any, other: Any, path: str) -> Exception:
    """Make the error of two results that torch.where cannot pick from."""
    where = f" at {path!r}" if path else ""
    for value in (one, other):
        if not isinstance(value, Tensor):
            return TypeError(
                f"cond picks from two results with torch.where here, and one of them has {value!r}, a "
                f"{type(value).__name__},{where} where a tensor is needed; write torch.as_tensor({value!r})"
            )
    return ValueError(
        f"The results of on_true and on_false differ{where}: {tuple(one.shape)} of {one.dtype} and "
        f"{tuple(other.shape)} of {other.dtype}; both functions must return tensors of one shape and dtype"
    )


def while_loop(
    condition: Callable[[Carry], Tensor | bool], body: Callable[[Carry], Carry], carry: Carry, limit: int
) -> Carry:
    """Apply `body` to the carry as long as the condition holds, `limit` times at most.

    Args:
        condition: carry -> 0-dim tensor of bool, or a bool. Once false, it stays false.
        body: carry -> carry, built alike. Where the condition is unknown, it also runs after the condition has become
            false. Its results are then dropped, but their derivatives must be finite.
        carry: tensor, or tuples of them.
        limit: largest number of runs of `body`.

    Example:
        >>> import torch
        >>> halve = lambda x: while_loop(lambda x: x > 1, lambda x: x / 2, x, 10)
        >>> halve(torch.tensor(5.0)), torch.vmap(halve)(torch.tensor([5.0, 8.0]))
        (tensor(0.6250), tensor([0.6250, 1.0000]))
    """
    for _ in range(limit):
        going = condition(carry)
        if not is_known(going):
            carry = _where(going, body(carry), carry)
        elif going:
            carry = body(carry)
        else:
            break
    return carry


def same(carry: Carry) -> Carry:
    """Return the carry: the branch that does nothing."""
    return carry
