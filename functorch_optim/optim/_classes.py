"""The classes of torch.optim, each with the step of a transformation of this library.

They are torch.optim's own classes in all but the step: constructors, param groups, defaults, hooks, errors, and the
care for older state dicts are inherited. The numbers are the same, `state[p]` has the same keys, and state dicts go
both ways.

They differ where float16 and bfloat16 are computed in float32 and rounded once, and in that an error while updates
are computed leaves parameters and states as they were. The options `foreach`, `fused` and `capturable` are accepted
as torch.optim accepts them, and change no number. SGD, Adam, AdamW and Adagrad run torch's own fused kernels, also
where `fused` and `foreach` are None; others compile one when `fused` is True. All take `differentiable=True`, see
`fo.Optimizer`, and their derivatives are right, by tensors as hyperparameters too.
"""

from typing import Any

import torch
from torch import Tensor

from functorch_optim._core.hyperparameters import is_zero
from functorch_optim._core.transformation import GradientTransformation
from functorch_optim.optim._torch_like import TorchLike, also
from functorch_optim.optimizers.adadelta import adadelta
from functorch_optim.optimizers.adafactor import adafactor
from functorch_optim.optimizers.adagrad import adagrad
from functorch_optim.optimizers.adam import adam, sparse_adam
from functorch_optim.optimizers.adamax import adamax
from functorch_optim.optimizers.asgd import asgd
from functorch_optim.optimizers.muon import muon
from functorch_optim.optimizers.nadam import nadam
from functorch_optim.optimizers.radam import radam
from functorch_optim.optimizers.rmsprop import rmsprop
from functorch_optim.optimizers.rprop import rprop
from functorch_optim.optimizers.sgd import sgd


def _sgd(
    lr: Any, momentum: Any, dampening: Any, weight_decay: Any, nesterov: bool, *, maximize: bool
) -> GradientTransformation:
    # torch.optim asks its constructor's arguments alone to fit together: a group may switch momentum off.
    return sgd(lr, momentum, dampening, weight_decay, nesterov and not is_zero(momentum), maximize=maximize)


class SGD(TorchLike, torch.optim.SGD):
    """Train with `fo.sgd`; all arguments are those of torch.optim.SGD.

    Takes sparse gradients. Momentum buffers are dense then, where torch.optim's are sparse; the numbers are the same.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fo.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> opt.state[model.bias]
        {'momentum_buffer': tensor([1.])}
    """

    _transformation = staticmethod(_sgd)
    _count = None
    _sparse_error = None


class Adam(TorchLike, torch.optim.Adam):
    """Train with `fo.adam`; all arguments are those of torch.optim.Adam.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fo.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> sorted(opt.state[model.bias])
        ['exp_avg', 'exp_avg_sq', 'max_exp_avg_sq', 'step']
    """

    _transformation = staticmethod(adam)
    _sparse_error = "Adam does not support sparse gradients, please consider SparseAdam instead"


class AdamW(Adam, torch.optim.AdamW):
    """Train with `fo.adam` and its decoupled weight decay; all arguments are those of torch.optim.AdamW.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.AdamW([p], lr=0.1, weight_decay=0.5)
        >>> p.grad = torch.zeros(1)
        >>> opt.step()
        >>> p.data
        tensor([0.9500])
    """


class NAdam(TorchLike, torch.optim.NAdam):
    """Train with `fo.nadam`; all arguments are those of torch.optim.NAdam, and `fused`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.NAdam([p], lr=0.1)
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> sorted(opt.state[p])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    __init__ = also(torch.optim.NAdam.__init__, fused=None)
    _transformation = staticmethod(nadam)


class RAdam(TorchLike, torch.optim.RAdam):
    """Train with `fo.radam`; all arguments are those of torch.optim.RAdam, and `fused`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.RAdam([p], lr=0.1)
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> p.data
        tensor([0.9000])
    """

    __init__ = also(torch.optim.RAdam.__init__, fused=None)
    _transformation = staticmethod(radam)


class Adamax(TorchLike, torch.optim.Adamax):
    """Train with `fo.adamax`; all arguments are those of torch.optim.Adamax, and `fused`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.Adamax([p], lr=0.1)
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> p.data
        tensor([0.9000])
    """

    __init__ = also(torch.optim.Adamax.__init__, fused=None)
    _transformation = staticmethod(adamax)


class Adagrad(TorchLike, torch.optim.Adagrad):
    """Train with `fo.adagrad`; all arguments are those of torch.optim.Adagrad.

    Takes sparse gradients. The state is there from the beginning, as torch.optim has it.

    Example:
        >>> import functorch_optim as fo, torch
        >>> embedding = torch.nn.Embedding(4, 2, sparse=True)
        >>> opt = fo.optim.Adagrad(embedding.parameters(), lr=0.1)
        >>> embedding(torch.tensor([1])).sum().backward()
        >>> opt.step()
        >>> opt.state[embedding.weight]["sum"][:, 0]
        tensor([0., 1., 0., 0.])
    """

    _transformation = staticmethod(adagrad)
    _sparse_error = None


class Adadelta(TorchLike, torch.optim.Adadelta):
    """Train with `fo.adadelta`; all arguments are those of torch.optim.Adadelta, and `fused`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.Adadelta([p])
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> sorted(opt.state[p])
        ['acc_delta', 'square_avg', 'step']
    """

    __init__ = also(torch.optim.Adadelta.__init__, fused=None)
    _transformation = staticmethod(adadelta)


class RMSprop(TorchLike, torch.optim.RMSprop):
    """Train with `fo.rmsprop`; all arguments are those of torch.optim.RMSprop, and `fused`.

    With `centered=True` torch.optim gives NaN where rounding makes a variance negative; this does not.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.RMSprop([p], lr=0.1, centered=True, momentum=0.9)
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> sorted(opt.state[p])
        ['grad_avg', 'momentum_buffer', 'square_avg', 'step']
    """

    __init__ = also(torch.optim.RMSprop.__init__, fused=None)
    _transformation = staticmethod(rmsprop)


class Rprop(TorchLike, torch.optim.Rprop):
    """Train with `fo.rprop`; all arguments are those of torch.optim.Rprop, and `fused`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.Rprop([p], lr=0.1)
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> p.data
        tensor([0.9000])
    """

    __init__ = also(torch.optim.Rprop.__init__, fused=None)
    _transformation = staticmethod(rprop)


class ASGD(TorchLike, torch.optim.ASGD):
    """Train with `fo.asgd`; all arguments are those of torch.optim.ASGD, and `fused`.

    The averaged parameters are `state[p]["ax"]`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> p = torch.nn.Parameter(torch.ones(1))
        >>> opt = fo.optim.ASGD([p], lr=0.5, t0=0)
        >>> p.grad = torch.ones(1)
        >>> opt.step()
        >>> opt.state[p]["ax"]
        tensor([0.4999])
    """

    __init__ = also(torch.optim.ASGD.__init__, fused=None)
    _transformation = staticmethod(asgd)
    _rounds = True  # torch.optim computes eta and mu in the default dtype, even when a loaded state has them in another


class Adafactor(TorchLike, torch.optim.Adafactor):
    """Train with `fo.adafactor`; all arguments are those of torch.optim.Adafactor, and `differentiable`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> model = torch.nn.Linear(2, 3)
        >>> opt = fo.optim.Adafactor(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> sorted(opt.state[model.weight]), sorted(opt.state[model.bias])
        (['col_var', 'row_var', 'step'], ['step', 'variance'])
    """

    __init__ = also(torch.optim.Adafactor.__init__, differentiable=False)
    _transformation = staticmethod(adafactor)

    def _check_gradient(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if p.is_complex():
            raise RuntimeError("Adafactor does not support complex parameters")
        super()._check_gradient(p, grad, group)


class SparseAdam(TorchLike, torch.optim.SparseAdam):
    """Train with `fo.sparse_adam`; all arguments are those of torch.optim.SparseAdam, and `differentiable`.

    Example:
        >>> import functorch_optim as fo, torch
        >>> embedding = torch.nn.Embedding(4, 2, sparse=True)
        >>> opt = fo.optim.SparseAdam(embedding.parameters(), lr=0.1)
        >>> embedding(torch.tensor([1])).sum().backward()
        >>> opt.step()
        >>> opt.state[embedding.weight]["step"]
        1
    """

    __init__ = also(torch.optim.SparseAdam.__init__, differentiable=False)
    _transformation = staticmethod(sparse_adam)
    _count = int

    def _check_gradient(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not grad.is_sparse:
            raise RuntimeError("SparseAdam does not support dense gradients, please consider Adam instead")


if hasattr(torch.optim, "Muon"):  # since torch 2.9

    class Muon(TorchLike, torch.optim.Muon):
        """Train with `fo.muon`; all arguments are those of torch.optim.Muon, and `differentiable`. For matrices.

        Example:
            >>> import functorch_optim as fo, torch
            >>> model = torch.nn.Linear(2, 3, bias=False)
            >>> opt = fo.optim.Muon(model.parameters())
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> opt.step()
            >>> list(opt.state[model.weight])
            ['momentum_buffer']
        """

        __init__ = also(torch.optim.Muon.__init__, differentiable=False)
        _transformation = staticmethod(muon)
        _count = None

        def _check_gradient(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
            if p.is_complex():
                raise RuntimeError("Muon does not support complex parameters")
            super()._check_gradient(p, grad, group)
            if group["ns_steps"] >= 100:
                raise ValueError("Number of steps must be less than 100 for computational efficiency")
            if p.ndim != 2:
                raise ValueError("Param gradient must be a 2D matrix")
            if len(group["ns_coefficients"]) != 3:
                raise ValueError("Coefficients must be a tuple of exactly 3 values")
