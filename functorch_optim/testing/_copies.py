"""Copies of objects through bytes: torch.save and pickle."""

import io
import pickle
from typing import Any

import torch


def through_a_file(thing: Any, weights_only: bool = True) -> Any:
    """Save with torch, and load again, as a checkpoint does."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def through_pickle(thing: Any) -> Any:
    """Pickle, and unpickle."""
    return pickle.loads(pickle.dumps(thing))
