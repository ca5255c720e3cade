"""Natural mistakes of newcomers: the error names the mistake and the right call."""

import pytest
import torch

import functorch_optim as fo

MODEL = torch.nn.Linear(2, 1)
COSINE = fo.schedules.cosine(0.1, 10)
TX = fo.adam(0.1)


def params():
    return fo.params_of(MODEL)


def meta(function):
    p = torch.nn.Parameter(torch.ones(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    return function(p)


MISTAKES = {
    # A transformation is a pair of functions.
    "step": (
        lambda: TX.step(),
        AttributeError,
        r"no attribute 'step'. A transformation has .*fo.Optimizer\(params, tr",
    ),
    "base class": (lambda: fo.optim.Optimizer(MODEL.parameters(), TX), AttributeError, "fo.optim.Optimizer too, takes"),
    "parameters": (lambda: fo.adam(MODEL.parameters()), TypeError, r"adam takes hyperparameters.* = tx.init\(params\)"),
    "parameters and lr": (lambda: fo.adam(MODEL.parameters(), lr=0.1), TypeError, r"As in torch.optim is Optimizer\("),
    "a list": (lambda: fo.adam(list(MODEL.parameters()), 0.1), ValueError, "Invalid betas: 0.1.*adam takes hyperparam"),
    "misspelt": (
        lambda: fo.adam(learning_rate=0.1),
        TypeError,
        "keyword argument 'learning_rate'. Its arguments are lr",
    ),
    "order": (lambda: TX.update(TX.init(params()), params(), params()), ValueError, r"The order is tx.update\(updates"),
    "a pair": (
        lambda: fo.apply_updates(params(), (params(), ())),
        ValueError,
        "returns a pair: updates, state = tx.upd",
    ),
    "gradients": (
        lambda: TX.update((None, None), TX.init(params()), params()),
        ValueError,
        r"dict\(zip\(params, grads",
    ),
    "module to update": (
        lambda: TX.update(params(), TX.init(params()), MODEL),
        TypeError,
        r"Linear.*params_of\(model\)",
    ),
    "no call": (lambda: fo.Optimizer(MODEL.parameters, fo.adam), TypeError, r"the method parameters; call it: param"),
    # Combinations.
    "schedule": (lambda: fo.chain(fo.clip(1.0), COSINE), TypeError, r"not a Grad.*scale_by_learning_rate\(schedule\)"),
    "list of links": (lambda: fo.chain([fo.clip(1.0), TX]), TypeError, r"Unpack a list: chain\(\*transformations\)"),
    "class": (
        lambda: fo.chain(torch.optim.Adam),
        TypeError,
        "Adam is a class of optimizers; .* functions such as adam",
    ),
    "list of parts": (
        lambda: fo.partition([TX], {}),
        TypeError,
        "partition needs a dict, label -> transf.*, got a list",
    ),
    "swapped": (
        lambda: fo.accumulate(2, TX),
        TypeError,
        r"2 is not a GradientTransformation; as in: accumulate\(adamw",
    ),
    # Optimizers.
    "dict": (lambda: fo.Optimizer(params(), fo.adam), TypeError, r"got a dict; .*Optimizer\(params.items\(\)"),
    "module": (
        lambda: fo.Optimizer(MODEL, fo.adam),
        TypeError,
        r"got a Linear.*model.parameters\(\).*named_parameters",
    ),
    "group": (lambda: fo.Optimizer([params()], fo.adam), KeyError, "with the key .params., got one with .*weight"),
    "torch's": (
        lambda: fo.Optimizer([], torch.optim.Adam),
        TypeError,
        "got Adam.* is a class of optimizers; fo.optim.Ad",
    ),
    "defaults": (
        lambda: fo.Optimizer([], {"lr": 0.1}),
        TypeError,
        "base class of optimizers, which takes a dict of def",
    ),
    "first": (lambda: fo.Optimizer(TX, MODEL.parameters()), TypeError, "The parameters come first"),
    "of schedules": (
        lambda: fo.Optimizer([], COSINE),
        TypeError,
        r"A schedule is given as a learning rate, adamw\(sch",
    ),
    "of lists": (lambda: fo.Optimizer([], [TX]), TypeError, r"Unpack a list: chain\(\*transformations\)"),
    "class's lr": (
        lambda: fo.optim.Adam(MODEL.parameters(), COSINE),
        TypeError,
        r"compared with 0.0.*fo.adam, lr=sche",
    ),
    "SGD's lr": (lambda: fo.optim.SGD(MODEL.parameters(), COSINE), TypeError, r"compared with 0.0.*lr_scheduler"),
    # Saving and converting.
    "state_dict": (lambda: fo.state_dict(fo.Optimizer(MODEL.parameters(), TX)), TypeError, r"call its .state_dict\(\)"),
    "load": (lambda: fo.load_state_dict(MODEL, {}), TypeError, r"got a Linear.*call its .load_state_dict\(saved\)"),
    "of tx": (lambda: fo.state_dict(TX), TypeError, r"trees of tensors, got a GradientT.*state = tx.init\(params\)"),
    "of numbers": (lambda: fo.state_dict({"a": 1.0}), TypeError, "trees of tensors, got a float at 'a'"),
    "convert": (lambda: fo.from_torch(torch.optim.Adam), TypeError, "needs a live optimizer, got Adam"),
    # Losses.
    "vector": (lambda: fo.meta.unroll(lambda w, x: w, TX, torch.ones(2), [0]), ValueError, r"loss_fn must .* \(2,\)"),
    "float": (lambda: fo.meta.unroll(lambda w, x: 1.0, TX, torch.ones(2), [0]), TypeError, "loss_fn must.*got a float"),
    # Meta tensors: torch's own message.
    "Adam": (
        lambda: meta(lambda p: fo.optim.Adam([p], fused=True).step()),
        RuntimeError,
        "supported devices.* and meta",
    ),
    "adam": (lambda: meta(lambda p: fo.Optimizer([p], TX, fused=True).step()), RuntimeError, "supported devices.*meta"),
    "step_": (lambda: meta(lambda p: fo.step_(TX, p, TX.init(p), p, fused=True)), RuntimeError, "devices.* and meta"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        call()


def test_what_a_transformation_has_is_found():
    assert not hasattr(TX, "nothing_of_the_sort")
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_sort'$"):
        TX.nothing_of_the_sort  # noqa: B018 - it raises


def test_errors_of_factories_of_users_stay_as_they_are():
    @fo.factory
    def broken(lr):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="^broken$"):
        broken(0.1)
