"""The programs of the page on frameworks: a training goes on from its checkpoint as if it had not stopped."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = ROOT / "docs" / "scripts" / "frameworks"
PACKAGES = {"lightning": "lightning", "accelerate": "accelerate", "trainer": "transformers", "composer": "composer"}


def output_of(program, package, folder, *arguments):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    run = subprocess.run(
        [sys.executable, str(PROGRAMS / f"{program}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("form", ["class", "factory", "chain"])
@pytest.mark.parametrize(("framework", "package"), PACKAGES.items(), ids=PACKAGES)
def test_a_training_goes_on_from_its_checkpoint(framework, package, form, tmp_path):
    output = output_of(f"with_{framework}", package, tmp_path, form)
    assert f"{form} goes on as if it had not stopped: True" in output


def test_a_tensordict_is_a_tree(tmp_path):
    output = output_of("with_tensordict", "tensordict", tmp_path)
    assert "TensorDict TensorDict\nsum: 1.0" in output


@pytest.mark.parametrize("form", ["class", "factory", "chain"])
def test_a_training_that_forgets_its_state_is_noticed(form, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAMS)
    monkeypatch.delitem(sys.modules, "task", raising=False)
    import task

    def train(forgets):
        model = task.make_model()
        opt = task.make_optimizer(model, form)
        x, y = task.make_data().tensors
        for t in range(4):
            if t == 2:
                saved = opt.state_dict()
                opt = task.make_optimizer(model, form)
                if not forgets:
                    opt.load_state_dict(saved)
            opt.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            opt.step()
        return model

    assert task.same(train(forgets=False), train(forgets=False))
    assert not task.same(train(forgets=False), train(forgets=True))


def test_the_page_has_every_program():
    page = (ROOT / "docs" / "how-to" / "frameworks.md").read_text()
    programs = [path.name for path in PROGRAMS.glob("*.py")]
    assert {name for name in programs if f"docs/scripts/frameworks/{name}" in page} == set(programs)
    assert set(programs) == {f"with_{name}.py" for name in (*PACKAGES, "tensordict")} | {"task.py"}
