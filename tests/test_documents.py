"""The documents name everything that is public, and nothing that is not."""

import pathlib
import re

import functorch_optim as fo

REFERENCE = (pathlib.Path(__file__).parents[1] / "docs" / "reference.md").read_text()


def test_the_reference_has_every_public_name():
    documented = set(re.findall(r"`([a-zA-Z_]+)", REFERENCE))
    public = set(fo.__all__) | {"tree"} | {name for name in vars(fo.schedules) if is_schedule(name)}
    assert public - documented == set()


def test_every_public_name_has_an_example():
    for name in fo.__all__:
        thing = getattr(fo, name)
        if callable(thing) and name not in ("EmptyState", "StepState"):
            assert ">>>" in thing.__doc__, name


def is_schedule(name):
    thing = getattr(fo.schedules, name)
    return getattr(thing, "__module__", None) == "functorch_optim.schedules" and not name.startswith("_")


def test_schedules_have_examples():
    for name in filter(is_schedule, vars(fo.schedules)):
        assert ">>>" in getattr(fo.schedules, name).__doc__, name
