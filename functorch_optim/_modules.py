"""The tensors of a module, as trees to train functionally."""

from collections.abc import Iterator

import torch
from torch import Tensor


def params_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the parameters of a module that are to be trained: a tree of tensors, by name.

    They are new tensors, which do not require grad. So a training loop records no graph, and nothing that is done to
    them in place, by `fo.step_` say, reaches the module. `torch.func.functional_call(module, params, args)` runs the
    module with them; `module.load_state_dict(params, strict=False)` writes them back.

    Args:
        module: any module.

    Returns:
        Dict from the names of `module.named_parameters()` to copies. Parameters that do not require grad are left out:
        they are frozen, and `functional_call` takes them from the module. Tied parameters are there once, under the
        first of their names.

    Raises:
        TypeError: `module` is none.
        ValueError: no parameter requires grad.

    To differentiate through training with respect to the module's own weights, begin with
    `{name: p.clone() for name, p in module.named_parameters()}`, or use `fo.meta.inner_loop`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> params = fo.params_of(model)
        >>> tx = fo.adam(0.1)
        >>> grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, torch.ones(2)).sum())(params)
        >>> params, state = fo.step(tx, grads, tx.init(params), params)
        >>> {name: (tuple(p.shape), p.requires_grad) for name, p in params.items()}
        {'weight': ((1, 2), False), 'bias': ((1,), False)}
    """
    _check(module, "params_of")
    params = _copies((name, p) for name, p in module.named_parameters() if p.requires_grad)
    if not params:
        raise ValueError(
            f"There is nothing to train: no parameter of the {type(module).__name__} requires grad. "
            "Call module.requires_grad_() first"
        )
    return params


def buffers_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the buffers of a module, the running statistics of BatchNorm say: a tree of tensors, by name.

    Modules write to their buffers in place. So a loss is given copies, and returns them:

        def loss_fn(params, buffers, x, y):
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            output = torch.func.functional_call(module, (params, buffers), (x,))
            return loss(output, y), buffers

    `fo.meta.unroll(..., buffers=buffers)` makes the copies itself.

    Args:
        module: any module.

    Returns:
        Dict from the names of `module.named_buffers()` to copies, those that are not saved among them. A module without
        buffers has an empty one.

    Raises:
        TypeError: `module` is none.

    Example:
        >>> import functorch_optim as fo, torch
        >>> sorted(fo.buffers_of(torch.nn.BatchNorm1d(2)))
        ['num_batches_tracked', 'running_mean', 'running_var']
    """
    _check(module, "buffers_of")
    return _copies(module.named_buffers())


def _check(module: object, name: str) -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} needs a torch.nn.Module, got a {type(module).__name__}; write {name}(model)")


def _copies(named: "Iterator[tuple[str, Tensor]]") -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}
