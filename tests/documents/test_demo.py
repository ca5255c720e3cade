"""The demonstration: its figures, its picture, and what it says to bad arguments."""

import copy
import re
import struct
import sys

import pytest
import torch
from rich.progress import Progress

from functorch_optim.demo import show, train, tune
from functorch_optim.demo.__main__ import PACKAGES, PICTURE, main
from functorch_optim.demo.data import Batches, load


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # so that no row of the table is wrapped
    for name, value in {"COLUMNS": 5, "ROWS": 3, "DESCENT_STEPS": 4}.items():
        monkeypatch.setattr(tune, name, value)  # the whole grid takes as long as all other tests here
    with show.one_thread():
        yield


def rows(printed):
    """Read the numbers in each row of the table, by the first word of the row."""
    lines = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    return {cells[0].split()[0]: [float(cell) for cell in cells[1:] if cell.strip()] for cells in lines}


@pytest.mark.sampled(pool="long")
def test_networks_recognize_test_digits_and_a_table_and_a_picture_show_it(tmp_path, capsys):
    directory = tmp_path / "new" / "pictures"
    main(["--out", str(directory), "--epochs", "10"])
    printed = capsys.readouterr().out

    table = rows(printed)
    assert list(table) == ["functional", "stateful", "ensemble"]
    rate, best, vote, _ = table["ensemble"]
    assert 1e-5 <= rate <= 1
    assert 0 < vote <= 1
    for accuracy in (table["functional"][1], table["stateful"][1], best):
        assert 0.96 <= accuracy <= 1

    assert "Gradients of 15 trainings by learning rate and momentum, through 36 steps each" in printed
    assert str(directory / PICTURE) in printed
    picture = (directory / PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert 1000 <= width <= 4000
    assert 400 <= height <= 2000
    assert len(picture) > 30_000  # not blank


def test_the_three_ways_take_the_same_steps():
    digits, _ = load()
    digits = digits._replace(images=digits.images.double())  # in double precision the ways differ by rounding alone
    batches = Batches(digits, epochs=1, seed=3)
    steps = len(batches)
    network = train.make_network(seed=3).double()
    functional = train.train_functionally(network, batches, steps)
    stateful = train.train_statefully(copy.deepcopy(network), batches, steps)
    ensemble = train.train_ensemble(
        [network, network], torch.tensor([0.0, train.PEAK], dtype=torch.float64), batches, steps
    )

    assert functional.losses.shape == (steps,)
    # torch's clipping adds 1e-6 to the norm.
    torch.testing.assert_close(stateful.losses, functional.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ensemble.losses[:, 1], functional.losses, rtol=1e-10, atol=1e-10)
    for name, p in functional.params.items():
        torch.testing.assert_close(stateful.params[name], p, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ensemble.params[name][1], p, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ensemble.params[name][0], network.get_parameter(name), rtol=0, atol=0)


@pytest.mark.sampled(pool="long")
def test_a_seed_gives_the_same_figures_each_time():
    first, again, other = [show.compare("cpu", seed, 1, Progress(disable=True)) for seed in (1, 1, 2)]
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.losses, b.losses)
        assert torch.equal(a.accuracies, b.accuracies)
        assert not torch.equal(a.losses, c.losses)


@pytest.mark.sampled(pool="long")
def test_the_landscape_has_the_gradients_of_its_losses_and_descents_go_down():
    digits, _ = load()
    landscape = tune.explore(digits, seed=2)
    objective, steps = tune.make_objective(digits, seed=2)
    assert steps == landscape.steps == 36
    z = landscape.z[1, 2]
    gradient, loss = torch.func.grad_and_value(objective)(z)
    torch.testing.assert_close(landscape.losses[1, 2], loss)
    torch.testing.assert_close(landscape.gradients[1, 2], gradient)
    assert landscape.error < 1e-6
    starts = torch.tensor(tune.STARTS, dtype=torch.float64)
    torch.testing.assert_close(landscape.paths[0], torch.stack([starts[:, 0].log(), starts[:, 1].logit()], 1))
    losses = torch.vmap(objective)(landscape.paths[[0, -1]].flatten(0, 1)).reshape(2, -1)
    assert (losses[1] < losses[0]).all()


def test_the_grid_goes_from_the_smallest_to_the_largest():
    z = tune.make_grid()
    assert z.shape == (3, 5, 2)
    torch.testing.assert_close(z[0, [0, -1], 0].exp(), torch.tensor(tune.LEARNING_RATES, dtype=torch.float64))
    torch.testing.assert_close(z[[0, -1], 0, 1].sigmoid(), torch.tensor(tune.MOMENTA, dtype=torch.float64))


def test_train_and_test_digits_are_disjoint_and_stratified():
    digits, test = load()
    assert len(digits.labels) + len(test.labels) == 1797
    assert digits.images.min() == 0
    assert digits.images.max() == 1
    shares = [part.labels.bincount() / len(part.labels) for part in (digits, test)]
    torch.testing.assert_close(*shares, rtol=0, atol=5e-3)


@pytest.fixture
def no_training(monkeypatch):
    def fail(*args):
        raise AssertionError("the training began")

    monkeypatch.setattr(show, "show", fail)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number from 1 to"),
        (["--epochs", "many"], "argument --epochs: 'many' is not a whole number from 1 to"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to"),
        (["--seed", "0.5"], "argument --seed: '0.5' is not a whole number from 0 to"),
        (["--seed", str(2**32)], f"argument --seed: '{2**32}' is not a whole number from 0 to"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--device", "cuda"], "argument --device: there is no cuda device here"),
        (["--out", "file"], "argument --out: 'file' is not a directory"),
        (["--out", "file/below"], r"argument --out: cannot write to '.*below': "),
        (["--out", "taken"], "argument --out: cannot write to 'taken': "),
    ],
)
def test_bad_arguments_end_before_the_training(arguments, message, tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / PICTURE).mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, last_line)


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_packages_are_named_with_the_command_that_installs_them(package, tmp_path, monkeypatch, no_training):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=rf'needs {package} too: pip install "functorch_optim\[demo\]"'):
        main(["--out", str(tmp_path), "--epochs", "10"])
    assert not list(tmp_path.iterdir())
