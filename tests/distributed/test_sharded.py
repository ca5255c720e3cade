"""DTensors: sharded training on two and four ranks is the training of one process."""

import functools
import os
import pathlib
import subprocess
import sys

import narrow_cases
import owner_cases
import part_cases
import pytest
import resuming_cases
import sharded_cases
from ranks import on_ranks

SCRIPT = pathlib.Path(__file__).parents[2] / "docs" / "scripts" / "train_sharded.py"


def test_training_on_two_ranks_is_that_of_one_process_or_warns():
    on_ranks(2, sharded_cases.CASES + owner_cases.CASES + narrow_cases.CASES + part_cases.CASES)


def test_training_on_four_ranks_is_that_of_one_process():
    on_ranks(4, sharded_cases.OF_FOUR + owner_cases.OF_FOUR)


def test_checkpoints_of_four_ranks_go_on_in_two_and_in_one_process(tmp_path):
    on_ranks(4, [functools.partial(resuming_cases.saves_for_others, tmp_path)])
    of_four = functools.partial(resuming_cases.goes_on_with_that_of_others, tmp_path)
    on_ranks(2, [resuming_cases.sharded_checkpoints_go_on_sharded_and_whole, of_four])
    of_four(None)


def test_the_script_of_the_documents_trains_on_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "resumed at step 20" in run.stdout


def test_what_fails_on_a_rank_fails_here():
    with pytest.raises(AssertionError, match="no mesh is empty"):
        on_ranks(1, [sharded_cases.a_case_that_fails])
