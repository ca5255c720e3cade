"""The error of a wrong number names the argument that it was given for."""

import inspect
import re

import pytest

import functorch_optim as fo


def cases():
    """Yield the factories, and those of their arguments that are hyperparameters or pairs of them."""
    for name in fo.__all__:
        factory = getattr(fo, name)
        if not inspect.isfunction(factory):
            continue
        for argument, parameter in inspect.signature(factory).parameters.items():
            default = parameter.default
            if "Hyperparameter" not in str(parameter.annotation) or argument == "hyperparameters":
                continue
            if isinstance(default, tuple):
                for i in range(len(default)):
                    yield name, argument, (*default[:i], float("nan"), *default[i + 1 :])
            else:
                yield name, argument, float("nan")


@pytest.mark.parametrize(
    ("name", "argument", "value"), [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in cases()]
)
def test_the_error_of_a_number_that_is_nan_names_its_argument(name, argument, value):
    factory = getattr(fo, name)
    needed = {
        other: fo.sgd(0.1) if other == "tx" else 0.5
        for other, parameter in inspect.signature(factory).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises(ValueError, match="Invalid|lr_max") as raised:
        factory(**{**needed, argument: value})
    said = str(raised.value).replace("learning rate", "lr").replace("beta parameter", "betas").replace("epsilon", "eps")
    assert re.search(rf"\b{argument}\d?\b", said), said
