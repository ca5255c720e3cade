"""The choice of the ranks that compute whole tensors."""

from hypothesis import given
from hypothesis import strategies as st

from functorch_optim._execution.wholes import spread


@given(st.lists(st.integers(0, 10**12), max_size=30), st.integers(1, 9))
def test_no_rank_has_more_than_the_mean_and_one_piece(work, ranks):
    chosen = spread(work, ranks)
    busy = [sum(size for size, rank in zip(work, chosen, strict=True) if rank == k) for k in range(ranks)]
    assert max(busy) * ranks <= sum(work) + max(work, default=0) * ranks


def test_the_largest_pieces_are_given_first():
    assert spread([1, 1, 1, 3], 2) == [1, 1, 1, 0]
