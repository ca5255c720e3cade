"""The notebooks are short, and were executed just before they were committed; `.ci/run` executes them again."""

import copy
import json
import pathlib
import re

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SITE = pathlib.Path(__file__).parents[2] / "mkdocs.yml"
LINES = 150
MACHINE = re.compile(r"/home/|/root/|/tmp/|/Users/|[A-Z]:\\\\|site-packages|ipykernel_")


def faults(notebook):
    """Say what keeps a notebook from being committed; `jupyter execute --inplace` mends most of it."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    lines = sum(len("".join(cell["source"]).splitlines()) for cell in notebook["cells"])  # the blank ones too
    if lines >= LINES:
        yield f"it has {lines} lines of code and text"
    if not "".join(notebook["cells"][0]["source"]).startswith("# "):
        yield "it does not begin with a title"
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        yield "it was not executed from top to bottom"
    if not any("image/png" in output.get("data", {}) for output in outputs):
        yield "it shows no picture"
    if not any(output.get("name") == "stdout" for output in outputs):
        yield "it prints no result"
    if any(output["output_type"] == "error" for output in outputs):
        yield "a cell raised an error"
    if any(output.get("name") == "stderr" for output in outputs):
        yield "a cell printed a warning"
    if MACHINE.search(json.dumps(notebook)):
        yield "it has the path of a machine"
    metadata = notebook["metadata"]
    if metadata["kernelspec"]["name"] != "python3" or metadata.keys() - {"kernelspec", "language_info"}:
        yield "it has metadata besides the kernel python3 and the language"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_its_results(path):
    assert list(faults(json.loads(path.read_text()))) == []


def test_notebooks_are_numbered_and_on_the_site():
    assert [int(path.name[:2]) for path in NOTEBOOKS] == list(range(1, len(NOTEBOOKS) + 1))
    shown = re.findall(r"notebooks/(\w+)\.md", SITE.read_text())
    assert shown == [path.stem for path in NOTEBOOKS]
    assert NOTEBOOKS


PRINTED = {"output_type": "stream", "name": "stdout", "text": ["1.0\n"]}
DRAWN = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}, "metadata": {}}
GOOD = {
    "cells": [
        {"cell_type": "markdown", "source": ["# A title"]},
        {"cell_type": "code", "execution_count": 1, "source": ["print(1.0)"], "outputs": [PRINTED]},
        {"cell_type": "code", "execution_count": 2, "source": ["axes.plot(x)\n", "axes.grid()"], "outputs": [DRAWN]},
    ],
    "metadata": {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}},
}


def test_a_good_notebook_has_no_faults():
    assert list(faults(GOOD)) == []


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda cells, metadata: cells[1].update(source=["\n"] * LINES), "lines of code and text"),
        (lambda cells, metadata: cells[0].update(source=[" A title"]), "a title"),
        (lambda cells, metadata: cells[2].update(execution_count=None), "not executed"),
        (lambda cells, metadata: cells[2].update(outputs=[]), "no picture"),
        (lambda cells, metadata: cells[1].update(outputs=[]), "prints no result"),
        (lambda cells, metadata: cells[2]["outputs"].append({"output_type": "error"}), "raised an error"),
        (lambda cells, metadata: cells[2]["outputs"].append({**PRINTED, "name": "stderr"}), "a warning"),
        (lambda cells, metadata: cells[1]["outputs"].append({**PRINTED, "text": ["/home/me/x.py:3"]}), "a machine"),
        (lambda cells, metadata: metadata.update(widgets={}), "metadata"),
        (lambda cells, metadata: metadata["kernelspec"].update(name="my-environment"), "metadata"),
    ],
)
def test_faults_are_found(damage, fault):
    notebook = copy.deepcopy(GOOD)
    damage(notebook["cells"], notebook["metadata"])
    assert [re.search(fault, found) is not None for found in faults(notebook)] == [True]
