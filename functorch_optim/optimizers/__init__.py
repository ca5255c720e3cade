"""Optimizers: one family of algorithms a file."""
