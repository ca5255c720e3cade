"""Transformations, and how they are run over trees."""
