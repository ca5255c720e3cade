"""README's table says what `benchmarks/features.py` finds, of every library that is installed here."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks.features import LIBRARIES, QUESTIONS, ask, installed

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
CELLS = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("|")]
NAMES = list(LIBRARIES)


def test_the_table_has_all_questions_and_all_libraries():
    header, _, *rows = CELLS
    assert [title.split()[0] for title in header[1:]] == NAMES
    assert [row[0] for row in rows] == list(QUESTIONS)


@pytest.mark.sampled(size=8)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_cell_is_what_the_library_does(question, name):
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    [row] = [row for row in CELLS if row[0] == question]
    assert ask(question, name)[0] == row[1 + NAMES.index(name)]
