"""The documents name everything that is public, and their code runs."""

import doctest
import pathlib
import re
import sys
import types

import pytest
from sybil import Sybil
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

import functorch_optim as fo
from functorch_optim import testing

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LONG = {"test-your-transformation"}
TREE = [
    *("add", "cast", "flatten", "get", "map", "norm", "paths", "ravel", "scale", "set", "sub", "unflatten", "vdot"),
    *("where", "zeros_like"),
]


class ConsoleBlockParser(PythonCodeBlockParser):
    """Blocks of what is typed at a prompt, and what comes back; messages may be broken into lines."""

    codeblock_parser_class = staticmethod(lambda language, evaluator: CodeBlockParser("pycon", evaluator))


FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PARSERS = [PythonCodeBlockParser(), ConsoleBlockParser(doctest_optionflags=FLAGS)]


def blocks(path):
    return list(Sybil(parsers=PARSERS).parse(path))


class Main(types.ModuleType):
    """The main module of a program whose names these are."""

    def __init__(self, name, names):
        super().__init__(name)
        self.names = names

    def __getattr__(self, name):
        try:
            return self.names[name]
        except KeyError:
            raise AttributeError(name) from None


def public_names():
    """Whatever is public and ours, as it is called after `fo`."""
    modules = {
        "meta": fo.meta.__all__,
        "optim": fo.optim.__all__,
        "projections": fo.projections.__all__,
        "schedules": fo.schedules.__all__,
        "testing": testing.__all__,
        "tree": TREE,
    }
    names = [f"{module}.{name}" for module, names in modules.items() for name in names]
    torchs = {"optim.Optimizer", "optim.lr_scheduler", "optim.swa_utils", "optim.swap_in_optimizer_params_and_state"}
    return sorted({*fo.__all__, *names} - torchs)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.sampled(pool="long") if path.stem in LONG else ()) for path in DOCUMENTS],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_the_code_in_documents_runs(path, monkeypatch):
    examples = blocks(path)
    if examples:  # what is defined in a document can be pickled, as it could be in a program
        monkeypatch.setitem(sys.modules, "__main__", Main("__main__", examples[0].namespace))
    for example in examples:
        example.evaluate()  # each block builds on those before it


@pytest.mark.parametrize(("name", "count"), [("README.md", 3), ("docs/tutorial.md", 8), ("docs/errors.md", 12)])
def test_there_is_code_in_documents(name, count):
    assert len(blocks(ROOT / name)) >= count


def test_a_wrong_message_in_a_document_is_noticed(tmp_path):
    document = tmp_path / "document.md"
    document.write_text(
        "```pycon\n>>> raise ValueError('one')\nTraceback (most recent call last):\nValueError: two\n```\n"
    )
    with pytest.raises(SybilFailure, match="one"):
        blocks(document)[0].evaluate()


def test_the_citation_has_the_version():
    [version] = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert version == fo.__version__


@pytest.mark.parametrize(
    ("term", "page"),
    [
        ("EMA", "averaging"),
        ("Muon", "muon-and-adamw"),
        ("Lookahead", "averaging"),
        ("gradients", "clipping-and-accumulation"),
        ("learning rate finder", "learning-rate-finder"),
        ("gradient accumulation", "clipping-and-accumulation"),
        ("non-finite", "clipping-and-accumulation"),
        ("SAM", "sharpness-and-other-wrappers"),
        ("configuration file", "configuration-files"),
        ("no weight decay on bias", "labels"),
        ("layer-wise learning rate decay", "labels"),
        ("freeze", "labels"),
        ("resume", "saving-and-loading"),
        ("Learning rate", "schedules"),
        ("warmup", "schedules"),
        ("plateau", "schedules"),
        ("vmap", "ensembles-and-sweeps"),
        ("hyperparameter search", "ensembles-and-sweeps"),
        ("per-layer learning rate", "param-groups"),
        ("param groups", "param-groups"),
        ("mixed precision", "mixed-precision"),
        ("Gradient clipping", "clipping-and-accumulation"),
        ("gradient norm", "monitoring"),
        ("Log the learning rate", "hyperparameters"),
        ("change the learning rate", "hyperparameters"),
    ],
)
def test_a_term_that_readers_search_for_is_in_the_title_of_its_page(term, page):
    title = (ROOT / "docs" / "how-to" / f"{page}.md").read_text().partition("\n")[0]
    assert term in title  # the site's search ranks titles above text


def test_the_overview_has_every_public_name():
    overview = (ROOT / "docs" / "reference.md").read_text()
    assert set(public_names()) - set(re.findall(r"`fo\.([\w.]+)", overview)) == set()


def test_the_reference_has_every_public_name_once():
    pages = "\n".join([page.read_text() for page in ROOT.glob("docs/reference/*.md")])
    assert sorted(re.findall(r"^::: functorch_optim\.([\w.]+)$", pages, flags=re.MULTILINE)) == public_names()


def test_every_public_name_has_an_example():
    for name in fo.__all__:
        thing = getattr(fo, name)
        if callable(thing) and name not in ("EmptyState", "StepState", "ReduceOnPlateauState", "LBFGSState"):
            assert ">>>" in thing.__doc__, name
    for name in TREE:
        assert ">>>" in getattr(fo.tree, name).__doc__, name


def test_schedules_and_classes_have_examples():
    for module in (fo.schedules, fo.optim, fo.meta, testing):
        for name in module.__all__:
            thing = getattr(module, name)
            if getattr(thing, "__module__", "").startswith("functorch_optim") and not isinstance(thing, dict):
                assert ">>>" in thing.__doc__, name
