"""Optimizer steps on copies of a module's weights."""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.rule import check_extras, with_loss
from functorch_optim._core.transformation import GradientTransformation, apply_updates, check_transformation
from functorch_optim.meta._exact import exact_derivatives


class inner_loop:  # noqa: N801 - it is used like a function, as torch.no_grad is
    """Adapt copies of a module's weights, its fast weights, and leave the module alone.

        theta_0 = the parameters of the module;    theta_(k+1) = theta_k + update(gradient of loss_k at theta_k)

    A loss that is computed from the last theta has derivatives through all steps: with respect to the parameters of
    the module, to data, to the given `params` and `state`, and to hyperparameters that are tensors. Give the meta
    optimizer the hyperparameters that require grad, next to the parameters.

    `inner(*args, **kwargs)` calls the module with the fast weights, and with copies of its buffers, such as the running
    statistics of BatchNorm. `inner.step(loss)` takes a step. Values, buffers and `.grad` of the module do not change.
    Frozen parameters are used and not updated. Tied parameters stay tied. A parameter without a gradient keeps its
    value.

    Every `inner` has weights of its own, so that several may be open at once. After its `with` it may still be read and
    called, but `step` raises. Its tensors live as long as `inner` and the results computed with it.

    Args:
        module: is called as it is, with its hooks and in its training mode.
        tx: transformation, such as `fo.adam(1e-3)`.
        params: first values of the fast weights, tensors by name, such as those of a former loop. Only the parameters
            named here adapt, even frozen ones; the others are used as they are. None: all that require grad adapt.
        buffers: first values of the buffers, tensors by name; a buffer without one begins with the module's value.
        state: first state of `tx`; None is `tx.init` of the fast weights.
        first_order: whether gradients are constants, so that there are no second derivatives. Derivatives still flow
            through theta + u, and through the arithmetic of `tx` with theta and its hyperparameters. Arguments that
            act through gradients alone have derivative 0 through the steps: the data, and numbers in the loss, such as
            the strength of an augmentation. Gradients that a transformation takes by itself, as `lbfgs` does after its
            first evaluation, are no constants.
        differentiable: False for an adaptation without outer derivatives, for example at test time. Memory does not
            grow with the steps, and neither the parameters of the module nor the hyperparameters get a derivative.

    Attributes:
        params: fast weights by the names of `module.named_parameters()`; a step makes new ones.
        buffers: copies of the buffers, by the names of `module.named_buffers()`; a call makes new ones.
        state: the state of `tx`; a step makes a new one.

    Raises:
        TypeError: `module` is no module, `tx` is no transformation, or an entry of `params` or `buffers` is no tensor.
        ValueError: the module has no parameter or buffer of that name, or there is nothing to adapt.

    Different from higher: there is no copy of the module, and any transformation will do. Buffers are copied before
    every call, so that a module may modify a buffer in place and also compute with it.

    `inner` is for `backward` and `torch.autograd.grad`. Torch refuses it inside of `torch.func.grad` and `torch.vmap`:
    there write the loop as a function, with `tx.update` and `torch.func.functional_call`. Modules that went through
    torch.compile have no second derivatives, unless the backend is "eager": give `first_order=True` for them.

    Source: Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, arXiv:1703.03400;
    Grefenstette et al., Generalized Inner Loop Meta-Learning, arXiv:1910.01727.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> lr = torch.tensor(0.25, requires_grad=True)
        >>> with fo.meta.inner_loop(model, fo.sgd(lr)) as inner:
        ...     inner.step(inner(torch.ones(1)).square().sum())
        ...     outer = inner(torch.ones(1)).square().sum()
        >>> outer.backward()  # of (1 - 2 lr)^2 w^2
        >>> inner.params["weight"].item(), model.weight.item(), model.weight.grad.item(), lr.grad.item()
        (0.5, 1.0, 0.5, -2.0)
    """

    def __init__(
        self,
        module: torch.nn.Module,
        tx: GradientTransformation,
        *,
        params: Mapping[str, Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
        state: Any = None,
        first_order: bool = False,
        differentiable: bool = True,
    ) -> None:
        example = "inner_loop(model, fo.adam(1e-3))"
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"inner_loop needs a torch.nn.Module, got a {type(module).__name__}; write {example}")
        check_transformation(tx, example)
        own_params, own_buffers = dict(module.named_parameters()), dict(module.named_buffers())
        if params is None:
            params = {name: p for name, p in own_params.items() if p.requires_grad}
        buffers = buffers or {}
        _check_named("params", params, own_params)
        _check_named("buffers", buffers, own_buffers)
        if not params:
            raise ValueError(
                "There is nothing to adapt: params is empty, or no parameter of the module requires grad. Name what "
                "adapts: inner_loop(model, tx, params=dict(model.named_parameters())), or call model.requires_grad_()"
            )
        self._module, self._tx, self._places = module, tx, _places(module)
        self._differentiable, self._second_order = differentiable, differentiable and not first_order
        self._ended = False
        self.params = {name: p.requires_grad_() for name, p in self._copied(params).items()}
        self.buffers = self._copied({**own_buffers, **buffers})
        self.state = tx.init(self.params) if state is None else state

    def __enter__(self) -> "inner_loop":  # noqa: PYI034 - typing has Self from Python 3.11 on
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module with the fast weights and with copies of the buffers, which are `inner.buffers` afterwards.

        Args:
            *args: arguments of the module.
            **kwargs: keyword arguments of the module.

        Returns:
            The result of the module.
        """
        tensors = {**self.params, **self._copied(self.buffers)}
        placed = {place: tensors[name] for place, name in self._places.items() if name in tensors}
        # torch's own tie_weights (2.13) does not restore a submodule that has two names.
        with exact_derivatives() if self._second_order else contextlib.nullcontext():
            output = torch.func.functional_call(self._module, placed, args, kwargs, tie_weights=False)
        self.buffers = {name: placed[name] for name in self.buffers}
        return output

    def step(self, loss: Tensor, **extra: Any) -> None:
        """Take a step: make new fast weights and a new state.

        Args:
            loss: 0-dim tensor, computed by `inner(...)` or from `inner.params`. A transformation that declares the
                extra `value` is given it, too.
            **extra: keyword arguments that a transformation in the chain declares. The `value_fn` of `lbfgs` is called
                with a dict of fast weights:
                `lambda params: loss_fn(torch.func.functional_call(model, params, (x,)), y)`.

        Raises:
            RuntimeError: the `with` has ended; grad mode is off; the loss does not depend on the present fast weights,
                or its graph was freed.
            TypeError: the loss is no tensor; an extra is not declared, or is missing.
            ValueError: the loss is not one real number; the state belongs to another transformation.
        """
        self._check(loss)
        grads = self._grads(loss)
        value = loss if self._second_order else loss.detach()
        rules = [link.rule for link in self._tx._links]
        extra = with_loss(rules, extra, value)
        check_extras(rules, extra, "inner.step(loss, ")
        with torch.set_grad_enabled(self._differentiable):
            updates, state = self._tx.update(grads, self.state, self.params, **extra)
            params = apply_updates(self.params, updates)
        self.params = {name: p.requires_grad_() for name, p in params.items()}
        self.state = state

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(self._differentiable):
            return {name: tensor.clone() for name, tensor in tensors.items()}

    def _check(self, loss: Any) -> None:
        if self._ended:
            raise RuntimeError(
                "This inner loop has ended with its `with`: take all steps inside of it, or go on in another one, "
                "inner_loop(model, tx, params=inner.params, buffers=inner.buffers, state=inner.state)"
            )
        if not isinstance(loss, Tensor):
            raise TypeError(f"inner.step needs a loss, a 0-dim tensor, got a {type(loss).__name__}")
        if loss.ndim != 0 or not loss.is_floating_point():
            raise ValueError(
                f"inner.step needs a loss, a real 0-dim tensor, got one of shape {tuple(loss.shape)} and dtype "
                f"{loss.dtype}; take the mean or sum"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "inner.step needs gradients, but grad mode is off: take torch.no_grad() away from around the loop. "
                "Where nobody differentiates the loop, inner_loop(..., differentiable=False) saves the memory"
            )
        if not loss.requires_grad:
            raise RuntimeError(
                "The loss has no graph: it was detached, or computed under torch.no_grad(), or without any parameter; "
                "compute it with inner(x)"
            )

    def _grads(self, loss: Tensor) -> dict[str, Tensor | None]:
        fast = list(self.params.values())
        try:
            # The loss may also be a part of an outer loss.
            grads = torch.autograd.grad(
                loss, fast, retain_graph=self._differentiable, create_graph=self._second_order, allow_unused=True
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise RuntimeError(
                "The graph of the loss has been freed: call neither backward nor step with it before. "
                "inner.step(loss) does what loss.backward() does, for the fast weights"
            ) from error
        if all(grad is None for grad in grads):
            raise RuntimeError(
                "The loss does not depend on the fast weights. It was probably computed with the module itself, or "
                "before the last step: compute it with inner(x), anew for every step"
            )
        return dict(zip(self.params, grads, strict=True))


def _places(module: torch.nn.Module) -> dict[str, str]:
    """Map each place of a parameter or buffer in a module to the first place of the same tensor, which is its name.

    Tied tensors have several places; a submodule that has several names is one.
    """
    places: dict[str, str] = {}
    first: dict[int, str] = {}
    for prefix, submodule in module.named_modules():
        for members in (submodule.named_parameters, submodule.named_buffers):
            for place, tensor in members(prefix, recurse=False, remove_duplicate=False):
                places[place] = first.setdefault(id(tensor), place)
    return places


def _check_named(what: str, given: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    for name, tensor in given.items():
        if name not in own:
            raise ValueError(
                f"{what} has {name!r}, but the module has no such name; it has {', '.join(own) or 'none'}. "
                "Tied tensors go by the first of their names"
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what} has a {type(tensor).__name__} at {name!r}, not a tensor")
