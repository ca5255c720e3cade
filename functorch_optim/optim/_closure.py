"""The closure of a step as functions of the parameters, for transformations that evaluate the loss again."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

from functorch_optim import tree
from functorch_optim._core.checks import check_loss
from functorch_optim.tree import Tree


def check_closure(closure: Any) -> None:
    """Raise unless a closure is a function.

    Raises:
        TypeError: it is none.
    """
    if not callable(closure):
        raise TypeError(
            f"step takes a closure, a function that evaluates the model, calls backward and returns the loss; got a "
            f"{type(closure).__name__}. After loss.backward() write opt.step(); a loss that the transformation needs "
            "is opt.step(value=loss)"
        )


class Closure:
    """Evaluates a closure with other parameters, and puts everything back: parameters, gradients, modules' buffers.

    Args:
        closure: clears gradients, evaluates the model, calls backward, and returns the loss.
        params: of the tree that a transformation sees, in the order of its leaves.
        everything: all parameters of the optimizer, whose gradients the closure writes.
    """

    def __init__(self, closure: Callable[[], Any], params: Sequence[Tensor], everything: Sequence[Tensor]) -> None:
        self.closure, self.params, self.everything = closure, params, everything

    def value(self, params: Tree) -> Tensor:
        """Return the loss; it has first derivatives by the parameters, those that the closure's backward finds."""
        leaves = tree.flatten(params)[0]
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        apply: Any = _Loss.apply
        loss: Tensor = apply(self, places, len(leaves), *[leaves[i] for i in places])[0]
        return loss

    def grads(self, params: Tree) -> Tree:
        """Return the gradients that the closure's backward finds; None where it finds none."""
        leaves, structure = tree.flatten(params)
        return tree.unflatten(structure, self.evaluate(leaves)[1])

    @torch.no_grad()
    def evaluate(self, leaves: Sequence[Any]) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss and the gradients at other parameters.

        Args:
            leaves: for each parameter a tensor; anything else leaves it where it is.
        """
        pairs = [(p, new) for p, new in zip(self.params, leaves, strict=True) if isinstance(new, Tensor)]
        before, grads = [p.clone() for p, _ in pairs], [p.grad for p in self.everything]
        try:
            for p, new in pairs:
                p.copy_(new)
            for p in self.everything:
                p.grad = None  # the closure may set it to zero, and it is still needed
            with _buffers_put_back(), torch.enable_grad():
                loss = self.closure()
            check_loss("The closure must return", loss)
            return loss.detach(), [p.grad for p in self.params]
        finally:
            for (p, _), old in zip(pairs, before, strict=True):
                p.copy_(old)
            for p, grad in zip(self.everything, grads, strict=True):
                p.grad = grad


@contextlib.contextmanager
def _buffers_put_back() -> Iterator[None]:
    """Let the buffers of all modules that are called here, the statistics of BatchNorm say, be as they were.

    Code that torch.compile traces is not looked into: a module that it has wrapped is noted when it is called.
    """
    seen: set[Module] = set()
    before: list[tuple[Module, str, Tensor, Tensor]] = []
    here = threading.get_ident()

    def note(module: Module, args: Any) -> None:
        if torch.compiler.is_compiling() or module in seen or threading.get_ident() != here:
            return
        for inner in set(module.modules()) - seen:
            seen.add(inner)
            for name, buffer in inner._buffers.items():
                if buffer is not None:
                    before.append((inner, name, buffer, buffer.detach().clone()))

    handle = register_module_forward_pre_hook(note)
    try:
        with warnings.catch_warnings():  # the hook may be called twice
            warnings.filterwarnings("ignore", message="Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        handle.remove()
        for module, name, buffer, old in before:
            buffer.copy_(old)
            module._buffers[name] = buffer


class _Loss(torch.autograd.Function):
    """The loss of a closure, as a function of parameters."""

    @staticmethod
    def forward(closure: Closure, places: Sequence[int], count: int, *tensors: Tensor) -> Any:
        leaves: list[Any] = [None] * count
        for i, tensor in zip(places, tensors, strict=True):
            leaves[i] = tensor
        loss, grads = closure.evaluate(leaves)
        found = [grads[i] for i in places]
        return loss, *[torch.zeros_like(p) if g is None else g for p, g in zip(tensors, found, strict=True)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.save_for_backward(*inputs[3:], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        apply: Any = _Products.apply
        return None, None, None, *apply(grad_outputs[0], *ctx.saved_tensors)


class _Products(torch.autograd.Function):
    """Gradients, as functions of the parameters, times a number; their own derivative nobody knows."""

    @staticmethod
    def forward(number: Tensor, *params_and_grads: Tensor) -> Any:
        return tuple([number * grad for grad in params_and_grads[len(params_and_grads) // 2 :]])

    @staticmethod
    def setup_context(*_: Any) -> None:
        pass

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError(
            "A closure has first derivatives only, and the transformation asks for second ones. Give the loss as a "
            "function of the parameters: opt.step(closure, value_fn=loss)"
        )
