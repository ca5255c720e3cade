"""The zoo: each optimizer is in it, its trainings are those of torch, and its tables say what was measured."""

import math
import pathlib
import subprocess
import sys

import pytest
import torch

import functorch_optim as fo

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks.zoo import functions, hypergradients, report, results
from benchmarks.zoo.__main__ import main, pairs
from benchmarks.zoo.contest import Effort, Result, compete, summarized
from benchmarks.zoo.entrants import EXCLUDED, NAMED, Entrant, public_optimizers
from benchmarks.zoo.tasks import all_tasks, digits, text

ROOT = pathlib.Path(__file__).parents[2]
TASKS = all_tasks()
TINY = Effort((1e-2,), seeds=1, share=0.02, evaluations=1)


def test_every_public_optimizer_is_a_row_or_is_left_out_for_a_reason():
    names = set(public_optimizers())
    assert names - NAMED.keys() - EXCLUDED.keys() == set()
    assert EXCLUDED.keys() <= names - NAMED.keys()


def test_the_public_optimizers_are_neither_rules_nor_schedules_nor_wrappers():
    names = public_optimizers()
    assert {"adam", "polyak", "schedule_free_sgd", "lbfgs"} <= set(names)
    assert not {"scale_by_adam", "scale_by_rprop", "one_cycle", "lookahead", "scale_by_learning_rate"} & set(names)


@pytest.mark.sampled(size=6)
@pytest.mark.parametrize("name", NAMED)
def test_every_entrant_takes_steps(name):
    lr = NAMED[name].default
    [losses] = compete(TASKS["quadratic"], NAMED[name], TINY._replace(lrs=(lr, 1e4 * lr))).losses
    assert math.isfinite(losses[0])
    assert losses[0] != losses[1]


@pytest.mark.sampled(size=3)
@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_trained(name):
    result = compete(TASKS[name], NAMED["adamw"], TINY)
    assert result.losses[0][0] < result.untrained
    assert math.isfinite(result.errors[0])


@pytest.mark.smoke
def test_trainings_of_a_contest_are_those_of_torch():
    task = TASKS["quadratic"]._replace(steps=12, decays=True, target=1.2)
    result = compete(task, NAMED["adamw"], Effort((0.03, 0.3), seeds=3, evaluations=4))
    assert result.decays == [0.0, 0.1]
    for decay, row in zip(result.decays, result.losses, strict=True):
        for lr, loss in zip(result.lrs, row, strict=True):
            assert loss == pytest.approx(sorted(losses_of_torch(task, lr, decay))[1], rel=1e-3)
    assert losses_of_torch(task, 0.3, 0.0)[0] != pytest.approx(losses_of_torch(task, 0.3, 0.1)[0], rel=1e-3)


def losses_of_torch(task, lr, decay):
    """Train with each seed by torch.optim, and return the last losses."""
    losses = []
    for seed in range(3):
        params = {name: p.requires_grad_() for name, p in task.init(seed).items()}
        opt = torch.optim.AdamW(params.values(), lr, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, task.steps)
        for batch in task.batches(seed, task.steps):
            opt.zero_grad()
            task.loss(params, batch).backward()
            opt.step()
            scheduler.step()
        losses.append(task.validation(params).item())
    return losses


def test_averages_are_judged_where_they_evaluate():
    free, effort = NAMED["schedule_free_sgd"], TINY._replace(lrs=(1.0,))
    averaged, raw = [compete(TASKS["quadratic"], free._replace(averages=on), effort) for on in (True, False)]
    assert averaged.losses != raw.losses


def test_a_contest_is_summarized_by_medians():
    # Times, seeds, decays, rates: the second rate reaches 1 and leaves it; the third diverges.
    losses = torch.tensor([[8.0, 8.0, 8.0], [3.0, 1.0, math.nan], [0.5, 2.0, math.nan]]).reshape(3, 1, 1, 3)
    losses = torch.cat([losses, losses + 0.25, losses + 100], 1)
    errors = torch.tensor([[0.1, 0.2, 0.3]] * 3).reshape(3, 1, 3)
    result = summarized(1.5, (0.1, 1.0, 10.0), [0.0], 20, losses, errors, seconds=9.0)
    assert result.untrained == 8.25
    assert result.losses == [[0.75, 2.25, math.inf]]
    assert result.reached == [[20.0, 10.0, math.inf]]
    assert (result.lr, result.decay, result.errors) == (0.1, 0.0, [0.1] * 3)
    assert result.seconds == 1.0


def made(losses, reached=(), errors=(0.5,), lrs=(1e-3, 1e-2, 1e-1)):
    reached = [list(reached) or [math.inf] * len(lrs)]
    return Result(list(lrs), [0.0], 100, 8.0, [list(losses)], reached, lrs[0], 0.0, list(errors), 1.0)


def book_of(**by_name):
    task = {"title": "a task", "steps": 100, "target": 1.0, "measured": "value"}
    about = {"environment": {"torch": "2"}, "effort": {}, "tasks": {"one": task}}
    return results.Book(about, {("one", name): result for name, result in by_name.items()}, {})


def test_medals_are_shared_and_infinity_gets_none():
    book = book_of(
        sgd=made([2.0, 2.0, 2.0], errors=[math.inf]),
        adam=made([0.5, 0.9, 3.0], [50, 40, math.inf], [0.2]),
        adamw=made([0.5, 0.9, 3.0], [60, 40, math.inf], [0.1]),
        lion=made([3.0, 0.9, 3.0], [60, 60, math.inf], [0.3]),
    )
    error, steps, width = [report.placed(book, discipline) for discipline in report.DISCIPLINES]
    assert error == {("one", "adamw"): 0, ("one", "adam"): 1, ("one", "lion"): 2}
    assert steps == {("one", "adamw"): 0, ("one", "adam"): 0, ("one", "lion"): 2}
    assert width == {("one", "adamw"): 0, ("one", "adam"): 0, ("one", "lion"): 2}
    assert report.decades(book.results["one", "adam"], 1.0) == 2.0
    rows = report.medal_table(book)
    assert rows[2] == "| `adamw` | 3 | 0 | 0 | 1 | 1 |"  # whose default is 1e-3
    assert rows[4] == "| `lion` | 0 | 0 | 3 | 1 | 0 |"  # whose default is 1e-4
    assert report.never_better(book) == []
    worse = book_of(sgd=made([0.5, 0.5, 2.0], [10, 10, math.inf]), adam=made([0.6, 2.0, 2.0], [10, math.inf, math.inf]))
    assert report.never_better(worse) == ["adam"]


def test_results_are_read_as_they_were_written(tmp_path):
    book = book_of(adam=made([0.5, math.inf, 3.0], errors=[math.inf, 0.25]))
    results.write(tmp_path / "zoo.json", book)
    assert results.read(tmp_path / "zoo.json") == book
    assert list(tmp_path.iterdir()) == [tmp_path / "zoo.json"]


def test_a_run_is_resumed_but_not_that_of_other_versions_or_tasks(tmp_path):
    path = tmp_path / "zoo.json"
    fresh = book_of()
    assert results.resumed(path, fresh) is fresh
    results.write(path, book_of(adam=made([0.5, 0.5, 0.5])))
    assert list(results.resumed(path, fresh).results) == [("one", "adam")]
    for changed in ({"environment": {"torch": "3"}}, {"effort": {"seeds": 1}}, {"tasks": {"one": {"target": 2.0}}}):
        other = fresh._replace(about={**fresh.about, **changed})
        with pytest.raises(ValueError, match="has results of another run: it differs in (torch|effort|one). Delete"):
            results.resumed(path, other)


def test_the_page_has_the_results_of_the_file():
    page = (ROOT / "docs" / "zoo.md").read_text()
    book = results.read(ROOT / "docs" / "zoo.json")
    assert report.published(page, book) == page
    other = book._replace(results=dict(list(book.results.items())[1:]))
    assert report.published(page, other) != page


def test_tables_and_a_picture_are_written_where_there_is_a_page(tmp_path):
    book = book_of(sgd=made([2.0, 2.0, math.inf]), adam=made([0.5, 0.9, 3.0], [50, 40, math.inf]))
    report.publish(book, tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "pictures").mkdir()
    (tmp_path / "zoo.md").write_text(
        "# Zoo\n\n<!-- medals -->\nold\n<!-- end -->\n\nText.\n<!-- range -->\n<!-- end -->\n"
    )
    for _ in range(2):  # the second time changes nothing
        report.publish(book, tmp_path)
    lines = (tmp_path / "zoo.md").read_text().splitlines()
    assert "| `adam` | 3 | 0 | 0 | 1 | 1 |" in lines
    assert "| `adam` | 2 🥇 | 1.0 |" in lines
    assert "old" not in lines
    assert lines.count("Text.") == lines.count("# Zoo") == 1
    assert (tmp_path / "pictures" / "zoo.png").read_bytes().startswith(b"\x89PNG")


def test_names_choose_contests():
    assert pairs(["digits_mlp", "sgd*"], quick=False) == [
        ("digits_mlp", name) for name in NAMED if name.startswith("sgd")
    ]
    assert len(pairs(None, quick=False)) == len(TASKS) * len(NAMED)
    with pytest.raises(ValueError, match="--only 'sdg' is no task and no optimizer; tasks: digits_mlp, "):
        pairs(["sdg"], quick=False)


@pytest.mark.sampled(pool="long")
def test_the_command():
    command = [sys.executable, "-m", "benchmarks.zoo", "--quick", "--only", "rosenbrock", "sgd", "adamw"]
    done = subprocess.run([*command, "--workers", "1"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("|  | 🥇 | 🥈 | 🥉 |")
    assert "`adamw`" in done.stdout
    assert "2/2, 0.0 minutes left, rosenbrock adamw" in done.stderr


def test_a_contest_that_fails_is_said_and_the_others_are_held(monkeypatch, capsys):
    def broken(lr=1.0):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(NAMED, "broken", Entrant("broken", broken))
    threads, arguments = torch.get_num_threads(), ["--quick", "--only", "rosenbrock", "broken", "sgd", "--workers", "1"]
    try:
        assert main(arguments) == 1
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    printed = capsys.readouterr()
    assert "rosenbrock broken failed: RuntimeError: no such luck" in printed.err
    assert "`sgd`" in printed.out


# The tasks. -----------------------------------------------------------------------------------------------------------


def test_the_digits_of_the_three_parts_are_different_ones():
    parts = digits()
    assert [len(part.y) for part in parts] == [1237, 200, 360]
    training, validation, test = [{tuple(row) for row in part.x.tolist()} for part in parts]
    assert not training & (validation | test)
    assert not validation & test


def test_the_next_characters_of_a_piece_are_its_characters_moved_by_one():
    for part in text():
        assert torch.equal(part.x[:, 1:], part.y[:, :-1])


def test_the_equation_has_its_solution_and_the_network_its_curvature():
    x = torch.linspace(0, 1, 7, dtype=torch.float64)
    curvature = torch.vmap(torch.func.grad(torch.func.grad(functions.solution)))
    torch.testing.assert_close(-curvature(x), functions.force(x))
    params = functions.tanh_network(torch.Generator().manual_seed(0))

    def u(x):
        return functions.network_and_curvature(params, x[None])[0][0]

    expected = torch.stack([torch.func.grad(torch.func.grad(u))(point) for point in x])
    torch.testing.assert_close(functions.network_and_curvature(params, x)[1], expected)


def test_minima():
    assert functions.rosenbrock({"x": torch.ones(10)}) == 0
    axes = torch.linalg.eigvalsh(functions.ill_conditioned())
    assert (axes[-1] / axes[0]).item() == pytest.approx(functions.CONDITION)


# Hypergradients. ------------------------------------------------------------------------------------------------------


def test_hypergradients_are_those_of_the_training():
    task = TASKS["equation"]
    train = hypergradients.training(task, 5)
    z = torch.tensor([0.01, 0.1, 0.01, 0.1], dtype=torch.float64).log()
    assert fo.meta.check_derivative(lambda z: task.validation(train(z)), z).ok
    loss = task.validation(train(z)).item()
    assert loss == pytest.approx(losses_with(task, 0.01, (0.9, 0.99), 0.1), rel=1e-9)


def losses_with(task, lr, betas, decay):
    """Train five steps by torch.optim."""
    params = fo.tree.map(torch.Tensor.requires_grad_, task.init(0))
    opt = torch.optim.AdamW(fo.tree.flatten(params)[0], lr, betas, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5)
    for _ in range(5):
        opt.zero_grad()
        task.loss(params, None).backward()
        opt.step()
        scheduler.step()
    return task.validation(params).item()


def test_a_search_keeps_the_best_of_its_points():
    batches = iter(
        [(torch.tensor([[1.0], [2.0]]), torch.tensor([5.0, math.nan])), (torch.tensor([[3.0]]), torch.ones(1))]
    )
    found = hypergradients.best_of(batches, lambda seconds: False)
    assert (found.z.item(), found.loss, found.trainings) == (3.0, 1.0, 3)


@pytest.mark.sampled(pool="long")
def test_both_ways_to_tune_run_for_the_same_time():
    tuned = hypergradients.compare(hypergradients.QUICK)
    for ways in tuned.values():
        ours, theirs = ways["hypergradients"], ways["random search"]
        assert theirs["seconds"] >= ours["seconds"]
        assert theirs["hyperparameters"].startswith("lr ")
    assert len(report.tuned_table(tuned)) == 2 + 4
