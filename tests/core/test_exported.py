"""torch.export: exported updates are saved, and loaded by another process; states are loaded as weights are."""

import io
import os
import subprocess
import sys
from typing import NamedTuple

import export_cases
import pytest
import torch
from catalogue import rows
from export_cases import CASES, Step, StepOfSaved, arguments_of, summed
from torch.utils import _pytree as pytree

import functorch_optim as fo


class OpenState(NamedTuple):
    """A state that nobody has declared."""

    total: torch.Tensor


def assert_same(found, expected):
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(found), pytree.tree_leaves(expected))


@pytest.mark.sampled(pool="compiled")
def test_another_process_loads_what_was_exported(tmp_path):
    files, expected = [], {}
    for name, tx in CASES.items():
        arguments, program = tmp_path / f"{name}.pt", tmp_path / f"{name}.pt2"
        given = arguments_of(tx)
        torch.save(given, arguments)
        torch.export.save(torch.export.export(Step(tx), given), program)
        expected[arguments] = fo.step(tx, *given)
        files += [str(arguments), str(program)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", export_cases.__file__, *files]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    for arguments, results in expected.items():
        assert_same(torch.load(arguments), results)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_dict_is_loaded_and_made_inside(strict):
    tx = CASES["chain"]
    grads, state, params = arguments_of(tx)
    exported = torch.export.export(StepOfSaved(tx), (grads, fo.state_dict(state), params), strict=strict)
    found, saved = exported.module()(grads, fo.state_dict(state), params)
    expected, after = fo.step(tx, grads, state, params)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(fo.load_state_dict(tx.init(params), saved), after)


def test_wrong_values_are_noticed_outside_alone():
    tx = CASES["chain"]
    grads, state, params = arguments_of(tx)
    saved = {**fo.state_dict(state), "0.step": torch.tensor(-1.0)}
    with pytest.raises(ValueError, match="it is a count of updates"):
        fo.load_state_dict(tx.init(params), saved)
    torch.export.export(StepOfSaved(tx), (grads, saved, params))


@rows
def test_the_state_of_every_row_is_written_and_read(row):
    state = row().init({"w": torch.ones(4, 4), "b": torch.ones(4, 2)})
    structure = pytree.tree_structure(state)
    assert pytree.treespec_loads(pytree.treespec_dumps(structure)) == structure
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), state)


def test_a_state_that_nobody_has_declared_is_not_written():
    tx = fo.GradientTransformation(OpenState, lambda updates, state, params: (updates, state))
    state = tx.init(torch.ones(2))
    with pytest.raises(NotImplementedError, match="Can't serialize TreeSpec of namedtuple class .*OpenState"):
        pytree.treespec_dumps(pytree.tree_structure(state))
    declared = summed(export_cases.TotalState).init(torch.ones(2))
    pytree.treespec_dumps(pytree.tree_structure(declared))
