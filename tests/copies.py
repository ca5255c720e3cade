"""Copies of things by way of bytes, as the test kit makes them."""

from functorch_optim.testing.copies import through_a_file, through_pickle

__all__ = ["through_a_file", "through_pickle"]
