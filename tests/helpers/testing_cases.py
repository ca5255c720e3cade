"""Helpers that tests of the test kit share."""

from functorch_optim.testing import PROPERTIES


def name_of(make):
    """Name what makes a transformation or an optimizer."""
    return getattr(make, "__name__", None) or make.func.__name__


def only(name, properties=PROPERTIES):
    """Name the properties to skip, so that this one is left."""
    return properties.keys() - {name}
