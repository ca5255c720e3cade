"""The documents name everything that is public, and their code runs."""

import pathlib
import re

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import functorch_optim as fo
from functorch_optim import testing

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_in_documents_runs(path):
    for example in Sybil(parsers=[PythonCodeBlockParser()]).parse(path):
        example.evaluate()  # each block builds on those before it


def test_there_is_code_in_readme():
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(ROOT / "README.md")
    assert len(list(document)) >= 3


def test_the_reference_has_every_public_name():
    documented = set(re.findall(r"`([a-zA-Z_]+)", REFERENCE))
    public = set(fo.__all__) | {"tree"} | set(fo.schedules.__all__) | set(fo.optim.__all__) | set(fo.meta.__all__)
    assert (public | set(testing.__all__)) - documented == set()


def test_every_public_name_has_an_example():
    for name in fo.__all__:
        thing = getattr(fo, name)
        if callable(thing) and name not in ("EmptyState", "StepState", "ReduceOnPlateauState", "LBFGSState"):
            assert ">>>" in thing.__doc__, name


def test_schedules_and_classes_have_examples():
    for module in (fo.schedules, fo.optim, fo.meta, testing):
        for name in module.__all__:
            thing = getattr(module, name)
            if getattr(thing, "__module__", "").startswith("functorch_optim") and not isinstance(thing, dict):
                assert ">>>" in thing.__doc__, name
