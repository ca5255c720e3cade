"""Transformations around others: some of their steps are left out, or they are given other parameters."""
