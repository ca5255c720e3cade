"""The test kit reports the mistakes of wrong optimizer classes, and passes right ones."""

from functools import partial

import pytest
import torch
from testing_cases import name_of, only

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim.testing import OPTIMIZER_PROPERTIES


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, as one writes it with torch."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.first_lr = lr
        self.all = [p for group in self.param_groups for p in group["params"]]
        self.buffers = {}

    def lr(self, group):
        return group["lr"]

    def buffer(self, p):
        return self.state[p].setdefault("buffer", torch.zeros_like(p))

    def groups(self):
        return self.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.groups():
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, p.grad, group)
        return loss

    def move(self, p, grad, group):
        buffer = self.buffer(p).mul_(group["momentum"]).add_(grad)
        p.sub_(self.lr(group) * buffer)


class Returning(Momentum):
    def step(self, closure=None):
        return super().step(closure) or "done"


class Deaf(Momentum):
    def lr(self, group):
        return self.first_lr


class Restless(Momentum):
    @torch.no_grad()
    def step(self, closure=None):
        for p in self.all:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return super().step(closure)


class Keeping(Momentum):
    def zero_grad(self, set_to_none=True):
        pass


class Ungraded(Momentum):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step()
        return loss


class Forgetful(Momentum):
    def buffer(self, p):
        return self.buffers.setdefault(id(p), torch.zeros_like(p))


class Sharing(Momentum):
    def __deepcopy__(self, memo):
        made = type(self)([p.detach().clone().requires_grad_() for p in self.all], self.first_lr)
        for old, new in zip(self.all, made.all, strict=True):
            memo[id(old)] = new
        return made


class Fixed(Momentum):
    def groups(self):
        return [
            {**self.param_groups[0], "params": [p for p in group["params"] if p in set(self.all)]}
            for group in (self.param_groups)
        ]


class Undriven(Momentum):
    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, lr, momentum)
        for group in self.param_groups:
            group["rate"] = group.pop("lr")

    def lr(self, group):
        return group["rate"]


class Unrecorded(Momentum):
    def __init__(self, params, lr, momentum=0.9, differentiable=False):
        super().__init__(params, lr, momentum)


WRONG_CLASSES = [
    (lambda params, lr, **_: object(), "interface", "it makes a object"),
    (Returning, "interface", "step\\(\\) returns 'done'"),
    (Momentum, "functional_form", "compared with the functional form the parameter at '0' is .*, and should be"),
    (Deaf, "groups", "with another lr in the second group the parameter at '1'"),
    (Deaf, "edits", "after param_groups have got another lr the parameter at '0'"),
    (Undriven, "schedulers", "it raises KeyError: 'lr'"),
    (Restless, "missing_gradients", "a parameter without a gradient is .*, and should be"),
    (Keeping, "zero_grad", "after zero_grad\\(set_to_none=False\\) a gradient is tensor"),
    (Ungraded, "closure", "called with gradients disabled; use torch.enable_grad"),
    (Forgetful, "saving", "after its state was saved and loaded the parameter at '0' is"),
    (Sharing, "deepcopy", "of the copy the parameter at '0' is"),
    (
        lambda params, **numbers: fo.Optimizer(params, lambda lr, momentum: fo.sgd(lr, momentum), **numbers),
        "pickles",
        "pickle",
    ),
    (Fixed, "add_param_group", "after add_param_group the parameter at '1' is"),
    (Unrecorded, "differentiable", "can't optimize a non-leaf Tensor"),
    # Which begins its buffer with a detached gradient.
    (torch.optim.SGD, "differentiable", "the derivative by 'gradients.0.0' is 0.0, .*; is something detached?"),
]


@pytest.mark.parametrize(
    ("make", "name", "message"), WRONG_CLASSES, ids=[f"{name}-{name_of(make)}" for make, name, _ in WRONG_CLASSES]
)
def test_wrong_classes_are_found(make, name, message):
    skip, numbers = only(name, OPTIMIZER_PROPERTIES), {"lr": 0.1, "momentum": 0.9}
    with pytest.raises(testing.PropertyError, match=message) as caught:
        testing.check_optimizer_class(make, numbers, transformation=lambda lr, momentum: fo.sgd(lr), skip=skip)
    assert caught.value.name == name


def test_every_property_can_fail():
    assert {name for _, name, _ in WRONG_CLASSES} == OPTIMIZER_PROPERTIES.keys()


RIGHT_CLASSES = {
    "a class": (Momentum, {"lr": 0.1, "momentum": 0.9}, fo.sgd),
    "the wrapper": (partial(fo.Optimizer, transformation=fo.nadam), {"lr": 0.1, "betas": (0.9, 0.99)}, fo.nadam),
    "ours": (fo.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}, fo.adamw),
    "torch's": (torch.optim.RMSprop, {"lr": 0.1, "alpha": 0.9, "eps": 1e-3}, fo.rmsprop),
}


@pytest.mark.sampled(size=2)
@pytest.mark.parametrize("name", RIGHT_CLASSES)
def test_right_classes_pass(name):
    make, numbers, transformation = RIGHT_CLASSES[name]
    testing.check_optimizer_class(make, numbers, transformation=transformation)


@pytest.mark.sampled(pool="long")
def test_an_optimizer_without_hyperparameters_passes():
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1))
    skip = {"schedulers", "add_param_group"}  # a norm over all parameters is not that of two optimizers
    testing.check_optimizer_class(partial(fo.Optimizer, transformation=tx), transformation=lambda: tx, skip=skip)
