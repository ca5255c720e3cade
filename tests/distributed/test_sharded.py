"""DTensors: sharded training on two and four ranks is the training of one process."""

import pytest
import sharded_cases
from ranks import on_ranks


def test_training_on_two_ranks_is_that_of_one_process():
    on_ranks(2, sharded_cases.CASES)


def test_training_on_four_ranks_is_that_of_one_process():
    on_ranks(4, sharded_cases.OF_FOUR)


def test_what_fails_on_a_rank_fails_here():
    with pytest.raises(AssertionError, match="no mesh is empty"):
        on_ranks(1, [sharded_cases.a_case_that_fails])
