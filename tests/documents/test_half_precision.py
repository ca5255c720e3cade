"""The picture of half precision: trainings in bfloat16 end where float32 does with three wrappers, and not without."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import half_precision
from benchmarks.zoo.tasks import all_tasks

ROOT = pathlib.Path(__file__).parents[2]
NAMES = list(half_precision.trainings(1.0))


def test_digits_in_bfloat16_beside_float32():
    task = all_tasks()["digits_mlp"]
    how = half_precision.trainings(half_precision.RATES["digits_mlp"])
    found = {name: half_precision.losses(task, *how[name], steps=200, points=1)[0] for name in NAMES}
    single = found.pop("float32")
    kept = {name for name, loss in found.items() if loss == pytest.approx(single, abs=0.005)}
    lost = {name for name, loss in found.items() if loss > single + 0.05}
    assert kept == set(NAMES[3:])
    assert lost == {"bfloat16", "bfloat16, cast_states"}


def test_the_picture_has_a_panel_for_each_task(tmp_path, monkeypatch):
    monkeypatch.setattr(half_precision, "PICTURE", tmp_path / "picture.png")
    half_precision.draw({task: {name: [2.0, 1.0] for name in NAMES} for task in half_precision.RATES})
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_page_has_every_training():
    page = (ROOT / "docs" / "how-to" / "mixed-precision.md").read_text()
    assert "pictures/half_precision.png" in page
    assert [name for name in NAMES if f"| {name} |" in page] == NAMES
