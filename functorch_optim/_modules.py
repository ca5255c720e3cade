"""The tensors of a module, as trees to train functionally."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def params_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy the parameters of a module that are to be trained: a tree of tensors, by name.

    They are new tensors, which do not require grad. So a training loop records no graph, and in-place changes of the
    copies, such as those of `fo.step_`, do not reach the module. `torch.func.functional_call(module, params, args)`
    runs the module with them; `module.load_state_dict(params, strict=False)` writes them back.

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
    """Copy the buffers of a module, such as the running statistics of BatchNorm: a tree of tensors, by name.

    Modules write to their buffers in place. So a loss is given copies, and returns them:

        def loss_fn(params, buffers, x, y):
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            output = torch.func.functional_call(module, (params, buffers), (x,))
            return loss(output, y), buffers

    `fo.meta.unroll(..., buffers=buffers)` makes the copies itself.

    Args:
        module: any module.

    Returns:
        Dict from the names of `module.named_buffers()` to copies, including buffers that are not saved. It is empty for
        a module without buffers.

    Raises:
        TypeError: `module` is none.

    Example:
        >>> import functorch_optim as fo, torch
        >>> sorted(fo.buffers_of(torch.nn.BatchNorm1d(2)))
        ['num_batches_tracked', 'running_mean', 'running_var']
    """
    _check(module, "buffers_of")
    return _copies(module.named_buffers())


@torch.no_grad()
def update_bn(
    loader: Iterable[Any],
    model: torch.nn.Module,
    device: torch.device | str | None = None,
    *,
    params: Mapping[str, Tensor] | None = None,
) -> None:
    """Compute the running statistics of all BatchNorm layers anew, by one pass over the data.

    An average of parameters has activations of its own, so the statistics that training has left do not fit it.

    Args:
        loader: of batches; of a tuple or list the first entry is the input.
        model: module, whose BatchNorm buffers are written to. All else, modes too, is as before, errors or not.
        device: where inputs are moved to.
        params: parameters by name to run the model with in the place of its own, as `fo.eval_params` returns them.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is no batch. The statistics are the old ones then, and after any other error.

    As `torch.optim.swa_utils.update_bn`: statistics are means over all batches. Submodules that were in eval mode are
    there again afterwards, which torch puts into the mode of the model.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.BatchNorm1d(1)
        >>> fo.update_bn([torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])], model)
        >>> model.running_mean
        tensor([4.])
    """
    _check(model, "update_bn", "loader, ")
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    before = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    run = model if params is None else functools.partial(_called, model, params)
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
        batches = 0
        for batch in loader:
            given = batch[0] if isinstance(batch, list | tuple) else batch
            run(given if device is None else given.to(device))
            batches += 1
        if not batches:
            raise ValueError(
                "update_bn got no batch; give a loader that has some, and a fresh one if it is a generator"
            )
    except BaseException:
        for buffer, old in before:
            buffer.copy_(old)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


def _called(model: torch.nn.Module, params: Mapping[str, Tensor], given: Any) -> Any:
    return torch.func.functional_call(model, dict(params), (given,))


def _check(module: object, name: str, before: str = "") -> None:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} needs a torch.nn.Module, got a {type(module).__name__}; write {name}({before}model)")


def _copies(named: "Iterator[tuple[str, Tensor]]") -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}
