"""The documents name everything that is public, and their code runs."""

import pathlib
import re

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import functorch_optim as fo

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_in_documents_runs(path):
    for example in Sybil(parsers=[PythonCodeBlockParser()]).parse(path):
        example.evaluate()  # each block builds on those before it


def test_there_is_code_in_readme():
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / "README.md")
    assert len(list(document)) >= 8


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
